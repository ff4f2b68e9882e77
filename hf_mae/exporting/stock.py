"""Our models as classes of transformers: names of weights, configs in full, and what these classes cannot express.

Weights are written under the names that transformers 4 writes and every version reads: those of facebook/vit-mae-*.
# Differs from what transformers 5.23 saves: its `decoder.decoder_encoder.layer` of ViTMAE is read by no version 4.

BEiT stands for "mean of the patch tokens, then LayerNorm": with absolute positions, without layer scale and relative
positions, it is the ViT of the official fine-tuning code. It has no bias of the keys, which attention does not need: it
adds the same to all scores of a query, and the softmax takes that away.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import BeitConfig, PreTrainedConfig, ViTConfig, ViTMAEConfig

from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEPreTrainedModel

BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Parts of a block, ours and transformers'; queries, keys and values are separate there."""

HOW_TO_LOAD = {
    "ViTMAEForPreTraining": "AutoModel masks patches at random on these weights too, as ViTMAEModel always does, so it "
    "sees a part of each image only; for features export the encoder (hf-mae export MODEL OUT --target vit)",
    "ViTModel": "the pooler that AutoModel adds to ViTModel is not in these weights, so pooler_output is random; pass "
    "add_pooling_layer=False and use last_hidden_state",
}
"""What has to be known to load a stock class, by its name: an export says it, and so does its card."""

NO_KEY_BIAS = (
    "the key bias of attention is left out, as BEiT has none: it shifts every score of a query alike and cancels in "
    "the softmax"
)
BATCH_NORM = (
    "the batch normalisation before the head is folded into the head: its statistics are constants, so that both are "
    "one linear layer; the folded weights are rounded to float32 once"
)
DROP_PATH = "stochastic depth (drop_path_rate={rate:g}) belongs to training and is not carried"


MASK_TOKEN = "the mask token of the encoder is left out: it stands for hidden patches, and here none is hidden"


def drop_path(config: MAEConfig) -> list[str]:
    """Return a sentence on stochastic depth, if there is any."""
    return [DROP_PATH.format(rate=config.drop_path_rate)] if config.drop_path_rate else []


class Stock(NamedTuple):
    """A model as a class of transformers."""

    config: PreTrainedConfig
    weights: dict[str, Tensor]
    changes: list[str]
    """What differs from ours without changing an output, or is not carried: sentences."""

    @property
    def architecture(self) -> str:
        """Name of the class."""
        return cast("list[str]", self.config.architectures)[0]

    def config_json(self) -> dict[str, Any]:
        """Return every field of the config, but for names of classes where there are none."""
        values = self.config.to_dict()
        for name in ("_name_or_path", *(() if "Classification" in self.architecture else ("id2label", "label2id"))):
            values.pop(name, None)
        return values | {"dtype": "float32"}


# ------------------------------------------------------------------------------------------------ classes


def as_vit_mae(model: MAEForPreTraining) -> Stock:
    """Return a pretraining model as `ViTMAEForPreTraining`.

    Raises:
        ValueError: its options are not those of the vanilla masked autoencoder.
    """
    config = model.config
    vanilla: dict[str, Any] = {
        "mask_strategy": "random",
        "mask_tokens_in_encoder": False,
        "target": "pixel",
        "pos_embed": "sincos",
    }
    for name, value in vanilla.items():
        if (has := getattr(config, name)) != value:
            raise ValueError(
                f"{name}={has!r} cannot be told to ViTMAE, which knows {value!r} only and would ignore it; use target "
                "'hf_mae', or 'vit' for the encoder alone"
            )
    for name in ("image_size", "patch_size"):
        if _square(getattr(config, name)) is None:
            raise ValueError(
                f"{name}={getattr(config, name)} is not square, which ViTMAE needs; use target 'hf_mae', or 'vit' for "
                "the encoder alone"
            )
    stock = ViTMAEConfig(
        **_encoder_fields(config),
        qkv_bias=True,
        decoder_hidden_size=config.decoder_hidden_size,
        decoder_num_hidden_layers=config.decoder_num_hidden_layers,
        decoder_num_attention_heads=config.decoder_num_attention_heads,
        decoder_intermediate_size=config.decoder_intermediate_size,
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.norm_pix_loss,
        architectures=["ViTMAEForPreTraining"],
    )
    ours = model.state_dict()
    weights = _encoder(ours, config, "vit.") | _linear(ours, "norm", "vit.layernorm")
    for i in range(config.decoder_num_hidden_layers):
        weights |= _block(ours, f"decoder_blocks.{i}.", f"decoder.decoder_layers.{i}.")
    for name in ("mask_token", "decoder_pos_embed"):
        weights[f"decoder.{name}"] = ours[name]
    for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
        weights |= _linear(ours, name, f"decoder.{name}")
    return Stock(stock, weights, [])


