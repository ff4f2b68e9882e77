"""Recipes are plain data that survive JSON, and every preset is buildable."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from hf_mae import MAEConfig
from hf_mae.recipes.base import (
    HARMLESS,
    Data,
    Model,
    Optim,
    Recipe,
    changed_fields,
    flat,
    from_dict,
    to_dict,
)
from hf_mae.recipes.checks import check, choose_micro_batch
from hf_mae.recipes.mae import PRESETS
from hf_mae.training.schedules import make_plan

PAPER = ["mae-vit-b-800ep", "mae-vit-l-1600ep", "mae-vit-h-400ep"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_and_builds(name):
    recipe = PRESETS[name]
    assert recipe.name == name
    assert recipe.source
    assert recipe.expected
    assert from_dict(json.loads(json.dumps(to_dict(recipe))), type(recipe)) == recipe
    config = MAEConfig(**asdict(recipe.model))
    assert config.len_keep >= 1
    plan = make_plan(recipe, steps_per_epoch=100)
    assert plan.warmup_steps < plan.total_steps
    assert choose_micro_batch(recipe, 1) <= 64


@pytest.mark.parametrize(
    ("name", "norm_pix", "raw"),
    [
        ("mae-vit-l-100ep", (), ("82.3", "57.3")),
        ("mae-vit-l-800ep", ("85.4", "73.9"), ("84.9", "73.5")),
        ("mae-vit-l-1600ep", ("85.9", "75.8"), ("85.1", "75.1")),
        ("mae-vit-b-1600ep", ("83.6", "68.0"), ()),
        ("mae-vit-h-1600ep", ("86.9", "76.6"), ()),
    ],
)
def test_the_paper_presets_say_which_number_is_of_which_loss(name, norm_pix, raw):
    recipe = PRESETS[name]
    assert recipe.model.norm_pix_loss
    ours, _, theirs = recipe.expected.partition("Fig. 7")
    assert all(number in ours and number not in theirs for number in norm_pix)
    assert all(number in theirs and number not in ours for number in raw)
    assert not raw or "raw pixels" in theirs
    assert norm_pix or "not published with norm-pix" in ours


@pytest.mark.parametrize("target", ["pca", "token"])
def test_a_target_that_does_not_exist_yet_is_refused_and_help_says_so(target, capsys, tmp_path):
    from hf_mae.cli import main

    with pytest.raises(ValueError, match=rf"model.target={target} is not available yet; use pixel"):
        check(replace(PRESETS["mae-vit-b"], model=Model(target=target)))
    for command in (["pretrain", "mae-vit-b"], ["plan", "mae-vit-b"], ["lr-find", "pretrain", "mae-vit-b"]):
        with pytest.raises(SystemExit):
            main([*command, "--model.target", target, "--data.path", str(tmp_path)])
        assert "not available yet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["pretrain", "mae-vit-b", "--help"])
    words = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "pca and token are not available yet" in words


@pytest.mark.parametrize("name", PAPER)
def test_paper_presets_state_table_8(name):
    recipe = PRESETS[name]
    assert (recipe.optim.base_lr, recipe.optim.weight_decay, recipe.optim.betas) == (1.5e-4, 0.05, (0.9, 0.95))
    assert (recipe.global_batch, recipe.schedule.warmup_epochs) == (4096, 40)
    assert (recipe.augment.scale, recipe.augment.flip, recipe.augment.color_jitter) == ((0.2, 1.0), True, 0.0)
    assert (recipe.model.mask_ratio, recipe.model.decoder_hidden_size, recipe.model.decoder_num_hidden_layers) == (
        0.75,
        512,
        8,
    )
    assert make_plan(recipe, steps_per_epoch=312).lr == pytest.approx(2.4e-3)


def test_the_paper_sizes_have_the_published_numbers_of_parameters():
    # Encoder only, as published for ViT-B/16, ViT-L/16 and ViT-H/14 (86, 304 and 632 M), counted on the meta device.
    import torch

    from hf_mae import MAEModel

    for size, millions in (("b", 86), ("l", 304), ("h", 632)):
        with torch.device("meta"):
            model = MAEModel(MAEConfig.from_size(size))
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_an_unknown_field_is_named():
    values = to_dict(PRESETS["quickstart"])
    values["optim"] = values["optim"] | {"momentum": 0.9}
    with pytest.raises(ValueError, match=r"field\(s\) optim.momentum are unknown"):
        from_dict(values, Recipe)


def test_changes_that_alter_learning_are_told_from_harmless_ones():
    base = PRESETS["quickstart"]
    moved = replace(
        base, out="elsewhere", num_workers=7, log_every=1, data=replace(base.data, path="copy", streaming=False)
    )
    assert changed_fields(base, moved) == {}
    changed = replace(base, seed=3, optim=Optim(base_lr=1.0), data=Data(path="digits", window_rows=5))
    assert set(changed_fields(base, changed)) == {"seed", "optim.base_lr", "data.window_rows"}
    assert set(flat(base)) >= HARMLESS


def test_recipe_model_mirrors_the_config():
    parameters = set(MAEConfig().to_dict())
    assert {f.name for f in fields(Model)} <= parameters


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "message"),
    [
        (100, None, 3, "global_batch=100 is not divisible by 3 processes; use 99 or 102"),
        (96, 7, 1, "micro_batch=7 does not divide the 96 images each process takes of global_batch=96; use 6 or 8"),
        (0, None, 1, "global_batch=0 must be at least 1"),
    ],
)
def test_batches_that_do_not_divide_are_refused_with_ones_that_do(batch, micro, processes, message):
    recipe = Recipe(name="t", source="", expected="", global_batch=batch, micro_batch=micro)
    with pytest.raises(ValueError, match=message):
        choose_micro_batch(recipe, processes)


def test_the_automatic_micro_batch_divides():
    recipe = Recipe(name="t", source="", expected="", global_batch=96)
    assert choose_micro_batch(recipe, 1) == 48
    assert choose_micro_batch(recipe, 2) == 48
    assert choose_micro_batch(recipe, 4) == 24


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_check(name):
    check(PRESETS[name])


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("seed", 2**32, "must lie in 0 .. 4294967295"),
        ("seed", -1, "must lie in"),
        ("epochs", float("inf"), "must be above 0 and finite"),
        ("epochs", 0.0, "must be above 0"),
        ("max_steps", 0, "must be at least 1"),
        ("num_workers", -1, "must be at least 0"),
        ("log_every", -1, "must be at least 0"),
        ("data.lanes", 0, "must be at least 1"),
        ("data.max_bad_fraction", float("nan"), "must lie in 0 .. 1"),
        ("model.num_channels", 4, "must be 3"),
        ("model.mask_ratio", 0.0, "without a removed patch there is no loss"),
        ("augment.scale", (1.0, 0.2), "0 < low <= high <= 1"),
        ("augment.ratio", (0.0, 1.0), "0 < low <= high"),
        ("augment.color_jitter", float("nan"), "must lie in 0 .. 1"),
        ("augment.std", (0.0,), "must be positive"),
        ("augment.mean", (0.5, 0.5), "has 2 values but model.num_channels=1; give one per channel, such as"),
        ("optim.base_lr", -1.0, "must be above 0"),
        ("optim.clip_grad", 0.0, "must be above 0; leave it out"),
        ("optim.betas", (1.0, 2.0), "two numbers in"),
        ("optim.ema_decay", 1.0, "must lie between 0 and 1; leave it out"),
        ("schedule.min_lr", 1.0, "is above the peak lr=0.004"),
        ("evals.test_examples", 0, "must be at least 1"),
        ("evals.split", "train", "is the training split"),
        ("engine.keep_checkpoints", 0, "must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(field, value, rule):
    recipe, (group, _, name) = PRESETS["quickstart"], field.rpartition(".")
    changed = replace(getattr(recipe, group), **{name: value}) if group else None
    recipe = replace(recipe, **{group: changed} if group else {name: value})
    with pytest.raises(ValueError, match=f"^{field}=") as caught:
        check(recipe)
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("engine.checkpoint_activations", True), ("data.decoder", "Fast"), ("micro_batch", "Auto")],
)
def test_a_choice_that_does_not_exist_is_refused(field, value):
    group, _, name = field.rpartition(".")
    recipe = PRESETS["quickstart"]
    changed = replace(getattr(recipe, group), **{name: value}) if group else value
    with pytest.raises(ValueError, match=rf"{field}={value!r} is unknown; use one of "):
        check(replace(recipe, **{group or name: changed}))
