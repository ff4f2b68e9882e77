"""How well does a classifier do? Exact counts over a whole split, whatever the batches and ranks.

Every counter is an integer, also those of the loss and of the confidences (fixed point): integer sums do not depend on
the order of their terms, so that 1 process and 8 report the same number to the last bit, of the same logits: these may
be rounded otherwise in a batch of another size. Logits are not kept.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

MAX_CONFUSION = 2000
"""Above so many classes the confusion matrix (32 MB of counters there) is not kept."""
ONE = 2**24
"""What 1.0 is in fixed point: the resolution of a float32 in [0.5, 1)."""
MAX_LOSS = 1e6
"""A cross entropy above this is no number that a sum could be made of."""


class NoExamplesError(ValueError):
    """There was nothing to evaluate on, on any rank; raised by all of them."""


@dataclass(frozen=True)
class Mistake:
    """An example that was classified wrongly."""

    row: int
    """Number of the example in its split."""
    true: int
    predicted: int
    confidence: float
    """The model's probability of the predicted class."""


@dataclass(frozen=True)
class Bin:
    """The examples whose confidence lies in (lower, upper]."""

    lower: float
    upper: float
    count: int
    confidence: float | None
    """Their mean confidence; None without examples."""
    accuracy: float | None
    """The fraction of them that is right; None without examples."""


