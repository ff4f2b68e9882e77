"""Top-1 of trained models at several test resolutions, as curves: the form of Fig. 4 of "ResNet strikes back".

A point is one evaluation. It is written down as soon as it is made, so that the same command goes on where it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_mae.evaluate import default_out, evaluate, load_classifier
from hf_mae.evaluation.charts import draw_resolution
from hf_mae.recipes.evaluation import Evaluation
from hf_mae.run import model_folder
from hf_mae.training.checkpoint import write_atomic
from hf_mae.training.distributed import agree, gather_objects, make_accelerator
from hf_mae.training.monitors import Printer
from hf_mae.training.run_folder import check_names_are_free

DECIDING = ("name", "classes", "labels", "crop_pct", "data", "engine")
"""Fields of an evaluation that decide its numbers."""


def sweep_resolution(
    models: Sequence[str],
    recipe: Evaluation,
    *,
    sizes: Sequence[int],
    out: str | Path = "",
    say: Printer | None = None,
) -> dict[str, Any]:
    """Evaluate each model at each test size. A collective: every process calls it.

    Args:
        models: what `Evaluation.model` may be.
        recipe: all but `model`, `image_size` and `out`. Without `crop_pct` each model has its own.
        sizes: heights of square test pictures, in pixels.
        out: folder of the results; empty is runs/resolution-PRESET.
        say: prints a line; None prints to standard error, on the main process.

    Returns:
        What is written to `resolution.json`: `{"metric", "asked", "models": {NAME: {"model", "train_size", "points":
        {SIZE: fraction}}}}`. `table.md` and `resolution.png` are written beside it; train sizes are marked in both.

    Raises:
        ValueError: no models or sizes, models or an evaluation that do not fit, or a folder of another evaluation; for
            all points before the first, where models and sizes show it.
    """
    if sizes and min(sizes) < 1:
        raise ValueError(f"sizes={tuple(sizes)} must be numbers of pixels, at least 1; leave {min(sizes)} out")
    if not models or not sizes or len({*sizes}) < len(sizes) or len({*models}) < len(models):
        raise ValueError(
            f"models={tuple(models)} and sizes={tuple(sizes)}: name at least one of each, none twice, such as "
            "--models runs/a3 runs/a2 --sizes 160 192 224 256"
        )
    if recipe.corruptions:
        raise ValueError(f"{recipe.name} has no top-1 to draw, but errors of corruptions; choose another preset")
    out = Path(out or f"runs/resolution-{recipe.name}")
    names = _names(models, recipe)
    accelerator = make_accelerator(recipe.engine)
    say = say or Printer(accelerator.is_main_process)
    metric = "real_top1" if recipe.labels == "real" else "top1"
    asked = json.loads(json.dumps({key: value for key, value in asdict(recipe).items() if key in DECIDING}))
    found: dict[str, Any] = {}
    error = None
    if accelerator.is_main_process:
        try:
            found = _read(out / "resolution.json", asked, names)
        except (ValueError, OSError) as caught:
            error = caught
    agree(error, accelerator, f"reading {out}")
    found = gather_objects(found, accelerator)[0]
    wanted = [(model, size) for model in models for size in sizes]
    missing = [
        (model, size) for model, size in wanted if str(size) not in found.get(names[model], {}).get("points", {})
    ]
    _check_sizes(missing, say)
    for number, (model, size) in enumerate(wanted, 1):
        name, error = names[model], None
        if (model, size) not in missing:
            say(f"resolution: {number} of {len(wanted)}: {name} at {size} was measured before")
            continue
        say(f"resolution: {number} of {len(wanted)}: {name} at {size}")
        folder = out / name / str(size)
        numbers = evaluate(replace(recipe, model=model, image_size=size, out=str(folder), pictures=False))
        if accelerator.is_main_process:
            try:
                summary = json.loads((folder / "summary.json").read_text())
                entry = found.setdefault(name, {"model": _place(model), "train_size": summary["train_size"]})
                points = entry.setdefault("points", {}) | {str(size): numbers[metric]}
                entry["points"] = {key: points[key] for key in sorted(points, key=int)}
                _write(out, {"metric": metric, "asked": asked, "models": found})
            except OSError as caught:
                error = caught
        agree(error, accelerator, f"writing to {out}")
    found = gather_objects(found, accelerator)[0]
    say(table(found, metric) + f"in {out}: resolution.png, table.md, resolution.json")
    return {"metric": metric, "asked": asked, "models": found}


def table(models: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """Return a Markdown table, a row for each model and a column for each size; the train size is in bold."""
    sizes = sorted({int(size) for entry in models.values() for size in entry["points"]})
    lines = [f"| {metric} in % | trained at | {' | '.join(map(str, sizes))} |", "|---" * (2 + len(sizes)) + "|"]
    for name, entry in models.items():
        cells = []
        for size in sizes:
            value = entry["points"].get(str(size))
            told = "not measured" if value is None else f"{100 * value:.2f}"
            cells.append(f"**{told}**" if [size, size] == entry["train_size"] and value is not None else told)
        height, width = entry["train_size"]
        lines.append(f"| {name} | {height if height == width else f'{height} x {width}'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _names(models: Sequence[str], recipe: Evaluation) -> dict[str, str]:
    """Return a short name for each model: that of its evaluation's folder."""
    names = {m: default_out(replace(recipe, model=m)).name.removeprefix(f"evaluate-{recipe.name}-") for m in models}
    if len({*names.values()}) < len(names):
        raise ValueError(
            f"models {', '.join(models)} have one name ({', '.join(sorted({*names.values()}))}); rename a folder, or "
            "give each a sweep of its own"
        )
    return names


def _check_sizes(points: Sequence[tuple[str, int]], say: Printer) -> None:
    """Refuse a model that cannot be loaded, or does not take a size, before any is measured at any."""
    for model, size in points:
        try:
            load_classifier(model, size, say)
        except ValueError as error:
            raise ValueError(f"{model} at {size} pixels (--models, --sizes): {error}") from error


def _place(model: str) -> str:
    """Return where a model is: of a run, which goes on, its newest checkpoint."""
    return str(model_folder(model, field="model")) if Path(model).expanduser().exists() else model


def _read(path: Path, asked: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return what was measured before, of models that are still the same."""
    check_names_are_free(path.parent, path.name, ("table.md", "resolution.png"))
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    if changed := [key for key in asked if before["asked"].get(key) != asked[key]]:
        raise ValueError(
            f"out={path.parent} holds curves of another evaluation ({', '.join(changed)} changed); choose another --out"
        )
    places = {name: _place(model) for model, name in names.items()}
    return {
        name: entry for name, entry in before["models"].items() if places.get(name, entry["model"]) == entry["model"]
    }


def _write(out: Path, content: Mapping[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "resolution.json", json.dumps(content, indent=2) + "\n")
    write_atomic(out / "table.md", table(content["models"], content["metric"]))
    lines = {
        name: [(int(size), value) for size, value in entry["points"].items()]
        for name, entry in content["models"].items()
    }
    trained = {name: entry["train_size"][0] for name, entry in content["models"].items()}
    draw_resolution(lines, out / "resolution.png", trained=trained, name=content["metric"])
