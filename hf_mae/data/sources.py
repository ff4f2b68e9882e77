"""From `--data.*` to a `Source`: what is at the path, which split, which columns, which commit.

`datasets` resolves what has a convention of its own (README configurations, split names in file names, features,
revisions of Hub data sets); reading is ours (`hf_mae.data.formats`). Everything that can be wrong with a path, a split
or a column is found here, before the first step. Remote code is never run.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from huggingface_hub.errors import RepositoryNotFoundError

from hf_mae.data.formats import ParquetSource, Source, holds_bytes, type_name
from hf_mae.data.images import EXTENSIONS
from hf_mae.data.parts import SPLIT_NAMES, alike, list_parts, open_part
from hf_mae.data.rows import ArrowSource, DigitsSource, FolderSource
from hf_mae.data.tables import IMAGE_NAMES, LABEL_NAMES, METADATA, FolderLabels, read_tables
from hf_mae.data.webdataset import TarSource
from hf_mae.patience import (
    HTTP_ERROR,
    GaveUpError,
    is_overloaded,
    is_passing,
    may_be_hub_id,
    one_line,
    patient,
    quick_look,
    remedy,
    status_of,
)
from hf_mae.recipes.base import Data

__all__ = ["SPLIT_NAMES", "Source", "choose_columns", "list_splits", "open_source"]

PATH_NAMES = ("file_name", "path", "file", "filename", "filepath", "file_path", "image_path", "image_file")
"""Columns of text that may hold paths of images, beside the usual names of image columns."""


@dataclass(frozen=True)
class _Wish:
    """The split that is asked for, if one is, and the field of the recipe that names it."""

    split: str | None
    field: str


class _UnreachableError(ValueError):
    """The Hub does not answer; it may be that no Hub id was meant."""


def open_source(data: Data, split: str | None = None, *, field: str = "data.split") -> Source:
    """Open the images of a recipe.

    To open a second split of the same commit: `open_source(replace(data, revision=first.revision), "test")`.

    Args:
        data: the recipe's `data` group. `path` is `digits`, a local folder or file, or a Hub id. With `splits` set, one
            split is divided (the one that a file names; else train, or the only one): a part is opened under its name,
            another split of the data under its own, and None is the part to train on.
        split: overrides `data.split`.
        field: the field of the recipe that names the split, for messages.

    Returns:
        An index of the images; nothing but metadata has been read, unless the format has no index.

    Raises:
        ValueError: path, split, column, configuration or a file has to be changed; says what was found.
        RuntimeError: the network failed.
    """
    source = _open(data, split, field)
    source.pixel_range = data.pixel_range
    return source


def _open(data: Data, split: str | None, field: str) -> Source:
    wish = _Wish(split if split is not None else data.split, field)
    if not data.path:
        raise ValueError("data.path is empty; pass --data.path with a folder of images, a Hub id, or digits")
    if (limits := data.pixel_range) is not None and not (all(map(math.isfinite, limits)) and limits[0] < limits[1]):
        raise ValueError(
            f"data.pixel_range={limits[0]:g} {limits[1]:g}: the stored value that becomes black comes first, the one "
            "that becomes white is larger, such as --data.pixel-range 0 4095"
        )
    local = local_path(data.path)
    if data.revision is not None and (data.path == "digits" or local.exists()):
        raise ValueError(
            f"data.revision={data.revision!r}: {data.path} is on this machine, and only data sets on the Hub have "
            "revisions; leave it out"
        )
    if data.splits is not None:
        return open_part(data, wish.split, field=field, open_source=open_source, list_splits=list_splits)
    if data.path == "digits":
        return _open_digits(data, wish)
    return _open_local(local, data, wish) if local.exists() else _open_hub(data, wish)


def local_path(text: str) -> Path:
    """Return a path of the user's as it is meant: `~` at its beginning is the home folder."""
    return Path(text).expanduser() if text.startswith("~") else Path(text)


