"""Sweeps on the bundled digits: their tables and plots, on one process and on two, and what they refuse at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_mae import sweep
from hf_mae.recipes.base import Data
from hf_mae.recipes.classification import ClassifierEvals
from hf_mae.recipes.mae import QUICKSTART
from hf_mae.recipes.transfer import FINETUNE
from hf_mae.sweep import read_result, sweep_partial, sweep_seeds, table


@pytest.fixture
def recipe(tmp_path, encoder):
    return replace(
        FINETUNE["finetune-digits"],
        out=str(tmp_path / "run"),
        init_from=str(encoder),
        max_steps=4,
        global_batch=64,
        eval_every=0,
        num_workers=0,
        evals=ClassifierEvals(split="test", pictures=False),
    )


def test_sweep_partial_writes_table_and_plot_and_is_cheap_to_repeat(recipe, tmp_path):
    one = replace(recipe, out=str(tmp_path / "sweep"), max_steps=4, eval_every=0)
    summary = sweep_partial(one, blocks=(0, 0.5, 2, 6), seeds=2)
    assert list(summary["values"]) == ["0", "0.5", "2"]  # the encoder has two blocks
    assert [len(v["runs"]) for v in summary["values"].values()] == [2, 2, 2]
    assert (tmp_path / "sweep" / "partial.png").stat().st_size > 5000
    written = (tmp_path / "sweep" / "table.md").read_text()
    assert written.count("\n") == 5
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == summary
    assert sweep_partial(one, blocks=(0, 0.5, 2, 6), seeds=2) == summary


def test_sweep_seeds_gives_mean_deviation_and_histogram(recipe, tmp_path):
    summary = sweep_seeds(replace(recipe, out=str(tmp_path / "seeds"), max_steps=4), n=3)
    found = [run["last"] for run in summary["values"]["all"]["runs"]]
    assert summary["values"]["all"]["mean"] == pytest.approx(np.mean(found))
    assert summary["values"]["all"]["sd"] == pytest.approx(np.std(found, ddof=1))
    assert [read_result(tmp_path / "seeds" / f"seed_{s}", "top1")["last"] for s in range(3)] == found
    assert (tmp_path / "seeds" / "seeds.png").stat().st_size > 5000


def test_one_run_has_no_deviation():
    values = {"1": {"mean": 0.5, "sd": None, "min": 0.5, "max": 0.5, "runs": [{}]}}
    assert "not measured" in table(values, "trainable blocks", "top1")


@pytest.fixture
def unlabelled(tmp_path):
    """Two splits of images in no class."""
    for split in ("train", "test"):
        (tmp_path / "unlabelled" / split).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "unlabelled" / split / f"{i}.png")
    return tmp_path / "unlabelled"


@pytest.fixture
def never(monkeypatch):
    """A run that begins is too late for a mistake."""

    def begin(recipe):
        pytest.fail(f"{recipe.out} was begun")

    monkeypatch.setattr(sweep, "classify", begin)
    monkeypatch.setattr(sweep, "pretrain", begin)


def test_partial_finds_mistakes_before_the_first_run(recipe, unlabelled, never):
    with pytest.raises(ValueError, match=r"trainable_blocks=1.5 must be 0, 0.5"):
        sweep_partial(recipe, blocks=(0, 1.5))
    with pytest.raises(ValueError, match=r"trainable_blocks=7.5 must be 0, 0.5"):
        sweep_partial(recipe, blocks=(0, 7.5))
    with pytest.raises(ValueError, match="all beyond the 2 blocks of the encoder"):
        sweep_partial(recipe, blocks=(3, 6))
    with pytest.raises(ValueError, match="seeds=0 makes no run"):
        sweep_partial(recipe, seeds=0)
    untested = replace(recipe, data=Data(path=str(unlabelled / "train")), evals=ClassifierEvals())
    with pytest.raises(ValueError, match="no validation or test split was found, and a sweep compares top1"):
        sweep_partial(untested, blocks=(0,))


def test_seeds_of_pretraining_need_a_number_to_compare(unlabelled, never):
    with pytest.raises(ValueError, match=r"evals.knn=False measures no knn_accuracy"):
        sweep_seeds(replace(QUICKSTART, evals=replace(QUICKSTART.evals, knn=False)))
    with pytest.raises(ValueError, match="has no labels, and a sweep compares knn_accuracy"):
        sweep_seeds(replace(QUICKSTART, data=Data(path=str(unlabelled))))


@pytest.mark.parametrize(("depth", "width", "drawn"), [(24, 1024, True), (24, 768, False), (2, 16, False)])
def test_the_numbers_of_the_paper_are_drawn_for_its_encoder_alone(recipe, monkeypatch, tmp_path, depth, width, drawn):
    monkeypatch.setattr(sweep, "_encoder_size", lambda _: (depth, width))
    monkeypatch.setattr(sweep, "classify", lambda one: Path(one.out))
    monkeypatch.setattr(sweep, "read_result", lambda folder, metric: {"last": 0.5})
    references = []
    monkeypatch.setattr(sweep, "draw_partial", lambda *_, reference, **__: references.append(reference))
    (tmp_path / "run").mkdir()
    sweep_partial(recipe, blocks=(0, 1))
    assert [reference is not None for reference in references] == [drawn, drawn]
    if drawn:
        ((name, points),) = references[0].items()
        assert "Fig. 9" in name
        assert points[1] == pytest.approx((0.5, 0.791))


@pytest.mark.multiprocess
def test_two_processes_sweep_together(encoder, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(Path(__file__).parents[1] / "scripts" / "sweep.py"), "seeds", "finetune", "finetune-digits"]
    command += ["--num-seeds", "2", "--init-from", str(encoder), "--out", str(tmp_path / "seeds"), "--max-steps", "2"]
    command += ["--global-batch", "64", "--num-workers", "1", "--eval-every", "0", "--evals.no-pictures"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("sweep: run 2 of 2") == 1
    summary = json.loads((tmp_path / "seeds" / "sweep.json").read_text())
    assert [run["seed"] for run in summary["values"]["all"]["runs"]] == [0, 1]
    assert (tmp_path / "seeds" / "seeds.png").stat().st_size > 5000
    assert not list((tmp_path / "seeds").glob(".*.tmp"))
