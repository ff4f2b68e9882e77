"""What the decoder is asked to predict: images as rows of patches, and the target made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_mae.models.configuration_mae import MAEConfig


def patchify(pixel_values: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches in reading order.

    Args:
        pixel_values: [N, C, H, W], H and W multiples of the patch size.
        patch_size: height and width of a patch in pixels.

    Returns:
        [N, L, h * w * C]; inside a patch the order is row, column, channel (channel last), as in the official code.
    """
    N, C, H, W = pixel_values.shape
    h, w = patch_size
    patches = pixel_values.reshape(N, C, H // h, h, W // w, w).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(N, (H // h) * (W // w), h * w * C)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int], num_channels: int) -> Tensor:
    """Undo `patchify`.

    Args:
        patches: [N, L, h * w * C].
        patch_size: height and width of a patch in pixels.
        grid: rows and columns of patches; their product is L.
        num_channels: C.

    Returns:
        [N, C, H, W].
    """
    (h, w), (rows, cols) = patch_size, grid
    images = patches.reshape(-1, rows, cols, h, w, num_channels).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(-1, num_channels, rows * h, cols * w)


def pixel_target(patches: Tensor, norm: bool) -> Tensor:
    """Return the pixels to predict, in float32 or better whatever the precision of the model.

    Args:
        patches: [N, L, P] from `patchify`.
        norm: normalise each patch by its own mean and unbiased variance over all P values, channels together.

    Returns:
        [N, L, P] float32, or float64 for float64 patches.
    """
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    if not norm:
        return patches
    mean = patches.mean(dim=-1, keepdim=True)
    var = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6) ** 0.5


def make_target(config: MAEConfig, patches: Tensor) -> Tensor:
    """Return the target [N, L, P] of `config.target`.

    Raises:
        ValueError: it is not pixels, the only one there is today.
    """
    if config.target != "pixel":
        raise ValueError(f"target={config.target!r} is unknown; use 'pixel'.")
    return pixel_target(patches, config.norm_pix_loss)