def list_splits(data: Data) -> list[str]:
    """List the splits of a data set; empty where they cannot be found out without preparing it.

    With `data.splits` set: its parts, then the data's own splits beside the one that is divided.

    Raises:
        RuntimeError: the network failed.
        ValueError: `data.splits` is neither a rule nor a readable file.
    """
    if data.splits is not None:
        return list_parts(data, list_splits)
    if data.path == "digits":
        return ["train", "test"]
    local = local_path(data.path)
    try:
        if not local.exists():
            builder = _builder(data)
            return [str(split) for split in builder.config.data_files or builder.info.splits or {}]
        if local.is_file():
            return ["train"]
        if (saved := local / "dataset_dict.json").exists():
            return list(json.loads(saved.read_text())["splits"])
        found = _scan(local)
        if found.kind == "images":
            return list(_split_folders(found)) or ["train"]
        return list(_data_files(local, found, data)) if found.kind else []
    except _UnreachableError as error:
        raise RuntimeError(f"the splits cannot be listed: {error}") from error
    except (ValueError, KeyError):
        return []


def _open_digits(data: Data, wish: _Wish) -> Source:
    _refuse_columns(data, "the bundled digits have no columns", labels=(None, "none"))
    return DigitsSource(_choose_split(wish, ["train", "test"], data), use_labels=data.label_column != "none")


def _refuse_columns(data: Data, why: str, *, labels: tuple[str | None, ...] | None = None) -> None:
    """Refuse a column that would be ignored; any label is taken where `labels` is None."""
    if data.image_column is not None:
        raise ValueError(f"data.image_column={data.image_column!r}: {why}; leave it out")
    if labels is not None and data.label_column not in labels:
        raise ValueError(
            f"data.label_column={data.label_column!r}: {why}; leave it out, or use none to ignore the labels"
        )


# ------------------------------------------------------------------------------------------------ local paths


@dataclass
class _Found:
    """What lies in a folder."""

    images: list[tuple[str, int]] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    tar: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    """Metadata tables of an image folder."""
    tables: list[str] = field(default_factory=list)
    """Other tables, which are not read."""
    folders: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    links_dangling: int = 0
    links_to_folders: int = 0

    @property
    def kind(self) -> str:
        """The format that is read; empty if there is none we index ourselves.

        Not the one with the most files: pictures beside Parquet shards are previews, Parquet beside pictures is data.
        """
        kinds = {"parquet": self.parquet, "tar": self.tar, "images": self.images}
        return next((kind for kind, files in kinds.items() if files), "")

    def left_out(self) -> list[str]:
        """Say what the scan saw and did not take."""
        notes, others = [], Counter(self.others)
        for kind, files in {"tar files": self.tar, "images": self.images}.items():
            if files and not kind.startswith(self.kind):
                others[kind] = len(files)
        if self.metadata and self.kind != "images":
            others["metadata tables"] = len(self.metadata)
        if others:
            counts = ", ".join(f"{n:,} {ending}" for ending, n in others.most_common(6))
            notes.append(f"other files left out: {counts}")
        if self.others[".npy"] and not self.kind:
            notes.append(".npy arrays are not read yet, save them as PNG or TIFF")
        if self.links_dangling:
            notes.append(f"{self.links_dangling:,} links point to nothing (restore their targets, or copy those files)")
        if self.links_to_folders:
            notes.append(f"{self.links_to_folders:,} links to folders that are read anyway were not followed")
        return notes


def _scan(root: Path) -> _Found:
    """List a folder; hidden names are skipped.

    Links are followed, as every image loader does (subsets are often folders of links, and so is the Hub's cache), but
    not to a folder that is read already or that holds this one.
    """
    found, real = _Found(), root.resolve()
    linked: set[Path] = set()

    def walk(folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda e: e.name)
        for entry in listed:
            name = prefix + entry.name
            if entry.name.startswith((".", "__MACOSX")):
                continue
            if entry.is_symlink():
                target = _target(Path(entry.path))
                if target is None:
                    found.links_dangling += 1
                    continue
                if target.is_dir():
                    if target in linked or target.is_relative_to(real) or real.is_relative_to(target):
                        found.links_to_folders += 1
                        continue
                    linked.add(target)
            if entry.is_dir():
                found.folders.append(name)
                walk(entry.path, name + "/")
            elif entry.is_file():
                ending = os.path.splitext(entry.name)[1].lower()
                if ending in EXTENSIONS:
                    found.images.append((name, entry.stat().st_size))
                elif entry.name in METADATA:
                    found.metadata.append(name)
                elif ending == ".parquet":
                    found.parquet.append(name)
                elif ending == ".tar":
                    found.tar.append(name)
                else:
                    if ending in (".csv", ".tsv", ".jsonl", ".xlsx"):
                        found.tables.append(name)
                    found.others[ending or "without an extension"] += 1

    walk(str(root), "")
    return found


