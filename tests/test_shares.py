"""Every test image counts once, whatever the number of processes and of images: also where a process has none.

The images of a split are shared out over ranks and cut into batches. Around each boundary some rank runs a batch of
nothing: its share is used up, or the last image of it is damaged. Whole commands, on classifiers of random weights.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.cli import main
from hf_mae.labelled import EVAL_BATCH
from hf_mae.models.timm_models import TimmSpec, write_timm_folder
from hf_mae.training.tasks import Classification

CLASSES = ("ant", "bee", "cat")


def write_images(folder, count, seed, damaged=()):
    """Write grey images, numbered in the order they are read in; `damaged` are none."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        path = folder / CLASSES[3 * i // count] / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i in damaged:
            path.write_bytes(b"no image")
        else:
            Image.fromarray(pixels).save(path)


@pytest.fixture
def data(tmp_path):
    """Make a folder of 24 training images and `count` test images, the `bad` last of them damaged, once."""

    def make(count, bad=0):
        folder = tmp_path / "data" / f"{count}_{bad}"
        if not folder.exists():
            write_images(folder / "train", 24, 0)
            write_images(folder / "test", count, 1, range(count - bad, count))
        return folder

    return make


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Classifiers to evaluate: one of each pool, and one of timm that cannot reshape an empty batch."""
    folder = tmp_path_factory.mktemp("models")
    tiny = {
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    heads = {"mean": {"pool": "mean"}, "cls": {"pool": "cls", "head": "batchnorm"}}
    for name, head in heads.items():
        torch.manual_seed(0)
        names = dict(enumerate(CLASSES))
        made = MAEForImageClassification(MAEConfig(**tiny, **head, id2label=names, head_init_std=1.0))
        task = Classification(made, (0.5,), (0.5,))
        task.write_model(folder / name, {k: v.contiguous() for k, v in made.state_dict().items()})
    spec = TimmSpec("test_vit", CLASSES, (32, 32), (32, 32), 1.0, 1, 0.0, (0.5,), (0.5,))
    vit = timm.create_model("test_vit", img_size=32, in_chans=1, num_classes=3)
    write_timm_folder(folder / "timm", spec, vit.state_dict())
    return {name: folder / name for name in (*heads, "timm")}


def launch(world, commands, folder):
    """Run commands on `world` processes, one after another."""
    (folder / "commands.json").write_text(json.dumps([[str(part) for part in command] for command in commands]))
    script = [str(Path(__file__).parent / "commands.py"), str(folder / "commands.json")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), *script],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]


def evaluation(data, model, out, batch=4):
    options = ["--data.split", "test", "--out", out, "--batch", batch, "--no-pictures", "--num-workers", 1]
    return ["evaluate", "own", "--model", model, "--data.path", data, *options]


def training(command, data, encoder, out, *more):
    """Two updates of next to nothing, measured before, between and after."""
    options = ["--max-steps", 2, "--global-batch", 6, "--eval-every", 1, "--num-workers", 1, "--optim.base-lr", 1e-9]
    options += ["--evals.at-start", "--out", out, "--init-from", encoder, "--data.path", data, "--schedule.min-lr", 0]
    return [command, f"{command}-digits", *options, *more]


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(out):
    """Return the counted results of an evaluation or a run: all integers, and numbers made of them."""
    found = json.loads((out / "evaluation.json").read_text())["weights"]
    counted = (
        "examples",
        "top1",
        "top5",
        "per_class_accuracy",
        "class_examples",
        "confusion",
        "mean_per_class_accuracy",
    )
    return {name: found[name] for name in counted} | {
        "bins": [b["count"] for b in found["bins"]],
        "worst": [(m["row"], m["true"], m["predicted"]) for m in found["worst"]],
    }


def loss(out):
    """Return the mean loss: the sum is exact, its terms are rounded as the batch's height has it."""
    return json.loads((out / "evaluation.json").read_text())["weights"]["loss"]


