"""Evaluation of a classifier: one model, one labelled data set, every image once."""

from __future__ import annotations

import csv
import io
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils.hub import cached_file

from hf_mae.data.examples import check_pixels
from hf_mae.data.imagenet import (
    NUM_CLASSES,
    a_classes,
    classes_of,
    mce,
    r_classes,
    real_key,
    real_labels,
    severities,
)
from hf_mae.data.images import Range
from hf_mae.data.labels import align
from hf_mae.data.sources import Source, list_splits, open_source
from hf_mae.data.whole import BadRow, WholeSplit
from hf_mae.evaluation.classification import ClassificationQuality, NoExamplesError, chosen_on, evaluate_real
from hf_mae.evaluation.report import Drawing
from hf_mae.models.configuration_mae import height_width
from hf_mae.models.convert import load_official_checkpoint
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.timm_models import from_weights, is_timm_folder, load
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, Data, Size
from hf_mae.recipes.checks import check_choices
from hf_mae.recipes.crop import EvalCrop
from hf_mae.recipes.evaluation import Evaluation
from hf_mae.recipes.fields import choose
from hf_mae.resolve import model_folder, read_config
from hf_mae.run import load_preparation, progress
from hf_mae.training.checkpoint import write_atomic
from hf_mae.training.console import one_writer
from hf_mae.training.distributed import agree, describe_world, gather_objects, make_accelerator
from hf_mae.training.monitors import Printer
from hf_mae.training.tasks import Classification, TimmClassification

CSV_COLUMNS = ("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation")
"""Columns of timm's files of results."""


@one_writer()
def evaluate(recipe: Evaluation) -> dict[str, Any]:
    """Evaluate a classifier. A collective: every process calls it.

    Writes `evaluation.json` (all results, per class as well), `summary.json` (what is returned, and with which pictures
    it was measured) and pictures to `recipe.out`, or to `default_out`; and a row to `recipe.csv`.

    Returns:
        The numbers: `top1`, `top5`, `eval_loss`, `ece` and `examples`; `real_top1` for ReaL labels; `mce` and the error
        of each corruption for ImageNet-C.

    Raises:
        ValueError: something in the recipe, the model or the data has to be changed; the message says what.
    """
    if not recipe.model:
        raise ValueError("model is empty; name a classifier: --model RUN_FOLDER, a model folder or a Hub id")
    check_choices(recipe)
    if recipe.csv and recipe.corruptions:
        raise ValueError(f"csv={recipe.csv} has no column for the errors of corruptions; leave it out")
    accelerator = make_accelerator(recipe.engine)
    say = Printer(accelerator.is_main_process)
    trained = _trained_on(recipe)
    recipe = replace(recipe, data=_divided_as(recipe.data, trained, say))
    judged = load_classifier(recipe.model, recipe.image_size, say)
    judged.task.to(accelerator.device).eval()
    say(f"hf_mae: evaluating {judged.name} on {recipe.name}, {describe_world(accelerator)}")
    out = Path(recipe.out or default_out(recipe))
    error = None
    if accelerator.is_main_process:
        try:
            _check_out(out)
            out.mkdir(parents=True, exist_ok=True)
            if recipe.csv:
                read_csv(Path(recipe.csv))  # refuses another kind of file before the work is done
        except OSError as caught:
            error = ValueError(f"out={out} or csv={recipe.csv!r} cannot be used ({caught}); choose another")
        except ValueError as caught:
            error = caught
    agree(error, accelerator, f"making {out}")
    recipe = replace(recipe, data=_read_as_trained(recipe.data, judged, say))
    one = _One(recipe, judged, trained, accelerator, say)
    numbers = one.corruptions() if recipe.corruptions else one(recipe.data, out)
    pictures = {
        "image_size": list(judged.image_size),
        "train_size": list(judged.train_size),
        "crop_pct": one.crop.pct,
        "crop_mode": one.crop.mode,
        "parameters": judged.parameters,
    }
    summary: dict[str, Any] = {"recipe": recipe.name, "model": judged.name, "data": recipe.data.path}
    summary |= {
        "split": None if recipe.corruptions else one.split,
        "splits": recipe.data.splits,
        "numbers": numbers,
    } | pictures
    if one.note:
        summary["note"] = one.note
    if accelerator.is_main_process:
        write_atomic(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        if recipe.csv:
            append_csv(Path(recipe.csv), csv_row(recipe.model, numbers, pictures))
    say(
        ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in numbers.items()
        )
    )
    if one.note:
        say(f"warning: {one.note}")
    say(f"expected: {recipe.expected}; written to {out}")
    accelerator.wait_for_everyone()
    return numbers


