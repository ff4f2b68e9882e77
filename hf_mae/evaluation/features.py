"""How good are the features? Nearest neighbours, a logistic probe, and the effective rank.

All are made from one pass over fixed images with the centre crop: mean of the patch tokens, nothing masked.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn


@torch.no_grad()
def extract_features(task: nn.Module, images: Tensor, accelerator: Accelerator, *, batch: int = 256) -> Tensor:
    """Return the features of images, computed once each and shared over ranks. A collective: call it on all ranks.

    Args:
        task: the prepared task; its `features` method is used.
        images: uint8 [N, C, H, W], the same on every rank.
        accelerator: carries device and ranks.
        batch: images per forward pass.

    Returns:
        float32 [N, D] on the CPU, in the order of `images`.
    """
    inner = accelerator.unwrap_model(task)
    rank, world = accelerator.process_index, accelerator.num_processes
    share = -(-len(images) // world)  # the last ranks repeat the last image; it is cut off again below
    rows = torch.arange(rank * share, (rank + 1) * share).clamp(max=len(images) - 1)
    parts = []
    for chunk in rows.split(batch):
        with accelerator.autocast():
            parts.append(inner.features(images[chunk].to(accelerator.device)).float())
    return accelerator.gather(torch.cat(parts))[: len(images)].cpu()  # type: ignore[union-attr]


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20, temperature: float = 0.07
) -> float:
    """Return the top-1 accuracy of weighted k-nearest-neighbour voting by cosine similarity.

    Args:
        train: [N, D] features of the bank.
        train_labels: [N] class indices.
        test: [M, D] features to classify.
        test_labels: [M] class indices.
        k: neighbours that vote (fewer if the bank is smaller).
        temperature: a vote weighs exp(similarity / temperature).

    Returns:
        Fraction of `test` classified correctly.
        Source: Wu et al. 2018, section 3.4, with the settings of Caron et al. 2021 (DINO).
    """
    bank, k = F.normalize(train, dim=1), min(k, len(train))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    correct = 0
    for rows, labels in zip(F.normalize(test, dim=1).split(512), test_labels.split(512), strict=True):
        similarity, neighbours = (rows @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(rows), classes)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(test_labels)


def rankme(features: Tensor) -> float:
    """Return the effective rank of features [N, D]: exp of the entropy of their normalised singular values.

    Between 1 (collapsed) and min(N, D). Source: Garrido et al. 2023, "RankMe", equation 1; no labels are needed.
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the top-1 accuracy of multinomial logistic regression on standardised, frozen features.

    This is a quick probe for small data, not the paper's linear protocol.
    """
    from sklearn.linear_model import LogisticRegression

    mean, std = train.mean(0), train.std(0) + 1e-6
    classifier = LogisticRegression(C=1.0, max_iter=1000)
    classifier.fit(((train - mean) / std).numpy(), train_labels.numpy())
    return float(np.mean(classifier.predict(((test - mean) / std).numpy()) == test_labels.numpy()))


class FeatureQuality:
    """Evaluator: kNN, logistic probe and RankMe of the encoder.

    Args:
        train: images (uint8 [N, C, H, W]) and labels ([N], all -1 when there are none) of the training split.
        test: the same of the split to classify, or None.
        accelerator: carries device and ranks.
        every: updates between evaluations.
        at_start: also measure the untrained encoder.
        knn: compute the kNN accuracy (needs labels and a test split).
        rank: compute RankMe.
        probe: compute the logistic probe, at the start and the end only.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor] | None,
        accelerator: Accelerator,
        *,
        every: int,
        at_start: bool = True,
        knn: bool = True,
        rank: bool = True,
        probe: bool = False,
    ):
        self.train, self.test, self.accelerator = train, test, accelerator
        self.every, self.at_start, self.knn, self.rank, self.probe = every, at_start, knn, rank, probe
        self.total = 0

    def due(self, step: int, total: int) -> bool:
        """Return whether to run after update `step`."""
        self.total = total
        return self.at_start if step == 0 else step == total or (self.every > 0 and step % self.every == 0)

    def __call__(self, task: nn.Module, step: int) -> dict[str, float]:
        """Return `knn_accuracy`, `probe_accuracy` and `rankme`, as far as asked for and possible."""
        bank = extract_features(task, self.train[0], self.accelerator)
        numbers: dict[str, float] = {}
        if self.rank:
            numbers["rankme"] = rankme(bank)
        if self.test is not None and (self.knn or self.probe):
            test = extract_features(task, self.test[0], self.accelerator)
            known = self.train[1] >= 0
            labelled = bank[known], self.train[1][known], test[self.test[1] >= 0], self.test[1][self.test[1] >= 0]
            if self.knn:
                numbers["knn_accuracy"] = knn_accuracy(*labelled)
            if self.probe and step in {0, self.total}:
                numbers["probe_accuracy"] = probe_accuracy(*labelled)
        return numbers
