from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_mae.models import masking
from hf_mae.models.masking import count_kept, mask_from_noise, mask_noise, num_uniforms

CASES = [
    ("random", (14, 14), 0.75),
    ("random", (3, 5), 0.4),
    ("grid", (14, 14), 0.75),
    ("grid", (4, 6), 0.5),
    ("block", (14, 14), 0.75),
    ("block", (14, 14), 0.5),
    ("block", (4, 8), 0.75),
    ("block", (5, 3), 0.6),
]


def draw(strategy: str, grid: tuple[int, int], count: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(count, num_uniforms(strategy, grid), generator=torch.Generator().manual_seed(seed))


def masks(strategy: str, grid: tuple[int, int], ratio: float, uniforms: Tensor) -> Tensor:
    noise = mask_noise(strategy, uniforms, grid, ratio)
    return mask_from_noise(noise, count_kept(grid[0] * grid[1], ratio)).mask


def test_ids_and_mask_of_a_hand_computed_case():
    masking = mask_from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 2)
    assert masking.ids_keep.tolist() == [[1, 3]]
    assert masking.ids_remove.tolist() == [[2, 0]]
    assert masking.ids_restore.tolist() == [[3, 0, 2, 1]]
    assert masking.mask.tolist() == [[1, 0, 1, 0]]


def test_equal_noise_keeps_the_earlier_patch():
    assert mask_from_noise(torch.zeros(1, 200), 3).ids_keep.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("strategy", "grid", "ratio"), CASES)
def test_every_strategy_removes_the_exact_number_from_every_sample(strategy, grid, ratio):
    num_patches = grid[0] * grid[1]
    removed = masks(strategy, grid, ratio, draw(strategy, grid)).sum(dim=1)
    assert removed.tolist() == [num_patches - count_kept(num_patches, ratio)] * 32


@pytest.mark.parametrize(("strategy", "grid", "ratio"), CASES)
def test_noise_of_a_sample_does_not_depend_on_its_batch(strategy, grid, ratio):
    uniforms = draw(strategy, grid)
    together = mask_noise(strategy, uniforms, grid, ratio)
    alone = torch.cat([mask_noise(strategy, uniforms[i : i + 1], grid, ratio) for i in range(32)])
    assert torch.equal(together, alone)


def test_random_noise_is_the_uniforms_themselves():
    uniforms = draw("random", (4, 4))
    assert mask_noise("random", uniforms, (4, 4), 0.75) is uniforms


def test_grid_keeps_one_of_every_two_by_two():
    kept = 1 - masks("grid", (4, 6), 0.75, draw("grid", (4, 6)))
    expected = torch.zeros(4, 6)
    expected[::2, ::2] = 1
    assert torch.equal(kept[0].view(4, 6), expected)


def test_grid_at_half_is_a_checkerboard():
    mask = masks("grid", (2, 4), 0.5, draw("grid", (2, 4)))
    assert mask[0].view(2, 4).tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_blocks_remove_more_neighbours_together_than_chance():
    def neighbours(mask: Tensor) -> float:
        image = mask.view(-1, 14, 14)
        return float((image[:, 1:] * image[:, :-1]).sum() + (image[:, :, 1:] * image[:, :, :-1]).sum()) / len(image)

    block, chance = (masks(s, (14, 14), 0.5, draw(s, (14, 14), 64)) for s in ("block", "random"))
    # 98 removed patches have 364 * 0.25 = 91 adjacent pairs by chance; rectangles have more than 120.
    assert neighbours(chance) < 95
    assert neighbours(block) > 120


@pytest.mark.parametrize(("ratio", "mean", "most"), [(0.5, 0.0, 0), (0.75, 0.03, 5)])
def test_blocks_leave_as_few_patches_as_their_docstring_says(ratio, mean, most):
    for seed in range(3):
        draws = draw("block", (14, 14), 512, seed)[:, 196:].double().numpy().reshape(-1, masking.BLOCK_ATTEMPTS, 4)
        removed = 196 - count_kept(196, ratio)
        left = removed - masking._remove_blocks(draws, (14, 14), removed).sum(axis=(1, 2))
        assert left.min() >= 0
        assert left.mean() <= mean
        assert left.max() <= most


def test_blocks_reach_every_patch():
    mask = masks("block", (14, 14), 0.5, draw("block", (14, 14), 256)).mean(dim=0)
    assert mask.min() > 0.02
    assert mask.max() < 0.98


def test_blocks_without_luck_fall_back_to_the_order_of_the_uniforms():
    # All draws 0: every block is the smallest and widest, 1 x 2 in the corner, so most of the mask is the fill.
    uniforms = torch.zeros(1, num_uniforms("block", (4, 4)))
    uniforms[0, :16] = torch.arange(16) / 16
    mask = masks("block", (4, 4), 0.5, uniforms)
    assert mask.view(4, 4).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]


def test_uniforms_of_the_wrong_count_are_refused():
    with pytest.raises(
        ValueError, match=r"\(2, 15\) do not fit mask_strategy='random' on 4 x 4 patches; pass \[N, 16\]"
    ):
        mask_noise("random", torch.rand(2, 15), (4, 4), 0.75)
