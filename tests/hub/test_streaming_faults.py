"""Pretraining streamed from a Hub that fails: the weights are those of the undisturbed run, bit for bit."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub.conftest import clean_environment
from tests.hub.server import HubHandler, HubServer, StoreHandler

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

FILES, ROWS, STEPS = 24, 40, 100
"""One chunk a file, 960 images: 100 updates of 32 images go through the data more than three times."""

NAMES = ("model/model.safetensors", "training_state/optimizer.safetensors")

PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("org/images", repo_type="dataset", exist_ok=True)
api.upload_folder(repo_id="org/images", repo_type="dataset", folder_path=sys.argv[1])
"""


def start(hub: HubServer, out: Path, home: Path, *more: str) -> subprocess.Popen[str]:
    model = ["--model.hidden-size", "32", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2"]
    run = ["--global-batch", "32", "--max-steps", str(STEPS), "--save-every", "25", "--log-every", "25"]
    quiet = ["--eval-every", "0", "--evals.pictures", "0", "--evals.no-rankme", "--evals.test-examples", "20"]
    quiet += ["--evals.train-examples", "20"]
    argv = ["pretrain", "mae-vit-n-cifar10", "--data.path", "org/images", "--out", str(out), *model, *run, *quiet]
    return subprocess.Popen(
        [sys.executable, "-m", "hf_mae.cli", *argv, *more],
        env=clean_environment(hub, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(out: Path) -> list[bytes]:
    return [(out / f"checkpoints/step_{STEPS:08d}" / name).read_bytes() for name in NAMES]


def reads(hub: HubServer) -> int:
    return sum(r["m"] == "GET" and r["port"] == "store" for r in hub.log)


def wait_for_reads(hub: HubServer, process: subprocess.Popen[str], number: int) -> None:
    """Wait until a run has read so many ranges."""
    begun = reads(hub)
    deadline = time.monotonic() + 60
    while reads(hub) < begun + number:
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def streamed(hub, tmp_path_factory):
    """The data set on the Hub, and the weights of the run that nothing disturbed."""
    from tests.data.samples import write_parquet

    folder = tmp_path_factory.mktemp("streamed")
    for i in range(FILES):
        write_parquet(folder / f"data/train-{i:05d}-of-{FILES:05d}.parquet", range(i * ROWS, (i + 1) * ROWS))
    write_parquet(folder / "data/test-00000-of-00001.parquet", range(20))
    env = clean_environment(hub, folder / "home")
    subprocess.run([sys.executable, "-c", PUSH, str(folder / "data")], env=env, check=True, capture_output=True)
    # Nothing on loopback takes time, so that a run would have read all before the first fault.
    hub.fault("GET", r"/_store/", delay=0.05, times=10**6)
    process = start(hub, folder / "straight", folder / "home")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    return weights(folder / "straight")


def faults_first(hub: HubServer, *faults) -> list[dict]:
    """The first fault that matches is the one that is taken, and the delay is one too."""
    slow = [f for f in hub.faults if f["delay"]]
    hub.faults[:] = []
    injected = [hub.fault("GET", path, **fault) for path, fault in faults]
    hub.faults += slow
    return injected


def test_errors_cuts_and_limits_change_no_bit(hub, streamed, tmp_path):
    injected = faults_first(
        hub,
        (r"/_store/", {"status": 503, "times": 3, "skip": 30}),  # the client waits
        (r"/_store/", {"status": 520, "times": 3, "skip": 32}),  # the client does not
        (r"/resolve/", {"status": 429, "times": 2, "skip": 35, "headers": {"Retry-After": "1"}}),
        (r"/resolve/", {"status": 429, "times": 1, "skip": 38, "headers": {"RateLimit": '"resolvers";r=0;t=1'}}),
        (r"/_store/", {"cut": 300, "times": 3, "skip": 45}),
        (r"/_store/", {"status": 403, "times": 1, "skip": 50}),  # an expired signature
        (r"/api/datasets/org/images", {"status": 503, "times": 2}),
        (r"/api/datasets/org/images", {"status": 429, "times": 1, "skip": 2, "headers": {"Retry-After": "1"}}),
    )
    process = start(hub, tmp_path / "run", tmp_path / "home", "--num-workers", "1")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert [f["hits"] for f in injected] == [3, 3, 2, 1, 3, 1, 2, 1]
    assert weights(tmp_path / "run") == streamed


@contextmanager
def outage(hub: HubServer) -> Iterator[None]:
    """Refuse new connections, and drop the open ones at their next request."""

    def drop(*_) -> None:
        raise ConnectionResetError

    ports, answer = (hub.hub_srv.server_port, hub.store_srv.server_port), hub.take_fault
    hub.take_fault = drop
    for server in (hub.hub_srv, hub.store_srv):
        server.shutdown()
        server.server_close()
    yield
    hub.hub_srv, hub.store_srv = hub._listen(ports[0], HubHandler), hub._listen(ports[1], StoreHandler)
    hub.take_fault = answer


def test_an_outage_of_thirty_seconds_changes_no_bit_and_is_told(hub, streamed, tmp_path):
    faults_first(hub)
    process = start(hub, tmp_path / "run", tmp_path / "home")
    wait_for_reads(hub, process, FILES + 10)  # the footers, then some chunks
    with outage(hub):
        before = reads(hub)
        time.sleep(30)
        assert reads(hub) - before < 3, "that was no outage"
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert "trying again in" in said
    assert "reading train-" in said
    assert reads(hub) > before + 20, "most of the data was read before the outage"
    assert weights(tmp_path / "run") == streamed


def test_an_outage_that_does_not_end_stops_the_run_which_then_goes_on_with_the_same_bits(hub, streamed, tmp_path):
    faults_first(hub)
    process = start(hub, tmp_path / "run", tmp_path / "home")
    wait_for_reads(hub, process, FILES + 40)
    injected = hub.fault("GET", r"/resolve/", status=404, times=10**6)
    hub.faults.insert(0, hub.faults.pop())
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1, said[-3000:]
    assert "could not read train-" in said
    assert "the run continues from its last checkpoint" in said
    injected["times"] = 0
    assert not (tmp_path / "run/checkpoints" / f"step_{STEPS:08d}").exists()
    process = start(hub, tmp_path / "run", tmp_path / "home")
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said[-3000:]
    assert weights(tmp_path / "run") == streamed