@pytest.fixture
def check(data, models, encoder, tmp_path):
    """Run every case on `world` processes in one launch, then on one process, and compare."""
    protocols = {
        "finetune": ("finetune", []),
        "cached": ("probe", ["--cached-features"]),
        "probe": ("probe", ["--no-cached-features"]),
        "supervise": ("supervise", ["--model.architecture", "test_vit", "--model.image-size", 32]),
    }

    def command(kind, count, bad, out, **options):
        if kind in models:
            return evaluation(data(count, bad), models[kind], out, **options)
        name, more = protocols[kind]
        return training(name, data(count, bad), "" if name == "supervise" else encoder, out, *more)

    def run(world, cases):
        several = {case: tmp_path / f"{world}" / "_".join(map(str, case)) for case in cases}
        launch(world, [command(*case, out) for case, out in several.items()], tmp_path)
        for case, out in several.items():
            kind, count, bad = case
            one = tmp_path / "one" / out.name
            assert results(out)["examples"] == count - bad, case
            if kind in models:
                main([str(part) for part in command(*case, one, batch=1)])  # one image after the other
                assert results(out) == results(one), case
                assert loss(out) == pytest.approx(loss(one), rel=1e-6)
                assert json.loads((out / "summary.json").read_text())["numbers"]["bad_images"] == bad
                continue
            assert [row["step"] for row in rows(out) if "top1" in row] == [0, 1, 2], case
            if world > 1:  # gradients are summed in another order: the same numbers before the first update
                main([str(part) for part in command(*case, one)])
                first, expected = rows(out)[0], rows(one)[0]
                exact = [name for name in first if not name.endswith(("_per_second", "_loss", "ece"))]
                assert {name: first[name] for name in exact} == {name: expected[name] for name in exact}, case
                assert first["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)

    return run


@pytest.mark.multiprocess
def test_a_process_without_images_counts_none(check):
    """One image for two processes; one more than two full batches; the last of a batch of one damaged."""
    small = [("mean", 1, 0), ("timm", 9, 0), ("mean", 9, 1)]
    check(2, [*small, ("finetune", 2 * EVAL_BATCH + 1, 0), ("cached", 1, 0)])


@pytest.mark.parametrize("kind", ["mean", "cls", "timm"])
def test_one_process_whose_last_batch_is_damaged(data, models, tmp_path, kind):
    for out, count, bad in (("damaged", 5, 1), ("without", 4, 0)):
        folder = data(5, 1)
        if not bad:
            (folder / "test" / "cat" / "0004.png").unlink()
        main([str(part) for part in evaluation(folder, models[kind], tmp_path / out)])
        assert results(tmp_path / out)["examples"] == count - bad
    assert results(tmp_path / "damaged") == results(tmp_path / "without")


@pytest.mark.parametrize("count", [1, 5])
def test_a_split_of_damaged_images_is_refused_with_the_first_reason(data, models, encoder, tmp_path, capsys, count):
    """Training says it before the first update, not at the first evaluation."""
    folder, out = data(count, count), tmp_path / "out"
    damaged = f"{folder}/test.*(none of .*decoded|{count} images cannot be decoded)"
    for command in (
        evaluation(folder, models["mean"], out / "evaluate"),
        training("finetune", folder, encoder, out / "finetune"),
        training("probe", folder, encoder, out / "probe"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(part) for part in command])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert re.search(damaged, said, re.DOTALL), said
        assert ".png" in said.rpartition("error:")[2]
        assert "Traceback" not in said
    for name in ("finetune", "probe"):
        assert not (out / name / "metrics.jsonl").exists() or not rows(out / name)


def test_pictures_of_one_image(data, models, tmp_path):
    for kind, model in models.items():
        command = [part for part in evaluation(data(1), model, tmp_path / kind) if part != "--no-pictures"]
        main([str(part) for part in command])
        assert (tmp_path / kind / "pictures" / "confusion.png").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [1, 2, 3])
def test_all_sizes_around_every_boundary(check, world):
    batch = 4
    sizes = {1, 2, 3, batch, batch + 1, *(world * batch + i for i in (-1, 0, 1)), 2 * world * batch + 1}
    damaged = [(1 + world * batch, 1), (2 * batch, batch), (world * batch + 3, 4)]
    evaluated = [(kind, n, 0) for n in sorted(sizes) for kind in ("mean", "timm")]
    evaluated += [(kind, *case) for case in damaged for kind in ("mean", "cls", "timm")]
    batch = EVAL_BATCH
    trained = [("probe", 1, 0), ("supervise", world * batch + 1, 0)]
    trained += [(kind, n, 0) for n in sorted({1, batch - 1, batch, batch + 1}) for kind in ("finetune", "cached")]
    trained += [(kind, world * batch + 1, 1) for kind in ("finetune", "cached", "supervise")]
    check(world, evaluated + trained)
