"""Several runs of one recipe that differ in one thing, as a table with mean and deviation, and a plot.

Every run has a folder of its own and is resumed or passed over like any run, so a sweep that was killed goes on where
it was. The table is made anew after each run from the runs' own records. Every process of a launch takes part in all
runs; the main one writes and draws.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_mae.classify import classify
from hf_mae.data.augment import check_augment
from hf_mae.data.sources import list_splits, open_source
from hf_mae.evaluation.charts import draw_partial, draw_seeds
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.convert import load_official_checkpoint
from hf_mae.pretrain import pretrain
from hf_mae.recipes.base import Recipe, check
from hf_mae.recipes.classification import ClassifierRecipe, check_classifier
from hf_mae.run import model_folder
from hf_mae.training.checkpoint import write_atomic
from hf_mae.training.distributed import agree, gather_objects, make_accelerator
from hf_mae.training.monitors import Printer, read_rows

# He et al. 2022, Fig. 9 (ViT-L, top-1 % on ImageNet by trainable blocks; read from the plot's labels; 0.5 in the text).
FIG_9 = {0: 73.5, 0.5: 79.1, 1: 81.0, 2: 83.1, 4: 84.2, 6: 84.4, 12: 84.6, 18: 84.7, 24: 84.9}
FIG_9_ENCODER = (24, 1024)  # blocks and width of ViT-L
BLOCKS = (0, 0.5, 1, 2, 4, 6, 12, 18, 24)
"""Trainable blocks of Fig. 9."""


def sweep_partial(
    recipe: ClassifierRecipe, *, blocks: Sequence[float] = BLOCKS, seeds: int = 1, say: Printer | None = None
) -> dict[str, Any]:
    """Fine-tune the last K blocks for several K, like Fig. 9 of the paper. A collective: every process calls it.

    Args:
        recipe: all but `trainable_blocks`, `seed` and `out`, under which the runs are put.
        blocks: the values of K; those beyond the encoder's depth are left out.
        seeds: runs of each K, with the recipe's seed and those after it.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        What is written to `sweep.json`: `{"metric", "values": {K: {"mean", "sd", "min", "max", "runs"}}}`. `table.md`
        and `partial.png` are written beside it; a ViT-L is drawn with the numbers of the paper.

    Raises:
        ValueError: as of `classify`; for all runs before the first, where the recipe or the splits show it.
    """
    if not recipe.init_from:
        raise ValueError("init_from is empty: a partial fine-tuning needs a pretrained encoder; add --init-from")
    if seeds < 1:
        raise ValueError(f"seeds={seeds} makes no run; use at least 1")
    for k in blocks:  # those beyond the depth too: 7.5 is no number of blocks of any encoder
        check_classifier(replace(recipe, trainable_blocks=float(k)))
    depth, width = _encoder_size(recipe)
    chosen = [k for k in blocks if k <= depth]
    if not chosen:
        raise ValueError(f"blocks={tuple(blocks)} are all beyond the {depth} blocks of the encoder; name smaller ones")
    out = Path(recipe.out or f"runs/{recipe.name}-partial")
    runs = {
        (_number(k), seed): replace(
            recipe,
            out=str(out / f"blocks_{_number(k)}" / f"seed_{seed}"),
            trainable_blocks=float(k),
            seed=seed,
        )
        for seed in range(recipe.seed, recipe.seed + seeds)
        for k in chosen
    }

    published = {"He et al. 2022, Fig. 9 (ViT-L, ImageNet-1k)": [(k, percent / 100) for k, percent in FIG_9.items()]}
    reference = published if (depth, width) == FIG_9_ENCODER else None

    def draw(values: Mapping[str, Mapping[str, Any]]) -> None:
        points = [(float(k), v["mean"], v["sd"]) for k, v in values.items()]
        draw_partial({recipe.name: sorted(points)}, out / "partial.png", depth=depth, reference=reference)

    return _sweep(recipe, runs, out, "trainable blocks", draw, classify, say)


def sweep_seeds(
    recipe: Recipe, *, n: int = 5, train: Callable[[Any], Path] | None = None, say: Printer | None = None
) -> dict[str, Any]:
    """Train one recipe with n seeds: the recipe's own and those after it. A collective: every process calls it.

    Args:
        recipe: all but `seed` and `out`, under which the runs are put.
        n: how many seeds, at least 2.
        train: `pretrain` or `classify`; None is the one that fits the recipe.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        As `sweep_partial`, with one value, `all`. A histogram is drawn to `seeds.png`.

    Raises:
        ValueError: fewer than two seeds, or as of `classify` and `pretrain`; for all runs before the first, where the
            recipe, the splits or their labels show it.
    """
    if n < 2:
        raise ValueError(f"n={n} seeds have no deviation; use at least 2")
    if train is None:
        train = classify if isinstance(recipe, ClassifierRecipe) else pretrain
    out = Path(recipe.out or f"runs/{recipe.name}-seeds")
    runs = {
        ("all", seed): replace(recipe, out=str(out / f"seed_{seed}"), seed=seed)
        for seed in range(recipe.seed, recipe.seed + n)
    }

    def draw(values: Mapping[str, Mapping[str, Any]]) -> None:
        numbers = [run["last"] for run in values["all"]["runs"]]
        if len(numbers) > 1:
            draw_seeds(numbers, out / "seeds.png", metric_of(recipe))

    return _sweep(recipe, runs, out, "recipe", draw, train, say)


def metric_of(recipe: Recipe) -> str:
    """Return the number that a sweep compares: accuracy, of the averaged weights where they decide."""
    if isinstance(recipe, ClassifierRecipe):
        return "ema_top1" if recipe.evals.best == "ema_top1" else "top1"
    return "knn_accuracy"


def _sweep(
    recipe: Recipe,
    runs: Mapping[tuple[str, int], Recipe],
    out: Path,
    column: str,
    draw: Callable[[Mapping[str, Mapping[str, Any]]], None],
    train: Callable[[Any], Path],
    say: Printer | None,
) -> dict[str, Any]:
    for one in runs.values():
        _check(one)
    _check_measured(recipe)
    metric, accelerator = metric_of(recipe), make_accelerator(recipe.engine)
    say = say or Printer(accelerator.is_main_process)
    found: dict[str, list[dict[str, Any]]] = {}
    summary: dict[str, Any] = {}
    for number, ((key, seed), one) in enumerate(runs.items(), 1):
        say(f"sweep: run {number} of {len(runs)}: {column} {key}, seed {seed}")
        folder, error = train(one), None
        if accelerator.is_main_process:
            try:
                found.setdefault(key, []).append({"seed": seed, "out": str(folder)} | read_result(folder, metric))
                values = {k: summarise(results) for k, results in found.items()}
                summary = {"recipe": recipe.name, "metric": metric, "values": values}
                write_atomic(out / "sweep.json", json.dumps(summary, indent=2) + "\n")
                write_atomic(out / "table.md", table(values, column, metric))
                draw(values)
            except (RuntimeError, OSError) as caught:
                error = caught
        agree(error, accelerator, f"writing the results of {folder}")
    summary = gather_objects(summary, accelerator)[0]
    say(table(summary["values"], column, metric) + f"in {out}")
    return summary


def _check(recipe: Recipe) -> None:
    if isinstance(recipe, ClassifierRecipe):
        check_classifier(recipe)
    else:
        check(recipe)
    check_augment(recipe.augment)


def _check_measured(recipe: Recipe) -> None:
    """Refuse runs that would be trained to their end and then lack the number that is compared."""
    metric, split, classifies = metric_of(recipe), recipe.evals.split, isinstance(recipe, ClassifierRecipe)
    if not classifies and not recipe.evals.knn:
        raise ValueError(f"evals.knn=False measures no {metric}, which a sweep compares; add --evals.knn")
    if split is None:
        split = next((s for s in ("test", "validation", "val") if s in list_splits(recipe.data)), None)
    if split is None:
        raise ValueError(
            f"{recipe.data.path}: no validation or test split was found, and a sweep compares {metric}; name one with "
            "--evals.split"
        )
    if classifies:
        return  # which refuses missing labels itself, before training
    for source in (open_source(recipe.data), open_source(recipe.data, split=split, field="evals.split")):
        if not source.has_labels:
            raise ValueError(
                f"{source.where}: has no labels, and a sweep compares {metric}; name labelled splits "
                "(--data.split, --evals.split), or --data.label-column"
            )


def read_result(folder: Path, metric: str) -> dict[str, Any]:
    """Return the last and the best value of a run's metric.

    Raises:
        RuntimeError: the run was stopped by a signal, or has not measured it.
    """
    if (folder / "stopped_by_signal").exists():
        raise RuntimeError(f"{folder} was stopped by a signal; the same command continues the sweep")
    values = [(row["step"], row[metric]) for row in read_rows(folder / "metrics.jsonl") if metric in row]
    if not values:
        raise RuntimeError(f"{folder} has no {metric}: it needs a labelled split to test on (--evals.split)")
    step, best = max(values, key=lambda v: v[1])
    return {"last": values[-1][1], "best": best, "best_step": step, "steps": values[-1][0]}


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean, sample standard deviation (NaN as None), minimum and maximum of the last values."""
    last = [float(r["last"]) for r in results]
    return {
        "mean": statistics.fmean(last),
        "sd": statistics.stdev(last) if len(last) > 1 else None,
        "min": min(last),
        "max": max(last),
        "runs": [dict(r) for r in results],
    }


def table(values: Mapping[str, Mapping[str, Any]], column: str, metric: str) -> str:
    """Return a Markdown table of a sweep."""
    lines = [f"| {column} | runs | {metric} mean | sd | min | max |", "|---|---|---|---|---|---|"]
    for key, v in values.items():
        sd = "not measured" if v["sd"] is None or math.isnan(v["sd"]) else f"{v['sd']:.4f}"
        lines.append(f"| {key} | {len(v['runs'])} | {v['mean']:.4f} | {sd} | {v['min']:.4f} | {v['max']:.4f} |")
    return "\n".join(lines) + "\n"


def _number(k: float) -> str:
    return f"{k:g}"


def _encoder_size(recipe: ClassifierRecipe) -> tuple[int, int]:
    """Return blocks and width of the encoder of `init_from`."""
    name = model_folder(recipe.init_from, field="init_from")
    if Path(name).is_file():
        weights = load_official_checkpoint(name).state_dict
        depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
        return depth, weights["cls_token"].shape[-1]
    config = MAEConfig.from_pretrained(name)
    return config.num_hidden_layers, config.hidden_size
