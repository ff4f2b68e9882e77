"""The best model of a run, kept beside its checkpoints, and when to stop waiting for a better one.

    best/
        model/         a Hugging Face folder: config.json, model.safetensors
        best.json      which number, its value, the update it belongs to, and all numbers of that evaluation
        manifest.json  size and SHA-256 of every other file

What is known about the best so far is part of `TrainState`, so that a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from hf_mae.training.checkpoint import TrainState, commit, damage, gather_average, gather_weights, put_back
from hf_mae.training.distributed import agree, gather_objects
from hf_mae.training.monitors import TIMES
from hf_mae.training.optim import MovingAverage


class Best:
    """Judges evaluations: keeps the model with the best number, and says when no better one has come for too long.

    Args:
        folder: where the model goes, replaced as a whole.
        metric: the number that decides. A name that starts with `ema_` keeps the averaged weights; of a name that ends
            with `loss` less is better.
        accelerator: carries the ranks.
        task: the prepared task.
        average: the averaged weights, if the run has them.
        patience: evaluations without a better number after which to stop; None never stops.

    Raises:
        ValueError: the metric is of averaged weights, and there are none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        metric: str,
        accelerator: Accelerator,
        task: nn.Module,
        average: MovingAverage | None,
        patience: int | None,
    ):
        if metric.startswith("ema_") and average is None:
            raise ValueError(f"evals.best={metric} needs averaged weights; add --optim.ema-decay 0.9999")
        self.folder, self.metric, self.accelerator, self.patience = folder, metric, accelerator, patience
        self.task, self.average = task, average

    def __call__(self, numbers: Mapping[str, float], state: TrainState) -> bool:
        """Keep the model if it is better than any before. A collective: call it on all ranks.

        Args:
            numbers: of one evaluation; without the metric among them it does not count.
            state: what is known about the best so far; changed in place.

        Returns:
            Whether to stop.

        Raises:
            RuntimeError: the model could not be written (on every rank); the one before is untouched.
        """
        value = gather_objects(numbers.get(self.metric), self.accelerator)[0]  # all ranks decide alike
        if value is None:
            return False
        if self._is_better(value, state.best_value):
            self._write(numbers, value, state.step)
            state.best_value, state.best_step, state.evaluations_since_best = value, state.step, 0
        else:
            state.evaluations_since_best += 1
        return self.patience is not None and state.evaluations_since_best >= self.patience

    def _is_better(self, value: float, best: float | None) -> bool:
        if not math.isfinite(value):
            return False
        return best is None or (value < best if self.metric.endswith("loss") else value > best)

    def _write(self, numbers: Mapping[str, float], value: float, step: int) -> None:
        weights = gather_weights(self.task)
        if self.average is not None and self.metric.startswith("ema_"):
            weights |= gather_average(self.average)
        error: Exception | None = None
        if self.accelerator.is_main_process:
            try:
                temporary = _tidied(self.folder)
                if wrong := next((k for k, v in weights.items() if not torch.isfinite(v).all()), None):
                    raise FloatingPointError(
                        f"weight {wrong} is not finite after update {step}, so the model is not kept as the best; "
                        "lower --optim.base-lr or use --optim.clip-grad 1.0"
                    )
                temporary.mkdir(parents=True)
                self.accelerator.unwrap_model(self.task).write_model(temporary / "model", weights)
                # NaN is no JSON, and a rate would differ in a resumed run.
                finite = {k: v if math.isfinite(v) else None for k, v in numbers.items() if k not in TIMES}
                record = {"metric": self.metric, "value": value, "step": step, "numbers": finite}
                (temporary / "best.json").write_text(json.dumps(record, indent=2) + "\n")
                commit(temporary, self.folder)
            except FloatingPointError as caught:
                error = caught
            except (OSError, RuntimeError, SafetensorError) as caught:
                error = RuntimeError(
                    f"the best model could not be written to {self.folder}: {caught}. Free some space and run the same "
                    "command again to continue"
                )
        agree(error, self.accelerator, f"writing {self.folder}")


def bring_best(folder: Path, checkpoint: Path, state: TrainState, accelerator: Accelerator) -> None:
    """Put the best model back in place where a run continues. A collective: call it on all ranks.

    A run that was killed while it replaced its best model gets the former one back. A run that continues in another
    folder takes the best model of the run it comes from along, if that is still the one its state speaks of; else the
    next better model is the first one there. What is known about the best is left as it is.

    Args:
        folder: where the best model belongs.
        checkpoint: that the run continues from, RUN/checkpoints/step_N.
        state: as loaded from it.
        accelerator: carries the ranks.

    Raises:
        RuntimeError: the model could not be copied (on every rank).
    """
    error: Exception | None = None
    if accelerator.is_main_process:
        source = checkpoint.absolute().parent.parent / folder.name
        try:
            put_back(folder)
            if not folder.exists() and state.best_step is not None and _is_of(source, state):
                temporary = _tidied(folder)
                shutil.copytree(source, temporary, ignore=shutil.ignore_patterns("manifest.json"))
                commit(temporary, folder)
        except OSError as caught:
            error = RuntimeError(
                f"the best model could not be copied from {source} to {folder}: {caught}. Free some space and run the "
                "same command again to continue"
            )
    agree(error, accelerator, f"copying to {folder}")


def _is_of(best: Path, state: TrainState) -> bool:
    if not best.is_dir() or damage(best) is not None:
        return False
    record = json.loads((best / "best.json").read_text())
    return (record["step"], record["value"]) == (state.best_step, state.best_value)


def _tidied(folder: Path) -> Path:
    """Return the name to write a folder under before it is renamed, without what a killed run left there."""
    temporary = folder.with_name(f".tmp_{folder.name}")
    for leftover in (temporary, folder.with_name(f".trash_{folder.name}")):
        if leftover.exists():
            shutil.rmtree(leftover)
    return temporary
