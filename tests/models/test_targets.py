from __future__ import annotations

import pytest
import torch

from hf_mae.models.targets import patchify, pixel_target, unpatchify


def test_patchify_order_is_row_column_channel():
    pixels = torch.arange(2 * 2 * 4).view(1, 2, 2, 4).float()  # two channels, one row of two patches
    patches = patchify(pixels, (2, 2))
    assert patches[0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_patchify_order_is_the_official_one(golden):
    assert torch.equal(patchify(golden["imgs"], (8, 8)).half(), golden["patchify"])


@pytest.mark.parametrize(("channels", "patch_size"), [(1, (4, 8)), (3, (8, 4)), (4, (2, 2))])
def test_unpatchify_inverts_patchify(channels, patch_size):
    pixels = torch.rand(2, channels, 16, 24)
    grid = (16 // patch_size[0], 24 // patch_size[1])
    assert torch.equal(unpatchify(patchify(pixels, patch_size), patch_size, grid, channels), pixels)


def test_normalised_target_uses_the_unbiased_variance_of_all_channels_together():
    patches = torch.tensor([[[0.0, 2.0, 4.0, 6.0]]])
    expected = torch.tensor([[[-3.0, -1.0, 1.0, 3.0]]]) / (20 / 3 + 1e-6) ** 0.5
    torch.testing.assert_close(pixel_target(patches, norm=True), expected, atol=1e-7, rtol=0)  # one rounding


def test_normalised_target_ignores_brightness_and_contrast():
    patches = torch.rand(2, 5, 48, dtype=torch.float64).float()
    # float32 rounding of the changed input
    torch.testing.assert_close(pixel_target(3 * patches - 1, True), pixel_target(patches, True), atol=2e-5, rtol=0)


def test_raw_target_is_the_pixels_in_float32():
    patches = torch.rand(1, 2, 3).bfloat16()
    target = pixel_target(patches, norm=False)
    assert target.dtype is torch.float32
    assert torch.equal(target, patches.float())
