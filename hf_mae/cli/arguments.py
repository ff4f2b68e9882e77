"""From the words of a command line to a recipe: presets, flags, and what is said where a name is unknown."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import make_dataclass, replace
from typing import Annotated, Any, TypeVar

import tyro

from hf_mae.recipes.base import Recipe
from hf_mae.recipes.classification import ClassifierRecipe
from hf_mae.recipes.defaults import squeeze_warmup
from hf_mae.recipes.evaluation import Evaluation
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.supervised import SUPERVISE, SuperviseRecipe
from hf_mae.recipes.transfer import FINETUNE, PROBE

AnyPreset = TypeVar("AnyPreset", Recipe, ClassifierRecipe, SuperviseRecipe, Evaluation)

TRAINED: dict[str, Mapping[str, Any]] = {
    "pretrain": PRESETS,
    "finetune": FINETUNE,
    "probe": PROBE,
    "supervise": SUPERVISE,
}
"""Presets by the command that trains them."""


def parse_recipe(
    presets: Mapping[str, AnyPreset], arguments: Sequence[str], *, default: str, command: str = "pretrain"
) -> AnyPreset:
    """Return the preset named first in `arguments` (or `default`) with the flags after it applied.

    Args:
        presets: by name, all of one kind.
        arguments: of the command line, after the command.
        default: the preset where none is named.
        command: for the title of the help.

    Raises:
        ValueError: no preset has that name; the nearest ones are listed.
    """
    preset, flags = choose_preset(presets, arguments, default)
    recipe = tyro.cli(
        type(preset),
        prog=f"hf-mae {command} {preset.name}",
        description=f"Source: {preset.source}. Expected: {preset.expected}.",
        default=preset,
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return fit_warmup(recipe, preset, flags)


def parse_with(group: Any, preset: Any, flags: Sequence[str], prog: str) -> Any:
    """Return an argument group whose `recipe` is a preset, with the flags of both applied."""
    field = ("recipe", Annotated[type(preset), tyro.conf.arg(name="")])  # the flags are those of this kind of recipe
    with_recipe: Any = make_dataclass(group.__name__, [field], bases=(group,), frozen=True, kw_only=True)
    given: Any = tyro.cli(
        with_recipe,
        prog=prog,
        description=f"Source: {preset.source}. Expected: {preset.expected}.",
        default=with_recipe(recipe=preset),
        args=list(flags),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return replace(given, recipe=fit_warmup(given.recipe, preset, flags))


def chosen_fields(arguments: Sequence[str]) -> frozenset[str]:
    """Return the fields that a command line sets, as recipes write them: `--optim.base-lr 1` chooses optim.base_lr."""
    return frozenset(
        word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--") and word != "--"
    )


def fit_warmup(recipe: Any, preset: Any, flags: Sequence[str]) -> Any:
    """Return the recipe with a warm-up that fits into epochs that were typed, and say so on the main process."""
    if not isinstance(recipe, Recipe):
        return recipe
    recipe, notes = squeeze_warmup(recipe, preset, chosen_fields(flags))
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.writelines(f"{note}\n" for note in notes)
    return recipe


def choose_preset(
    presets: Mapping[str, AnyPreset], arguments: Sequence[str], default: str
) -> tuple[AnyPreset, Sequence[str]]:
    """Return the preset named first (or `default`), and the flags after it.

    Raises:
        ValueError: no preset has that name; the nearest ones are listed.
    """
    name, flags = default, list(arguments)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0)
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; {nearest(name, presets)} (--list prints all)")
    return presets[name], flags


def require_data(recipe: Recipe | Evaluation) -> None:
    """Refuse a recipe without data.

    Raises:
        ValueError: `data.path` is empty.
    """
    if not recipe.data.path:
        raise ValueError(
            "data.path is empty; name a folder, Parquet or tar files, or a Hub id: --data.path DIR_OR_HUB_ID"
        )


def list_presets(presets: Mapping[str, Any]) -> str:
    """Return a table of presets: length, batch, source and expected result."""
    width = max(20, *(len(name) + 2 for name in presets))
    trained = not any(isinstance(recipe, Evaluation) for recipe in presets.values())
    numbers = f"{'epochs':>7}{'batch':>7}{'pixels':>9}" if trained else ""
    lines = [f"{'preset':<{width}}{numbers}  data"]
    for name, recipe in presets.items():
        if isinstance(recipe, Recipe):
            numbers = f"{recipe.epochs:>7g}{recipe.global_batch:>7}{recipe.model.image_size or 'encoder':>9}"
        lines.append(f"{name:<{width}}{numbers}  {recipe.data.path or 'yours (--data.path)'}")
        lines.append(f"{'':<{width}}source: {recipe.source}")
        lines.append(f"{'':<{width}}expected: {recipe.expected}")
    return "\n".join(lines) + "\n"


def nearest(name: str, known: Mapping[str, object]) -> str:
    """Return the end of a message on an unknown name: what it may have meant, or all there is."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"did you mean {', '.join(near)}?" if near else f"use one of {', '.join(known)}"
