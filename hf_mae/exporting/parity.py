"""Whether an exported folder computes what our model computes, found out by a process that has never heard of us.

Two pictures, one real and one of noise, in float64 and float32. In float64 the differences are rounding; what is left
in float32 is the order of sums.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_mae.data.images import MAX_ASPECT, Pixels, crop_center, decode_image, resize, to_array
from hf_mae.exporting import check
from hf_mae.recipes.crop import EvalCrop

TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
"""Largest difference allowed, absolute up to 1, then relative to the largest output."""
PIXEL_TOLERANCE: Mapping[str, Mapping[str, float]] = {
    "transformers": {"pil": 1e-6, "default": 2 / 255 + 1e-6},
    "timm": {"timm": 1e-6, "default": 1e-6},
}
"""The same for the image processor, of pixels in [0, 1], by library and backend: of transformers the default one
resizes with other rounding than Pillow, which moves a pixel by 1 of 255, and by 2 where a picture is enlarged; of timm
the default one is that of transformers' wrapper, and `timm` is timm's own `create_transform`."""

SCORE_TOLERANCE = 1e-4
"""The same for the scores of the pipeline, shares of one."""

Outputs = dict[str, Tensor]
Forward = Callable[[nn.Module, Outputs], Outputs]
"""A model and its inputs by name, to its outputs by name."""
_PLAIN = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}


@dataclass(frozen=True)
class Request:
    """What the new process is to load and to answer.

    Attributes:
        library: `transformers` or `timm`.
        auto: the Auto class.
        outputs: their names, the same in ours and in the stock class.
        options: of `from_pretrained`.
        pipeline: the pipeline to run on the picture, if any.
    """

    library: str
    auto: str
    outputs: tuple[str, ...]
    options: Mapping[str, Any]
    pipeline: str | None


@dataclass(frozen=True)
class Stranger:
    """What the new process found."""

    outputs: Outputs
    """DTYPE.ROUTE.NAME, processor.BACKEND.NUMBER of an image, and pipeline.pixel_values."""
    pipeline: dict[str, Any] | None
    versions: dict[str, str]


def flower() -> Path:
    """Return a photograph that comes with scikit-learn, 427 x 640 pixels."""
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"


def decoded(picture: Path, channels: int) -> Image.Image:
    """Return the picture as training decodes it.

    Raises:
        ValueError: it is no picture.
    """
    try:
        return decode_image(picture.read_bytes(), channels)
    except OSError as error:
        raise ValueError(f"picture={picture} cannot be read ({error}); name a picture") from error


def prepare(picture: Image.Image, crop: EvalCrop) -> Tensor:
    """Return the picture as our evaluation prepares it, float32 [C, H, W] in [0, 1]."""
    return _pixels(to_array(crop_center(picture, crop)))


def prepare_rounding_down(picture: Image.Image, crop: EvalCrop) -> tuple[Tensor, list[int]]:
    """Return what `prepare` does where half a pixel of the border is rounded down, and how far that moves the crop.

    Our evaluation rounds it to even, as torchvision does; the image processors of transformers round down, so that some
    of their crops lie one pixel higher or further left.

    Returns:
        float32 [C, H, W] in [0, 1], and (rows, columns), each 0 or 1.
    """
    resized = resize(picture, crop.resized(picture.height, picture.width))
    top, left = (resized.height - crop.size[0]) // 2, (resized.width - crop.size[1]) // 2
    cut = resized.crop((left, top, left + crop.size[1], top + crop.size[0]))
    return _pixels(to_array(cut)), [a - b for a, b in zip(crop.corner(*resized.size[::-1]), (top, left), strict=True)]


def _pixels(image: Pixels) -> Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def example_pixels(real: Tensor, mean: Any, std: Any) -> Tensor:
    """Return two normalised images [2, C, H, W]: what `prepare` made of a picture, and noise."""
    normalised = (real - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    noise = torch.randn(normalised.shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([normalised, noise]).float()


def ours(model: nn.Module, forward: Forward, inputs: Outputs) -> Outputs:
    """Return the outputs of our model by DTYPE.NAME. The model is left alone."""
    outputs: Outputs = {}
    copy = deepcopy(model).eval()
    with torch.no_grad():
        for name in TOLERANCE:
            dtype = check.DTYPES[name]
            copy = copy.to(dtype)
            found = forward(copy, {key: value.to(dtype) for key, value in inputs.items()})
            outputs |= {f"{name}.{key}": value for key, value in found.items()}
    return outputs


def trial_images(picture: Image.Image, crop: EvalCrop, *, converts: bool) -> list[Image.Image]:
    """Return the images on which an image processor is compared with our evaluation.

    The picture, and the picture resized: to exactly the input's size, smaller and larger, upright and lying, square,
    and to sizes of which transformers places the crop one pixel off.

    Args:
        picture: decoded, in colour or grey.
        crop: of our evaluation.
        converts: the processor takes images of any mode, and gets a grey one and a transparent one as well.
    """
    (h, w), (target_h, target_w) = crop.size, crop.target
    more_h, more_w = ((side - border - 1) % 4 + 1 for side, border in ((h + 3, target_h), (w + 3, target_w)))
    sizes = [
        (h, w),
        (h // 2 + 1, w // 3 + 1),
        (2 * h + 1, 2 * w + 3),
        (3 * h + 1, w + 2),
        (h + 2, 3 * w + 1),
        (max(h, w) + 7, max(h, w) + 7),
        (target_h + more_h, target_w),
        (target_h, target_w + more_w),
    ]
    found = [resize(picture, size) for size in sizes]
    if max(picture.size) <= MAX_ASPECT * min(picture.size):  # see `crop_center`
        found.append(picture)
    if converts:
        transparent = found[2].convert("RGBA")
        transparent.putalpha(found[2].convert("L"))
        found += [found[3].convert("L"), transparent]
    return found


def run_stock(folder: Path, request: Request, inputs: Outputs, picture: Path, images: list[Image.Image]) -> Stranger:
    """Load the folder in a new process that cannot import this package, and return what it computed.

    Args:
        folder: what is checked.
        request: how.
        inputs: of the model, by name; `pixel_values` [N, C, H, W] and for ViTMAE `noise` [N, L].
        picture: file for the pipeline.
        images: decoded ones, for the image processors.

    Raises:
        RuntimeError: it could not be loaded; the end of what the process said.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_file({key: value.contiguous() for key, value in inputs.items()}, work / "inputs.safetensors")
        decoded = [work / f"decoded_{number}.png" for number in range(len(images))]
        for path, image in zip(decoded, images, strict=True):
            image.save(path, compress_level=1)
        # Alone: beside it lie modules with names of others, and the folder of a script is searched first.
        script = Path(shutil.copy(check.__file__, work / "check.py"))
        values: dict[str, Any] = {
            "folder": str(folder.resolve()),
            "library": request.library,
            "auto": request.auto,
            "outputs": list(request.outputs),
            "options": dict(request.options),
            "pipeline": request.pipeline,
            "picture": str(picture.resolve()),
            "decoded": [str(path) for path in decoded],
        }
        (work / "request.json").write_text(json.dumps(values))
        ended = subprocess.run(
            [sys.executable, str(script), str(work / "request.json")],
            capture_output=True,
            text=True,
            cwd=work,
            env=os.environ | _PLAIN | {"PYTHONPATH": _python_path()},
            check=False,
        )
        if ended.returncode:
            raise RuntimeError(
                f"the exported folder cannot be used by {request.library} without hf_mae, so it is not kept: "
                f"{_tail(ended.stderr)}"
            )
        answer = json.loads((work / "answer.json").read_text())
        outputs = load_file(work / "outputs.safetensors")
    return Stranger(outputs, answer["pipeline"], answer["versions"])


