"""What the page does, without the page: a picture and settings in, pictures or scores out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_mae import evaluate
from hf_mae.data.images import ImageError, Range, crop_center, decode_image, stated_range, to_array
from hf_mae.data.order import NOISE, uniforms
from hf_mae.evaluation.reconstruction import reconstruct
from hf_mae.models.configuration_mae import height_width
from hf_mae.models.convert import check_files, check_finite, list_names
from hf_mae.models.masking import MaskStrategy, check_masking, count_kept, mask_noise, num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.pretrain import load_pretrained
from hf_mae.recipes.crop import EvalCrop
from hf_mae.resolve import model_folder, read_config
from hf_mae.training.monitors import Printer
from hf_mae.training.tasks import TimmClassification

TILE = 224
"""Pixels that small pictures are enlarged to, at least, by a whole number."""

MAX_SEED = 2**53 - 1
"""The largest whole number that a browser sends exactly."""


@dataclass(frozen=True)
class Reconstructor:
    """A pretraining model and its input.

    Attributes:
        name: what the page calls it.
        model: with its decoder, in evaluation mode.
        mean: per channel, of the input scaled to [0, 1].
        std: per channel, likewise.
        pixel_range: stored values that became black and white in training, see `hf_mae.data.images.decode_image`.
        crop: how images are cropped.
    """

    name: str
    model: MAEForPreTraining
    mean: Sequence[float]
    std: Sequence[float]
    pixel_range: Range | None
    crop: EvalCrop


@dataclass(frozen=True)
class Classifier:
    """A classifier.

    Attributes:
        name: what the page calls it.
        classes: in the order of its scores.
        channels: colour channels of its input.
        scores: an upright picture -> [classes], each in [0, 1].
        pixel_range: stored values that became black and white in training, see `hf_mae.data.images.decode_image`.
        each_on_its_own: every class has its own yes or no (trained with BCE): scores do not add up to 1.
    """

    name: str
    classes: Sequence[str]
    channels: int
    scores: Callable[[Image.Image], Tensor]
    each_on_its_own: bool
    pixel_range: Range | None = None


def load_reconstructor(name: str) -> Reconstructor:
    """Load a pretraining model.

    Args:
        name: a run folder (its newest checkpoint), a model folder or a Hub id; of ours, or a vit_mae.

    Raises:
        ValueError: there is no such model, or it has no decoder or no preprocessing.
    """
    return Reconstructor(shown_name(name), *load_pretrained(name, field="reconstruct"))


def reconstruct_picture(
    reconstructor: Reconstructor, path: str | Path, *, mask_ratio: float, strategy: MaskStrategy, seed: int
) -> tuple[list[tuple[Image.Image, str]], str]:
    """Mask a picture and predict it.

    Args:
        reconstructor: the model.
        path: an image file of any size and mode.
        mask_ratio: fraction of the patches removed, in (0, 1).
        strategy: which are removed.
        seed: chooses the mask, from 0 to `MAX_SEED`.

    Returns:
        Four pictures with their names (original, masked, predicted, pasted), and what was done in words.

    Raises:
        ValueError: the file is no picture, or these patches cannot be removed.
    """
    config = copy.deepcopy(reconstructor.model.config)
    config.mask_ratio, config.mask_strategy = float(mask_ratio), strategy
    grid, size = config.grid, height_width(config.image_size)
    L = grid[0] * grid[1]
    check_masking(strategy, grid, config.mask_ratio)
    if (removed := L - count_kept(L, config.mask_ratio)) == 0:
        raise ValueError(
            f"mask_ratio={mask_ratio} removes none of the {L} patches, so there is nothing to predict; take more than "
            f"{1 / L:.2g}"
        )
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed:.16g} is out of range; take 0 to {MAX_SEED}")
    image = open_picture(path, config.num_channels, reconstructor.pixel_range)
    pixels = to_array(crop_center(image, reconstructor.crop))  # [C, H, W]
    drawn = uniforms(num_uniforms(strategy, grid), seed, np.zeros(1, np.int64), np.zeros(1, np.int64), NOISE)
    noise = mask_noise(strategy, torch.from_numpy(drawn).float(), grid, config.mask_ratio)
    # The same weights under another config: two visitors at once do not share their settings.
    model = copy.copy(reconstructor.model)
    model.config = config
    out = reconstruct(
        model, torch.from_numpy(pixels.copy())[None], noise=noise, mean=reconstructor.mean, std=reconstructor.std
    )
    named = (("original", out.original), ("masked", out.masked), ("predicted", out.predicted), ("pasted", out.pasted))
    note = (
        f"{size[1]} x {size[0]} pixels ({reconstructor.crop.words()}); {removed} of {L} patches removed. "
        "Pasted is the prediction where patches were removed, and the original elsewhere."
    )
    if out.uses_true_statistics:
        note += (
            " This model predicts patches up to their mean and deviation. The true ones were put back to show them, "
            "which the model never saw: colours and contrast look better than it could know."
        )
    return [(_tile(pictures[0]), title) for title, pictures in named], note


def load_classifier(name: str) -> Classifier:
    """Load a classifier.

    Args:
        name: a run folder (its newest checkpoint), a model folder or a Hub id; of ours, in timm's format, or of stock
            transformers.

    Raises:
        ValueError: there is no such model, it is no classifier, or only code of its own could load it.
    """
    folder = model_folder(name, field="classify")
    if not Path(folder).is_file() and read_config(folder).get("model_type") not in ("hf_mae", None):
        return _load_stock(folder, name)
    judged = evaluate.load_classifier(name, None, Printer(False))
    task = judged.task.eval()
    if isinstance(task, TimmClassification):
        each = task.spec.loss == "bce"
    else:
        each = task.model.config.problem_type == "multi_label_classification"

    def scores(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(to_array(crop_center(picture, judged.crop)).copy())[None]
        logits = task.logits({"pixel_values": pixels})[0].float()
        return logits.sigmoid() if each else logits.softmax(-1)

    return Classifier(shown_name(name), judged.names, judged.channels, scores, each, task.pixel_range)


def _load_stock(folder: Path | str, name: str) -> Classifier:
    try:
        if isinstance(folder, Path):
            check_files(folder)
        model, info = AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"it lacks the weights {list_names(missing)}")
        check_finite(model.state_dict().items(), name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"classify={name} cannot be loaded as an image classifier: {reason}; name a classifier of hf_mae, of stock "
            "transformers or in timm's format, with safetensors weights"
        ) from error
    model.eval()
    processor = _processor(folder, f"classify={name}")
    labels: Any = model.config.id2label
    each = model.config.problem_type == "multi_label_classification"

    def scores(picture: Image.Image) -> Tensor:
        logits = model(**processor(picture, return_tensors="pt")).logits[0].float()
        return logits.sigmoid() if each else logits.softmax(-1)

    channels = 1 if getattr(model.config, "num_channels", 3) == 1 else 3
    names = [labels[i] for i in sorted(labels)]
    return Classifier(shown_name(name), names, channels, scores, each, stated_range(processor))


@torch.no_grad()
def classify_picture(classifier: Classifier, path: str | Path, *, top: int = 5) -> dict[str, float]:
    """Return the `top` classes of a picture with their scores, highest first.

    Raises:
        ValueError: the file is no picture.
    """
    scores = classifier.scores(open_picture(path, classifier.channels, classifier.pixel_range))
    values, places = scores.topk(min(top, len(scores)))
    best: dict[str, float] = {}
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        label = str(classifier.classes[place])
        best[f"{label} (class {place})" if label in best else label] = value  # ImageNet has two cranes
    return best


def open_picture(path: str | Path, channels: int, pixel_range: Range | None = None) -> Image.Image:
    """Read a picture of any size and mode: upright, mode RGB, or L for one channel; its values mapped as in training.

    Raises:
        ValueError: the file is no picture, or too large.
    """
    try:
        return decode_image(Path(path).read_bytes(), channels, pixel_range=pixel_range)
    except ImageError as error:
        raise ValueError(f"this picture cannot be used: {error}; take a JPEG, PNG or WebP file") from error


def shown_name(name: str) -> str:
    """Return what a page may call a model: its Hub id, the recipe of a run, or the last part of another path."""
    path = Path(name).expanduser()
    if not path.exists():
        return name
    if (path / "recipe.json").is_file():
        with suppress(ValueError):  # of another writer
            recipe = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
            if isinstance(recipe, dict) and recipe.get("name"):
                return str(recipe["name"])
    return path.absolute().name


def _processor(folder: Path | str, what: str) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{what} has no preprocessor_config.json, so its mean and std are not known") from error


def _tile(pixels: Tensor) -> Image.Image:
    """uint8 [C, H, W] -> a picture, small ones enlarged so that their pixels are seen."""
    array = pixels.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    factor = -(-TILE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
