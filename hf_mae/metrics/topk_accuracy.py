"""Top-k accuracy as a module of `evaluate`, which loads from this file without a network.

Unlike the modules of the Hub it keeps one place per example instead of the predictions: 1,000 scores per image are
never written to an Arrow file.
"""

from __future__ import annotations

from typing import Any

import evaluate
import torch
from datasets import Features, Sequence, Value

from hf_mae.metrics.answers import places, read_answers

DESCRIPTION = "The share of examples whose true class is among the k best guesses."
INPUTS = """
Args:
    predictions: scores (floats [n, C]), or class ids (integers: [n], or [n, m] with the best guess first).
    references: true classes, integers [n].
    k: guesses that count; of equal scores the lower class stands first.

Returns:
    {"top<k>": a fraction in [0, 1]}
"""


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy: `compute`, or `add_batch` and then `compute`, as any module of `evaluate`.

    Args:
        config_name: not used; `evaluate.load` passes it.
        k: guesses that count, unless `compute` is told otherwise.
        **options: of `evaluate.Metric`.

    `evaluate.combine` hands the options of one metric to all: those of others are passed over.
    """

    def __init__(self, config_name: str | None = None, k: int = 1, **options: Any):
        if options.get("num_process", 1) != 1:
            raise ValueError(
                f"num_process={options['num_process']}: this metric counts in one process; over ranks use "
                "hf_mae.evaluation.classification.ClassCounts"
            )
        super().__init__(config_name, **options)
        self.k = k
        self._places: list[torch.Tensor] = []
        self._depth: int | None = None  # how many guesses the examples seen have at least

    def _info(self) -> evaluate.MetricInfo:
        scores = Features({"predictions": Sequence(Value("float32")), "references": Value("int64")})
        ids = Features({"predictions": Value("int64"), "references": Value("int64")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=[scores, ids]
        )

    def __len__(self) -> int:
        return sum(map(len, self._places))

    def add_batch(self, *, predictions: Any = None, references: Any = None, **_: Any) -> None:
        """Count a batch. See `compute` for the arguments."""
        answers, truth = read_answers(predictions, references)
        if not answers.is_floating_point() and len(truth):
            width = answers.shape[1] if answers.ndim == 2 else 1
            self._depth = width if self._depth is None else min(self._depth, width)
        self._places.append(places(answers, truth))

    def add(self, *, prediction: Any = None, reference: Any = None, **_: Any) -> None:
        """Count one example."""
        self.add_batch(predictions=torch.as_tensor(prediction).unsqueeze(0), references=[reference])

    def compute(
        self, *, predictions: Any = None, references: Any = None, k: int | None = None, **_: Any
    ) -> dict[str, float]:
        """Return the accuracy of all examples since the last call, and forget them.

        Raises:
            ValueError: there is no example, or fewer than k guesses per example.
        """
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        k = self.k if k is None else k
        if len(self) == 0:
            raise ValueError("there is no example; give predictions and references")
        if k < 1 or (self._depth is not None and k > self._depth):
            raise ValueError(f"k={k} needs as many ids per example, of which there are {self._depth}; give scores")
        place, self._places, self._depth = torch.cat(self._places), [], None
        return {f"top{k}": int((place < k).sum()) / len(place)}
