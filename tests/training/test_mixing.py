"""Mixup and cutmix: timm's numbers, and the same mixtures however a global batch is split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hf_mae.recipes.classification import ClassifierAugment
from hf_mae.training.mixing import MixDraws, draw_mix, mix_images, mix_targets

BOTH = ClassifierAugment(mixup=0.8, cutmix=1.0)
PAIRS = ClassifierAugment(mixup=0.8, cutmix=1.0, mix_mode="pair")


@pytest.fixture
def golden(goldens):
    return load_file(goldens / "mixup.safetensors")


def draws(augment=BOTH, *, images=8, length=20, repeats=1, seed=0):
    return MixDraws(augment, seed, size=(16, 16), images=images, length=length, repeats=repeats)


@pytest.mark.parametrize("seed", [0, 3, 7])
@pytest.mark.parametrize(
    ("case", "mixup", "cutmix", "smoothing"),
    [("a1", 0.2, 1.0, 0.1), ("mixup_only", 0.2, 0.0, 0.1), ("cutmix_only", 0.0, 1.0, 0.0)],
)
def test_a_mixed_batch_equals_timm(golden, case, mixup, cutmix, smoothing, seed):
    """timm pairs 0 with 3 and 1 with 2; ours are half a batch apart, so the rows are put in another order."""
    rows = torch.tensor([0, 1, 3, 2])
    lam, box = draw_mix(np.random.RandomState(seed), (16, 16), mixup=mixup, cutmix=cutmix)
    lams, boxes = torch.full((4,), lam), torch.tensor([box] * 4)
    images = mix_images(golden["x"][rows], lams, boxes)
    # The share of the partner is rounded to float32 here, and not in timm.
    torch.testing.assert_close(images, golden[f"{case}/s{seed}/x"][rows], atol=1e-6, rtol=1e-6)
    targets = mix_targets(golden["y"][rows], lams, 5, smoothing)
    torch.testing.assert_close(targets, golden[f"{case}/s{seed}/y"][rows], atol=1e-6, rtol=1e-6)
    if case == "cutmix_only":
        assert torch.equal(images, golden[f"{case}/s{seed}/x"][rows])


def test_both_kinds_of_mixing_are_in_the_goldens():
    """Otherwise the test above would not see one of them."""
    boxes = {draw_mix(np.random.RandomState(s), (16, 16), mixup=0.2, cutmix=1.0)[1] for s in range(40)}
    assert (0, 0, 0, 0) in boxes
    assert len(boxes) > 10


def test_a_box_at_the_border_counts_by_its_area():
    for seed in range(50):
        lam, (top, bottom, left, right) = draw_mix(np.random.RandomState(seed), (10, 20), mixup=0, cutmix=1.0)
        assert lam == pytest.approx(1 - (bottom - top) * (right - left) / 200)
        assert 0 <= top <= bottom <= 10
        assert 0 <= left <= right <= 20


def test_an_image_that_nothing_is_mixed_into_stays_as_it_is():
    pixels = torch.randn(4, 3, 8, 8)
    ones, empty = torch.ones(4), torch.zeros(4, 4, dtype=torch.int64)
    assert torch.equal(mix_images(pixels, ones, empty), pixels)


def test_each_row_may_be_mixed_in_its_own_way():
    pixels = torch.arange(4.0)[:, None, None, None].expand(4, 1, 2, 2)
    lam = torch.tensor([0.25, 0.5, 1.0, 0.5])
    box = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 2], [0, 0, 0, 0], [0, 1, 1, 2]])
    mixed = mix_images(pixels, lam, box)[:, 0]
    expected = [[[1.5, 1.5], [1.5, 1.5]], [[3, 3], [1, 1]], [[2, 2], [2, 2]], [[3, 1], [3, 3]]]
    assert mixed.tolist() == expected
    assert mix_targets(torch.arange(4), lam, 4, 0.0)[0].tolist() == [0.25, 0, 0.75, 0]


def test_an_odd_micro_batch_cannot_be_mixed():
    with pytest.raises(ValueError, match=r"a micro-batch of 3 images is odd.*choose an even --micro-batch"):
        mix_images(torch.zeros(3, 1, 2, 2), torch.ones(3), torch.zeros(3, 4, dtype=torch.int64))


@pytest.mark.parametrize("augment", [BOTH, PAIRS])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_images_are_mixed_alike_however_the_global_batch_is_split(augment, ranks, micro_batches):
    """Rank r has the places r, r + R, ...; micro-batch a of A has every A-th of those."""
    places = np.arange(8)
    drawn = draws(augment)(places // 20, places % 20)
    pixels, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    whole = mix_images(pixels, **args(drawn))
    targets = mix_targets(labels, drawn["mix_lam"], 8, 0.1)
    for rank in range(ranks):
        mine = draws(augment)(places[rank::ranks] // 20, places[rank::ranks] % 20)
        for a in range(micro_batches):
            part = {name: tensor[a::micro_batches] for name, tensor in mine.items()}
            mixed = mix_images(pixels[rank::ranks][a::micro_batches], **args(part))
            assert torch.equal(mixed, whole[rank::ranks][a::micro_batches])
            soft = mix_targets(labels[rank::ranks][a::micro_batches], part["mix_lam"], 8, 0.1)
            assert torch.equal(soft, targets[rank::ranks][a::micro_batches])


def args(drawn):
    return {"lam": drawn["mix_lam"], "box": drawn["mix_box"]}


def test_a_step_has_one_mixture_also_where_an_epoch_ends_inside_it():
    """Epochs of 20 images are cut into batches of 8: the third batch begins in one epoch and ends in the next."""
    g = np.arange(40)
    lams = draws()(g // 20, g % 20)["mix_lam"].view(5, 8)
    assert (lams == lams[:, :1]).all()
    assert len(set(lams[:, 0].tolist())) == 5


def test_pairs_have_their_own_mixtures_and_share_them():
    drawn = draws(PAIRS)(np.zeros(8, dtype=np.int64), np.arange(8))
    lams, boxes = drawn["mix_lam"], drawn["mix_box"]
    assert torch.equal(lams[:4], lams[4:])
    assert torch.equal(boxes[:4], boxes[4:])
    assert len(set(lams[:4].tolist())) == 4


def test_draws_depend_on_the_seed_and_on_nothing_global():
    place = np.zeros(8, dtype=np.int64), np.arange(8)
    np.random.seed(1)
    first = draws(PAIRS)(*place)["mix_lam"]
    state = np.random.get_state()[1].copy()
    assert torch.equal(first, draws(PAIRS)(*place)["mix_lam"])
    assert (np.random.get_state()[1] == state).all()
    assert not torch.equal(first, draws(PAIRS, seed=1)(*place)["mix_lam"])


def test_repeats_of_an_image_are_in_one_step_and_mixed_with_another_image():
    """Three samples each of eight images: sample v of image p stands at place 8 v + p, its partner 12 further on."""
    image, repeat = np.tile(np.arange(8), 3), np.repeat(np.arange(3), 8)
    pairs = ClassifierAugment(mixup=0.8, mix_mode="pair")
    drawn = draws(pairs, repeats=3)(np.zeros(24, dtype=np.int64), image * 3 + repeat)
    assert torch.equal(drawn["mix_lam"][:12], drawn["mix_lam"][12:])
    assert len(set(drawn["mix_lam"].tolist())) == 12
    assert (np.roll(image, 12) != image).all()
    one = draws(repeats=3)(np.zeros(24, dtype=np.int64), image * 3 + repeat)["mix_lam"]
    assert (one == one[0]).all()


def test_a_chance_of_mixing_leaves_the_others_alone_and_changes_no_mixture():
    """timm draws first whether to mix: those that are mixed are the same as with chance 1."""
    places = np.zeros(400, dtype=np.int64), np.arange(400)
    always = draws(ClassifierAugment(mixup=0.8, cutmix=1.0), images=2, length=400)(*places)
    half = draws(ClassifierAugment(mixup=0.8, cutmix=1.0, mix_prob=0.5), images=2, length=400)(*places)
    kept = (half["mix_lam"] == 1) & (half["mix_box"] == 0).all(1)
    assert 0.4 < kept.float().mean() < 0.6
    for name, tensor in half.items():
        assert torch.equal(tensor[~kept], always[name][~kept])


@pytest.mark.parametrize("prob", [0.3, 0.7])
def test_timm_decides_alike_whether_to_mix(prob):
    from timm.data import Mixup

    theirs = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, prob=prob, label_smoothing=0, num_classes=4)
    for seed in range(20):
        np.random.seed(seed)
        lam, use_cutmix = theirs._params_per_batch()
        own, box = draw_mix(np.random.RandomState(seed), (16, 16), mixup=0.2, cutmix=1.0, prob=prob)
        assert (lam == 1) == (own == 1 and box == (0, 0, 0, 0))
        if lam != 1 and not use_cutmix:
            assert own == lam
