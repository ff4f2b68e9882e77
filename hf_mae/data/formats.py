"""The formats images are read from, each as an index of chunks: row counts, and a read of one chunk.

| source  | one chunk                                    | index                              |
|---------|----------------------------------------------|------------------------------------|
| Parquet | a row group; remote: neighbours, see below   | the footers                        |
| Tar     | a run of 32 samples (`webdataset.py`)        | one scan of the member headers     |
| Folder  | a file (`rows.py`)                           | the sorted list of names and sizes |
| Arrow   | a row (`rows.py`)                            | the length                         |
| Digits  | a row (`rows.py`)                            | the length                         |

A chunk whose content is damaged is a chunk of bad rows with a reason, counted and replaced by the loader. Whatever the
operating system or the network says is asked again, then the run stops: reading is stateless, so asking again is always
safe, and a row that only happened to be out of reach must not be replaced, or a resumed run would differ.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mae.data.order import Ints
from hf_mae.patience import (
    HTTP_ERROR,
    GaveUpError,
    is_passing,
    is_unknown_name,
    may_be_expired,
    one_line,
    patient,
    remedy,
)

Buffer = bytes | memoryview
T = TypeVar("T")

# Neighbouring row groups of a remote file are one chunk up to these sizes: one request each, and the Hub allows
# 3,000 to 5,000 requests in five minutes. The rule is part of the fingerprint; changing it ends every remote run.
REMOTE_CHUNK_BYTES = 32 * 2**20
REMOTE_CHUNK_ROWS = 1024

# Four minutes in all, and the client's own patience of up to 23 s in each try: an outage of the Hub mostly ends sooner,
# and a run that waits costs less than one that has to be started again.
RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0)
LOCAL_RETRY_SECONDS = (0.1, 0.5, 2.0)

# A machine short of something, or a network file system with hiccups: the next try may succeed.
PASSING = frozenset(
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT]
)


UNREADABLE = int(np.iinfo(np.int64).min)
"""In `Source.all_labels`: the label cannot be read, and neither can the image."""


@dataclass(frozen=True)
class Chunk:
    """The rows of one chunk, still encoded."""

    images: Sequence[Buffer | None]
    """Encoded files, mostly views of one buffer; None is a missing picture."""
    labels: Ints
    """[rows] labels, -1 where there is none."""
    error: str | None = None
    """Why none of the rows could be read."""


class Source(ABC):
    """Images in a fixed set of chunks.

    Attributes:
        sizes: [chunks] rows of each chunk, all at least 1.
        fingerprint: changes when a file is renamed, added, removed or has another size.
        bytes_per_row: mean encoded bytes of a row, None if unknown.
        has_labels: whether rows have integer labels.
        label_names: names of the classes, None if unknown.
        revision: commit of a Hub data set.
        where: what was opened, in words.
        notes: what was inferred or left out, in words.
        schema: columns of the table and what they hold, in words; empty where the format has no columns.
        pixel_range: stored values that become black and white, see `hf_mae.data.images.decode_image`; of the recipe.
        why_unlabelled: why there are no labels, where more can be said than that there are none.
        former_fingerprint: what versions before metadata tables were read called the same rows; a run that they began
            goes on. None where it is `fingerprint`.
        remote: reading a chunk asks a server.
    """

    kind: str
    sizes: Ints
    fingerprint: str
    bytes_per_row: float | None = None
    has_labels: bool = False
    label_names: list[str] | None = None
    revision: str | None = None
    where: str = ""
    notes: list[str]
    num_shards: int = 1
    schema: Mapping[str, str] = MappingProxyType({})
    pixel_range: tuple[float, float] | None = None
    why_unlabelled: str = ""
    former_fingerprint: str | None = None
    remote: bool = False

    @abstractmethod
    def read(self, chunk: int) -> Chunk:
        """Read one chunk. Thread-safe.

        Raises:
            RuntimeError: the file is gone, or could not be reached in several tries; names it.
        """

    @abstractmethod
    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the shard a row is in, and its number in it."""

    def labels(self, chunk: int) -> Ints | None:
        """Return the labels of a chunk, or None where that means reading its images or asking a server."""
        return None

    def all_labels(self) -> Ints | None:
        """Return the labels of all rows in their order, or None where `labels` gives none.

        -1 is a row without a label, `UNREADABLE` one of a damaged chunk.
        """
        with ThreadPoolExecutor(4, thread_name_prefix="labels") as pool:
            parts = list(pool.map(self.labels, range(len(self.sizes))))
        if all(part is None for part in parts):
            return None
        rows = zip(parts, self.sizes, strict=True)
        return np.concatenate([np.full(n, UNREADABLE) if part is None else part for part, n in rows])

    def names(self, chunk: int) -> list[str] | None:
        """Return the file names that the rows of a chunk came with, None where the format keeps none.

        Raises:
            RuntimeError: as `read`.
        """
        return None

    def summary(self) -> str:
        """Say what was opened and what was inferred, for the first lines of a run."""
        rows = int(self.sizes.sum())
        parts = [f"{rows:,} images in {self.num_shards:,} {self.kind}, {len(self.sizes):,} chunks", *self.notes]
        if self.bytes_per_row:
            parts.append(f"{self.bytes_per_row / 1000:.1f} kB an image")
        if self.has_labels:
            parts.append(f"{len(self.label_names)} classes" if self.label_names else "labels without names")
        else:
            parts.append("no labels")
        if self.revision:
            parts.append(f"revision {self.revision}")
        return f"data: {self.where}: " + "; ".join(parts)