def _target(link: Path) -> Path | None:
    try:
        return link.resolve(strict=True)
    except (OSError, RuntimeError):  # dangling, or a circle
        return None


def _open_local(path: Path, data: Data, wish: _Wish) -> Source:
    if path.is_file():
        _choose_split(wish, ["train"], data)
        if (kind := path.suffix.lower()) in (".parquet", ".tar"):
            return _named(_open_indexed(kind[1:], [path.name], [str(path)], data, path.parent), str(path))
        raise ValueError(
            f"data.path={data.path!r} is a {path.suffix or 'plain'} file; a path is a folder, a .parquet or a .tar file"
        )
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _open_saved(path, data, wish)
    found = _scan(path)
    if found.kind == "images":
        return _open_folder(path, found, data, wish)
    if found.kind:
        splits = _data_files(path, found, data)
        chosen = _choose_split(wish, list(splits), data)
        names = splits[chosen]
        source = _open_indexed(found.kind, names, [str(path / name) for name in names], data, path)
        source.notes += found.left_out()
        return _named(source, f"{path}, split {chosen}")
    if set(found.others) & {".csv", ".json", ".jsonl", ".arrow", ".lance", ".zip"}:
        return _open_prepared(data, wish, None, ", ".join(sorted(found.others)))
    raise ValueError(
        f"data.path={data.path!r} holds no images, Parquet or tar files "
        f"({'; '.join(found.left_out()) or 'it is empty'}); images end in {', '.join(sorted(EXTENSIONS))}"
    )


def _open_folder(root: Path, found: _Found, data: Data, wish: _Wish) -> Source:
    folders = _split_folders(found)
    chosen = _choose_split(wish, list(folders) or ["train"], data)
    notes = found.left_out()
    prefix = folders[chosen] + "/" if folders else ""
    classes = _classes(name.split("/", 1)[1] if folders else name for name, _ in found.images)
    if not folders:
        named = [name for name in classes if any(name.lower() in aliases for aliases in SPLIT_NAMES.values())]
        what = (
            f"folders named like splits ({', '.join(named)}) lie beside images that are in none, so all are read as "
            "one split; to have splits move the others away, or point --data.path at one folder"
        )
        if named and wish.split is not None:
            raise ValueError(f"{wish.field}={wish.split!r}: {what}")
        notes += [what] * bool(named)
    table = _table(root, found.metadata, [name for name, _ in found.images], data)
    source = _folder_source(root, prefix, found.images, classes, table, data)
    source.notes += notes
    if table is None:
        notes = _empty_classes(prefix, found)
        if source.has_labels:
            source.notes += notes
        elif found.tables and data.label_column is None:
            notes = [_unread_tables(found.tables), *notes]
            source.notes += notes
        source.why_unlabelled = "; ".join(notes) if not source.has_labels else ""
    return _named(source, f"{source.root}, split {chosen}")


def _table(root: Path, names: Sequence[str], images: Iterable[str], data: Data) -> FolderLabels | None:
    """Read the metadata tables, if there are any and labels are not ignored; check the columns that are wished for."""
    if names and data.label_column != "none":
        return read_tables(root, names, set(images), data)
    why = "a folder of images without a metadata table has no columns, and the names of its folders for labels"
    _refuse_columns(data, why, labels=(None, "none", "label"))
    return None


def _folder_source(
    root: Path,
    prefix: str,
    files: Iterable[tuple[str, int]],
    classes: Sequence[str],
    table: FolderLabels | None,
    data: Data,
) -> FolderSource:
    """Open the images of a split: the files whose names, from the root, begin with `prefix`."""
    own = [(name[len(prefix) :], size) for name, size in files if name.startswith(prefix)]
    where = root / prefix if prefix else root
    if table is None:
        source = FolderSource(where, own, classes=classes if data.label_column != "none" else [])
        if data.label_column == "label" and not source.has_labels:
            raise ValueError(
                f"data.label_column='label': the images of {where} do not lie in folders of two classes or more, and "
                "there is no metadata table; add one, or leave it out"
            )
        return source
    # What versions before took for labels, and so the fingerprint that their runs have.
    former = FolderSource(where, own, classes=classes).fingerprint
    labels = {name[len(prefix) :]: label for name, label in table.files.items() if name.startswith(prefix)}
    taken = [(name, size) for name, size in own if name in labels]
    if table.has_labels and taken:
        numbers = {name: labels[name] for name, _ in taken}
        source = FolderSource(where, taken, classes=table.classes, labels=numbers)
    else:
        source = FolderSource(where, taken or own, classes=[])
    source.notes += table.notes
    source.schema, source.why_unlabelled = table.columns, table.why_unlabelled
    if taken and len(taken) < len(own):
        first = next(name for name, _ in own if name not in labels)
        source.notes.append(
            f"{len(own) - len(taken):,} of {len(own):,} images have no row in a metadata table and are left out, first "
            f"{first} (--data.label-column none reads all, without labels)"
        )
    elif not taken and table.files:
        why = f"no metadata table has a row for an image of {where}"
        source.notes.append(f"{why}, so all of them are read, without labels")
        source.why_unlabelled = why
    if len(taken or own) == len(own) and former != source.fingerprint:
        source.former_fingerprint = former
    return source