def _python_path() -> str:
    # From another folder, what is relative must be found as well.
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(os.path.abspath(place) for place in given if place)


def compare(mine: Outputs, stranger: Stranger) -> dict[str, float]:
    """Return the largest difference of all outputs, by dtype.

    Raises:
        RuntimeError: it is larger than `TOLERANCE` allows.
    """
    differences = dict.fromkeys(TOLERANCE, 0.0)
    for name, theirs in stranger.outputs.items():
        dtype, _, rest = name.partition(".")
        if dtype not in TOLERANCE:
            continue
        route, _, key = rest.partition(".")
        expected = mine[f"{dtype}.{key}"]
        difference = largest_difference(expected, theirs)
        limit = TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
        if not difference <= limit:
            raise RuntimeError(
                f"{key} of the exported folder, loaded by {route}, differs from ours by {difference:.3g} in {dtype}, "
                f"more than {limit:.3g}; it is not kept. Please report this with the config.json of the model"
            )
        differences[dtype] = max(differences[dtype], difference)
    return differences


def compare_processor(
    images: Sequence[Image.Image], theirs: Mapping[str, Tensor], library: str, crop: EvalCrop, mean: Any, std: Any
) -> dict[str, Any]:
    """Return how far the image processor is from our evaluation.

    Args:
        images: of `trial_images`.
        theirs: pixels [1, C, H, W] by BACKEND.NUMBER, of `check.process`.
        library: of the processor, see `PIXEL_TOLERANCE`.
        crop: of our evaluation.
        mean: of the processor, per channel.
        std: likewise.

    Returns:
        The largest difference of pixels in [0, 1] by backend, None for one that the library has not; of transformers
        the crop may lie `shift` (rows, columns) higher and further left; `images`, how many were compared;
        `transparency`, what becomes of it: `dropped` as in our evaluation, or `white` (transformers 5.24 and later,
        where a picture is passed to the processor itself; its pipelines drop it); and `agrees`, whether all of it is no
        more than other rounding.
    """
    scale, offset = (torch.tensor(values).view(-1, 1, 1) for values in (std, mean))
    look = prepare_rounding_down if library == "transformers" else lambda image, crop: (prepare(image, crop), [0, 0])
    found: dict[str, Any] = {"pil": None} | dict.fromkeys(PIXEL_TOLERANCE[library])
    shifts, transparency = [], None
    for number, image in enumerate(images):
        mine, shift = look(_reopened(image, len(mean)), crop)
        on_white = look(_on_white(image), crop)[0] if image.mode == "RGBA" else None
        shifts.append(shift)
        for backend, limit in PIXEL_TOLERANCE[library].items():
            if (seen := theirs.get(f"{backend}.{number}")) is None:
                continue
            pixels = seen[0].double() * scale + offset
            difference = largest_difference(mine, pixels)
            if on_white is not None:
                transparency = "dropped" if difference <= limit else "white"
                difference = min(difference, largest_difference(on_white, pixels))
            found[backend] = max(found[backend] or 0.0, difference)
    agrees = all(found[name] is None or found[name] <= limit for name, limit in PIXEL_TOLERANCE[library].items())
    shift = [max(one) for one in zip(*shifts, strict=True)]
    return {**found, "shift": shift, "images": len(images), "transparency": transparency, "agrees": agrees}


