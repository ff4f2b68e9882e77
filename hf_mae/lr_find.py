"""Which learning rate? One short training while it rises geometrically, its losses, and a suggestion.

Source: Smith 2017, "Cyclical Learning Rates", section 3.3 (the range test). The suggestion is where the smoothed loss
falls most steeply per decade of the learning rate, before it first rises: a loss that has blown up falls again, often
more steeply than ever before, and that says nothing of the rate. A falling rate, as the slides of the ReXNet birds had
it, is of no use either: its first updates are the largest, and what they break the later ones inherit.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_mae.classify import ClassifierTraining
from hf_mae.data.augment import check_augment
from hf_mae.evaluation.charts import draw_lr_find
from hf_mae.pretrain import MaskedPretraining
from hf_mae.recipes.base import HARMLESS, Recipe, Schedule, flat
from hf_mae.recipes.checks import check
from hf_mae.recipes.classification import ClassifierRecipe, LabelledRecipe, check_classifier
from hf_mae.recipes.fields import unknown
from hf_mae.recipes.supervised import SuperviseRecipe, check_supervise
from hf_mae.run import Training, run
from hf_mae.training.checkpoint import write_atomic
from hf_mae.training.distributed import agree, gather_objects, make_accelerator
from hf_mae.training.monitors import Printer, read_rows
from hf_mae.training.run_folder import check_names_are_free

RISE = 0.1
"""The curve ends where the smoothed loss is above the best one before it by this share of the fall until then ..."""
NOISE = 10.0
"""... and by so many times the usual distance of a loss from the smoothed one."""
ASCENDING = (1e-7, 1.0, 100)
"""Lowest rate, highest rate and updates where none are given."""
DESCENDING = (1e-5, 1e-2, 1000)
"""The same of a falling rate: the slides' `range_test(end_lr=1e-5, num_iter=1000)` of an optimizer at 1e-2."""
TOP = 0.1
"""The way down begins where the smoothed loss was last within this share of the fall from its top."""
RUN = "lr-find-run"
"""The folder of the run in the folder of the search."""
MIN_ROWS = 10
"""Losses that a suggestion is made from, at least."""


def lr_find(
    recipe: Recipe,
    *,
    low: float | None = None,
    high: float | None = None,
    steps: int | None = None,
    descending: bool = False,
    reuse: bool = False,
    train: Callable[[Any], Path] | None = None,
    say: Printer | None = None,
) -> dict[str, Any]:
    """Train with a learning rate that grows from `low` to `high`, and suggest one. A collective.

    The run is the recipe's own in all but schedule and length, and nothing is measured but the loss. It lies in
    OUT/lr-find-run (OUT is the recipe's, or runs/NAME-lr-find), always begins anew, and is removed in the end. A loss
    that is not finite ends it; what was found until then counts.

    Args:
        recipe: pretraining, classification or supervised training.
        low: lowest learning rate of an update; None is 1e-7, or 1e-5 where it falls.
        high: highest learning rate of an update; None is 1, or 1e-2 where it falls.
        steps: updates; None is 100, or 1000 where it falls.
        descending: from `high` to `low`, as in the slides of the ReXNet birds: drawn, but nothing is suggested.
        reuse: return what `lr_find.json` holds, if it was found with these settings and this recipe.
        train: trains the run and returns its folder; None is the training of the recipe without evaluations.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        What is written to `lr_find.json`: `rows` ([{"lr", "loss", "smoothed"}]), `suggestion` ({"lr", "base_lr"} or
        None), `why` (a sentence), `used` (rows before the loss rises) and what was asked for. The curve is drawn to
        `lr_find.png`.

    Raises:
        ValueError: rates or steps that make no curve, or as of the training.
        RuntimeError: the run was stopped by a signal.
    """
    usual = DESCENDING if descending else ASCENDING
    low, high = usual[0] if low is None else low, usual[1] if high is None else high
    steps = usual[2] if steps is None else steps
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low:g} and high={high:g} must be learning rates with 0 < low < high")
    if steps < MIN_ROWS:
        raise ValueError(f"steps={steps} are too few for a curve; use at least {MIN_ROWS}, better 100")
    out = Path(recipe.out or f"runs/{recipe.name}-lr-find")
    search = search_recipe(recipe, low=low, high=high, steps=steps, descending=descending, out=out / RUN)
    accelerator = make_accelerator(recipe.engine)
    say = say or Printer(accelerator.is_main_process)
    before, wrong = None, None
    if accelerator.is_main_process:
        try:
            check_names_are_free(out, "lr_find.json", ("lr_find.png",))
            check_names_are_free(out / RUN, "checkpoints", [p.name for p in sorted((out / RUN).glob("[!.]*"))])
            before = _found_before(out / "lr_find.json", search) if reuse else None
            shutil.rmtree(out / RUN, ignore_errors=True)
        except (ValueError, OSError) as caught:
            wrong = caught
    agree(wrong, accelerator, f"making {out}")
    before = gather_objects(before, accelerator)[0]
    if before is not None:
        say(f"lr-find: found before, see {out / 'lr_find.json'}: {before['why']}")
        return before
    first, last = (high, low) if descending else (low, high)
    say(f"lr-find: {steps} updates of {recipe.global_batch} images, lr from {first:g} to {last:g}")
    ended = f"all {steps} updates"
    try:
        (train or _train)(search)
    except FloatingPointError as error:  # on all ranks, for they share the loss
        ended = str(error).split(";")[0]
    found: dict[str, Any] = {}
    error = None
    if accelerator.is_main_process:
        try:
            found = _read(search, low=low, high=high, descending=descending) | {"ended": ended}
            write_atomic(out / "lr_find.json", json.dumps(found, indent=2) + "\n")
            if found["rows"]:
                lr = found["suggestion"] and found["suggestion"]["lr"]
                draw_lr_find(
                    found["rows"], out / "lr_find.png", suggestion=lr, used=found["used"],
                    title=f"{recipe.name}: {len(found['rows'])} updates of {recipe.global_batch}",
                )  # fmt: skip
            shutil.rmtree(out / RUN, ignore_errors=True)
        except (RuntimeError, OSError) as caught:
            error = caught
    agree(error, accelerator, f"writing the curve to {out}")
    found = gather_objects(found, accelerator)[0]
    say(f"lr-find: {found['why']}")
    if found["suggestion"]:
        say(f"next: --optim.base-lr {found['suggestion']['base_lr']:.3g} (lr / {recipe.global_batch} * 256)")
    say(f"in {out}: lr_find.png, lr_find.json")
    return found


