"""The implementations that are compared, and that they compute the same thing.

What each variant is. All have the same sizes, batch, weights in float32 and normalised-pixel loss.

`official`            a checkout of facebookresearch/mae (--official), as released: attention step by step, as in the
                      timm of its time; AdamW as torch chooses (a loop on the CPU); and the gradient norm and the loss
                      read at every step, as its training script does. Changed here, not there: timm's Block no longer
                      takes qk_scale, numpy no longer has np.float.
`official-best`       today's timm attention (SDPA) and fused AdamW, nothing read.
`transformers`        ViTMAEForPreTraining (SDPA) as its Trainer runs it: fused AdamW, gradients clipped to 1.
`transformers-best`   without the clipping. transformers 5 starts from zero positions; here they are sine-cosine.
`lightly`             MaskedVisionTransformerTIMM and MAEDecoderTIMM put together as in its documentation (SDPA), AdamW
                      as torch chooses.
`lightly-best`        fused AdamW.
`ours`                as `hf_mae.pretrain` builds it: the task, fused AdamW, freed memory kept (glibc).
`ours-plain-memory`   glibc's own settings.
A name followed by +compile compiles each transformer block, by +bf16 computes the loss under autocast to bfloat16.

Others are given float images, normalised beforehand; ours starts from uint8. That is to their advantage.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn

LR, BETAS, WEIGHT_DECAY = 1.5e-4, (0.9, 0.95), 0.05
TOLERANCE = 1e-5
OUR_NAMES = ("ours", "ours-gelu-again", "ours-plain-memory")
PEERS = ("official", "official-best", "transformers", "transformers-best", "lightly", "lightly-best")


@dataclass(frozen=True)
class Sizes:
    """A masked autoencoder, in numbers."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    batch: int
    """Used unless another is asked for."""
    mask_ratio: float = 0.75
    mask_tokens_in_encoder: bool = False

    @property
    def patches(self) -> int:
        """L."""
        return (self.image // self.patch) ** 2

    @property
    def kept(self) -> int:
        """Visible patches."""
        return int(self.patches * (1 - self.mask_ratio))

    @property
    def patch_dim(self) -> int:
        """Values of a patch of three channels."""
        return 3 * self.patch**2


CONFIGS = {
    "small": Sizes(32, 4, 192, 12, 3, 128, 4, 4, batch=64),
    "vit-b": Sizes(224, 16, 768, 12, 12, 512, 8, 16, batch=4),
    "micro": Sizes(32, 8, 64, 2, 2, 32, 1, 2, batch=4),  # for the tests
}


# ------------------------------------------------------------------------------------------------ FLOPs


def forward_flops(sizes: Sizes) -> int:
    """Return the FLOPs of one image's forward pass in the official model: 2 per multiply-add of a matrix product."""
    L, D, E, P = sizes.patches, sizes.width, sizes.decoder_width, sizes.patch_dim
    seen = L if sizes.mask_tokens_in_encoder else sizes.kept
    encoder = embedding_flops(sizes) + sizes.depth * block_flops(1 + seen, D)
    decoder = 2 * (1 + seen) * D * E + sizes.decoder_depth * block_flops(1 + L, E) + 2 * (1 + L) * E * P
    return encoder + decoder


def step_flops(sizes: Sizes) -> int:
    """Return the FLOPs of forward and backward pass; images have no gradient, all else costs twice its forward."""
    return 3 * forward_flops(sizes) - embedding_flops(sizes)


def embedding_flops(sizes: Sizes) -> int:
    """Return the FLOPs of embedding every patch, as the official model does before it drops most of them."""
    return 2 * sizes.patches * sizes.patch_dim * sizes.width


def block_flops(tokens: int, width: int) -> int:
    """Return the FLOPs of one block: 12 width^2 weights per token, and attention's two products."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


# ------------------------------------------------------------------------------------------------ the variants


@dataclass
class Method:
    """An implementation, ready to train."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor | None], Tensor]
    """Of images (uint8 for ours, normalised floats for others) and noise [N, L]; without noise it draws a mask."""
    optimizer: torch.optim.Optimizer
    uint8: bool = False
    before_update: Callable[[Tensor], object] = lambda loss: None
    """What a training script does between backward pass and update."""


def adamw(model: nn.Module, *, fused: bool, grouped: bool = True) -> torch.optim.AdamW:
    """Build torch's AdamW; not fused means what torch chooses itself. Groups: vectors are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
    ]
    chosen: Any = groups if grouped else parameters
    return torch.optim.AdamW(chosen, LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True if fused else None)


def official(sizes: Sizes, checkout: str, *, best: bool) -> Method:
    """The official code, imported from a checkout of it."""
    import numpy as np
    from timm.layers import config as timm_layers
    from timm.models.vision_transformer import Block

    timm_layers.set_fused_attn(best)
    sys.path.insert(0, checkout)
    import models_mae  # pyright: ignore[reportMissingImports]

    def block(*arguments: Any, qk_scale: None = None, **keywords: Any) -> nn.Module:
        return Block(*arguments, **keywords)

    with mock.patch.object(models_mae, "Block", block), mock.patch.object(np, "float", float, create=True):
        model = models_mae.MaskedAutoencoderViT(
            img_size=sizes.image,
            patch_size=sizes.patch,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            decoder_embed_dim=sizes.decoder_width,
            decoder_depth=sizes.decoder_depth,
            decoder_num_heads=sizes.decoder_heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            norm_pix_loss=True,
        )

    def loss(images: Tensor, noise: Tensor | None) -> Tensor:
        given = nullcontext() if noise is None else mock.patch.object(torch, "rand", return_value=noise)
        with given:
            return model(images, sizes.mask_ratio)[0]

    def read(loss: Tensor) -> None:
        loss.item()
        torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()

    return Method(model, loss, adamw(model, fused=best), before_update=(lambda loss: None) if best else read)


def vit_mae_config(sizes: Sizes, **changes: Any) -> Any:
    """Return transformers' configuration of these sizes."""
    from transformers import ViTMAEConfig

    return ViTMAEConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        decoder_hidden_size=sizes.decoder_width,
        decoder_num_hidden_layers=sizes.decoder_depth,
        decoder_num_attention_heads=sizes.decoder_heads,
        decoder_intermediate_size=4 * sizes.decoder_width,
        layer_norm_eps=1e-6,
        mask_ratio=sizes.mask_ratio,
        norm_pix_loss=True,
        **changes,
    )


