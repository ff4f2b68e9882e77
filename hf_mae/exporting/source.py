"""What is exported: a model, read from wherever it lies, and what is known of where it comes from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from hf_mae.exporting.files import hash_files, hash_weights
from hf_mae.exporting.labels import check_names, timm_names
from hf_mae.exporting.processor import check_channels, check_statistics, read_processor
from hf_mae.exporting.telling import Say
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel, MAEPreTrainedModel
from hf_mae.models.timm_models import load
from hf_mae.models.timm_spec import TimmSpec
from hf_mae.recipes.crop import EvalCrop
from hf_mae.recipes.fields import unknown
from hf_mae.resolve import locate, model_folder, read_config, read_json
from hf_mae.training.origins import run_of

Target = Literal["auto", "vit_mae", "vit", "beit", "timm", "onnx", "hf_mae"]
STOCK = ("vit_mae", "vit", "beit", "timm")
"""The targets that libraries of others load."""
Weights = Literal["last", "best", "average"]

MULTI_LABEL: Final = "multi_label_classification"
"""What transformers calls binary cross-entropy; its pipeline then shows sigmoid scores."""
CLASSES: dict[str, type[MAEPreTrainedModel]] = {
    "MAEForImageClassification": MAEForImageClassification,
    "MAEForPreTraining": MAEForPreTraining,
    "MAEModel": MAEModel,
    "ViTMAEForPreTraining": MAEForPreTraining,
    "ViTMAEModel": MAEModel,
}
"""Classes in a config.json that are read, and what they are here."""


@dataclass(frozen=True)
class Origin:
    """Where a model comes from; the `source` of export.json. Names, no paths."""

    name: str
    run: str | None = None
    """The recipe's name."""
    kind: str = "model"
    weights: str = "last"
    step: int | None = None
    sha256: str | None = None
    """Of the file of weights; of all of them in order where there are several."""


@dataclass(frozen=True)
class Source:
    """A model and its origin.

    Attributes:
        model: in evaluation mode, float32, on the CPU.
        origin: where it comes from.
        crop: of our evaluation.
        processor: how its pictures are prepared, every field; of a model of timm only mean and std are read.
        given: the processor is the user's, who need not want that of our evaluation.
        spec: of a model of timm.
        bce: the scores were trained for binary cross-entropy.
        folder: the run folder, if the model is of one.
        conversion: text of conversion.json, if the model was converted from an official file.
        notes: what was done to the weights: sentences.
    """

    model: nn.Module
    origin: Origin
    crop: EvalCrop
    processor: dict[str, Any]
    given: bool = False
    spec: TimmSpec | None = None
    bce: bool = False
    folder: Path | None = None
    conversion: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input in pixels."""
        return self.crop.size

    @property
    def channels(self) -> int:
        """Colour channels of the input."""
        return self.spec.channels if self.spec is not None else self._config.num_channels

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the scores; None of a model without."""
        if self.spec is not None:
            return self.spec.names
        if not isinstance(self.model, MAEForImageClassification):
            return None
        names = cast("dict[int, str]", self._config.id2label)
        return tuple(names[row] for row in range(len(names)))

    @property
    def problem_type(self) -> str | None:
        """What transformers calls the loss of a classifier; tells whether its scores are softmax or sigmoid."""
        if self.classes is None:
            return None
        return MULTI_LABEL if self.bce else "single_label_classification"

    @property
    def _config(self) -> MAEConfig:
        return cast(MAEPreTrainedModel, self.model).config


def read(
    model: nn.Module | str | os.PathLike[str], *, weights: Weights, processor: Mapping[str, Any] | None, say: Say
) -> Source:
    """Read what is to be exported.

    Args:
        model: an instance of a class of ours, a run folder, a model folder of ours or of timm, a Hub id of such, or an
            official `.pth` file.
        weights: which ones of a run folder: of its newest checkpoint, of its best evaluation, or their moving average.
        processor: fields that replace those of the model's image processor.
        say: called with lines for the user.

    Raises:
        ValueError: there is no such model or no such weights, they are of no known kind, or they are not finite; the
            classes have no names of their own each; or its pictures are neither grey nor in colour.
    """
    if isinstance(model, nn.Module):
        source = _of_instance(model, weights, processor, say)
    else:
        source = _of_name(str(model), weights, processor, say)
    notes = _check_weights(model if isinstance(model, nn.Module) else source.model)
    for note in notes:
        say(note)
    if source.spec is None and isinstance(source.model, MAEForImageClassification):
        names = cast("tuple[str, ...]", source.classes)
        source.model.config.id2label = dict(enumerate(names))
        source.model.config.label2id = {name: row for row, name in enumerate(names)}
        if source.bce:
            source.model.config.problem_type = MULTI_LABEL
        if all(name == f"LABEL_{row}" for row, name in enumerate(names)):
            say(
                f"warning: the {len(names)} classes have no names (LABEL_0, ...), and that is what the Hub will show; "
                "set config.id2label before exporting"
            )
    return replace(source, model=source.model.float().eval(), notes=[*source.notes, *notes])


