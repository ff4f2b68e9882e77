"""What the labels of a data set are, and everything that can be wrong with them, found before the first step.

Labels are read wherever that costs the label column alone; for what is left (Parquet on the Hub), `Loader` checks every
batch with `num_classes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_mae.data.formats import UNREADABLE, Source
from hf_mae.data.order import Ints
from hf_mae.data.sources import make_integers
from hf_mae.data.tables import LABEL_NAMES
from hf_mae.recipes.base import Data

MAX_UNUSED = 10
"""Numbers without names may reach this many times the classes that occur (and 100 more); beyond, they are codes."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their numbers."""

    names: tuple[str, ...]
    """Of the classes; "0", "1", ... where the data has no names."""
    notes: tuple[str, ...] = ()
    """What is odd but no mistake, in words."""


def check_labels(train: Source, test: Source | None, data: Data) -> Classes:
    """Refuse labels that cannot be learned or tested on, and return the classes.

    Args:
        train: the split to train on.
        test: the split to evaluate on, None if there is none.
        data: the recipe's `data` group, for the columns that were wished for.

    Returns:
        The classes of both splits. `notes` names classes that never occur in training, with a warning where they are
        tested, and splits that were not looked through.

    Raises:
        ValueError: there are no labels, or text or floats; a number has no class; rows have no label; there is only
            one class; or the classes of the splits differ, stand in another order or have no image in common. Says what
            to do.
        RuntimeError: a file is gone.
    """
    _check_column(train, data)
    if test is not None and not test.has_labels:
        why = f" ({test.why_unlabelled})" if test.why_unlabelled else ""
        raise ValueError(
            f"{test.where}: has no labels{why}, and {train.where} has; name a labelled split with --evals.split"
        )
    names = _names(train, test)
    seen = _check_numbers(train, data, names, split="data.split")
    if names is None:
        if seen is None:
            raise ValueError(
                f"{train.where}: the labels have no names, and counting the classes would mean asking the server for "
                "every label; add --data.no-streaming to download the data set first"
            )
        names = _number(train, seen)
    if len(names) < 2 or (seen is not None and len(seen) < 2):
        only = f" ({names[next(iter(seen))]})" if seen else ""
        raise ValueError(f"{train.where}: only one class{only}; classification needs two or more{_one_class(train)}")
    notes = [] if seen is not None else [_not_scanned(train)]
    if seen is not None and (absent := [name for i, name in enumerate(names) if i not in seen]):
        notes.append(f"{len(absent):,} of {len(names):,} classes never occur in training: {_some(absent)}")
    if test is not None:
        tested = _check_numbers(test, data, names, split="evals.split")
        if tested is None:
            notes.append(_not_scanned(test))
        elif seen is not None and (unseen := sorted(tested.keys() - seen.keys())):
            notes.append(_unseen(train, test, seen, tested, [names[i] for i in unseen]))
    return Classes(tuple(names), tuple(notes))


def align(model_names: Sequence[str], data_names: Sequence[str]) -> list[int]:
    """Find the model's class for each class of the data, by name.

    Args:
        model_names: of the model's classes, in the order of its logits.
        data_names: of the data's classes, in the order of their numbers.

    Returns:
        The model's number of each class of the data.

    Raises:
        ValueError: the model does not know a name, or has it twice; lists them.
    """
    if list(model_names) == list(data_names):  # the same list, whatever it repeats
        return list(range(len(data_names)))
    if unknown := [name for name in data_names if name not in set(model_names)]:
        raise ValueError(
            f"the model does not know {len(unknown):,} of the {len(data_names):,} classes of the data: "
            f"{_some(unknown)}; it knows {_some(model_names)}; fine-tune it on these classes, or rename them as the "
            "model names them"
        )
    counts = Counter(model_names)
    if twice := sorted({name for name in data_names if counts[name] > 1}):
        raise ValueError(
            f"the model has more than one class named {_some(twice)}, and the data names its classes in another order; "
            "make the names in the model's id2label unique"
        )
    number = {name: i for i, name in enumerate(model_names)}
    return [number[name] for name in data_names]


# ------------------------------------------------------------------------------------------------ no labels


def _check_column(source: Source, data: Data) -> None:
    if source.has_labels:
        return
    if data.label_column == "none":
        raise ValueError(
            f"data.label_column='none' ignores the labels of {source.where}, and classification needs them; leave it "
            "out, or name the column"
        )
    why = source.why_unlabelled
    if not why or not source.schema:  # without a table, folders are the other way
        why = f"{why}; {_remedy(source, data)}" if why else _remedy(source, data)
    raise ValueError(f"{source.where}: has no labels; {why}")


def _remedy(source: Source, data: Data) -> str:
    if source.schema:
        listing = "the columns are " + ", ".join(f"{name} ({kind})" for name, kind in source.schema.items())
        for name, kind in source.schema.items():
            convert = make_integers(data, name, kind) if name.lower() in LABEL_NAMES else ""
            if "cast_column" in convert:
                return f"column {name} holds {kind}, not integers; {convert}; {listing}"
        return f"{listing}; name the one of integer labels with --data.label-column"
    if source.kind == "tar files":
        return (
            "each sample needs a member NAME.cls with an integer, or a NAME.json with an integer `label`; name another "
            "with --data.label-column"
        )
    return (
        "put each image of every split into a folder named after its class (train/CLASS/x.jpg, test/CLASS/y.jpg), two "
        "classes or more, and leave none outside"
    )


