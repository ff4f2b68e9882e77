"""What is uploaded: the files of an export and of its run, compared with what the repository holds.

Files are taken into a folder of their own before they are hashed, so that a run that goes on writing changes nothing of
what is on its way.

A publish leaves `records/files.json` in the repository: what it wrote, by content. The next one removes what is in that
list, still as it was written, and no longer part of the model, such as the second shard of weights that now fit into
one file. Files that anyone else put there are never removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from hf_mae.hub.widget import PICKLES
from hf_mae.training.checkpoint import newest_checkpoint

MANIFEST = "records/files.json"
RUN = "run/"
"""Where a run that can be continued lies in a repository."""

OF_A_RUN = ("recipe.json", "metrics.jsonl", "environment.json", "bad_samples.jsonl")

WRITTEN_ONCE = (".safetensors", ".onnx", ".data")
"""Files that are replaced as a whole, never written into: a link is as good as a copy."""

TIMES = frozenset({"time", "date", "seconds", "output"})
"""What differs between two records of the same thing: when, how long, and progress bars in what was printed."""

TIMED = ("export.json", "records/export.json", "records/usage.json")

READ_FIRST = ("adapter_config.json", "processor_config.json", "preprocessor_config.json", "config.json")
"""Files by which stock classes decide what a repository is."""

State = Literal["new", "changed", "edited", "foreign", "same", "remove"]


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
    """What happens to a path of the repository.

    `edited` is a file of ours that someone changed there since, `foreign` one that no publish of ours wrote.
    """

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


Named = tuple[str, Path]
"""A path in the repository, and the file that goes there."""


def collect(folder: Path) -> list[Named]:
    """List the files of an export in the order of their paths; caches and half-written files are left out."""
    names = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    kept = [name for name in names if not any(part.startswith(".") and part != ".eval_results" for part in name.parts)]
    return [(name.as_posix(), folder / name) for name in kept if name.as_posix() != MANIFEST]


def collect_checkpoint(run: Path, *, step: int | None = None) -> list[Named]:
    """List what a run needs to go on elsewhere: its records, its best model and its newest whole checkpoint.

    Args:
        run: the run folder.
        step: the update whose model is published with it; None takes any.

    Raises:
        ValueError: there is no whole checkpoint.
        RuntimeError: the newest is of another update, for the run has gone on since.
    """
    newest, skipped = newest_checkpoint(run / "checkpoints")
    if newest is None:
        raise ValueError(f"checkpoint=True and {run} holds no whole checkpoint. {'; '.join(skipped)}")
    if step is not None and int(newest.name.removeprefix("step_")) != step:
        raise RuntimeError(
            f"{run} was trained on while it was exported: the export is of update {step}, the newest checkpoint is "
            f"{newest.name}; run the same command again"
        )
    folders = [newest, *([run / "best"] if (run / "best" / "manifest.json").is_file() else [])]
    paths = [run / name for name in OF_A_RUN if (run / name).is_file()]
    paths += [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [(RUN + path.relative_to(run).as_posix(), path) for path in paths]


def take(files: Iterable[Named], into: Path) -> list[File]:
    """Put files out of reach of whoever still writes them, and hash what was taken.

    Weights are linked where the file system can, the rest is copied, and of a .jsonl that grows the whole lines.

    Raises:
        RuntimeError: a file is gone: a run that goes on removes its old checkpoints.
    """
    taken: list[File] = []
    for path, local in files:
        copy = into / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            if local.suffix == ".jsonl":
                text = local.read_bytes()
                copy.write_bytes(text[: text.rfind(b"\n") + 1])
            else:
                _link_or_copy(local, copy)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"{local} went away while it was read; if the run goes on, run the same command again"
            ) from error
        taken.append(read_file(copy, path))
    return taken


def _link_or_copy(local: Path, copy: Path) -> None:
    if local.suffix in WRITTEN_ONCE:
        try:
            os.link(local.resolve(), copy)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            pass
        else:
            return
    shutil.copyfile(local, copy)


def keep_times(files: Sequence[File], remote: Mapping[str, Any], read: Callable[[str], bytes]) -> list[File]:
    """Let records that differ in nothing but times stay as they are in the repository.

    Args:
        files: what was taken by `take`; the copies are written over.
        remote: what is there, as for `compare`.
        read: returns the content of a path that is there.
    """
    kept: list[File] = []
    for file in files:
        there = remote.get(file.path)
        if file.path in TIMED and there is not None and not is_same(there, [file.sha256, file.blob]):
            text = read(file.path)
            if _same_but_for_times(text, file.local.read_bytes()):
                file.local.write_bytes(text)
                file = read_file(file.local, file.path)
        kept.append(file)
    return kept


def _same_but_for_times(one: bytes, other: bytes) -> bool:
    try:
        return _timeless(json.loads(one)) == _timeless(json.loads(other))
    except ValueError:  # anyone may have written there
        return False


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(part) for key, part in value.items() if key not in TIMES}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


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
            # The list cannot name itself.
            state = "changed" if file.path == MANIFEST else _state_of(there, earlier.get(file.path))
            rows.append(Row(state, file.path, file.size))
    paths = {file.path for file in files}
    with_run = any(path.startswith(RUN) for path in paths)
    for path, names in sorted(earlier.items()):
        gone = path not in paths and path in remote and (with_run or not path.startswith(RUN))
        if gone and is_same(remote[path], names):
            rows.append(Row("remove", path, remote[path].size))
    return rows


def _state_of(there: Any, written: Sequence[str] | None) -> State:
    """Say what it means to replace a file, by what an earlier publish wrote there."""
    if written is None:
        return "foreign"
    return "changed" if is_same(there, written) else "edited"


def clashes(rows: Sequence[Row], remote: Iterable[str]) -> list[str]:
    """Return the files that would stay beside ours and be read in their place or together with them, or carry code.

    Args:
        rows: of `compare`.
        remote: the paths that are there.
    """
    ours = {row.path for row in rows}
    theirs = sorted(set(remote) - ours)
    return [path for path in theirs if path.endswith(PICKLES) or ("/" not in path and _is_of_a_model(path))]


def _is_of_a_model(name: str) -> bool:
    return name.endswith((*WRITTEN_ONCE, ".index.json")) or name in READ_FIRST


def is_same(there: Any, names: Sequence[str]) -> bool:
    """Compare a file of the Hub with [SHA-256, git blob] of a content."""
    return there.lfs.sha256 == names[0] if there.lfs is not None else there.blob_id == names[1]


def describe(rows: Sequence[Row], *, compared: bool = True) -> list[str]:
    """Return the table to print: all that is sent or removed, and how much stays.

    Args:
        rows: of `compare`.
        compared: the repository was looked at; else only paths and sizes are known.
    """
    words = {
        "edited": "changed, undoing an edit made on the Hub",
        "foreign": "replaces a file that hf-mae did not write",
        "remove": "removed, of an earlier publish",
    }
    shown = [row for row in rows if row.state != "same"]
    width = max((len(row.path) for row in shown), default=0)
    lines = [
        f"  {row.path:<{width}}  {bytes_in_words(row.size):>9}" + f"  {words.get(row.state, row.state)}" * compared
        for row in shown
    ]
    kept = [row for row in rows if row.state != "remove"]
    total = f"  {len(kept)} files, {bytes_in_words(sum(row.size for row in kept))}"
    if not compared:
        return [*lines, total]
    sent = sum(row.size for row in kept if row.state != "same")
    same = sum(row.state == "same" for row in kept)
    return [*lines, f"{total}; {same} of them are there already, {bytes_in_words(sent)} to send"]


def bytes_in_words(size: int) -> str:
    """Return a size with its unit."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