def _empty_classes(prefix: str, found: _Found) -> list[str]:
    """Name the class folders of a split that hold no images."""
    holding = {name[len(prefix) :].split("/", 1)[0] for name, _ in found.images if name.startswith(prefix)}
    inside = {name[len(prefix) :] for name in found.folders if name.startswith(prefix) and name != prefix}
    empty = sorted({name.split("/", 1)[0] for name in inside if name.split("/", 1)[0] not in holding})
    if not empty:
        return []
    shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5:,} more" if len(empty) > 5 else "")
    return [f"warning: {len(empty):,} folder(s) hold no image and are no class here: {shown}"]


def _unread_tables(names: Sequence[str]) -> str:
    stems = {Path(name).stem.lower() for name in names}
    splits = any(stem in aliases for aliases in SPLIT_NAMES.values() for stem in stems)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
    return (
        f"the table(s) {shown} are not read{', so all images are one split' if splits else ''}: a table of labels is "
        "called metadata.csv, lies in the folder of its images or above, and has the columns file_name (paths from "
        "there) and label; a split is a folder (train/, validation/, test/), or a rule of --data.splits"
    )


def _classes(names: Iterable[str]) -> list[str]:
    """List the first folders of names, over all splits: a class has the same number in each, whatever one lacks."""
    return sorted({name.split("/", 1)[0] for name in names if "/" in name})


def _split_folders(found: _Found) -> dict[str, str]:
    """Map split to first-level folder, if every image lies in a folder named like a split; else these are classes."""
    tops = {name.split("/", 1)[0] if "/" in name else "" for name, _ in found.images}
    folders: dict[str, str] = {}
    for split, aliases in SPLIT_NAMES.items():
        same = [top for top in sorted(tops) if top.lower() in aliases]
        folders |= {split: same[0]} if len(same) == 1 else {top: top for top in same}  # val beside dev: two splits
    return folders if len(folders) == len(tops) else {}


def _open_indexed(
    kind: str, names: Sequence[str], paths: Sequence[str], data: Data, root: Path | None = None
) -> Source:
    if kind == "parquet":
        return _open_parquet(names, paths, data, root=root)
    _refuse_columns(data, "tar files have no columns")
    return TarSource(names, paths, label=data.label_column)


def _open_parquet(
    names: Sequence[str],
    paths: Sequence[str],
    data: Data,
    features: Any = None,
    filesystem: Any = None,
    root: Path | None = None,
) -> ParquetSource:
    """Open Parquet files; `root` is the user's own folder, below which rows may name image files."""
    source = ParquetSource(
        names,
        paths,
        choose=lambda schema: choose_columns(schema, data, features, paths=root is not None),
        filesystem=filesystem,
        root=root,
    )
    if not source.has_labels:
        source.notes += _unused_labels(source.footers[0].schema.to_arrow_schema(), data)
    return source


def _data_files(root: Path, found: _Found, data: Data) -> dict[str, list[str]]:
    """Let `datasets` assign the files of a folder to splits, by README or by name: {split: names below the root}."""
    from datasets import load_dataset_builder

    module, ours = {"parquet": ("parquet", found.parquet), "tar": ("webdataset", found.tar)}[found.kind]
    with _taken_literally(root.resolve(), ours) as base:
        builder: Any = _builder(Data(path=base, name=data.name))
        if module not in type(builder).__module__:  # there are more files of another kind, such as one JSON per shard
            builder = load_dataset_builder(module, data_dir=base)
        splits: dict[str, list[str]] = {}
        for split, paths in builder.config.data_files.items():
            names = [Path(os.path.relpath(path, base)).as_posix() for path in paths]
            if inside := [name for name in names if name in set(ours)]:
                splits[str(split)] = inside
    return splits