def search_recipe(recipe: Recipe, *, low: float, high: float, steps: int, descending: bool, out: Path) -> Recipe:
    """Return the run of a search: the recipe with a geometric lr, so many updates, and nothing to evaluate."""
    first, last = (high, low) if descending else (low, high)
    evals: Any = replace(recipe.evals, at_start=False, knn=False)
    if isinstance(recipe, LabelledRecipe):
        evals = replace(evals, logistic=False, pictures=False, patience=None, best="top1")
    else:
        evals = replace(evals, rankme=False, probe=False, pictures=0)
    return replace(
        recipe,
        out=str(out),
        max_steps=steps,
        log_every=1,
        save_every=0,
        eval_every=0,
        resume="never",
        optim=replace(recipe.optim, base_lr=last * 256 / recipe.global_batch, ema_decay=None),
        schedule=Schedule(name="exponential", warmup_epochs=0, warmup_lr=first, min_lr=0.0),
        evals=evals,
        engine=replace(recipe.engine, track="none"),
    )


def suggest(lrs: Sequence[float], losses: Sequence[float]) -> tuple[list[float], int, int | None]:
    """Return the smoothed losses, how many of them count, and where they fall most steeply.

    Args:
        lrs: growing by one factor from each to the next.
        losses: of the updates with them.

    Returns:
        The smoothed losses; the number of them before they first rise clearly above their best (`RISE`, `NOISE`); the
        index of the steepest descent among these, None where the loss falls nowhere or there are fewer than `MIN_ROWS`.
    """
    half = max(1, len(losses) // 20)
    smoothed = smooth(losses, half)
    used = _before_the_rise(losses, smoothed)
    if used < MIN_ROWS:
        return smoothed, used, None
    # Only the way down to the lowest loss counts, from where it last was near the top: before that is noise, and its
    # waves can be steeper.
    lowest = min(range(used), key=lambda i: smoothed[i])
    highest = max(smoothed[: lowest + 1])
    near_the_top = highest - TOP * (highest - smoothed[lowest])
    start = max(i for i in range(lowest + 1) if smoothed[i] >= near_the_top)
    # Central differences; the lr grows by a factor, so that neighbours are equally far apart on its axis. Both ends of
    # the run are left out: their means lean to one side.
    way = range(max(start, half), min(lowest, used - 1, len(smoothed) - half))
    slopes = {i: smoothed[i + 1] - smoothed[i - 1] for i in way}
    steepest = min(slopes, key=lambda i: slopes[i], default=None)
    return smoothed, used, steepest if steepest is not None and slopes[steepest] < 0 else None


def _before_the_rise(losses: Sequence[float], smoothed: Sequence[float]) -> int:
    """Return how many of the smoothed losses come before the first that is clearly above the best one so far.

    A share of the fall alone would end a curve in the noise of its flat beginning, noise alone in the waves at its
    bottom.
    """
    if not losses:
        return 0
    noise = statistics.median(abs(loss - mean) for loss, mean in zip(losses, smoothed, strict=True))
    best = smoothed[0]
    for i, value in enumerate(smoothed):
        if value > best + max(RISE * (smoothed[0] - best), NOISE * noise):
            return i
        best = min(best, value)
    return len(smoothed)


def smooth(values: Sequence[float], half: int) -> list[float]:
    """Return means over neighbours with weights that fall linearly to 0 at a distance of `half` + 1.

    Centred: an average of the past, as is usual here, would move every feature of the curve to a larger lr.
    """
    means = []
    for i in range(len(values)):
        near = range(max(0, i - half), min(len(values), i + half + 1))
        weights = [half + 1 - abs(j - i) for j in near]
        means.append(sum(w * values[j] for w, j in zip(weights, near, strict=True)) / sum(weights))
    return means


def _read(search: Recipe, *, low: float, high: float, descending: bool) -> dict[str, Any]:
    folder = Path(search.out)
    if (folder / "stopped_by_signal").exists():
        raise RuntimeError("the search was stopped by a signal; run the same command again, it begins anew")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get("loss") is not None]
    lrs, losses = [row["lr"] for row in rows], [row["loss"] for row in rows]
    smoothed, used, steepest = suggest(lrs, losses)
    used = len(rows) if descending else used
    suggestion = None
    if descending:
        why = (
            "no suggestion: under a falling lr every loss is the work of the larger rates before it; search ascending, "
            "which is the default"
        )
    elif steepest is not None:
        lr = lrs[steepest]
        suggestion = {"lr": lr, "base_lr": lr * 256 / search.global_batch}
        lowest = lrs[min(range(used), key=lambda i: smoothed[i])]
        why = (
            f"the smoothed loss falls most steeply at lr {lr:.3g} (update {steepest + 1} of {len(rows)}), "
            f"and is lowest at {lowest:.3g}"
        )
    elif used < MIN_ROWS:
        why = (
            f"no suggestion: only {used} losses came before they rose or the run ended, and {MIN_ROWS} are needed; "
            f"lower --low={low:g}, or take more --steps"
        )
    else:
        why = f"no suggestion: the loss falls nowhere between lr {low:g} and {high:g}; take more --steps"
    return {
        "recipe": search.name,
        "low": low,
        "high": high,
        "steps": search.max_steps,
        "descending": descending,
        "global_batch": search.global_batch,
        "suggestion": suggestion,
        "why": why,
        "used": used,
        "settings": _settings(search),
        "rows": [
            {"lr": lr, "loss": loss, "smoothed": mean} for lr, loss, mean in zip(lrs, losses, smoothed, strict=True)
        ],
    }


