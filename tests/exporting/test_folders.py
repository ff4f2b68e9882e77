"""A folder is whole or absent: killed, linked to, or written by two at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_mae.exporting.folders import new_folder


def write(out, text, **options):
    with new_folder(out, mark="mark", **options) as folder:
        (folder / "mark").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_block_leaves_what_was_there(tmp_path):
    write(tmp_path / "out", "first")
    with pytest.raises(KeyError), new_folder(tmp_path / "out", mark="mark"):
        raise KeyError
    assert (tmp_path / "out" / "mark").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_the_folder_is_as_open_as_any_other(tmp_path):
    write(tmp_path / "out", "first")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_and_its_folder_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "first")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "mark").read_text() == "second"
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["real"]


def test_of_two_at_a_time_each_is_whole_and_the_later_stays(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, mark="mark") as first:
        (first / "mark").write_text("first")
        with new_folder(out, mark="mark") as second:
            assert first != second
            (second / "mark").write_text("second")
            assert (first / "mark").read_text() == "first"
        assert (out / "mark").read_text() == "second"
    assert (out / "mark").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_appears_between_the_renames_is_replaced(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", os.rename
    write(out, "first")

    def slow(source, target):
        rename(source, target)
        if Path(source) == out and not out.exists():
            monkeypatch.setattr(os, "rename", rename)
            write(out, "of another")

    monkeypatch.setattr(os, "rename", slow)
    write(out, "mine")
    assert (out / "mark").read_text() == "mine"
    assert names(tmp_path) == ["out"]


@pytest.mark.multiprocess
def test_what_a_killed_process_left_is_removed_and_what_is_at_work_is_not(tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path; from hf_mae.exporting.folders import new_folder\n"
        "with new_folder(Path(sys.argv[1]), mark='mark') as folder:\n"
        "    (folder / 'half').write_text(''); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(out)], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 120  # it imports torch and transformers first
        while not (found := list(tmp_path.glob(".tmp_*_out/half"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found
        write(out, "first")
        assert found[0].exists()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    write(out, "second")
    assert names(tmp_path) == ["out"]


def test_a_folder_whose_replacement_was_killed_between_the_renames_comes_back(tmp_path):
    write(tmp_path / "out", "first")
    (tmp_path / "out").rename(tmp_path / ".trash_0123abcd_out")
    with pytest.raises(KeyError), new_folder(tmp_path / "out", mark="mark"):
        raise KeyError
    assert (tmp_path / "out" / "mark").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(it has no mark\)"):
        write(tmp_path / "mine", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        write(tmp_path / "file", "x")
    write(tmp_path / "mine", "x", overwrite=True)
    assert names(tmp_path / "mine") == ["mark"]
