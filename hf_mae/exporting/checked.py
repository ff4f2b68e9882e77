"""A folder of a stock class: written, then loaded and run by a process that does not know us."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_mae.exporting.files import write_json
from hf_mae.exporting.parity import (
    PIXEL_TOLERANCE,
    TOLERANCE,
    Outputs,
    compare,
    compare_pipeline,
    compare_processor,
    decoded,
    example_pixels,
    largest_difference,
    ours,
    prepare,
    run_stock,
    trial_images,
)
from hf_mae.exporting.questions import noise, question
from hf_mae.exporting.source import MULTI_LABEL, STOCK, Source, Target
from hf_mae.exporting.stock import (
    BATCH_NORM,
    Stock,
    as_beit_encoder,
    as_classifier,
    as_vit_encoder,
    as_vit_mae,
    fold_batch_norm,
)
from hf_mae.exporting.telling import Say
from hf_mae.exporting.timm_vit import as_timm
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEPreTrainedModel
from hf_mae.models.timm_models import write_timm_folder
from hf_mae.recipes.fields import unknown

FOLDING_TOLERANCE = 1e-4
"""Largest move of a logit by rounding the weights of a folded head to float32, in float64; relative above 1."""


def write_stock(source: Source, target: Target, folder: Path, picture: Path, say: Say) -> dict[str, Any]:
    """Write the files of a stock class, check them, and return their part of export.json.

    Raises:
        ValueError: the target cannot express the model.
        RuntimeError: the folder cannot be loaded, or computes something else.
    """
    model, changes = source.model, []
    if isinstance(model, MAEForImageClassification) and model.config.head == "batchnorm":
        model, changes = fold_batch_norm(model), [BATCH_NORM]
    if target == "timm":
        name, extra = _write_timm(source, model, folder)
    else:
        stock = _stock(model, target, source.bce)
        name, extra = stock.architecture, stock.changes
        _write_transformers(stock, folder, source.processor)
    library = "timm" if target == "timm" else "transformers"
    request, forward, what = question(model, target, source.channels)

    image = decoded(picture, source.channels)
    mean, std = source.processor["image_mean"], source.processor["image_std"]
    pixels = example_pixels(prepare(image, source.crop), mean, std)
    inputs: Outputs = {"pixel_values": pixels}
    if target == "vit_mae":
        inputs["noise"] = noise(pixels, cast(MAEPreTrainedModel, model))
    mine = ours(model, forward, inputs)
    images = trial_images(image, source.crop, converts=library == "transformers" and source.channels == 3)
    stranger = run_stock(folder, request, inputs, picture, images)
    parity: dict[str, Any] = dict(compare(mine, stranger))
    if model is not source.model:
        parity["folding"] = _check_folding(ours(source.model, forward, inputs), mine)
    parity |= {"images": len(pixels), "what": what, "tolerance": _tolerances("folding" in parity)}
    if source.classes is not None:
        compare_pipeline(model, forward, source.classes, sigmoid=source.bce, stranger=stranger)
    seen = {name.removeprefix("processor."): pixels for name, pixels in stranger.outputs.items()}
    processor, notes = judge_processor(images, library, seen, source, say)
    changes += notes
    if source.channels != 3:
        say(
            "the stock pipelines read pictures in colour and this model takes grey ones, so that they, and the Hub's "
            "widget, cannot show it"
        )
    return {
        "class": name,
        "library": library,
        "task": request.pipeline,
        "parity": parity,
        "processor": processor,
        "pipeline": None
        if stranger.pipeline is None
        else {"task": request.pipeline, "picture": picture.name, **stranger.pipeline},
        "changes": [*changes, *extra],
        "versions": stranger.versions,
    }


def _stock(model: nn.Module, target: Target, bce: bool) -> Stock:
    ours = cast(MAEPreTrainedModel, model)
    if isinstance(ours, MAEForImageClassification):
        return as_classifier(ours, problem_type=MULTI_LABEL if bce else None)
    if target == "vit_mae":
        return as_vit_mae(cast(MAEForPreTraining, ours))
    if target == "vit":
        return as_vit_encoder(ours)
    if target == "beit":
        return as_beit_encoder(ours)
    raise unknown("target", target, STOCK)


def _write_transformers(stock: Stock, folder: Path, processor: Mapping[str, Any]) -> None:
    write_json(folder / "config.json", stock.config_json())
    write_json(folder / "preprocessor_config.json", processor)
    # Copies, since queries, keys and values share the memory of one tensor of ours.
    weights = {name: tensor.detach().clone() for name, tensor in stock.weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_timm(source: Source, model: nn.Module, folder: Path) -> tuple[str, list[str]]:
    if source.spec is None:
        changes = as_timm(cast(MAEPreTrainedModel, model), folder, source.processor, bce=source.bce)
    else:
        write_timm_folder(folder, source.spec, model.state_dict())
        changes = []
    return json.loads((folder / "config.json").read_text())["architecture"], changes


def _check_folding(unfolded: Outputs, folded: Outputs) -> float:
    """Return how far rounding the folded head to float32 moved the logits."""
    expected, found = unfolded["float64.logits"], folded["float64.logits"]
    difference, limit = largest_difference(expected, found), FOLDING_TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise RuntimeError(
            f"folding the batch normalisation into the head moves the logits by {difference:.3g}, more than "
            f"{limit:.3g}: a feature hardly varies (running_var near 0), and float32 cannot hold its folded weights. "
            "The export is not kept; use target 'hf_mae'"
        )
    return difference


def _tolerances(folded: bool) -> dict[str, Any]:
    relative = "absolute up to 1, then relative to the largest output"
    return TOLERANCE | ({"folding": FOLDING_TOLERANCE} if folded else {}) | {"of": relative}


def judge_processor(
    images: list[Image.Image], library: str, theirs: Mapping[str, Tensor], source: Source, say: Say
) -> tuple[dict[str, Any], list[str]]:
    """Compare the image processor with our evaluation.

    Returns:
        What `compare_processor` found, and what is to be known: sentences, which are said as well.

    Raises:
        RuntimeError: they differ, and the processor is not one that the user gave.
    """
    mean, std = source.processor["image_mean"], source.processor["image_std"]
    found = compare_processor(images, theirs, library, source.crop, mean, std)
    if found["agrees"]:
        return found, []
    largest = max(value for name in PIXEL_TOLERANCE[library] if (value := found[name]) is not None)
    what = (
        f"images prepared by the image processor of the folder differ from those of our evaluation "
        f"({source.crop.words()}) by up to {largest:.2g} of the range of a pixel"
    )
    if not source.given:
        raise RuntimeError(f"{what}; the export is not kept. Please report this with the versions of {library}")
    note = f"{what}; it was given: the accuracy may differ from what was measured"
    say(f"warning: {note}")
    return found, [note]
