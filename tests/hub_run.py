"""A run streamed from a Hub, killed, and continued after the branch has moved on. Started by test_hub_run.py.

usage: hub_run.py FOLDER PARQUET...
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parent / "hub" / "server.py")
assert spec is not None
assert spec.loader is not None
hub_server = importlib.util.module_from_spec(spec)
sys.modules["hub_server"] = hub_server
spec.loader.exec_module(hub_server)

FOLDER, SHARDS = Path(sys.argv[1]), sys.argv[2:]
STEPS = 60


def start(environment, out):
    tiny = ["--model.hidden-size", "32", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2"]
    often = [
        "--save-every",
        "10",
        "--log-every",
        "10",
        "--eval-every",
        "0",
        "--evals.pictures",
        "0",
        "--evals.no-rankme",
    ]
    few = ["--evals.train-examples", "100", "--evals.test-examples", "50", "--max-steps", str(STEPS)]
    return subprocess.Popen(
        [sys.executable, "-m", "hf_mae.cli", "pretrain", "mae-vit-n-cifar10", "--data.path", "org/cifar"]
        + ["--out", str(out), "--global-batch", "64", *tiny, *often, *few],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main():
    hub = hub_server.HubServer()
    private = {"HF_TOKEN": "hf_alice_write", "HF_HOME": str(FOLDER / "home"), "HF_HUB_OFFLINE": "0"}
    environment = os.environ | hub.env() | private | {"OMP_NUM_THREADS": "1"}
    os.environ.update(environment)
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token="hf_alice_write")
    api.create_repo("org/cifar", repo_type="dataset")
    for shard in SHARDS:
        name = f"data/{Path(shard).name}"
        api.upload_file(path_or_fileobj=shard, path_in_repo=name, repo_id="org/cifar", repo_type="dataset")

    straight, killed = FOLDER / "straight", FOLDER / "killed"
    said, _ = start(environment, straight).communicate(timeout=120)
    process = start(environment, killed)
    while not (killed / "checkpoints" / "step_00000020").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    api.upload_file(path_or_fileobj=b"later", path_in_repo="note.txt", repo_id="org/cifar", repo_type="dataset")
    resumed, _ = start(environment, killed).communicate(timeout=120)

    names = ("model/model.safetensors", "training_state/optimizer.safetensors")
    last = f"checkpoints/step_{STEPS:08d}"
    found = {
        "said": said,
        "resumed": resumed,
        "equal": [(straight / last / n).read_bytes() == (killed / last / n).read_bytes() for n in names],
        "whole files": sum(r["m"] == "GET" and not r.get("range") and r["port"] == "store" for r in hub.log),
        "tokens told": sum("hf_alice" in p.read_text(errors="ignore") for p in FOLDER.glob("*/*.json*")),
    }
    (FOLDER / "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
