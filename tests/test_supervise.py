"""Runs of timm's models from end to end on the bundled digits and on small folders of pictures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from hf_mae.birds import train_birds
from hf_mae.cli import main
from hf_mae.recipes.base import Data
from hf_mae.recipes.classification import ClassifierEvals, ClassifierOptim, Loss
from hf_mae.recipes.supervised import RESULTS, SUPERVISE, check_supervise
from hf_mae.supervise import supervise

CLOCK = {"images_per_second", "eval_images_per_second", "seconds_waiting_for_data", "waiting_share"}
SHORT = {"max_steps": 12, "global_batch": 32, "log_every": 5, "save_every": 6, "eval_every": 8, "num_workers": 0}


@pytest.fixture
def recipe(tmp_path):
    preset = SUPERVISE["supervise-digits"]
    return replace(
        preset,
        out=str(tmp_path / "run"),
        model=replace(preset.model, architecture="test_resnet"),
        evals=ClassifierEvals(split="test", pictures=False),
        **SHORT,
    )


@pytest.fixture
def birds(tmp_path):
    """Three species of 20 pictures each, told apart by their colour."""
    folder, rng = tmp_path / "species", np.random.default_rng(0)
    for k, name in enumerate(("heron", "robin", "wren")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., k] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def bird_recipe(name, folder, out):
    preset = SUPERVISE[name]
    return replace(
        preset,
        out=str(out),
        data=replace(preset.data, path=str(folder)),
        model=replace(preset.model, image_size=32),
        evals=replace(preset.evals, pictures=False),
        **(SHORT | {"global_batch": 12, "max_steps": 8, "eval_every": 4}),
    )


def rows(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def last(out):
    return out / "checkpoints" / "step_00000012"


def test_a_run_leaves_models_that_timm_and_transformers_load(recipe):
    out = supervise(replace(recipe, evals=ClassifierEvals(split="test")))
    assert [row["step"] for row in rows(out) if "top1" in row] == [8, 12]
    picture = torch.rand(2, 1, 32, 32)
    for folder in (last(out) / "model", out / "best" / "model"):
        ours = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        theirs = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(picture).logits, ours(picture), rtol=0, atol=1e-6)
        assert theirs.config.id2label[9] == "9"
    assert {"confusion.png", "per_class.png"} <= {p.name for p in (out / "pictures").iterdir()}
    assert not (out / "pictures" / "attention.png").exists()


def ways(recipe):
    everything = replace(
        recipe,
        model=replace(recipe.model, drop_rate=0.2, drop_path_rate=0.2),
        optim=ClassifierOptim(name="lamb", base_lr=0.02, weight_decay=0.02, eps=1e-6, clip_grad=1.0, ema_decay=0.9),
        augment=replace(recipe.augment, rotate=(10.0,), erase_prob=0.5, erase_fill="mean"),
    )
    return {
        "LAMB, BCE, mixing, drop path, dropout, averages": everything,
        "repeated augmentation": replace(everything, data=replace(recipe.data, repeat_augment=3)),
        "rising averages, a schedule by epochs": replace(
            recipe,
            optim=replace(recipe.optim, ema_decay=0.99, ema_warmup=True),
            schedule=replace(recipe.schedule, name="timm-cosine", per_epoch=True),
        ),
        "RMSProp": replace(recipe, optim=ClassifierOptim(name="rmsprop", base_lr=0.01, weight_decay=1e-5)),
        "SGD and AGC": replace(recipe, optim=ClassifierOptim(name="sgd", base_lr=0.1, nesterov=True, agc=0.01)),
        "a split in the recipe": replace(recipe, data=replace(recipe.data, split="train", splits="stratified:90/10")),
    }


@pytest.mark.parametrize(
    "name",
    [
        "LAMB, BCE, mixing, drop path, dropout, averages",
        "repeated augmentation",
        "rising averages, a schedule by epochs",
        "RMSProp",
        "SGD and AGC",
        "a split in the recipe",
    ],
)
def test_resuming_from_the_middle_equals_never_stopping(recipe, tmp_path, name):
    one = ways(recipe)[name]
    out = supervise(one)
    other = tmp_path / "resumed"
    shutil.copytree(out, other)
    shutil.rmtree(last(other))
    shutil.rmtree(other / "best")
    supervise(replace(one, out=str(other), num_workers=2))
    assert rows(other) == rows(out)
    files = sorted(p.relative_to(out) for p in [*last(out).rglob("*"), *(out / "best").rglob("*")] if p.is_file())
    for file in files:
        if file.name not in {"recipe.json", "manifest.json"}:  # they name the folder, and hash the file that does
            assert (out / file).read_bytes() == (other / file).read_bytes(), file
    assert any("model.safetensors" in file.name for file in files)


@pytest.mark.multiprocess
def test_two_processes_resume_to_the_same_bits(tmp_path):
    out, other = tmp_path / "run", tmp_path / "resumed"
    flags = ["--model.architecture", "test_resnet", "--max-steps", "8", "--save-every", "4", "--eval-every", "4"]
    flags += ["--num-workers", "1", "--evals.no-pictures", "--data.repeat-augment", "3", "--global-batch", "32"]
    flags += ["--optim.name", "lamb", "--optim.ema-decay", "0.9", "--model.drop-path-rate", "0.2"]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    start += [str(Path(__file__).parents[1] / "scripts" / "supervise.py"), "supervise-digits", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([*start, "--out", str(out)], check=True, env=environment, capture_output=True)
    shutil.copytree(out, other)
    shutil.rmtree(other / "checkpoints" / "step_00000008")
    subprocess.run([*start, "--out", str(other)], check=True, env=environment, capture_output=True)
    assert rows(other) == rows(out)
    for file in ("model/model.safetensors", "model_ema/model.safetensors", "training_state/optimizer.safetensors"):
        a, b = (folder / "checkpoints" / "step_00000008" / file for folder in (out, other))
        assert a.read_bytes() == b.read_bytes(), file


def test_weights_start_a_run_and_the_head_keeps_the_classes_that_stay(recipe, tmp_path, capsys):
    out = supervise(recipe)
    capsys.readouterr()
    again = supervise(replace(recipe, out=str(tmp_path / "again"), init_from=str(out), max_steps=1, eval_every=1))
    assert "the head keeps 10 of 10 classes" in capsys.readouterr().err
    before, after = (
        load_file(folder / "model" / "model.safetensors") for folder in (last(out), again / "checkpoints/step_00000001")
    )
    assert before.keys() == after.keys()
    assert (before["fc.weight"] - after["fc.weight"]).abs().max() < 0.05  # one update away, not drawn anew


# ------------------------------------------------------------------------------------------------ birds


def test_the_stages_of_the_birds_leave_their_records(birds, tmp_path):
    recipe = bird_recipe("rexnet-birds-corrected", birds, tmp_path / "birds")
    summary = train_birds(replace(recipe, data=replace(recipe.data, splits="stratified:60/20/20@3334")))
    assert list(summary["results"]) == ["train", "finetune_val", "finetune_train"]
    for found in summary["results"].values():
        assert 0 <= found["test"] <= 1
    out = tmp_path / "birds"
    assert json.loads((out / "birds.json").read_text()) == summary
    assert "trained on" in (out / "birds.md").read_text()
    assert (out / "learning.png").stat().st_size > 10_000
    tuned = json.loads((out / "finetune_val" / "recipe.json").read_text())
    assert (tuned["optim"]["name"], tuned["model"]["drop_rate"], tuned["data"]["split"]) == ("adam", 0.16, "validation")
    assert tuned["max_steps"] == 4  # four epochs of 12 images, in batches of 12
    assert summary["results"]["train"]["model"].endswith("model_ema")


def test_the_learning_rate_of_the_birds_is_searched_once_and_kept(birds, tmp_path, monkeypatch):
    searched = []

    def train(one):
        searched.append((one.schedule.warmup_lr, one.max_steps))
        out = Path(one.out)
        out.mkdir(parents=True)
        out.joinpath("metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "lr": 0.01, "loss": 1.0}\n')

    monkeypatch.setattr("hf_mae.lr_find._train", train)
    recipe = bird_recipe("rexnet-birds-published-effective", birds, tmp_path / "birds")
    recipe = replace(recipe, data=replace(recipe.data, splits="random:80/20@3334"), max_steps=1)
    summary = train_birds(recipe, finetune=False, find_lr="descending")
    assert searched == [(1e-2, 1000)]
    kept = json.loads((tmp_path / "birds" / "birds.json").read_text())["lr_find"]
    assert kept == summary["lr_find"]
    assert (kept["low"], kept["high"], kept["steps"], kept["suggestion"]) == (1e-5, 1e-2, 1000, None)
    assert train_birds(recipe, finetune=False, find_lr="descending") == summary
    assert len(searched) == 1
    shorter = train_birds(recipe, finetune=False, find_lr="ascending", lr_find_steps=20)
    assert searched[1:] == [(1e-7, 20)]
    assert "suggestion" in shorter["lr_find"]


def test_as_published_nothing_is_left_to_test_on(birds, tmp_path, capsys):
    recipe = bird_recipe("rexnet-birds-published-effective", birds, tmp_path / "birds")
    summary = train_birds(replace(recipe, data=replace(recipe.data, splits="random:80/20@3334")))
    assert "nothing is left to measure stage 9 on" in capsys.readouterr().err
    assert all(found["test"] is None for found in summary["results"].values())
    assert summary["results"]["train"]["model"].endswith("best/model")
    assert "not measured" in (tmp_path / "birds" / "birds.md").read_text()


def test_bird_models_have_fewer_than_five_million_parameters(birds, tmp_path):
    recipe = bird_recipe("rexnet-birds-corrected", birds, tmp_path / "run")
    with pytest.raises(ValueError, match=r"rexnet_130 has .* more than model.max_parameters=5,000,000"):
        supervise(replace(recipe, model=replace(recipe.model, architecture="rexnet_130")))


# ------------------------------------------------------------------------------------------------ presets


def test_every_preset_is_sound_and_says_where_it_comes_from():
    for recipe in SUPERVISE.values():
        check_supervise(recipe)
        assert recipe.source
        assert recipe.expected


def test_presets_train_as_many_updates_as_the_paper():
    for procedure, updates in {"a1": 375_000, "a2": 187_500, "a3": 62_500}.items():
        recipe = SUPERVISE[f"resnet50-{procedure}"]
        assert recipe.epochs * (1_281_167 // recipe.global_batch) == updates
        assert recipe.data.remainder == "drop"
    assert SUPERVISE["resnet50-a3"].optim.base_lr * 2048 / 256 == pytest.approx(8e-3)
    assert SUPERVISE["resnet50-a1"].optim.base_lr * 2048 / 256 == pytest.approx(5e-3)


def test_architectures_of_the_table_exist_in_timm():
    for architecture in [*RESULTS, "deit_small_patch16_224", "rexnet_100", "efficientnet_b0"]:
        assert timm.is_model(architecture), architecture


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 33}, "global_batch=33 is odd, and mixup and cutmix mix pairs"),
        ({"global_batch": 4, "data": Data(path="digits", repeat_augment=3)}, "would mix copies of one image"),
        ({"global_batch": 36, "data": Data(path="digits", repeats=3, repeat_augment=3)}, "both make several"),
        (
            {"loss": Loss(name="bce", threshold=0.0), "smoothing": 0.1},
            "loss.threshold=0 with augment.label_smoothing=0.1 makes every class of every image positive",
        ),
        (
            {"loss": Loss(name="bce", threshold=0.005), "smoothing": 0.1},
            "positive",
        ),
        ({"global_batch": 1, "mixing": 0.0}, "batch normalisation takes statistics of at least 2"),
        ({"model": {"architecture": "resnet5"}}, "resnet5"),
        ({"model": {"architecture": "resnet50.a1_in1k"}}, "--init-from"),
        ({"init_from": "runs/nothing"}, "init_from=runs/nothing does not exist"),
        ({"data": Data(path="digits", splits="half")}, "stratified:80/10/10"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(recipe, changes, message):
    changes = dict(changes)
    alpha, smoothing = changes.pop("mixing", 0.8), changes.pop("smoothing", 0.0)
    augment = replace(recipe.augment, mixup=alpha, label_smoothing=smoothing)
    model = replace(recipe.model, **changes.pop("model", {}))
    with pytest.raises(ValueError, match=message):
        supervise(replace(recipe, augment=augment, model=model, **changes))


def test_smoothing_that_a_threshold_erases_is_said(recipe, capsys):
    supervise(replace(recipe, max_steps=1, augment=replace(recipe.augment, label_smoothing=0.1)))
    assert "warning" in (said := capsys.readouterr().err)
    assert "smoothing" in said


def test_copies_on_one_device_are_said(recipe, capsys):
    supervise(replace(recipe, max_steps=1, data=replace(recipe.data, repeat_augment=3)))
    assert "repeat_augment=3" in capsys.readouterr().err


def test_a_split_file_of_other_data_is_refused(recipe, birds, tmp_path, capsys):
    main(["split", str(birds), "stratified:80/10/10@1", "--out", str(tmp_path / "splits.json")])
    assert "train" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"splits\.json"):
        supervise(replace(recipe, data=replace(recipe.data, split="train", splits=str(tmp_path / "splits.json"))))
