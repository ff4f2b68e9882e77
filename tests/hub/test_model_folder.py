"""A model on the Hub is opened by its name: with the Hub out of reach too, if it was opened before."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.hub.conftest import clean_environment

pytestmark = pytest.mark.multiprocess

MAKE = """
import sys
from huggingface_hub import HfApi
from hf_mae import MAEConfig, MAEModel

sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
MAEModel(MAEConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(sys.argv[1])
api = HfApi()
api.create_repo("org/without-processor")
api.upload_folder(repo_id="org/without-processor", folder_path=sys.argv[1])
"""

OPEN = """
import sys, time
from hf_mae import MAEModel
from hf_mae.run import model_folder

began = time.monotonic()
try:
    MAEModel.from_pretrained(model_folder(sys.argv[1], field="init_from"))
except ValueError as error:
    print("ValueError:", error)
print(f"took {time.monotonic() - began:.1f}")
"""


def run(code: str, argument: str, env: dict[str, str]) -> tuple[str, float]:
    """What the code printed, and the seconds that it took by its own word."""
    done = subprocess.run(
        [sys.executable, "-c", code, argument], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = done.stdout.rpartition("took ")[2] or "0"
    return done.stdout + done.stderr, float(seconds)


@pytest.fixture(scope="module")
def homes(hub, tmp_path_factory) -> dict[str, str]:
    """The environment in which a model without a processor was opened once."""
    folder = tmp_path_factory.mktemp("models")
    env = clean_environment(hub, folder / "home")
    run(MAKE, str(folder / "model"), env)
    said, _ = run(OPEN, "org/without-processor", env)
    assert "Error" not in said
    return env


def closed(env: dict[str, str]) -> dict[str, str]:
    """The same machine, with nobody at the Hub's address."""
    return env | {"HF_ENDPOINT": "http://127.0.0.1:9"}


def test_a_model_that_was_opened_before_opens_without_the_hub(homes):
    said, seconds = run(OPEN, "org/without-processor", closed(homes))
    assert "Error" not in said
    assert "trying again" not in said
    assert seconds < 20  # the client alone waits 23 where it waits


def test_a_model_that_was_opened_before_opens_while_the_hub_is_ill(hub, homes):
    fault = hub.fault("GET", ".*", status=503, times=10**6)
    head = hub.fault("HEAD", ".*", status=503, times=10**6)
    try:
        said, seconds = run(OPEN, "org/without-processor", homes)
    finally:
        fault["times"] = head["times"] = 0
    assert "Error" not in said
    assert seconds < 20  # the client alone waits 23 where it waits


def test_a_cut_while_a_model_is_opened_is_waited_for(hub, homes, tmp_path, monkeypatch):
    """The client does not catch a connection that is cut before the answer."""
    answer, cuts = hub.take_fault, []

    def take(method: str, path: str):
        if method == "HEAD" and not cuts:
            cuts.append(path)
            raise ConnectionResetError
        return answer(method, path)

    monkeypatch.setattr(hub, "take_fault", take)
    said, _ = run(OPEN, "org/without-processor", clean_environment(hub, tmp_path / "home"))
    assert len(cuts) == 1
    assert "ValueError" not in said
    assert "opening org/without-processor on the Hub: RemoteProtocolError" in said
    assert "trying again in 1 s" in said


@pytest.mark.slow
def test_a_name_that_nobody_answers_for_is_told_after_the_clients_own_tries(homes):
    began = time.monotonic()
    said, seconds = run(OPEN, "org/never-seen", closed(homes))
    assert "ValueError: init_from=org/never-seen is no path on this machine and cannot be opened as a Hub id" in said
    assert "check the spelling and the network" in said
    assert "trying again" not in said
    assert seconds < 60, time.monotonic() - began


@pytest.mark.slow
def test_a_hub_that_stays_overloaded_is_told_in_the_same_words(hub, homes, tmp_path):
    code = "from hf_mae import patience\npatience.PAUSES = (0.1,)\n" + OPEN
    head = hub.fault("HEAD", ".*", status=503, times=10**6)
    code = "import huggingface_hub.utils._http as h\nh.time.sleep = lambda s: None\n" + code
    try:
        said, _ = run(code, "org/without-processor", clean_environment(hub, tmp_path / "home"))
    finally:
        head["times"] = 0
    assert "ValueError: init_from=org/without-processor is no path" in said
    assert "(503 Service Unavailable from 127.0.0.1" in said
    assert "trying again" in said
