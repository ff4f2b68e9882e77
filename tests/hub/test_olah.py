"""A second opinion on reads: the Hub mirror `olah`, somebody else's code, understands the loopback Hub."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from tests.hub.conftest import absent, clean_environment

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture(scope="session")
def olah():
    """The command of olah (HF_MAE_OLAH names it: its pins want an environment of their own)."""
    command = os.environ.get("HF_MAE_OLAH") or shutil.which("olah-cli")
    if command is None:
        absent("needs olah-cli (pip install olah, in an environment of its own; HF_MAE_OLAH names the command)")
    return command


@pytest.fixture
def mirror(olah, hub, tmp_path):
    """The address of an olah in front of `hub`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    near, store = urlsplit(hub.url).netloc, urlsplit(hub.store_url).netloc
    argv = [olah, "--host", "127.0.0.1", "--port", str(port), "--repos-path", str(tmp_path / "repos")]
    argv += ["--hf-scheme", "http", "--hf-netloc", near, "--hf-lfs-netloc", store, "--log-path", str(tmp_path / "logs")]
    argv += ["--mirror-scheme", "http", "--mirror-netloc", f"127.0.0.1:{port}"]
    argv += ["--mirror-lfs-netloc", f"127.0.0.1:{port}"]
    env = clean_environment(hub, tmp_path / "olah_home")
    with (tmp_path / "olah.txt").open("wb") as said:
        process = subprocess.Popen(argv, env=env, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
                break
            except urllib.error.HTTPError as answered:
                answered.close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "olah.txt").read_text()[-3000:]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_a_model_loads_through_a_mirror_as_it_does_directly(
    hub, classifier, scores, mirror, run_client, tmp_path, picture
):
    code = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
info = HfApi().model_info(sys.argv[1])
folder = Path(snapshot_download(sys.argv[1]))
from transformers import pipeline
print(json.dumps([info.sha, info.pipeline_tag, sorted(p.name for p in folder.iterdir()),
                  pipeline("image-classification", sys.argv[1])(sys.argv[2], top_k=7)]))
"""
    env = clean_environment(hub, tmp_path / "hf_home") | {"HF_ENDPOINT": mirror}
    argv = [sys.executable, "-I", "-c", code, classifier, str(picture)]
    sha, task, names, answers = json.loads(run_client(argv, env))
    repo = hub.repos["model", classifier]
    assert (sha, task) == (repo.refs["refs/heads/main"], "image-classification")
    assert names == sorted(hub.resolve(repo, "main").tree)
    assert answers == scores

    # A second machine is served from the mirror's own copy of the weights.
    start = len(hub.log)
    again = env | {"HF_HOME": str(tmp_path / "second_home")}
    assert json.loads(run_client(argv, again))[3] == scores
    assert not [row for row in hub.log[start:] if row["port"] == "store" and row["m"] == "GET"]
