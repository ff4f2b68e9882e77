"""The formats whose chunk is a single row: image files, prepared Arrow copies, and the bundled digits."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hf_mae.data.formats import (
    Chunk,
    Source,
    column_labels,
    encoded_images,
    fingerprint,
    read_local,
    schema_in_words,
    unreadable,
)
from hf_mae.data.order import Ints, permutation
from hf_mae.recipes.fields import choose


class FolderSource(Source):
    """Image files; the class is the first folder below the root when every image lies in one and there are several.

    Args:
        root: the folder of the split.
        files: (name relative to the root with forward slashes, bytes), in any order.
        classes: names of the classes of all splits together, in the order of their numbers: of the class folders,
            where fewer than two are no labels; or of `labels`, None where these have no names.
        labels: label of each file, from elsewhere than the folders.
    """

    kind = "files"

    def __init__(
        self,
        root: Path,
        files: Sequence[tuple[str, int]],
        *,
        classes: Sequence[str] | None,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        self.root = root
        ordered = sorted(files)
        self.files = [name for name, _ in ordered]
        self._labels = np.full(len(ordered), -1, dtype=np.int64)
        in_folders = classes is not None and len(classes) > 1 and all("/" in name for name in self.files)
        self.has_labels = labels is not None or in_folders
        if labels is not None:
            self.label_names = list(classes) if classes is not None else None
            self._labels = np.array([labels[name] for name in self.files], dtype=np.int64)
        elif classes is not None and in_folders:
            self.label_names = list(classes)
            number = {name: i for i, name in enumerate(classes)}
            self._labels = np.array([number[name.split("/", 1)[0]] for name in self.files], dtype=np.int64)
        self.sizes = np.ones(len(ordered), dtype=np.int64)
        self.bytes_per_row = sum(size for _, size in ordered) / max(1, len(ordered))
        self.num_shards = len(ordered)
        facts = [] if labels is None else [self.label_names, hashlib.sha256(self._labels.tobytes()).hexdigest()]
        self.fingerprint = fingerprint("folder", ordered, self.has_labels, *facts)
        self.notes = ["labels from the folder names"] if in_folders and labels is None else []

    def read(self, chunk: int) -> Chunk:
        """Read one file."""
        path = self.root / self.files[chunk]
        return Chunk([read_local(path.read_bytes, path)], self._labels[chunk : chunk + 1])

    def labels(self, chunk: int) -> Ints | None:
        """Return the class of one file."""
        return self._labels[chunk : chunk + 1]

    def all_labels(self) -> Ints | None:
        """Return the classes of all files."""
        return self._labels

    def names(self, chunk: int) -> list[str] | None:
        """Return the name of the file, relative to the root."""
        return [self.files[chunk]]

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the file; its only row is 0."""
        return self.files[chunk], row


class ArrowSource(Source):
    """Rows of a prepared `datasets.Dataset`: for formats without an index of their own.

    Args:
        dataset: the map-style data set.
        image: column of the encoded images.
        label: column of the labels, or None.
        label_names: names of the classes, or None.
    """

    kind = "Arrow files"

    def __init__(self, dataset: Any, image: str, label: str | None, label_names: list[str] | None) -> None:
        self.schema = schema_in_words(dataset.features.arrow_schema)
        self.dataset = dataset.select_columns([image] + ([label] if label else [])).with_format("arrow")
        self.image_column, self.label_column, self.label_names = image, label, label_names
        self.has_labels = label is not None
        files = [f["filename"] for f in dataset.cache_files]
        self.sizes = np.ones(len(dataset), dtype=np.int64)
        self.num_shards = max(1, len(files))
        stored = sum(os.path.getsize(f) for f in files)
        self.bytes_per_row = stored / max(1, len(dataset)) if stored else None
        self._name = str(dataset.split or "rows")
        self.fingerprint = fingerprint("arrow", self._name, len(dataset), stored, dataset.features)
        self.notes = [f"column {image}"] + ([f"labels from {label}"] if label else [])

    def read(self, chunk: int) -> Chunk:
        """Read one row; a row that only names a file is read from there, as `datasets` does."""
        try:
            column = read_local(lambda: self.dataset[chunk : chunk + 1].column(self.image_column), self._name)
            image, value = encoded_images(column)[0], column[0].as_py()
            if image is None and isinstance(value, dict) and value.get("path"):
                image = read_local(Path(value["path"]).read_bytes, value["path"])
        except (pa.ArrowInvalid, OSError) as error:
            return unreadable(1, error)
        return Chunk([image], self.labels(chunk))

    def labels(self, chunk: int) -> Ints:
        """Return the label of one row."""
        if self.label_column is None:
            return np.full(1, -1, dtype=np.int64)
        return column_labels(self.dataset[chunk : chunk + 1].column(self.label_column))

    def all_labels(self) -> Ints | None:
        """Return the labels of all rows, read at once."""
        if self.label_column is None:
            return np.full(len(self.sizes), -1, dtype=np.int64)
        labels = self.dataset.select_columns([self.label_column])[:]
        return column_labels(labels.column(self.label_column))

    def names(self, chunk: int) -> list[str] | None:
        """Return the `path` that an image column keeps beside the bytes; a null is an empty name."""
        column = self.dataset[chunk : chunk + 1].column(self.image_column)
        if not pa.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
            return None
        return [column[0].as_py()["path"] or "" if column[0].is_valid else ""]

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the split, and the row."""
        return self._name, chunk + row


class DigitsSource(Source):
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey, as PNG files in memory; needs no network.

    Args:
        split: `train` (1,437 rows) or `test` (360 rows); which row is in which is fixed.
        use_labels: False gives no labels.
    """

    kind = "bundled array"

    def __init__(self, split: str, *, use_labels: bool = True) -> None:
        from PIL import Image
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        order = permutation(len(digits.target), 0)
        rows = choose("data.split", split, {"train": order[:1437], "test": order[1437:]})
        pixels = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
        self._images: list[bytes] = []
        for picture in pixels:
            out = io.BytesIO()
            Image.fromarray(picture).save(out, "PNG")
            self._images.append(out.getvalue())
        self._labels = digits.target[rows].astype(np.int64) if use_labels else np.full(len(rows), -1, dtype=np.int64)
        self._rows = rows
        self.sizes = np.ones(len(rows), dtype=np.int64)
        self.has_labels, self.label_names = use_labels, [str(i) for i in range(10)] if use_labels else None
        self.bytes_per_row = sum(map(len, self._images)) / len(rows)
        self.fingerprint = fingerprint("digits", split, hashlib.sha256(pixels.tobytes()).hexdigest())
        self.where, self.notes = f"digits of scikit-learn, split {split}", []

    def read(self, chunk: int) -> Chunk:
        """Return one digit."""
        return Chunk([self._images[chunk]], self._labels[chunk : chunk + 1])

    def labels(self, chunk: int) -> Ints | None:
        """Return one label."""
        return self._labels[chunk : chunk + 1]

    def all_labels(self) -> Ints | None:
        """Return all labels."""
        return self._labels

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        """Name the row of scikit-learn's array."""
        return "digits", int(self._rows[chunk])
