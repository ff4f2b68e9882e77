"""The kill test in short form (benchmarks/kill.py has the long one), signals and full disks as a user meets them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("kill", ROOT / "benchmarks" / "kill.py")
assert spec is not None
assert spec.loader is not None
kill = importlib.util.module_from_spec(spec)
sys.modules["kill"] = kill
spec.loader.exec_module(kill)


@pytest.fixture(scope="module")
def setting(shared):
    return kill.Setting(data=str(shared / "data" / "cifar10"), steps=90, workers=2)


@pytest.fixture(scope="module")
def straight(setting, tmp_path_factory):
    """One undisturbed run: what every other way of running has to equal."""
    out = tmp_path_factory.mktemp("straight") / "run"
    kill.finish(kill.start(setting, out), out)
    return kill.result(out)


def test_a_run_killed_again_and_again_equals_one_that_never_was(setting, straight, tmp_path):
    moments = kill.run_killed(setting, tmp_path / "run", kills=3, seed=1, longest=0.3)
    assert moments["running"] + moments["writing"] >= 2
    assert kill.result(tmp_path / "run") == straight


@pytest.mark.parametrize(("what", "processes"), [("finetune", 1), ("probe", 2), ("supervise", 2)])
def test_a_classifier_killed_equals_one_that_never_was(setting, tmp_path, what, processes):
    """Mixup, averages and drop path; LARS and batch statistics; LAMB and repeated augmentation; and the best model."""
    setting = replace(setting, what=what, processes=processes, steps=60, workers=1)
    kill.prepare(setting, tmp_path)
    for out in (tmp_path / "straight", tmp_path / "run"):
        if out.name == "run":
            kill.run_killed(setting, out, kills=2, seed=3, longest=0.3)
        else:
            kill.finish(kill.start(setting, out), out)
    found = kill.result(tmp_path / "run")
    assert found["best"] is not None
    assert found == kill.result(tmp_path / "straight")


def test_two_processes_killed_equal_one_process_never_killed(setting, straight, tmp_path):
    """Micro-batches are half the batch, so two ranks compute the very sums of one process. No decode workers here."""
    two = replace(setting, processes=2, workers=0)
    moments = kill.run_killed(two, tmp_path / "run", kills=1, seed=2, longest=0.3)
    assert moments["running"] + moments["writing"] + moments["ended before"] == 1
    found = kill.result(tmp_path / "run")
    for name in ("model/model.safetensors", "training_state/optimizer.safetensors"):
        assert found[name] == straight[name]
    for a, b in zip(found["metrics"], straight["metrics"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)  # logged means are summed over ranks in another order


def run(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # bits depend on the number of threads
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def wait_for_steps(out):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not kill.progress(out):
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_zero_and_the_same_command_continues(setting, straight, tmp_path, number):
    out = tmp_path / "run"
    process = kill.start(setting, out)
    wait_for_steps(out)
    os.kill(process.pid, number)
    assert process.wait(60) == 0
    assert (out / "stopped_by_signal").read_text().startswith(number.name)
    last = (out / "last").read_text().strip()
    assert 0 < int(last.removeprefix("step_")) < setting.steps
    kill.finish(kill.start(setting, out), out)
    assert not (out / "stopped_by_signal").exists()
    assert kill.result(out) == straight


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate launch"])
def test_ranks_of_a_dead_launcher_save_and_end(setting, straight, tmp_path, launcher):
    """Else they would train on, unseen: torchrun's after SIGKILL, those of `accelerate launch` even after SIGTERM."""
    out, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = [str(ROOT / "scripts" / "pretrain.py")]
    start = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    if launcher == "accelerate launch":
        start = ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
        start += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    arguments = replace(setting, steps=5000).command(out)[4:]
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *start, *script, *arguments], env=environment, stdout=log, stderr=log
        )
    wait_for_steps(out)
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL if launcher == "torchrun" else signal.SIGTERM)
    process.wait(30)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive, (tmp_path / "log").read_text()[-2000:]
    assert (out / "stopped_by_signal").read_text().startswith("the launcher died"), (tmp_path / "log").read_text()
    assert (out / "last").read_text().startswith("step_")


def test_a_second_start_in_a_folder_in_use_is_refused(setting, tmp_path):
    out, setting = tmp_path / "run", replace(setting, steps=5000)
    process = kill.start(setting, out)
    wait_for_steps(out)
    second = run(setting.command(out))
    kill.kill(process)
    assert second.returncode == 1
    assert f"run is in use by process {process.pid}" in second.stderr


def test_decode_processes_give_the_bits_of_threads(setting, straight, tmp_path):
    out = tmp_path / "run"
    kill.finish(kill.start(replace(setting, kind="process"), out), out)
    assert kill.result(out) == straight


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_with_a_plain_word_and_continues_when_there_is_room(setting, straight, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    try:
        out = disk / "run"
        (disk / "ballast").write_bytes(bytes(2 * 2**20 - 450_000))
        full = run(setting.command(out))
        assert full.returncode == 1
        assert "no checkpoint could be written" in full.stderr
        assert "Traceback" not in full.stderr
        (disk / "ballast").unlink()
        assert run(setting.command(out)).returncode == 0
        result = kill.result(out)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert json.dumps(result, sort_keys=True) == json.dumps(straight, sort_keys=True)
