"""How the pictures of a model are prepared: every field of transformers' BitImageProcessor, nothing implied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_mae.exporting.telling import Say
from hf_mae.models.configuration_mae import height_width
from hf_mae.models.modeling_mae import MAEPreTrainedModel
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD
from hf_mae.recipes.crop import EvalCrop, stated_crop
from hf_mae.training.tasks import EncoderTask

CARRIED = ("image_mean", "image_std", "do_convert_rgb", "pixel_range")
"""Fields of an image processor of ours that a model folder may set otherwise, beside those of `EvalCrop`."""


def evaluation_processor(model: MAEPreTrainedModel, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return our evaluation transform, with what is stated of it; ImageNet's mean and std unless they are."""
    # Not as float32 has them.
    exact = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)} | dict(stated)
    return EncoderTask(model, exact["image_mean"], exact["image_std"]).processor() | exact


def read_processor(
    model: MAEPreTrainedModel, written: dict[str, Any] | None, given: Mapping[str, Any] | None, say: Say
) -> tuple[dict[str, Any], EvalCrop]:
    """Return the image processor in full: ours for this size, with what the folder says, with what the user says.

    And how our evaluation crops this model, whatever the user says.

    Args:
        model: says size and channels.
        written: what its folder says, if anything.
        given: what the user says.
        say: takes lines for the user.

    Raises:
        ValueError: a field is unknown, or does not fit the channels.
    """
    channels, crop = model.config.num_channels, EvalCrop(height_width(model.config.image_size))
    processor = evaluation_processor(model, {})
    check_channels("num_channels", channels)
    if written is not None and written.get("image_processor_type") == "BitImageProcessor":
        crop = stated_crop(written, crop.size, say)
        processor |= {name: written[name] for name in CARRIED if name in written} | crop.processor()
        if stated := written.get("pixel_range"):
            say(
                f"warning: the model was trained with --data.pixel-range {stated[0]:g} {stated[1]:g}; "
                "preprocessor_config.json says so, and stock image processors and pipelines do not apply it: give them "
                "8-bit images made by hf_mae.data.images.decode_image(data, pixel_range=...)"
            )
    elif written is not None and {"image_mean", "image_std"} <= written.keys():
        processor |= {name: written[name] for name in ("image_mean", "image_std")}
        say(
            "of preprocessor_config.json only mean and std are taken; pictures are resized and cropped as in our "
            "evaluation"
        )
    elif channels == 3 and not {"image_mean", "image_std"} <= (given or {}).keys():
        say("the model does not say how its pictures are normalised: ImageNet's mean and std are written")
    if given is not None and (unknown := sorted(given.keys() - processor.keys())):
        raise ValueError(
            f"processor has the field{'s' * (len(unknown) > 1)} {', '.join(unknown)}, which BitImageProcessor has not; "
            f"use {', '.join(processor)}"
        )
    processor |= given or {}
    check_statistics(processor, channels)
    return processor, crop


def check_channels(name: str, channels: int) -> None:
    """Refuse what no picture is decoded to.

    Raises:
        ValueError: it is neither one channel nor three.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"{name}={channels} cannot be exported: pictures are read as grey (1 channel) or in colour (3), and no "
            "image processor makes other inputs; export models of 1 or 3 channels"
        )


def check_statistics(processor: Mapping[str, Any], channels: int) -> None:
    """Refuse mean and std of another number of channels.

    Raises:
        ValueError: there is not one value per channel.
    """
    for name in ("image_mean", "image_std"):
        if len(processor[name]) != channels:
            raise ValueError(
                f"{name}={processor[name]} does not fit num_channels={channels}; pass {channels} value"
                f"{'s' * (channels > 1)} (processor={{'{name}': [...]}}, or --{name.replace('_', '-')})"
            )
