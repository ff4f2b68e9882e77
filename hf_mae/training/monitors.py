"""What a run says while it goes: metrics.jsonl (always), a progress bar, a tracker, and a plain verdict.

Only the main process writes. Rows are JSON objects with `step`; rows of a killed run that lie past its last checkpoint
are cut at resume, so that times and rates aside the file equals that of a run that was never stopped.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_mae.recipes.fields import unknown
from hf_mae.training.console import Bar, can_draw_bars
from hf_mae.training.distributed import reduce_sum

TIMES = frozenset(
    {"images_per_second", "eval_images_per_second", "seconds_waiting_for_data", "waiting_share", "seconds"}
)
"""Columns of metrics.jsonl that depend on the clock."""


class Window:
    """Sums of the losses since the last logged row, kept on the device: no step waits for a number.

    Also remembers the first update whose loss was not finite.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], step: int) -> None:
        """Add one micro-batch of update `step` (0-based)."""
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        bad = ~torch.isfinite(losses["loss"].detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(bad, step, self.first_bad)

    def state(self) -> dict[str, Any]:
        """Return what this rank has summed up, exactly (a float32 survives JSON)."""
        return {"sums": {k: v.item() for k, v in self.sums.items()}, "count": self.count}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up the sums of `state()`."""
        self.sums = {k: torch.tensor(v, dtype=torch.float32, device=self.device) for k, v in state["sums"].items()}
        self.count = state["count"]

    def non_finite_step(self, accelerator: Accelerator) -> int | None:
        """Return the first update with a non-finite loss on any rank. A collective, and a device sync."""
        far = torch.iinfo(torch.int64).max
        first = torch.where(self.first_bad < 0, far, self.first_bad)
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(first, op=torch.distributed.ReduceOp.MIN)
        return None if first.item() == far else int(first.item())

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all ranks and micro-batches, and start over. A collective."""
        names = sorted(self.sums)
        packed = torch.stack([*(self.sums[n] for n in names), torch.tensor(float(self.count), device=self.device)])
        *sums, count = reduce_sum(packed, accelerator).tolist()
        self.sums, self.count = {}, 0
        return {name: value / count for name, value in zip(names, sums, strict=True)}


class Monitor:
    """Writes metrics.jsonl, draws the progress bar and feeds an optional tracker.

    Args:
        folder: the run folder.
        step: where the run starts; rows beyond it are cut from metrics.jsonl and bad_samples.jsonl.
        owes_evaluation: the evaluation after `step` is still to come; what a killed start has written of it is cut.
        total_steps: updates of the whole run.
        judge_from: from this update on, warn once if nothing is being learned.
        track: `none`, `tensorboard` or `trackio`.
        is_main: other processes get a silent monitor.
        name: the run's name for the tracker.
        baseline: what a loss must fall below to have learned anything, in words.
        shorter: what makes a run of many hours shorter, in words.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        total_steps: int,
        judge_from: int,
        track: str,
        is_main: bool,
        name: str,
        baseline: str = "the mean-patch baseline",
        shorter: str = "fewer --epochs",
        owes_evaluation: bool = False,
    ):
        self.baseline, self.shorter = baseline, shorter
        self.is_main, self.folder, self.total_steps, self.judge_from = is_main, folder, total_steps, judge_from
        self.trivial_loss: float | None = None
        self.tracker: Any = None
        self.last: dict[str, Any] = {}
        self.warned = False
        if not is_main:
            return
        # Rows of training have a loss; those of evaluations have not.
        cut_rows(
            folder / "metrics.jsonl",
            lambda row: row["step"] < step or (row["step"] == step and ("loss" in row or not owes_evaluation)),
        )
        cut_rows(folder / "bad_samples.jsonl", lambda row: row["batch"] < step)
        self.last = next((row for row in reversed(read_rows(folder / "metrics.jsonl")) if "loss" in row), {})
        self.file = (folder / "metrics.jsonl").open("a", buffering=1)
        self.tracker = open_tracker(track, folder, name, step, self.say)
        self.bar = Bar(
            total=total_steps,
            initial=max(step, 0),
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
            disable=not can_draw_bars(),
        )
        self.pace = Pace(total_steps - max(step, 0))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def tick(self) -> None:
        """Count one update on the progress bar."""
        if self.is_main:
            self.bar.update()
            if (text := self.pace.tick()) is not None:
                self.say(f"{text}: try {self.shorter}")

    def say(self, text: str) -> None:
        """Print a line."""
        Printer(self.is_main)(text)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl and pass its numbers on to the tracker."""
        if not self.is_main:
            return
        row = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in row.items()}
        self.file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.tracker is not None:
            self.tracker({k: v for k, v in row.items() if isinstance(v, int | float)}, row["step"])

    def log(self, row: dict[str, Any]) -> None:
        """Write a training row, refresh the bar, and warn once if nothing is being learned."""
        self.write(row)
        self.last = row
        if not self.is_main:
            return
        self.bar.parts = (
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"{row['images_per_second']:.0f} images/s",
            f"{row['waiting_share']:.0%} waiting for data",
        )
        if self.bar.disable:
            left = (
                (self.total_steps - row["step"])
                * row["examples_seen"]
                / row["step"]
                / max(row["images_per_second"], 0.01)
            )
            self.say(f"step {row['step']}/{self.total_steps}: {', '.join(self.bar.parts)}, {duration(left)} left")
        if not self.warned and row["step"] >= self.judge_from and (text := self.verdict()).startswith("not"):
            self.warned = True
            self.say(text)

    def ended(self, row: dict[str, Any]) -> None:
        """Write what was summed up since the last training row, where a run ends before the next."""
        self.write(row)
        self.last = row

    def evaluated(self, row: dict[str, Any]) -> None:
        """Write an evaluation row and show it."""
        self.write(row)
        numbers = ", ".join(
            f"{k} {v:.4g}" for k, v in row.items() if k not in {"step", "epoch", "examples_seen", *TIMES}
        )
        if numbers:
            self.say(f"step {row['step']}: {numbers}")

    def bad(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Append samples that could not be decoded to bad_samples.jsonl."""
        if self.is_main and (rows := list(samples)):
            with (self.folder / "bad_samples.jsonl").open("a") as file:
                file.writelines(json.dumps(dict(row)) + "\n" for row in rows)

    def verdict(self) -> str:
        """Say whether the last logged loss is below that of a prediction that ignores the input."""
        if not self.last or self.trivial_loss is None:
            return "no verdict: nothing was logged"
        loss, trivial, step = self.last["loss"], self.trivial_loss, self.last["step"]
        if loss < 0.98 * trivial:
            share = 1 - loss / trivial
            return f"learning: loss {loss:.4f} at step {step} is {share:.0%} below {self.baseline} {trivial:.4f}"
        return (
            f"not learning: loss {loss:.4f} at step {step} is not clearly below {trivial:.4f}, the loss of "
            f"{self.baseline}. Look at the pictures; train longer, or try --optim.base-lr three times higher or lower"
        )

    def sync(self) -> None:
        """Make the rows written so far survive a power cut."""
        if self.is_main:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close files and bar."""
        if self.is_main:
            self.bar.close()
            self.file.close()
            if self.tracker is not None:
                self.tracker(None, None)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a .jsonl file, empty if there is none; a line torn by a kill is left out."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def cut_rows(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a .jsonl file atomically with the rows that `keep` accepts."""
    if path.exists():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path) if keep(row)))
        os.replace(temporary, path)