def transformers(sizes: Sizes, *, best: bool) -> Method:
    """ViTMAEForPreTraining."""
    from transformers import ViTMAEForPreTraining

    from hf_mae.models.pos_embed import sincos_pos_embed

    config = vit_mae_config(sizes)
    model = ViTMAEForPreTraining(config)
    assert model.config._attn_implementation == "sdpa"  # its default
    side = sizes.image // sizes.patch
    for table_of in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table_of.data.copy_(sincos_pos_embed(table_of.shape[-1], (side, side)))

    def clip(loss: Tensor) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    return Method(
        model,
        lambda images, noise: model(pixel_values=images, noise=noise).loss,
        adamw(model, fused=True),
        before_update=(lambda loss: None) if best else clip,
    )


class LightlyMAE(nn.Module):
    """lightly's modules, put together as its documentation does."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        from lightly.models import utils  # pyright: ignore[reportMissingImports]
        from lightly.models.modules import (  # pyright: ignore[reportMissingImports]
            MAEDecoderTIMM,
            MaskedVisionTransformerTIMM,
        )
        from timm.layers import config as timm_layers
        from timm.models.vision_transformer import VisionTransformer

        timm_layers.set_fused_attn(True)
        self.utils, self.patch, self.mask_ratio = utils, sizes.patch, sizes.mask_ratio
        vit = VisionTransformer(
            sizes.image,
            sizes.patch,
            embed_dim=sizes.width,
            depth=sizes.depth,
            num_heads=sizes.heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 1.6 announces that the decoder class will be renamed in 1.7
            self.decoder = MAEDecoderTIMM(
                num_patches=sizes.patches,
                patch_size=sizes.patch,
                embed_dim=sizes.width,
                decoder_embed_dim=sizes.decoder_width,
                decoder_depth=sizes.decoder_depth,
                decoder_num_heads=sizes.decoder_heads,
            )

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        utils, (N, length) = self.utils, (len(images), self.backbone.sequence_length)
        if noise is None:
            ids_keep, ids_mask = utils.random_token_mask((N, length), mask_ratio=self.mask_ratio, device=images.device)
        else:
            ids = torch.cat([noise.new_full((N, 1), -1), noise], dim=1).argsort(dim=1)  # the cls token is kept
            ids_keep, ids_mask = ids.tensor_split([1 + int((length - 1) * (1 - self.mask_ratio))], dim=1)
        tokens = self.decoder.embed(self.backbone.encode(images=images, idx_keep=ids_keep))
        masked = utils.repeat_token(self.decoder.mask_token, (N, length)).type_as(tokens)
        tokens = self.decoder.decode(utils.set_at_index(masked, ids_keep, tokens))
        pred = self.decoder.predict(utils.get_at_index(tokens, ids_mask))
        target = utils.get_at_index(utils.patchify(images, self.patch), ids_mask - 1)
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return nn.functional.mse_loss(pred, target)


def lightly(sizes: Sizes, *, best: bool) -> Method:
    """lightly's masked autoencoder; its documentation decays everything."""
    model = LightlyMAE(sizes)
    return Method(model, model, adamw(model, fused=best, grouped=False))


