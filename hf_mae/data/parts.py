"""What `data.splits` makes of a data set: which split is divided, which splits there are then, and how one is opened.

`hf_mae.data.sources` opens data and asks this module where `data.splits` is set; it passes its own functions, as it
imports this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hf_mae.data.formats import Source
from hf_mae.data.order import Ints
from hf_mae.data.splits import Splits, Subset, check_splits, parse_rule, read_splits, split_source
from hf_mae.recipes.base import Data

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


class OpenSource(Protocol):
    """The signature of `hf_mae.data.sources.open_source`."""

    def __call__(self, data: Data, split: str | None = None, *, field: str = "data.split") -> Source:
        """Open a split."""
        ...


ListSplits = Callable[[Data], list[str]]
"""The signature of `hf_mae.data.sources.list_splits`."""


def alike(wanted: str, available: Sequence[str]) -> str | None:
    """Find a split by its name, or by another name of the same (val, valid and dev mean validation)."""
    same = next((aliases for aliases in SPLIT_NAMES.values() if wanted in aliases), (wanted,))
    return next((name for name in (wanted, *same) if name in available), None)


def divided(own: Sequence[str], named: str | None = None) -> str:
    """Name the split that is divided: the one that is named, else train, or the only one.

    Args:
        own: splits of the data; empty where they cannot be listed.
        named: by a file of lists, or by the user.
    """
    if named is not None and (name := alike(named, own)) is not None:
        return name
    return own[0] if len(own) == 1 else named or "train"


def list_parts(data: Data, list_splits: ListSplits) -> list[str]:
    """List the parts that `data.splits` makes, then the data's own splits beside the one that is divided.

    Raises:
        ValueError: `data.splits` is neither a rule nor a readable file.
    """
    parts, named = _parts(data)
    own = list_splits(replace(data, splits=None))
    return [*parts, *(name for name in own if name != divided(own, named) and alike(name, parts) is None)]


def open_part(data: Data, split: str | None, *, field: str, open_source: OpenSource, list_splits: ListSplits) -> Source:
    """Open a part of the divided split, or another split of the data.

    Args:
        data: the recipe's `data` group, with `splits` set.
        split: a part, or another split of the data; None is the part to train on.
        field: the field of the recipe that names the split, for messages.
        open_source: opens a split of the data.
        list_splits: lists them.

    Raises:
        ValueError: `data.splits` makes no sense, or not of this data; or there is no such part or split.
    """
    assert data.splits is not None
    whole = replace(data, splits=None, split=None)
    (parts, named), own = _parts(data), list_splits(whole)
    wanted = split if split is not None else "train"
    cut = divided(own, named)
    if own and cut not in own and len(own) > 1 and named is not None:
        raise ValueError(
            f"data.splits={data.splits!r} divides the split {named!r}, and {data.path} has {', '.join(own)}; write it "
            "anew with `hf-mae split --of SPLIT`"
        )
    base = open_source(whole, None if cut == "train" else cut)
    part = alike(wanted, parts)
    if part is None:
        other = None if own and alike(wanted, own) is None else open_source(whole, wanted, field=field)
        if other is None or other.fingerprint == base.fingerprint:
            names = [name for name in list_splits(data) if name not in parts]
            raise ValueError(
                f"{field}={wanted!r} is not a split of {data.path}: data.splits={data.splits!r} makes "
                f"{', '.join(parts)} of {base.where}"
                + (f", and beside it there is {', '.join(names)}" if names else "")
                + "; name one of these, or a rule with three parts"
            )
        return other
    rule = parse_rule(data.splits)
    if rule is not None:
        lists = split_source(base, rule, split=cut)
    else:
        lists = read_splits(Path(data.splits).expanduser())
        check_splits(lists, base, data.splits)
    rows = int(base.sizes.sum())
    where = f"{base.where}, part {part} of {data.splits}"
    source = Subset(base, lists.parts[part], beside=_beside(lists, part, rows), where=where)
    if part == "train":
        hidden = [name for name in own if name != cut and alike(name, parts) is not None]
        if hidden:
            source.notes.append(f"its own split(s) {', '.join(hidden)} are not used: data.splits makes its own")
    return source


def _parts(data: Data) -> tuple[list[str], str | None]:
    """Return the names of the parts, and the split that a file says is divided."""
    assert data.splits is not None
    if (rule := parse_rule(data.splits)) is not None:
        return list(rule.names), None
    lists = read_splits(Path(data.splits).expanduser())
    return list(lists.parts), lists.split


def _beside(lists: Splits, part: str, rows: int) -> list[Ints]:
    """Return the other parts, where they are not known from this one: a single one that is all the rest is."""
    others = [other for name, other in lists.parts.items() if name != part]
    return others if len(others) > 1 or len(lists.parts[part]) + sum(map(len, others)) < rows else []
