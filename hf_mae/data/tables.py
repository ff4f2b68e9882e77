"""Labels of an image folder from its metadata tables: `metadata.csv`, `metadata.jsonl` or `metadata.parquet`.

The convention is that of `datasets`' imagefolder: a table lies in the folder of its images or above, and names each by
its path from the table's folder, in a column `file_name` (or NAME_file_name). Where there is a table, the names of
folders are no labels, and images without a row are left out. Text labels become classes in sorted order, one list for
all splits; integers are class numbers.

A name in a table that leads out of the table's folder is refused, as there: a table may come from anywhere.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from hf_mae.data.formats import schema_in_words
from hf_mae.patience import one_line
from hf_mae.recipes.base import Data

IMAGE_NAMES = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "picture", "photo", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_label", "target", "cls", "category", "y")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Names of the tables that are read."""

MOVE_AWAY = "or move the table away to go without it"
_PATHS = f"paths are from the table's folder and with the ending: restore the files, correct the rows, {MOVE_AWAY}"


@dataclass(frozen=True)
class FolderLabels:
    """What the metadata tables of a folder say."""

    files: dict[str, int] = field(default_factory=dict)
    """Label of each image that has a row, by its path from the folder; -1 where the row has none. Empty where the
    tables name no images at all."""
    classes: list[str] | None = None
    """Names of the classes; None where the labels are numbers."""
    has_labels: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the first table and what they hold."""
    notes: list[str] = field(default_factory=list)
    why_unlabelled: str = ""


@dataclass(frozen=True)
class _Table:
    name: str
    rows: pa.Table
    columns: dict[str, str]

    @property
    def listing(self) -> str:
        return ", ".join(f"{name} ({kind})" for name, kind in self.columns.items())

    def values(self, column: str) -> list[Any]:
        return self.rows.column(column).to_pylist()


def read_tables(root: Path, tables: Sequence[str], images: Collection[str], data: Data) -> FolderLabels:
    """Read the metadata tables of a folder.

    Args:
        root: the folder, all splits.
        tables: paths of the tables from there, at least one.
        images: paths of all images from there.
        data: `image_column` and `label_column` are the wishes; the label is not `none`.

    Returns:
        The labels. Without them where none of the columns is clearly one, or one holds what is not a class; images can
        be pretrained on all the same, and `why_unlabelled` says what classification lacks.

    Raises:
        ValueError: a table cannot be read or names images that are not there, or a wish names no such column, or one
            that holds no labels.
    """
    read = [_read(root, name) for name in tables]
    first = read[0]
    if problem := next((p for p in (_no_file_names(t, data) for t in read) if p), None):
        if data.label_column is not None:
            raise ValueError(f"data.label_column={data.label_column!r}: {problem}")
        return FolderLabels(columns=first.columns, notes=[problem], why_unlabelled=problem)
    columns = {t.name: _label_column(t, data) for t in read}
    if data.label_column is not None and not any(columns.values()):
        raise ValueError(
            f"data.label_column={data.label_column!r} is not a column of {', '.join(columns)}; the columns are "
            f"{first.listing}; none ignores labels and tables"
        )
    labelled = [t for t in read if columns[t.name]]
    why = classes = None
    labels: dict[str, list[int]] = {}
    if not labelled:
        why = (
            f"no column of {first.name} is clearly one of labels ({first.listing}): name it with --data.label-column; "
            "the names of the folders are not used where there is a table"
        )
    else:
        labels, classes, why = _numbers({t.name: (t, str(columns[t.name])) for t in labelled})
    files, repeated, conflict = _join(read, labels, images, data)
    if not files:
        problem = f"{first.name} names none of the images of its folder, so neither it nor folders are used for labels"
        if data.label_column is not None:
            raise ValueError(f"data.label_column={data.label_column!r}: {problem}; {_PATHS}")
        return FolderLabels(columns=first.columns, notes=[problem], why_unlabelled=f"{problem}: {_PATHS}")
    if conflict and why is None:
        why = (
            f"{conflict} has several rows with different labels in {first.name}, and classification takes one label an "
            "image: keep one row for each"
        )
    if why is not None and data.label_column is not None:
        raise ValueError(f"data.label_column={data.label_column!r}: {why}; none ignores labels and tables")
    if why is not None:
        files, classes = dict.fromkeys(files, -1), None
    names = ", ".join(t.name for t in read[:3]) + (f" and {len(read) - 3:,} more" if len(read) > 3 else "")
    notes = [why or f"labels from column {columns[labelled[0].name]} of {names} (not from the names of folders)"]
    if repeated:
        notes.append(f"{repeated:,} rows name an image that a row before names: each image is used once")
    if split := next((c for c in first.columns if c.lower() == "split"), None):
        notes.append(f"column {split} of {first.name} is not used: images of a split lie in a folder named after it")
    return FolderLabels(files, classes, why is None, first.columns, notes, why or "")


# ------------------------------------------------------------------------------------------------ one table


def _read(root: Path, name: str) -> _Table:
    path = root / name
    try:
        if name.endswith(".csv"):
            layout = pa_csv.ParseOptions(newlines_in_values=True)
            with pa_csv.open_csv(path, parse_options=layout) as opened:
                columns = opened.schema.names
            # As text, or 007.png and 007 lose their zeros; which column holds numbers is for the labels to find out.
            text = pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()), null_values=[""], strings_can_be_null=True
            )
            rows = pa_csv.read_csv(path, parse_options=layout, convert_options=text)
        elif name.endswith(".jsonl"):
            whole = pa_json.ReadOptions(block_size=min(os.path.getsize(path) + 1, 2**31 - 1))
            rows = pa_json.read_json(path, read_options=whole)
        else:
            rows = pq.read_table(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read as a table ({one_line(error)}); correct it, {MOVE_AWAY} (--data.label-column none "
            "ignores tables too)"
        ) from error
    if len(set(rows.column_names)) < len(rows.column_names):
        raise ValueError(f"{path} has two columns of one name ({', '.join(rows.column_names)}); rename one")
    return _Table(name, rows, schema_in_words(rows.schema))


def _file_columns(table: _Table) -> list[str]:
    return [
        name
        for name in table.columns
        if (name == "file_name" or name.endswith("_file_name")) and _is_text(table.rows.schema.field(name).type)
    ]


def _file_column(table: _Table, data: Data) -> str | None:
    """Return the column that names the images: the one wished for, else the only or the usual one."""
    found = _file_columns(table)
    wish = data.image_column
    if wish is not None:
        candidates = [wish, f"{wish}_file_name"] + ["file_name"] * (wish == "image")
        return next((name for name in candidates if name in found), None)
    usual = ["file_name", *(f"{name}_file_name" for name in IMAGE_NAMES)]
    return next((name for name in usual if name in found), found[0] if len(found) == 1 else None)


def _no_file_names(table: _Table, data: Data) -> str | None:
    """Say why a table names no images, if it does not."""
    if _file_column(table, data) is not None:
        return None
    if data.image_column is not None:
        raise ValueError(
            f"data.image_column={data.image_column!r}: {table.name} has the columns {table.listing}; name one that "
            "ends in file_name, or leave it out"
        )
    if several := _file_columns(table):
        return f"{table.name} has the columns {', '.join(several)}: name the one of the images with --data.image-column"
    lists = [name for name in table.columns if name == "file_names" or name.endswith("_file_names")]
    if lists:
        return f"column {lists[0]} of {table.name} names several images a row, and one is read: give each a row"
    return (
        f"{table.name} has no column file_name to find the images by (its columns are {table.listing}), so neither it "
        f"nor the names of the folders are used for labels: rename the column of paths to file_name, {MOVE_AWAY}"
    )


def _label_column(table: _Table, data: Data) -> str | None:
    if data.label_column is not None:
        return data.label_column if data.label_column in table.columns else None
    return next((name for wish in LABEL_NAMES for name in table.columns if name.lower() == wish), None)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


# ------------------------------------------------------------------------------------------------ labels


def _numbers(
    columns: dict[str, tuple[_Table, str]],
) -> tuple[dict[str, list[int]], list[str] | None, str | None]:
    """Number the labels of all tables.

    Args:
        columns: table and label column of each table that has one, by the table's name.

    Returns:
        The numbers by table, -1 for none; names of the classes, None where the labels are numbers themselves; and why
        there are no labels, None where there are.
    """
    values = {name: table.values(column) for name, (table, column) in columns.items()}
    kinds = {name: _kind_of(*columns[name], values[name]) for name in columns} | {}
    first, (table, column) = next(iter(columns.items()))
    if kinds[first] == "lists":
        return (
            {},
            None,
            (
                f"column {column} of {first} holds {table.columns[column]}, and classification takes one label an "
                "image: add a column of one class each and name it with --data.label-column (pretraining needs none)"
            ),
        )
    found = set(kinds.values()) - {"nothing"}
    if not found:
        return {}, None, f"column {column} of {first} is empty"
    if found == {"text", "numbers"}:  # a CSV whose first classes are called 1 and 2
        found = {"text"}
    if found == {"text"}:
        texts = {name: [None if v is None else str(v) for v in vs] for name, vs in values.items()}
        classes = sorted({v for vs in texts.values() for v in vs if v is not None})
        number = {name: i for i, name in enumerate(classes)}
        return {name: [-1 if v is None else number[v] for v in vs] for name, vs in texts.items()}, classes, None
    if found == {"numbers"}:
        numbers = {name: [-1 if v is None else int(v) for v in vs] for name, vs in values.items()}
        described = [_class_names(t, c) for t, c in columns.values()]
        return numbers, described[0] if all(d == described[0] for d in described) else None, None
    what = "numbers with fractions" if "fractions" in found else ", ".join(sorted(found))
    return {}, None, f"column {column} of {first} holds {what}, not classes: use integers from 0, or text"


_INTEGER, _NUMBER = re.compile(r"-?\d{1,18}"), re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|nan", re.IGNORECASE)


def _kind_of(table: _Table, column: str, values: Sequence[Any]) -> str:
    """Return what a label column holds: `numbers`, `text`, `fractions`, `lists` or `nothing`."""
    kind = table.rows.schema.field(column).type
    present = [v for v in values if v is not None]
    if not present:
        return "nothing"
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return "numbers"
    if pa.types.is_floating(kind):
        return "fractions"
    if pa.types.is_dictionary(kind) and _is_text(kind.value_type):
        return "text"
    if not _is_text(kind):
        return "lists"
    if table.name.endswith(".csv"):
        if all(_INTEGER.fullmatch(v) for v in present):
            return "numbers"
        if all(_NUMBER.fullmatch(v) for v in present):
            return "fractions"
    return "text"


def _class_names(table: _Table, column: str) -> list[str] | None:
    """Return the names that `datasets` keeps in the schema of a Parquet file."""
    if b"huggingface" not in (table.rows.schema.metadata or {}):
        return None
    from datasets import ClassLabel, Features

    feature = Features.from_arrow_schema(table.rows.schema).get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) and feature.names else None


# ------------------------------------------------------------------------------------------------ files


def _join(
    tables: Sequence[_Table], labels: dict[str, list[int]], images: Collection[str], data: Data
) -> tuple[dict[str, int], int, str | None]:
    """Give each image that has a row its label.

    Returns:
        Label by path from the root; how many rows repeat an image; an image with several labels, if there is one.
    """
    files: dict[str, int] = {}
    repeated, conflict = 0, None
    for table in tables:
        folder = posixpath.dirname(table.name)
        column = _file_column(table, data)
        assert column is not None
        missing: list[str] = []
        own = labels.get(table.name) or [-1] * table.rows.num_rows
        for row, (given, label) in enumerate(zip(table.values(column), own, strict=True), 1):
            if not given:
                raise ValueError(f"row {row} of {table.name} has no {column}; fill it in, or remove the row")
            inside = posixpath.normpath(given.replace("\\", "/"))
            if "://" in given or inside.startswith(("/", "../")) or inside == ".." or re.match(r"[A-Za-z]:", given):
                raise ValueError(
                    f"row {row} of {table.name} names {given!r}, which leads out of the table's folder; name images by "
                    "their paths from there, or --data.label-column none ignores the table"
                )
            name = posixpath.join(folder, inside)
            if name not in images:
                missing.append(given)
            elif name in files:
                repeated += 1
                if files[name] != label:
                    conflict = name
            else:
                files[name] = label
        if missing and (len(missing) < table.rows.num_rows or len(tables) > 1):
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{table.name} names {len(missing):,} of its {table.rows.num_rows:,} files that are not among the "
                f"images of its folder ({shown}); {_PATHS} (--data.label-column none ignores it too)"
            )
    return files, repeated, conflict
