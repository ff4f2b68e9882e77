"""The one evaluation crop: equal to what stock processors and timm make of what is written for them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform, resolve_data_config
from transformers import AutoImageProcessor

from hf_mae.data.images import crop_center, to_array
from hf_mae.exporting.parity import prepare_rounding_down
from hf_mae.models.timm_models import TimmSpec, create, load, write_timm_folder
from hf_mae.recipes.classification import check_labelled
from hf_mae.recipes.crop import EvalCrop, read_crop, stated_crop
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.supervised import SUPERVISE, check_supervise
from hf_mae.recipes.transfer import FINETUNE, PROBE

SIZES = [(64, 256), (48, 32), (8, 8), (32, 32), (224, 224), (384, 384)]
CROPS = [EvalCrop(size, pct) for size in SIZES for pct in (None, 1.0, 0.9)] + [EvalCrop((32, 32), None, "squash")]


def pictures(crop):
    """Of the input's size, smaller, larger, square and not, with odd sides."""
    (h, w), rng = crop.size, np.random.default_rng(0)
    shapes = [(h, w), (h // 2 + 1, w // 2 + 2), (2 * h + 1, w + 3), (h + 5, 2 * w + 1), (h + 7, h + 7), (53, 67)]
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: f"{crop.size[0]}x{crop.size[1]}-{crop.crop_pct}")
def test_stock_processors_make_our_pixels(tmp_path, crop):
    """Bit for bit on Pillow, but for crops that transformers rounds down; within 2 of 255 on tensors."""
    plain = {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False}
    written = {"image_processor_type": "BitImageProcessor", **crop.processor(), **plain}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    for backend, limit in (("pil", 1e-4), ("torchvision", 2 + 1e-4)):
        stock = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        for picture in pictures(crop):
            found = stock(picture, return_tensors="np")["pixel_values"][0]
            expected, shift = prepare_rounding_down(picture, crop)
            assert np.abs(found - expected.numpy()).max() * 255 <= limit
            if shift == [0, 0]:
                assert np.abs(found * 255 - to_array(crop_center(picture, crop))).max() <= limit
    assert read_crop(stock.to_dict(), crop.size).target == crop.target


@pytest.mark.parametrize("mode", [None, "center", "squash"])
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 48)])
def test_timm_makes_our_pixels(tmp_path, size, mode):
    spec = TimmSpec("test_resnet", ("ant",), size, size, 0.9, 3, 0.0, (0.0,) * 3, (1.0,) * 3, crop_mode=mode)
    write_timm_folder(tmp_path, spec, create(spec).state_dict())
    cfg = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    read = load(tmp_path)[1].crop
    assert (read.size, read.target, read.mode) == (spec.crop.size, spec.crop.target, spec.crop.mode)
    transform = create_transform(**resolve_data_config(pretrained_cfg=cfg))
    for picture in pictures(read):
        assert np.abs(transform(picture).numpy() * 255 - to_array(crop_center(picture, read))).max() < 1e-4


def test_every_share_survives_being_written():
    for side in (8, 32, 224, 225, 384):
        for edge in range(side, 2 * side):
            crop = EvalCrop((side, side), read_crop(processor(side, side, shortest_edge=edge), (side, side)).crop_pct)
            assert crop.target == (edge, edge)


def processor(height, width, /, **size):
    return {**EvalCrop((height, width)).processor(), "size": size}


@pytest.mark.parametrize(
    ("written", "size", "why"),
    [
        (processor(64, 256, shortest_edge=256), (64, 256), "not square.*export the model again"),
        (processor(32, 32, shortest_edge=31), (32, 32), "use at least 32"),
        (processor(32, 32, height=40, width=30), (32, 32), "does not cover"),
        (processor(32, 32, height=40, width=50), (32, 32), "not the same share"),
        (processor(32, 32, longest_edge=50), (32, 32), "does not cover"),
        (processor(32, 32, shortest_edge=36), (48, 48), "crop_size="),
        (processor(32, 32, shortest_edge=36) | {"resample": 2}, (32, 32), "resample=2"),
        (processor(32, 32, shortest_edge=36) | {"do_resize": False}, (32, 32), "do_resize=False"),
        (processor(32, 32, shortest_edge=36) | {"do_center_crop": False}, (32, 32), "no crop"),
        ({"size": 224}, (224, 224), "size=224"),
        ({}, (224, 224), "size=None"),
    ],
)
def test_a_processor_of_another_kind_is_not_followed(written, size, why):
    with pytest.raises(ValueError, match=why):
        read_crop(written, size)
    lines = []
    assert stated_crop(written, size, lines.append) == EvalCrop(size)
    assert len(lines) == 1
    assert EvalCrop(size).words() in lines[0]


def test_a_processor_without_a_crop_shows_the_whole_image():
    written = {"size": {"height": 32, "width": 48}, "resample": 3, "do_resize": True, "do_center_crop": False}
    assert read_crop(written, (32, 48)) == EvalCrop((32, 48))


def test_what_is_no_crop_is_refused():
    with pytest.raises(ValueError, match=r"crop_pct=0 must lie in \(0, 1\]"):
        EvalCrop((8, 8), 0)
    with pytest.raises(ValueError, match=r"crop_mode='border'.*use center or squash"):
        EvalCrop((8, 8), None, "border")
    with pytest.raises(ValueError, match="use crop_mode squash"):
        EvalCrop((8, 16), None, "center").processor()


def test_presets_for_small_images_show_the_whole_of_them():
    """So their numbers stay what they were when images of exactly the input size were an exception."""
    whole = {name for presets in (PRESETS, FINETUNE, PROBE) for name, p in presets.items() if p.evals.crop_pct == 1}
    assert whole == {
        "quickstart",
        *(f"mae-vit-{letter}-cifar10" for letter in "nts"),
        "finetune-digits",
        "probe-digits",
        "finetune-vit-ti10-birds",
    }
    assert all(p.evals.crop_pct in (None, 1) for presets in (PRESETS, FINETUNE, PROBE) for p in presets.values())


def test_the_field_is_checked_and_is_not_that_of_timm():
    recipe = FINETUNE["finetune-digits"]
    for value in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"evals.crop_pct=.* must lie in \(0, 1\]"):
            check_labelled(replace(recipe, evals=replace(recipe.evals, crop_pct=value)))
    timm = SUPERVISE["supervise-digits"]
    with pytest.raises(ValueError, match=r"evals.crop_pct=1.0 .*--model.crop-pct"):
        check_supervise(replace(timm, evals=replace(timm.evals, crop_pct=1.0)))