_PATTERN = re.compile(r"[][*?{}!~]|::|://")
"""What `datasets` and fsspec do not take literally in a path."""


@contextmanager
def _taken_literally(folder: Path, files: Iterable[str]) -> Iterator[str]:
    """Yield a folder of the same file names whose own path is no pattern: itself, or a copy of names and README."""
    if not _PATTERN.search(str(folder)):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory(prefix="hf_mae_") as temporary:
        copy = Path(temporary).resolve()
        if _PATTERN.search(str(copy)):
            raise ValueError(
                f"data.path={str(folder)!r} holds a character such as [ or *, and so does the folder for temporary "
                f"files {str(copy)!r}; rename one of them (the latter by TMPDIR)"
            )
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).touch()
        if (readme := folder / "README.md").is_file():
            shutil.copyfile(readme, copy / "README.md")
        yield str(copy)


# ------------------------------------------------------------------------------------------------ the Hub


def _open_hub(data: Data, wish: _Wish) -> Source:
    builder = _builder(data)
    data_files = {str(s): [str(f) for f in files] for s, files in (builder.config.data_files or {}).items()}
    module = type(builder).__module__.rpartition(".")[2]
    if not data_files or module == "cache":  # offline, with a copy prepared earlier
        return _open_prepared(data, wish, data.revision, module)
    chosen = _choose_split(wish, list(data_files), data)
    files = [_parse(url) for url in data_files[chosen]]
    if None in files or len({(f.repo, f.revision) for f in files if f}) != 1:
        return _open_prepared(data, wish, data.revision, f"{module} files outside the repository")
    parsed = [f for f in files if f is not None]
    repo, revision = parsed[0].repo, _commit(parsed[0].repo, parsed[0].revision)
    tables = sorted({f.path for urls in data_files.values() for f in map(_parse, urls) if f and _is_table(f.path)})
    tables = tables if module == "imagefolder" else []
    names = [f.path for f in parsed if f.path not in tables]
    endings = {os.path.splitext(name)[1].lower() for name in names}

    if module == "parquet" and data.streaming:
        from huggingface_hub import HfFileSystem

        paths = [f"datasets/{repo}@{revision}/{name}" for name in names]
        source: Source = _open_parquet(names, paths, data, builder.info.features, HfFileSystem())
    elif module == "parquet":
        source = _open_parquet(names, _download(repo, revision, names), data, builder.info.features)
        source.notes.append("downloaded to the Hub cache")
    elif module == "webdataset" and endings == {".tar"}:
        source = _open_indexed("tar", names, _download(repo, revision, names), data)
        source.notes.append("downloaded to the Hub cache: a remote tar has no index to read by ranges")
    elif module == "imagefolder" and endings <= EXTENSIONS and (data.streaming or not tables):
        # A downloaded copy of images with tables is prepared below, in the order of the rows, as it always was.
        all_files = {s: [f.path for f in map(_parse, urls) if f] for s, urls in data_files.items()}
        images = {s: [name for name in files if not _is_table(name)] for s, files in all_files.items()}
        cuts = {s: _split_prefix(s, files) for s, files in images.items() if files}
        classes = _classes(name[len(cuts[s]) :] for s, files in images.items() for name in files)
        paths = _download(repo, revision, names)
        root, cut = Path(paths[0]).parents[names[0].count("/")], cuts[chosen]
        _download(repo, revision, tables)
        table = _table(root, tables, {name for files in images.values() for name in files}, data)
        sized = [(name, os.path.getsize(path)) for name, path in zip(names, paths, strict=True)]
        source = _folder_source(root, cut, sized, classes, table, data)
        source.notes.append("downloaded to the Hub cache: one request an image would be slower")
    else:
        return _open_prepared(data, wish, revision, f"{module} files ({', '.join(sorted(endings))})")
    source.revision = revision
    return _named(source, f"{data.path} on the Hub, split {chosen}")


def _is_table(name: str) -> bool:
    return name.rpartition("/")[2] in METADATA


def _split_prefix(split: str, names: Sequence[str]) -> str:
    """Return what comes before the class folders in a split's names: up to a folder named like it, else all common."""
    parts = os.path.commonpath([os.path.dirname(name) for name in names]).split("/")
    same = next((aliases for aliases in SPLIT_NAMES.values() if split in aliases), (split,))
    ends = [i + 1 for i, part in enumerate(parts) if part.lower() in same]
    return "".join(f"{part}/" for part in parts[: ends[0] if ends else len(parts)] if part)


