"""Checkpoints are whole or absent, exact, and readable by the Hugging Face classes."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_mae import MAEForPreTraining
from hf_mae.recipes.base import Optim
from hf_mae.training.checkpoint import RunLock, clean, damage, list_checkpoints, newest_checkpoint, prune


def clockless(run):
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    times = {"images_per_second", "seconds_waiting_for_data", "waiting_share"}
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def test_resuming_gives_the_same_bits_as_never_stopping(toy):
    """Also in the middle of a log window (step 4 of windows of 3), with a moving average."""
    straight = replace(toy, ema=True).change(save_every=0)
    straight.train()
    interrupted = replace(toy, out=toy.out.with_name("interrupted"), ema=True)
    interrupted.change(max_steps=None).train()
    first = interrupted.checkpoints()[0]
    for name in ("step_00000016", "step_00000020"):
        resumed = replace(toy, out=toy.out.with_name(f"from_{name}"), ema=True)
        shutil.copytree(interrupted.out, resumed.out)
        resumed.train(resume=resumed.out / "checkpoints" / "step_00000016")
        assert all(torch.equal(v, straight.weights()[k]) for k, v in resumed.weights().items())
        assert clockless(resumed) == clockless(straight)
        assert all(torch.equal(v, straight.average.state()[k]) for k, v in resumed.average.state().items())
        moments, expected = resumed.optimizer.state_dict()["state"], straight.optimizer.state_dict()["state"]
        assert all(torch.equal(v, expected[i][k]) for i, s in moments.items() for k, v in s.items())
    assert first.name == "step_00000016"  # keep_checkpoints=2 of 4, 8, 12, 16, 20


def test_model_folder_is_a_hugging_face_folder(toy):
    toy.train()
    model = MAEForPreTraining.from_pretrained(toy.checkpoints()[-1] / "model")
    assert all(torch.equal(v, toy.weights()[f"model.{k}"]) for k, v in model.state_dict().items())
    assert json.loads((toy.checkpoints()[-1] / "model" / "config.json").read_text())["architectures"] == [
        "MAEForPreTraining"
    ]


def test_only_the_newest_are_kept_and_last_names_the_newest(toy):
    toy.train()
    assert [c.name for c in toy.checkpoints()] == ["step_00000016", "step_00000020"]
    assert (toy.out / "last").read_text() == "step_00000020\n"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda c: (c / "model" / "model.safetensors").unlink(), "model/model.safetensors is missing"),
        (lambda c: flip(c / "training_state" / "optimizer.safetensors"), "does not match its SHA-256"),
        (lambda c: (c / "recipe.json").write_text("{"), "has 1 bytes, not"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json cannot be used"),
        (lambda c: (c / "manifest.json").write_text("[]x"), "manifest.json cannot be used"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_skipped(toy, harm, message):
    toy.train()
    older, newest = toy.checkpoints()
    harm(newest)
    found, skipped = newest_checkpoint(toy.out / "checkpoints")
    assert found == older
    assert len(skipped) == 1
    assert str(newest) in skipped[0]
    assert message in skipped[0]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_leftovers_of_a_killed_save_are_never_read_and_are_cleaned(toy):
    toy.train()
    folder = toy.out / "checkpoints"
    shutil.copytree(toy.checkpoints()[-1], folder / ".tmp_step_00000024")
    shutil.copytree(toy.checkpoints()[-1], folder / ".trash_step_00000004_1")
    assert len(list_checkpoints(folder)) == 2
    clean(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000016", "step_00000020"]


def test_a_checkpoint_that_was_being_replaced_comes_back(toy):
    """A kill between the two renames: the last checkpoint is saved before its evaluation and after it."""
    toy.train()
    older, newest = toy.checkpoints()
    newest.rename(newest.with_name(f".trash_{newest.name}"))
    shutil.copytree(older, older.with_name(f".trash_{older.name}"))
    clean(toy.out / "checkpoints")
    assert sorted(p.name for p in (toy.out / "checkpoints").iterdir()) == [older.name, newest.name]
    assert newest_checkpoint(toy.out / "checkpoints") == (newest, [])


def test_another_architecture_is_refused_with_names_and_shapes(toy):
    toy.train()
    checkpoint = toy.checkpoints()[-1]
    path = checkpoint / "model" / "model.safetensors"
    weights = load_file(path)
    weights["norm.weight"] = torch.ones(48)
    del weights["cls_token"]
    save_file(weights, path)
    with pytest.raises(
        ValueError, match=r"another architecture: cls_token \(saved absent, model 1x1x32\), norm.weight \(sav"
    ):
        toy.train(resume=checkpoint)


def test_a_full_disk_keeps_the_previous_checkpoint_and_says_so(toy, monkeypatch):
    """The kernel's file size limit stands in for a full disk: the same failures inside torch and safetensors."""
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        import importlib.util
        spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
        toy = importlib.util.module_from_spec(spec); sys.modules["toy"] = toy; spec.loader.exec_module(toy)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        run = toy.ToyRun(Path(sys.argv[2])).change(max_steps=20)
        real = toy.save_checkpoint
        def limited(*args, **kwargs):
            if kwargs["state"].step > 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            return real(*args, **kwargs)
        toy.save_checkpoint = limited
        run.train()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(__file__).replace("test_checkpoint", "conftest"), str(toy.out)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: no checkpoint could be written" in done.stderr
    assert "the newest whole checkpoint is" in done.stderr
    assert [c.name for c in toy.checkpoints()] == ["step_00000004"]
    assert damage(toy.checkpoints()[0]) is None


