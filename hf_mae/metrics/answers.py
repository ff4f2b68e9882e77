"""What a metric is given, read once: predictions as scores or class ids, and the true classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_mae.evaluation.classification import place_of


def read_answers(predictions: Any, references: Any) -> tuple[Tensor, Tensor]:
    """Return predictions and true classes as tensors on the CPU.

    Args:
        predictions: tensor, array or nested list. Floats are scores [n, C]; integers are class ids, [n], or [n, m] with
            the best guess first.
        references: true classes [n].

    Raises:
        ValueError: the shapes or types are none of these, or the lengths differ.
    """
    answers, truth = torch.as_tensor(predictions).cpu(), torch.as_tensor(references).cpu()
    if truth.ndim != 1 or (truth.is_floating_point() and len(truth)):
        raise ValueError(f"references are {truth.dtype} {tuple(truth.shape)}; give class ids, integers of shape [n]")
    if answers.ndim not in (1, 2) or (answers.ndim == 1 and answers.is_floating_point() and len(answers)):
        raise ValueError(
            f"predictions are {answers.dtype} {tuple(answers.shape)}; give scores (floats [n, C]) or class ids "
            "(integers [n], or [n, m] with the best first)"
        )
    if len(answers) != len(truth):
        raise ValueError(f"there are {len(answers)} predictions for {len(truth)} references; give one each")
    if answers.is_floating_point() and answers.ndim == 2 and len(truth):
        low, high = int(truth.min()), int(truth.max())
        if low < 0 or high >= answers.shape[1]:
            raise ValueError(
                f"references lie in {low}..{high}, but the scores are of classes 0..{answers.shape[1] - 1}; give the "
                "scores of all classes"
            )
    return answers, truth.long()


def places(answers: Tensor, truth: Tensor) -> Tensor:
    """Return at which place the true class stands: int64 [n]; 0 is the first guess, m or more is not among m ids."""
    if not len(truth):
        return truth
    if answers.is_floating_point():
        return place_of(answers, truth)
    ranked = answers if answers.ndim == 2 else answers.unsqueeze(1)  # [n, m]
    hit = ranked == truth.unsqueeze(1)
    return torch.where(hit.any(1), hit.long().argmax(1), torch.full_like(truth, ranked.shape[1]))
