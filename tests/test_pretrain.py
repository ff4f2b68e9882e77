"""Pretraining as a user starts it: run folder, resume, errors that teach, everything on the bundled digits."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.cli import main, parse_recipe
from hf_mae.evaluation import features
from hf_mae.pretrain import MaskNoise, load_pretrained, pretrain
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, Data, Engine, Evals
from hf_mae.recipes.mae import PRESETS, QUICKSTART
from hf_mae.run import data_advice, precision_advice
from hf_mae.training.tasks import Pretraining

CLOCK = {"images_per_second", "seconds_waiting_for_data", "waiting_share"}


@pytest.fixture
def recipe(tmp_path):
    model = replace(QUICKSTART.model, hidden_size=16, num_hidden_layers=1, decoder_hidden_size=16)
    return replace(
        QUICKSTART,
        out=str(tmp_path / "run"),
        max_steps=12,
        global_batch=64,
        log_every=5,
        save_every=6,
        eval_every=8,
        num_workers=0,
        model=replace(model, decoder_num_hidden_layers=1),
        evals=Evals(train_examples=300, test_examples=100, pictures=2),
    )


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def clockless(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows(folder)]


def test_a_run_leaves_all_its_records(recipe):
    out = pretrain(recipe)
    assert json.loads((out / "recipe.json").read_text())["global_batch"] == 64
    start = json.loads((out / "environment.json").read_text())["starts"][0]
    assert start["processes"] == 1
    assert start["tested_on"] == "test"
    assert start["packages"]["torch"] == torch.__version__.split("+")[0] or "+" in start["packages"]["torch"]
    assert [(r["step"], "loss" in r, "knn_accuracy" in r) for r in rows(out)] == [
        (0, False, True),
        (5, True, False),
        (8, False, True),
        (10, True, False),
        (12, True, False),
        (12, False, True),
    ]
    assert sorted(p.name for p in (out / "pictures").iterdir()) == [f"step_{s:08d}.png" for s in (0, 8, 12)]
    assert (out / "last").read_text().strip() == "step_00000012"
    model = MAEForPreTraining.from_pretrained(out / "checkpoints" / "step_00000012" / "model")
    assert model.config.image_size == 8
    assert MAEModel.from_pretrained(out / "checkpoints" / "step_00000012" / "model").num_parameters() > 0


def test_the_logistic_probe_is_left_out_where_it_would_take_hours(recipe, capsys, monkeypatch):
    monkeypatch.setattr(features, "MAX_LOGISTIC", 1000)
    out = pretrain(replace(recipe, max_steps=1, evals=replace(recipe.evals, probe=True, train_examples=40)))
    assert "logistic regression is left out: " in capsys.readouterr().err
    assert "knn_accuracy" in rows(out)[0]
    assert not any("probe_accuracy" in row for row in rows(out))


def test_the_same_command_on_a_finished_run_does_nothing(recipe, capsys):
    out = pretrain(recipe)
    before = clockless(out)
    pretrain(recipe)
    assert clockless(out) == before
    assert "this run is finished" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_from_the_middle_equals_never_stopping(recipe, tmp_path, workers):
    recipe = replace(recipe, num_workers=workers)
    out = pretrain(recipe)
    other = tmp_path / "resumed"
    shutil.copytree(out, other)
    shutil.rmtree(other / "checkpoints" / "step_00000012")
    pretrain(replace(recipe, out=str(other), num_workers=2 - workers))
    assert clockless(other) == clockless(out)
    names = ("model/model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json")
    for name in names:
        a, b = (folder / "checkpoints" / "step_00000012" / name for folder in (out, other))
        assert a.read_bytes() == b.read_bytes(), name
    assert len(json.loads((other / "environment.json").read_text())["starts"]) == 2


def test_a_damaged_newest_checkpoint_is_skipped_with_a_word(recipe, capsys):
    out = pretrain(recipe)
    expected = clockless(out)
    (out / "checkpoints" / "step_00000012" / "recipe.json").write_text("{}")
    pretrain(recipe)
    assert "skipping damaged checkpoint" in (said := capsys.readouterr().err)
    assert "resuming at step 6 of 12" in said
    assert clockless(out) == expected


def test_another_recipe_is_refused_with_the_fields_that_differ(recipe):
    pretrain(recipe)
    with pytest.raises(ValueError, match=r"model.mask_ratio was 0.75, is 0.5; schedule.warmup_epochs was 10, is 3\."):
        pretrain(
            replace(
                recipe,
                model=replace(recipe.model, mask_ratio=0.5),
                schedule=replace(recipe.schedule, warmup_epochs=3),
            )
        )


def test_other_data_is_refused(recipe, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(70):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")
    own = replace(recipe, data=Data(path=str(folder)), evals=Evals(knn=False, pictures=0))
    pretrain(own)
    (folder / "0.png").rename(folder / "zero.png")
    with pytest.raises(ValueError, match=r"fingerprint was .* the data has changed"):
        pretrain(own)


def test_resume_never_protects_a_run(recipe):
    pretrain(recipe)
    with pytest.raises(ValueError, match=r"resume=never but out=.* holds a run"):
        pretrain(replace(recipe, resume="never"))


def test_resume_takes_a_run_folder_or_a_checkpoint_of_another_run(recipe, tmp_path):
    out = pretrain(recipe)
    again = replace(recipe, out=str(tmp_path / "again"), resume=str(out / "checkpoints" / "step_00000006"))
    again = replace(again, engine=replace(recipe.engine, keep_checkpoints=1))
    other = pretrain(again)
    names = [folder / "checkpoints" / "step_00000012" / "model" / "model.safetensors" for folder in (out, other)]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert len(list((out / "checkpoints").iterdir())) == 2  # the other run's folder is only read
    assert json.loads((other / "recipe.json").read_text())["resume"] == again.resume
    with pytest.raises(ValueError, match="is neither auto, never, nor a checkpoint folder"):
        pretrain(replace(recipe, out=str(tmp_path / "third"), resume=str(tmp_path)))


def test_an_output_folder_that_cannot_be_made_is_refused_before_training(recipe, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"out=.*file/run cannot be written .* choose another --out"):
        pretrain(replace(recipe, out=str(tmp_path / "file" / "run")))


def test_unlabelled_data_runs_without_knn(recipe, tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(rng.integers(0, 256, (12, 10), np.uint8)).save(folder / f"{i}.png")
    out = pretrain(replace(recipe, data=Data(path=str(folder)), evals=Evals()))
    said = capsys.readouterr().err
    assert "kNN: off, the training split has no labels" in said
    assert "directions the features use, 1 to" in next(line for line in said.splitlines() if line.startswith("RankMe"))
    assert "higher is better" in said
    assert "rankme" in rows(out)[0]
    assert "knn_accuracy" not in rows(out)[0]


def test_masks_depend_on_the_place_in_the_stream_alone():
    noise = MaskNoise(MAEConfig(image_size=32, patch_size=8), seed=3)
    together = noise(np.array([0, 0, 1]), np.array([5, 6, 5]))["noise"]
    assert torch.equal(together[1:2], noise(np.array([0]), np.array([6]))["noise"])
    assert not torch.equal(together[0], together[2])
    assert together.shape == (3, 16)
    assert together.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ the command line


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "command 'pretrian' is unknown; did you mean pretrain"),
        (["pretrain", "mae-vit-x-800ep"], "preset 'mae-vit-x-800ep' is unknown; did you mean mae-vit-"),
        (["pretrain", "mae-vit-b"], "data.path is empty; name a folder"),
        (["pretrain", "--model.patch-size", "3"], "image_size=8 is not a multiple of patch_size=3; use 6 or 9"),
        (["pretrain", "--model.mask-ratio", "0.99"], "mask_ratio=0.99"),
        (["pretrain", "--global-batch", "64", "--micro-batch", "7"], "micro_batch=7 does not divide"),
        (["pretrain", "--optim.clip-grad", "-1"], "optim.clip_grad=-1.0 must be above 0"),
        (
            ["pretrain", "--epochs", "5", "--schedule.warmup-epochs", "6"],
            "warmup_epochs=6 must be at least 0 and below epochs=5",
        ),
        (["pretrain", "--data.path", "no/such/folder"], "no/such/folder"),
        (["pretrain", "--engine.expect-processes", "4"], "expect_processes=4 but 1 process(es) started"),
        (["pretrain", "--augment.mean", "0.5", "0.5"], "augment.mean=(0.5, 0.5) has 2 values but model.num_channels=1"),
    ],
)
def test_mistakes_end_with_one_sentence_and_no_traceback(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) in {1, 2}
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/checkpoints/step_*"))


def test_list_and_help_say_what_there_is(capsys):
    main(["pretrain", "--list"])
    listed = capsys.readouterr().out
    assert "mae-vit-l-1600ep" in listed
    assert "paper, Table 3: 85.9 % fine-tuned" in listed
    main(["--help"])
    assert "hf-mae pretrain [PRESET]" in capsys.readouterr().out


def test_reconstruct_draws_one_picture(recipe, tmp_path, capsys):
    out = pretrain(recipe)
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(20, 15)).save(tmp_path / "a.png")
    model = str(out / "checkpoints" / "step_00000012" / "model")
    main(["reconstruct", model, str(tmp_path / "a.png"), "--out", str(tmp_path / "r.png")])
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.width > picture.height
    main(["reconstruct", str(out), str(tmp_path / "a.png"), "--out", str(tmp_path / "s.png")])
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "r.png").read_bytes()
    assert run("reconstruct", str(tmp_path), str(tmp_path / "a.png")) == 2
    assert "is not a model folder (no config.json)" in capsys.readouterr().err
    (tmp_path / "b.png").write_text("no picture")
    assert run("reconstruct", model, str(tmp_path / "b.png")) == 2
    assert "b.png cannot be used: not a known image format" in capsys.readouterr().err


def test_tensorboard_receives_the_numbers(recipe):
    pytest.importorskip("tensorboard", reason="the extra [track] is not installed")
    out = pretrain(replace(recipe, engine=replace(recipe.engine, track="tensorboard")))
    assert any(os.path.getsize(p) > 100 for p in (out / "events").iterdir())


def test_a_change_that_ends_bitwise_equality_is_said(recipe, capsys):
    out = pretrain(recipe)
    (out / "checkpoints" / "step_00000012" / "manifest.json").unlink()
    pretrain(replace(recipe, micro_batch=32))
    said = capsys.readouterr().err
    assert "note: micro_batch was 64, is 32: the run goes on, equal up to rounding but not to the last bit" in said


def test_bf16_checkpointed_activations_and_averages_train_and_resume(recipe):
    """Half precision changes the numbers a little, checkpointing not at all; both resume exactly."""
    plain = pretrain(recipe)
    for what in ("gelu", "blocks"):
        engine = replace(recipe.engine, checkpoint_activations=what)
        again = pretrain(replace(recipe, out=f"{recipe.out}_{what}", engine=engine))
        assert clockless(again) == clockless(plain)
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process
    engine = replace(engine, precision="bf16")
    half = replace(recipe, out=recipe.out + "_half", engine=engine, optim=replace(recipe.optim, ema_decay=0.9))
    out = pretrain(half)
    expected = clockless(out)
    assert expected != clockless(plain)
    assert expected[1]["loss"] == pytest.approx(clockless(plain)[1]["loss"], rel=0.02)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    pretrain(half)
    assert clockless(out) == expected


def test_an_automatic_micro_batch_is_kept_when_the_run_goes_on(recipe, monkeypatch, capsys):
    found = iter([16, 64])
    monkeypatch.setattr("hf_mae.run.largest_micro_batch", lambda *a, **k: next(found))
    stop = replace(recipe, micro_batch="auto")
    out = pretrain(stop)
    shutil.rmtree(out / "checkpoints" / "step_00000012")
    pretrain(stop)
    starts = json.loads((out / "environment.json").read_text())["starts"]
    assert [s["micro_batch"] for s in starts] == [16, 16]
    assert "micro_batch=auto: 16 images fit" in capsys.readouterr().err


def test_an_automatic_micro_batch_is_what_fits(recipe, monkeypatch, capsys):
    monkeypatch.setattr("hf_mae.training.memory._budget", lambda device: 700_000.0)
    out = pretrain(replace(recipe, micro_batch="auto"))
    chosen = json.loads((out / "environment.json").read_text())["starts"][0]["micro_batch"]
    assert chosen in (2, 4, 8, 16, 32)  # not the 64 of the default, nor nothing
    assert f"micro_batch=auto: {chosen} images fit" in capsys.readouterr().err
    monkeypatch.setattr("hf_mae.training.memory._budget", lambda device: 1e9)
    other = replace(recipe, micro_batch="auto", out=recipe.out + "_2", resume=str(out / "checkpoints/step_00000006"))
    out = pretrain(other)  # another folder: nothing to keep to
    assert json.loads((out / "environment.json").read_text())["starts"][0]["micro_batch"] == 64


def test_repeated_samples_train_and_resume_to_the_same_bits(recipe, tmp_path):
    recipe = replace(recipe, num_workers=2, data=replace(recipe.data, repeats=2))
    out = pretrain(recipe)
    assert rows(out)[-1]["epoch"] == pytest.approx(12 * 32 / 1437, abs=1e-4)  # 32 images an update make 64 samples
    other = replace(recipe, out=str(tmp_path / "other"), resume=str(out / "checkpoints" / "step_00000006"))
    resumed = pretrain(other)
    for name in ("model/model.safetensors", "training_state/optimizer.safetensors"):
        there, here = (f / "checkpoints" / "step_00000012" / name for f in (out, resumed))
        assert there.read_bytes() == here.read_bytes()
    with pytest.raises(ValueError, match=r"data\.repeats was 2, is 4"):
        pretrain(replace(recipe, data=replace(recipe.data, repeats=4)))


def test_a_batch_that_repeats_do_not_divide_is_refused_before_data_is_opened(recipe):
    with pytest.raises(ValueError, match=r"global_batch=64 is not a multiple of data\.repeats=3"):
        pretrain(replace(recipe, data=replace(recipe.data, repeats=3, path="nowhere")))


@pytest.mark.parametrize(("resume", "said"), [("auto", "the same command continues"), ("never", "--resume auto")])
def test_a_stopped_run_says_what_continues_it(recipe, monkeypatch, capsys, resume, said):
    with monkeypatch.context() as patched:
        patched.setattr("hf_mae.training.signals.StopSignal.agreed", lambda _: True)
        pretrain(replace(recipe, resume=resume))
    assert said in next(line for line in capsys.readouterr().err.splitlines() if "stopped by a signal" in line)
    pretrain(replace(recipe, resume="auto"))
    assert "resuming at step 1" in capsys.readouterr().err


def test_float32_on_a_gpu_is_said_with_what_to_set(recipe):
    assert "--engine.precision bf16" in precision_advice(recipe, "cuda")
    assert precision_advice(recipe, "cpu") is None
    for engine in (Engine(precision="bf16"), Engine(tf32=True)):
        assert precision_advice(replace(recipe, engine=engine), "cuda") is None


def test_a_run_that_waits_for_data_says_what_helps(recipe):
    waiting = [{"step": 5, "waiting_share": 0.5}, {"step": 10, "waiting_share": 0.3}, {"step": 10, "rankme": 3.0}]
    advice = data_advice(recipe, waiting)
    assert advice.startswith("waited for data 40% of the time; try ")
    assert "--data.decoder fast" in advice
    assert "--data.decoder" not in data_advice(replace(recipe, data=Data(decoder="fast")), waiting)
    assert data_advice(recipe, [{"waiting_share": 0.05}]) is None


# ------------------------------------------------------------------------------------------------ failed starts


@pytest.mark.parametrize("where", ["data", "build", "first update", "interrupted"])
def test_a_start_that_fails_leaves_no_folder(recipe, tmp_path, monkeypatch, where):
    recipe = replace(recipe, out=str(tmp_path / "runs" / "new" / "run"))

    def fail(*arguments, **options):
        raise KeyboardInterrupt if where == "interrupted" else RuntimeError("out of memory")

    if where == "data":
        recipe = replace(recipe, data=Data(path=str(tmp_path / "nothing")))
    elif where == "first update":
        monkeypatch.setattr("hf_mae.training.tasks.Pretraining.forward", fail)
    else:
        monkeypatch.setattr("hf_mae.pretrain.MaskedPretraining.build", fail)
    with pytest.raises((ValueError, RuntimeError, KeyboardInterrupt)):
        pretrain(recipe)
    assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_what_was_there(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    wrong = replace(recipe, data=Data(path=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="no such folder"):
        pretrain(wrong)
    assert (out / "notes.txt").read_text() == "mine"
    shutil.rmtree(out)
    pretrain(recipe)
    before = clockless(out)
    with pytest.raises(ValueError, match="no such folder"):
        pretrain(wrong)
    assert clockless(out) == before
    assert (out / "checkpoints" / "step_00000012").is_dir()


def test_a_run_that_trained_keeps_its_folder_when_it_fails(recipe, monkeypatch):
    real = Pretraining.forward
    calls = []

    def diverge(self, batch):
        calls.append(1)
        losses = real(self, batch)
        return losses | {"loss": losses["loss"] * float("nan")} if len(calls) > 3 else losses

    monkeypatch.setattr(Pretraining, "forward", diverge)
    with pytest.raises(FloatingPointError):
        pretrain(recipe)
    assert "environment.json" in os.listdir(recipe.out)


def test_a_tracker_that_is_missing_is_said_before_anything_is_opened(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("hf_mae.run.open_source", lambda *a, **k: pytest.fail("the data was opened"))
    with pytest.raises(ValueError, match=r"engine.track=trackio is not installed .*hf_mae\[track\]"):
        pretrain(replace(recipe, engine=replace(recipe.engine, track="trackio")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_runs_lie_in_one_project_of_trackio_and_are_told_apart(recipe, tmp_path):
    """In processes of their own, as Trackio reads where to write when it is imported."""
    pytest.importorskip("trackio", reason="the extra [track] is not installed")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("TRACKIO_DIR", None)
    command = [sys.executable, "-m", "hf_mae.cli", "pretrain", "--max-steps", "2", "--engine.track", "trackio"]
    flags = ["--evals.no-knn", "--evals.no-rankme", "--evals.no-probe", "--evals.pictures", "0", "--num-workers", "0"]
    for folder in ("a", "b"):
        out = tmp_path / folder / "my run"
        done = subprocess.run(
            [*command, *flags, "--out", str(out)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "trackio show --project hf_mae" in done.stderr
        assert "\x1b" not in done.stderr + done.stdout
    script = "import sys, trackio; print('\\n'.join(sorted(r.name for r in trackio.Api().runs('hf_mae'))))"
    listed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=True
    ).stdout.split("\n")
    names = {(tmp_path / folder / "my run/events/trackio_run").read_text().strip() for folder in ("a", "b")}
    assert len(names) == 2
    assert names <= set(listed)


# ------------------------------------------------------------------------------------------------ defaults that adapt

TINY = [
    *("--model.image-size", "16", "--model.patch-size", "8", "--model.hidden-size", "16"),
    *("--model.num-hidden-layers", "1", "--model.num-attention-heads", "2", "--model.decoder-hidden-size", "16"),
    *("--model.decoder-num-hidden-layers", "1", "--model.decoder-num-attention-heads", "2", "--num-workers", "0"),
    *("--evals.no-rankme", "--evals.pictures", "1"),
]


@pytest.fixture
def few_images(tmp_path):
    """A folder of 36 images, with a name that a shell would take apart."""
    folder = tmp_path / "my images (1)"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(36):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_a_preset_adapts_to_few_images_and_the_same_command_continues(few_images, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["pretrain", "mae-vit-ti", "--data.path", str(few_images), "--out", str(out), "--epochs", "4", *TINY]
    main(command)
    said = capsys.readouterr().err
    assert "global_batch=1024 is more than the 36 images: using 8" in said
    assert "18 updates in all" in said
    saved = json.loads((out / "recipe.json").read_text())
    assert (saved["global_batch"], saved["save_every"], saved["eval_every"], saved["log_every"]) == (8, 9, 5, 2)
    assert saved["schedule"]["warmup_epochs"] == pytest.approx(0.2)  # 40 of 800
    expected = clockless(out)
    assert [row["step"] for row in expected if "loss" in row] == [2, 4, 6, 8, 10, 12, 14, 16, 18]
    assert json.loads((out / "checkpoints/step_00000009/recipe.json").read_text())["global_batch"] == 8
    shutil.rmtree(out / "checkpoints" / "step_00000018")
    main(command)
    assert "resuming at step 9 of 18" in capsys.readouterr().err
    assert clockless(out) == expected
    Image.new("RGB", (20, 20)).save(few_images / "new.png")
    assert run(*command) == 2
    assert "rows was 36 in the checkpoint and is 37 now: the data has changed" in capsys.readouterr().err


def test_a_global_batch_that_was_typed_is_kept_with_a_warning(few_images, tmp_path, capsys):
    flags = ["--data.path", str(few_images), "--out", str(tmp_path / "run"), "--max-steps", "2"]
    main(["pretrain", "mae-vit-ti", *flags, "--global-batch", "64", *TINY])
    said = capsys.readouterr().err
    assert "warning: global_batch=64 is more than the 36 images" in said
    assert "--global-batch 8" in said
    assert "hardly any" not in said  # two updates were asked for
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["global_batch"] == 64


def test_a_run_that_an_earlier_version_did_not_adapt_continues(few_images, tmp_path, capsys):
    flags = ["--data.path", str(few_images), "--out", str(tmp_path / "run"), "--max-steps", "2", *TINY]
    recipe = parse_recipe(PRESETS, ["mae-vit-ti", *flags], default="mae-vit-ti")
    pretrain(replace(recipe, global_batch=1024, save_every=1))  # a recipe from Python is not adapted
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000002")
    main(["pretrain", "mae-vit-ti", *flags])
    assert "resuming at step 1 of 2" in capsys.readouterr().err


@pytest.fixture
def models(encoder, tmp_path):
    """A pretraining folder with what reconstructions need, a classifier, a model of timm and an image."""
    statistics = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5], "image_std": [0.5]}
    (encoder / "preprocessor_config.json").write_text(json.dumps(statistics))
    MAEForImageClassification.from_encoder(encoder, num_labels=3).save_pretrained(tmp_path / "classifier")
    MAEModel.from_pretrained(encoder).save_pretrained(tmp_path / "tokens")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "config.json").write_text('{"architecture": "resnet10t", "pretrained_cfg": {}}')
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(20, 15)).save(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoder"], "no image is named; name one or more image files: hf-mae reconstruct"),
        (["encoder", "missing.png"], "missing.png is not a file; name image files"),
        (["encoder", "timm"], "timm is not a file; name image files"),
        (["encoder", "a.png", "--out", "no/such/folder.png"], "its folder does not exist"),
        (["encoder", "a.png", "--out", "timm"], "out=timm is not the name of an image file"),
        (["encoder", "a.png", "--out", "picture.xyz"], "out=picture.xyz is not the name of an image file"),
        (["classifier", "a.png"], "model=classifier holds MAEForImageClassification, which cannot reconstruct; name a"),
        (["tokens", "a.png"], "model=tokens holds MAEModel, which cannot reconstruct"),
        (["timm", "a.png"], "model=timm holds a model of timm, which cannot reconstruct"),
        (["nowhere", "a.png"], "model=nowhere does not exist; name a run folder"),
        (["./nowhere", "a.png"], "model=./nowhere does not exist; name a run folder"),
        (["a.png", "a.png"], "a.png cannot be used as it is"),
    ],
)
def test_what_cannot_be_reconstructed_is_told_in_one_sentence(models, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(models)
    assert run("reconstruct", *arguments) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("hf-mae: error: ")
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no preprocessor_config.json, so its mean and std are not known"),
        ("{", "has a preprocessor_config.json that cannot be used"),
        ('{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5]}', "takes 1 channel(s)"),
        (
            '{"image_processor_type": "ViTImageProcessor", "image_mean": [0.5], "image_std": [0.0]}',
            "one value per channel, image_std above 0",
        ),
    ],
)
def test_a_model_whose_mean_and_std_are_not_known_is_refused(models, text, message, capsys):
    path = models / "encoder" / "preprocessor_config.json"
    path.unlink() if text is None else path.write_text(text)
    assert run("reconstruct", str(models / "encoder"), str(models / "a.png"), "--out", str(models / "r.png")) == 2
    assert message in capsys.readouterr().err


def test_an_official_file_is_reconstructed_with_the_authors_mean_and_std(tmp_path):
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "decoder_num_hidden_layers": 1}
    model = MAEForPreTraining(MAEConfig(image_size=16, patch_size=8, norm_pix_loss=True, **sizes))
    arguments = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75)
    torch.save({"model": model.state_dict(), "args": arguments}, tmp_path / "mae.pth")
    Image.new("RGB", (20, 20), (250, 10, 99)).save(tmp_path / "a.png")
    main(["reconstruct", str(tmp_path / "mae.pth"), str(tmp_path / "a.png"), "--out", str(tmp_path / "r.png")])
    found, mean, std, _, _ = load_pretrained(str(tmp_path / "mae.pth"), field="model")
    assert (mean, std) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert found.config.norm_pix_loss
    assert torch.equal(found.mask_token, model.mask_token)
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.size[0] > 4 * 16
