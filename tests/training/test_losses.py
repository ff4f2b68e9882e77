"""Losses: timm's numbers in every mode of binary targets, and what guessing costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hf_mae.recipes.classification import ClassifierAugment, Loss
from hf_mae.training.losses import binary_targets, check_loss, classification_loss, trivial_loss
from hf_mae.training.mixing import MixDraws

BCE = Loss(name="bce")
SOFT = Loss(name="bce", target="soft")
BINARIZE = Loss(name="bce", target="binarize")
# timm pairs the golden's images 0 with 5, 1 with 4, 2 with 3; here partners are half a batch apart.
ROWS = torch.tensor([0, 1, 2, 5, 4, 3])


@pytest.fixture(scope="module")
def golden(goldens):
    return json.loads((goldens / "rsb_loss.json").read_text())["loss"]


@pytest.fixture(scope="module")
def tensors(goldens):
    return load_file(goldens / "rsb_loss.safetensors")


def golden_loss(case):
    target = "soft" if case["target_threshold"] is None else "threshold"
    return Loss(name="bce", target=target, threshold=case["target_threshold"] or 0, sum_classes=case["sum_classes"])


def test_all_binary_losses_of_mixed_images_are_timms(golden, tensors):
    assert len(golden["bce"]) == 84
    for case in golden["bce"]:
        loss, lam = golden_loss(case), torch.full((6,), case["lam"])
        value = classification_loss(tensors["logits"][ROWS], tensors["hard"][ROWS], lam, loss, case["smoothing"])
        assert value.item() == pytest.approx(case["loss"], abs=1e-6 * (10 if loss.sum_classes else 1)), case
        targets = binary_targets(
            tensors["hard"][ROWS],
            lam,
            10,
            smoothing=case["smoothing"],
            target=loss.target,
            threshold=loss.threshold,
        )
        assert (targets > 0).sum(1).tolist() == case["positives_per_row"], case


def test_binary_losses_of_hard_labels_are_timms(golden, tensors):
    for case in golden["bce_from_hard_labels"]:
        loss = golden_loss(case)
        value = classification_loss(tensors["logits"], tensors["hard"], torch.ones(6), loss, case["smoothing"])
        assert value.item() == pytest.approx(case["loss"], abs=1e-6 * (10 if loss.sum_classes else 1)), case


def test_cross_entropies_are_timms(golden, tensors):
    ones, half = torch.ones(6), torch.full((6,), 0.5)
    for name, lam, smoothing in (
        ("hard", ones, 0.0),
        ("label_smoothing_0.06_timm", ones, 0.06),
        ("label_smoothing_0.1_torch", ones, 0.1),
        ("soft_target_lam0.5_sm0.1", half, 0.1),
    ):
        value = classification_loss(tensors["logits"][ROWS], tensors["hard"][ROWS], lam, Loss(), smoothing)
        assert value.item() == pytest.approx(golden["ce"][name], abs=1e-6)


def test_binarized_targets_are_whole_for_both_labels_and_smoothed_to_both_sides():
    labels, lam = torch.tensor([0, 1, 2, 2]), torch.tensor([0.01, 1.0, 0.5, 0.0])
    plain = binary_targets(labels, lam, 4, smoothing=0.0, target="binarize", threshold=0.2)
    # Partners: 0 with 2, 1 with 2 (the last), each seen from both sides.
    assert plain.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0]]
    smooth = binary_targets(labels, lam, 4, smoothing=0.1, target="binarize", threshold=0.2)
    torch.testing.assert_close(smooth, torch.where(plain > 0, 0.9, 0.025))


def test_losses_are_computed_in_float32(tensors):
    logits = tensors["logits"].bfloat16()
    for loss in (Loss(), BCE):
        value = classification_loss(logits, tensors["hard"], torch.ones(6), loss, 0.0)
        assert value.dtype == torch.float32
        assert value == classification_loss(logits.float(), tensors["hard"], torch.ones(6), loss, 0.0)


def test_a_threshold_that_every_class_reaches_is_refused():
    with pytest.raises(ValueError, match=r"loss.threshold=0.0 is not above.*every class.*positive; use --loss.thres"):
        check_loss(Loss(name="bce", threshold=0.0), 0.1, 1000)
    with pytest.raises(ValueError, match=r"loss.threshold=0.01 is not above .*0.1 over 10 classes \(0.01\)"):
        check_loss(Loss(name="bce", threshold=0.01), 0.1, 10)
    with pytest.raises(ValueError, match=r"loss.threshold=0.9 is not below .* no class of any image positive"):
        check_loss(Loss(name="bce", threshold=0.9), 0.2, 10)


def test_smoothing_that_a_threshold_takes_away_is_said():
    (warning,) = check_loss(BCE, 0.1, 1000)
    assert "label_smoothing=0.1 does not smooth" in warning
    assert "0.222 instead of 0.2" in warning
    for loss, smoothing in ((BCE, 0.0), (SOFT, 0.1), (BINARIZE, 0.1), (Loss(), 0.1), (Loss(threshold=0), 0.1)):
        assert check_loss(loss, smoothing, 1000) == []


def best_constant(labels, lam, loss, smoothing):
    """The lowest loss that one vector of scores for all images has, by its own derivative: the mean target."""
    targets = binary_targets(labels, lam, 3, smoothing=smoothing, target=loss.target, threshold=loss.threshold)
    logits = targets.double().mean(0).logit()
    each = F.binary_cross_entropy_with_logits(logits.expand(len(labels), 3), targets.double(), reduction="none")
    return float(each.sum(1).mean() if loss.sum_classes else each.mean())


@pytest.mark.parametrize("mixed", [ClassifierAugment(mixup=0.1, cutmix=1.0), ClassifierAugment(cutmix=1, mix_prob=0.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", [BCE, SOFT, BINARIZE, Loss(name="bce", sum_classes=True)])
def test_the_trivial_binary_loss_is_what_mixed_targets_cost(loss, smoothing, mixed):
    """Against targets really drawn: 40,000 images in batches of two, each with a mixture of its own."""
    labels = torch.from_numpy(np.random.RandomState(1).choice(3, 40_000, p=[0.6, 0.3, 0.1]))
    draws = MixDraws(mixed, 0, size=(32, 32), images=2, length=40_000)
    lam = draws(np.zeros(40_000, dtype=np.int64), np.arange(40_000))["mix_lam"]
    order = torch.cat([torch.arange(0, 40_000, 2), torch.arange(1, 40_000, 2)])  # partners half of it apart
    found = trivial_loss(labels, loss, smoothing, 3, mixed, (32, 32))
    assert found == pytest.approx(best_constant(labels[order], lam[order], loss, smoothing), rel=0.02)
    assert found == trivial_loss(labels, loss, smoothing, 3, mixed, (32, 32))


def test_two_labels_an_image_cost_more_than_one():
    labels, mixed = torch.arange(30) % 10, ClassifierAugment(cutmix=1.0)
    alone, pairs = trivial_loss(labels, BCE, 0.0, 10), trivial_loss(labels, BCE, 0.0, 10, mixed)
    assert alone == pytest.approx(-(0.1 * np.log(0.1) + 0.9 * np.log(0.9)))
    assert pairs > 1.2 * alone
    soft = [trivial_loss(labels, SOFT, 0.0, 10, augment) for augment in (None, mixed)]
    assert soft == pytest.approx([alone, alone])
