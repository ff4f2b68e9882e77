"""Files that exports and conversions write and hash alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file of JSON, for people to read."""
    path.write_text(json.dumps(values, indent=2) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights of a model folder, in order: `model.safetensors`, or its shards."""
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))


def hash_weights(folder: Path) -> str | None:
    """Return the SHA-256 of the weights of a model folder, of all files in order; None if there are none."""
    files = weight_files(folder)
    return hash_files(files)[1] if files else None


def hash_files(files: Iterable[Path]) -> tuple[str, str]:
    """Return MD5, by which the authors name their files, and SHA-256, of the bytes of all files in order."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                md5.update(block)
                sha256.update(block)
    return md5.hexdigest(), sha256.hexdigest()