def as_classifier(model: MAEForImageClassification, *, problem_type: str | None = None) -> Stock:
    """Return a classifier as `BeitForImageClassification` (pool mean) or `ViTForImageClassification` (pool cls).

    Args:
        model: with a linear head, see `fold_batch_norm`.
        problem_type: what transformers calls the loss; decides whether its pipeline shows softmax or sigmoid scores.

    Raises:
        ValueError: BEiT cannot have an image of this shape.
    """
    config, ours = model.config, model.state_dict()
    labels: dict[str, Any] = _labels(config) | {"problem_type": problem_type}
    changes = drop_path(config)
    head = _linear(ours, "head", "classifier")
    if config.pool == "cls":
        stock = ViTConfig(**_vit_fields(config), **labels, architectures=["ViTForImageClassification"])
        weights = _encoder(ours, config, "vit.") | _linear(ours, "norm", "vit.layernorm") | head
        return Stock(stock, weights, changes)
    stock = BeitConfig(**_beit_fields(config), **labels, architectures=["BeitForImageClassification"])
    weights = _encoder(ours, config, "beit.", key_bias=False)
    weights |= _linear(ours, "fc_norm", "beit.pooler.layernorm") | head
    return Stock(stock, weights, [NO_KEY_BIAS, *changes])


def as_graph(model: MAEPreTrainedModel, *, problem_type: str | None = None) -> Stock:
    """Return what stands beside a graph, which has weights and pool inside: the config of a ViT, of any shape."""
    classifies = isinstance(model, MAEForImageClassification)
    labels: dict[str, Any] = _labels(model.config) | {"problem_type": problem_type} if classifies else {}
    name = "ViTForImageClassification" if classifies else "ViTModel"
    return Stock(ViTConfig(**_vit_fields(model.config), **labels, architectures=[name]), {}, [])


def as_vit_encoder(model: MAEPreTrainedModel) -> Stock:
    """Return the encoder as `ViTModel` without a pooler: its `last_hidden_state` is ours."""
    config, ours = model.config, model.state_dict()
    stock = ViTConfig(**_vit_fields(config), architectures=["ViTModel"])
    weights = _encoder(ours, config, "") | _linear(ours, "norm", "layernorm")
    return Stock(stock, weights, left_out(model))  # no pooler, see HOW_TO_LOAD


def as_beit_encoder(model: MAEPreTrainedModel) -> Stock:
    """Return the encoder as `BeitModel` with mean pooling.

    Its `last_hidden_state` is ours before `norm`, and its `pooler_output` is `norm` of the mean of these patch tokens.
    That is not `forward_features(pool="mean")`, the mean of the patch tokens after `norm`: BEiT has no norm before its
    mean. timm's ViT has (target `timm`).

    Raises:
        ValueError: the model pools the cls token, or BEiT cannot have an image of this shape.
    """
    config, ours = model.config, model.state_dict()
    if config.pool != "mean":
        raise ValueError(
            f"pool={config.pool!r} cannot be told to BeitModel, whose pooler takes the mean of the patches; use target "
            "'vit' for tokens, or 'timm' for tokens and the cls token"
        )
    stock = BeitConfig(**_beit_fields(config), architectures=["BeitModel"])
    weights = _encoder(ours, config, "", key_bias=False) | _linear(ours, "norm", "pooler.layernorm")
    changes = [
        NO_KEY_BIAS,
        "the final norm stands behind the mean of the patch tokens: pooler_output is norm(mean(tokens)), not "
        "mean(norm(tokens)) of our forward_features, and last_hidden_state is what comes before the norm",
    ]
    return Stock(stock, weights, changes + left_out(model))