@dataclass(frozen=True)
class _HubFile:
    repo: str
    revision: str
    path: str


def _parse(url: str) -> _HubFile | None:
    match = re.fullmatch(r"hf://datasets/([^@]+)@([^/]+)/(.+)", url)
    return _HubFile(match[1], unquote(match[2]), match[3]) if match and "::" not in url else None


def _commit(repo: str, revision: str) -> str:
    """Return the commit a revision points to now; what is pinned stays the same while the branch moves on."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi

    sha = patient(f"asking for the commit of {repo}", lambda: HfApi().dataset_info(repo, revision=revision).sha)
    assert sha is not None
    return sha


def _download(repo: str, revision: str, names: Sequence[str]) -> list[str]:
    """Fetch files to the Hub cache, unless they are there; return their paths."""
    from huggingface_hub import hf_hub_download

    def fetch(name: str) -> str:
        return patient(
            f"downloading {name} of {repo}",
            lambda: hf_hub_download(repo, name, repo_type="dataset", revision=revision),
        )

    try:
        with ThreadPoolExecutor(8, thread_name_prefix="download") as pool:
            return list(pool.map(fetch, names))
    except (OSError, HTTP_ERROR, GaveUpError) as error:
        raise RuntimeError(
            f"could not download {repo} at {revision}: {one_line(error)}; {remedy(error)}, then start again: what has "
            "arrived is kept"
        ) from error


def _builder(data: Data) -> Any:
    """Resolve a path with `datasets`, in our words where it fails."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetNotFoundError

    # It warns of every README without metadata, which is no one's mistake here.
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    path = local_path(data.path)
    named = f"data.path={data.path!r}"
    local = path.exists()
    if not local and not may_be_hub_id(data.path):
        raise ValueError(
            f"{named}: no such folder or file, and not the form of a Hub id{_nearby(path)}; correct the path"
        )
    if not local and (wrong := quick_look(data.path, "dataset")) is not None:
        if isinstance(wrong, RepositoryNotFoundError):
            raise ValueError(_nowhere(data, path, one_line(wrong))) from wrong
        if data.revision is None:  # a run that goes on names a commit it has read before, and waits for it
            raise _unreachable(data, path, one_line(wrong)) from wrong
    try:
        if local:
            return load_dataset_builder(str(path), name=data.name, revision=data.revision)
        # A slip in a path must not wait for a Hub out of reach; a run that goes on names a commit it has read before.
        return patient(
            f"opening {data.path} on the Hub",
            lambda: load_dataset_builder(data.path, name=data.name, revision=data.revision),
            passing=is_passing if data.revision else is_overloaded,
        )
    except DatasetNotFoundError as error:
        if "gated" in str(error):
            raise ValueError(
                f"{named} is gated; accept its conditions on its page on the Hub, then log in with `hf auth login`"
            ) from error
        raise ValueError(_nowhere(data, path, _line(error))) from error
    except FileNotFoundError as error:
        if "Hub either" in str(error):  # what it says where the Hub answers, but not the question
            raise ValueError(_nowhere(data, path, _line(error))) from error
        raise ValueError(f"{named} holds no data files ({_line(error)})") from error
    except (OSError, HTTP_ERROR, GaveUpError) as error:
        status = status_of(error.__cause__ if isinstance(error, GaveUpError) and error.__cause__ else error)
        if local or (status is not None and (status == 429 or status >= 500)):
            raise RuntimeError(f"{named} could not be opened: {_line(error)}; try again later") from error
        raise _unreachable(data, path, _line(error)) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"{named} is built by a script, and remote code is never run ({_line(error)}); use a data set of files, or "
            "its Parquet copy with --data.revision refs/convert/parquet"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{named}, data.name={data.name!r}: {_line(error)}; name a configuration with --data.name"
        ) from error


def _nowhere(data: Data, path: Path, why: str) -> str:
    form = "" if "/" in data.path else "; data sets on the Hub are named ORG/NAME"
    return (
        f"data.path={data.path!r} is neither a folder or file (looked for {path.absolute()}) nor a data set on the Hub "
        f"that this token may read ({why}){_nearby(path)}{form}"
    )