@dataclass(frozen=True)
class ClassResults:
    """What one pass over a labelled split says. Rates are fractions in [0, 1]."""

    examples: int
    top1: float
    top5: float | None
    """None with 5 classes or fewer, where it says nothing."""
    loss: float
    """Mean cross entropy, without label smoothing."""
    ece: float
    """Expected calibration error: mean distance of confidence and accuracy over equal-width bins, weighted by their
    examples (Guo et al. 2017, equation 3)."""
    per_class_accuracy: Tensor
    """float64 [C]; nan for a class without examples."""
    class_examples: Tensor
    """int64 [C]: examples of each true class."""
    confusion: Tensor | None
    """int64 [C, C]: rows are true, columns predicted classes; None above 2,000 classes."""
    bins: tuple[Bin, ...]
    worst: tuple[Mistake, ...]
    """The most confident mistakes, the worst first."""

    @property
    def mean_per_class_accuracy(self) -> float:
        """Mean over the classes that have examples: each class counts alike, however rare it is."""
        return float(self.per_class_accuracy.nanmean())

    def numbers(self) -> dict[str, float]:
        """Return what belongs into a row of metrics.jsonl: `top1`, `top5` (if it has a meaning), `eval_loss`, `ece`."""
        top5 = {} if self.top5 is None else {"top5": self.top5}
        return {"top1": self.top1} | top5 | {"eval_loss": self.loss, "ece": self.ece}

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and None, fit for JSON.

        `confusion` lists [true, predicted, count] of the cells that are not 0.
        """
        cells = None
        if self.confusion is not None:
            at = self.confusion.nonzero()
            cells = torch.cat([at, self.confusion[at[:, 0], at[:, 1]].unsqueeze(1)], 1).tolist()
        return {
            "examples": self.examples,
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss,
            "ece": self.ece,
            "mean_per_class_accuracy": self.mean_per_class_accuracy,
            "per_class_accuracy": [None if math.isnan(a) else a for a in self.per_class_accuracy.tolist()],
            "class_examples": self.class_examples.tolist(),
            "confusion": cells,
            "bins": [vars(b) for b in self.bins],
            "worst": [vars(m) for m in self.worst],
        }


class ClassCounts:
    """Counters of a classifier's answers, on the device; nothing is read back before `reduce`.

    Args:
        num_classes: C.
        device: where the logits are.
        bins: of the calibration, equal in width.
        worst: how many of the most confident mistakes are remembered.
    """

    def __init__(self, num_classes: int, device: torch.device | str, *, bins: int = 15, worst: int = 16):
        self.num_classes, self.bins, self.num_worst = num_classes, bins, worst
        cells = num_classes**2 if num_classes <= MAX_CONFUSION else 0

        def zeros(n: int) -> Tensor:
            return torch.zeros(n, dtype=torch.int64, device=device)

        # Seen, first of all, among the first five; labels out of range; losses that are none; the sum of the losses.
        self.totals = zeros(6)
        self.class_examples, self.class_right = zeros(num_classes), zeros(num_classes)
        self.confusion = zeros(cells)
        self.bin_examples, self.bin_right, self.bin_confidence = zeros(bins), zeros(bins), zeros(bins)
        self.worst_confidence = torch.full((worst,), -1.0, device=device)  # -1: no mistake here
        self.worst = torch.full((worst, 3), -1, dtype=torch.int64, device=device)  # row, true, predicted

    def add(self, logits: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Count a batch, which may be empty.

        Args:
            logits: [n, C].
            labels: int64 [n], in 0..C-1.
            rows: int64 [n] numbers of the examples in their split.
        """
        if len(logits) == 0:  # topk and argmax refuse nothing, but min and max of nothing are undefined
            return
        logits = logits.detach().float()
        known = (labels >= 0) & (labels < self.num_classes)
        labels = labels.clamp(0, self.num_classes - 1)
        log_p = logits.log_softmax(1)  # [n, C]
        loss = -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)  # [n]
        finite = loss <= MAX_LOSS  # False for nan
        count = (known & finite).long()
        predicted = logits.argmax(1)
        confidence = log_p.gather(1, predicted.unsqueeze(1)).squeeze(1).exp().nan_to_num()  # [n]
        place = place_of(logits, labels)
        right = (place == 0).long() * count
        parts = (
            count.sum(),
            right.sum(),
            ((place < 5).long() * count).sum(),
            (~known).sum(),
            (known & ~finite).sum(),
            (_fixed(loss.nan_to_num().clamp(max=MAX_LOSS)) * count).sum(),
        )
        self.totals += torch.stack(parts)
        self.class_examples.scatter_add_(0, labels, count)
        self.class_right.scatter_add_(0, labels, right)
        if len(self.confusion):
            self.confusion.scatter_add_(0, labels * self.num_classes + predicted, count)
        box = ((confidence * self.bins).ceil().long() - 1).clamp(0, self.bins - 1)
        self.bin_examples.scatter_add_(0, box, count)
        self.bin_right.scatter_add_(0, box, right)
        self.bin_confidence.scatter_add_(0, box, _fixed(confidence) * count)
        wrong = (count - right).bool()
        self._remember(
            torch.cat([self.worst_confidence, torch.where(wrong, confidence, torch.full_like(confidence, -1.0))]),
            torch.cat([self.worst, torch.stack([rows, labels, predicted], 1)]),
        )

    def _remember(self, confidence: Tensor, found: Tensor) -> None:
        """Keep the most confident; of equals, the first row, so that batches and ranks make no difference."""
        order = found[:, 0].argsort(stable=True)
        order = order[confidence[order].argsort(descending=True, stable=True)][: self.num_worst]
        self.worst_confidence, self.worst = confidence[order], found[order]

    def reduce(self, accelerator: Accelerator) -> ClassResults:
        """Return the results over all ranks. A collective: call it on all ranks; all get the same.

        Raises:
            NoExamplesError: there was no example.
            RuntimeError: a label was outside of 0..C-1.
            FloatingPointError: the logits of an example were not finite.
        """
        counters = [
            self.totals,
            self.class_examples,
            self.class_right,
            self.confusion,
            self.bin_examples,
            self.bin_right,
            self.bin_confidence,
        ]
        total: Any = accelerator.reduce(torch.cat(counters), reduction="sum")
        if accelerator.num_processes > 1:
            gathered: Any = accelerator.gather((self.worst_confidence, self.worst))
            self._remember(*gathered)
        totals, examples, right, confusion, *bins = total.cpu().split([len(c) for c in counters])
        n, first, five, unknown, unsound, loss = totals.tolist()
        if unknown:
            raise RuntimeError(
                f"{unknown} of the labels to evaluate on are outside of 0..{self.num_classes - 1}, the classes of the "
                "model; evaluate on data with the model's classes"
            )
        if unsound:
            raise FloatingPointError(
                f"the logits of {unsound} examples are not finite (or their loss is above {MAX_LOSS:g}); the weights "
                "have diverged: use an earlier checkpoint or a lower --optim.base-lr"
            )
        if n == 0:
            raise NoExamplesError(
                "there is no example to evaluate on: the split is empty, or none of its images can be decoded; name "
                "another (--data.split, and --evals.split in training)"
            )
        found = zip(self.worst_confidence.tolist(), self.worst.tolist(), strict=True)
        reliability = _reliability(*bins)
        return ClassResults(
            examples=n,
            top1=first / n,
            top5=five / n if self.num_classes > 5 else None,
            loss=loss / ONE / n,
            ece=sum(b.count * abs((b.accuracy or 0.0) - (b.confidence or 0.0)) for b in reliability) / n,
            per_class_accuracy=right.double() / examples,  # 0 / 0 is nan
            class_examples=examples,
            confusion=confusion.view(self.num_classes, self.num_classes) if len(confusion) else None,
            bins=reliability,
            worst=tuple(Mistake(*row, confidence=c) for c, row in found if c >= 0),
        )


