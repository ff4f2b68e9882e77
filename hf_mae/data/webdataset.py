"""webdataset tars as a source: one scan of the headers, then reads at offsets; nothing is extracted."""

from __future__ import annotations

import array
import hashlib
import json
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from hf_mae.data.formats import Chunk, Source, fingerprint, one_line, read_local
from hf_mae.data.images import EXTENSIONS
from hf_mae.data.order import Ints

TAR_RUN = 32
"""Samples in a chunk."""


class TarSource(Source):
    """Samples of uncompressed tar files in the webdataset layout, read at their offsets; nothing is extracted.

    Neighbouring members that share a name up to its first dot are a sample. Links and special members are left out.

    Args:
        names: names of the files for messages and the fingerprint.
        paths: local paths.
        label: member or JSON key of the labels; None takes `.cls`, else `label` of `.json`; `none` ignores them.
    """

    kind = "tar files"

    def __init__(self, names: Sequence[str], paths: Sequence[str], *, label: str | None = None) -> None:
        self.files, self.paths = list(names), list(paths)
        self._member, self._key = ("cls", "label") if label is None else (label, label)
        self._use: int | None = None  # which span holds the label: 1 its own member, 2 the JSON
        left_out: Counter[str] = Counter()
        self._first_members: list[str] = []
        self._headers: list[Ints] = []  # [samples] of each tar: where the header of the image begins
        # [samples, 3, 2]: offset and bytes of the image, the label's member and the JSON; -1 where there is none.
        self._spans = [self._scan(f, left_out) for f in range(len(self.paths))]
        self.chunks = [(f, a) for f, spans in enumerate(self._spans) for a in range(0, len(spans), TAR_RUN)]
        if not self.chunks:
            raise ValueError(f"{', '.join(self.files[:3])}: the tar files hold no images ({_counts(left_out)})")
        self.sizes = np.array([len(self._run(c)) for c in range(len(self.chunks))], dtype=np.int64)
        self.bytes_per_row = float(np.concatenate([spans[:, 0, 1] for spans in self._spans]).mean())
        self.num_shards = len(self.files)
        if label != "none":
            self._find_labels(label)
        self.has_labels = self._use is not None
        scanned = [hashlib.sha256(spans.tobytes()).hexdigest() for spans in self._spans]
        self.fingerprint = fingerprint("tar", self.files, scanned, self._use, self._key)
        self.notes = []
        if self._use is not None:
            self.notes.append(f"labels from {self._member if self._use == 1 else f'{self._key} of json'}")
        elif label is None and "cls" in self._first_members:
            self.notes.append("the .cls members hold no integers and were not used for labels")
        if left_out:
            self.notes.append(f"left out: {_counts(left_out)}")

    def _scan(self, file: int, left_out: Counter[str]) -> Ints:
        """List the samples of a tar as spans [samples, 3, 2]."""
        path, samples, headers = self.paths[file], array.array("q"), array.array("q")
        members: dict[str, tuple[int, int]] = {}
        header = -1

        def close() -> None:
            if "image" in members:
                self._first_members = self._first_members or sorted(members)
                headers.append(header)
                for name in ("image", self._member, "json"):
                    samples.extend(members.get(name, (-1, -1)))
            elif members:
                left_out["samples without an image"] += 1

        try:
            size, current = os.path.getsize(path), None
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[misc]  # it keeps all of them otherwise
                    if not member.isreg():
                        left_out["links or special members"] += not member.isdir()
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError(f"member {member.name} ends beyond the file")
                    folder, _, base = member.name.rpartition("/")
                    stem, _, extension = base.lower().partition(".")
                    if not stem:
                        continue  # a hidden file, such as macOS' ._name
                    if (folder, base[: len(stem)]) != current:
                        close()
                        current, members = (folder, base[: len(stem)]), {}
                    name = "image" if f".{extension.rpartition('.')[2]}" in EXTENSIONS else extension
                    if name == "image" and name not in members:
                        header = member.offset
                    members.setdefault(name, (member.offset_data, member.size))
                # What ends the loop may be any block that is no header, or the end of the file.
                end = tar.offset
            close()
            with open(path, "rb") as handle:
                handle.seek(end)
                if handle.read(512) != bytes(512):
                    raise tarfile.ReadError(
                        f"it ends at byte {end} without the mark that ends an archive (blocks of zeros), so a part of "
                        "it may be missing"
                    )
        except (tarfile.TarError, OSError) as error:
            raise ValueError(
                f"{path} is not a whole, uncompressed tar file ({one_line(error)}); copy, download or pack it again"
            ) from error
        left_out += Counter()  # drops zeros
        self._headers.append(np.array(headers, dtype=np.int64))
        return np.array(samples, dtype=np.int64).reshape(-1, 3, 2)

    def _find_labels(self, label: str | None) -> None:
        blob, first = self._blob(0), self._run(0)[0]
        for use in (1, 2):
            if self._label(first, blob, use) is not None:
                self._use = use
                return
        if label is not None:
            raise ValueError(
                f"data.label_column={label!r} is neither an integer member nor a JSON key of the first sample of "
                f"{self.files[0]}, which has {', '.join(self._first_members)}; name one of them, or none"
            )

    def _run(self, chunk: int) -> Ints:
        file, first = self.chunks[chunk]
        return self._spans[file][first : first + TAR_RUN]

    def _blob(self, chunk: int) -> tuple[int, memoryview]:
        """Read a run of samples at once: (offset, bytes)."""
        offsets, lengths = np.moveaxis(self._run(chunk), 2, 0)
        low, high = int(offsets[offsets >= 0].min()), int((offsets + lengths).max())
        path = self.paths[self.chunks[chunk][0]]

        def read() -> bytes:
            with open(path, "rb") as handle:
                handle.seek(low)
                return handle.read(high - low)

        data = read_local(read, path)
        if len(data) < high - low:
            raise RuntimeError(f"{path} has become shorter since the run started; restore it, then start again")
        return low, memoryview(data)

    def _label(self, spans: Ints, blob: tuple[int, memoryview], use: int) -> int | None:
        if spans[use, 0] < 0:
            return None
        text = bytes(_cut(blob, spans[use]))
        try:
            value = int(text) if use == 1 else json.loads(text)[self._key]
        except (ValueError, KeyError, TypeError):
            return None
        return value if isinstance(value, int) else None

    def read(self, chunk: int) -> Chunk:
        """Read a run of samples."""
        run, blob = self._run(chunk), self._blob(chunk)
        labels = np.full(len(run), -1, dtype=np.int64)
        if self._use is not None:
            found = [self._label(spans, blob, self._use) for spans in run]
            labels = np.array([-1 if label is None else label for label in found], dtype=np.int64)
        return Chunk([_cut(blob, spans[0]) for spans in run], labels)

    def labels(self, chunk: int) -> Ints | None:
        """Read the members that hold the labels: beside headers that were read at the start, so most are in memory."""
        run = self._run(chunk)
        labels = np.full(len(run), -1, dtype=np.int64)
        if self._use is None:
            return labels
        path = self.paths[self.chunks[chunk][0]]
        for i, spans in enumerate(run):
            if (offset := int(spans[self._use, 0])) >= 0:
                data = read_local(partial(_read_span, path, offset, int(spans[self._use, 1])), path)
                label = self._label(spans, (offset, memoryview(data)), self._use)
                labels[i] = -1 if label is None else label
        return labels

    def names(self, chunk: int) -> list[str] | None:
        """Return the names of the images in their tar."""
        file, first = self.chunks[chunk]
        path, starts = self.paths[file], self._headers[file][first : first + TAR_RUN].tolist()

        def read() -> list[str]:
            names = []
            with open(path, "rb") as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
                for start in starts:
                    handle.seek(start)
                    names.append(tarfile.TarInfo.fromtarfile(tar).name)
            return names

        return read_local(read, path)

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the tar, and the sample counted from its beginning."""
        file, first = self.chunks[chunk]
        return self.files[file], first + row


def _read_span(path: str, offset: int, length: int) -> bytes:
    with open(path, "rb") as handle:
        handle.seek(offset)
        return handle.read(length)


def _cut(blob: tuple[int, memoryview], span: Ints) -> memoryview:
    start = int(span[0]) - blob[0]
    return blob[1][start : start + int(span[1])]


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{n:,} {name}" for name, n in counter.most_common(6)) or "nothing at all"