def _unreachable(data: Data, path: Path, why: str) -> _UnreachableError:
    return _UnreachableError(
        f"data.path={data.path!r} is not a folder or file (looked for {path.absolute()}), and the Hub cannot be "
        f"reached ({why}){_nearby(path)}; correct the path, or go online (is HF_HUB_OFFLINE set?)"
    )


def _nearby(path: Path) -> str:
    """Return what a path with a slip in one of its folders may have meant, as the end of a message."""
    wrong = path.absolute()
    while not wrong.parent.is_dir() and wrong.parent != wrong:
        wrong = wrong.parent
    try:
        close = difflib.get_close_matches(wrong.name, [p.name for p in wrong.parent.iterdir()], n=3)
    except OSError:
        return ""
    rest = path.absolute().relative_to(wrong)
    meant = [wrong.parent / name / rest for name in close]
    meant = [whole for whole in meant if whole.exists()] or [wrong.parent / name for name in close]
    if not path.is_absolute() and path.parts[:1] != ("..",):
        meant = [Path(os.path.relpath(one)) for one in meant]
    return f"; did you mean {' or '.join(map(str, meant))}?" if meant else ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


# ------------------------------------------------------------------------------------------------ Arrow copies


def _open_prepared(data: Data, wish: _Wish, revision: str | None, what: str) -> Source:
    """Convert a format without an index to Arrow, if the user agreed to a copy."""
    if data.streaming:
        raise ValueError(
            f"data.path={data.path!r} with data.streaming=True: {what} cannot be read in random order; pass "
            "--data.no-streaming to prepare an Arrow copy on this disk first"
        )
    from datasets import DownloadMode, load_dataset
    from datasets.exceptions import DatasetGenerationError

    local = local_path(data.path)
    if local.exists() and _PATTERN.search(str(local.resolve())):
        raise ValueError(
            f"data.path={data.path!r}: {what} are read by `datasets`, which takes [ ] * ? {{ }} and :: in a path for a "
            "pattern; rename the folder, or link to it under another name"
        )
    try:
        prepared = patient(
            f"preparing {data.path}",
            lambda: load_dataset(
                str(local) if local.exists() else data.path,
                data.name,
                revision=revision,
                download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS,
            ),
        )
    except (DatasetGenerationError, OSError, HTTP_ERROR, GaveUpError, ValueError) as error:
        raise ValueError(f"data.path={data.path!r} could not be prepared: {_line(error)}") from error
    source = _arrow(prepared, data, wish)
    source.revision = revision
    source.notes.append("prepared as an Arrow copy")
    return source


def _open_saved(path: Path, data: Data, wish: _Wish) -> Source:
    from datasets import load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"data.path={data.path!r} is not a whole `save_to_disk` folder: {_line(error)}") from error
    return _arrow(saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}, data, wish)


def _arrow(prepared: Any, data: Data, wish: _Wish) -> Source:
    chosen = _choose_split(wish, [str(s) for s in prepared], data)
    dataset = prepared[chosen]
    if not len(dataset):
        raise ValueError(f"data.path={data.path!r}, split {chosen}: holds no rows")
    schema = dataset.features.arrow_schema
    source = ArrowSource(dataset, *choose_columns(schema, data, dataset.features))
    if not source.has_labels:
        source.notes += _unused_labels(schema, data)
    return _named(source, f"{data.path}, split {chosen}")


# ------------------------------------------------------------------------------------------------ inference


def _named(source: Source, where: str) -> Source:
    source.where = where
    return source


def _choose_split(wish: _Wish, available: Sequence[str], data: Data) -> str:
    """Pick a split: the wanted one (val, valid and dev mean validation), else train, else the only one."""
    wanted = wish.split
    if wanted is None:
        if "train" in available or len(available) == 1:
            return "train" if "train" in available else available[0]
        raise ValueError(
            f"data.path={data.path!r} has no split train; name one with --{wish.field}: {', '.join(available)}"
        )
    if (name := alike(wanted, available)) is not None:
        return name
    make = alike(wanted, ("validation", "test")) is not None
    raise ValueError(
        f"{wish.field}={wanted!r} is not a split of {data.path}; it has {', '.join(available)}; name one of these with "
        f"--{wish.field}" + ", or make validation and test of one with --data.splits stratified:80/10/10" * make
    )


