"""Reconstruction pictures show what they say."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hf_mae import MAEConfig, MAEForPreTraining, reconstruct
from hf_mae.evaluation.reconstruction import GREY, Pictures, is_grid
from hf_mae.models.targets import make_target
from hf_mae.pretrain import reconstruct_files
from hf_mae.training.tasks import Pretraining

TINY = {
    "image_size": (16, 24),
    "patch_size": (4, 8),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}


@pytest.fixture(params=[True, False], ids=["norm-pix", "raw"])
def model(request):
    torch.manual_seed(0)
    return MAEForPreTraining(MAEConfig(norm_pix_loss=request.param, **TINY))


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.rand(3, 12, generator=torch.Generator().manual_seed(2))


def test_masked_and_pasted_agree_with_the_original_at_visible_patches(model, images, noise):
    pictures = reconstruct(model, images, noise=noise)
    hidden = (pictures.masked == GREY) & (pictures.original != GREY)
    assert hidden.float().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(
        pictures.pasted[~hidden & (pictures.masked != GREY)], images[~hidden & (pictures.masked != GREY)]
    )
    assert torch.equal(pictures.pasted[hidden], pictures.predicted[hidden])


def test_a_perfect_prediction_is_shown_as_the_original(model, images, noise):
    """Un-normalisation inverts normalisation: pixels come back within rounding."""

    def oracle(pixel_values, noise):
        out = model(pixel_values, noise=noise)
        out.pred = make_target(model.config, model.patchify(pixel_values))
        return out

    pictures = reconstruct(model, images, noise=noise, forward=oracle)
    assert (pictures.predicted.int() - images.int()).abs().max() <= 1
    assert pictures.uses_true_statistics == model.config.norm_pix_loss


def test_the_grid_has_four_columns_and_says_when_it_uses_true_statistics(model, images, noise, tmp_path):
    pictures = reconstruct(model, images, noise=noise)
    grid = pictures.grid(tmp_path / "grid.png", scale=2)
    with Image.open(tmp_path / "grid.png") as saved:
        assert saved.size == grid.size
    assert grid.width == 4 * (48 + 4) + 4
    assert grid.height == 16 + 3 * (32 + 4) + 4 + (16 if model.config.norm_pix_loss else 0)
    assert grid.getpixel((4 + 1, 16 + 1)) == tuple(images[0, :, 0, 0].tolist())


def test_training_mode_and_random_state_are_left_alone(model, images, noise):
    model.train()
    before = torch.get_rng_state()
    reconstruct(model, images, noise=noise)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_floats_are_refused(model, images):
    with pytest.raises(ValueError, match=r"images is torch.float32 \(3, 3, 16, 24\); give uint8"):
        reconstruct(model, images.float())


def test_a_picture_that_cannot_be_written_is_a_warning(model, images, noise, tmp_path):
    (tmp_path / "pictures").write_text("in the way")
    task = Pretraining(model, (0.5,) * 3, (0.5,) * 3)
    pictures = Pictures(
        images,
        noise,
        tmp_path / "pictures",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        accelerator=Accelerator(cpu=True),
        every=1,
    )
    with pytest.warns(RuntimeWarning, match="no picture was drawn in .*pictures"):
        assert pictures(task, 1) == {}


def test_a_reconstruction_that_nobody_edited_is_known_again(model, images, noise, tmp_path):
    pictures = reconstruct(model, images, noise=noise)
    pictures.grid(tmp_path / "r.png")
    assert is_grid(tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as opened:
        info = opened.info
        edited = opened.convert("RGB")
    edited.putpixel((0, 0), (1, 2, 3))
    about = PngInfo()
    for name, value in info.items():
        about.add_text(name, value)
    edited.save(tmp_path / "r.png", pnginfo=about)
    assert not is_grid(tmp_path / "r.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("mine")
    pictures.grid(tmp_path / "r.jpg")
    assert not any(is_grid(tmp_path / name) for name in ("photo.png", "text.png", "r.jpg", "none.png"))


def test_reconstruct_writes_over_no_image_of_the_user(tmp_path):
    torch.manual_seed(0)
    config = MAEConfig(**TINY)
    folder = tmp_path / "model"
    Pretraining(MAEForPreTraining(config), (0.5,) * 3, (0.2,) * 3).write_model(
        folder, MAEForPreTraining(config).state_dict()
    )
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 30), "red").save(tmp_path / name)
    before = (tmp_path / "b.png").read_bytes()
    ask = [str(folder), [tmp_path / "a.png"]]
    with pytest.raises(ValueError, match="is one of the images that are read"):
        reconstruct_files(*ask, tmp_path / "a.png", overwrite=True)
    with pytest.raises(ValueError, match=r"exists.*--overwrite"):
        reconstruct_files(*ask, tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == before
    reconstruct_files(*ask, tmp_path / "r.png", seed=0)
    first = (tmp_path / "r.png").read_bytes()
    reconstruct_files(*ask, tmp_path / "r.png", seed=1)  # ours, and not edited
    assert (tmp_path / "r.png").read_bytes() != first
    reconstruct_files(*ask, tmp_path / "b.png", overwrite=True)
    assert (tmp_path / "b.png").read_bytes() != before