def _settings(search: Recipe) -> dict[str, Any]:
    """Return the fields of the run of a search that decide what it finds: rates, steps and direction among them."""
    deciding = {name: value for name, value in flat(search).items() if name not in HARMLESS or name == "data.path"}
    return json.loads(json.dumps(deciding))  # tuples as lists, as they are read again


def _found_before(path: Path, search: Recipe) -> dict[str, Any] | None:
    """Return what an earlier search found, if its settings are those of this one."""
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found.get("settings") == _settings(search) else None


def _train(recipe: Recipe) -> Path:
    """Run the training of this kind of recipe without evaluations."""
    kind: type[Training[Any]] = MaskedPretraining
    if isinstance(recipe, SuperviseRecipe):
        from hf_mae.supervise import SupervisedTraining  # timm takes seconds to import

        check_supervise(recipe)
        kind = SupervisedTraining
    elif isinstance(recipe, ClassifierRecipe):
        check_classifier(recipe)
        kind = ClassifierTraining
    elif isinstance(recipe, LabelledRecipe):
        raise unknown("recipe", type(recipe).__name__, ("Recipe", "ClassifierRecipe", "SuperviseRecipe"))
    else:
        check(recipe)
    check_augment(recipe.augment)
    return run(_unmeasured(kind)(recipe))


def _unmeasured(kind: type[Training[Any]]) -> type[Training[Any]]:
    """Return the training without evaluations: the last weights of a search are ruined, and so is what they say."""

    class Unmeasured(kind):
        def evaluators(self, out: Path, inner: Any, average: Any, accelerator: Any, say: Any) -> list[Any]:
            super().evaluators(out, inner, average, accelerator, say)  # some training keeps what it encodes there
            return []

        def judge(self, out: Path, task: Any, average: Any, accelerator: Any) -> None:
            return None

        def baseline_loss(self, inner: Any) -> None:
            return None  # a loss that blows up is what a search looks for

        def after_stop(self) -> str:
            return "a search always begins anew"

        def report(self, out: Path, rows: Any, verdict: str, say: Any) -> None:
            """Say nothing: the search does."""

    return Unmeasured
