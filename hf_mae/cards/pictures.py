"""The pictures of a card, drawn from the records or from pictures the author gives; none is of the training data.

Only with `run_pictures` are those of the run shown, which are of its training or test images.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from hf_mae.cards.options import CardOptions
from hf_mae.cards.records import Records
from hf_mae.data.images import crop_center, decode_image, to_array
from hf_mae.evaluation.charts import BLUE, bare, draw_learning, save
from hf_mae.evaluation.class_charts import draw_confusion, draw_per_class, draw_reliability
from hf_mae.evaluation.classification import Bin, ClassResults, Mistake
from hf_mae.evaluation.reconstruction import draw_grid, fixed_noise, reconstruct
from hf_mae.models.configuration_mae import height_width
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.recipes.crop import stated_crop

MAX_SIDE = 1024
"""Pixels of a published sample."""
MAX_SAMPLES = 8


@dataclass(frozen=True)
class Picture:
    """A picture of the card: its path in the repository, and what it shows."""

    path: str
    caption: str


def copy_samples(folder: Path, samples: Sequence[Path]) -> list[str]:
    """Copy the author's pictures to samples/, upright, without metadata (a camera writes where it stood) and not large.

    Args:
        folder: of a new card; samples/ is made in it.
        samples: image files.

    Returns:
        Their paths in the repository.

    Raises:
        ValueError: a picture cannot be read, two have the same name, or there are too many.
    """
    if len(samples) > MAX_SAMPLES:
        raise ValueError(f"sample has {len(samples)} pictures; give at most {MAX_SAMPLES}")
    paths: list[str] = []
    for sample in samples:
        stem = "".join(c if c.isascii() and c.isalnum() else "_" for c in sample.stem) or "sample"
        path = f"samples/{stem}.jpg"
        if path in paths:
            raise ValueError(f"sample has two pictures named {sample.stem}; rename one")
        try:
            with Image.open(sample) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except OSError as error:
            raise ValueError(f"sample={sample} cannot be read as a picture ({error}); name another") from error
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        (folder / "samples").mkdir(exist_ok=True)
        picture.save(folder / path, quality=92)
        paths.append(path)
    return paths


def draw_pictures(
    folder: Path, records: Records, options: CardOptions, samples: Sequence[str], run: Path | None
) -> list[Picture]:
    """Draw what the records give into pictures/ of a folder.

    Args:
        folder: of a new card; pictures/ is made in it, and samples/ is there.
        records: of the export.
        options: of the author.
        samples: paths of the author's pictures in `folder`.
        run: its run folder, for the pictures of the run.
    """
    drawn: list[Picture] = []

    def add(name: str, caption: str) -> Path:
        (folder / "pictures").mkdir(exist_ok=True)
        drawn.append(Picture(f"pictures/{name}", caption))
        return folder / "pictures" / name

    if samples and records.export["class"] in ("ViTMAEForPreTraining", "MAEForPreTraining"):
        path = add(
            "reconstruction.png", "Reconstruction of pictures that the author gave; the seed of the mask is fixed."
        )
        _draw_reconstruction(records, [folder / s for s in samples], path)
    if any(row.get("loss") is not None for row in records.rows):
        _draw_learning(records, add("learning.png", "Training loss, and what was measured on the way."))
    if (results := _class_results(records)) is not None:
        names = records.evaluation["classes"]
        if results.confusion is not None:
            draw_confusion(results, names, add("confusion.png", "Which class is taken for which."))
        draw_per_class(results, names, add("per_class.png", "Accuracy of each class."))
        draw_reliability(results, add("reliability.png", "Confidence against accuracy."))
    if options.run_pictures and run is not None:
        for source, caption in _of_run(run):
            shutil.copyfile(source, add(f"run_{source.name}", caption))
    return drawn


def _draw_learning(records: Records, path: Path) -> None:
    names = ("top1", "knn_accuracy", "probe_accuracy")
    name = next((n for n in names if any(row.get(n) is not None for row in records.rows)), None)
    if name is not None:
        draw_learning({records.recipe["name"]: records.rows}, path, name=name)
        return
    fig = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = fig.add_subplot()
    points = [(row["epoch"], row["loss"]) for row in records.rows if row.get("loss") is not None]
    ax.plot([e for e, _ in points], [v for _, v in points], color=BLUE, linewidth=1)
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss")
    ax.grid(axis="y", color="0.9")
    bare(ax)
    save(fig, path)


def _draw_reconstruction(records: Records, samples: Sequence[Path], path: Path) -> None:
    model = MAEForPreTraining.from_pretrained(records.folder).eval()
    size = height_width(model.config.image_size)
    crop = stated_crop(records.preprocessing, size, say=lambda _: None)  # the export has said it
    stated = records.preprocessing.get("pixel_range")
    limits = None if stated is None else (float(stated[0]), float(stated[1]))
    opened = [decode_image(s.read_bytes(), model.config.num_channels, pixel_range=limits) for s in samples]
    arrays = [to_array(crop_center(image, crop)) for image in opened]
    images = torch.stack([torch.from_numpy(array.copy()) for array in arrays])  # [N, C, H, W]
    noise = fixed_noise(model.config, len(images), seed=0)
    mean, std = records.preprocessing["image_mean"], records.preprocessing["image_std"]
    draw_grid(reconstruct(model, images, noise=noise, mean=mean, std=std), path)


def _class_results(records: Records) -> ClassResults | None:
    """Rebuild the results per class, if the last evaluation of the run is of the exported weights."""
    source = records.source
    if not records.evaluation or records.evaluation.get("step") != source["step"]:
        return None
    best = str(records.best.get("metric", "")).startswith("ema_")
    block: dict[str, Any] | None = records.evaluation.get(
        "ema" if source["weights"] == "average" or (source["weights"] == "best" and best) else "weights"
    )
    if not block:
        return None
    count = len(records.evaluation["classes"])
    confusion = None
    if block["confusion"] is not None:
        confusion = torch.zeros(count, count, dtype=torch.int64)
        for true, predicted, n in block["confusion"]:
            confusion[true, predicted] = n
    accuracy = [float("nan") if a is None else a for a in block["per_class_accuracy"]]
    return ClassResults(
        examples=block["examples"],
        top1=block["top1"],
        top5=block["top5"],
        loss=block["loss"],
        ece=block["ece"],
        per_class_accuracy=torch.tensor(accuracy, dtype=torch.float64),
        class_examples=torch.tensor(block["class_examples"], dtype=torch.int64),
        confusion=confusion,
        bins=tuple(Bin(**b) for b in block["bins"]),
        worst=tuple(Mistake(**m) for m in block["worst"]),
    )


def _of_run(run: Path) -> list[tuple[Path, str]]:
    found: list[tuple[Path, str]] = []
    if steps := sorted((run / "pictures").glob("step_*.png")):
        found.append((steps[-1], "Reconstructions of the run's own images, at its end."))
    for name, caption in (
        ("worst.png", "The most confident mistakes."),
        ("attention.png", "Where the class token looks."),
    ):
        if (path := run / "pictures" / name).is_file():
            found.append((path, caption))
    return found
