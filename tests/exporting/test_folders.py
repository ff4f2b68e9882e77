"""A folder is whole or absent: killed, linked to, or written by two at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_mae.exporting import folders
from hf_mae.exporting.folders import FILES, WouldOverwriteError, is_edited, new_folder, write_files


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
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)  # as on systems that know two renames only
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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems need two renames")
def test_both_folders_change_places_in_one_step(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("between two renames there is no folder"))
    write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "mark").read_text() == "second"
    assert names(tmp_path) == ["out"]


def test_a_rename_that_fails_puts_the_former_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    write(tmp_path / "out", "first")
    rename = os.rename

    def failing(source, target):
        if ".tmp_" in Path(source).name:
            raise PermissionError(13, "not now")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError):
        write(tmp_path / "out", "second")
    assert (tmp_path / "out" / "mark").read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_what_is_edited_while_the_new_folder_is_made_is_kept(tmp_path):
    write(tmp_path / "out", "first")

    def write_and_edit():
        with new_folder(tmp_path / "out", mark="mark") as made:
            (made / "mark").write_text("second")
            (tmp_path / "out" / "mark").write_text("by hand")

    with pytest.raises(WouldOverwriteError, match="mark was edited"):
        write_and_edit()
    assert (tmp_path / "out" / "mark").read_text() == "by hand"
    assert names(tmp_path) == ["out"]


def test_a_folder_of_another_kind_is_not_replaced(tmp_path):
    write(tmp_path / "out", "first")
    (tmp_path / "out" / "other").write_text("")
    with pytest.raises(WouldOverwriteError, match="holds something else"), new_folder(tmp_path / "out", mark="other"):
        pass
    assert names(tmp_path / "out") == [FILES, "mark", "other"]


def test_files_of_ours_are_written_again_and_others_are_not(tmp_path):
    write(tmp_path / "out", "first")
    out = tmp_path / "out"
    write_files(out, {"a/x": b"1", "a/y": b"1", "z": b"1"})
    (out / "a" / "mine").write_text("mine")
    write_files(out, {"z": b"2"}, stale=lambda path: path.startswith("a/"))
    assert names(out / "a") == ["mine"]
    (out / "z").write_text("mine")
    with pytest.raises(WouldOverwriteError, match=r"z was edited or added.*--overwrite"):
        write_files(out, {"b": b"3", "z": b"3"})
    assert not (out / "b").exists()
    assert write_files(out, {"b": b"3", "z": b"3"}, keep=True) == ["z"]
    assert ((out / "b").read_text(), (out / "z").read_text()) == ("3", "mine")
    assert write_files(out, {"z": b"4"}, overwrite=True) == []
    assert not is_edited(out, "z")
    (out / "z").unlink()
    (out / "z").mkdir()
    (out / "z" / "mine").write_text("mine")
    for path in ("z", "mark/x"):  # a folder in place of a file, and a file in place of a folder
        with pytest.raises(WouldOverwriteError, match="edited or added"):
            write_files(out, {path: b"5"})


def test_a_write_that_was_killed_is_not_taken_for_an_edit(tmp_path, monkeypatch):
    write(tmp_path / "out", "first")
    out, replace = tmp_path / "out", Path.replace
    write_files(out, {"a": b"1", "b": b"1"})

    def killed(self, target):
        if self.name.endswith("b"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_files(out, {"a": b"2", "b": b"2"})
    monkeypatch.undo()
    assert ((out / "a").read_text(), (out / "b").read_text()) == ("2", "1")
    write_files(out, {"a": b"3", "b": b"3"})
    assert ((out / "a").read_text(), (out / "b").read_text()) == ("3", "3")


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(it has no mark\)"):
        write(tmp_path / "mine", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        write(tmp_path / "file", "x")
    write(tmp_path / "mine", "x", overwrite=True)
    assert names(tmp_path / "mine") == [FILES, "mark"]
