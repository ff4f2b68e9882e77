"""Folders that are whole or absent, and in which nothing of the user's is overwritten.

A new folder is written beside its place and then renamed. Each of our folders holds a list of the files that were
written there with their hashes, so that a file which the user edited or added is known, and is not overwritten unless
the user asks for it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from hf_mae.exporting.files import hash_files

FILES = ".hf_mae_files.json"
"""The list: {"format": 1, "mark": the file that tells the kind of folder, "files": {path: [SHA-256, ...]}}. A file has
two hashes only while it is being replaced. The list stays on this machine."""

_NOT_THE_USERS = frozenset({FILES, ".lock", ".DS_Store", "Thumbs.db", "desktop.ini"})
"""Names of files that no user writes: ours, and those of file managers."""
_PARTIAL = ".tmp_"
"""How the names of half-written files begin."""


class WouldOverwriteError(ValueError):
    """A folder holds files that the user edited or added.

    Attributes:
        folder: the folder.
        files: their paths in it.
    """

    def __init__(self, folder: Path, files: Sequence[str], message: str):
        super().__init__(message)
        self.folder, self.files = folder, files


@contextmanager
def new_folder(out: Path, *, mark: str, source: Path | None = None, overwrite: bool = False) -> Iterator[Path]:
    """Hand out an empty folder beside `out` that takes its place when the block ends without an error.

    Killed or failed, the block leaves `out` as it was: on Linux both folders change places in one step, elsewhere the
    next call puts back what a process left that was killed between two renames. What a killed one left beside `out` is
    removed by the next. Of two that write to one place at a time each has a folder of its own, and the later to end
    stays.

    Args:
        out: where the folder goes; parents are made. A symbolic link stays, and the folder it points to is replaced.
        mark: a file that tells folders of this kind: one that has it is replaced, if the user edited and added nothing.
        source: what the folder is made of, if that is a file or folder; `out` must not hold it, or lie in it.
        overwrite: replace any other folder as well.

    Raises:
        ValueError: `out` is a file, holds `source`, or holds something that would be lost (`WouldOverwriteError`).
    """
    out = check_out(out, mark=mark, source=source, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp_{secrets.token_hex(4)}_{out.name}")
    with _held(temporary):
        try:
            yield temporary
            written = {path: [_sha256(temporary / path)] for path in _files(temporary)}
            _write_list(temporary, mark, written)
            if not overwrite:
                _check_replaceable(out, mark)  # again: making the folder takes minutes
            _replace(out, temporary)
        finally:
            if temporary.exists():  # after an exchange, the former folder
                shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path, *, mark: str, source: Path | None = None, overwrite: bool = False) -> Path:
    """Refuse what `new_folder` would refuse, before the work is done; return where the folder is going to lie.

    Raises:
        ValueError: as of `new_folder`.
    """
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if source is not None and (source := source.expanduser().resolve()).exists():
        if out in (source, *source.parents):
            raise ValueError(f"out={out} holds the model that is exported; name another folder")
        if source in out.parents:
            raise ValueError(f"out={out} lies in the folder that is read, {source}; name another folder")
    if out.parent.is_dir():
        _clear(out)
    if not overwrite:
        _check_replaceable(out, mark)
    return out


def write_files(
    folder: Path,
    files: Mapping[str, bytes],
    *,
    stale: Callable[[str], bool] = lambda path: False,
    overwrite: bool = False,
    keep: bool = False,
) -> list[str]:
    """Write files into a folder of ours, each whole or not at all, in their order. None is written if one is refused.

    Args:
        folder: the folder.
        files: their contents by path.
        stale: of the paths that an earlier call wrote and `files` lacks: which to remove, unless they were edited.
        overwrite: also replace files that the user edited or added.
        keep: leave those as they are, and write the others.

    Returns:
        The paths that were left as they are.

    Raises:
        WouldOverwriteError: without `overwrite` and `keep`: a file was edited or added by the user.
    """
    mark, listed = _read_list(folder) or ("", {})
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in files.items()}

    def is_users(path: str, ours: Collection[str]) -> bool:
        at = folder / path
        return _in_the_way(folder, path) is not None or (os.path.lexists(at) and _sha256(at) not in ours)

    theirs = [path for path, new in hashes.items() if is_users(path, (new, *listed.get(path, ())))]
    if theirs and not overwrite and not keep:
        raise WouldOverwriteError(
            folder,
            theirs,
            f"{', '.join(shown(str(folder / path) for path in theirs))} {_was_edited(theirs)}; keep "
            f"{'it' if len(theirs) == 1 else 'them'}, or write everything anew with overwrite=True (--overwrite)",
        )
    written = {path: content for path, content in files.items() if overwrite or path not in theirs}
    gone = [path for path in listed if path not in files and stale(path) and not is_users(path, listed[path])]
    _write_list(folder, mark, listed | {path: [*listed.get(path, ()), hashes[path]] for path in written})
    for path, content in written.items():
        at = folder / path
        if (file := _in_the_way(folder, path)) is not None:
            file.unlink()
        at.parent.mkdir(parents=True, exist_ok=True)
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        partial = at.with_name(f"{_PARTIAL}{at.name}")
        partial.write_bytes(content)
        partial.replace(at)
    for path in gone:
        (folder / path).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            (folder / path).parent.rmdir()
    left = {path: ours for path, ours in listed.items() if path not in gone}
    _write_list(folder, mark, left | {path: [hashes[path]] for path in written})
    return [] if overwrite else theirs


def is_edited(folder: Path, path: str) -> bool:
    """Return whether a file of a folder of ours is there and not as we wrote it, or nobody knows whether we did."""
    _, listed = _read_list(folder) or ("", {})
    return (folder / path).is_file() and _sha256(folder / path) not in listed.get(path, ())


def shown(paths: Iterable[str], most: int = 5) -> list[str]:
    """Return the first of some paths, and how many more there are, for a message."""
    paths = list(paths)
    return [*paths[:most], f"and {len(paths) - most} more"] if len(paths) > most else paths


# ------------------------------------------------------------------------------------------------ what is the user's


def _check_replaceable(out: Path, mark: str) -> None:
    """Refuse to replace a folder that holds something of the user's."""
    if not out.is_dir() or not (there := _files(out)):
        return
    remedy = "name another folder, or replace it with all that it holds (--overwrite)"
    if not (out / mark).is_file():
        raise WouldOverwriteError(
            out, there, f"out={out} holds something else (it has no {mark}): {', '.join(shown(there))}; {remedy}"
        )
    found = _read_list(out)
    if found is None:
        if there == [mark]:
            return
        raise WouldOverwriteError(
            out,
            there,
            f"out={out} has no list of what was written there (it is of an earlier version of hf_mae, or was copied "
            f"without it), so that nobody can tell whether something in it was edited: {', '.join(shown(there))}; "
            f"{remedy}",
        )
    if found[0] != mark:
        raise WouldOverwriteError(
            out,
            there,
            f"out={out} holds something else (it is told by {found[0] or 'nothing'}, not {mark}); {remedy}",
        )
    theirs = [path for path in there if path not in found[1] or _sha256(out / path) not in found[1][path]]
    if theirs:
        raise WouldOverwriteError(out, theirs, f"out={out}: {', '.join(shown(theirs))} {_was_edited(theirs)}; {remedy}")


