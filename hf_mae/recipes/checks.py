"""Rules that every recipe keeps, and how its global batch is divided: checked before anything is opened or made."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from hf_mae.recipes.base import Recipe, Rule, flat
from hf_mae.recipes.fields import unknown

_NOT_YET = ("pca", "token")  # of the paper's Table 1d

# NaN fails every comparison, so it is refused as well.
_RULES: tuple[Rule, ...] = (
    ("seed", "must lie in 0 .. 4294967295", lambda v: 0 <= v < 2**32),
    ("epochs", "must be above 0 and finite", lambda v: 0 < v < float("inf")),
    ("max_steps", "must be at least 1; leave it out to train for `epochs`", lambda v: v is None or v >= 1),
    ("global_batch", "must be at least 1", lambda v: v >= 1),
    ("num_workers", "must be at least 0", lambda v: v >= 0),
    ("log_every", "must be at least 0; 0 logs only at the end", lambda v: v >= 0),
    ("save_every", "must be at least 0; 0 saves only at the end", lambda v: v >= 0),
    ("eval_every", "must be at least 0; 0 evaluates only at start and end", lambda v: v >= 0),
    ("data.lanes", "must be at least 1; leave it out for the default", lambda v: v is None or v >= 1),
    ("data.window_rows", "must be at least 1", lambda v: v >= 1),
    ("data.window_bytes", "must be at least 1", lambda v: v >= 1),
    ("data.max_bad_fraction", "must lie in 0 .. 1", lambda v: 0 <= v <= 1),
    ("data.repeats", "must be at least 1", lambda v: v >= 1),
    ("data.repeat_augment", "must be at least 1; 1 is off", lambda v: v >= 1),
    ("data.max_pixels", "must be at least 1", lambda v: v >= 1),
    ("model.num_channels", "must be 3 (read as RGB) or 1 (read as grey)", lambda v: v in (None, 1, 3)),
    ("model.mask_ratio", "must lie between 0 and 1: without a removed patch there is no loss", lambda v: 0 < v < 1),
    ("model.target", "is not available yet; use pixel, the only one in this version", lambda v: v not in _NOT_YET),
    ("augment.scale", "must be two areas with 0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1),
    ("augment.ratio", "must be two aspects with 0 < low <= high", lambda v: 0 < v[0] <= v[1] < float("inf")),
    ("augment.color_jitter", "must lie in 0 .. 1", lambda v: 0 <= v <= 1),
    ("augment.erase_prob", "must lie in 0 .. 1", lambda v: 0 <= v <= 1),
    ("augment.rotate", "must be angles above 0 and up to 180 degrees", lambda v: all(0 < a <= 180 for a in v)),
    ("augment.std", "must be positive numbers", lambda v: all(0 < x < float("inf") for x in v)),
    ("optim.base_lr", "must be above 0 and finite", lambda v: 0 < v < float("inf")),
    ("optim.weight_decay", "must be at least 0 and finite", lambda v: 0 <= v < float("inf")),
    ("optim.betas", "must be two numbers in [0, 1)", lambda v: all(0 <= b < 1 for b in v)),
    ("optim.eps", "must be above 0", lambda v: 0 < v < float("inf")),
    ("optim.clip_grad", "must be above 0; leave it out for no clipping", lambda v: v is None or v > 0),
    ("optim.ema_decay", "must lie between 0 and 1; leave it out for no average", lambda v: v is None or 0 < v < 1),
    ("schedule.warmup_epochs", "must be at least 0", lambda v: v >= 0),
    ("schedule.min_lr", "must be at least 0", lambda v: v >= 0),
    ("schedule.warmup_lr", "must be at least 0", lambda v: v >= 0),
    ("schedule.gamma", "must lie in (0, 1]", lambda v: 0 < v <= 1),
    ("schedule.step_epochs", "must be above 0", lambda v: v > 0),
    ("evals.pictures", "must be at least 0", lambda v: v >= 0),
    ("evals.train_examples", "must be at least 1", lambda v: v >= 1),
    ("evals.test_examples", "must be at least 1", lambda v: v >= 1),
    ("evals.crop_pct", "must lie in (0, 1]; leave it out for the official rule", lambda v: v is None or 0 < v <= 1),
    ("engine.keep_checkpoints", "must be at least 1", lambda v: v >= 1),
)


def check(recipe: Recipe) -> None:
    """Refuse numbers that make no sense, before anything is opened or made.

    Raises:
        ValueError: the first field out of its range, with its value and the rule.
    """
    values = flat(recipe)
    for name, rule, holds in (*_RULES, *recipe.rules):
        if name in values and not holds(values[name]):
            raise ValueError(f"{name}={values[name]} {rule}")
    check_choices(recipe)
    warmup_epochs(recipe)
    lr = recipe.optim.base_lr * recipe.global_batch / 256
    if recipe.schedule.min_lr > lr:
        raise ValueError(
            f"schedule.min_lr={recipe.schedule.min_lr} is above the peak lr={lr:g} (base_lr * global_batch / 256); "
            "lower it, or raise --optim.base-lr"
        )
    if recipe.schedule.name != "exponential" and recipe.schedule.warmup_lr > lr:
        raise ValueError(
            f"schedule.warmup_lr={recipe.schedule.warmup_lr} is above the peak lr={lr:g} (base_lr * global_batch / 256)"
            "; lower it, or raise --optim.base-lr"
        )
    if recipe.global_batch % recipe.data.repeats:
        raise ValueError(
            f"global_batch={recipe.global_batch} is not a multiple of data.repeats={recipe.data.repeats}, the samples "
            "made of each image; choose a multiple"
        )
    if recipe.data.repeats > 1 and recipe.data.repeat_augment > 1:
        raise ValueError(
            f"data.repeats={recipe.data.repeats} and data.repeat_augment={recipe.data.repeat_augment} both make several"
            " samples of an image; set one of them to 1 (`repeats` decodes once, `repeat_augment` is DeiT's)"
        )
    if recipe.schedule.name == "exponential" and not recipe.schedule.warmup_lr > 0:
        raise ValueError(
            f"schedule.warmup_lr={recipe.schedule.warmup_lr} must be above 0 where schedule.name=exponential starts "
            "from it; add --schedule.warmup-lr 1e-7"
        )
    for name in ("mean", "std"):
        given, channels = values[f"augment.{name}"], values["model.num_channels"]
        if channels is not None and len(given) != channels:
            example = " ".join(["0.5"] * channels)
            raise ValueError(
                f"augment.{name}={given} has {len(given)} values but model.num_channels={channels}; "
                f"give one per channel, such as --augment.{name} {example}"
            )
    if recipe.evals.split is not None and recipe.evals.split == (recipe.data.split or "train"):
        raise ValueError(
            f"evals.split={recipe.evals.split} is the training split; testing on it measures memory, name another"
        )


def warmup_epochs(recipe: Recipe) -> float:
    """Return the length of the warm-up in epochs.

    Raises:
        ValueError: it is not shorter than the run.
    """
    warmup = 0.0 if recipe.schedule.name == "exponential" else recipe.schedule.warmup_epochs  # a warm-up all along
    if not 0 <= warmup < recipe.epochs:
        raise ValueError(
            f"schedule.warmup_epochs={warmup:g} must be at least 0 and below epochs={recipe.epochs:g}; lower "
            "--schedule.warmup-epochs"
        )
    return warmup


def check_choices(group: Any, where: str = "") -> None:
    """Refuse values that a field's Literal type does not name, which Python itself would let pass.

    Args:
        group: a dataclass: a recipe, or one of its groups.
        where: what the names of its fields begin with.

    Raises:
        ValueError: a field has a value of no such name; lists those there are.
    """
    hints = get_type_hints(cast(type[Any], type(group)))
    for name, hint in hints.items():
        value = getattr(group, name)
        if is_dataclass(value):
            check_choices(value, f"{name}.")
            continue
        parts = (hint,) if get_origin(hint) is Literal else get_args(hint)
        choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
        if choices and isinstance(value, str | bool) and value not in choices:
            raise unknown(f"{where}{name}", value, choices)


def largest_divisor(number: int, limit: int, *, even: bool = False) -> int:
    """Return the largest (even) divisor of `number` that is at most `limit`; 0 if there is none."""
    step = 1 + even
    return max((d for d in range(step, min(number, limit) + 1, step) if number % d == 0), default=0)


def choose_micro_batch(recipe: Recipe, processes: int, *, measured: int | None = None) -> int:
    """Return the images per process and forward pass.

    Args:
        recipe: with the global batch and the wish.
        processes: that share the global batch.
        measured: what `auto` stands for, once it is known; until then it counts as not given.

    Raises:
        ValueError: the global batch does not divide evenly, or into micro-batches that are too small.
    """
    batch, micro, repeats = recipe.global_batch, recipe.micro_batch, recipe.data.repeats
    if batch < 1:
        raise ValueError(f"global_batch={batch} must be at least 1")
    if batch % processes:
        below = batch - batch % processes
        raise ValueError(
            f"global_batch={batch} is not divisible by {processes} processes; use "
            f"{' or '.join(str(b) for b in (below, below + processes) if b)}"
        )
    share = batch // processes
    if share % repeats:
        raise ValueError(
            f"global_batch={batch} gives each of {processes} processes {share} samples, not a multiple of "
            f"data.repeats={repeats}; use a multiple of {processes * repeats}"
        )
    even = recipe.mixes_pairs
    if even and share % 2:
        raise ValueError(
            f"global_batch={batch} gives each of {processes} process(es) {share} images, an odd number, and mixup and "
            f"cutmix mix pairs; use a multiple of {2 * processes}"
        )
    if micro == "auto" or micro is None:
        limit = measured if micro == "auto" and measured is not None else recipe.max_micro_batch
        micro = largest_divisor(share, max(limit, recipe.min_micro_batch, 1 + even), even=even)
    if micro < 1 or share % micro or (even and micro % 2):
        divisors = [d for d in range(1 + even, share + 1, 1 + even) if share % d == 0]
        nearest = sorted(divisors, key=lambda d: abs(math.log(d / max(micro, 1))))[:2]
        raise ValueError(
            f"micro_batch={micro} does not divide the {share} images each process takes of global_batch={batch}"
            f"{' into even parts, which mixup and cutmix need' if even else ''}; use "
            f"{' or '.join(map(str, sorted(nearest)))}"
        )
    if micro < recipe.min_micro_batch:
        step = 2 * processes * repeats
        below = batch - batch % step
        raise ValueError(
            f"global_batch={batch} gives each of {processes} process(es) {share} images, in micro-batches of {micro}; "
            f"batch normalisation takes statistics of at least {recipe.min_micro_batch}; use "
            f"{' or '.join(str(b) for b in (below, below + step) if b)}"
        )
    return micro
