"""The allocator's setting, and the micro-batch that fits."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.training import memory
from hf_mae.training.memory import largest_micro_batch
from hf_mae.training.tasks import Pretraining

FAULTS = """
import resource, sys, torch
from hf_mae.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(4):
    torch.ones(64 * 2**20 // 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(64 * 2**20 // 4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_faulted_in_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "default")
    }
    assert faults["keep"] < 0.1 * faults["default"], faults


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False


@pytest.fixture
def task():
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=32,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
    )
    return Pretraining(MAEForPreTraining(config), (0.5,) * 3, (0.5,) * 3)


def sample(n):
    noise = torch.rand(n, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": torch.zeros(n, 3, 32, 32, dtype=torch.uint8), "noise": noise}


@pytest.mark.parametrize("images", [3, 8, 17])
def test_the_largest_divisor_within_the_budget_is_chosen(task, monkeypatch, images):
    accelerator = Accelerator(cpu=True)
    gradients_and_moments = sum(12 * p.numel() for p in task.parameters())
    needed = memory._measure(task, sample(images), accelerator) + gradients_and_moments  # measured, not extrapolated
    monkeypatch.setattr(memory, "_budget", lambda device: 1.02 * needed)
    assert largest_micro_batch(task, sample, 48, accelerator) == {3: 3, 8: 8, 17: 16}[images]


def test_trying_leaves_no_trace(task, monkeypatch):
    weights, generator = {k: v.clone() for k, v in task.state_dict().items()}, torch.get_rng_state()
    assert largest_micro_batch(task, sample, 8, Accelerator(cpu=True)) == 8
    assert all(torch.equal(v, weights[k]) for k, v in task.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in task.parameters())


def test_when_nothing_fits_the_error_says_what_helps(task, monkeypatch):
    monkeypatch.setattr(memory, "_budget", lambda device: 1000.0)
    with pytest.raises(RuntimeError, match=r"one image needs .* GB .* --engine.checkpoint-activations blocks"):
        largest_micro_batch(task, sample, 8, Accelerator(cpu=True))


def test_a_container_may_have_less_memory_than_the_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUPS", [])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    whole = memory._budget(torch.device("cpu"))
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory, "CGROUPS", [(limit, used)])
    used.write_text("400000000\n")
    limit.write_text("max\n")
    assert memory._budget(torch.device("cpu")) == pytest.approx(whole, rel=0.2)  # other programs come and go
    limit.write_text("1400000000\n")
    assert memory._budget(torch.device("cpu")) == memory.CPU_SHARE * 1e9 / 2
