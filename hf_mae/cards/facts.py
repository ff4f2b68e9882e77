"""A fact is a value and the record it was read from; a card prints no number that is not one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hf_mae.recipes.fields import unknown

NOT_MEASURED = "not measured"

Style = Literal["plain", "percent", "count", "seconds", "scientific", "short", "markdown"]


@dataclass(frozen=True)
class Fact:
    """A value on a card.

    Attributes:
        value: as recorded.
        source: the file, and where in it.
        style: how it is printed; `percent` is of a fraction, `markdown` is not escaped.
    """

    value: Any
    source: str
    style: Style = "plain"

    def __post_init__(self) -> None:
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise ValueError(f"{self.source}: {self.value} is not finite and cannot be printed; measure it again")
        if self.value is None:
            raise ValueError(f"{self.source}: there is no value; print {NOT_MEASURED!r} instead")

    def __str__(self) -> str:
        """Return the value as it is printed."""
        v = self.value
        match self.style:
            case "percent":
                return f"{100 * float(v):.2f} %"
            case "count":
                return f"{int(v):,}"
            case "seconds":
                return _duration(float(v))
            case "scientific":
                return f"{float(v):.1e}" if v else "0"
            case "short":
                return f"{float(v):.4g}"
            case "plain" | "markdown":
                pass
            case _:
                raise unknown("style", self.style, get_args(Style))
        if isinstance(v, bool):
            return "yes" if v else "no"
        if isinstance(v, float):
            return f"{v:g}"
        if isinstance(v, list | tuple):
            return ", ".join(str(Fact(each, self.source)) for each in v)
        return str(v)


def fact(record: Mapping[str, Any], path: str, file: str, style: Style = "plain") -> Fact:
    """Return what a record holds at a path such as `optim.weight_decay`.

    Raises:
        ValueError: it holds nothing there: no record, no number.
    """
    found = maybe(record, path, file, style)
    if found is None:
        raise ValueError(f"{path} is not in {file}, so it cannot be printed; a card holds no number without a record")
    return found


def maybe(record: Mapping[str, Any], path: str, file: str, style: Style = "plain") -> Fact | None:
    """Return what a record holds at a path, None if it holds nothing there."""
    value: Any = record
    for name in path.split("."):
        if not isinstance(value, Mapping) or value.get(name) is None:
            return None
        value = value[name]
    return Fact(value, f"{file}: {path}", style)


def told(value: Fact | None) -> Fact | str:
    """Return a fact, or the words for there being none."""
    return NOT_MEASURED if value is None else value


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
