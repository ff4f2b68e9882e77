"""The commands that train: pretrain, finetune, probe, supervise, birds, lr-find."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from hf_mae.cli.arguments import (
    TRAINED,
    choose_preset,
    chosen_fields,
    list_presets,
    parse_recipe,
    parse_with,
    require_data,
)
from hf_mae.recipes.checks import check
from hf_mae.recipes.classification import ClassifierRecipe, check_classifier
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.supervised import SUPERVISE, SuperviseRecipe, check_supervise
from hf_mae.recipes.transfer import FINETUNE, PROBE


def pretrain_command(arguments: Sequence[str]) -> None:
    """Pretrain a masked autoencoder."""
    if "--list" in arguments:
        sys.stdout.write(list_presets(PRESETS))
        return
    recipe = parse_recipe(PRESETS, arguments, default="quickstart")
    require_data(recipe)
    check(recipe)
    from hf_mae.pretrain import pretrain  # torch and transformers take seconds: --help and --list need neither

    pretrain(recipe, chosen=chosen_fields(arguments))


def finetune_command(arguments: Sequence[str]) -> None:
    """Train a classifier on an encoder."""
    if "--list" in arguments:
        sys.stdout.write(list_presets(FINETUNE))
        return
    recipe = parse_recipe(FINETUNE, arguments, default="finetune-digits", command="finetune")
    _classify(recipe, arguments)


def probe_command(arguments: Sequence[str]) -> None:
    """Train a head on a frozen encoder."""
    if "--list" in arguments:
        sys.stdout.write(list_presets(PROBE))
        return
    recipe = parse_recipe(PROBE, arguments, default="probe-digits", command="probe")
    if not recipe.init_from:
        raise ValueError(
            "init_from is empty; name the encoder to probe: --init-from RUN_FOLDER, a model folder, a Hub id or an "
            "official .pth file"
        )
    _classify(recipe, arguments)


def _classify(recipe: ClassifierRecipe, arguments: Sequence[str]) -> None:
    require_data(recipe)
    check_classifier(recipe)
    from hf_mae.classify import classify

    classify(recipe, chosen=chosen_fields(arguments))


def supervise_command(arguments: Sequence[str]) -> None:
    """Train a model of timm."""
    if "--list" in arguments:
        sys.stdout.write(list_presets(SUPERVISE))
        return
    recipe = parse_recipe(SUPERVISE, arguments, default="supervise-digits", command="supervise")
    require_data(recipe)
    check_supervise(recipe)
    from hf_mae.supervise import supervise

    supervise(recipe, chosen=chosen_fields(arguments))


@dataclass(frozen=True, kw_only=True)
class BirdsArguments:
    """What `hf-mae birds` takes: which stages to run, and a whole recipe."""

    finetune: bool = True
    """Run stage 9 (train on the validation split) and its control."""
    find_lr: Literal["no", "ascending", "descending"] = "no"
    """Run the learning rate test of stage 5 first, for the record."""
    recipe: Annotated[SuperviseRecipe, tyro.conf.arg(name="")]


def birds_command(arguments: Sequence[str]) -> None:
    """Train the bird classifier in its stages."""
    prefix = "rexnet-birds-"
    variants = {name.removeprefix(prefix): SUPERVISE[prefix + name] for name in ("corrected",)} | {
        f"published-{kind}": SUPERVISE[f"{prefix}published-{kind}"] for kind in ("effective", "intended")
    }
    if "--list" in arguments:
        sys.stdout.write(list_presets(variants))
        return
    preset, flags = choose_preset(variants, arguments, "corrected")
    given = parse_with(BirdsArguments, preset, flags, f"hf-mae birds {preset.name.removeprefix(prefix)}")
    require_data(given.recipe)
    from hf_mae.birds import train_birds

    train_birds(given.recipe, finetune=given.finetune, find_lr=given.find_lr)


@dataclass(frozen=True, kw_only=True)
class LrFindArguments:
    """What `hf-mae lr-find` takes: the range, and a whole recipe."""

    low: float | None = None
    """Lowest learning rate per update; None is 1e-7, descending 1e-5."""
    high: float | None = None
    """Highest learning rate per update; None is 1, descending 1e-2."""
    steps: int | None = None
    """Updates of the test; None is 100, descending 1000."""
    descending: bool = False
    """Go from high to low, as the bird slides did (hence their range); makes no suggestion."""
    recipe: Annotated[Any, tyro.conf.arg(name="")]


def lr_find_command(arguments: Sequence[str]) -> None:
    """Run a learning rate test."""
    command, flags = "supervise", list(arguments)
    if flags and flags[0] in TRAINED:
        command = flags.pop(0)
    presets = TRAINED[command]
    preset, flags = choose_preset(presets, flags, next(iter(presets)))
    given = parse_with(LrFindArguments, preset, flags, f"hf-mae lr-find {command} {preset.name}")
    require_data(given.recipe)
    from hf_mae.lr_find import lr_find

    lr_find(given.recipe, low=given.low, high=given.high, steps=given.steps, descending=given.descending)
