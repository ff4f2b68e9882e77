"""The schedules are the official one and timm's, number for number."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from hf_mae.recipes.base import Optim, Recipe, Schedule
from hf_mae.training.schedules import due, make_plan

RECIPE = Recipe(name="t", source="", expected="", epochs=2, global_batch=256, schedule=Schedule(warmup_epochs=1))


@pytest.mark.parametrize("setting", ["pretrain", "finetune", "no_warmup", "half_epoch_warmup"])
def test_lr_equals_the_official_schedule_at_every_iteration(goldens, setting):
    golden = json.loads((goldens / "golden.json").read_text())["lr_schedule"][setting]
    args = golden["args"]
    recipe = replace(
        RECIPE,
        epochs=args["epochs"],
        optim=Optim(base_lr=args["lr"]),
        schedule=Schedule(warmup_epochs=args["warmup_epochs"], min_lr=args["min_lr"]),
    )
    plan = make_plan(recipe, steps_per_epoch=5)
    assert plan.total_steps == 10
    for epoch, it, lr, _ in golden["rows"]:
        # Equal up to the last digits of a float64: the official code divides epochs where we divide steps.
        assert plan.lr_at(5 * epoch + it) == pytest.approx(lr, rel=1e-12, abs=1e-18)
    assert plan.lr_at(10) == pytest.approx(golden["lr_at_the_very_end"], abs=1e-12)


def test_lr_scales_with_the_global_batch_over_256():
    assert make_plan(replace(RECIPE, global_batch=1024), steps_per_epoch=5).lr == 4 * RECIPE.optim.base_lr


def test_max_steps_keeps_the_shape_of_the_schedule():
    long, short = make_plan(RECIPE, steps_per_epoch=100), make_plan(replace(RECIPE, max_steps=20), steps_per_epoch=100)
    assert short.total_steps == 20
    assert [short.lr_at(s) for s in range(20)] == pytest.approx([long.lr_at(10 * s) for s in range(20)])


def test_a_carried_remainder_counts_towards_the_length():
    # 800 epochs of 1,281,167 images in batches of 4,096: 312.79 updates an epoch.
    plan = make_plan(replace(RECIPE, epochs=800), steps_per_epoch=1_281_167 / 4096)
    assert plan.total_steps == 800 * 1_281_167 // 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": Schedule(warmup_epochs=2)}, "warmup_epochs=2 must be at least 0 and below epochs=2"),
        ({"epochs": 1.1}, "make no update"),
    ],
)
def test_runs_without_a_step_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_plan(replace(RECIPE, **change), steps_per_epoch=0.5)


def test_due_fires_on_multiples_and_at_the_end():
    assert [s for s in range(1, 11) if due(s, 4, 10)] == [4, 8, 10]
    assert [s for s in range(1, 11) if due(s, 0, 10)] == [10]


# ------------------------------------------------------------------------------------------------ timm's


TIMM = replace(
    RECIPE,
    optim=Optim(base_lr=8e-3),
    schedule=Schedule(name="timm-cosine", warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-6, per_epoch=True),
)


def by_epoch(recipe, steps_per_epoch):
    """The lr of the first and the last update of each epoch, which are the same."""
    plan = make_plan(recipe, steps_per_epoch=steps_per_epoch)
    firsts = [plan.lr_at(round(e * steps_per_epoch)) for e in range(round(recipe.epochs))]
    assert firsts == [plan.lr_at(round((e + 1) * steps_per_epoch) - 1) for e in range(round(recipe.epochs))]
    return [*firsts, plan.lr_at(plan.total_steps)]


@pytest.mark.parametrize(
    ("key", "epochs", "lr"),
    [("a3_100e_lr8e-3", 100, 8e-3), ("a2_300e_lr5e-3", 300, 5e-3), ("a1_600e_lr5e-3", 600, 5e-3)],
)
def test_lr_of_each_epoch_equals_that_of_timms_scheduler(goldens, key, epochs, lr):
    """Of A1 and A2 the golden has the first twelve epochs and the last three."""
    expected = json.loads((goldens / "rsb_optim.json").read_text())["cosine"][key]
    found = by_epoch(replace(TIMM, epochs=epochs, optim=Optim(base_lr=lr)), 625)
    if len(expected) < len(found):
        found = found[:12] + found[-4:]
    assert found == pytest.approx(expected, rel=1e-12)


def test_timms_own_start_and_end_of_the_schedule_can_be_had(goldens):
    expected = json.loads((goldens / "rsb_optim.json").read_text())["cosine"]["train_py_defaults_warmup_lr1e-5_min_lr0"]
    schedule = replace(TIMM.schedule, warmup_lr=1e-5, min_lr=0.0)
    assert by_epoch(replace(TIMM, epochs=100, schedule=schedule), 625) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_a_warmup_before_the_cosine_is_timms_warmup_prefix(goldens):
    """Which makes the run longer by the warm-up there; here the epochs are all of it."""
    expected = json.loads((goldens / "rsb_optim.json").read_text())["cosine"]["a3_warmup_prefix"]
    recipe = replace(TIMM, epochs=105, schedule=replace(TIMM.schedule, name="cosine"))
    assert by_epoch(recipe, 625)[:101] == pytest.approx(expected, rel=1e-12)


def test_timms_cosine_can_change_at_every_update(goldens):
    expected = json.loads((goldens / "rsb_optim.json").read_text())["cosine"]["a3_per_update_625_per_epoch"]
    recipe = replace(TIMM, epochs=100, schedule=replace(TIMM.schedule, per_epoch=False))
    plan = make_plan(recipe, steps_per_epoch=625)
    assert {step: plan.lr_at(int(step)) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_an_epoch_that_ends_within_an_update_changes_the_lr_at_the_next():
    plan = make_plan(replace(TIMM, epochs=10), steps_per_epoch=2.5)
    values = [plan.lr_at(step) for step in range(10)]
    assert values[0] == values[1] == values[2] != values[3] == values[4] != values[5]
    assert values[3] == pytest.approx(1e-6 + (8e-3 - 1e-6) / 5)


@pytest.mark.parametrize("name", ["cosine", "timm-cosine", "constant", "step"])
def test_max_steps_squeezes_every_schedule(name):
    schedule = Schedule(name=name, warmup_epochs=2, warmup_lr=1e-6, gamma=0.5, step_epochs=3, per_epoch=True)
    long = make_plan(replace(RECIPE, epochs=10, schedule=schedule), steps_per_epoch=100)
    short = make_plan(replace(RECIPE, epochs=10, schedule=schedule, max_steps=50), steps_per_epoch=100)
    assert [short.lr_at(s) for s in range(50)] == pytest.approx([long.lr_at(20 * s) for s in range(50)])


def test_a_constant_lr_may_be_warmed_up():
    recipe = replace(
        RECIPE, optim=Optim(base_lr=1.0), schedule=Schedule(name="constant", warmup_epochs=1, warmup_lr=0.2)
    )
    plan = make_plan(recipe, steps_per_epoch=4)
    assert [plan.lr_at(s) for s in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_steps_fall_by_epochs_counted_from_the_start_of_the_run():
    """As timm's do, warm-up or not; and as torch's StepLR(1, gamma) without one."""
    schedule = Schedule(name="step", warmup_epochs=1, gamma=0.5, step_epochs=2)
    recipe = replace(RECIPE, epochs=6, optim=Optim(base_lr=1.0), schedule=schedule)
    plan = make_plan(recipe, steps_per_epoch=2)
    assert [plan.lr_at(s) for s in range(12)] == [0, 0.5, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    plan = make_plan(replace(recipe, schedule=replace(schedule, warmup_epochs=0, step_epochs=2.4)), steps_per_epoch=5)
    assert [s for s in range(1, 30) if plan.lr_at(s) < plan.lr_at(s - 1)] == [12, 24]


@pytest.mark.parametrize(("low", "high"), [(1e-7, 1.0), (1e-2, 1e-5)])
def test_a_geometric_schedule_goes_from_one_lr_to_the_other(low, high):
    """Up, or down as the published bird run did it; a warm-up that the recipe has by default is none."""
    schedule = Schedule(name="exponential", warmup_lr=low)
    plan = make_plan(replace(RECIPE, max_steps=1000, optim=Optim(base_lr=high), schedule=schedule), steps_per_epoch=5)
    values = [plan.lr_at(s) for s in range(1000)]
    assert (values[0], values[-1]) == pytest.approx((low, high))
    ratios = [b / a for a, b in pairwise(values)]
    assert ratios == pytest.approx([(high / low) ** (1 / 999)] * 999)
    assert plan.warmup_steps == 0
    if high < low:
        assert values[19] == pytest.approx(8.77e-3, rel=1e-3)  # what the slides took for a minimum