def _on_white(image: Image.Image) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _reopened(image: Image.Image, channels: int) -> Image.Image:
    """Return an image as our decoder reads its file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return decode_image(file.getvalue(), channels)


def compare_pipeline(
    model: nn.Module, forward: Forward, classes: Sequence[str], sigmoid: bool, stranger: Stranger
) -> None:
    """Compare the labels and scores that the pipeline shows with those of our model on the same pixels.

    Args:
        model: a classifier, left alone.
        forward: it and its inputs, to outputs by name.
        classes: names in the order of the scores.
        sigmoid: the scores are one probability per class.
        stranger: the answer.

    Raises:
        RuntimeError: a label has another score, or one that is not shown has a higher one.
    """
    if stranger.pipeline is None:
        return
    pixels = stranger.outputs["pipeline.pixel_values"]
    with torch.no_grad():
        scores = forward(deepcopy(model).float().eval(), {"pixel_values": pixels})["logits"][0].double()
    scores = scores.sigmoid() if sigmoid or len(classes) == 1 else scores.softmax(0)
    expected = dict(zip(classes, scores.tolist(), strict=True))
    answers = stranger.pipeline["answers"]
    wrong = [
        one["label"] for one in answers if not abs(expected.get(one["label"], -1) - one["score"]) <= SCORE_TOLERANCE
    ]
    best = max(expected, key=lambda name: expected[name])
    if wrong or not answers or expected[best] - answers[0]["score"] > SCORE_TOLERANCE:
        shown = ", ".join(f"{one['label']} {one['score']:.3f}" for one in answers)
        raise RuntimeError(
            f"the pipeline shows {shown or 'nothing'} where our model says {best} {expected[best]:.3f}; the export is "
            "not kept. Please report this with the config.json of the model"
        )


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two tensors; infinite where their shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).abs().max())


def _tail(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return " | ".join(lines[-3:])[-600:] or "it said nothing"