def _one_class(source: Source) -> str:
    if source.kind == "files" and not source.schema:
        return "; put each image into a folder named after its class"
    return "; is --data.label-column right?"


# ------------------------------------------------------------------------------------------------ numbers


def _check_numbers(source: Source, data: Data, names: Sequence[str] | None, *, split: str) -> dict[int, int] | None:
    """Return the images of each class that occurs, None where looking costs more than the label column.

    Raises:
        ValueError: a row has no label, or one that names no class.
    """
    labels = source.all_labels()
    if labels is None:
        return None
    rows = np.flatnonzero(labels != UNREADABLE)  # what cannot be read is a bad row, and counted by the loader
    labels = labels[rows]
    if not len(labels):
        return None
    if len(missing := rows[labels == -1]) == len(rows):
        raise ValueError(
            f"{source.where}: no row has a label (all are -1 or null, as where the labels are kept secret); name "
            f"another split with --{split}"
        )
    if len(missing):
        if source.kind == "files":
            raise ValueError(
                f"{source.where}: {len(missing):,} of {len(rows):,} images have no label in their metadata table, "
                f"first {_place(source, int(missing[0]))}; fill it in, or remove those rows"
            )
        column = data.label_column or "label"
        raise ValueError(
            f"{source.where}: {len(missing):,} of {len(rows):,} rows have no label (-1 or null), first "
            f"{_place(source, int(missing[0]))}; leave them out: ds.filter(lambda row: row[{column!r}] is not None and "
            f"row[{column!r}] >= 0), or remove those files"
        )
    wrong = labels < 0 if names is None else (labels < 0) | (labels >= len(names))
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        rule = "negative" if names is None else f"outside 0 to {len(names) - 1}, the {len(names):,} classes it names"
        raise ValueError(
            f"{source.where}: {int(wrong.sum()):,} of {len(rows):,} labels are {rule}, first "
            f"{int(labels[first])} in {_place(source, int(rows[first]))}; number the classes from 0, or correct the "
            "names"
        )
    classes, counts = np.unique(labels, return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def _number(source: Source, seen: Mapping[int, int]) -> list[str]:
    """Name classes by their numbers."""
    largest = max(seen)
    if largest >= MAX_UNUSED * len(seen) + 100:
        raise ValueError(
            f"{source.where}: {len(seen):,} different labels reach up to {largest:,}, so they are codes, not class "
            "numbers; number the classes from 0 (or make the column a ClassLabel)"
        )
    return [str(i) for i in range(largest + 1)]


def _place(source: Source, row: int) -> str:
    ends: Ints = np.cumsum(source.sizes)
    chunk = int(np.searchsorted(ends, row, side="right"))
    shard, number = source.describe(chunk, row - int(ends[chunk] - source.sizes[chunk]))
    return f"{shard} row {number}"


# ------------------------------------------------------------------------------------------------ names


def _names(train: Source, test: Source | None) -> list[str] | None:
    """Return the names of the classes, the same in both splits; None if neither has any.

    Raises:
        ValueError: they differ.
    """
    first, second = train.label_names, test.label_names if test is not None else None
    if not first or not second or first == second:
        return first or second or None
    where = f"the classes of {train.where} and of {test.where if test is not None else ''}"
    i = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    here, there = (repr(names[i]) if i < len(names) else "no class" for names in (first, second))
    at = f"class {i} is {here} in the first and {there} in the second"
    if Counter(first) == Counter(second):
        raise ValueError(
            f"{where} stand in another order: {at}; give both the same list: "
            "ds.cast_column('label', datasets.ClassLabel(names=NAMES)) on the text, or one folder tree for both"
        )
    extra = sorted(set(second) - set(first))
    lacking = sorted(set(first) - set(second))
    parts = [f"only in the second: {_some(extra)}"] * bool(extra) + [f"only in the first: {_some(lacking)}"] * bool(
        lacking
    )
    raise ValueError(
        f"{where} differ: {at} ({'; '.join(parts)}); give both splits one list of names, also for classes that one of "
        "them lacks"
    )


def _unseen(
    train: Source, test: Source, seen: Mapping[int, int], tested: Mapping[int, int], unseen: Sequence[str]
) -> str:
    """Say how many test images are of classes that training never sees.

    Raises:
        ValueError: all of them are.
    """
    if len(unseen) == len(tested):
        raise ValueError(
            f"{test.where}: none of its {len(tested):,} classes ({_some(unseen)}) has an image in {train.where}, so "
            "every answer would be wrong; name a split of the classes that are trained on with --evals.split, or "
            "divide the split to train on with --data.splits stratified:80/10/10"
        )
    images = sum(count for label, count in tested.items() if label not in seen)
    return (
        f"warning: {images:,} of {sum(tested.values()):,} test images are of {len(unseen):,} class(es) that training "
        f"never sees, and will be answered wrongly: {_some(unseen)}"
    )


def _not_scanned(source: Source) -> str:
    return f"{source.where}: the labels are not looked through before training; each batch is checked"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