def _check_out(out: Path) -> None:
    """Refuse a folder in which an evaluation would overwrite what is not an evaluation."""
    if (out / "recipe.json").exists() or (out / "checkpoints").exists():
        raise ValueError(f"out={out} is a run folder, whose own evaluation.json would be overwritten; choose another")
    summary = out / "summary.json"
    if summary.exists():
        try:
            ours = {"model", "data", "numbers"} <= set(json.loads(summary.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f"out={out} holds a summary.json that is not of an evaluation; choose another, or move it")
    # An evaluation that was killed leaves evaluation.json without a summary.
    evaluation = out / "evaluation.json"
    if not summary.exists() and evaluation.exists():
        try:
            ours = {"step", "classes"} <= set(json.loads(evaluation.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f"out={out} holds an evaluation.json that is not ours; choose another, or move it away")


def default_out(recipe: Evaluation) -> Path:
    """Return runs/evaluate-PRESET-MODEL, so that another model has another folder.

    MODEL is the run or folder of the model (`NAME` of runs/NAME, `NAME-best` of runs/NAME/best/model), with the folders
    above it below runs/ (`SWEEP-0.1-seed_0` of runs/SWEEP/0.1/seed_0), the name of an official file, or ORG-NAME.
    """
    path = Path(recipe.model).expanduser()
    if not path.exists():
        return Path("runs") / f"evaluate-{recipe.name}-{recipe.model.replace('/', '-')}"
    parts = [part for part in path.resolve().parts[1:] if part not in ("checkpoints", "model")]
    inside_a_run = parts[-1:] == ["best"] or "checkpoints" in path.resolve().parts
    first = len(parts) - (2 if inside_a_run else 1)
    if "runs" in parts[:first]:  # a run of a sweep is told from the others by the folders above it
        first = len(parts) - parts[::-1].index("runs")
    name = "-".join(parts[first:])
    return Path("runs") / f"evaluate-{recipe.name}-{name.removesuffix('.pth')}"


@dataclass(frozen=True)
class Judged:
    """A classifier, and the pictures it is shown.

    Attributes:
        name: where it was found.
        task: normalises pictures and gives scores.
        names: its classes, in the order of its scores.
        crop: how test pictures are prepared.
        train_size: of the pictures it was trained on.
        channels: 3 or 1.
    """

    name: str
    task: Classification | TimmClassification
    names: list[str]
    crop: EvalCrop
    train_size: tuple[int, int]
    channels: int

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of test pictures in pixels."""
        return self.crop.size

    @property
    def parameters(self) -> int:
        """How many numbers the model holds."""
        return sum(p.numel() for p in self.task.model.parameters())


def load_classifier(model: str, image_size: Size | None, say: Printer) -> Judged:
    """Load what `Evaluation.model` names: a classifier of ours or of timm.

    Args:
        model: a run folder, a model folder, a Hub id, a `.pth` file, or a name of timm's weights.
        image_size: of test pictures; None is the model's own.
        say: prints a line.

    Raises:
        ValueError: there is no such model, it is no classifier, or its format is unknown.
    """
    if _is_timm_name(model):
        return _load_timm(model, image_size)
    name = model_folder(model, field="model")
    if _in_timm_format(name):
        return _load_timm(name, image_size)
    made, mean, std, pixel_range, crop = _load_official(name, say) if Path(name).is_file() else _load(name, say)
    trained = height_width(made.config.image_size)
    if image_size is not None:
        made.resize_positions(image_size)
    id2label: Any = made.config.id2label
    task = Classification(made, mean, std)
    task.pixel_range = pixel_range
    return Judged(
        name=str(name),
        task=task,
        names=[id2label[i] for i in sorted(id2label)],
        crop=replace(crop, size=height_width(made.config.image_size)),
        train_size=trained,
        channels=made.config.num_channels,
    )


def _is_timm_name(model: str) -> bool:
    if "/" in model or Path(model).expanduser().exists():
        return False
    import timm  # takes seconds

    return timm.is_model(model.partition(".")[0])


def _in_timm_format(name: Path | str) -> bool:
    if isinstance(name, Path):
        return name.is_dir() and is_timm_folder(name)
    config = cached_file(name, "config.json")
    return config is not None and is_timm_folder(Path(config).parent)


def _load_timm(name: Path | str, image_size: Size | None) -> Judged:
    model, spec = load(name)
    size = spec.test_image_size if image_size is None else height_width(image_size)
    if size != spec.test_image_size:  # timm resizes the positions of those that have them
        model, _ = from_weights(name, replace(spec, image_size=size, test_image_size=size))
    task = TimmClassification(model, spec)
    task.pixel_range = spec.pixel_range
    return Judged(
        name=str(name),
        task=task,
        names=list(spec.names),
        crop=replace(spec.crop, size=size),
        train_size=spec.image_size,
        channels=spec.channels,
    )


def _subset(classes: str) -> list[int] | None:
    """Return the classes that predictions are restricted to; None is all of the model's."""
    kinds = {"names": None, "imagenet": None, "imagenet-a": a_classes, "imagenet-r": r_classes}
    subset = choose("classes", classes, kinds)
    return None if subset is None else subset()


Loaded = tuple[
    MAEForImageClassification,
    "list[float] | tuple[float, ...]",
    "list[float] | tuple[float, ...]",
    "Range | None",
    EvalCrop,
]
"""A classifier of ours, mean and std of its images, which stored values were black and white, and the crop."""


def _load(name: Path | str, say: Printer) -> Loaded:
    values = read_config(name)
    architectures = [str(one) for one in values.get("architectures") or ()]
    if MAEForImageClassification.__name__ not in architectures:
        raise _no_classifier(name, ", ".join(architectures) or str(values.get("model_type") or "something else"))
    model = MAEForImageClassification.from_pretrained(name, dtype=torch.float32)
    return model, *load_preparation(name, model.config, what=f"model={name}", say=say)


def _load_official(path: Path | str, say: Printer) -> Loaded:
    """Load a `.pth` file of the official fine-tuning or linear probe, which names neither classes nor mean and std."""
    weights = load_official_checkpoint(path).state_dict
    head = next((weights[key] for key in ("head.weight", "head.1.weight") if key in weights), None)
    if head is None:
        raise _no_classifier(path, "an encoder without a head")
    model = MAEForImageClassification.from_official(path, id2label={i: str(i) for i in range(len(head))})
    if model.config.num_channels != len(IMAGENET_MEAN):
        raise ValueError(
            f"model={path} takes {model.config.num_channels} channel(s), and the file does not say their mean and std; "
            "save it as a model folder with a preprocessor_config.json"
        )
    say(f"{path} names no classes, so they are numbers, and no mean and std: ImageNet's, as in the official code")
    return model, IMAGENET_MEAN, IMAGENET_STD, None, EvalCrop(height_width(model.config.image_size))


def _no_classifier(name: Path | str, what: str) -> ValueError:
    return ValueError(
        f"model={name} is no classifier (it holds {what}); train one first: hf-mae finetune --init-from "
        f"{shlex.quote(str(name))}"
    )


class _One:
    """Evaluates one split after another with the same model."""

    def __init__(
        self, recipe: Evaluation, judged: Judged, trained: Data | None, accelerator: Accelerator, say: Printer
    ):
        self.recipe, self.judged, self.accelerator, self.say = recipe, judged, accelerator, say
        self.trained = trained
        self.split = ""  # of the last data that were measured on
        self.note: str | None = None  # what has to be said of the numbers
        self.task, self.names = judged.task, judged.names
        self.crop = judged.crop if recipe.crop_pct is None else replace(judged.crop, crop_pct=recipe.crop_pct)
        if recipe.classes != "names" and len(self.names) != NUM_CLASSES:
            raise ValueError(
                f"model={recipe.model} has {len(self.names)} classes and {recipe.name} is judged on ImageNet's "
                f"{NUM_CLASSES}; name a model trained on ImageNet-1k, or use the preset own"
            )

    def __call__(self, data: Data, out: Path | None) -> dict[str, Any]:
        """Return the numbers of one split; write and draw them if there is an `out`."""
        recipe, accelerator = self.recipe, self.accelerator
        self.split, source = _open(recipe, data, self.trained, self.say)
        split = WholeSplit(
            source,
            image_size=self.crop.size,
            channels=self.judged.channels,
            batch=recipe.batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            num_workers=recipe.num_workers,
            max_pixels=data.max_pixels,
            crop_pct=self.crop.crop_pct,
            crop_mode=self.crop.crop_mode,
            names=recipe.labels == "real",
        )
        try:
            numbers = self._measure(split, out)
        except NoExamplesError as error:  # on all ranks
            bad = self._bad(split)
            first = f" ({len(bad)} images cannot be decoded, the first: {bad[0]})" if bad else ""
            raise ValueError(f"{source.where}: {error}{first}") from error
        if bad := self._bad(split):
            self.say(f"warning: {len(bad)} images cannot be decoded and are left out, the first: {bad[0]}")
        return numbers | {"bad_images": len(bad)}

    def _bad(self, split: WholeSplit) -> list[BadRow]:
        return [row for rank in gather_objects(split.bad, self.accelerator) for row in rank]

    def _measure(self, split: WholeSplit, out: Path | None) -> dict[str, Any]:
        recipe, accelerator, source = self.recipe, self.accelerator, split.source
        batches = progress(split, accelerator)
        if recipe.labels == "real":
            answers = real_labels()
            self._check_names(split)

            def answers_of(row: int) -> list[int]:
                return answers[real_key(split.file_names([row])[0])]

            return evaluate_real(self.task, batches, answers_of, accelerator)
        keep = _subset(recipe.classes)
        names = self.names if keep is None else [self.names[i] for i in keep]
        draw = None
        if out is not None and recipe.pictures:
            draw = Drawing(names, split.picture, split.num_rows, out / "pictures", accelerator)
        classes = self._align(source)
        if keep is not None and (foreign := sorted(set(classes) - set(keep))):
            raise ValueError(
                f"{source.where}: {len(foreign)} of its classes are not among the {len(keep)} of {recipe.name}, "
                f"the first is ImageNet's {foreign[0]}; use the preset of this data set"
            )
        self.note = _chosen_on(recipe, self.trained, self.split)
        about = {"split": self.split} | ({"note": self.note} if self.note else {})
        quality = ClassificationQuality(
            batches, self.names, accelerator, every=0, out=out, about=about, keep=keep, align=classes, draw=draw
        )
        numbers = {**quality(self.task, 0), "examples": quality.latest["weights"].examples}
        quality.finish(self.task, 0)
        return numbers

    def _check_names(self, split: WholeSplit) -> None:
        """Refuse a file name without ReaL labels before the first forward, on every rank: none waits for another."""
        accelerator, error = self.accelerator, None
        rank, world = accelerator.process_index, accelerator.num_processes
        try:
            for name in split.file_names(range(split.num_rows * rank // world, split.num_rows * (rank + 1) // world)):
                real_key(name)
        except (ValueError, RuntimeError, OSError) as caught:
            error = caught
        agree(error, accelerator, "reading the file names")

    def _align(self, source: Source) -> list[int]:
        if source.label_names is None:
            numbers = list(range(len(self.names)))
            if self.recipe.classes == "names" and self.names == list(map(str, numbers)):
                return numbers  # trained on labels that had no names either
            raise ValueError(
                f"{source.where}: the labels have no names to find the model's classes by; use a folder per class, or "
                "a data set with ClassLabel features"
            )
        if self.recipe.classes == "names":
            return align(self.names, source.label_names)
        return classes_of(source.label_names)

    def corruptions(self) -> dict[str, Any]:
        """Evaluate every CORRUPTION/SEVERITY folder; the error of a corruption is the mean over its severities."""
        errors: dict[str, float] = {}
        for corruption, folders in severities(Path(self.recipe.data.path)).items():
            tops = []
            for folder in folders:
                self.say(f"{corruption} {folder.name}")
                tops.append(self(replace(self.recipe.data, path=str(folder), split=None), None)["top1"])
            errors[corruption] = 1 - sum(tops) / len(tops)
        return {"mce": mce(errors)} | {f"error_{name}": error for name, error in errors.items()}


def _trained_on(recipe: Evaluation) -> Data | None:
    """Return the data of the run that the model lies in, if they are those of the evaluation."""
    path = Path(recipe.model).expanduser().resolve()
    folders = path.parents[:3] if path.name in ("model", "model_ema") else [path]
    written = [folder / "recipe.json" for folder in folders if (folder / "recipe.json").is_file()]
    if not written:
        return None
    found = json.loads(written[0].read_text())["data"]
    trained = replace(recipe.data, **{name: found.get(name) for name in ("path", "name", "split", "splits")})
    here, there = (str(Path(data.path).expanduser().resolve()) for data in (recipe.data, trained))
    return trained if here == there and recipe.data.name == trained.name else None


def _chosen_on(recipe: Evaluation, trained: Data | None, split: str | None) -> str | None:
    """Return what has to be said where a run's best weights are measured on the split that chose them."""
    path = Path(recipe.model).expanduser().resolve()
    best = next((folder for folder in (path, path.parent) if (folder / "best.json").is_file()), None)
    environment = None if best is None else best.parent / "environment.json"
    if best is None or environment is None or not environment.is_file() or trained is None:
        return None
    starts = json.loads(environment.read_text())["starts"]
    if split is None or not starts or starts[-1].get("tested_on") != split:
        return None
    return chosen_on(json.loads((best / "best.json").read_text())["metric"], split)


def _read_as_trained(data: Data, judged: Judged, say: Printer) -> Data:
    """Return the data, their stored values mapped as in training unless the user says how."""
    trained = judged.task.pixel_range
    if trained is None or data.pixel_range == trained:
        return data
    low, high = trained
    if data.pixel_range is None:
        say(f"pixel range: {low:g} to {high:g}, as the model was trained with")
        return replace(data, pixel_range=trained)
    say(f"warning: the model was trained with --data.pixel-range {low:g} {high:g}")
    return data


def _divided_as(data: Data, trained: Data | None, say: Printer) -> Data:
    """Return the data, divided by the rule of the training unless what is asked for lies beside what it divided."""
    if trained is None or trained.splits is None or data.splits is not None:
        return data
    own = list_splits(data)
    if data.split != "train" and data.split in own and len(own) > 1:
        return data
    say(
        "the model was trained on a part of these images (its run's data.splits): using --data.splits "
        f"{shlex.quote(str(trained.splits))}"
    )
    return replace(data, splits=trained.splits)


def _open(recipe: Evaluation, data: Data, trained: Data | None, say: Printer) -> tuple[str, Source]:
    """Open the images to measure on: the split's name and its rows."""
    split = data.split or next((s for s in ("test", "validation", "val") if s in list_splits(data)), None)
    source = open_source(data, split=split)
    check_pixels(source, data)
    say(source.summary())
    if recipe.labels != "real" and not source.has_labels:
        why = f" ({source.why_unlabelled})" if source.why_unlabelled else ""
        raise ValueError(
            f"{source.where}: has no labels{why}; name another split (--data.split) or --data.label-column"
        )
    if trained is not None and trained.splits != data.splits:
        if data.splits is not None:
            say(
                f"warning: the model was trained with data.splits={trained.splits}, not {data.splits}, so that some of "
                "these images may have been trained on"
            )
    elif trained is not None and (split or "train") == (trained.split or "train"):
        say(
            f"warning: {source.where} is what the model was trained on: this measures memory; name another --data.split"
        )
    elif split is None and recipe.classes == "names":  # the others are test sets as a whole
        say(
            f"warning: {data.path} has no test or validation split, so all of {source.where} is used; of a model that "
            "was trained on it this measures memory (--data.split and --data.splits name a part)"
        )
    return split or "train", source


def csv_row(model: str, numbers: dict[str, Any], pictures: dict[str, Any]) -> dict[str, str]:
    """Return one row in the form of timm's results: percent with three decimals, parameters in millions.

    Args:
        model: its name.
        numbers: of `evaluate`; of ReaL labels the top-1, whose top-5 is not measured and stays empty.
        pictures: `image_size`, `crop_pct` and `parameters`.
    """
    percent = {"top1": numbers.get("top1", numbers.get("real_top1")), "top5": numbers.get("top5")}
    height, width = pictures["image_size"]
    row = {"model": model}
    for name, value in percent.items():
        row[name] = "" if value is None else f"{100 * value:.3f}"
        row[f"{name}_err"] = "" if value is None else f"{100 - 100 * value:.3f}"
    return row | {
        "param_count": f"{pictures['parameters'] / 1e6:.2f}",
        "img_size": str(height) if height == width else f"{height}x{width}",
        "crop_pct": f"{pictures['crop_pct']:.4g}",
        "interpolation": "bicubic",
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file of results, none if there is no file.

    Raises:
        ValueError: its columns are others.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != CSV_COLUMNS:
            raise ValueError(
                f"csv={path} has the columns {', '.join(reader.fieldnames or ['(none)'])}; a row needs "
                f"{', '.join(CSV_COLUMNS)}: choose another --csv"
            )
        return list(reader)


def append_csv(path: Path, row: dict[str, str]) -> None:
    """Write the rows of a file and one more, in one move."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list[str](CSV_COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_csv(path), row])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue())
