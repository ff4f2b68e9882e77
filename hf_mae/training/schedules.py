"""Learning rate and length of a run, as pure functions: nothing to save, nothing to drift.

Sources: He et al. 2022, appendix A.1 (linear warm-up, half-cycle cosine, lr = base_lr * batch / 256); timm's
schedulers (cosine and steps that start with the run, their beginning replaced by the warm-up; one value an epoch).
The value is set once per optimizer update, as in the official code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_mae.recipes.base import Recipe, Schedule
from hf_mae.recipes.checks import warmup_epochs
from hf_mae.recipes.fields import unknown

SCHEDULES = ("cosine", "timm-cosine", "constant", "step", "exponential")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The length of a run in optimizer updates, and its learning rate at each of them."""

    total_steps: int
    steps_per_epoch: float
    warmup_steps: float
    lr: float
    """Peak learning rate per update: base_lr * global_batch / 256."""
    min_lr: float
    schedule: Schedule
    """Its name, and the numbers that only some schedules have."""
    scheduled_steps: float
    """Length the schedule is drawn for: an epoch that ends within an update makes it longer than the run."""
    scheduled_epoch: float
    """Updates of an epoch as the schedule counts them: fewer where `max_steps` squeezes it."""

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update `step` (0-based).

        With `cosine` the first update has lr exactly `warmup_lr`, 0 by default, when there is a warm-up, and the last
        one stays above `min_lr`: both as in the official schedule.
        """
        at: float = step
        if self.schedule.per_epoch:
            at = math.floor(step / self.scheduled_epoch + 1e-9) * self.scheduled_epoch
        start = self.schedule.warmup_lr
        if at < self.warmup_steps:
            return start + (self.lr - start) * at / self.warmup_steps
        if self.schedule.name == "cosine":
            return self._cosine((at - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        if self.schedule.name == "timm-cosine":
            return self._cosine(at / self.scheduled_steps)
        if self.schedule.name == "step":
            falls = math.floor(at / (self.schedule.step_epochs * self.scheduled_epoch) + 1e-9)
            return self.lr * self.schedule.gamma**falls
        if self.schedule.name == "exponential":
            return start * (self.lr / start) ** (at / max(self.total_steps - 1, 1))
        if self.schedule.name == "constant":
            return self.lr
        raise unknown("schedule.name", self.schedule.name, SCHEDULES)

    def _cosine(self, progress: float) -> float:
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_plan(recipe: Recipe, *, steps_per_epoch: float) -> Plan:
    """Turn epochs into optimizer updates: the only place where that happens.

    Args:
        recipe: `max_steps`, if given, replaces `epochs`; the warm-up then keeps its share of the run.
        steps_per_epoch: rows / global_batch when the remainder carries over, whole batches when it is dropped.

    Raises:
        ValueError: the run has no step, or the warm-up is not shorter than the run.
    """
    schedule, epochs = recipe.schedule, recipe.epochs
    if schedule.name not in SCHEDULES:  # now, and not after the warm-up
        raise unknown("schedule.name", schedule.name, SCHEDULES)
    warmup = warmup_epochs(recipe)
    # Whole global batches only: what is left of the last epoch is fewer images than one update takes.
    total = recipe.max_steps if recipe.max_steps is not None else math.floor(epochs * steps_per_epoch + 1e-9)
    if total < 1:
        raise ValueError(
            f"epochs={epochs} of {steps_per_epoch:g} updates each make no update; raise --epochs or lower "
            f"--global-batch={recipe.global_batch}"
        )
    # Without max_steps the fractional epoch counts, so that a dropped remainder does not bend the schedule.
    warmup_steps = warmup * steps_per_epoch if recipe.max_steps is None else total * warmup / epochs
    scheduled_epoch = steps_per_epoch if recipe.max_steps is None else total / epochs
    return Plan(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=min(warmup_steps, total - 1e-6),
        lr=recipe.optim.base_lr * recipe.global_batch / 256,
        min_lr=schedule.min_lr,
        schedule=schedule,
        scheduled_steps=epochs * scheduled_epoch,
        scheduled_epoch=scheduled_epoch,
    )


def due(step: int, every: int, total: int) -> bool:
    """Return whether something done `every` updates is due after update number `step` (1-based), or at the end."""
    return step == total or (every > 0 and step % every == 0)