def place_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes stand before the true one: int64 [n] from logits [n, C] and labels [n].

    Of equal logits the lower class stands first, as argmax decides; so place 0 means predicted.
    """
    true = logits.gather(1, labels.unsqueeze(1))  # [n, 1]
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)  # [n, C]
    return ((logits > true) | ((logits == true) & earlier)).sum(1)


def _fixed(values: Tensor) -> Tensor:
    """Float32 -> int64 in units of 1 / ONE. The product is exact, as ONE is a power of two."""
    return (values * ONE).round().long()


def _reliability(examples: Tensor, right: Tensor, confidence: Tensor) -> tuple[Bin, ...]:
    width, out = len(examples), []
    for i, (n, r, c) in enumerate(zip(examples.tolist(), right.tolist(), confidence.tolist(), strict=True)):
        means = (c / ONE / n, r / n) if n else (None, None)
        out.append(Bin(i / width, (i + 1) / width, n, *means))
    return tuple(out)


class ClassificationQuality:
    """Evaluator: top-1, top-5, loss and calibration on a labelled split, each example counted once.

    Args:
        batches: one pass gives this rank's batches, as many on every rank; each has `labels` (int64 [n]), `rows`
            (int64 [n]) and what the task's `logits` reads. n may be 0.
        names: of the model's classes, in the order of its logits.
        accelerator: carries device, precision and ranks.
        every: updates between evaluations; 0 evaluates at the end only.
        at_start: evaluate before the first update too.
        average: has `swapped()`, under which the weights are their moving average; those are evaluated as well, in a
            pass of their own.
        out: run folder; `finish` writes evaluation.json there.
        about: what evaluation.json says beside the results, such as the split, and which weights it chose.
        keep: the logits of these classes alone compete (ImageNet-A and -R have 200 of the 1,000).
        align: model class of each class of the data; None where they are the same.
        draw: called as draw(results, task) by `finish`, on all ranks, with the better of weights and average in the
            task.
    """

    def __init__(
        self,
        batches: Iterable[dict[str, Tensor]],
        names: Sequence[str],
        accelerator: Accelerator,
        *,
        every: int,
        at_start: bool = False,
        average: Any = None,
        out: Path | None = None,
        about: Mapping[str, Any] | None = None,
        keep: Sequence[int] | None = None,
        align: Sequence[int] | None = None,
        draw: Callable[[ClassResults, nn.Module], None] | None = None,
    ):
        self.batches, self.accelerator, self.every, self.at_start = batches, accelerator, every, at_start
        self.average, self.out, self.draw, self.about = average, out, draw, dict(about or {})
        device = accelerator.device
        self.keep = None if keep is None else torch.tensor(list(keep), device=device)
        self.names = list(names) if keep is None else [names[i] for i in keep]
        self.label_table = _label_table(len(names), keep, align).to(device)
        self.latest: dict[str, ClassResults] = {}
        """Results of the newest evaluation by kind of weights: `weights`, and `ema` with an average."""

    def due(self, step: int, total: int) -> bool:
        """Return whether to run after update `step`."""
        return self.at_start if step == 0 else step == total or (self.every > 0 and step % self.every == 0)

    def __call__(self, task: nn.Module, step: int) -> dict[str, float]:
        """Return the numbers of `ClassResults.numbers`, those of the average as `ema_*`, `eval_images_per_second`."""
        started = time.perf_counter()
        self.latest = {"weights": self.measure(task)}
        numbers = self.latest["weights"].numbers()
        numbers["eval_images_per_second"] = round(
            self.latest["weights"].examples / max(time.perf_counter() - started, 1e-9), 2
        )
        if self.average is not None:
            with self.average.swapped():
                self.latest["ema"] = self.measure(task)
            numbers |= {f"ema_{name}": value for name, value in self.latest["ema"].numbers().items()}
        return numbers

    @torch.no_grad()
    def measure(self, task: nn.Module) -> ClassResults:
        """Return the results of the task as it is now. A collective: call it on all ranks."""
        inner = self.accelerator.unwrap_model(task)
        device = self.accelerator.device
        counts = ClassCounts(len(self.names), device)
        for batch in self.batches:
            moved = {name: tensor.to(device, non_blocking=device.type == "cuda") for name, tensor in batch.items()}
            with self.accelerator.autocast():
                logits = inner.logits(moved)  # [n, C]
            known = (moved["labels"] >= 0) & (moved["labels"] < len(self.label_table))
            labels = self.label_table[moved["labels"].clamp(0, len(self.label_table) - 1)]
            labels = torch.where(known, labels, torch.full_like(labels, -1))
            counts.add(logits if self.keep is None else logits[:, self.keep], labels, moved["rows"])
        return counts.reduce(self.accelerator)

    @torch.no_grad()
    def finish(self, task: nn.Module, step: int) -> None:
        """Write and draw the newest results; nothing if there are none. A collective: call it on all ranks.

        Warns:
            RuntimeWarning: something could not be written or drawn: the numbers are there, and no picture ends a run.
        """
        if not self.latest:
            return
        if self.out is not None and self.accelerator.is_main_process:
            try:
                write_evaluation(self.out / "evaluation.json", self.latest, self.names, step, self.about)
            except OSError as error:
                warnings.warn(f"{self.out / 'evaluation.json'} was not written: {error}", RuntimeWarning, stacklevel=2)
        if self.draw is not None:
            best = max(self.latest, key=lambda kind: self.latest[kind].top1)  # a short run's average may lag behind
            with self.average.swapped() if best == "ema" else nullcontext():
                try:
                    self.draw(self.latest[best], self.accelerator.unwrap_model(task))
                except (OSError, ValueError, RuntimeError, MemoryError) as error:
                    warnings.warn(f"not all pictures were drawn: {error}", RuntimeWarning, stacklevel=2)


def chosen_on(metric: str, split: str) -> str:
    """Return what has to be said of the best weights where they are measured on the split that chose them."""
    return f"the best weights were chosen by {metric} on this split ({split}), so their accuracy on it is optimistic"


def write_evaluation(
    path: Path,
    results: Mapping[str, ClassResults],
    names: Sequence[str],
    step: int,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write results by kind of weights (`weights`, `ema`) as JSON, in one move, with what is said about all of them."""
    content = (
        {"step": step, "classes": list(names)} | dict(about or {}) | {kind: r.to_dict() for kind, r in results.items()}
    )
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def _label_table(num_classes: int, keep: Sequence[int] | None, align: Sequence[int] | None) -> Tensor:
    """Return the class to count for each class of the data: int64; -1 where none is kept."""
    model = torch.arange(num_classes) if align is None else torch.tensor(list(align))
    if keep is None:
        return model
    kept = torch.full((num_classes,), -1, dtype=torch.int64)
    kept[torch.tensor(list(keep))] = torch.arange(len(keep))
    return kept[model]


