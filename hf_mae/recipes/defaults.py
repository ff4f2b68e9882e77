"""Defaults that adapt: values of a preset that nobody typed, where they do not suit the data or the length of the run.

Pure functions of the recipe, of the fields that were chosen and of the data's size, so that the same command on the
same data always makes the same run. Each returns the recipe, and a line for each value it changed or warns of. Where
nothing has to be adapted, the recipe comes back as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from hf_mae.recipes.base import AnyRecipe, Recipe
from hf_mae.recipes.checks import check, choose_micro_batch

UPDATES_AN_EPOCH = 10
"""Updates of an epoch that a smaller global batch aims at."""

SMALLEST_BATCH = 8
"""Images: a smaller global batch is not chosen for anybody."""

HARDLY_ANY = 100
"""Updates below which a run is said to be hardly any training."""

Chosen = Collection[str] | None
"""Names of the fields (`global_batch`, `schedule.warmup_epochs`) that the user chose; None is all of them."""


def is_default(field: str, chosen: Chosen) -> bool:
    """Return whether a field has its preset's value because nobody chose another."""
    return chosen is not None and field not in chosen


def squeeze_warmup(recipe: AnyRecipe, preset: Recipe, chosen: Chosen) -> tuple[AnyRecipe, list[str]]:
    """Give the warm-up its share of the preset's epochs where the run is not longer than the preset's warm-up.

    As `max_steps` does by itself. A warm-up that was chosen stays, and is refused by `check` if it is too long.
    """
    schedule, epochs = recipe.schedule, recipe.epochs
    warmup, share = schedule.warmup_epochs, preset.schedule.warmup_epochs / preset.epochs
    if not is_default("schedule.warmup_epochs", chosen) or schedule.name == "exponential" or not epochs > 0:
        return recipe, []
    if warmup < epochs:
        most = warmup > epochs / 2 and epochs < preset.epochs
        flag = f"--schedule.warmup-epochs {epochs * share:.3g}"
        note = f"note: the warm-up takes {warmup:g} of {epochs:g} epochs; {flag} is its share in {preset.name}"
        return recipe, [note] if most else []
    squeezed = replace(recipe, schedule=replace(schedule, warmup_epochs=epochs * share))
    return squeezed, [
        f"schedule.warmup_epochs={warmup:g} of {preset.name} does not fit into epochs={epochs:g}: using "
        f"{epochs * share:.3g}, the same share of the run ({share:.1%}); --schedule.warmup-epochs chooses another"
    ]


def overfills(recipe: Recipe, rows: int) -> bool:
    """Return whether one update takes more different images than there are."""
    return recipe.global_batch // recipe.data.repeats > rows


def fit_batch(recipe: AnyRecipe, rows: int, chosen: Chosen, *, processes: int) -> tuple[AnyRecipe, list[str]]:
    """Lower a global batch that is larger than the data set, or warn of it where it was chosen.

    Args:
        recipe: with the global batch.
        rows: images to train on.
        chosen: fields that are left alone.
        processes: that share the global batch.
    """
    if rows < 1 or not overfills(recipe, rows):
        return recipe, []
    batch, fitted = recipe.global_batch, _smaller(recipe, rows, processes)
    if fitted is None:
        return recipe, [f"warning: {_repeats(recipe, rows)}"]
    smaller = fitted.global_batch
    if not is_default("global_batch", chosen):
        return recipe, [
            f"warning: {_repeats(recipe, rows)}; --global-batch {smaller} makes {_updates(fitted, rows)} updates an "
            "epoch"
        ]
    return fitted, [
        f"global_batch={batch} is more than the {rows:,} images: using {smaller}, {_updates(fitted, rows)} updates an "
        f"epoch, and with it lr up to {fitted.optim.base_lr * smaller / 256:.3g} (base_lr * global_batch / 256); "
        "--global-batch chooses another"
    ]


def _repeats(recipe: Recipe, rows: int) -> str:
    return f"global_batch={recipe.global_batch} is more than the {rows:,} images, so that updates repeat them"


def _updates(recipe: Recipe, rows: int) -> str:
    return f"{rows * recipe.data.repeats / recipe.global_batch:.3g}"


def _smaller(recipe: AnyRecipe, rows: int, processes: int) -> AnyRecipe | None:
    """Return the recipe with the power of two (times `repeats`) nearest to ten updates an epoch that can be run."""
    repeats = recipe.data.repeats
    aim = min(max(rows // UPDATES_AN_EPOCH, SMALLEST_BATCH), rows)
    for power in range(int(math.log2(aim)), int(math.log2(rows)) + 1):
        fitted = replace(recipe, global_batch=2**power * repeats)
        if recipe.mixes_pairs and fitted.global_batch < 2 * recipe.data.repeat_augment:
            continue
        try:
            check(fitted)
            choose_micro_batch(fitted, processes)
        except ValueError:
            continue
        return fitted
    return None


def fit_intervals(recipe: AnyRecipe, total_steps: int, chosen: Chosen) -> tuple[AnyRecipe, list[str]]:
    """Log, save and evaluate a few times in a run that is shorter than the intervals of its preset.

    Args:
        recipe: with `log_every`, `save_every` and `eval_every`; 0 stays 0.
        total_steps: updates of the run.
        chosen: fields that are left alone.
    """
    changed: dict[str, int] = {}
    for field, times in (("log_every", 10), ("save_every", 2), ("eval_every", 4)):
        if getattr(recipe, field) > total_steps and is_default(field, chosen):
            changed[field] = -(-total_steps // times)
    if not changed:
        return recipe, []
    listed = ", ".join(f"{field}={getattr(recipe, field)} -> {value}" for field, value in changed.items())
    return replace(recipe, **changed), [
        f"intervals longer than the {total_steps} updates of this run: using {listed} "
        f"({', '.join('--' + field.replace('_', '-') for field in changed)})"
    ]


def warn_of_few_updates(recipe: Recipe, rows: int, total_steps: int, steps_per_epoch: float) -> list[str]:
    """Say of a run of very few updates what to type for more of them; nothing where `max_steps` asks for so few."""
    if recipe.max_steps is not None or total_steps >= HARDLY_ANY:
        return []
    ways = [f"--epochs {math.ceil(5 * HARDLY_ANY / steps_per_epoch)} makes {5 * HARDLY_ANY}"]
    aim = min(max(rows // UPDATES_AN_EPOCH, SMALLEST_BATCH), rows)
    if (smaller := 2 ** int(math.log2(aim)) * recipe.data.repeats) < recipe.global_batch:
        times = recipe.global_batch / smaller
        ways.append(f"--global-batch {smaller} {'doubles them' if times == 2 else f'makes {times:.3g} times as many'}")
    many = f"{total_steps} update{'s' if total_steps > 1 else ''} in all"
    return [f"warning: {many} {'are' if total_steps > 1 else 'is'} hardly any training; {', and '.join(ways)}"]
