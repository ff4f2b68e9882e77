"""What was measured of the exported weights, and of no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_mae.cards.facts import Fact, maybe
from hf_mae.cards.private import last_part, published
from hf_mae.cards.records import Records
from hf_mae.recipes.crop import EvalCrop, read_crop
from hf_mae.recipes.fields import choose

METRICS = {
    "top1": ("top-1 accuracy", "accuracy", "percent"),
    "top5": ("top-5 accuracy", "top-5-accuracy", "percent"),
    "real_top1": ("top-1 accuracy, ReaL labels", "accuracy", "percent"),
    "mean_per_class_accuracy": ("mean accuracy of the classes", "mean-per-class-accuracy", "percent"),
    "mce": ("mean corruption error", "mce", "short"),
    "eval_loss": ("cross-entropy", "loss", "short"),
    "ece": ("expected calibration error", "ece", "percent"),
    "knn_accuracy": ("nearest neighbours on frozen features", "accuracy", "percent"),
    "probe_accuracy": ("linear probe on frozen features, as a monitor", "accuracy", "percent"),
    "knn_top1": ("nearest neighbours on frozen features", "accuracy", "percent"),
    "logistic_top1": ("logistic regression on frozen features", "accuracy", "percent"),
    "rankme": ("RankMe (effective rank of the features)", "rankme", "short"),
    "loss": ("training loss, last logged", "loss", "short"),
}
"""By name in the records: in words, as the Hub's metric, and how it is printed."""

UNKNOWN_SPLIT = "split not recorded"


@dataclass(frozen=True)
class Result:
    """One measured number.

    Attributes:
        name: in the records.
        label: in words.
        metric: of the Hub.
        value: the number.
        data: name of the data set, without a path.
        dataset_id: its Hub id, if it is there.
        revision: of the data set, if known.
        split: which part of it.
        images: how many.
        weights: which of the run's.
        transform: size and crop of the test pictures, where an evaluation recorded its own.
        as_exported: these are the size and crop that the export prepares pictures with.
        of_run: the run measured it, not an evaluation after training.
    """

    name: str
    label: str
    metric: str
    value: Fact
    data: str
    dataset_id: str | None
    revision: str | None
    split: str
    images: Fact | None
    weights: str
    transform: str = ""
    as_exported: bool = True
    of_run: bool = True


def comparable(results: Sequence[Result]) -> list[Result]:
    """Return what may stand for the model elsewhere: measured as exported, one for each data set, part and metric."""
    found: dict[tuple[str, str, str], Result] = {}
    for one in results:
        if one.as_exported and one.split != UNKNOWN_SPLIT:
            found.setdefault((one.dataset_id or one.data, one.split, one.name), one)
    return list(found.values())


def measured(records: Records, data: str, dataset_id: str | None) -> list[Result]:
    """Return every number that is on record for the exported weights.

    Args:
        records: of the export.
        data: name of the data set that the run measured on.
        dataset_id: its Hub id, if it has one.
    """
    found: list[Result] = []
    if records.recipe:
        numbers, images = _of_run(records)
        revision = (records.starts[-1]["data"].get("revision") if records.starts else None) if dataset_id else None
        for value in numbers:
            name = value.source.rsplit(" ", 1)[-1]
            # RankMe is of the bank of the nearest neighbours, see hf_mae.evaluation.features.
            split = "training images" if name in ("loss", "rankme") else split_words(records)
            count = None if name in ("loss", "rankme") else images or _monitored(records)
            found.append(_result(name, value, data, dataset_id, revision, split, count, weights_words(records)))
    for extra in records.evaluated:
        file = f"evaluation {extra.name}/summary.json"
        own = extra.summary.get("data") == records.recipe.get("data", {}).get("path")
        where = data if own else last_part(str(extra.summary.get("data", ""))) or extra.name
        split = last_part(str(extra.summary.get("split") or extra.summary.get("splits") or UNKNOWN_SPLIT))
        count = maybe(extra.summary, "numbers.examples", file, "count")
        for name in METRICS:
            value = maybe(extra.summary, f"numbers.{name}", file, METRICS[name][2])  # type: ignore[arg-type]
            if value is not None:
                made = _result(
                    name, value, where, dataset_id if own else None, None, split, count, weights_words(records)
                )
                shown, same = transform_words(extra.summary), _is_as_exported(extra.summary, records.preprocessing)
                found.append(replace(made, transform=shown, as_exported=same, of_run=False))
    return found


