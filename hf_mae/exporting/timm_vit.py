"""Our ViTs as timm's VisionTransformer, whose names of weights are ours, and timm's own models written anew.

A classifier has the pool of ours. An encoder has no classes: `forward_features` gives its tokens after `norm`, and
calling it gives `forward_features(pool=config.pool)` of ours, the cls token or the mean of the patch tokens after
`norm`. So it is the one stock class that gives both exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hf_mae.exporting.stock import drop_path, left_out
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEPreTrainedModel
from hf_mae.models.timm_models import TimmSpec, write_timm_folder
from hf_mae.recipes.base import VIT_SIZES
from hf_mae.recipes.crop import EvalCrop, read_crop

TIMM_EPS = 1e-6
"""Of every LayerNorm in timm's ViT; no argument of a config.json changes it."""
NAMES = {"ti": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge"}


def as_timm(model: MAEPreTrainedModel, folder: Path, processor: dict[str, Any], *, bce: bool = False) -> list[str]:
    """Write a ViT of ours as a timm folder.

    Args:
        model: a classifier with a linear head, or a model with an encoder, which alone is written.
        folder: created if need be.
        processor: mean and std of the images, `image_mean` and `image_std`; size and crop if they are not the rule.
        bce: the scores were trained for binary cross-entropy.

    Returns:
        What is not carried: sentences.

    Raises:
        ValueError: timm's ViT cannot express an option.
    """
    config = model.config
    if config.layer_norm_eps != TIMM_EPS:
        raise ValueError(
            f"layer_norm_eps={config.layer_norm_eps} cannot be told to timm, whose ViT has {TIMM_EPS}; use target "
            "'vit', 'beit' or 'vit_mae'"
        )
    classifier = isinstance(model, MAEForImageClassification)
    size, labels = height_width(config.image_size), cast("dict[int, str]", config.id2label)
    crop = _crop(processor, size)
    spec = TimmSpec(
        architecture=_architecture(config),
        names=tuple(labels[row] for row in range(len(labels))) if classifier else (),
        image_size=size,
        test_image_size=size,
        crop_pct=crop.crop_pct,
        crop_mode=crop.crop_mode,
        channels=config.num_channels,
        drop_path_rate=0.0,
        mean=tuple(processor["image_mean"]),
        std=tuple(processor["image_std"]),
        loss="bce" if bce else "ce",
        pixel_range=tuple(processor["pixel_range"]) if processor.get("pixel_range") else None,
        model_args={
            "embed_dim": config.hidden_size,
            "depth": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": _mlp_ratio(config),
            "patch_size": _listed(config.patch_size),
            "global_pool": "avg" if config.pool == "mean" else "token",
            # A norm behind the mean, in place of the one before it, is what fine-tuning has and an encoder has not.
            "fc_norm": classifier and config.pool == "mean",
        },
    )
    decoder = ("decoder_", "mask_token", "encoder_mask_")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(decoder)}
    write_timm_folder(folder, spec, weights)
    return drop_path(config) if classifier else left_out(model)


def _crop(processor: Mapping[str, Any], size: tuple[int, int]) -> EvalCrop:
    """Return how pictures are prepared, by the default where the processor does not say.

    Raises:
        ValueError: the processor prepares pictures as timm does not.
    """
    if "size" not in processor:
        return EvalCrop(size)
    try:
        return read_crop(processor, size)
    except ValueError as error:
        raise ValueError(f"{error}: that cannot be told to timm; leave it out, or use target 'vit' or 'beit'") from None


def _architecture(config: MAEConfig) -> str:
    """Return timm's name of this size, or of the base size, whose arguments the folder overrides."""
    fields = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    fit = [n for n, known in VIT_SIZES.items() if all(known[f] == getattr(config, f) for f in fields)]
    name = fit[0] if fit else "b"
    return f"vit_{NAMES[name]}_patch{VIT_SIZES[name].get('patch_size', 16)}_224"


def _mlp_ratio(config: MAEConfig) -> float:
    # timm cuts the product down to a whole number, which half a unit more keeps from being one too few.
    ratio = config.intermediate_size / config.hidden_size
    exact = int(config.hidden_size * ratio) == config.intermediate_size
    return ratio if exact else (config.intermediate_size + 0.5) / config.hidden_size


def _listed(size: Any) -> int | list[int]:
    height, width = height_width(size)
    return height if height == width else [height, width]
