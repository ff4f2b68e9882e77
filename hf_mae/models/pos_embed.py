"""Positions of patches: fixed 2-D sine-cosine tables, and what to do at another image size."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Interpolation: TypeAlias = Literal["bicubic", "sincos"] | bool
"""What to do at another image size: True is `bicubic`, as stock transformers do it; False is None."""


def sincos_pos_embed(dim: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed position table of the official code, bit for bit.

    The first half of the channels encodes the column, the second half the row; each half is [sin | cos]. The row of
    the cls token is zero.

    Args:
        dim: width, a multiple of 4.
        grid: rows and columns of patches.

    Returns:
        [1 + L, dim] float32 on the CPU, patches in reading order after the cls token.
    """
    # numpy and not torch: the result must be real numbers also while a model is being built on the meta device.
    rows, cols = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    frequencies = 1.0 / 10000 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))
    halves = []
    for position in (cols, rows):
        angles = np.outer(position.reshape(-1).astype(np.float64), frequencies)  # [L, dim / 4]
        halves += [np.sin(angles), np.cos(angles)]
    patches = np.concatenate(halves, axis=1)
    table = np.concatenate([np.zeros((1, dim)), patches])
    return torch.from_numpy(table.astype(np.float32))


def resize_pos_embed(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int = 1
) -> Tensor:
    """Resize a position table in two dimensions (bicubic, align_corners=False).

    Args:
        table: [1, num_prefix + L_old, D].
        old_grid: rows and columns of `table`.
        new_grid: rows and columns wanted.
        num_prefix: leading rows that belong to no patch and are copied.

    Returns:
        [1, num_prefix + L_new, D] in the dtype of `table`.
    """
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    image = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, D, rows, cols]
    image = F.interpolate(image, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)


def positions_for(
    table: Tensor, table_grid: tuple[int, int], grid: tuple[int, int], how: Interpolation | None, *, fixed: bool
) -> Tensor:
    """Return a position table for the grid of the input.

    Args:
        table: [1, 1 + L_table, D].
        table_grid: rows and columns the model was built for.
        grid: rows and columns of the input.
        how: `bicubic`, or True as in stock transformers, resizes the table in two dimensions, also a sine-cosine one;
            `sincos` computes it anew; None or False accept only `table_grid`.
            # Differs from ViTMAEForPreTraining, whose decoder resizes its table in one dimension, along the flattened
            # patches: here both tables are resized alike. The encoder is equal to ViTMAEModel and ViTModel.
        fixed: the table is the sine-cosine one.

    Returns:
        [1, 1 + L, D]; `table` itself where the grids agree.

    Raises:
        ValueError: the grids differ and `how` does not say what to do, or would replace learned positions.
    """
    if grid == table_grid:
        return table
    if how is True or how == "bicubic":
        return resize_pos_embed(table, table_grid, grid)
    if how == "sincos" and fixed:
        return sincos_pos_embed(table.shape[-1], grid)[None].to(table)
    if how == "sincos":
        raise ValueError("interpolate_pos_encoding='sincos' would replace learned positions; use 'bicubic'.")
    if how is not None and how is not False:
        raise ValueError(
            f"interpolate_pos_encoding={how!r} is unknown; use 'bicubic', 'sincos' or None (True is 'bicubic')."
        )
    raise ValueError(
        f"pixel_values make {grid[0]} x {grid[1]} patches, but the model was built for {table_grid[0]} x "
        f"{table_grid[1]}; resize the images, or pass interpolate_pos_encoding=True, 'sincos' or 'bicubic' (as True)."
    )
