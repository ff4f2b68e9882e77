"""The search for a learning rate: where it looks, what it suggests, and how it ends."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hf_mae.lr_find import lr_find, search_recipe, smooth, suggest
from hf_mae.recipes.classification import ClassifierEvals
from hf_mae.recipes.mae import QUICKSTART
from hf_mae.recipes.supervised import SUPERVISE
from hf_mae.recipes.transfer import FINETUNE
from hf_mae.training.schedules import make_plan


@pytest.fixture
def recipe(tmp_path, encoder):
    return replace(
        FINETUNE["finetune-digits"],
        out=str(tmp_path / "find"),
        init_from=str(encoder),
        global_batch=64,
        num_workers=0,
        evals=ClassifierEvals(split="test", knn=True),
    )


def curve(steps, low=1e-6, high=1.0, at=1e-2):
    """Rates, and losses that fall in a step of a third of a decade around `at`, and rise from 0.3 on."""
    lrs = [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]
    return lrs, [1 + 1 / (1 + (lr / at) ** 3) + (30 * (lr - 0.3) if lr > 0.3 else 0) for lr in lrs]


@pytest.mark.parametrize("steps", [30, 100, 1000])
def test_the_suggestion_is_where_the_loss_falls_most_steeply(steps):
    lrs, losses = curve(steps)
    smoothed, used, at = suggest(lrs, losses)
    assert lrs[at] == pytest.approx(1e-2, rel=0.25)
    assert all(lr < 0.6 for lr in lrs[:used])
    assert used < steps
    assert max(smoothed[:used]) == smoothed[0]


@pytest.mark.parametrize("height", [2.0, 3.9])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [20, 100])
def test_the_recovery_of_a_loss_that_has_blown_up_is_no_suggestion(steps, seed, height):
    """The hump stays below four times the best loss, and the fall after it is the steepest of all."""
    lrs, _ = curve(steps)
    losses = [0.4 + 0.3 / (1 + (lr / 1e-3) ** 2) for lr in lrs]
    top = 0.4 * height
    for i, lr in enumerate(lrs):
        if lr > 0.03:
            losses[i] = top if lr < 0.3 else 0.5
    _, used, at = suggest(lrs, list(np.array(losses) + 0.01 * np.random.default_rng(seed).normal(size=steps)))
    assert 3e-4 < lrs[at] < 4e-3
    assert lrs[used - 1] < 0.06


@pytest.mark.parametrize(("steps", "sd"), [(20, 0.015), (100, 0.03)])
def test_noise_on_the_flat_beginning_does_not_end_the_curve(steps, sd):
    lrs, _ = curve(steps)
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(size=steps)
        losses = [1 + 0.3 / (1 + (lr / 1e-2) ** 2) + sd * n for lr, n in zip(lrs, noise, strict=True)]
        _, used, at = suggest(lrs, losses)
        assert used > 0.8 * steps, seed
        assert 1e-3 < lrs[at] < 0.1, seed


def test_a_dive_after_the_loss_has_risen_is_no_suggestion():
    lrs, losses = curve(100)
    first = suggest(lrs, losses)[2]
    losses[-2:] = [-100.0, -300.0]  # steeper than anything before it
    assert suggest(lrs, losses)[2] == first


def test_a_loss_that_only_rises_suggests_nothing():
    lrs, _ = curve(40)
    assert suggest(lrs, [1 + i / 100 for i in range(40)])[2] is None
    assert suggest(lrs[:5], [1.0, 0.9, 0.8, 0.7, 0.6])[2] is None


def test_waves_of_a_flat_noisy_beginning_are_no_descent(goldens):
    """A real search (birds, ReXNet): its first wave, at 5e-7, is steeper than the way down."""
    found = json.loads((goldens / "lr_find_birds.json").read_text())
    _, _, steepest = suggest(found["lr"], found["loss"])
    assert steepest is not None
    assert 3e-5 < found["lr"][steepest] < 1e-3


def test_smoothing_is_centred_and_keeps_lines():
    assert smooth([1.0] * 7, 2) == [1.0] * 7
    assert smooth([0.0, 1.0, 2.0, 3.0, 4.0], 1)[1:4] == [1.0, 2.0, 3.0]
    assert smooth([0.0, 0.0, 1.0, 0.0, 0.0], 1) == [0.0, 0.25, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("descending", [False, True])
def test_the_rate_grows_by_one_factor_from_low_to_high(descending, tmp_path):
    for recipe in (QUICKSTART, SUPERVISE["rexnet-birds-corrected"], SUPERVISE["resnet50-a1"]):
        asked = search_recipe(recipe, low=1e-5, high=1e-2, steps=1000, descending=descending, out=tmp_path)
        plan = make_plan(asked, steps_per_epoch=456.14)
        lrs = [plan.lr_at(step) for step in range(1000)]
        first, last = (1e-2, 1e-5) if descending else (1e-5, 1e-2)
        assert (lrs[0], lrs[-1]) == pytest.approx((first, last))
        assert [b / a for a, b in itertools.pairwise(lrs)] == pytest.approx([(last / first) ** (1 / 999)] * 999)
        if descending:  # the slides' "suggestion" of 8.77e-3 is an update of such a search, and no minimum
            assert any(math.isclose(lr, 8.77e-3, rel_tol=2e-3) for lr in lrs[15:22])


def test_a_search_trains_writes_and_can_be_repeated(recipe, monkeypatch):
    monkeypatch.setattr(
        "hf_mae.evaluation.classification.ClassificationQuality.measure", lambda *_: pytest.fail("it evaluated")
    )
    found = lr_find(recipe, low=1e-5, high=1.0, steps=20)
    assert [row["lr"] for row in found["rows"]] == pytest.approx([1e-5 * 10 ** (5 * i / 19) for i in range(20)])
    assert found["ended"] == "all 20 updates"
    assert json.loads((Path(recipe.out) / "lr_find.json").read_text()) == found
    assert (Path(recipe.out) / "lr_find.png").stat().st_size > 5000
    assert sorted(p.name for p in Path(recipe.out).iterdir()) == ["lr_find.json", "lr_find.png"]
    if found["suggestion"]:
        assert found["suggestion"]["lr"] == pytest.approx(found["suggestion"]["base_lr"] * 64 / 256)
    assert lr_find(recipe, low=1e-5, high=1.0, steps=20) == found


def test_a_search_with_the_same_settings_can_be_reused(recipe):
    trained = []

    def train(one):
        trained.append(one)
        lrs, losses = curve(20)
        rows = [{"step": 1, "epoch": 0.1, "lr": lr, "loss": loss} for lr, loss in zip(lrs, losses, strict=True)]
        return written(rows, Path(one.out))

    found = lr_find(recipe, steps=20, reuse=True, train=train)
    assert lr_find(recipe, steps=20, reuse=True, train=train) == found
    assert len(trained) == 1
    lr_find(recipe, steps=20, train=train)
    lr_find(recipe, steps=30, reuse=True, train=train)
    lr_find(recipe, steps=30, reuse=True, high=0.5, train=train)
    lr_find(replace(recipe, data=replace(recipe.data, path="elsewhere")), steps=30, high=0.5, reuse=True, train=train)
    lr_find(replace(recipe, global_batch=32), steps=30, high=0.5, reuse=True, train=train)
    assert len(trained) == 6


def test_a_falling_rate_is_the_slides_where_none_is_given(recipe):
    asked = []

    def train(one):
        plan = make_plan(one, steps_per_epoch=10.0)
        asked.append((plan.lr_at(0), plan.lr_at(one.max_steps - 1), one.max_steps))
        return written([], Path(one.out))

    lr_find(recipe, descending=True, train=train)
    lr_find(recipe, train=train)
    assert asked == [pytest.approx((1e-2, 1e-5, 1000)), pytest.approx((1e-7, 1.0, 100))]


def test_pretraining_is_searched_too(tmp_path, capsys):
    found = lr_find(replace(QUICKSTART, out=str(tmp_path), global_batch=32, num_workers=0), steps=10)
    assert len(found["rows"]) == 10
    assert "lr_find.png" in capsys.readouterr().err


def written(rows, out):
    out.mkdir(parents=True)
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_a_loss_that_is_not_finite_ends_the_search_and_what_was_found_counts(recipe):
    lrs, losses = curve(100)

    def train(one):
        rows = [
            {"step": 1, "epoch": 0.1, "lr": lr, "loss": loss}
            for i, (lr, loss) in enumerate(zip(lrs, losses, strict=True))
        ]
        written(rows[:95], Path(one.out))
        raise FloatingPointError("the loss of update 96 (samples 1 to 2) is not finite; nothing was saved after it")

    found = lr_find(recipe, low=1e-6, high=1.0, train=train)
    assert found["ended"] == "the loss of update 96 (samples 1 to 2) is not finite"
    assert len(found["rows"]) == 95
    assert found["suggestion"]["lr"] == pytest.approx(1e-2, rel=0.25)
    assert found["suggestion"]["base_lr"] == pytest.approx(found["suggestion"]["lr"] * 4)


def test_a_search_that_diverges_really_is_no_error(recipe):
    found = lr_find(replace(recipe, optim=replace(recipe.optim, name="sgd")), low=1e-2, high=1e30, steps=12)
    assert len(found["rows"]) < 12
    assert "is not finite" in found["ended"]


def test_a_falling_rate_suggests_nothing_and_says_why(recipe, capsys):
    def train(one):
        lrs, losses = curve(100)
        rows = [{"step": 1, "epoch": 0.1, "lr": lr, "loss": loss} for lr, loss in zip(lrs, losses, strict=True)]
        return written(rows[::-1], Path(one.out))

    found = lr_find(recipe, low=1e-6, high=1.0, descending=True, train=train)
    assert found["suggestion"] is None
    said = capsys.readouterr().err
    assert "under a falling lr every loss is the work of the larger rates before it" in said
    assert "--optim.base-lr" not in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"low": 1.0, "high": 0.1}, "low=1 and high=0.1 must be learning rates with 0 < low < high"),
        ({"low": 0.0}, "low=0 and high=1 must be"),
        ({"steps": 5}, "steps=5 are too few for a curve"),
    ],
)
def test_no_curve_is_refused(recipe, given, said):
    with pytest.raises(ValueError, match=said):
        lr_find(recipe, **given)


def test_an_interrupted_search_is_no_result(recipe):
    def train(one):
        (written([], Path(one.out)) / "stopped_by_signal").write_text("SIGTERM")
        return Path(one.out)

    with pytest.raises(RuntimeError, match="stopped by a signal; run the same command again"):
        lr_find(recipe, train=train)


def test_an_interrupted_search_does_not_promise_to_continue(recipe, monkeypatch, capsys):
    monkeypatch.setattr("hf_mae.training.signals.StopSignal.agreed", lambda _: True)
    with pytest.raises(RuntimeError, match="begins anew"):
        lr_find(recipe, steps=10)
    said = capsys.readouterr().err
    assert "stopped by a signal after step 1" in said
    assert "continues" not in said


@pytest.mark.parametrize("kind", ["finetune", "pretrain"])
def test_a_search_that_diverges_is_not_said_not_to_learn(recipe, kind, tmp_path, capsys):
    """The warning of a run comes from its hundredth update on; the loss of a search is meant to blow up there."""
    evals = replace(QUICKSTART.evals, knn=False)
    small = replace(QUICKSTART, out=str(tmp_path / "pretrain"), global_batch=16, num_workers=0, evals=evals)
    one = recipe if kind == "finetune" else small
    found = lr_find(replace(one, global_batch=16), low=1e-3, high=50.0, steps=105)
    assert found["rows"][-1]["loss"] > found["rows"][0]["loss"]
    said = capsys.readouterr().err
    assert "learning: loss" not in said
    assert "base-lr three times" not in said
