"""What is uploaded: the files of an export and of its run, compared with what the repository holds.

A publish leaves `records/files.json` in the repository: what it wrote, by content. The next one removes what is in that
list, still as it was written, and no longer part of the model, such as the second shard of weights that now fit into
one file. Files that anyone else put there are never removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from hf_mae.training.checkpoint import newest_checkpoint

MANIFEST = "records/files.json"
RUN = "run/"
"""Where a run that can be continued lies in a repository."""

OF_A_RUN = ("recipe.json", "metrics.jsonl", "environment.json", "bad_samples.jsonl")

State = Literal["new", "changed", "edited", "same", "remove"]


@dataclass(frozen=True)
class File:
    """A file to upload.

    Attributes:
        path: in the repository.
        local: on this machine.
        size: in bytes.
        sha256: of its content, by which the Hub names large files.
        blob: its name as a git blob, by which the Hub names small ones.
    """

    path: str
    local: Path
    size: int
    sha256: str
    blob: str


@dataclass(frozen=True)
class Row:
    """What happens to a path of the repository; `edited` is a file of ours that someone changed there since."""

    state: State
    path: str
    size: int


def read_file(local: Path, path: str) -> File:
    """Hash a file once, in both ways."""
    size = local.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with local.open("rb") as opened:
        while block := opened.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return File(path, local, size, sha256.hexdigest(), blob.hexdigest())


def collect(folder: Path) -> list[File]:
    """List the files of an export in the order of their paths; caches and half-written files are left out."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    kept = [name for name in names if not any(part.startswith(".") and part != ".eval_results" for part in name.parts)]
    return [read_file(folder / name, name.as_posix()) for name in kept if name.as_posix() != MANIFEST]


def collect_checkpoint(run: Path) -> list[File]:
    """List what a run needs to go on elsewhere: its records, its best model and its newest whole checkpoint.

    Raises:
        ValueError: there is no whole checkpoint.
    """
    newest, skipped = newest_checkpoint(run / "checkpoints")
    if newest is None:
        raise ValueError(f"checkpoint=True and {run} holds no whole checkpoint. {'; '.join(skipped)}")
    folders = [newest, *([run / "best"] if (run / "best" / "manifest.json").is_file() else [])]
    paths = [run / name for name in OF_A_RUN if (run / name).is_file()]
    paths += [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [read_file(path, RUN + path.relative_to(run).as_posix()) for path in paths]


def manifest_of(files: Iterable[File], earlier: Mapping[str, Sequence[str]]) -> str:
    """Return the text of `records/files.json`; the run that an earlier publish left there stays in it."""
    written = {file.path: [file.sha256, file.blob] for file in files}
    if not any(path.startswith(RUN) for path in written):
        written |= {path: list(names) for path, names in earlier.items() if path.startswith(RUN)}
    return json.dumps({"format": 1, "files": dict(sorted(written.items()))}, indent=1) + "\n"


def read_manifest(text: str) -> dict[str, list[str]]:
    """Read `records/files.json` of a repository; what is not such a list counts as none, for anyone may write it."""
    try:
        files = json.loads(text)["files"]
        pairs = {str(path): [str(name) for name in names] for path, names in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {path: names for path, names in pairs.items() if is_inside(path) and len(names) == 2}


def is_inside(path: str) -> bool:
    """Say whether a path of a repository stays inside the folder it is written to, on every system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and not set(path) & set("\\:\0")


def compare(files: Sequence[File], remote: Mapping[str, Any], earlier: Mapping[str, Sequence[str]]) -> list[Row]:
    """Say what happens to each path.

    Args:
        files: what is to be there.
        remote: what is there: `RepoFile` by path, as `list_repo_tree` gives it.
        earlier: `read_manifest` of what is there.
    """
    rows: list[Row] = []
    for file in files:
        there = remote.get(file.path)
        if there is None:
            rows.append(Row("new", file.path, file.size))
        elif is_same(there, [file.sha256, file.blob]):
            rows.append(Row("same", file.path, file.size))
        else:
            was_ours = file.path not in earlier or is_same(there, earlier[file.path])
            rows.append(Row("changed" if was_ours else "edited", file.path, file.size))
    paths = {file.path for file in files}
    with_run = any(path.startswith(RUN) for path in paths)
    for path, names in sorted(earlier.items()):
        gone = path not in paths and path in remote and (with_run or not path.startswith(RUN))
        if gone and is_same(remote[path], names):
            rows.append(Row("remove", path, remote[path].size))
    return rows


def is_same(there: Any, names: Sequence[str]) -> bool:
    """Compare a file of the Hub with [SHA-256, git blob] of a content."""
    return there.lfs.sha256 == names[0] if there.lfs is not None else there.blob_id == names[1]


def describe(rows: Sequence[Row]) -> list[str]:
    """Return the table to print: all that is sent or removed, and how much stays."""
    words = {"edited": "changed, undoing an edit made on the Hub", "remove": "removed, of an earlier publish"}
    shown = [row for row in rows if row.state != "same"]
    width = max((len(row.path) for row in shown), default=0)
    lines = [
        f"  {row.path:<{width}}  {bytes_in_words(row.size):>9}  {words.get(row.state, row.state)}" for row in shown
    ]
    sent = sum(row.size for row in rows if row.state in ("new", "changed", "edited"))
    kept = sum(row.state != "remove" for row in rows)
    same = sum(row.state == "same" for row in rows)
    total = sum(row.size for row in rows if row.state != "remove")
    return [
        *lines,
        f"  {kept} files, {bytes_in_words(total)}; {same} of them are there already, {bytes_in_words(sent)} to send",
    ]


def bytes_in_words(size: int) -> str:
    """Return a size with its unit."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
