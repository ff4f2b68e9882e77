"""Several runs of one recipe that differ in one thing, as a table with mean and deviation, and a plot.

Every run has a folder of its own and is resumed or passed over like any run, so a sweep that was killed goes on where
it was. The table is made anew after each run from the runs' own records. Every process of a launch takes part in all
runs; the main one writes and draws.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_mae.classify import classify
from hf_mae.data.augment import check_augment
from hf_mae.data.labels import check_labels
from hf_mae.data.sources import SPLIT_NAMES, list_splits, open_source
from hf_mae.evaluation.charts import draw_band, draw_over, draw_partial, draw_seeds, draw_variants
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.convert import load_official_checkpoint
from hf_mae.models.timm_models import check_architecture
from hf_mae.pretrain import pretrain
from hf_mae.recipes.base import Recipe
from hf_mae.recipes.checks import check
from hf_mae.recipes.classification import ClassifierRecipe, LabelledRecipe, check_classifier, check_labelled
from hf_mae.recipes.fields import as_text, check_field, unknown, with_field
from hf_mae.recipes.supervised import SuperviseRecipe, check_supervise
from hf_mae.recipes.transfer import probe_of
from hf_mae.run import model_folder
from hf_mae.training.checkpoint import write_atomic
from hf_mae.training.distributed import agree, gather_objects, make_accelerator
from hf_mae.training.monitors import Printer, read_rows
from hf_mae.training.run_folder import check_names_are_free

# He et al. 2022, Fig. 9 (ViT-L, top-1 % on ImageNet by trainable blocks; read from the plot's labels; 0.5 in the text).
FIG_9 = {0: 73.5, 0.5: 79.1, 1: 81.0, 2: 83.1, 4: 84.2, 6: 84.4, 12: 84.6, 18: 84.7, 24: 84.9}
FIG_9_ENCODER = (24, 1024)  # blocks and width of ViT-L
BLOCKS = (0, 0.5, 1, 2, 4, 6, 12, 18, 24)
"""Trainable blocks of Fig. 9; 0 is the linear probe."""


def sweep_partial(
    recipe: ClassifierRecipe,
    *,
    blocks: Sequence[float] = BLOCKS,
    seeds: int = 1,
    train: Callable[[Any], Path] | None = None,
    say: Printer | None = None,
) -> dict[str, Any]:
    """Fine-tune the last K blocks for several K, like Fig. 9 of the paper. A collective: every process calls it.

    The point at 0 is the linear probe, as in the paper: its own recipe (`hf_mae.recipes.transfer.probe_of`), not a head
    that is trained by the recipe of fine-tuning. The paper takes the best of 50, 100 and 200 epochs for each K; here
    all K have the recipe's.

    Args:
        recipe: all but `trainable_blocks`, `seed` and `out`, under which the runs are put.
        blocks: the values of K; those beyond the encoder's depth are left out.
        seeds: runs of each K, with the recipe's seed and those after it.
        train: `classify`, or what calls it; None is `classify`.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        What is written to `sweep.json`: `{"metric", "values": {K: {"mean", "sd", "min", "max", "runs"}}}`, with a
        `note` on what the runs of 0 are. `table.md` and `partial.png` are written beside it; a ViT-L is drawn with the
        numbers of the paper.

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
    probe = probe_of(recipe)
    runs = {
        (_number(k), seed): replace(
            recipe if k else probe,
            out=str(out / (f"blocks_{_number(k)}" if k else "probe") / f"seed_{seed}"),
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
        draw_partial(
            {recipe.name: sorted(points)}, out / "partial.png", depth=depth, reference=reference, zero="linear probe"
        )

    notes = {"0": f"linear probe: {probe.name}"}
    return _sweep(recipe.name, runs, out, "trainable blocks", draw, train or classify, say, notes)


def sweep_seeds(
    recipe: Recipe, *, n: int = 5, train: Callable[[Any], Path] | None = None, say: Printer | None = None
) -> dict[str, Any]:
    """Train one recipe with n seeds: the recipe's own and those after it. A collective: every process calls it.

    The form of the seed study of Wightman et al. 2021 ("ResNet strikes back", section 4.4): mean, deviation, minimum,
    maximum and a histogram of the last evaluations, and the band of all evaluations by epoch.

    Args:
        recipe: all but `seed` and `out`, under which the runs are put.
        n: how many seeds, at least 2.
        train: `pretrain`, `classify` or `supervise`; None is the one that fits the recipe.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        As `sweep_partial`, with one value, `all`. A histogram is drawn to `seeds.png`, the band to `band.png`.

    Raises:
        ValueError: fewer than two seeds, or as of the training; for all runs before the first, where the recipe, the
            splits or their labels show it.
    """
    if n < 2:
        raise ValueError(f"n={n} seeds have no deviation; use at least 2")
    out = Path(recipe.out or f"runs/{recipe.name}-seeds")
    runs = {
        ("all", seed): replace(recipe, out=str(out / f"seed_{seed}"), seed=seed)
        for seed in range(recipe.seed, recipe.seed + n)
    }

    def draw(values: Mapping[str, Mapping[str, Any]]) -> None:
        numbers = [run["last"] for run in values["all"]["runs"]]
        if len(numbers) > 1:
            draw_seeds(numbers, out / "seeds.png", metric_of(recipe))
            _draw_bands(values, out, metric_of(recipe))

    return _sweep(recipe.name, runs, out, "recipe", draw, train, say)


def sweep_over(
    recipe: Recipe,
    field: str,
    values: Sequence[Any],
    *,
    seeds: int = 1,
    train: Callable[[Any], Path] | None = None,
    say: Printer | None = None,
) -> dict[str, Any]:
    """Train one recipe with several values of one of its fields. A collective: every process calls it.

    Args:
        recipe: all but the field, `seed` and `out`, under which the runs are put.
        field: of the recipe, groups joined by a dot: `augment.label_smoothing`.
        values: see `hf_mae.recipes.fields.parse_values` for those of a command line.
        seeds: runs of each value, with the recipe's seed and those after it.
        train: `pretrain`, `classify` or `supervise`; None is the one that fits the recipe.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        As `sweep_partial`. Every run, means and deviations are drawn to `over.png`, evaluations by epoch to `band.png`.

    Raises:
        ValueError: an unknown field, no values, or two that are the same, or as of the training; for all runs before
            the first, where the recipe, the splits or their labels show it.
    """
    check_field(recipe, field)
    variants = {as_text(value): with_field(recipe, field, value) for value in values}
    if len(variants) < len(values):
        raise ValueError(f"{field}={', '.join(map(as_text, values))} names a value twice; name each once, and --seeds")
    out = Path(recipe.out or f"runs/{recipe.name}-over-{field.split('.')[-1].replace('_', '-')}")

    def draw(found: Mapping[str, Mapping[str, Any]]) -> None:
        draw_over(_last(found), out / "over.png", field=field, name=metric_of(recipe))
        _draw_bands(found, out, metric_of(recipe))

    return _sweep(recipe.name, _each_seed(variants, seeds, out), out, field, draw, train, say)


def sweep_variants(
    recipes: Mapping[str, Recipe],
    *,
    seeds: int = 1,
    out: str | Path,
    title: str = "",
    train: Callable[[Any], Path] | None = None,
    say: Printer | None = None,
) -> dict[str, Any]:
    """Train named recipes side by side. A collective: every process calls it.

    Args:
        recipes: by the name of the variant; their own `out` does not count. They may be of several kinds and data.
        seeds: runs of each, with its own seed and those after it.
        out: folder of the sweep; the runs lie in OUT/VARIANT/seed_N.
        title: over the picture; empty is the name of the folder.
        train: `pretrain`, `classify` or `supervise`; None is the one that fits each recipe.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        As `sweep_partial`. Means, deviations and runs are drawn to `variants.png`, evaluations by epoch to `band.png`.

    Raises:
        ValueError: no recipes, or recipes that are measured by different numbers, or as of the training; for all runs
            before the first, where the recipes, the splits or their labels show it.
    """
    out = Path(out)
    if not recipes:
        raise ValueError("recipes is empty: there is nothing to compare; name at least one")
    name = _metric_name(recipes.values())

    def draw(found: Mapping[str, Mapping[str, Any]]) -> None:
        draw_variants(_last(found), out / "variants.png", title=title or out.name, name=name)
        _draw_bands(found, out, name)

    return _sweep(title or out.name, _each_seed(recipes, seeds, out), out, "variant", draw, train, say)


def _each_seed(recipes: Mapping[str, Recipe], seeds: int, out: Path) -> dict[tuple[str, int], Recipe]:
    if seeds < 1:
        raise ValueError(f"seeds={seeds} makes no run; use at least 1")
    if not recipes:
        raise ValueError("no value is named, so that there is nothing to compare; name at least one")
    folders = {name: re.sub(r"[^\w.+=-]+", "-", name).strip("-.") or "empty" for name in recipes}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"{', '.join(recipes)}: two names make one folder; name them by letters and digits")
    return {
        (name, recipe.seed + i): replace(
            recipe, seed=recipe.seed + i, out=str(out / folders[name] / f"seed_{recipe.seed + i}")
        )
        for i in range(seeds)  # all variants once before any again: a sweep that is cut short compares what it has
        for name, recipe in recipes.items()
    }


def trainer_of(recipe: Recipe) -> Callable[..., Path]:
    """Return what trains a recipe of this kind: `pretrain`, `classify` or `supervise`."""
    if isinstance(recipe, SuperviseRecipe):
        from hf_mae.supervise import supervise  # timm takes seconds to import

        return supervise
    if isinstance(recipe, ClassifierRecipe):
        return classify
    if isinstance(recipe, LabelledRecipe):
        raise unknown("recipe", type(recipe).__name__, ("Recipe", "ClassifierRecipe", "SuperviseRecipe"))
    return pretrain


def metric_of(recipe: Recipe) -> str:
    """Return the number that a sweep compares: accuracy, of the averaged weights where they decide."""
    if isinstance(recipe, LabelledRecipe):
        return "ema_top1" if recipe.evals.best == "ema_top1" else "top1"
    return "knn_accuracy"


def _metric_name(recipes: Any) -> str:
    metrics = sorted({metric_of(recipe) for recipe in recipes})
    if "knn_accuracy" in metrics and len(metrics) > 1:
        raise ValueError(
            f"recipes are measured by {' and '.join(metrics)}, which do not compare; pretraining has a sweep of its own"
        )
    return metrics[0] if len(metrics) == 1 else "top1"  # each by the weights that decide in it


def _sweep(
    name: str,
    runs: Mapping[tuple[str, int], Recipe],
    out: Path,
    column: str,
    draw: Callable[[Mapping[str, Mapping[str, Any]]], None],
    train: Callable[[Any], Path] | None,
    say: Printer | None,
    notes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    recipes, notes = list(runs.values()), notes or {}
    for one in recipes:
        _check(one)
    different = {(type(one), one.data, one.evals): one for one in recipes}
    for one in different.values():
        try:
            _check_measured(one)
        except ValueError as error:
            if len(different) == 1:
                raise
            raise ValueError(f"run {Path(one.out).parent.name}: {error}") from error
    metric, accelerator = _metric_name(recipes), make_accelerator(recipes[0].engine)
    check_names_are_free(out, "sweep.json", ("table.md", "variants.png", "band.png"))
    say = say or Printer(accelerator.is_main_process)
    say(f"sweep: {name}: {', '.join(dict.fromkeys(key for key, _ in runs))} ({column}), {len(runs)} runs")
    found: dict[str, list[dict[str, Any]]] = {}
    summary: dict[str, Any] = {}
    for number, ((key, seed), one) in enumerate(runs.items(), 1):
        note = f" ({notes[key]})" if key in notes else ""
        say(f"sweep: run {number} of {len(runs)}: {column} {key}{note}, seed {seed}")
        folder, error = (train or trainer_of(one))(one), None
        if accelerator.is_main_process:
            try:
                result = {"seed": seed, "out": str(folder)} | read_result(folder, metric_of(one))
                found.setdefault(key, []).append(result)
                values = {
                    k: summarise(results) | ({"note": notes[k]} if k in notes else {}) for k, results in found.items()
                }
                summary = {"recipe": name, "metric": metric, "values": values}
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
    elif isinstance(recipe, SuperviseRecipe):
        check_supervise(recipe)
        check_architecture(recipe.model.architecture)
    elif isinstance(recipe, LabelledRecipe):
        check_labelled(recipe)
    else:
        check(recipe)
        MAEConfig(**asdict(recipe.model))  # refuses what no model can be made of
    if isinstance(recipe, ClassifierRecipe) and not recipe.init_from:
        MAEConfig(**{name: value for name, value in asdict(recipe.model).items() if value is not None})
    check_augment(recipe.augment)


def _check_measured(recipe: Recipe) -> None:
    """Refuse runs that would be trained to their end and then lack the number that is compared."""
    metric, split, classifies = metric_of(recipe), recipe.evals.split, isinstance(recipe, LabelledRecipe)
    if not classifies and not recipe.evals.knn:
        raise ValueError(f"evals.knn=False measures no {metric}, which a sweep compares; add --evals.knn")
    kinds = ("validation", "test") if classifies else ("test", "validation")
    usual = [name for kind in kinds for name in SPLIT_NAMES[kind] if name in list_splits(recipe.data)]
    train = open_source(recipe.data)
    data = replace(recipe.data, revision=train.revision)
    found = (open_source(data, split=s, field="evals.split") for s in (usual if split is None else [split]))
    test = next((source for source in found if source.where != train.where), None)
    if test is None:
        raise ValueError(
            f"{recipe.data.path}: no validation or test split was found, and a sweep compares {metric}; name one with "
            "--evals.split"
        )
    if classifies:
        check_labels(train, test, recipe.data)  # training does so too, but the last run may begin days later
        return
    for source in (train, test):
        if not source.has_labels:
            raise ValueError(
                f"{source.where}: has no labels, and a sweep compares {metric}; name labelled splits "
                "(--data.split, --evals.split), or --data.label-column"
            )


def _last(values: Mapping[str, Mapping[str, Any]]) -> dict[str, list[float]]:
    return {key: [float(run["last"]) for run in value["runs"]] for key, value in values.items()}


def _draw_bands(values: Mapping[str, Mapping[str, Any]], out: Path, metric: str) -> None:
    bands = {key: band(value["runs"]) for key, value in values.items()}
    if bands := {key: points for key, points in bands.items() if len(points) > 1}:
        draw_band(bands, out / "band.png", metric)


def band(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean, deviation, minimum and maximum over runs of each evaluation that all of them made.

    Args:
        results: of `read_result`.

    Returns:
        By step, [{"step", "epoch", "mean", "sd" (None of one run), "min", "max"}].
    """
    curves = [{point["step"]: point for point in result["curve"]} for result in results]
    common = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    points = []
    for step in common:
        values = [curve[step]["value"] for curve in curves]
        numbers = {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
        points.append(
            {"step": step, "epoch": curves[0][step]["epoch"]} | numbers | {"min": min(values), "max": max(values)}
        )
    return points


def read_result(folder: Path, metric: str) -> dict[str, Any]:
    """Return the last and the best value of a run's metric, and its curve: [{"step", "epoch", "value"}].

    Raises:
        RuntimeError: the run was stopped by a signal, or has not measured it.
    """
    if (folder / "stopped_by_signal").exists():
        raise RuntimeError(f"{folder} was stopped by a signal; the same command continues the sweep")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row.get(metric) is not None]
    if not rows:
        raise RuntimeError(f"{folder} has no {metric}: it needs a labelled split to test on (--evals.split)")
    best, last = max(rows, key=lambda row: row[metric]), rows[-1]
    curve = [{"step": row["step"], "epoch": row["epoch"], "value": row[metric]} for row in rows]
    numbers = {"last": last[metric], "best": best[metric], "best_step": best["step"], "steps": last["step"]}
    return numbers | {"curve": curve}


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
    """Return a Markdown table of a sweep; a `note` on a value stands behind it."""
    lines = [f"| {column} | runs | {metric} mean | sd | min | max |", "|---|---|---|---|---|---|"]
    for key, v in values.items():
        sd = "not measured" if v["sd"] is None or math.isnan(v["sd"]) else f"{v['sd']:.4f}"
        name = f"{key} ({v['note']})" if "note" in v else key
        lines.append(f"| {name} | {len(v['runs'])} | {v['mean']:.4f} | {sd} | {v['min']:.4f} | {v['max']:.4f} |")
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
