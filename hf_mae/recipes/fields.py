"""Fields of a recipe by name: their values as text, and recipes that differ in one of them."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from hf_mae.recipes.base import AnyRecipe, Recipe, flat

T = TypeVar("T")


def unknown(field: str, value: object, known: Iterable[object]) -> ValueError:
    """Return the error for a name that is not handled: every choice by name ends in it, none in its last branch."""
    return ValueError(f"{field}={value!r} is unknown; use one of {', '.join(map(str, known))}")


def choose(field: str, value: str, known: Mapping[str, T]) -> T:
    """Return what a name stands for.

    Raises:
        ValueError: there is no such name; lists those there are.
    """
    if value not in known:
        raise unknown(field, value, known)
    return known[value]


def with_field(recipe: AnyRecipe, field: str, value: Any) -> AnyRecipe:
    """Return the recipe with another value of one field, such as `optim.base_lr`."""
    group, _, name = field.rpartition(".")
    if not group:
        return replace(recipe, **{name: value})
    return replace(recipe, **{group: replace(getattr(recipe, group), **{name: value})})


def parse_values(recipe: Recipe, field: str, text: str) -> list[Any]:
    """Return the values that a command line names for a field, by the field's type.

    Args:
        recipe: that has the field.
        field: groups joined by a dot: `augment.rotate`.
        text: values parted by commas. The parts of a value that is a tuple are parted by spaces, as in `15 25,40`;
            None is `none`; a truth is `true` or `false`.

    Raises:
        ValueError: an unknown field, or a value that is none of its type; the message names the nearest fields, or the
            type.
    """
    check_field(recipe, field)
    group, _, name = field.rpartition(".")
    kind = cast(type[Any], type(getattr(recipe, group)) if group else type(recipe))
    hint = get_type_hints(kind)[name]
    return [_parse(hint, part.strip(), field) for part in text.split(",")]


def _parse(hint: Any, text: str, field: str) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and text.lower() == "none":
        return None
    for kind in kinds:
        try:
            return _parse_as(kind, text)
        except ValueError:
            continue
    told = " or ".join(_kind_name(kind) for kind in kinds)
    raise ValueError(f"{field}={text!r} is not {told}; part values by commas, and the parts of a tuple by spaces")


def _parse_as(kind: Any, text: str) -> Any:
    """Return `text` as a value of this kind; ValueError if it is none."""
    if get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in get_args(kind)}
        if text in choices:
            return choices[text]
    if get_origin(kind) is tuple:
        inner, parts = get_args(kind), text.split()
        if inner[-1] is ...:
            return tuple(_parse_as(inner[0], part) for part in parts)
        return tuple(_parse_as(one, part) for one, part in zip(inner, parts, strict=True))
    if kind is bool:
        return ("false", "true").index(text.lower()) == 1
    if kind in (int, float, str):
        return kind(text)
    raise ValueError(text)


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        return f"{'any number' if inner[-1] is ... else len(inner)} of {inner[0].__name__}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, "none")


def check_field(recipe: Recipe, field: str) -> None:
    """Refuse a field that the recipe does not have, or that a sweep sets by itself.

    Raises:
        ValueError: with the nearest names.
    """
    known = list(flat(recipe))
    groups = [f.name for f in fields(recipe) if is_dataclass(getattr(recipe, f.name))]
    if field in ("seed", "out", "resume", "name"):
        raise ValueError(f"{field} is what a sweep sets by itself; choose another field (seeds are --seeds)")
    if field in groups:
        inside = ", ".join(name for name in known if name.startswith(f"{field}."))
        raise ValueError(f"field {field!r} is a group; name one of its fields: {inside}")
    if field not in known:
        near = difflib.get_close_matches(field, known, n=3, cutoff=0.4)
        near = near or [name for name in known if name.endswith(f".{field}")] or known
        raise ValueError(f"field {field!r} is unknown to a {type(recipe).__name__}; did you mean {', '.join(near)}?")


def as_text(value: Any) -> str:
    """Return a value as `parse_values` reads it."""
    if isinstance(value, tuple):
        return " ".join(map(as_text, cast(tuple[Any, ...], value)))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