@torch.no_grad()
def fold_batch_norm(model: MAEForImageClassification) -> MAEForImageClassification:
    """Return the classifier with batch normalisation and linear layer as one linear layer, its weights in float32.

    The model itself is left alone, and returned if its head is linear.
    """
    if not isinstance(model.head, nn.Sequential):
        return model
    norm, linear = cast(nn.BatchNorm1d, model.head[0]), cast(nn.Linear, model.head[1])
    scale = (cast(Tensor, norm.running_var).double() + norm.eps).rsqrt()  # [D]
    weight = (linear.weight.double() * scale).float()
    # By the rounded weights, whose error then counts by how far a feature is from its mean, not from 0.
    bias = linear.bias.double() - weight.double() @ cast(Tensor, norm.running_mean).double()
    folded = MAEForImageClassification(MAEConfig.from_dict(model.config.to_dict() | {"head": "linear"}))
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    folded.load_state_dict(weights | {"head.weight": weight, "head.bias": bias.float()})
    return folded.eval()


# ------------------------------------------------------------------------------------------------ configs


def _encoder_fields(config: MAEConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": _plain(config.image_size),
        "patch_size": _plain(config.patch_size),
        "num_channels": config.num_channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
    }


def _vit_fields(config: MAEConfig) -> dict[str, Any]:
    return _encoder_fields(config) | {"qkv_bias": True}


def _labels(config: MAEConfig) -> dict[str, Any]:
    names = cast("dict[int, str]", config.id2label)
    return {"id2label": names, "label2id": {name: row for row, name in names.items()}}


def _beit_fields(config: MAEConfig) -> dict[str, Any]:
    if _square(config.image_size) is None:
        raise ValueError(
            f"image_size={config.image_size} is not square, which BEiT needs for its positions; use target 'timm', or "
            "square images"
        )
    return _encoder_fields(config) | {
        "use_mean_pooling": True,
        "use_absolute_position_embeddings": True,
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": False,
        "use_mask_token": False,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.0,
    }


def _square(size: Any) -> int | None:
    height, width = height_width(size)
    return height if height == width else None


def _plain(size: Any) -> int | tuple[int, int]:
    # Most readers of a square image's config expect one number.
    side = _square(size)
    return height_width(size) if side is None else side


def left_out(model: MAEPreTrainedModel) -> list[str]:
    """Return what an encoder alone does not have of a model: sentences."""
    left = ["the decoder is left out"] if isinstance(model, MAEForPreTraining) else []
    return [*left, MASK_TOKEN] if model.config.mask_tokens_in_encoder else left


# ------------------------------------------------------------------------------------------------ weights


def _encoder(ours: Mapping[str, Tensor], config: MAEConfig, prefix: str, *, key_bias: bool = True) -> dict[str, Tensor]:
    """Return embeddings and blocks under transformers' names."""
    weights = {
        f"{prefix}embeddings.cls_token": ours["cls_token"],
        f"{prefix}embeddings.position_embeddings": ours["pos_embed"],
    }
    weights |= _linear(ours, "patch_embed.proj", f"{prefix}embeddings.patch_embeddings.projection")
    for i in range(config.num_hidden_layers):
        weights |= _block(ours, f"blocks.{i}.", f"{prefix}encoder.layer.{i}.", key_bias=key_bias)
    return weights


def _block(ours: Mapping[str, Tensor], name: str, stock: str, *, key_bias: bool = True) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        parts = ours[f"{name}attn.qkv.{kind}"].chunk(3)
        for part, tensor in zip(("query", "key", "value"), parts, strict=True):
            weights[f"{stock}attention.attention.{part}.{kind}"] = tensor
    if not key_bias:
        del weights[f"{stock}attention.attention.key.bias"]
    for part, theirs in BLOCK.items():
        weights |= _linear(ours, name + part, stock + theirs)
    return weights


def _linear(ours: Mapping[str, Tensor], name: str, stock: str) -> dict[str, Tensor]:
    return {f"{stock}.{kind}": ours[f"{name}.{kind}"] for kind in ("weight", "bias")}
