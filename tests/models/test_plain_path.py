"""A training step computes less than the method as it is written down; here is the latter, and that both agree."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from hf_mae.models.masking import mask_noise, num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining

# Whatever decides which code runs. 4 x 4 patches.
STRATEGIES = [("random", 0.75), ("random", 0.3), ("block", 0.6), ("grid", 0.5)]
OPTIONS = list(itertools.product(STRATEGIES, *[(False, True)] * 4, (1, 2), ("sdpa", "eager")))


def plain_block(block, tokens: Tensor) -> Tensor:
    x = block.norm1(tokens)
    N, L, D = x.shape
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(x).reshape(N, L, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) / (D // heads) ** 0.5).softmax(-1)
    tokens = tokens + block.attn.proj((weights @ v).transpose(1, 2).reshape(N, L, D))
    return tokens + block.mlp(block.norm2(tokens))


def plain_loss(model: MAEForPreTraining, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and prediction: embed all, drop, encode, put everything back, decode it all, mask the loss."""
    config = model.config
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    removed = (restore >= config.len_keep).float()
    tokens = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
    if config.mask_tokens_in_encoder:
        tokens = torch.where(removed[..., None] > 0, model.encoder_mask_token, tokens) + model.pos_embed[:, 1:]
    else:
        tokens = tokens + model.pos_embed[:, 1:]
        tokens = torch.stack([t[i] for t, i in zip(tokens, order[:, : config.len_keep], strict=True)])
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens = torch.cat([cls_token, tokens], dim=1)
    for block in model.blocks:
        tokens = plain_block(block, tokens)
    tokens = model.decoder_embed(model.norm(tokens))
    if not config.mask_tokens_in_encoder:
        missing = model.mask_token.expand(len(images), config.num_patches - config.len_keep, -1)
        patches = torch.cat([tokens[:, 1:], missing], dim=1)
        patches = torch.stack([t[i] for t, i in zip(patches, restore, strict=True)])
        tokens = torch.cat([tokens[:, :1], patches], dim=1)
    tokens = tokens + model.decoder_pos_embed
    for block in model.decoder_blocks:
        tokens = plain_block(block, tokens)
    pred = model.decoder_pred(model.decoder_norm(tokens))[:, 1:]
    target = model.patchify(images)
    if config.norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = F.mse_loss(pred, target, reduction="none").mean(-1)
    return (error * removed).sum() / removed.sum(), pred


@pytest.mark.parametrize(("masks", "norm", "tokens", "learned", "return_pred", "depth", "attention"), OPTIONS)
def test_a_step_has_the_loss_and_the_gradients_of_the_plain_path(
    tiny, images, masks, norm, tokens, learned, return_pred, depth, attention
):
    torch.manual_seed(0)
    config = tiny(
        mask_strategy=masks[0],
        mask_ratio=masks[1],
        norm_pix_loss=norm,
        mask_tokens_in_encoder=tokens,
        pos_embed="learned" if learned else "sincos",
        decoder_num_hidden_layers=depth,
        attn_implementation=attention,
    )
    model = MAEForPreTraining(config).train()
    drawn = torch.rand(len(images), num_uniforms(config.mask_strategy, config.grid))
    noise = mask_noise(config.mask_strategy, drawn, config.grid, config.mask_ratio)
    expected, pred = plain_loss(model, images, noise)
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    out = model(images, noise=noise, return_pred=return_pred)
    out.loss.backward()
    assert_close(out.loss, expected, atol=0, rtol=1e-5)
    if return_pred:
        assert_close(out.pred, pred, atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        if (wanted := gradients[name]) is None:
            assert parameter.grad is None, name
            continue
        # Relative to the whole tensor: single entries near zero have no relative precision.
        assert (parameter.grad - wanted).norm() <= 1e-5 * wanted.norm() + 1e-8, name
