"""Pretraining streamed from a (loopback) Hub: pinned commit, ranges only, bit-exact after a kill, no secret written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def test_a_streamed_run_goes_on_from_its_own_commit_with_the_same_bits(shared, tmp_path):
    data = shared / "data" / "cifar10"
    shards = [data / "train-00000-of-00008.parquet", data / "test-00000-of-00002.parquet"]
    script = Path(__file__).with_name("hub_run.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *map(str, shards)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "results.json").read_text())
    first, second = (re.search(r"revision (\w{40})", found[said]) for said in ("said", "resumed"))
    assert first, found["said"]
    assert second, found["resumed"]
    assert first.group(1) == second.group(1)
    assert "resuming at step" in found["resumed"]
    assert found["equal"] == [True, True]
    assert found["whole files"] == 0
    assert found["tokens told"] == 0