def ours(
    sizes: Sizes,
    *,
    keep_memory: bool = True,
    checkpoint: Literal["none", "gelu", "blocks"] = "none",
    wrap: Callable[[nn.Module], nn.Module] = lambda task: task,
) -> Method:
    """What `hf_mae.pretrain` trains; `wrap` may put the task into DDP."""
    from hf_mae import MAEConfig, MAEForPreTraining
    from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, Optim
    from hf_mae.training.memory import keep_freed_memory
    from hf_mae.training.optim import build_adamw
    from hf_mae.training.tasks import Pretraining

    if keep_memory:
        keep_freed_memory()
    config = MAEConfig(
        image_size=sizes.image,
        patch_size=sizes.patch,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        decoder_hidden_size=sizes.decoder_width,
        decoder_num_hidden_layers=sizes.decoder_depth,
        decoder_num_attention_heads=sizes.decoder_heads,
        mask_ratio=sizes.mask_ratio,
        mask_tokens_in_encoder=sizes.mask_tokens_in_encoder,
        norm_pix_loss=True,
    )
    model = MAEForPreTraining(config)
    model.checkpoint_activations(checkpoint)
    task = wrap(Pretraining(model, IMAGENET_MEAN, IMAGENET_STD))
    optimizer = build_adamw(task, Optim(weight_decay=WEIGHT_DECAY, betas=BETAS))
    for group in optimizer.param_groups:
        group["lr"] = LR

    def loss(pixel_values: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None:  # drawn in the step, as all others do
            noise = torch.rand(len(pixel_values), sizes.patches, device=pixel_values.device)
        return task({"pixel_values": pixel_values, "noise": noise})["loss"]

    return Method(task, loss, optimizer, uint8=True)


def autocast_to_bf16(loss: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return the same under autocast."""

    def inner(pixel_values: Tensor, noise: Tensor | None) -> Tensor:
        with torch.autocast(pixel_values.device.type, torch.bfloat16):
            return loss(pixel_values, noise)

    return inner


def make_method(name: str, sizes: Sizes, checkout: str | None) -> Method:
    """Build a variant by its name."""
    plain, _, extra = name.partition("+")
    family, best = plain.removesuffix("-best"), plain.endswith("-best")
    if family == "official":
        assert checkout is not None
        method = official(sizes, checkout, best=best)
    elif family == "transformers":
        method = transformers(sizes, best=best)
    elif family == "lightly":
        method = lightly(sizes, best=best)
    else:
        again = "gelu" if plain == "ours-gelu-again" else "none"
        method = ours(sizes, keep_memory=plain != "ours-plain-memory", checkpoint=again)
    method.model.train()
    if extra == "bf16":
        method = replace(method, loss=autocast_to_bf16(method.loss))
    elif extra == "compile":
        for module in method.model.modules():
            if type(module).__name__ in ("Block", "ViTMAELayer"):
                module.compile()
    return method


def make_pixels(sizes: Sizes, batch: int) -> Tensor:
    """Return random uint8 images [N, 3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, sizes.image, sizes.image), dtype=torch.uint8, generator=generator)


def normalize(pixels: Tensor) -> Tensor:
    """Normalise as a loader of the others would have."""
    from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD

    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels.float() / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ equality


def check_equal(names: Sequence[str], sizes: Sizes, checkout: str | None) -> dict[str, dict[str, float]]:
    """Compare loss and gradients of ours with each other implementation, for its weights and the same mask.

    Returns:
        By name: relative error of the loss, and the largest relative error of a parameter's gradient (by norm).

    Raises:
        AssertionError: one of them is above `TOLERANCE`.
    """
    from hf_mae import convert_state_dict

    pixels = make_pixels(sizes, 2)
    noise = torch.rand(2, sizes.patches, generator=torch.Generator().manual_seed(1))
    mine = ours(sizes, keep_memory=False)
    found = {}
    for name in names:
        torch.manual_seed(2)
        other = make_method(name, sizes, checkout)
        rename = lightly_names if isinstance(other.model, LightlyMAE) else dict
        weights = convert_state_dict(rename(other.model.state_dict()))
        mine.model.load_state_dict({f"model.{key}": value for key, value in weights.items()})
        mine.optimizer.zero_grad()
        losses = [mine.loss(pixels, noise), other.loss(normalize(pixels), noise)]
        for loss in losses:
            loss.backward()
        grads = {key: p.grad for key, p in other.model.named_parameters() if p.grad is not None}
        theirs = convert_state_dict(rename(grads))
        own = {k.removeprefix("model."): p.grad for k, p in mine.model.named_parameters() if p.grad is not None}
        assert theirs.keys() == own.keys(), f"{name}: other parameters have gradients: {theirs.keys() ^ own.keys()}"
        errors = {key: float((own[key] - theirs[key]).norm() / theirs[key].norm()) for key in own}
        worst = max(errors, key=errors.__getitem__)
        found[name] = {"loss": abs(losses[0].item() / losses[1].item() - 1), "gradient": errors[worst]}
        assert found[name]["loss"] <= TOLERANCE, f"{name}: losses {[loss.item() for loss in losses]} differ"
        assert errors[worst] <= TOLERANCE, f"{name}: gradients of {worst} differ by {errors[worst]:.1e}"
    return found


def lightly_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the official names; lightly's encoder has a mask token that its masked autoencoder does not use."""
    return {
        name.removeprefix("backbone.vit.").removeprefix("decoder."): value
        for name, value in values.items()
        if name != "backbone.mask_token"
    }
