"""One writer for a terminal that has progress bars, and for a log that should have none.

Messages of ours, warnings of Python, loggers and bars of libraries all end on standard error. Written side by side they
tear each other's lines. While `one_writer` is open, each of them is a whole line above the bars; where standard error
is no terminal, there are no bars, no carriage returns and no colours.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_UP = "\x1b[A"  # how tqdm gets back to the bar above


def can_draw_bars() -> bool:
    """Return whether standard error is a terminal with a width; plain lines are printed elsewhere."""
    return sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns > 0


@contextmanager
def one_writer(*, draws: bool = True) -> Iterator[None]:
    """Print whole lines above the bars, whoever writes them; within another `one_writer`, do nothing.

    Args:
        draws: whether this process draws bars; another one begins its lines on the left of the shared terminal.
    """
    if isinstance(sys.stderr, _Lines):
        yield
        return
    bars = can_draw_bars()
    former: dict[str, Any] = {"stderr": sys.stderr}
    if bars and sys.stdout.isatty():
        former["stdout"] = sys.stdout
    lines = {name: _Lines(stream, bars=bars, draws=draws) for name, stream in former.items()}
    for name, stream in lines.items():
        setattr(sys, name, stream)
        _redirect_loggers(former[name], stream)
    try:
        yield
    finally:
        for name, stream in lines.items():
            stream.finish()
            if getattr(sys, name) is stream:
                setattr(sys, name, former[name])
            _redirect_loggers(stream, former[name])


def _redirect_loggers(old: Any, new: Any) -> None:
    """Give the handlers of all loggers that write to one stream another."""
    known = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for handler in [h for one in known if isinstance(one, logging.Logger) for h in one.handlers]:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.stream = new


class _Lines:
    """A stream that passes on whole lines, and the bars of tqdm where there can be any."""

    def __init__(self, stream: Any, *, bars: bool, draws: bool):
        self._stream, self._bars, self._draws = stream, bars, draws
        self._pending: dict[int, str] = {}  # by thread
        self._open, self._in_bar = True, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Take text; a line is printed when it is whole."""
        thread = threading.get_ident()
        pending = self._pending.pop(thread, "")
        if not self._open or (self._bars and not pending and self._is_of_a_bar(text)):
            return self._stream.write(text)
        if not self._bars and not pending and self._is_of_a_bar(text):
            self._in_bar = text.strip() != ""
            return len(text)
        *whole, rest = (pending + text).split("\n")
        if rest:
            self._pending[thread] = rest
        if whole:
            self._print(whole)
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        """Write texts one after the other."""
        for line in lines:
            self.write(line)

    def finish(self) -> None:
        """Print what has no end of line yet; from now on everything is passed on as it comes."""
        rest, self._pending = list(self._pending.values()), {}
        if rest:
            self._print(rest)
        self._open = False

    def _is_of_a_bar(self, text: str) -> bool:
        if text.startswith("\r") or _UP in text:
            return True
        return text.strip("\n") == "" and (self._bars or self._in_bar)  # the end of a bar, or the way to the one below

    def _print(self, lines: Sequence[str]) -> None:
        if not self._bars:
            shown = [_CODES.sub("", line).rstrip("\r").rpartition("\r")[2] for line in lines]
            self._stream.write("".join(f"{line}\n" for line in shown))
        elif not self._draws:
            self._stream.write("".join(f"\r\x1b[K{line}\n" for line in lines))
        else:
            with tqdm.external_write_mode(file=sys.stderr):
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()
            return
        self._stream.flush()


class Bar(tqdm):
    """A progress bar that fits its line: of `parts`, those that are worth most come first, the rest is left out."""

    parts: Sequence[str] = ()

    def __str__(self) -> str:
        """Return the bar with as many parts as there is room for."""
        state: dict[str, Any] = dict(self.format_dict)
        meter: Callable[..., str] = self.format_meter
        for count in range(len(self.parts), 0, -1):
            state["postfix"] = ", ".join(self.parts[:count])
            if state["ncols"] is None or len(meter(**(state | {"ncols": None}))) <= state["ncols"]:
                break
        else:
            state["postfix"] = None
        return meter(**state)
