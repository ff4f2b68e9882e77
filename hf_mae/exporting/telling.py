"""What a user is told on the way: our lines, and no progress bars of others where they have no place, in a log."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers.utils import logging

Say = Callable[[str], None]
"""Takes one line for the user."""


def silent(line: str) -> None:
    """Tell nobody."""
    del line


@contextmanager
def no_bars_in_logs() -> Iterator[None]:
    """Keep transformers from drawing bars where standard error is no terminal; afterwards all is as it was."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    hub_was_silent = are_progress_bars_disabled()
    with warnings.catch_warnings():  # the environment may forbid the Hub's bars, or their absence, and that is said
        warnings.simplefilter("ignore")
        logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.enable_progress_bar()
            if hub_was_silent:
                disable_progress_bars()
