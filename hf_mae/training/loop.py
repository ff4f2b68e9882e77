"""The training loop: the only one.

It knows steps, a task, batches and evaluators, and no protocol by name. Read `fit` from top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_mae.recipes.base import Recipe
from hf_mae.training.checkpoint import TrainState, list_checkpoints
from hf_mae.training.distributed import accumulate, full, gather_objects
from hf_mae.training.monitors import Clock, Monitor, Window
from hf_mae.training.optim import MovingAverage
from hf_mae.training.schedules import Plan, due
from hf_mae.training.signals import StopSignal
from hf_mae.training.statistics import RunningStatistics


class Batch(Protocol):
    """This rank's part of a global batch."""

    cursor: int
    bad: Any
    """Samples that were replaced, each with `batch` and `position`."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, each with the rank's samples along the first dimension."""
        ...


class Batches(Protocol):
    """An endless stream of batches that counts the seconds it kept the loop waiting."""

    seconds_waiting: float

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's batches in order."""
        ...

    def count_bad(self, samples: Any) -> None:
        """Take note of samples that could not be read on any rank; raise when they are too many."""
        ...


class Evaluator(Protocol):
    """Makes numbers (or pictures) from the task. A collective: it is called on all ranks."""

    def due(self, step: int, total: int) -> bool:
        """Return whether to run after update `step`; 0 is before the first."""
        ...

    def __call__(self, task: nn.Module, step: int) -> dict[str, float]:
        """Return named numbers for metrics.jsonl."""
        ...

    def finish(self, task: nn.Module, step: int) -> None:
        """Write what is made once: the run has ended after `step` updates, by itself or early, and is saved."""
        ...


