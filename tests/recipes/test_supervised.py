"""Presets of supervised training against what timm makes of the same words."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from hf_mae.data.images import eval_image
from hf_mae.data.rand_augment import parse_rand_augment
from hf_mae.recipes.supervised import BIRD_AUGMENTS, FIVE_MILLION, PROCEDURES, SUPERVISE, TRANSFER
from hf_mae.recipes.transfer import FINETUNE


@pytest.fixture
def transforms(goldens):
    return json.loads((goldens / "rsb_transforms.json").read_text())["transforms"]


@pytest.mark.parametrize(("name", "golden"), [("a2", "a2_train_224"), ("a3", "a3_train_160")])
def test_the_training_transform_is_timms(transforms, name, golden):
    text, recipe = transforms[golden], PROCEDURES[name]
    size, scale, ratio, interpolation = re.search(
        r"RandomResizedCropAndInterpolation\(size=\((\d+), .*scale=(.*), ratio=(.*), interpolation=(\w+)", text
    ).groups()
    assert recipe.model.image_size == int(size)
    assert recipe.augment.scale == tuple(json.loads(scale.replace("(", "[").replace(")", "]")))
    assert recipe.augment.ratio == pytest.approx(json.loads(ratio.replace("(", "[").replace(")", "]")), abs=1e-4)
    assert interpolation == "bicubic"  # the only one that is ours
    assert recipe.augment.flip == ("RandomHorizontalFlip(p=0.5)" in text)
    parsed = parse_rand_augment(recipe.augment.rand_augment)
    ops = re.findall(r"name=(\w+), p=([\d.]+), m=(\d+), mstd=([\d.]+)", text)
    assert parsed.layers == int(re.search(r"RandAugment\(n=(\d+)", text).group(1))
    assert parsed.increasing == any(name.endswith("Increasing") for name, *_ in ops)
    assert {(float(p), int(m), float(mstd)) for _, p, m, mstd in ops} == {
        (parsed.prob, parsed.magnitude, parsed.magnitude_std)
    }
    assert "RandomErasing" not in text
    assert recipe.augment.erase_prob == recipe.augment.color_jitter == 0


def test_the_test_transform_is_timms(transforms):
    recipe = PROCEDURES["a2"]
    short = int(re.search(r"Resize\(size=(\d+), interpolation=bicubic", transforms["eval_224_crop0.95"]).group(1))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    theirs = tv.center_crop(tv.resize(picture, short, InterpolationMode.BICUBIC), [224, 224])
    ours = eval_image(picture, (224, 224), recipe.model.crop_pct)
    assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


def test_the_procedures_differ_where_the_paper_says():
    a1, a2, a3 = (PROCEDURES[name] for name in ("a1", "a2", "a3"))
    assert (a1.epochs, a2.epochs, a3.epochs) == (600, 300, 100)
    assert (a1.optim.weight_decay, a2.optim.weight_decay, a3.optim.weight_decay) == (0.01, 0.02, 0.02)
    assert (a1.augment.label_smoothing, a2.augment.label_smoothing, a3.augment.label_smoothing) == (0.1, 0, 0)
    assert (a1.augment.mixup, a2.augment.mixup, a3.augment.mixup) == (0.2, 0.1, 0.1)
    assert {p.augment.cutmix for p in (a1, a2, a3)} == {1.0}
    assert (a1.data.repeat_augment, a2.data.repeat_augment, a3.data.repeat_augment) == (3, 3, 1)
    assert (a1.model.drop_path_rate, a2.model.drop_path_rate, a3.model.drop_path_rate) == (0.05, 0.05, 0)
    assert (a3.model.image_size, a3.model.test_image_size) == (160, 224)
    assert {p.loss.name for p in (a1, a2, a3)} == {"bce"}
    assert (a1.loss.target, a2.loss.target, a3.loss.target) == ("binarize", "threshold", "threshold")
    assert {(p.optim.name, p.optim.betas, p.optim.eps, p.optim.clip_grad) for p in (a1, a2, a3)} == {
        ("lamb", (0.9, 0.999), 1e-6, 1.0)
    }
    assert {p.model.crop_pct for p in (a1, a2, a3)} == {0.95}


def test_the_birds_are_those_of_the_slides():
    effective, intended = (SUPERVISE[f"rexnet-birds-published-{name}"] for name in ("effective", "intended"))
    for recipe in (effective, intended):
        assert recipe.optim.base_lr * recipe.global_batch / 256 == pytest.approx(5.77e-3)
        assert (recipe.optim.weight_decay, recipe.optim.decay_vectors) == (0.015, True)
        assert (recipe.epochs, recipe.global_batch, recipe.seed) == (46, 128, 3334)
        assert (recipe.data.splits, recipe.schedule.name) == ("random:95/5@3334", "constant")
        assert (recipe.augment.label_smoothing, recipe.model.drop_rate) == (0.06, 0.2)
    augment = effective.augment
    given = (augment.flip, augment.vertical_flip, augment.rotate, augment.erase_prob, augment.rand_augment)
    assert given == (False, False, (), 0.0, None)
    assert intended.augment == BIRD_AUGMENTS["f"]
    assert (intended.augment.rotate, intended.augment.erase_fill) == ((15.0, 25.0), "black")
    tuned = SUPERVISE["rexnet-birds-finetune-val"]
    assert (tuned.optim.name, tuned.optim.base_lr * tuned.global_batch / 256) == ("adam", pytest.approx(1e-3))
    assert (tuned.epochs, tuned.optim.weight_decay, tuned.model.drop_rate) == (4, 0, 0.16)
    for name in ("rexnet-birds-corrected", "efficientnet-b0-birds"):
        assert SUPERVISE[name].model.max_parameters == FIVE_MILLION


def test_the_vit_beside_the_birds_keeps_their_limit():
    from hf_mae import MAEConfig, MAEForImageClassification

    wish = FINETUNE["finetune-vit-ti10-birds"].model
    config = MAEConfig(
        hidden_size=wish.hidden_size,
        num_hidden_layers=wish.num_hidden_layers,
        num_attention_heads=wish.num_attention_heads,
        patch_size=wish.patch_size,
        num_labels=400,
    )
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MAEForImageClassification(config).parameters())
    assert parameters == 4_674_064 < FIVE_MILLION


def test_transfer_has_the_papers_seven_data_sets():
    assert len(TRANSFER) == 7
    assert all("never published" in recipe.source for recipe in TRANSFER)
