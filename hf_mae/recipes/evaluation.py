"""What an evaluation is: a classifier, labelled images, and how their classes belong together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hf_mae.recipes.base import Data, Engine, Size


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A whole evaluation."""

    name: str
    source: str
    """Where the protocol comes from."""
    expected: str
    """What the paper reports, or "not published"."""
    model: str = ""
    """The classifier: a run folder (its newest checkpoint), a model folder (RUN/best/model; of ours or in timm's
    format), a Hub id, a name of timm's weights (`resnet50.a1_in1k`), or a .pth file of the official code of MAE."""
    out: str = ""
    """Where the numbers and pictures are written; empty is runs/evaluate-PRESET-MODEL."""
    classes: Literal["names", "imagenet", "imagenet-a", "imagenet-r"] = "names"
    """How classes of data and model belong together: by name; or both are ImageNet's thousand, of which ImageNet-A and
    -R use two hundred each, the model's other logits being left out."""
    labels: Literal["single", "real"] = "single"
    """One label for each image, or the sets of "ImageNet ReaL" (Beyer et al. 2020), found by file name."""
    corruptions: bool = False
    """The data path holds CORRUPTION/SEVERITY/ folders (ImageNet-C): report the mean corruption error."""
    image_size: Size | None = None
    """Input height and width in pixels; None is the model's own for tests. Positions are resized (bicubic)."""
    crop_pct: float | None = None
    """Share of the resized image that the centre crop keeps; None is the model's own: what its folder states, or the
    official rule (224/256 up to 224 pixels, 1 above; 1 for inputs that are not square)."""
    csv: str = ""
    """Append a row to this file, in the form of timm's results files: one file for each set of test images."""
    batch: int = 64
    """Images per process and forward pass."""
    num_workers: int = 2
    """Decoders per process."""
    pictures: bool = True
    """Draw confusion matrix, worst mistakes, attention maps and accuracy per class."""
    data: Data = field(default_factory=Data)
    engine: Engine = field(default_factory=Engine)


def _imagenet(
    name: str, source: str, table_13: tuple[float, ...] | None, what: str = "", **fields: object
) -> Evaluation:
    expected = "not published"
    if table_13:
        sizes = zip(("B", "L", "H", "H at 448"), table_13, strict=True)
        expected = f"paper, Table 13, MAE {what}: " + ", ".join(f"{size} {value} %" for size, value in sizes)
    values: dict[str, object] = {"classes": "imagenet"} | fields
    return Evaluation(name=name, source=source, expected=expected, **values)  # type: ignore[arg-type]


EVALUATIONS: dict[str, Evaluation] = {
    recipe.name: recipe
    for recipe in [
        Evaluation(name="own", source="your labelled images", expected="depends on the data"),
        Evaluation(
            name="imagenet",
            source="Russakovsky et al. 2015, validation split",
            expected="paper, Table 3, MAE: B 83.6 %, L 85.9 %, H 86.9 %, H at 448 87.8 %",
            classes="imagenet",
            data=Data(path="ILSVRC/imagenet-1k", split="validation"),
        ),
        Evaluation(
            name="imagenet-real",
            source="Beyer et al. 2020 (labels from timm); the validation split, with its file names",
            expected="not published",
            classes="imagenet",
            labels="real",
            data=Data(path="ILSVRC/imagenet-1k", split="validation"),
        ),
        _imagenet("imagenet-v2", "Recht et al. 2019, folders 0 .. 999", None),
        _imagenet(
            "imagenet-a", "Hendrycks et al. 2021, 200 classes", (35.9, 57.1, 68.2, 76.7), "top-1", classes="imagenet-a"
        ),
        _imagenet(
            "imagenet-r", "Hendrycks et al. 2021, 200 classes", (48.3, 59.9, 64.4, 66.5), "top-1", classes="imagenet-r"
        ),
        _imagenet("imagenet-sketch", "Wang et al. 2019", (34.5, 45.3, 49.6, 50.9), "top-1"),
        _imagenet(
            "imagenet-c",
            "Hendrycks & Dietterich 2019; errors relative to AlexNet's",
            (51.7, 41.8, 33.8, 36.8),
            "mCE (lower is better)",
            corruptions=True,
        ),
    ]
}
"""Presets of `hf-mae evaluate`."""
