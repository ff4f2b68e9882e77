"""The schedule is the official one, number for number."""

from __future__ import annotations

import json
from dataclasses import replace

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
