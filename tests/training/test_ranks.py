"""Two gloo processes: DDP and FSDP2 agree with one process and with each other. One launch, many claims."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_mae.evaluation.features import extract_features
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.base import Engine
from hf_mae.training import distributed
from hf_mae.training.tasks import Classification

HERE = Path(__file__).parent
pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(HERE / "ranks.py")]
    done = subprocess.run(
        [sys.executable, *command, str(HERE / "conftest.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "strides" not in done.stderr  # DDP's warning of gradients that lie otherwise than its buckets
    return folder


@pytest.fixture
def results(launched):
    return json.loads((launched / "results.json").read_text())


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_process_with_two_micro_batches_bit_for_bit(launched, toy):
    one = replace(toy, micro_batch=4, ema=True)
    one.train()
    two = load_file(launched / "ddp" / "checkpoints" / "step_00000020" / "model" / "model.safetensors")
    assert all(torch.equal(v, two[k.removeprefix("model.")]) for k, v in one.weights().items())
    # The logged means are summed in another order: equal to float32 rounding.
    assert [r["loss"] for r in rows(one.out)] == pytest.approx([r["loss"] for r in rows(launched / "ddp")], rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_continues_in_one(launched, toy, kind):
    expected = replace(toy, micro_batch=4, out=toy.out.with_name("straight"))
    expected.train()
    toy = replace(toy, micro_batch=4)
    toy.train(resume=launched / kind / "checkpoints" / "step_00000016")
    for name, value in toy.weights().items():
        torch.testing.assert_close(value, expected.weights()[name], atol=1e-5, rtol=1e-5)


def test_two_processes_resume_exactly(launched, results):
    assert results["ddp_trains"]
    assert results["ddp_resumes_exactly"]


def test_a_signal_on_one_rank_stops_both_after_the_same_update(results):
    assert results["signal_outcome"] == "stopped"
    first, second = results["signal_steps"]
    assert first == second in {6, 7}  # decided one update late
    assert results["stopped_run_resumes_exactly"]


def test_a_nan_on_one_rank_is_seen_by_all(results):
    assert results["nan_step"] == 3


def test_an_error_on_one_rank_reaches_the_other(results):
    assert results["agreed_error"] == "rank 1 failed while saving: OSError: disk on fire"


def test_another_number_of_processes_than_expected_is_refused(results):
    assert results["expected_three"].startswith("engine.expect_processes=3 but 2 process(es) started")


def test_fsdp2_shards_and_equals_ddp(results):
    assert results["fsdp_is_sharded"]
    assert results["fsdp_blocks"] == 4  # the task, two encoder blocks, one decoder block, without naming any
    assert results["fsdp_to_ddp"] <= 1e-6
    assert results["fsdp_from_ddp"] <= 1e-6


def test_fsdp2_resumes_exactly_moving_average_included(results):
    assert results["fsdp_resumes_exactly"]
    assert results["fsdp_average_resumes_exactly"]


def test_computing_the_gelu_again_changes_no_bit_of_a_sharded_step(results):
    assert results["fsdp_gelu_is_exact"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_rank_with_less_memory_decides_the_micro_batch(results, kind):
    (wide, narrow), other = results[f"{kind}_micro_batches"]
    assert [wide, narrow] == other
    assert wide == 64 > narrow >= 1
    assert results[f"{kind}_is_untouched"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_features_of_two_ranks_are_those_of_one_in_the_order_of_the_images(launched, results, toy, kind):
    one = replace(toy, micro_batch=4)
    one.train(resume=launched / "ddp" / "checkpoints" / "step_00000020")
    images = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    expected = extract_features(one.task.eval(), images, one.make_accelerator())
    torch.testing.assert_close(torch.tensor(results[f"{kind}_features"]), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def one_classifier(judged):
    """One process with two micro-batches, and the name of the launched runs like it."""
    judged.train()
    return judged, "probe" if judged.recipe.optim.name == "lars" else "tuning"


def test_two_processes_train_a_classifier_as_one_with_two_micro_batches(launched, one_classifier):
    """To the last bit: mixing, drop path, averages, running statistics; the ratio of norms in LARS to rounding."""
    one, name = one_classifier
    two, last = launched / f"{name}_ddp", "checkpoints/step_00000020"
    folders = [f"{last}/model", "best/model"] + ([f"{last}/model_ema"] if one.ema else [])
    for folder in folders:
        mine, theirs = (load_file(out / folder / "model.safetensors") for out in (one.out, two))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            rounding = 1e-6 if key == "head.1.weight" else 0.0
            torch.testing.assert_close(theirs[key], value, atol=0.0, rtol=rounding)
    best, other = (json.loads((out / "best" / "best.json").read_text()) for out in (one.out, two))
    assert best["step"] == other["step"]
    assert best["numbers"] == pytest.approx(other["numbers"], rel=1e-6)


def test_fsdp2_trains_a_classifier_as_ddp_does(launched, one_classifier):
    one, name = one_classifier
    sharded = load_file(launched / f"{name}_fsdp" / "checkpoints" / "step_00000020" / "model" / "model.safetensors")
    for key, value in one.weights().items():
        torch.testing.assert_close(sharded[key.removeprefix("model.")], value, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["tuning", "probe"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_classifier_on_two_processes_resumes_exactly(results, name, kind):
    assert results[f"{name}_{kind}_resumes_exactly"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_averaged_weights_are_scored_and_leave_no_trace(launched, results, kind):
    """Under FSDP2 a forward pass leaves gathered weights behind, which must not be taken for the averages."""
    raw, averaged, again = (torch.tensor(x) for x in results[f"{kind}_average"]["scores"])
    assert torch.equal(raw, again)
    assert results[f"{kind}_average"]["same"]
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for folder, expected in (("model", raw), ("model_ema", averaged)):
        model = MAEForImageClassification.from_pretrained(
            launched / f"tuning_{kind}" / "checkpoints" / "step_00000020" / folder
        )
        logits = Classification(model.eval(), (0.5,) * 3, (0.5,) * 3).logits({"pixel_values": pixels})
        torch.testing.assert_close(logits.detach(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(raw, averaged, atol=1e-3)
    attention = torch.tensor(results[f"{kind}_average"]["attention"])
    assert attention.shape == (4, 2, 16)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_rank_without_images_takes_part_in_the_forward_pass(results, kind):
    """Under FSDP2 the rank that still has images would wait for it forever."""
    found = results[f"{kind}_average"]
    assert found["uneven"] == [found["scores"][0], found["attention"]]
    (scores, attention), (no_scores, no_attention) = found["uneven_sizes"]
    assert (no_scores, no_attention) == ([0, *scores[1:]], [0, *attention[1:]])


@pytest.mark.parametrize("name", ["tuning", "probe", "conv"])
def test_ddp_runs_are_of_ddp_and_fsdp2_runs_of_fsdp2(results, name):
    """Accelerate keeps the kind of a process's first run unless told otherwise."""
    assert not results[f"{name}_ddp_is_sharded"]
    assert results[f"{name}_fsdp_is_sharded"]


