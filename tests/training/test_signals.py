"""Ctrl-C as a user presses it: answered at once, and the second time obeyed at once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from hf_mae.training.signals import StopSignal

HERE = Path(__file__).parent
RUN = [
    "pretrain", "quickstart", "--max-steps", "8", "--global-batch", "32", "--save-every", "1", "--log-every", "1",
    "--evals.no-knn", "--evals.no-rankme", "--evals.no-probe", "--evals.pictures", "0",
]  # fmt: skip


def wait(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def start(folder, *flags, processes=1):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "slow_update.py"), str(folder / "busy"), *RUN, "--out", str(folder / "run"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("workers", "processes"), [("thread", 1), ("process", 1), ("thread", 2)])
def test_ctrl_c_is_answered_at_once_and_the_second_ends_the_run_at_once(tmp_path, workers, processes):
    """While the main thread is inside one call of several seconds; nothing is left running, nothing is read half."""
    process = start(tmp_path, "--num-workers", "1", "--data.workers", workers, processes=processes)
    log = tmp_path / "log"
    assert wait((tmp_path / "busy").exists), log.read_text()
    time.sleep(0.3)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    pressed = time.monotonic()
    assert wait(lambda: "stopping after this update, saving" in log.read_text(), 2.0), log.read_text()
    time.sleep(max(0.0, pressed + 0.5 - time.monotonic()))
    os.kill(process.pid, signal.SIGINT)
    pressed = time.monotonic()
    ranks = [process] if processes == 1 else family
    assert wait(lambda: all(r.poll() is not None if r is process else not r.is_running() for r in ranks), 30.0)
    assert time.monotonic() - pressed < 2.5  # within a second where nothing else runs
    code = process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    text = log.read_text()
    assert "[rank" not in text
    if processes == 1:  # torchrun tells of its own end, and returns 1
        assert code == 130
        assert "Traceback" not in text
    assert not (tmp_path / "run" / "stopped_by_signal").exists()
    again = start(tmp_path, "--num-workers", "0")
    assert again.wait(120) == 0, log.read_text()
    assert "resuming at step 2 of 8" in log.read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_ctrl_c_saves_and_exits_zero(tmp_path):
    process = start(tmp_path)
    assert wait((tmp_path / "busy").exists), (tmp_path / "log").read_text()
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)  # a terminal and a launcher may both send it
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert (tmp_path / "run" / "last").read_text() == "step_00000003\n"
    assert (tmp_path / "run" / "stopped_by_signal").read_text().startswith("SIGINT")


def test_a_signal_is_taken_while_the_main_thread_does_nothing_of_python(capfd):
    with StopSignal(1) as stop:
        stop.mouth.send(bytes([signal.SIGUSR1]))  # what the interpreter does before any handler runs
        assert wait(lambda: stop.received == "SIGUSR1", 5.0)
        assert wait(lambda: "SIGUSR1" in capfd.readouterr().err, 5.0)


def test_everything_is_put_back():
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)
    before = signal.set_wakeup_fd(mouth.fileno())
    try:
        with StopSignal(1):
            assert any(thread.name == "signals" for thread in threading.enumerate())
        assert signal.set_wakeup_fd(before) == mouth.fileno()
    finally:
        signal.set_wakeup_fd(before)
        ear.close()
        mouth.close()
    assert {number: signal.getsignal(number) for number in former} == former
    assert not any(thread.name == "signals" for thread in threading.enumerate())


def test_in_a_notebook_the_second_ctrl_c_interrupts_and_leaves_the_process_alone(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with StopSignal(1) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed()
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked children are of Unix")
def test_a_signal_to_a_forked_worker_is_not_taken_for_one_to_the_run():
    with StopSignal(1) as stop:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.2)
        assert stop.received is None