def right_in_sets(logits: Tensor, sets: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many predictions are in the set of right answers, and how many sets are not empty.

    Args:
        logits: [n, C].
        sets: the right classes of each example; an example with none is left out.
            Source: Beyer et al. 2020, "Are we done with ImageNet?", section 4 (ReaL accuracy).
    """
    predicted = logits.argmax(1).tolist() if len(logits) else []
    counted = [p in answers for p, answers in zip(predicted, sets, strict=True) if len(answers)]
    return sum(counted), len(counted)


@torch.no_grad()
def evaluate_real(
    task: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    answers: Callable[[int], Sequence[int]],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return the accuracy on reassessed labels. A collective: call it on all ranks.

    Args:
        task: its `logits` are used.
        batches: as of `ClassificationQuality`; the labels are not looked at.
        answers: from the number of a row to its right classes, of which there may be none.
        accelerator: carries device, precision and ranks.

    Returns:
        `real_top1`, and `real_examples`: the images that have an answer.

    Raises:
        NoExamplesError: no image has an answer.
    """
    inner, totals = accelerator.unwrap_model(task), torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        moved = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.autocast():
            logits = inner.logits(moved)
        totals += torch.tensor(right_in_sets(logits, [answers(row) for row in batch["rows"].tolist()]))
    reduced: Any = accelerator.reduce(totals.to(accelerator.device), reduction="sum")
    right, counted = reduced.tolist()
    if counted == 0:
        raise NoExamplesError("no image has a ReaL label; they belong to the 50,000 validation images of ImageNet-1k")
    return {"real_top1": right / counted, "real_examples": counted}
