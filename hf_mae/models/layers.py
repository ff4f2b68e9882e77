"""The parts of the encoder and the decoder: patch embedding, attention, MLP, block. Names are the official ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_mae.models.configuration_mae import MAEConfig, height_width


class PatchEmbed(nn.Module):
    """Embed patches with the weights of a convolution, so that official weights fit."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        patch_size = height_width(config.patch_size)
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Map [N, L, h * w * C] in the order of `patchify` to [N, L, D]."""
        weight = self.proj.weight
        if weight.shape[1] > 1:  # one channel needs no reordering, and DDP warns of the strides of its gradient
            weight = weight.permute(0, 2, 3, 1)  # channel last, as in a patch
        weight = weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step, and return its weights too; the signature is that of transformers' interface."""
    weights = (query * scaling @ key.transpose(-2, -1)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), weights


class Attention(nn.Module):
    """Multi-head self-attention with fused queries, keys and values."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config: MAEConfig, width: int, num_heads: int):
        super().__init__()
        self.config = config  # shared with the model, so set_attn_implementation reaches every block
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Let the tokens from position `first` on attend to all tokens.

        Args:
            tokens: [N, L, D]; N may be 0.
            first: position of the first token that is computed.

        Returns:
            [N, L - first, D], and the weights [N, heads, L - first, L] where the implementation has them.
        """
        N, L, D = tokens.shape
        qkv = self.qkv(tokens).view(N, L, 3, self.num_heads, D // self.num_heads)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        query = query[:, :, first:]
        implementation = self.config._attn_implementation or "sdpa"
        is_eager = implementation == "eager" or N == 0  # transformers' functions cannot reshape an empty batch
        attend = eager_attention if is_eager else ALL_ATTENTION_FUNCTIONS[implementation]
        out, weights = attend(self, query, key, value, attention_mask=None, scaling=(D // self.num_heads) ** -0.5)
        return self.proj(out.reshape(N, L - first, D)), weights


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them.

    Attributes:
        recompute_gelu: compute the GELU again in the backward pass rather than keep its output, a quarter of all that a
            block keeps. The numbers stay the same to the last bit.
    """

    recompute_gelu = False

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, L, D] to [N, L, D]."""
        hidden = self.fc1(tokens)
        if self.recompute_gelu and torch.is_grad_enabled():
            # What is computed again ends where the last tensor is back that was not kept: before the matrix product.
            return checkpoint(self._project, hidden, use_reentrant=False, preserve_rng_state=False)
        return self._project(hidden)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden))


class Block(GradientCheckpointingLayer):
    """Pre-norm transformer block; the unit of checkpointing, compilation and sharding."""

    def __init__(self, config: MAEConfig, width: int, num_heads: int, mlp_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attn = Attention(config, width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = Mlp(width, mlp_width)

    def forward(
        self, tokens: Tensor, first: int = 0, branch_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map [N, L, D] to [N, L - first, D], and pass the attention weights on.

        A last block whose first tokens nobody reads need not compute them: they serve as keys and values only.

        Args:
            tokens: [N, L, D].
            first: position of the first token that is computed.
            branch_scale: [N, 2], what the outputs of attention and MLP are multiplied by, see `drop_path`; None leaves
                them alone.
        """
        attended, weights = self.attn(self.norm1(tokens), first)
        if branch_scale is None:
            tokens = tokens[:, first:] + attended
            return tokens + self.mlp(self.norm2(tokens)), weights
        of_attn, of_mlp = branch_scale.to(tokens.dtype)[..., None, None].unbind(1)  # two of [N, 1, 1]
        tokens = tokens[:, first:] + of_attn * attended
        return tokens + of_mlp * self.mlp(self.norm2(tokens)), weights


def drop_path(noise: Tensor, rates: Sequence[float], rate: Tensor | None = None) -> list[Tensor | None]:
    """Decide which residual branches are skipped: stochastic depth, per sample and branch.

    Args:
        noise: [N, 2 * blocks] uniforms in [0, 1): attention and MLP of the first block, of the second, and so on.
        rates: for each of these branches, the share of samples that skip it.
        rate: the same as a tensor beside `noise`; None makes it, a copy that a GPU waits for.

    Returns:
        For each block [N, 2], 0 where a branch is skipped and 1 / (1 - rate) where not, so that its mean stays; None
        where both rates are 0.
    """
    rate = torch.tensor(rates, dtype=noise.dtype, device=noise.device) if rate is None else rate.to(noise.dtype)
    scale = (noise >= rate).to(noise.dtype) / (1 - rate)  # [N, 2 * blocks]
    return [scale[:, i : i + 2] if any(rates[i : i + 2]) else None for i in range(0, len(rates), 2)]