# ------------------------------------------------------------------------------------------------ finding


def _of_instance(model: nn.Module, weights: Weights, processor: Mapping[str, Any] | None, say: Say) -> Source:
    if not isinstance(model, (MAEForPreTraining, MAEForImageClassification, MAEModel)):
        raise ValueError(
            f"model is a {type(model).__name__}, which cannot be exported; pass one of hf_mae's classes, or the name "
            "of a folder (models of timm are exported from theirs)"
        )
    if weights != "last":
        raise ValueError(f"weights={weights!r} is for run folders, and model is an object; leave it out")
    if isinstance(model, MAEForImageClassification):
        check_names(model)
    copy = type(model)(MAEConfig.from_dict(model.config.to_dict()))
    copy.load_state_dict({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()})
    name = Path(model.name_or_path or "").name or type(model).__name__
    full, crop = read_processor(copy, None, processor, say)
    return Source(
        copy,
        Origin(name),
        crop,
        full,
        given=processor is not None,
        bce=_is_bce(copy.config),
    )


def _of_name(name: str, weights: Weights, processor: Mapping[str, Any] | None, say: Say) -> Source:
    path = Path(name).expanduser()
    run = path if (path / "recipe.json").is_file() and not (path / "config.json").is_file() else None
    if run is None and weights != "last":
        raise ValueError(f"weights={weights!r} is for run folders, and {name} is none; leave it out")
    if path.is_file():
        return _of_official(cast(Path, locate(path, field="model")), processor, say)
    if name.startswith(("hf-hub:", "hf_hub:")) or ("/" not in name and not path.exists()):
        return _of_timm(name, Origin(name.partition(":")[2] or name), None, processor)
    folder: Path | str = _weights_folder(path, weights) if run is not None else model_folder(name, field="model")
    origin, recipe = _origin(name, path, folder, weights)
    run = run or _run_of_weights(folder)
    config = read_config(folder)
    if {"architecture", "pretrained_cfg"} <= config.keys():
        return _of_timm(folder, origin, run, processor)
    architectures = config.get("architectures") or []
    known = [CLASSES[one] for one in architectures if one in CLASSES]
    if not known or config.get("model_type") not in ("hf_mae", "vit_mae"):
        raise ValueError(
            f"{name} is a {', '.join(architectures) or config.get('model_type') or 'model of unknown class'}, which is "
            "no model of hf_mae or timm; name a run folder, or a model folder with one of "
            f"{', '.join(CLASSES)}"
        )
    model = known[0].from_pretrained(folder, dtype="auto")
    if isinstance(model, MAEForImageClassification):
        check_names(model)
    written = _optional(folder, "preprocessor_config.json")
    conversion = _optional(folder, "conversion.json")
    if conversion is not None:
        origin = replace(origin, kind="conversion")
    full, crop = read_processor(model, None if written is None else read_json(written), processor, say)
    return Source(
        model,
        origin,
        crop,
        full,
        given=processor is not None,
        bce=recipe.get("loss", {}).get("name") == "bce" or _is_bce(model.config),
        folder=run,
        conversion=None if conversion is None else conversion.read_text(),
    )


def _is_bce(config: MAEConfig) -> bool:
    return config.problem_type == MULTI_LABEL