def fit(
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    *,
    recipe: Recipe,
    plan: Plan,
    micro_batch: int,
    accelerator: Accelerator,
    state: TrainState,
    window: Window,
    monitor: Monitor,
    stop: StopSignal,
    save: Callable[[TrainState, Window], Path],
    evaluators: Sequence[Evaluator] = (),
    average: MovingAverage | None = None,
    judge: Callable[[Mapping[str, float], TrainState], bool] | None = None,
) -> Literal["finished", "stopped", "early"]:
    """Train until `plan.total_steps` updates are done, a signal asks to stop, or the judge does.

    Args:
        task: prepared by Accelerate; returns `{"loss": mean over the micro-batch, ...}`.
        optimizer: prepared by Accelerate together with the task.
        batches: this rank's share of each global batch, starting at `state.step`.
        recipe: decides only when to log, evaluate and save, and the gradient clipping.
        plan: number of updates, and the learning rate of each.
        micro_batch: samples per forward pass; divides a rank's share.
        accelerator: carries device, precision and ranks.
        state: advanced in place.
        window: sums since the last logged row.
        monitor: receives rows.
        stop: tells when a signal has reached any rank.
        save: writes a checkpoint and returns its folder. A collective.
        evaluators: measured every so often, in this order. One may fail in the end: before the last evaluation the run
            is saved, owing it, and after it again; `finish` is called after that.
        average: updated after every step.
        judge: is shown the numbers of every evaluation, keeps what it likes, and says whether to stop. A collective.

    Returns:
        "finished"; "stopped" when a signal ended the run, or "early" when the judge did: a checkpoint was written.

    Raises:
        FloatingPointError: the loss was not finite; nothing was saved after it.
    """
    per_rank = recipe.global_batch // accelerator.num_processes
    accumulation = per_rank // micro_batch
    clock, waited, pending = Clock(), batches.seconds_waiting, []
    statistics = RunningStatistics(task)

    def as_written() -> AbstractContextManager[Any]:
        """Run blocks that were compiled for the step, but meet other shapes in evaluations, as they are written."""
        return torch.compiler.set_stance("force_eager") if recipe.engine.compile else nullcontext()

    def evaluate() -> bool:
        """Return whether the judge wants the run to end before its last update."""
        rows = {}
        for evaluator in evaluators:
            if evaluator.due(state.step, plan.total_steps):
                task.eval()
                with as_written():
                    rows |= evaluator(task, state.step)
                task.train()
        if rows:
            monitor.evaluated(_position(state, plan) | rows)
        enough = judge is not None and bool(rows) and judge(rows, state)
        return enough and state.step < plan.total_steps

    def write_checkpoint() -> None:
        monitor.sync()
        save(state, window)

    def end(outcome: Literal["finished", "early"]) -> Literal["finished", "early"]:
        """Log the window that is still open, save, and let the evaluators finish."""
        if state.step > 0 and not due(state.step, recipe.log_every, plan.total_steps):
            row = {"lr": plan.lr_at(state.step - 1), "bad_samples": state.bad_samples}
            monitor.ended(_position(state, plan) | window.means(accelerator) | row)
        write_checkpoint()
        task.eval()
        with as_written():
            for evaluator in evaluators:
                evaluator.finish(task, state.step)
        task.train()
        return outcome

    if state.stopped_early:
        return "early"
    if state.step == 0 or state.owes_evaluation:
        owed, state.owes_evaluation = state.owes_evaluation, False
        state.stopped_early = evaluate()
        if state.stopped_early:
            return end("early")
        if owed and state.step >= plan.total_steps:
            return end("finished")
    clock.lap()
    task.train()
    steps_since_log = 0
    source = iter(batches) if state.step < plan.total_steps else iter(())
    for batch in source:
        lr = plan.lr_at(state.step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

        tensors = _to_device(batch.tensors(), accelerator.device)
        for index in range(accumulation):
            # Micro-batch a takes every A-th sample, so that one process with two micro-batches computes the very sums
            # that two processes compute.
            micro = {name: tensor[index::accumulation] for name, tensor in tensors.items()}
            with accumulate(accelerator, task, last=index == accumulation - 1):
                with accelerator.autocast():
                    losses = task(micro)
                accelerator.backward(losses["loss"] / accumulation)
            statistics.collect()
            window.add(losses, state.step)
        statistics.update(accelerator)

        log_now = due(state.step + 1, recipe.log_every, plan.total_steps)
        grad_norm = None
        if recipe.optim.clip_grad is not None or log_now:
            limit = recipe.optim.clip_grad if recipe.optim.clip_grad is not None else float("inf")
            grad_norm = accelerator.clip_grad_norm_(task.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(state.step + 1)

        state.step += 1
        state.examples_seen += recipe.global_batch
        steps_since_log += 1
        pending += batch.bad
        monitor.tick()

        stopping = stop.agreed()
        save_now = due(state.step, recipe.save_every, plan.total_steps) or stopping
        evaluate_now = any(e.due(state.step, plan.total_steps) for e in evaluators)
        if log_now or save_now or evaluate_now:
            _refuse_non_finite(window, accelerator, recipe, monitor)
            samples = [sample for rank in gather_objects(pending, accelerator) for sample in rank]
            pending = []
            state.bad_samples += len(samples)
            monitor.bad(sorted(samples, key=lambda s: (s["batch"], s["position"])))
            batches.count_bad(samples)
        if log_now:
            seconds, waited_now = clock.lap(), batches.seconds_waiting
            row = _position(state, plan) | window.means(accelerator)
            assert grad_norm is not None
            row |= {"lr": lr, "grad_norm": float(full(grad_norm)), "bad_samples": state.bad_samples}
            row["images_per_second"] = round(steps_since_log * recipe.global_batch / seconds, 2)
            row["seconds_waiting_for_data"] = round(waited_now - waited, 4)
            row["waiting_share"] = round((waited_now - waited) / seconds, 4)
            waited, steps_since_log = waited_now, 0
            monitor.log(row)
        pause = Clock()
        last = state.step >= plan.total_steps
        if last and evaluate_now:  # if it fails, that must not take the training with it
            state.owes_evaluation = True
            write_checkpoint()
        # When asked to stop there may be little time: save at once, and evaluate after the next start.
        state.owes_evaluation = stopping and not last
        if not state.owes_evaluation:
            state.stopped_early = evaluate()
        if last:
            return end("finished")
        if state.stopped_early:
            return end("early")
        if save_now:
            write_checkpoint()
        if stopping:
            return "stopped"
        clock.skip(pause.lap())  # evaluating and saving are not training time
    return "finished"


def _position(state: TrainState, plan: Plan) -> dict[str, Any]:
    return {
        "step": state.step,
        "epoch": round(state.step / plan.steps_per_epoch, 4),
        "examples_seen": state.examples_seen,
    }


def _to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    is_cuda = device.type == "cuda"
    if is_cuda:  # only a copy from pinned memory returns before it is done
        tensors = {name: t if t.is_pinned() else t.pin_memory() for name, t in tensors.items()}
    # Elsewhere (MPS) a copy that is not waited for may read memory that is already used for something else.
    return {name: tensor.to(device, non_blocking=is_cuda) for name, tensor in tensors.items()}


def _refuse_non_finite(window: Window, accelerator: Accelerator, recipe: Recipe, monitor: Monitor) -> None:
    step = window.non_finite_step(accelerator)
    if step is None:
        return
    monitor.sync()
    first, last = step * recipe.global_batch, (step + 1) * recipe.global_batch - 1
    whole: Iterable[Path] = list_checkpoints(monitor.folder / "checkpoints")[-1:]
    raise FloatingPointError(
        f"the loss of update {step + 1} (samples {first} to {last} of the stream) is not finite; nothing was saved "
        f"after it. Last good checkpoint: {next(iter(whole), 'none')}. Continue from it with a lower "
        "--optim.base-lr, with --optim.clip-grad 1.0, or with --engine.precision bf16 or no"
    )