def test_two_processes_train_a_convolution_as_one_with_two_micro_batches(launched, conv):
    """To the last bit: LAMB, clipping, running statistics, an average that warms up, channels_last."""
    conv.train()
    for folder in ("model", "model_ema"):
        path = f"checkpoints/step_00000020/{folder}/model.safetensors"
        mine, theirs = load_file(conv.out / path), load_file(launched / "conv_ddp" / path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


@pytest.mark.parametrize("kind", ["fsdp", "fsdp_agc"])
def test_sharding_changes_neither_lambs_norms_nor_adaptive_clipping(launched, conv, kind):
    one = replace(conv, channels_last=False)
    if kind == "fsdp_agc":
        one = one.change(optim=replace(one.recipe.optim, name="adamw", base_lr=0.3, agc=0.01))
    one.train()
    for folder in ("model", "model_ema"):
        path = f"checkpoints/step_00000020/{folder}/model.safetensors"
        mine, theirs = load_file(one.out / path), load_file(launched / f"conv_{kind}" / path)
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_agc"])
def test_a_convolution_on_two_processes_resumes_exactly(results, kind):
    assert results[f"conv_{kind}_resumes_exactly"]


def test_a_precision_that_only_the_launcher_asked_for_is_said(monkeypatch):
    accelerator = distributed.make_accelerator(Engine())
    assert "not used" not in distributed.describe_world(accelerator)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "the bf16 of `accelerate config` is not used" in distributed.describe_world(accelerator)


def test_a_world_that_accelerate_did_not_join_is_refused(monkeypatch):
    """Two launched processes that each believe to be alone would write one run folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "Accelerator", lambda **kwargs: type("Alone", (), {"num_processes": 1})())
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE=2 process\(es\) but Accelerate uses 1"):
        distributed.make_accelerator(Engine())
