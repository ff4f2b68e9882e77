"""Folders that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(out: Path, *, mark: str, overwrite: bool = False) -> Iterator[Path]:
    """Hand out an empty folder beside `out` that takes its place when the block ends without an error.

    Killed or failed, the block leaves `out` as it was. What a killed one left beside it is removed by the next.

    Args:
        out: where the folder goes; parents are made.
        mark: a file that tells folders of this kind: one that has it is replaced.
        overwrite: replace any other folder as well.

    Raises:
        ValueError: `out` is a file, or another kind of folder and not empty.
    """
    out = out.expanduser().absolute()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).is_file() and not overwrite:
        raise ValueError(
            f"out={out} holds something else (it has no {mark}); name another folder, or overwrite it (--overwrite)"
        )
    temporary, trash = out.with_name(f".tmp_{out.name}"), out.with_name(f".trash_{out.name}")
    if trash.is_dir() and not out.exists():  # killed between the two renames below
        os.rename(trash, out)
    for leftover in (temporary, trash):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            os.rename(out, trash)
        os.rename(temporary, out)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    if trash.exists():
        shutil.rmtree(trash)