def transform_words(summary: Mapping[str, Any]) -> str:
    """Return the size and crop of an evaluation's pictures in words."""
    size, crop = summary.get("image_size"), summary.get("crop_pct")
    squashed = ", whatever the aspect" if summary.get("crop_mode") == "squash" else ""
    words = "x".join(map(str, size)) if size else "size not recorded"
    return words + (f", crop {crop:g}{squashed}" if crop is not None else ", crop not recorded")


def _is_as_exported(summary: Mapping[str, Any], prepared: Mapping[str, Any]) -> bool:
    """Return whether an evaluation showed pictures as the export prepares them."""
    size, crop = summary.get("image_size"), summary.get("crop_pct")
    if not size or crop is None or not prepared:
        return False
    try:
        shown = EvalCrop(tuple(size), crop, summary.get("crop_mode") or "center")  # there was no other before
        if "input_size" in prepared:  # of timm
            shape = tuple(prepared.get("test_input_size") or prepared["input_size"])[1:]
            pct = prepared.get("test_crop_pct") or prepared["crop_pct"]
            stated = EvalCrop(shape, pct, prepared.get("crop_mode") or "center")
        else:
            stated = read_crop(prepared, shown.size)
    except ValueError:
        return False
    return (shown.size, shown.target, shown.mode) == (stated.size, stated.target, stated.mode)


def _monitored(records: Records) -> Fact | None:
    """Return on how many images the monitors of pretraining were measured, at most."""
    most = maybe(records.recipe, "evals.test_examples", "recipe.json", "count")
    return None if most is None else Fact(f"at most {most}", most.source)


def _result(
    name: str,
    value: Fact,
    data: str,
    dataset_id: str | None,
    revision: str | None,
    split: str,
    images: Fact | None,
    weights: str,
) -> Result:
    label, metric, _ = METRICS[name]
    return Result(name, label, metric, value, data, dataset_id, revision, split, images, weights)


def _of_run(records: Records) -> tuple[list[Fact], Fact | None]:
    """Return the numbers that the run measured of the exported weights, and on how many images."""
    weights, step = records.source["weights"], records.source["step"]
    block = "ema" if weights == "average" else "weights"
    if weights == "best" and records.best:
        block = "ema" if str(records.best["metric"]).startswith("ema_") else "weights"
    prefix = "ema_" if block == "ema" else ""
    images = maybe(records.evaluation, f"{block}.examples", "evaluation.json", "count")
    whole = records.evaluation.get(block) or {}
    if records.evaluation.get("step") == step and whole:
        return _numbers(whole | {"eval_loss": whole.get("loss"), "loss": None}, f"evaluation.json: {block}", ""), images
    if weights == "best" and records.best:
        return _numbers(records.best["numbers"], "best/best.json: numbers", prefix), images
    row: dict[str, Any] = {}
    for other in records.rows:
        if other["step"] == step:
            row |= other
    frozen = {k: v for k, v in (records.rows[0] if records.rows else {}).items() if k in ("knn_top1", "logistic_top1")}
    return _numbers(frozen | row, f"metrics.jsonl: step {step}", prefix), images


def _numbers(numbers: Mapping[str, Any], where: str, prefix: str) -> list[Fact]:
    return [
        Fact(numbers[prefix + name], f"{where}, {name}", style)  # type: ignore[arg-type]
        for name, (_, _, style) in METRICS.items()
        if numbers.get(prefix + name) is not None
    ]


def split_words(records: Records) -> str:
    """Return which images the run measured on, as far as its records say."""
    evals, data = records.recipe.get("evals", {}), records.recipe.get("data", {})
    recorded = records.starts[-1].get("tested_on") if records.starts else None
    split = recorded or evals.get("split") or "held-out split (validation, else test)"
    if data.get("splits"):
        rule = published(data["splits"], field="splits")
        return f"{split}, part of {rule}"
    return str(split)


def weights_words(records: Records) -> str:
    """Return which of a run's weights were exported, in words."""
    source = records.source
    if not records.recipe:
        return "as converted" if records.conversion else "as exported"
    step = (
        ""
        if source.get("step") is None
        else f", after {Fact(source['step'], 'export.json: source.step', 'count')} updates"
    )
    words = {"last": "last", "best": "best on record", "average": "moving average"}
    return choose("source.weights", source["weights"], words) + step


def evaluations_before_best(records: Records) -> Fact | None:
    """Return among how many evaluations the best weights were chosen, None for other weights."""
    if records.source["weights"] != "best" or not records.best:
        return None
    name = str(records.best["metric"])
    count = sum(1 for row in records.rows if row.get(name) is not None)
    return Fact(count, f"metrics.jsonl: rows with {name}", "count") if count > 1 else None
