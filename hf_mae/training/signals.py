"""SIGTERM, Ctrl-C and a dead launcher: every rank stops after the same update, saves and exits 0.

A launcher that is killed leaves its ranks training as orphans, and `accelerate launch` with one process dies of SIGTERM
without passing it on. A rank that a launcher started therefore takes the loss of its parent for a signal.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 5.0
"""Seconds in which a repeated Ctrl-C is taken as the same one: a terminal and a launcher may both send it."""

LAUNCHED = frozenset({"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"})
"""Set by torchrun and by `accelerate launch` for the processes they start."""


class StopSignal:
    """Turns a signal on any rank into one decision of all ranks.

    The handler only sets a flag. The flags are reduced over ranks asynchronously and read one update later, so that no
    step waits; on GPUs this goes through a CPU (gloo) group and adds no device sync.

    Args:
        world: number of processes; must be created on all of them, after the process group.
    """

    def __init__(self, world: int):
        self.received: str | None = None
        self.parent = os.getppid() if LAUNCHED & os.environ.keys() else None
        self.world, self.since = world, 0.0
        self.work: Any = None
        self.flag = torch.zeros(1, dtype=torch.int32)
        self.group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self.previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._handle)

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT and time.monotonic() - self.since > PATIENCE:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.since = signal.Signals(number).name, time.monotonic()

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