def _in_the_way(folder: Path, path: str) -> Path | None:
    """Return the file that stands where a path of a folder needs a folder."""
    above = (folder / part for part in PurePosixPath(path).parents if part.name)
    return next((at for at in above if os.path.lexists(at) and not at.is_dir()), None)


def _was_edited(paths: Sequence[str]) -> str:
    return f"{'was' if len(paths) == 1 else 'were'} edited or added since hf_mae wrote the folder"


def _files(folder: Path) -> list[str]:
    """Return the paths of what a folder holds, links to folders included, but not what no user writes."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    kept = (path for path in found if path.name not in _NOT_THE_USERS and not path.name.startswith(_PARTIAL))
    return [path.relative_to(folder).as_posix() for path in kept]


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file; of anything else, a name that no hash has."""
    return hash_files([path])[1] if path.is_file() else "not a file"


def _read_list(folder: Path) -> tuple[str, dict[str, list[str]]] | None:
    """Return the mark and the hashes, None where there is no such list (or one that somebody has damaged)."""
    try:
        found = json.loads((folder / FILES).read_text(encoding="utf-8"))
        return str(found["mark"]), {str(path): [str(one) for one in ours] for path, ours in found["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write_list(folder: Path, mark: str, files: Mapping[str, Sequence[str]]) -> None:
    partial = folder / f"{_PARTIAL}{FILES}"
    content = {"format": 1, "mark": mark, "files": {path: list(ours) for path, ours in sorted(files.items())}}
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / FILES)


# ------------------------------------------------------------------------------------------------ replacing


def _clear(out: Path) -> None:
    """Remove what killed processes left beside a folder, and put it back if one was killed between its two renames."""
    for trash in _beside(out, "trash"):
        if out.exists():
            shutil.rmtree(trash, ignore_errors=True)  # the one whose trash it is may be at it as well
        else:
            with suppress(FileNotFoundError):
                os.rename(trash, out)
    for temporary in _beside(out, "tmp"):
        if (lock := _lock(temporary, wait=False)) is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)


def _beside(out: Path, kind: str) -> list[Path]:
    length = len(f".{kind}_") + 8 + 1  # and a token of eight digits
    found = [path for path in out.parent.iterdir() if path.name.startswith(f".{kind}_") and path.is_dir()]
    return [path for path in found if path.name[length:] == out.name]


def _replace(out: Path, temporary: Path) -> None:
    """Let a folder take the place of another, which is removed last, or is `temporary` from now on."""
    former: list[Path] = []
    while True:
        if out.exists():
            if _exchange(temporary, out):
                break
            former.append(out.with_name(f".trash_{secrets.token_hex(4)}_{out.name}"))
            os.rename(out, former[-1])
        try:
            os.rename(temporary, out)
            break
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                continue  # another process has just put its folder there: it was earlier
            if former:
                os.rename(former.pop(), out)
            raise
    for trash in former:
        shutil.rmtree(trash, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; return False where the system cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # of Linux
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


# ------------------------------------------------------------------------------------------------ locks


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make a folder and lock it, so that others see that somebody is at work in it. A killed process loses its lock."""
    while True:
        folder.mkdir()
        lock = _lock(folder, wait=True)
        if folder.exists():
            break
        if lock is not None:  # cleared away before it was locked
            os.close(lock)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Return a lock on a folder, None if it is held, or gone, or cannot be locked here."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor
