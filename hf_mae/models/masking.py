"""Which patches are removed: pure functions from uniform numbers to a mask.

Everything goes through `noise` [N, L]: the patches with the smallest noise are kept, as in the official code. A
strategy turns the uniform numbers of one sample into that sample's noise and looks at nothing else, so a mask does not
depend on the batch it is in. Source: He et al. 2022, section 3 and Table 1f.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

MaskStrategy: TypeAlias = Literal["random", "block", "grid"]
STRATEGIES: tuple[MaskStrategy, ...] = ("random", "block", "grid")

BLOCK_MIN_PATCHES = 16  # Bao et al. 2021, Algorithm 1, for a grid of 14 x 14
BLOCK_MIN_ASPECT = 0.3  # the same; the largest aspect ratio is its inverse
BLOCK_ATTEMPTS = 40
"""Blocks tried per sample. Of 14 x 14 they leave nothing to remove at 50 %; at 75 %, over 512 samples, they leave .002
to .03 patches on average and 1 to 5 at most, by seed. `mask_noise` fills what is left, so the ratio stays exact."""


def count_kept(num_patches: int, mask_ratio: float) -> int:
    """Return how many of `num_patches` stay visible: `int(num_patches * (1 - mask_ratio))`.

    The float is truncated as in the official code, so 100 patches at 0.9 keep 9, not 10.
    """
    return int(num_patches * (1 - mask_ratio))


def check_masking(strategy: str, grid: tuple[int, int], mask_ratio: float) -> None:
    """Raise unless `strategy` can remove `mask_ratio` of a grid of (rows, columns).

    Raises:
        ValueError: the strategy is unknown, the ratio is outside [0, 1) or keeps nothing, or `grid` masking does not
            tile.
    """
    num_patches = grid[0] * grid[1]
    if strategy not in STRATEGIES:
        raise _unknown(strategy)
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio={mask_ratio} is outside [0, 1); the paper uses 0.75.")
    if count_kept(num_patches, mask_ratio) == 0:
        raise ValueError(
            f"mask_ratio={mask_ratio} keeps none of the {num_patches} patches; "
            f"use at most {1 - 1 / num_patches:.4g}, smaller patches or larger images."
        )
    if strategy == "grid" and (mask_ratio not in (0.5, 0.75) or grid[0] % 2 or grid[1] % 2):
        raise ValueError(
            f"mask_strategy='grid' cannot remove mask_ratio={mask_ratio} of {grid[0]} x {grid[1]} patches; "
            "use mask_ratio 0.5 or 0.75 and an even number of rows and columns, or mask_strategy='random'."
        )


def num_uniforms(strategy: MaskStrategy, grid: tuple[int, int]) -> int:
    """Return K, the count of uniform numbers that `mask_noise` consumes per sample."""
    num_patches = grid[0] * grid[1]
    if strategy == "random":
        return num_patches
    if strategy == "block":
        return num_patches + 4 * BLOCK_ATTEMPTS
    if strategy == "grid":
        return 0
    raise _unknown(strategy)


def mask_noise(strategy: MaskStrategy, uniforms: Tensor, grid: tuple[int, int], mask_ratio: float) -> Tensor:
    """Turn uniform numbers into noise whose largest values are the patches to remove.

    Args:
        strategy: `random`: the uniforms are the noise. `block`: rectangles are removed, as in BEiT. `grid`: the
            first patch of every 2 x 2 stays (ratio 0.75), or every second one as on a checkerboard (0.5).
        uniforms: [N, K] in [0, 1), K from `num_uniforms`.
        grid: rows and columns of patches; L is their product.
        mask_ratio: fraction removed, in [0, 1). Exactly `L - count_kept(L, mask_ratio)` patches will be removed.

    Returns:
        noise [N, L] on the device of `uniforms`.

    Raises:
        ValueError: K is wrong, or `check_masking` refuses.
    """
    check_masking(strategy, grid, mask_ratio)
    expected = num_uniforms(strategy, grid)
    if uniforms.ndim != 2 or uniforms.shape[1] != expected:
        raise ValueError(
            f"uniforms of shape {tuple(uniforms.shape)} do not fit mask_strategy={strategy!r} on {grid[0]} x {grid[1]} "
            f"patches; pass [N, {expected}]."
        )
    if strategy == "random":
        return uniforms
    if strategy == "grid":
        return _grid_noise(grid, mask_ratio).to(uniforms.device).repeat(uniforms.shape[0], 1)
    if strategy != "block":
        raise _unknown(strategy)
    num_patches = grid[0] * grid[1]
    draws = uniforms[:, num_patches:].detach().cpu().double().numpy().reshape(-1, BLOCK_ATTEMPTS, 4)
    removed = _remove_blocks(draws, grid, num_patches - count_kept(num_patches, mask_ratio))
    # Patches in a block lie in [1, 2), the others in [0, 1): where blocks fall short, the largest of the others go too.
    return uniforms[:, :num_patches] + torch.from_numpy(removed).flatten(1).to(uniforms)


def _unknown(strategy: str) -> ValueError:
    return ValueError(f"mask_strategy={strategy!r} is unknown; use one of {', '.join(STRATEGIES)}.")


@dataclass(frozen=True)
class Masking:
    """Which patches of each image are kept, and where they went.

    Args:
        ids_shuffle: [N, L], positions of the patches by rising noise; the first `len_keep` are the kept ones.
        ids_restore: [N, L], the rank of every patch, which undoes the shuffle.
        len_keep: patches kept per sample.
    """

    ids_shuffle: Tensor
    ids_restore: Tensor
    len_keep: int

    @property
    def ids_keep(self) -> Tensor:
        """[N, len_keep], positions of the kept patches."""
        return self.ids_shuffle[:, : self.len_keep]

    @property
    def ids_remove(self) -> Tensor:
        """[N, L - len_keep], positions of the removed patches."""
        return self.ids_shuffle[:, self.len_keep :]

    @property
    def mask(self) -> Tensor:
        """[N, L] float32, 1 = removed."""
        return (self.ids_restore >= self.len_keep).float()


def mask_from_noise(noise: Tensor, len_keep: int) -> Masking:
    """Keep the `len_keep` patches with the smallest noise of each row; ties keep the earlier patch.

    Args:
        noise: [N, L].
        len_keep: patches kept per sample.
    """
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ranks = torch.arange(noise.shape[1], device=noise.device).expand_as(ids_shuffle)
    return Masking(ids_shuffle, torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, ranks), len_keep)


def _grid_noise(grid: tuple[int, int], mask_ratio: float) -> Tensor:
    rows, cols = torch.arange(grid[0])[:, None], torch.arange(grid[1])[None, :]
    removed = (rows + cols) % 2 == 1 if mask_ratio == 0.5 else (rows % 2 == 1) | (cols % 2 == 1)
    return removed.flatten().float()  # the stable sort keeps equal values in reading order


def _remove_blocks(draws: np.ndarray, grid: tuple[int, int], num_removed: int) -> np.ndarray:
    """Place rectangles until `num_removed` patches are gone or the draws are used up; never remove more.

    Source: Bao et al. 2021 (BEiT), Algorithm 1. A block that would remove too many patches is skipped. The smallest
    block shrinks with the grid, and with what is still missing, so that the last blocks fit.

    Args:
        draws: [N, attempts, 4] uniforms for size, aspect ratio, top and left.
        grid: rows and columns of patches.
        num_removed: patches to remove per sample.

    Returns:
        removed [N, rows, cols], boolean.
    """
    rows, cols = grid
    smallest = min(BLOCK_MIN_PATCHES, max(1, BLOCK_MIN_PATCHES * rows * cols // 14**2))
    row, col = np.arange(rows)[None, :, None], np.arange(cols)[None, None, :]
    removed = np.zeros((draws.shape[0], rows, cols), dtype=bool)
    for size_draw, aspect_draw, top_draw, left_draw in draws.transpose(1, 2, 0):
        missing = num_removed - removed.sum(axis=(1, 2))
        low = np.minimum(smallest, missing)
        size = low + size_draw * (missing - low)
        # Differs from Algorithm 1, which draws the aspect ratio uniformly and so prefers one orientation: drawn
        # uniformly in its logarithm, as in BEiT's code, tall and wide blocks are equally likely.
        aspect = np.exp(math.log(BLOCK_MIN_ASPECT) * (1 - 2 * aspect_draw))
        height = np.clip(np.rint(np.sqrt(size * aspect)), 1, rows)
        width = np.clip(np.rint(np.sqrt(size / aspect)), 1, cols)
        # The minimum is for a draw that float32 has rounded up to 1.
        top = np.minimum(np.floor(top_draw * (rows - height + 1)), rows - height)[:, None, None]
        left = np.minimum(np.floor(left_draw * (cols - width + 1)), cols - width)[:, None, None]
        block = (row >= top) & (row < top + height[:, None, None]) & (col >= left) & (col < left + width[:, None, None])
        fits = (block & ~removed).sum(axis=(1, 2)) <= missing
        removed |= block & fits[:, None, None]
    return removed