def fingerprint(*facts: Any) -> str:
    """Hash JSON-able facts to 16 hex digits."""
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def schema_in_words(schema: pa.Schema) -> dict[str, str]:
    """Map the columns of a table to what they hold: `image`, or Arrow's name of the type."""
    return {name: type_name(schema.field(name).type) for name in schema.names}


def type_name(kind: pa.DataType) -> str:
    """Name a column's type as a user knows it."""
    return "image" if pa.types.is_struct(kind) and holds_bytes(kind) else str(kind)


def holds_bytes(kind: pa.DataType) -> bool:
    """Say whether a column may hold encoded images: bytes, or a struct with a field `bytes`."""
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") < 0:
            return False
        inner = kind.field("bytes").type  # null where a writer without a schema saw paths only
        return holds_bytes(inner) or (pa.types.is_null(inner) and kind.get_field_index("path") >= 0)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def unreadable(rows: int, error: BaseException) -> Chunk:
    """Return a chunk of bad rows."""
    return Chunk([None] * rows, np.full(rows, -1, dtype=np.int64), error=one_line(error))


# ------------------------------------------------------------------------------------------------ Parquet


class ParquetSource(Source):
    """Row groups of Parquet files; only the encoded bytes and the label column are read.

    A row may name an image file in place of its bytes: in the field `path` of an image column whose `bytes` are null,
    or in a column of text. Such files are read from the folder of the Parquet file or from `root`, never from outside
    of these, whatever the row says: a Parquet file may come from anywhere, and must not choose what of this machine is
    trained on. Of remote files they are refused.

    Args:
        names: names of the files for messages and the fingerprint, without the folder they happen to lie in.
        paths: where they are: local paths, or paths on `filesystem`.
        filesystem: an fsspec file system for remote files, None for local ones.
        choose: picks (image column, label column or None, class names or None) from the schema; raises ValueError.
        root: folder that local files lie in, None for files that came from the Hub.

    Raises:
        ValueError: a file is not Parquet, columns differ, there are no rows, or all rows name files that are not there.
    """

    kind = "Parquet files"

    def __init__(
        self,
        names: Sequence[str],
        paths: Sequence[str],
        *,
        choose: Callable[[pa.Schema], tuple[str, str | None, list[str] | None]],
        filesystem: Any | None = None,
        root: Path | None = None,
    ) -> None:
        self.remote, self.root = filesystem is not None, root
        self.files, self.paths, self.filesystem = list(names), list(paths), filesystem
        with ThreadPoolExecutor(16, thread_name_prefix="footer") as pool:
            self.footers: list[pq.FileMetaData] = list(pool.map(self._footer, range(len(self.paths))))
        schema = self.footers[0].schema.to_arrow_schema()
        self.image_column, self.label_column, self.label_names = choose(schema)
        self.has_labels, self.schema = self.label_column is not None, schema_in_words(schema)
        image_type = schema.field(self.image_column).type
        is_struct = pa.types.is_struct(image_type)
        self._path_leaf = self.image_column if pa.types.is_string(image_type) else None
        if is_struct and image_type.get_field_index("path") >= 0:
            self._path_leaf = f"{self.image_column}.path"
        leaf = f"{self.image_column}.bytes" if is_struct else self.image_column
        null_leaf = is_struct and pa.types.is_null(image_type.field("bytes").type)
        self.columns = [leaf] + ([self.label_column] if self.label_column else [])

        self.chunks: list[tuple[int, list[int], int, int]] = []  # file, its row groups, first row, rows
        image_bytes, sizes, only_names = 0, [], True
        for f, footer in enumerate(self.footers):
            at = {footer.schema.column(i).path: i for i in range(footer.num_columns)}
            if missing := [c for c in self.columns if c not in at]:
                raise ValueError(f"{self.files[f]} lacks the column {missing[0]} that {self.files[0]} has")
            first = 0
            for g in range(footer.num_row_groups):
                group = footer.row_group(g)
                columns = [group.column(at[c]) for c in self.columns]
                image_bytes += columns[0].total_uncompressed_size
                only_names = only_names and (self._path_leaf == leaf or null_leaf or _all_null(columns[0]))
                stored = sum(c.total_compressed_size for c in columns)
                sizes.append((f, group.num_rows, stored))
                if group.num_rows:
                    self._append(f, g, first, group.num_rows, stored)
                first += group.num_rows
        rows = sum(n for _, n, _ in sizes)
        if not rows:
            raise ValueError(f"{', '.join(self.files[:3])}: the Parquet files hold no rows")
        self.sizes = np.array([n for _, _, _, n in self.chunks], dtype=np.int64)
        self.bytes_per_row = image_bytes / rows
        named: list[Any] = []
        if only_names:
            named = self._named_files(rows)
        self.num_shards = len(self.files)
        self.fingerprint = fingerprint(
            "parquet", self.files, self.columns, sizes, [c[1] for c in self.chunks], *named[:1]
        )
        self.notes = [f"column {self.image_column}", *named[1:]]
        if self.label_column:
            self.notes.append(f"labels from {self.label_column}")

    def _named_files(self, rows: int) -> list[Any]:
        """Look for the files that the rows name, where none has its bytes: [their sizes' digest, a note].

        Raises:
            ValueError: none is there, or none may be read.
        """
        embed = (
            "write the images themselves into the Parquet files: datasets.load_dataset('parquet', ...).cast_column("
            f"{self.image_column!r}, datasets.Image()).to_parquet(...) where the files are"
        )
        if self._path_leaf is None:
            raise ValueError(f"{self.files[0]}: column {self.image_column} is null in every row; download it again")
        if self.root is None:
            raise ValueError(
                f"{self.files[0]}: the rows of column {self.image_column} hold paths without the images, and files "
                f"that downloaded rows name are not read; {embed}"
            )
        missing, first, sizes = 0, "", []
        for chunk in range(len(self.chunks)):
            for name in self.names(chunk) or []:
                path = self._local_file(chunk, name)
                if path is None:
                    missing, first = missing + 1, first or name
                sizes.append(path.stat().st_size if path is not None else -1)
        folders = " or ".join(dict.fromkeys(str(f) for f in self._folders(0)))
        rule = f"the rows of column {self.image_column} name image files, which are read from {folders} alone"
        if missing == rows:
            raise ValueError(
                f"{self.files[0]}: {rule}, and none is there (first {first!r}); move them there, or {embed}"
            )
        self.bytes_per_row = sum(max(size, 0) for size in sizes) / rows
        lost = f"; {missing:,} of {rows:,} are not there, first {first!r}" if missing else ""
        return [hashlib.sha256(json.dumps(sizes).encode()).hexdigest(), rule + lost]

    def _folders(self, chunk: int) -> list[Path]:
        assert self.root is not None
        return [Path(self.paths[self.chunks[chunk][0]]).parent, self.root]

    def _local_file(self, chunk: int, name: str) -> Path | None:
        """Return the file that a row names, if it lies in a folder of the data; links are the user's own."""
        for folder in self._folders(chunk):
            base = os.path.abspath(folder)
            path = os.path.normpath(os.path.join(base, name))  # an absolute name stands for itself
            if name and "://" not in name and path.startswith(base.rstrip(os.sep) + os.sep) and os.path.isfile(path):
                return Path(path)
        return None

    def _append(self, file: int, group: int, first: int, rows: int, stored: int) -> None:
        """Add a row group, to the chunk before it where the rule for remote files says so."""
        if self.filesystem is not None and self.chunks and self.chunks[-1][0] == file:
            _, groups, start, have = self.chunks[-1]
            if have + rows <= REMOTE_CHUNK_ROWS and self._open_bytes + stored <= REMOTE_CHUNK_BYTES:
                self.chunks[-1] = (file, [*groups, group], start, have + rows)
                self._open_bytes += stored
                return
        self.chunks.append((file, [group], first, rows))
        self._open_bytes = stored

    def _footer(self, file: int) -> pq.FileMetaData:
        if self.filesystem is not None:
            return retry(lambda: self._remote_footer(file), f"the footer of {self.files[file]}", first=True)
        try:
            return pq.read_metadata(self.paths[file])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{self.paths[file]} is not a readable Parquet file ({one_line(error)}); download it again, or move "
                "it out of the folder"
            ) from error

    def _remote_footer(self, file: int) -> pq.FileMetaData:
        assert self.filesystem is not None
        # Without its own cache the file system asks for exactly the ranges that are read.
        with self.filesystem.open(self.paths[file], cache_type="none") as handle:
            return pq.read_metadata(handle)

    def _table(self, chunk: int, columns: list[str]) -> pa.Table:
        file, groups, _, _ = self.chunks[chunk]
        footer, path = self.footers[file], self.paths[file]
        if self.filesystem is None:
            with pq.ParquetFile(path, metadata=footer, page_checksum_verification=True) as opened:
                return opened.read_row_groups(groups, columns=columns, use_threads=False)
        with (
            self.filesystem.open(path, cache_type="none") as handle,
            # pre_buffer joins the columns' ranges into one request.
            pq.ParquetFile(handle, metadata=footer, pre_buffer=True, page_checksum_verification=True) as opened,
        ):
            return opened.read_row_groups(groups, columns=columns, use_threads=False)

    def read(self, chunk: int) -> Chunk:
        """Read the row group, or the neighbouring row groups, of a chunk."""
        file, groups, _, rows = self.chunks[chunk]
        if self.filesystem is not None:
            what = f"{self.files[file]}, row group {groups[0]}" + (f" to {groups[-1]}" if len(groups) > 1 else "")
            return self._chunk(retry(lambda: self._table(chunk, self.columns), what))
        try:
            data = self._chunk(read_local(lambda: self._table(chunk, self.columns), self.paths[file]))
        except pa.ArrowMemoryError:
            raise
        except (pa.ArrowException, OSError) as error:
            return unreadable(rows, error)
        if self.root is None or self._path_leaf is None or all(image is not None for image in data.images):
            return data
        images, names = list(data.images), self.names(chunk) or []
        for row, name in enumerate(names):
            if images[row] is None and (path := self._local_file(chunk, name)) is not None:
                images[row] = read_local(path.read_bytes, path)
        return Chunk(images, data.labels)

    def _chunk(self, table: pa.Table) -> Chunk:
        labels = np.full(table.num_rows, -1, dtype=np.int64)
        if self.label_column:
            labels = column_labels(table.column(self.label_column))
        if self._path_leaf == self.image_column:
            return Chunk([None] * table.num_rows, labels)
        return Chunk(encoded_images(table.column(self.image_column)), labels)

    def labels(self, chunk: int) -> Ints | None:
        """Read the label column alone, of local files."""
        if self.label_column is None or self.filesystem is not None:
            return None
        try:
            return column_labels(self._table(chunk, [self.label_column]).column(0))
        except (pa.ArrowException, OSError):
            return None  # only asked for a description; reading the chunk says what is wrong

    def names(self, chunk: int) -> list[str] | None:
        """Read the field `path` of the image column, or a column of paths, where there is one; a null is empty."""
        file, _, _, _ = self.chunks[chunk]
        leaf, footer = self._path_leaf, self.footers[file].schema
        if leaf is None or leaf not in (footer.column(i).path for i in range(len(footer))):
            return None
        what = f"the file names in {self.files[file]}"
        if self.filesystem is not None:
            table = retry(lambda: self._table(chunk, [leaf]), what)
        else:
            try:
                table = read_local(lambda: self._table(chunk, [leaf]), self.paths[file])
            except (pa.ArrowException, OSError) as error:
                raise RuntimeError(f"could not read {what}: {one_line(error)}; mend or replace the file") from error
        column = table.column(0).combine_chunks()
        if leaf != self.image_column:
            column = column.flatten()[column.type.get_field_index("path")]
        return [name or "" for name in column.to_pylist()]

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the file, and the row counted from its beginning."""
        file, _, first, _ = self.chunks[chunk]
        return self.files[file], first + row


def _all_null(column: Any) -> bool:
    """Say whether a column chunk holds nothing, as far as its footer tells."""
    statistics = column.statistics
    return statistics is not None and statistics.has_null_count and statistics.null_count == column.num_values


def encoded_images(column: pa.ChunkedArray) -> list[memoryview | None]:
    """Return views of the encoded files in a column of bytes, or of structs with a field `bytes`."""
    views: list[memoryview | None] = []
    for part in column.chunks:
        if pa.types.is_struct(part.type):
            part = part.flatten()[part.type.get_field_index("bytes")]  # keeps the nulls of the struct
        if not pa.types.is_large_binary(part.type):
            part = part.cast(pa.large_binary())
        _, offsets, data = part.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[part.offset : part.offset + len(part) + 1].tolist()
        view = memoryview(data if data is not None else b"").cast("B")
        valid = part.is_valid().to_pylist()
        views += [view[a:b] if ok else None for a, b, ok in zip(ends, ends[1:], valid, strict=False)]
    return views


def column_labels(column: pa.ChunkedArray) -> Ints:
    """Return an integer column as int64, -1 where it is null."""
    return column.cast(pa.int64()).fill_null(-1).to_numpy().astype(np.int64)


def retry(action: Callable[[], T], what: str, *, first: bool = False) -> T:
    """Call `action` until the network lets it through, for minutes; a new call signs its addresses anew.

    Each wait is told in a line on standard error.

    Args:
        action: reads.
        what: it reads.
        first: nothing was read from there before. Afterwards a name that is not found any more is waited for: it was
            spelt right, and an outage of the network can look like that (on macOS it does).

    Raises:
        RuntimeError: it never got through, or for a reason that does not pass by itself; names `what`.
    """

    def attempt() -> T:
        try:
            return action()
        except pa.ArrowMemoryError:
            raise
        except pa.ArrowException as error:  # what arrived is cut short, or not what was asked for
            raise _TornError(one_line(error)) from error
        except OSError as error:
            # Arrow says so too with an OSError of its own, which has neither a number nor a reason.
            if type(error) is OSError and error.errno is None and error.__cause__ is None:
                raise _TornError(one_line(error)) from error
            raise

    def passing(error: BaseException) -> bool:
        if is_passing(error) or isinstance(error, _TornError) or may_be_expired(error):
            return True
        return not first and is_unknown_name(error)

    try:
        return patient(f"reading {what}", attempt, tries=len(RETRY_SECONDS) + 1, pauses=RETRY_SECONDS, passing=passing)
    except pa.ArrowMemoryError:
        raise
    except (OSError, HTTP_ERROR, GaveUpError) as error:
        raise RuntimeError(
            f"could not read {what}: {one_line(error)}; {remedy(error)}, then start again: the run continues from its "
            "last checkpoint"
        ) from error


class _TornError(OSError):
    """A remote read gave bytes that are not Parquet."""


def read_local(action: Callable[[], T], path: str | Path) -> T:
    """Call `action`, which reads a local file, until the system lets it through, four times in all.

    Raises:
        RuntimeError: the system says that the file is gone or out of reach; names it.
        OSError: without an errno, which is how Arrow reports damaged content; and all that is no OSError.
    """
    for pause in (*LOCAL_RETRY_SECONDS, None):
        try:
            return action()
        except OSError as error:
            if error.errno is None:
                raise
            if pause is None or error.errno not in PASSING:
                raise RuntimeError(
                    f"could not read {path}: {one_line(error)}; it was there when the run started, so restore it (or "
                    "what the machine is short of), then start again: the run continues from its last checkpoint"
                ) from error
        time.sleep(pause)
    raise AssertionError
