"""Values of a preset that nobody typed adapt to the data and to the length of the run; what was typed stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_mae.cli import parse_recipe
from hf_mae.cli.arguments import chosen_fields
from hf_mae.recipes.checks import check
from hf_mae.recipes.defaults import fit_batch, fit_intervals, squeeze_warmup, warn_of_few_updates
from hf_mae.recipes.mae import PRESETS, QUICKSTART
from hf_mae.recipes.supervised import SUPERVISE
from hf_mae.recipes.transfer import FINETUNE, PROBE
from hf_mae.training.schedules import make_plan

OWN = PRESETS["mae-vit-b"]  # a global batch of 1024
NOTHING: frozenset[str] = frozenset()


def fitted(recipe, rows, chosen=NOTHING, processes=1):
    recipe, notes = fit_batch(recipe, rows, chosen, processes=processes)
    return recipe.global_batch, " ".join(notes)


@pytest.mark.parametrize(("rows", "batch"), [(720, 64), (1023, 64), (300, 16), (36, 8), (5, 4), (1, 1)])
def test_a_global_batch_larger_than_the_data_makes_ten_updates_an_epoch_where_it_can(rows, batch):
    found, said = fitted(OWN, rows)
    assert found == batch
    assert f"global_batch=1024 is more than the {rows:,} images: using {batch}" in said
    assert f"lr up to {1.5e-4 * batch / 256:.3g}" in said
    assert "--global-batch" in said


def test_a_global_batch_that_fits_stays():
    assert fit_batch(OWN, 1024, NOTHING, processes=1) == (OWN, [])
    assert fit_batch(OWN, 0, NOTHING, processes=1) == (OWN, [])


@pytest.mark.parametrize("chosen", [None, {"global_batch"}])
def test_a_global_batch_that_was_chosen_stays_with_a_warning(chosen):
    found, said = fitted(OWN, 720, chosen)
    assert found == 1024
    assert said.startswith("warning: global_batch=1024 is more than the 720 images")
    assert "--global-batch 64" in said


def test_the_smaller_batch_can_be_run():
    repeated = replace(OWN, data=replace(OWN.data, repeats=3), global_batch=1536)
    assert fitted(repeated, 200)[0] == 48  # 16 images, three samples of each
    mixed = replace(FINETUNE["finetune-small"], data=replace(OWN.data, repeat_augment=16))
    assert fitted(mixed, 40)[0] == 32  # mixup would otherwise mix copies of one image
    assert fitted(OWN, 720, processes=64)[0] == 64
    assert fitted(OWN, 720, processes=128)[0] == 128
    assert fitted(PROBE["probe-vit-b"], 3)[0] == 2  # batch normalisation
    found, said = fitted(replace(OWN, micro_batch=48), 720)  # no power of two is a multiple of it
    assert found == 1024
    assert said.startswith("warning")


def test_intervals_beyond_the_run_are_shortened_and_those_within_stay():
    recipe, notes = fit_intervals(OWN, 9, NOTHING)
    assert (recipe.log_every, recipe.save_every, recipe.eval_every) == (1, 5, 3)
    assert all(flag in notes[0] for flag in ("--log-every", "--save-every", "--eval-every", "9 updates"))
    assert fit_intervals(OWN, 1000, NOTHING) == (OWN, [])
    assert fit_intervals(OWN, 9, None) == (OWN, [])
    recipe, _ = fit_intervals(OWN, 9, {"eval_every"})
    assert (recipe.log_every, recipe.eval_every) == (1, 1000)
    never = replace(OWN, log_every=0, save_every=0, eval_every=0)
    assert fit_intervals(never, 9, NOTHING) == (never, [])


def test_a_run_of_few_updates_is_said_with_what_makes_more():
    recipe = replace(OWN, epochs=8, global_batch=32)
    (said,) = warn_of_few_updates(recipe, 36, 9, 36 / 32)
    assert "9 updates in all" in said
    assert "--epochs 445" in said  # 500 updates of 32 of 36 images
    assert "--global-batch 8 makes 4 times as many" in said
    assert warn_of_few_updates(recipe, 36, 100, 36 / 32) == []
    assert warn_of_few_updates(replace(recipe, max_steps=9), 36, 9, 36 / 32) == []  # who types it knows it


# ------------------------------------------------------------------------------------------------ the warm-up


@pytest.mark.parametrize(
    ("presets", "name", "command"), [(PRESETS, "quickstart", "pretrain"), (SUPERVISE, "supervise-digits", "supervise")]
)
def test_epochs_within_the_warmup_squeeze_it_as_max_steps_does(presets, name, command, capsys):
    preset = presets[name]
    epochs = preset.schedule.warmup_epochs * 0.8
    recipe = parse_recipe(presets, [name, f"--epochs={epochs}"], default=name, command=command)
    check(recipe)
    plan = make_plan(recipe, steps_per_epoch=100)
    same = make_plan(replace(preset, max_steps=plan.total_steps), steps_per_epoch=100)
    assert plan.warmup_steps == pytest.approx(same.warmup_steps)
    assert [plan.lr_at(s) for s in range(10)] == pytest.approx([same.lr_at(s) for s in range(10)])
    said = capsys.readouterr().err
    assert "schedule.warmup_epochs" in said
    assert f"epochs={epochs:g}" in said
    assert "--schedule.warmup-epochs" in said


def test_only_a_warmup_that_does_not_fit_is_squeezed(capsys):
    half = replace(QUICKSTART, epochs=60)
    assert squeeze_warmup(half, QUICKSTART, {"epochs"}) == (half, [])
    recipe, notes = squeeze_warmup(replace(QUICKSTART, epochs=12), QUICKSTART, {"epochs"})
    assert recipe.schedule.warmup_epochs == 10
    assert "--schedule.warmup-epochs 1" in notes[0]
    parse_recipe(PRESETS, ["quickstart", "--epochs", "60"], default="quickstart")
    assert capsys.readouterr().err == ""


def test_a_warmup_that_was_typed_is_refused_where_it_does_not_fit():
    flags = ["quickstart", "--epochs", "8", "--schedule.warmup-epochs", "9"]
    with pytest.raises(ValueError, match=r"schedule.warmup_epochs=9 .* epochs=8; lower --schedule.warmup-epochs"):
        check(parse_recipe(PRESETS, flags, default="quickstart"))


def test_chosen_fields_are_those_of_the_flags():
    flags = ["--global-batch", "64", "--optim.base_lr=1e-3", "--data.no-streaming", "x", "-5"]
    assert {"global_batch", "optim.base_lr"} <= chosen_fields(flags)
    assert chosen_fields(["mae-vit-b"]) == frozenset()
