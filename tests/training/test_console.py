"""A terminal with progress bars shows whole lines, and a log has lines alone."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
import warnings

import pytest
from tqdm import tqdm

from hf_mae.training.console import one_writer
from hf_mae.training.monitors import Pace, duration

# Everybody who writes while a run goes on: we, Python, loggers with and without a handler, print, bars within the bar.
SESSION = """
import logging, sys, tempfile, time, warnings
from pathlib import Path
from tqdm import tqdm
from hf_mae.training.console import Bar, one_writer
from hf_mae.training.monitors import Monitor, Printer

log = logging.getLogger("some.library")
log.addHandler(logging.StreamHandler())
settings = dict(step=-1, total_steps=123456, judge_from=1000, track="none", is_main=True, name="x")
with one_writer(), Monitor(Path(tempfile.mkdtemp()), **settings) as monitor:
    monitor.bar.mininterval = 0
    for i in range(1, 41):
        monitor.tick()
        if i % 4 == 0:
            rates = {"images_per_second": 12345.0, "waiting_share": 0.03}
            monitor.log({"step": i, "examples_seen": 64 * i, "loss": 0.1234, "lr": 1e-4} | rates)
        if i == 5:
            Printer(True)("message one")
            monitor.say("message two")
        if i == 10:
            warnings.warn("warning three", stacklevel=1)
            log.warning("logged four")
            logging.getLogger("without.handler").warning("logged five")
            print("\\x1b[31mprinted six\\x1b[0m", file=sys.stderr)
        if i == 20:
            for k in Bar(range(5), desc="evaluating", leave=False, dynamic_ncols=True, mininterval=0):
                if k == 2:
                    log.warning("logged seven")
                    monitor.say("message eight")
        if i == 30:
            for k in tqdm(range(3), desc="Downloading", mininterval=0):
                log.warning("logged nine %d", k)
        time.sleep(0.01)
print("finished")
"""
LINES = [
    *("message one", "message two", "logged four", "logged five", "printed six", "logged seven", "message eight"),
    *("logged nine 0", "logged nine 1", "logged nine 2"),
]


@pytest.fixture
def session(tmp_path):
    (tmp_path / "session.py").write_text(SESSION)
    return tmp_path / "session.py"


def test_a_log_has_whole_lines_without_bars_codes_or_carriage_returns(session):
    done = subprocess.run([sys.executable, str(session)], capture_output=True, timeout=120, check=True)
    said = done.stderr.decode()
    assert "\r" not in said
    assert "\x1b" not in said
    lines = said.splitlines()
    assert [line for line in lines if line in LINES] == LINES
    assert not [line for line in lines if "Downloading" in line or "evaluating" in line]
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 10
    assert re.fullmatch(
        r"step 4/123456: loss 0.1234, lr 1.00e-04, 12345 images/s, 3% waiting .*, 11 min left", steps[0]
    )
    assert not [line for line in lines if line.strip() == ""]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_whole_lines_and_one_bar_that_fits(session, columns, tmp_path):
    tmux = shutil.which("tmux")
    if tmux is None:
        pytest.skip("needs tmux, a terminal that can be read")
    done = tmp_path / "done"
    command = f"{sys.executable} {session}; touch {done}; sleep 60"
    server = [tmux, "-L", f"hf-mae-{os.getpid()}-{columns}", "-f", "/dev/null"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm"}
    size = ["-x", str(columns), "-y", "50"]
    subprocess.run([*server, "new-session", "-d", *size, command], env=environment, check=True, timeout=60)
    try:
        deadline = time.monotonic() + 120
        while not done.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(0.5)
        shown = subprocess.run([*server, "capture-pane", "-p", "-J"], capture_output=True, check=True, timeout=60)
    finally:
        subprocess.run([*server, "kill-server"], check=False, timeout=60)
    screen = [line.rstrip() for line in shown.stdout.decode().splitlines() if line.strip()]
    assert [line for line in screen if line in LINES] == LINES, screen
    *above, bar, last = screen
    assert last == "finished"
    parts = ["loss 0.1234", "lr 1.00e-04", "12345 images/s", "3% waiting for data"]
    room = parts if columns == 120 else parts[:2]
    assert re.fullmatch(rf" *0%\|.*\| 40/123456 \[.*<.*, {', '.join(room)}\]", bar), bar
    assert sum("40/123456" in line for line in screen) == 1
    # Nothing else: two lines of the warning, and the finished bar of the library, which stays.
    others = [line for line in above if line not in LINES]
    assert len(others) == 3, others
    assert "warning three" in others[0]
    assert "stacklevel" in others[1]
    assert others[2].startswith("Downloading: 100%")


def test_what_was_there_is_put_back(capsys):
    former, handler = sys.stderr, logging.StreamHandler()
    logger = logging.getLogger("test.console")
    logger.addHandler(handler)
    try:
        with one_writer():
            assert sys.stderr is not former
            with one_writer():  # a run within a command
                logger.warning("inside")
            sys.stderr.write("no end of line")
        assert sys.stderr is former
        assert handler.stream is former
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err == "inside\nno end of line\n"


def test_an_error_within_keeps_its_text(capsys):
    def fail():
        with one_writer():
            sys.stderr.write("before ")
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        fail()
    assert capsys.readouterr().err == "before \n"


def test_a_line_that_libraries_draw_again_and_again_is_logged_once(capsys):
    with one_writer(), warnings.catch_warnings():
        warnings.simplefilter("always")
        print("10 %", end="\r", file=sys.stderr)
        print("100 %", file=sys.stderr)
        for _ in tqdm(range(3), desc="library", mininterval=0):
            pass
        print("\nafter", file=sys.stderr)
    assert capsys.readouterr().err == "100 %\n\nafter\n"


# ------------------------------------------------------------------------------------------------ how long it will take


def ticks(pace, clock, seconds, count):
    said = []
    for _ in range(count):
        clock[0] += seconds
        said.append(pace.tick())
    return said


def test_many_hours_are_said_once_after_the_first_updates(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("hf_mae.training.monitors.time.perf_counter", lambda: clock[0])
    said = ticks(Pace(75_021), clock, 3.9, 40)
    (text,) = [one for one in said if one is not None]
    assert said.index(text) < 20
    assert text.startswith("about 81 h at this pace (75,01")
    assert "updates of 3.9 s" in text
    assert not any(ticks(Pace(900), clock, 3.9, 40))  # an hour is not long
    assert said.count(text) == 1


def test_lengths_of_time_are_rough():
    assert [duration(s) for s in (0.4, 40, 700, 9000, 295_200)] == ["0 s", "40 s", "12 min", "2.5 h", "82 h"]
