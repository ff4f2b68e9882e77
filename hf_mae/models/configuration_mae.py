"""The configuration: plain data, checked at construction.

Defaults are the vanilla ViT-B masked autoencoder of the paper with the official LayerNorm epsilon, 1e-6. Field names
are those of `transformers`. A `config.json` of model type `vit_mae` (facebook/vit-mae-*) is read as well.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from hf_mae.models.masking import MaskStrategy, check_masking, count_kept
from hf_mae.recipes.base import VIT_SIZES, Size
from hf_mae.resolve import locate, read_config

# What a vit_mae config means where its file says nothing, and what this model cannot express.
VIT_MAE_DEFAULTS = {"layer_norm_eps": 1e-12, "intermediate_size": 3072, "decoder_intermediate_size": 2048}
VIT_MAE_REQUIRED = {
    "qkv_bias": True,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
VIT_MAE_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
    "layer_norm_eps",
    "mask_ratio",
    "norm_pix_loss",
    "dtype",
    "torch_dtype",
)
# What a config.json has to say, as no default of a size could be told from a line that got lost.
REQUIRED = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
WHOLE_NUMBERS = (
    *("num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads", "decoder_intermediate_size"),
)
FRACTIONS = ("layer_norm_eps", "mask_ratio", "drop_path_rate", "head_init_std")


def height_width(size: Size) -> tuple[int, int]:
    """Return (height, width) of a size that is one number for a square, or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class MAEConfig(PreTrainedConfig):
    """Architecture and objective of a masked autoencoder.

    Args:
        image_size: input height and width in pixels: one number, or (height, width).
        patch_size: patch height and width in pixels; must divide the image size.
        num_channels: colour channels.
        hidden_size: encoder width.
        num_hidden_layers: encoder blocks.
        num_attention_heads: encoder heads.
        intermediate_size: encoder MLP width; None is four times the encoder width.
        decoder_hidden_size: decoder width.
        decoder_num_hidden_layers: decoder blocks.
        decoder_num_attention_heads: decoder heads.
        decoder_intermediate_size: decoder MLP width; None is four times the decoder width.
        layer_norm_eps: epsilon of every LayerNorm.
        mask_ratio: fraction of patches removed, in [0, 1).
        mask_strategy: `random`, `block` or `grid` (paper, Table 1f).
        mask_tokens_in_encoder: feed mask tokens to the encoder, as BEiT does (paper, Table 1c).
        target: what is predicted (paper, Table 1d); `pixel` today.
        norm_pix_loss: normalise each target patch by its own mean and standard deviation. False here, as in
            `ViTMAEConfig`, so that a file which does not say means raw pixels; recipes say True, as the paper's best.
        pos_embed: `sincos` for fixed 2-D positions, `learned` for trained ones.
        pool: how a classifier and `forward_features` pool tokens: `mean` of the patches, or the `cls` token.
        drop_path_rate: stochastic depth of the classifier; pretraining uses none.
        head: of the classifier: `linear`, or `batchnorm` for one with batch normalisation before it, without scale and
            shift (the official linear probe).
        head_init_std: standard deviation of the classifier's fresh head; the official values are 2e-5 on a pretrained
            encoder, 0.01 in a probe, and timm's 0.02 from scratch.
        kwargs: fields of `PreTrainedConfig`.

    Raises:
        ValueError: the values contradict each other; the message names the value, the rule and the remedy.
    """

    model_type = "hf_mae"

    def __init__(
        self,
        image_size: Size = 224,
        patch_size: Size = 16,
        num_channels: int = 3,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int | None = None,
        decoder_hidden_size: int = 512,
        decoder_num_hidden_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int | None = None,
        layer_norm_eps: float = 1e-6,
        mask_ratio: float = 0.75,
        mask_strategy: MaskStrategy = "random",
        mask_tokens_in_encoder: bool = False,
        target: Literal["pixel", "pca", "token"] = "pixel",
        norm_pix_loss: bool = False,
        pos_embed: Literal["sincos", "learned"] = "sincos",
        pool: Literal["mean", "cls"] = "mean",
        drop_path_rate: float = 0.0,
        head: Literal["linear", "batchnorm"] = "linear",
        head_init_std: float = 2e-5,
        **kwargs: Any,
    ):
        self.image_size: Size = _size("image_size", image_size)
        self.patch_size: Size = _size("patch_size", patch_size)
        self.num_channels = num_channels
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = _four_times(hidden_size) if intermediate_size is None else intermediate_size
        self.decoder_hidden_size = decoder_hidden_size
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.decoder_num_attention_heads = decoder_num_attention_heads
        self.decoder_intermediate_size = (
            _four_times(decoder_hidden_size) if decoder_intermediate_size is None else decoder_intermediate_size
        )
        self.layer_norm_eps = layer_norm_eps
        self.mask_ratio = mask_ratio
        self.mask_strategy: MaskStrategy = mask_strategy
        self.mask_tokens_in_encoder = mask_tokens_in_encoder
        self.target = target
        self.norm_pix_loss = norm_pix_loss
        self.pos_embed = pos_embed
        self.pool: Literal["mean", "cls"] = pool
        self.drop_path_rate = drop_path_rate
        self.head: Literal["linear", "batchnorm"] = head
        self.head_init_std = head_init_std
        super().__init__(**kwargs)
        self.validate_fields()

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> MAEConfig:
        """Return the configuration of a named size: `ti`, `s`, `b`, `l` or `h` (with patches of 14, as in the paper).

        Args:
            size: the name.
            overrides: any field, in place of the size's own.

        Raises:
            ValueError: no size has that name.
        """
        if size not in VIT_SIZES:
            raise ValueError(f"size={size!r} is unknown; use one of {', '.join(VIT_SIZES)}.")
        fields: dict[str, Any] = VIT_SIZES[size] | overrides
        return cls(**fields)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json` of model type `hf_mae`, or of `vit_mae` in our terms; of a run, its newest checkpoint's.

        Raises:
            ValueError: there is no such model, the file cannot be read, describes another kind of model, or lacks a
                size.
        """
        name: str | os.PathLike[str] = pretrained_model_name_or_path
        if not os.path.isfile(name):
            found = locate(name, subfolder=kwargs.get("subfolder", ""))
            if isinstance(found, Path):
                read_config(found)  # says what is wrong with it
                name, kwargs = found, {key: value for key, value in kwargs.items() if key != "subfolder"}
        values, unused = super().get_config_dict(name, **kwargs)
        shown = pretrained_model_name_or_path
        model_type = values.get("model_type")
        if model_type == "vit_mae":
            return translate_vit_mae(values), unused
        if model_type != cls.model_type:
            is_timm = {"architecture", "pretrained_cfg"} <= values.keys()
            raise ValueError(
                f"{shown} has model_type={model_type!r}, which is not a masked autoencoder; use a model of type "
                f"'hf_mae' or 'vit_mae'{', or for a plain ViT of timm `hf-mae convert`' * is_timm}."
            )
        if missing := [field for field in REQUIRED if field not in values]:
            raise ValueError(
                f"the config.json of {shown} does not say {', '.join(missing)}; add the values that its weights were "
                "trained with, or copy the file again."
            )
        return values, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from the fields of a file.

        Raises:
            ValueError: a field has a value that it cannot have.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(
                f"the config cannot be used ({type(error).__name__}: {error}); correct its fields, or copy it again."
            ) from error

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (H, W), (h, w) = height_width(self.image_size), height_width(self.patch_size)
        return H // h, W // w

    @property
    def num_patches(self) -> int:
        """L, the number of patches."""
        return self.grid[0] * self.grid[1]

    @property
    def len_keep(self) -> int:
        """Patches that stay visible; the official float truncation is kept (see `masking.count_kept`)."""
        return count_kept(self.num_patches, self.mask_ratio)

    @property
    def patch_dim(self) -> int:
        """Values in one patch: height * width * channels."""
        h, w = height_width(self.patch_size)
        return h * w * self.num_channels

    def validate_fields(self) -> None:
        """Check all fields together. Models call it again, since fields can be set after construction.

        Raises:
            ValueError: the first rule that is broken.
        """
        for name in WHOLE_NUMBERS:
            if not isinstance(value := getattr(self, name), int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a whole number; use at least 1.")
            if value < 1:
                raise ValueError(f"{name}={value} is not positive; use at least 1.")
        for name in FRACTIONS:
            if not isinstance(value := getattr(self, name), (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r} is not a number; use one, as its description says.")
        self._check_sizes()
        for prefix in ("", "decoder_"):
            width, heads = getattr(self, f"{prefix}hidden_size"), getattr(self, f"{prefix}num_attention_heads")
            if width % heads:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not a multiple of {prefix}num_attention_heads={heads}; "
                    f"use {width // heads * heads} or {(width // heads + 1) * heads}, or other heads."
                )
            if self.pos_embed == "sincos" and width % 4:
                raise ValueError(
                    f"{prefix}hidden_size={width} is not a multiple of 4, which pos_embed='sincos' needs; "
                    f"use {width // 4 * 4 or 4} or {(width // 4 + 1) * 4}, or pos_embed='learned'."
                )
        check_masking(self.mask_strategy, self.grid, self.mask_ratio)
        if self.target in ("pca", "token"):
            raise ValueError(f"target={self.target!r} is not available yet; use 'pixel', the only one in this version.")
        for name, choices in (
            ("target", ("pixel",)),
            ("pos_embed", ("sincos", "learned")),
            ("pool", ("mean", "cls")),
            ("head", ("linear", "batchnorm")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use {' or '.join(map(repr, choices))}.")
        if self.layer_norm_eps <= 0:
            raise ValueError(f"layer_norm_eps={self.layer_norm_eps} is not positive; the official value is 1e-6.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} is outside [0, 1); the paper uses 0.1 to 0.3.")
        if not 0 <= self.head_init_std < math.inf:
            raise ValueError(
                f"head_init_std={self.head_init_std} is negative or not finite; the official values are 2e-5 and, for "
                "a probe, 0.01."
            )

    def _check_sizes(self) -> None:
        for side, image, patch in zip(
            ("height", "width"), height_width(self.image_size), height_width(self.patch_size), strict=True
        ):
            if image % patch:
                choices = [str(n * patch) for n in (image // patch, image // patch + 1) if n]
                where = "" if isinstance(self.image_size, int) and isinstance(self.patch_size, int) else f"{side} "
                raise ValueError(
                    f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}; "
                    f"use {where}{' or '.join(choices)}."
                )


def _four_times(width: int) -> int:
    return 4 * width if isinstance(width, int) else width  # `validate_fields` refuses other types


def _size(name: str, size: Size) -> Size:
    sides = [size] if isinstance(size, int) else list(size) if isinstance(size, (list, tuple)) else []
    if not all(type(side) is int for side in sides):
        sides = []
    if len(sides) != (1 if isinstance(size, int) else 2) or min(sides) < 1:  # JSON has lists for tuples
        raise ValueError(f"{name}={size!r} is not a size in pixels; use one positive number, or (height, width).")
    return size if isinstance(size, int) else (sides[0], sides[1])


def translate_vit_mae(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `MAEConfig` that mean what a `vit_mae` config.json means.

    The checkpoint's own `layer_norm_eps` (1e-12 in facebook/vit-mae-*, not the official 1e-6) and `norm_pix_loss` are
    carried.

    Raises:
        ValueError: a value has no equivalent here.
    """
    for name, required in VIT_MAE_REQUIRED.items():
        if values.get(name, required) != required:
            raise ValueError(f"{name}={values[name]!r} of a vit_mae config has no equivalent; only {required!r} has.")
    return VIT_MAE_DEFAULTS | {name: values[name] for name in VIT_MAE_FIELDS if name in values}