def check_tracker(track: str) -> None:
    """Import a tracker, before anything slow is begun for it.

    Raises:
        ValueError: the tracker is unknown, or not installed.
    """
    if track not in ("none", "tensorboard", "trackio"):
        raise unknown("engine.track", track, ("none", "tensorboard", "trackio"))
    try:
        if track == "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        elif track == "trackio":
            import trackio  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"engine.track={track} is not installed ({error}); run: pip install 'hf_mae[track]'"
        ) from error


def open_tracker(track: str, folder: Path, name: str, step: int, say: Callable[[str], None] = lambda text: None) -> Any:
    """Return a function (numbers, step) that feeds a tracker, closed by (None, None); None for `none`.

    TensorBoard's files lie in the run folder. Trackio keeps all runs in its own folder, where `trackio show` finds them
    and compares them (TRACKIO_DIR moves it); the run folder says under which name. `say` is told how to look.

    Raises:
        ValueError: the tracker is unknown, or not installed.
    """
    check_tracker(track)
    if track == "none":
        return None
    if track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "events", purge_step=step + 1 if step else None)
        say(f"metrics: tensorboard --logdir {shlex.quote(str(folder.parent))}")

        def to_tensorboard(numbers: Mapping[str, float] | None, at: int | None) -> None:
            if numbers is None:
                writer.close()
                return
            for key, value in numbers.items():
                if key != "step":
                    writer.add_scalar(key, value, at)

        return to_tensorboard
    import trackio

    note = folder / "events" / "trackio_run"
    if step < 0 or not note.exists():  # another run of the same name stays another line in every chart
        note.parent.mkdir(exist_ok=True)
        note.write_text(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}\n")
    with redirect_stdout(sys.stderr):  # what it says belongs to the log of the run
        trackio.init(project="hf_mae", name=note.read_text().strip(), resume="allow")
    say(f"metrics: trackio show --project hf_mae, where this run is {note.read_text().strip()}")

    def to_trackio(numbers: Mapping[str, float] | None, at: int | None) -> None:
        if numbers is None:
            with redirect_stdout(sys.stderr):
                trackio.finish()
        else:
            trackio.log({k: v for k, v in numbers.items() if k != "step"}, step=at)

    return to_trackio


class Printer:
    """Prints a line on the main process, to standard error, where the progress bar is (see `one_writer`)."""

    def __init__(self, is_main: bool):
        self.is_main = is_main

    def __call__(self, text: str) -> None:
        """Print one line; silent on other processes."""
        if self.is_main:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


class Pace:
    """Tells once, after the first updates, how long a run will take, if that is long.

    Args:
        updates: that are left.
    """

    LONG = 3600.0
    """Seconds from which on a run is said to take long."""

    def __init__(self, updates: int):
        self.updates, self.done, self.start = updates, 0, 0.0

    def tick(self) -> str | None:
        """Count one update; return how long the others will take, where it is known by now, and long."""
        self.done += 1
        if self.start < 0:
            return None
        if self.done == 1:  # the first update compiles, allocates and fills buffers
            self.start = time.perf_counter()
            return None
        if self.done <= 20 and time.perf_counter() - self.start < 30:
            return None
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # once: updates are only queued when they are counted
        each = (time.perf_counter() - self.start) / (self.done - 1)
        self.start = -1.0
        left = self.updates - self.done
        if left * each < self.LONG:
            return None
        return f"about {duration(left * each)} at this pace ({left:,} updates of {each:.2g} s)"


def duration(seconds: float) -> str:
    """Return a rough length of time: `40 s`, `12 min`, `3.4 h`, `82 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


class Clock:
    """Seconds since it was started or last read."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap, and start the next."""
        now = time.perf_counter()
        passed, self.start = now - self.start, now
        return passed

    def skip(self, seconds: float) -> None:
        """Leave `seconds` out of the running lap."""
        self.start += seconds
