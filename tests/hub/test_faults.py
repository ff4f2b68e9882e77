"""Every fault of a Hub while our commands run: clear words, nothing half-published, nothing sent twice."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.conftest import absent

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "hub_faults.py"
if not SCRIPT.is_file():
    pytest.skip("needs the benchmarks of the checkout, which a source distribution leaves out", allow_module_level=True)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("faults")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kill", "--json", str(out / "rows.json"), "--out", str(out / "table.md")],
        env=os.environ | {"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    everything = (out / "rows.json").read_text() + (out / "table.md").read_text() + done.stdout + done.stderr
    return json.loads((out / "rows.json").read_text()) | {"printed": everything}


@pytest.fixture(scope="module")
def rows(found) -> dict[str, dict]:
    return {row["name"]: row for row in found["rows"]}


PASSES = ["plain", "whoami", "create", "info", "preupload", "batch", "put", "put-cut", "commit-500", "commit-cut"]
PASSES += ["commit-lost", "tree"]
PASSES += ["load", "load-get", "load-small", "load-head", "load-cut"]
PASSES += ["open-get", "pull", "pull-get", "pull-cut", "pull-tree"]


@pytest.mark.parametrize("name", PASSES)
def test_a_fault_that_passes_costs_time_only(rows, name):
    assert rows[name]["outcome"] == "done", rows[name]
    assert rows[name]["hits"] != 0, "the fault was never met"
    if rows[name]["command"] == "publish":
        assert rows[name]["state"] == "whole"


EMPTY = ("put-never", "commit-never", "commit-403", "commit-409", "card-400")
"""Faults after the repository was made, which stays: the error has to say so."""

STOPS = {
    "no-token": "needs a token and there is none.*hf auth login",
    "bad-token": "does not know this token",
    "read-token": "the token of alice has the role read",
    "not-mine": "org is not you .bob. nor an organisation of yours.*a token of a member of org with the role write",
    "put-never": "uploading to .* failed 6 times.*run the same command again",
    "commit-never": "committing to .* failed 6 times.*run the same command again",
    "commit-403": "the token may not do this",
    "commit-412": "changed by someone else in the meantime .412.; nothing of yours was written",
    "commit-409": "changed by someone else in the meantime .409.; nothing of yours was written",
    "no-space": "the disk is full",
    "card-400": "the Hub refuses the card: Invalid metadata in README.md.; no file was written",
    "away": "failed 6 times.*check the network",
}


@pytest.mark.parametrize(("name", "words"), STOPS.items(), ids=STOPS.keys())
def test_a_fault_that_stays_is_told_and_leaves_the_repository_as_it_was(rows, name, words):
    row = rows[name]
    assert row["outcome"] in ("ValueError", "RuntimeError", "GaveUpError"), row
    assert re.search(words, row["told"]), row["told"]
    assert row["state"] == ("empty" if name in EMPTY else "untouched")
    assert ("the new public repository" in row["told"] and "was made, and is empty" in row["told"]) == (name in EMPTY)


@pytest.mark.parametrize("name", ["xet", "xet-commit-500", "xet-token-404"])
def test_with_xet_on_it_is_whole_or_told(rows, name):
    if name not in rows:
        absent("needs hf_xet")
    row = rows[name]
    if name.startswith("xet-token"):
        assert row["outcome"] in ("ValueError", "RuntimeError", "GaveUpError"), row
        assert row["state"] == "empty"
        assert "was made, and is empty" in row["told"]
    else:
        assert (row["outcome"], row["state"]) == ("done", "whole"), row


GATED = ["evaluate", "export", "demo --reconstruct", "demo --classify", "pull"]


@pytest.mark.parametrize("command", GATED)
def test_a_gated_repository_is_told_by_every_command_that_loads(rows, command):
    row = rows[f"gated-{command}"]
    assert row["outcome"] in ("ModelFileError", "ValueError", "RuntimeError"), row
    assert re.search(r"is gated|a gated repo", row["told"]), row
    assert "hf auth login" in row["told"]
    assert row["waits"] == []


def test_a_full_disk_stops_a_pull_with_a_remedy(rows):
    assert rows["pull-no-space"]["outcome"] == "RuntimeError"
    assert "the disk is full" in rows["pull-no-space"]["told"]


def test_a_model_that_cannot_be_opened_is_one_sentence(rows):
    for name in ("open-missing", "open-gated"):
        assert rows[name]["outcome"] == "ModelFileError", rows[name]
        assert "cannot be opened as a Hub id" in rows[name]["told"]
        assert "hf auth login" in rows[name]["told"]


def test_nothing_is_ever_half_published(rows):
    assert {row["state"] for row in rows.values() if row["command"] == "publish"} == {
        "whole", "untouched", "empty",
    }  # fmt: skip


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_twice(rows):
    assert "the Hub's answer to the commit was lost, but the commit is there" in rows["commit-lost"]["said"]


def test_every_wait_of_ours_is_told(rows):
    for name in ("create", "info", "preupload", "commit-500", "load-get", "load-small", "pull-get"):
        assert rows[name]["waits"], rows[name]


def test_an_upload_killed_half_way_shows_nothing_and_sends_the_rest_only(found):
    killed = found["killed"]["LFS"]
    assert killed["killed while uploading"]
    assert killed["visible after the kill"] in ([], [".gitattributes"])
    assert killed["exit of the second"] == 0, killed["told"]
    finished = killed["files finished before the kill"]
    assert finished >= 5
    assert killed["MB sent by the second"] <= (10 - finished) * 21
    assert killed["commits"] == 2  # the Hub's own first one, and ours


def test_an_upload_by_xet_killed_half_way_shows_nothing_and_is_made_whole_by_the_second(found):
    if "xet" not in found["killed"]:
        absent("needs hf_xet")
    killed = found["killed"]["xet"]
    assert killed["killed while uploading"]
    assert killed["visible after the kill"] in ([], [".gitattributes"])
    assert killed["exit of the second"] == 0, killed["told"]
    assert killed["commits"] == 2


def test_no_token_is_told_or_kept(found):
    for token in ("alice_write", "alice_read", "bob_write", "bob_read", "hf_nobody"):
        assert token not in found["printed"].replace("hf_***", "")
