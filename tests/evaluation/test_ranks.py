"""Two or three gloo processes with unequal shares evaluate exactly as one does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

SCRIPT = Path(__file__).parent / "ranks.py"


@pytest.mark.multiprocess
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_report_the_numbers_of_one_to_the_last_bit(tmp_path, world):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world), str(SCRIPT)]
    command.append(str(tmp_path))
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    spec = importlib.util.spec_from_file_location("evaluation_ranks", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    one = script.evaluate(Accelerator(cpu=True))
    assert one["results"]["examples"] == 13
    assert one["numbers"]["real_examples"] == 10
    for rank in range(world):
        assert json.loads((tmp_path / f"rank_{rank}.json").read_text()) == one
