"""Folders that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(out: Path, *, mark: str, overwrite: bool = False) -> Iterator[Path]:
    """Hand out an empty folder beside `out` that takes its place when the block ends without an error.

    Killed or failed, the block leaves `out` as it was. What a killed one left beside it is removed by the next. Of two
    that write to one place at a time each has a folder of its own, and the later to end stays.

    Args:
        out: where the folder goes; parents are made. A symbolic link stays, and the folder it points to is replaced.
        mark: a file that tells folders of this kind: one that has it is replaced.
        overwrite: replace any other folder as well.

    Raises:
        ValueError: `out` is a file, or another kind of folder and not empty.
    """
    out = out.expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file() and not overwrite:
        raise ValueError(
            f"out={out} holds something else (it has no {mark}); name another folder, or overwrite it (--overwrite)"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear(out)
    unique = secrets.token_hex(4)
    temporary, trash = (out.with_name(f".{kind}_{unique}_{out.name}") for kind in ("tmp", "trash"))
    with _held(temporary):
        try:
            yield temporary
            _replace(out, temporary, trash)
        finally:
            if temporary.exists():
                shutil.rmtree(temporary)
    if trash.exists():
        shutil.rmtree(trash)


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


def _replace(out: Path, temporary: Path, trash: Path) -> None:
    while True:
        if out.exists():
            os.rename(out, trash)
        try:
            os.rename(temporary, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(trash, ignore_errors=True)  # another process has just put its folder there: it was earlier
        else:
            return


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
