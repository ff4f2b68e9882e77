"""Hub data sets, against a server on this machine that speaks the Hub's protocol (`tests/hub/server.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[list[str], str]:
    """Run all cases in one process of their own; return its lines and its standard error."""
    folder = tmp_path_factory.mktemp("hub")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_DATASETS_CACHE": str(folder / "arrow"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hub_script.py")), str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    return done.stdout.splitlines(), done.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("stream", id="parquet_is_streamed_by_exact_ranges_of_a_pinned_commit"),
        pytest.param("faults", id="network_faults_change_no_batch_and_lost_files_are_named"),
        pytest.param("downloads", id="formats_without_ranges_are_downloaded_or_refused"),
        pytest.param("mistakes", id="what_cannot_be_opened_says_why"),
    ],
)
def test_hub(case, outcome):
    lines, errors = outcome
    assert f"ok {case}" in lines, errors[-4000:]
