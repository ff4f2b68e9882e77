"""A run with all that models of timm bring along continues to the last bit, whatever its optimizer keeps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hf_mae.recipes.classification import ClassifierOptim
from hf_mae.training.checkpoint import load_checkpoint
from hf_mae.training.monitors import TIMES

OPTIMIZERS = {
    "lamb": {"base_lr": 0.5, "eps": 1e-6, "clip_grad": 1.0},
    "lamb-agc": {"base_lr": 0.5, "clip_grad": 1.0, "agc": 0.01},
    "adam": {"base_lr": 0.3},
    "adamw": {"base_lr": 0.3, "decay_vectors": True},
    "adamw-agc": {"base_lr": 0.3, "agc": 0.01},
    "rmsprop": {"base_lr": 0.3, "eps": 1e-3},
    "sgd": {"base_lr": 1.0, "nesterov": True},
    "lars": {"base_lr": 10.0},
}


def state_of(run):
    """Every tensor of the run: weights, running statistics, averages, moments, and what groups count."""
    tensors = dict(run.weights())
    tensors |= {f"ema/{k}": v for k, v in run.average.state().items()}
    names = {id(p): name for name, p in run.task.named_parameters()}
    for parameter, values in run.optimizer.optimizer.state.items():
        tensors |= {f"{names[id(parameter)]}/{k}": v for k, v in values.items() if isinstance(v, torch.Tensor)}
    tensors |= {
        f"groups/{i}": torch.as_tensor(g["step"]) for i, g in enumerate(run.optimizer.param_groups) if "step" in g
    }
    return tensors


def layout(tensor):
    """Its strides, but for dimensions of size 1, whose strides mean nothing."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def rows(run):
    found = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_one_that_never_stopped(conv, name, channels_last):
    """In all it keeps: had moments other strides than their weights, a fused step would mix them up."""
    optim = ClassifierOptim(name=name.split("-")[0], ema_decay=0.9, ema_warmup=True, **OPTIMIZERS[name])
    straight = replace(conv, channels_last=channels_last).change(optim=optim)
    straight.train()
    resumed = replace(straight, out=straight.out.with_name("resumed"))
    resumed.train(resume=straight.checkpoints()[0])
    assert resumed.state.step == straight.state.step == 20
    found, expected = state_of(resumed), state_of(straight)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert layout(found[key]) == layout(value), key
    assert found["model.stem.weight"].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert rows(resumed) == [row for row in rows(straight) if row["step"] > 16]
    losses = [row["loss"] for row in rows(straight)]
    assert losses[-1] < losses[0]  # it trains at all


def test_files_hold_weights_in_the_common_layout_and_averaged_statistics(conv):
    conv.train()
    folder = conv.checkpoints()[-1]
    weights, averaged = (load_file(folder / f / "model.safetensors") for f in ("model", "model_ema"))
    assert weights.keys() == averaged.keys() == {k.removeprefix("model.") for k in conv.weights()}
    plain = replace(conv, out=conv.out.with_name("plain"), channels_last=False)
    plain.train(resume=folder)
    assert all(torch.equal(v, weights[k.removeprefix("model.")]) for k, v in plain.weights().items())
    for name, value in conv.average.state().items():
        assert torch.equal(averaged[name], value)
    assert not torch.equal(averaged["stem_norm.running_var"], weights["stem_norm.running_var"])
    assert torch.equal(averaged["stem_norm.num_batches_tracked"], weights["stem_norm.num_batches_tracked"])


def test_a_checkpoint_continues_in_another_memory_layout(conv):
    """The numbers are the same, their order in memory is not: equal to rounding."""
    conv.train()
    other = replace(conv, out=conv.out.with_name("other"), channels_last=False)
    other.train(resume=conv.checkpoints()[0])
    for name, value in conv.weights().items():
        torch.testing.assert_close(other.weights()[name], value, atol=1e-5, rtol=1e-4)


def test_lamb_counts_its_updates_across_a_restart(conv):
    """Its bias correction would start anew otherwise."""
    conv.train()
    saved = json.loads((conv.checkpoints()[0] / "training_state" / "state.json").read_text())
    assert {group["step"] for group in saved["param_groups"]} == {16}
    run = replace(conv, out=conv.out.with_name("again"))
    run.task, run.optimizer = run.build()
    load_checkpoint(conv.checkpoints()[0], task=run.task, optimizer=run.optimizer, average=None)
    assert {float(group["step"]) for group in run.optimizer.param_groups} == {16.0}


def test_the_average_of_an_update_is_made_of_the_statistics_of_that_update(conv):
    """With a decay of 0 at the first update, the average is the model after it, running means included."""
    run = conv.change(max_steps=1)
    run.train()
    assert run.state.step == 1
    for name, value in run.average.state().items():
        assert torch.equal(run.weights()[f"model.{name}"], value)
    assert run.weights()["model.stem_norm.running_mean"].abs().max() > 0


def test_the_head_with_batch_normalisation_can_be_averaged(probe):
    """Statistics are averaged as weights are, so the averaged head is a model of its own; and it resumes."""
    run = replace(probe, ema=True, micro_batch=4)
    run.train()
    averaged = load_file(run.checkpoints()[-1] / "model_ema" / "model.safetensors")
    weights = load_file(run.checkpoints()[-1] / "model" / "model.safetensors")
    assert not torch.equal(averaged["head.0.running_mean"], weights["head.0.running_mean"])
    resumed = replace(run, out=run.out.with_name("resumed"))
    resumed.train(resume=run.checkpoints()[0])
    for name, value in run.average.state().items():
        assert torch.equal(resumed.average.state()[name], value), name


def test_the_best_averaged_model_has_averaged_statistics(conv):
    run = replace(conv, evaluators=(Rising(),), best="ema_top1")
    run.train()
    kept = load_file(run.out / "best" / "model" / "model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in run.average.state().items())
    assert not torch.equal(kept["stem_norm.running_var"], run.weights()["model.stem_norm.running_var"])


class Rising:
    """An evaluator by whom every model is better than the one before."""

    def due(self, step, total):
        return step % 10 == 0

    def __call__(self, task, step):
        return {"ema_top1": step / 100}

    def finish(self, task, step):
        pass
