"""What a stock class is asked for, and how we answer the same ourselves."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hf_mae.exporting.parity import Forward, Outputs, Request
from hf_mae.exporting.source import STOCK, Target
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEPreTrainedModel
from hf_mae.recipes.fields import unknown


def question(model: nn.Module, target: Target, channels: int) -> tuple[Request, Forward, str]:
    """Return what a stranger is asked, how we answer it ourselves, and what that is in words.

    Args:
        model: one of our classes, or a classifier of timm.
        target: a stock one.
        channels: of the images.

    Raises:
        ValueError: no stock class reads the target.
    """
    if target not in STOCK:
        raise unknown("target", target, STOCK)
    library = "timm" if target == "timm" else "transformers"
    pipelines = channels == 3  # they read every picture in colour
    if isinstance(model, MAEForImageClassification) or not isinstance(model, MAEPreTrainedModel):
        task = "image-classification" if pipelines else None
        request = Request(library, "AutoModelForImageClassification", ("logits",), {}, task)
        return request, logits, "logits"
    if target == "vit_mae":
        request = Request(library, "AutoModelForPreTraining", ("loss", "logits", "mask"), {}, None)
        return request, reconstruction, "loss, predicted patches and mask, under the same noise"
    task = "image-feature-extraction" if pipelines else None
    if target == "vit":
        request = Request(library, "AutoModel", ("last_hidden_state",), {"add_pooling_layer": False}, task)
        return request, tokens, "last_hidden_state, all tokens after the final norm"
    request = Request(library, "AutoModel", ("last_hidden_state", "pooler_output"), {}, task)
    if target == "beit":
        return request, _norm_after_mean, "last_hidden_state before the final norm; pooler_output, the norm of its mean"
    return request, tokens, "last_hidden_state after the final norm; pooler_output, our forward_features"


def noise(pixels: Tensor, model: MAEPreTrainedModel) -> Tensor:
    """Return noise for the mask of these images, the same every time."""
    return torch.rand(len(pixels), model.config.num_patches, generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, inputs: Outputs) -> Outputs:
    """Return the scores of a classifier of ours or of timm."""
    out = model(inputs["pixel_values"])
    return {"logits": out if isinstance(out, Tensor) else out.logits}


def reconstruction(model: nn.Module, inputs: Outputs) -> Outputs:
    """Return loss, prediction (`logits` in transformers) and mask."""
    out = model(**inputs)
    return {"loss": out.loss, "logits": out.pred, "mask": out.mask}


def tokens(model: nn.Module, inputs: Outputs) -> Outputs:
    """Return the tokens after the final norm, and `forward_features`."""
    encoder = cast(MAEPreTrainedModel, model)
    pixels = inputs["pixel_values"]
    return {"last_hidden_state": _encode(encoder, pixels)[1], "pooler_output": encoder.forward_features(pixels)}


def _norm_after_mean(model: nn.Module, inputs: Outputs) -> Outputs:
    encoder = cast(MAEPreTrainedModel, model)
    last = _encode(encoder, inputs["pixel_values"])[0]
    return {"last_hidden_state": last, "pooler_output": encoder.norm(last[:, 1:].mean(dim=1))}


def _encode(model: MAEPreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens before and after the final norm."""
    pos_embed = model.positions(model.pos_embed, model.grid_of(pixels), None)
    out = model.encode(model.patchify(pixels), pos_embed, output_hidden_states=True)
    return cast("tuple[Tensor, ...]", out.hidden_states)[-1], cast(Tensor, out.last_hidden_state)