def _of_timm(name: Path | str, origin: Origin, run: Path | None, given: Mapping[str, Any] | None) -> Source:
    model, spec = load(name)
    check_channels("in_chans", spec.channels)
    processor = {"image_mean": list(spec.mean), "image_std": list(spec.std)}
    if unknown := sorted((given or {}).keys() - processor.keys()):
        raise ValueError(
            f"processor has the field{'s' * (len(unknown) > 1)} {', '.join(unknown)}, and of a model of timm only "
            "image_mean and image_std can be given: its size and crop are those it was measured with"
        )
    processor |= {key: list(value) for key, value in (given or {}).items()}
    check_statistics(processor, spec.channels)
    names = timm_names(spec.names)
    notes = [] if names == spec.names else ["names that ImageNet gives to several classes got a number"]
    spec = replace(spec, names=names, mean=tuple(processor["image_mean"]), std=tuple(processor["image_std"]))
    return Source(
        model,
        origin,
        spec.crop,
        processor,
        given=bool(given),
        spec=spec,
        bce=spec.loss == "bce",
        folder=run,
        notes=notes,
    )


def _of_official(path: Path, processor: Mapping[str, Any] | None, say: Say) -> Source:
    from hf_mae.exporting.convert import convert

    with tempfile.TemporaryDirectory() as name:
        try:
            folder = convert(path, Path(name) / path.stem, say=say)
        except ValueError as error:
            raise ValueError(
                f"{path.name} cannot be exported as it is: {error} (`hf-mae convert` takes what the file does "
                "not say as options; then export the folder it writes)"
            ) from error
        source = _of_name(str(folder), "last", processor, say)
    return replace(source, origin=replace(source.origin, name=path.name))


def _weights_folder(run: Path, weights: Weights) -> Path:
    if weights == "best":
        folder, remedy = run / "best" / "model", "only runs with evaluations on labels keep one"
    elif weights == "average":
        folder = cast(Path, model_folder(str(run), field="model")).with_name("model_ema")
        remedy = "only runs with optim.ema_decay keep one"
    elif weights == "last":
        return cast(Path, model_folder(str(run), field="model"))
    else:
        raise unknown("weights", weights, get_args(Weights))
    if not (folder / "config.json").is_file():
        raise ValueError(f"weights={weights!r} of {run} do not exist ({folder.name} is missing: {remedy}); use 'last'")
    return folder


def _origin(name: str, path: Path, folder: Path | str, weights: Weights) -> tuple[Origin, dict[str, Any]]:
    """Return where a model comes from, and the recipe of its run, empty if there is none."""
    run, recipe = _run_of_weights(folder), {}
    kind, step, title = "model", None, path.name if path.exists() else name
    if run is not None:
        recipe = json.loads((run / "recipe.json").read_text())
        kind, title = _kind(recipe), run.resolve().name
        inside = Path(folder).resolve()
        if inside.parent.name == "best":
            weights, step = "best", json.loads((inside.parent / "best.json").read_text())["step"]
        else:
            weights = "average" if inside.name == "model_ema" else "last"
            step = int(inside.parent.name.removeprefix("step_"))
    return Origin(title, recipe.get("name"), kind, weights, step, _sha256(folder)), recipe


def _run_of_weights(folder: Path | str) -> Path | None:
    return run_of(folder) if isinstance(folder, Path) else None  # a Hub id may be the name of a folder as well


def _kind(recipe: Mapping[str, Any]) -> str:
    if "architecture" in recipe["model"]:
        return "supervise"
    if "head" not in recipe["model"]:
        return "pretrain"
    return "probe" if recipe.get("trainable_blocks") == 0 else "finetune"


def _optional(folder: Path | str, name: str) -> Path | None:
    if isinstance(folder, Path):
        return folder / name if (folder / name).is_file() else None
    found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _sha256(folder: Path | str) -> str | None:
    if isinstance(folder, Path):
        return hash_weights(folder)
    whole = cached_file(folder, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    return None if whole is None else hash_files([Path(whole)])[1]


# ------------------------------------------------------------------------------------------------ checks


def _check_weights(model: nn.Module) -> list[str]:
    """Refuse weights that are not finite or not plain floats; return what a copy in float32 changes."""
    dtypes: set[torch.dtype] = set()
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(
                f"weight {name} is {tensor.dtype}, not a plain float: quantised weights cannot be exported; export the "
                "model they were made of"
            )
        if not _is_finite(tensor):
            raise ValueError(f"weight {name} is not finite, so the model is broken; export an earlier checkpoint")
        dtypes.add(tensor.dtype)
    notes = [f"weights in {str(one).removeprefix('torch.')} are written in float32" for one in dtypes]
    return sorted(note for note in notes if "weights in float32 " not in note)


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
