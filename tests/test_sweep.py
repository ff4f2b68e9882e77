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
import torch

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.recipes.classification import ClassifierEvals
from hf_mae.recipes.transfer import FINETUNE
from hf_mae.sweep import read_result, sweep_partial, sweep_seeds, table


@pytest.fixture
def encoder(tmp_path):
    """An encoder of two blocks with random weights."""
    torch.manual_seed(1)
    config = MAEConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    )
    MAEForPreTraining(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


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
