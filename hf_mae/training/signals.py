"""SIGTERM, SIGUSR1, Ctrl-C and a dead launcher: every rank stops after the same update, saves and exits 0.

The first Ctrl-C is answered at once, the second ends the process at once with exit code 130: the next start continues
from the last checkpoint. Python runs handlers between two instructions of the main thread, which may be in a matrix
product or wait for another rank for minutes. So a thread listens as well: the interpreter writes the number of each
signal to it the moment it arrives.

A launcher that is killed leaves its ranks training as orphans, and `accelerate launch` with one process dies of SIGTERM
without passing it on. A rank that a launcher started therefore takes the loss of its parent for a signal.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, n))
"""What asks a run to stop. Slurm sends SIGUSR1 where a job says `--signal=USR1@120`; Windows has the first two only."""

SAME_PRESS = 0.2
"""Seconds in which a repeated Ctrl-C is taken as the same one: a terminal and a launcher may both send it."""

LAUNCHED = frozenset({"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"})
"""Set by torchrun and by `accelerate launch` for the processes they start."""


class StopSignal:
    """Turns a signal on any rank into one decision of all ranks.

    A signal only sets a flag. The flags are reduced over ranks asynchronously and read one update later, so that no
    step waits; on GPUs this goes through a CPU (gloo) group and adds no device sync.

    Args:
        world: number of processes; must be created on all of them, after the process group.

    Attributes:
        received: name of the first signal, None if there was none.
    """

    def __init__(self, world: int):
        self.received: str | None = None
        self.handled = False
        self.parent = os.getppid() if LAUNCHED & os.environ.keys() else None
        self.world, self.pressed = world, 0.0
        self.work: Any = None
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self.previous = {}
        self.listener: threading.Thread | None = None
        if threading.current_thread() is threading.main_thread():
            self._listen()
            for number in SIGNALS:
                self.previous[number] = signal.signal(number, self._handle)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self.work = None  # the others may never answer
            if self.received == "SIGINT" and "by peer" in str(error):  # a second Ctrl-C has ended another rank first
                _end_now()
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Take note of a signal, in the main thread."""
        again, self.handled = self.handled and number == signal.SIGINT, True
        self.received = self.received or signal.Signals(number).name
        if again and _is_interactive() and time.monotonic() - self.pressed > SAME_PRESS:
            raise KeyboardInterrupt

    def _listen(self) -> None:
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        self.former_fd = signal.set_wakeup_fd(self.mouth.fileno(), warn_on_full_buffer=False)
        _listening.add(self)
        self.listener = threading.Thread(target=self._answer, name="signals", daemon=True)
        self.listener.start()

    def _answer(self) -> None:
        """Answer each signal the moment it comes, whatever the main thread is doing."""
        first: int | None = None
        while number := self.ear.recv(1):  # empty when `close` closes the other end
            if number[0] not in SIGNALS:
                continue
            if first is None:
                first, self.pressed = number[0], time.monotonic()
                name = signal.Signals(first).name
                self.received = self.received or name
                more = "; once more: now, from the last checkpoint" if first == signal.SIGINT else ""
                if _speaks():
                    with suppress(OSError):  # the terminal may be gone
                        sys.stderr.write(f"hf-mae: {name}: stopping after this update, saving{more}\n")
                continue
            # torchrun passes the second Ctrl-C on as SIGTERM.
            passed_on = first == signal.SIGINT and number[0] == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ
            again = number[0] == signal.SIGINT or passed_on
            if again and time.monotonic() - self.pressed > SAME_PRESS and not _is_interactive():
                _end_now()

    def agreed(self) -> bool:
        """Return whether to stop now. A collective: call it on all ranks once per update."""
        if self.parent is not None and self.received is None and os.getppid() != self.parent:
            self.received = "the launcher died"
        if self.world == 1:
            return self.received is not None
        stop = False
        if self.work is not None:
            self.work.wait()
            stop = bool(self.flag.item())
        self.flag = torch.tensor([int(self.received is not None)], dtype=torch.int32)
        self.work = dist.all_reduce(self.flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return stop

    def close(self) -> None:
        """Wait for the last exchange and put the former handlers back."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}
        if self.listener is not None:
            signal.set_wakeup_fd(self.former_fd)
            _listening.discard(self)
            self.mouth.close()
            self.listener.join()
            self.ear.close()
            self.listener = None


def _is_interactive() -> bool:
    """Return whether a person at a prompt or in a notebook goes on after the run: then nothing may end the process."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


def _end_now(*handled: object) -> None:
    """End this process. Nothing is unwound: the main thread may be busy for minutes.

    Checkpoints are whole or absent, the lock of the run folder goes with the process, and decode processes with their
    parent.
    """
    if _speaks():
        with suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nhf-mae: stopped; the same command continues from the last checkpoint\n")
    os._exit(130)


def _end_while_ending() -> None:
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, _end_now)


atexit.register(_end_while_ending)  # Python takes a while to end, and would answer Ctrl-C with a traceback


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


_listening: set[StopSignal] = set()


def _leave_to_the_parent() -> None:
    """Let a forked process, such as a decode worker, not write to the listener of its parent."""
    if _listening:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