def choose_columns(
    schema: pa.Schema, data: Data, features: Any | None = None, *, paths: bool = False
) -> tuple[str, str | None, list[str] | None]:
    """Find the column of encoded images, and that of integer labels.

    By feature type first (Image, ClassLabel), then by name; a wish is checked.

    Args:
        schema: of the files.
        data: `image_column` and `label_column` are the wishes; label `none` ignores labels.
        features: `datasets.Features` from elsewhere (a README); None reads them from the schema.
        paths: where no column holds encoded images, take one of text that is named as one of paths.

    Returns:
        (image column, label column or None, class names or None).

    Raises:
        ValueError: a wish names no such column, or one of another type, or no column holds images; lists the columns.
    """
    from datasets import ClassLabel, Features, Image

    known: Any = features or Features.from_arrow_schema(schema)
    columns = {name: schema.field(name).type for name in schema.names}
    listing = ", ".join(f"{name} ({type_name(kind)})" for name, kind in columns.items())
    encoded = [name for name, kind in columns.items() if holds_bytes(kind)]
    texts = [name for name, kind in columns.items() if paths and pa.types.is_string(kind)]

    image = data.image_column
    if image is None:
        typed = [name for name in encoded if isinstance(known.get(name), Image)]
        structs = [name for name in encoded if pa.types.is_struct(columns[name])]
        candidates = typed or structs or encoded
        by_name = [name for wish in IMAGE_NAMES for name in candidates if name.lower() == wish]
        of_paths = [name for wish in (*IMAGE_NAMES, *PATH_NAMES) for name in texts if name.lower() == wish]
        image = next(_first(by_name, typed, candidates if len(candidates) == 1 else [], of_paths), None)
        if image is None:
            raise ValueError(f"no column is clearly one of encoded images: {listing}; name it with --data.image-column")
    elif image not in encoded and image not in texts:
        why = "is not a column" if image not in columns else f"holds {type_name(columns[image])}, not encoded images"
        raise ValueError(f"data.image_column={image!r} {why}; the columns are {listing}")

    integers = [name for name, kind in columns.items() if pa.types.is_integer(kind) or pa.types.is_boolean(kind)]
    label = data.label_column
    if label == "none":
        return image, None, None
    if label is None:
        typed = [name for name in integers if isinstance(known.get(name), ClassLabel)]
        by_name = [name for wish in LABEL_NAMES for name in typed or integers if name.lower() == wish]
        label = next(_first(by_name, typed), None)
    elif label not in integers:
        if label not in columns:
            raise ValueError(
                f"data.label_column={label!r} is not a column; the columns are {listing}; none ignores labels"
            )
        kind = type_name(columns[label])
        raise ValueError(
            f"data.label_column={label!r} holds {kind}, not integers; {make_integers(data, label, kind)}; the columns "
            f"are {listing}; none ignores labels"
        )
    described = known.get(label) if label else None
    return image, label, list(described.names) if isinstance(described, ClassLabel) and described.names else None


def make_integers(data: Data, column: str, kind: str) -> str:
    """Say how to turn a column of text or of floats into one of class numbers.

    `class_encode_column` is not advised: on a DatasetDict it numbers the classes of every split by themselves.
    """
    path = local_path(data.path)
    splits = True
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        load, splits = f"load_from_disk({data.path!r})", (path / "dataset_dict.json").exists()
    elif path.exists():
        load = f"load_dataset('parquet', {'data_dir' if path.is_dir() else 'data_files'}={data.path!r})"
    else:
        load = f"load_dataset({data.path!r}{f', {data.name!r}' if data.name else ''})"
    if kind in ("string", "large_string", "string_view"):
        values = f"{{x for split in ds.values() for x in split[{column!r}]}}" if splits else f"set(ds[{column!r}])"
        feature = f"ClassLabel(names=sorted({values}))"
    elif kind in ("float", "double", "halffloat"):
        feature = "Value('int64')"
    else:
        return "labels are integers, one a row"
    return (
        f"convert it with `import datasets; ds = datasets.{load}; ds = ds.cast_column({column!r}, datasets.{feature}); "
        "ds.save_to_disk('labelled')` and pass --data.path labelled"
    )


def _unused_labels(schema: pa.Schema, data: Data) -> list[str]:
    """Say which column looked like labels and was passed over because it holds text."""
    if data.label_column is not None:
        return []
    kinds = {name: schema.field(name).type for name in schema.names if name.lower() in LABEL_NAMES}
    text = [name for name, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]
    return [f"column {text[0]} holds text, not integer labels, and was not used (make it a ClassLabel)"] if text else []


def _first(*lists: Sequence[str]) -> Iterator[str]:
    for candidates in lists:
        yield from candidates
