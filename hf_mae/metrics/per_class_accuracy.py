"""Accuracy of each class as a module of `evaluate`, which loads from this file without a network.

It keeps two counts per class instead of the predictions.
"""

from __future__ import annotations

from typing import Any

import evaluate
import torch
from datasets import Features, Sequence, Value

from hf_mae.metrics.answers import places, read_answers

DESCRIPTION = "The accuracy of each class, and its mean over the classes that have examples."
INPUTS = """
Args:
    predictions: scores (floats [n, C]), or class ids (integers [n]).
    references: true classes, integers [n].

Returns:
    {"mean_per_class_accuracy": a fraction, "per_class_accuracy": a list with None for a class without examples}
"""


class PerClassAccuracy(evaluate.Metric):
    """Accuracy per class: `compute`, or `add_batch` and then `compute`, as any module of `evaluate`.

    Args:
        config_name: not used; `evaluate.load` passes it.
        num_classes: length of the list; None is as many as were seen among the true classes.
        **options: of `evaluate.Metric`.

    `evaluate.combine` hands the options of one metric to all: those of others are passed over.
    """

    def __init__(self, config_name: str | None = None, num_classes: int | None = None, **options: Any):
        if options.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process={options['num_process']}: this metric counts in one process; over ranks use "
                "hf_mae.evaluation.classification.ClassCounts"
            )
        super().__init__(config_name, **options)
        self.num_classes = num_classes
        self._forget()

    def _forget(self) -> None:
        empty = torch.zeros(self.num_classes or 0, dtype=torch.int64)
        self._right, self._seen = empty, empty.clone()

    def _info(self) -> evaluate.MetricInfo:
        scores = Features({"predictions": Sequence(Value("float32")), "references": Value("int64")})
        ids = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=[scores, ids]
        )

    def __len__(self) -> int:
        return int(self._seen.sum())

    def add_batch(self, *, predictions: Any = None, references: Any = None, **_: Any) -> None:
        """Count a batch. See `compute` for the arguments."""
        answers, truth = read_answers(predictions, references)
        if not len(truth):
            return
        low, high = int(truth.min()), int(truth.max())
        if low < 0 or (self.num_classes is not None and high >= self.num_classes):
            top = "..." if self.num_classes is None else self.num_classes - 1
            raise ValueError(f"references lie in {low}..{high}, outside of 0..{top}; give class ids in that range")
        size = max(high + 1, len(self._seen), answers.shape[1] if answers.is_floating_point() else 0)
        right = truth[places(answers, truth) == 0]
        self._right = _longer(self._right, size) + right.bincount(minlength=size)
        self._seen = _longer(self._seen, size) + truth.bincount(minlength=size)

    def add(self, *, prediction: Any = None, reference: Any = None, **_: Any) -> None:
        """Count one example."""
        self.add_batch(predictions=torch.as_tensor(prediction).unsqueeze(0), references=[reference])

    def compute(self, *, predictions: Any = None, references: Any = None, **_: Any) -> dict[str, Any]:
        """Return the accuracies of all examples since the last call, and forget them.

        Raises:
            ValueError: there is no example.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if len(self) == 0:
            raise ValueError("there is no example; give predictions and references")
        pairs = list(zip(self._right.tolist(), self._seen.tolist(), strict=True))
        self._forget()
        accuracy = [right / seen if seen else None for right, seen in pairs]
        known = [a for a in accuracy if a is not None]
        return {"mean_per_class_accuracy": sum(known) / len(known), "per_class_accuracy": accuracy}


def _longer(counts: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([counts, counts.new_zeros(size - len(counts))])
