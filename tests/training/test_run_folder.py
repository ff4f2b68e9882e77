"""What environment.json says of the machine, and what a restart on another one is told."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from accelerate import Accelerator

from hf_mae.training.checkpoint import TrainState
from hf_mae.training.run_folder import describe_device, record_start


def test_the_gpu_and_its_software_are_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    found = describe_device(torch.device("cuda", 0))
    assert found["device_name"] == "NVIDIA H100 80GB HBM3"
    assert (found["gpus_visible"], found["cuda"], found["cudnn"]) == (8, "12.8", 91002)
    assert "driver" in found
    assert set(describe_device(torch.device("cpu")).values()) == {None}


def test_another_gpu_at_a_restart_is_noted_and_old_records_are_taken(toy, monkeypatch):
    accelerator, said, state = Accelerator(cpu=True), [], replace(TrainState(), step=4)
    toy.out.mkdir()

    def start():
        record_start(toy.out, toy.recipe, accelerator, state, {}, 8, said.append)

    start()
    path = toy.out / "environment.json"
    starts = json.loads(path.read_text())["starts"]
    for name in ("device_name", "cuda", "cudnn", "driver", "gpus_visible", "hip"):
        del starts[0][name]  # as versions before 0.2 wrote it
    path.write_text(json.dumps({"starts": starts}))
    start()
    assert not any("device_name" in line for line in said)
    now = describe_device(torch.device("cpu")) | {"device_name": "NVIDIA A100"}
    monkeypatch.setattr("hf_mae.training.run_folder.describe_device", lambda device: now)
    start()
    assert any("device_name was None, is NVIDIA A100" in line for line in said)