def test_too_little_room_is_seen_before_writing(toy, monkeypatch):
    usage = shutil.disk_usage(toy.out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RuntimeError, match=r"MB are needed and 0.0 MB are free.*there is no earlier checkpoint"):
        toy.train()
    assert toy.checkpoints() == []


def test_one_run_folder_has_one_run(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    lines = ["from pathlib import Path", "from hf_mae.training.checkpoint import RunLock"]
    script = "\n".join([*lines, f"RunLock(Path({str(tmp_path)!r})).acquire()"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "is in use by process" in done.stderr
    lock.release()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_averaged_weights_are_a_hugging_face_folder_too(toy):
    run = replace(toy, ema=True)
    run.train()
    model = MAEForPreTraining.from_pretrained(run.checkpoints()[-1] / "model_ema")
    averaged = run.average.state()
    assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters())
    assert not torch.equal(model.norm.bias, run.weights()["model.norm.bias"])


def test_weights_that_are_not_finite_are_never_saved(toy):
    """The loss of an update can be finite while the weights it leaves are not."""
    run = toy.change(optim=Optim(base_lr=math.inf), save_every=1)
    with pytest.raises(
        FloatingPointError, match=r"weight \S+ is not finite after update 1, so no checkpoint is written"
    ):
        run.train()
    assert toy.checkpoints() == []


def test_saving_over_a_checkpoint_of_the_same_step_replaces_it(toy):
    toy.train()
    before = toy.weights()
    (toy.checkpoints()[-1] / "recipe.json").write_text("{")
    toy.train(resume=toy.checkpoints()[0])
    assert damage(toy.checkpoints()[-1]) is None
    assert all(torch.equal(v, before[k]) for k, v in toy.weights().items())
    assert not list((toy.out / "checkpoints").glob(".*"))


def test_pruning_keeps_what_is_newer_and_counts_only_older_ones(tmp_path):
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"step_{step:08d}").mkdir()
    prune(tmp_path / "step_00000008", keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000006", "step_00000008", "step_00000010"]


def test_a_lock_left_by_a_dead_process_is_waited_for(tmp_path):
    """Children that inherited the lock of a killed run hold it for a moment."""
    script = (
        "import os, time\nfrom pathlib import Path\nfrom hf_mae.training.checkpoint import RunLock\n"
        f"lock = RunLock(Path({str(tmp_path)!r}))\nlock.acquire()\nif os.fork() == 0:\n    time.sleep(1.5)\nos._exit(0)"
    )
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_system_that_opens_no_folders_saves_checkpoints(toy, monkeypatch):
    """Windows: `os.open` of a folder fails, and only what is open for writing can be synced."""
    real, opened = os.open, {}

    def windows(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        opened[descriptor := real(path, flags, *args, **kwargs)] = flags
        return descriptor

    def sync(descriptor):
        if not opened.get(descriptor, os.O_RDWR) & (os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # how rmtree goes about it there
    monkeypatch.setattr(os, "open", windows)
    monkeypatch.setattr(os, "fsync", sync)
    toy.train()
    assert damage(toy.checkpoints()[-1]) is None
    assert (toy.out / "last").read_text() == "step_00000020\n"


@pytest.fixture
def without_locks(monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_run_is_seen_and_a_dead_one_forgotten(tmp_path):
    script = (
        "import sys, time, fcntl\nfrom pathlib import Path\nfrom hf_mae.training.checkpoint import RunLock\n"
        "def flock(*a): raise OSError(37, 'No locks available')\nfcntl.flock = flock\n"
        f"lock = RunLock(Path({str(tmp_path)!r}))\nlock.acquire()\nprint('taken', flush=True)\ntime.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        lock = RunLock(tmp_path)
        with pytest.raises(RuntimeError, match=f"in use by process {other.pid}"):
            lock.acquire()
        lock.release()
        other.kill()
    lock = RunLock(tmp_path)
    assert lock.acquire() is None  # nobody is kept out after a crash
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ('{"pid": 12, "host": "another", "started": 1.0}', True),
        (json.dumps({"pid": os.getppid(), "host": platform.node(), "started": 1.0}), False),  # a number given out again
        ("999999999", False),  # as earlier versions wrote it
        ("torn {", False),
        ("", False),
    ],
)
def test_without_locks_what_was_left_behind_keeps_nobody_out(tmp_path, text, warned):
    (tmp_path / ".lock").write_text(text)
    lock = RunLock(tmp_path)
    warning = lock.acquire()
    lock.release()
    assert (warning is not None) == warned
    assert not warned or "process 12 on another" in str(warning)
