"""The process that checks an export has the user's packages, whatever way they are found, and never this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

from hf_mae import MAEForImageClassification
from hf_mae.exporting import check
from hf_mae.exporting.telling import no_bars_in_logs
from hf_mae.exporting.write import export

REPOSITORY = Path(__file__).parents[2]


def test_packages_of_the_python_path_are_found_by_it(make, tmp_path, monkeypatch):
    """Relative ones too: the process has a folder of its own."""
    (tmp_path / "packages").mkdir()
    marked = tmp_path / "found"
    (tmp_path / "packages" / "sitecustomize.py").write_text(f"open({str(marked)!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "packages")
    export(make(MAEForImageClassification), tmp_path / "out")
    assert marked.exists()


def test_this_package_cannot_be_imported_by_it_even_where_it_is_found():
    script = (
        f"import runpy, sys; blocked = runpy.run_path({check.__file__!r})['Blocked']\n"
        "sys.meta_path.insert(0, blocked())\n"
        "for name in ('hf_mae', 'hf_mae.exporting'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError as error: print(error)\n"
        "import hf_maelstrom\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert ended.stdout.count("hf_mae is not to be imported") == 2
    assert "No module named 'hf_maelstrom'" in ended.stderr


def test_nothing_but_the_lines_of_say_reaches_the_terminal(make, save, tmp_path, capfd):
    folder = save(make(MAEForImageClassification), tmp_path / "model")
    capfd.readouterr()
    export(folder, tmp_path / "out")
    export(folder, tmp_path / "research", "hf_mae")
    found = capfd.readouterr()
    assert (found.out, found.err) == ("", "")


@pytest.mark.parametrize("silent", [True, False])
def test_bars_are_afterwards_as_they_were(silent):
    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    (logging.disable_progress_bar if silent else logging.enable_progress_bar)()
    try:
        hub = are_progress_bars_disabled()
        with no_bars_in_logs():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is not silent
        assert are_progress_bars_disabled() is hub
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()
    assert are_progress_bars_disabled() is before[1]
