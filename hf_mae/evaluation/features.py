"""How good are the features? Nearest neighbours, a logistic probe, and the effective rank.

All are made from one pass over fixed images with the centre crop: what the task's `features` gives (in pretraining the
mean of the patch tokens, nothing masked; in classification what the head reads).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

QUERIES = 512
"""Features that one matrix product of the search for neighbours looks up."""
BANK = 2**17
"""Features that it looks among: 256 MB of similarities."""
MAX_LOGISTIC = 5_000_000_000
"""Training examples * features * classes up to which logistic regression is fitted: 50,000 images of 1,000 features and
100 classes."""


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


@torch.no_grad()
def split_features(
    task: nn.Module, batches: Iterable[dict[str, Tensor]], accelerator: Accelerator
) -> tuple[Tensor, Tensor, Tensor]:
    """Encode a whole split once, every rank its own rows. A collective: call it on all ranks.

    Args:
        task: the prepared task; its `features` method is used.
        batches: this rank's batches, as many on every rank: `pixel_values` (uint8 [n, C, H, W]), `labels` and `rows`
            (int64 [n]). n may be 0.
        accelerator: carries device, precision and ranks.

    Returns:
        Features (float32 [N, D]), labels (int64 [N]) and row numbers (int64 [N]) of all ranks' examples, in the order
        of the rows, on the CPU of every rank: 4 * N * D bytes there.
    """
    inner, device, found = accelerator.unwrap_model(task), accelerator.device, []
    for batch in batches:
        with accelerator.autocast():
            features = inner.features(batch["pixel_values"].to(device)).float()
        parts: Any = [features, batch["labels"].to(device), batch["rows"].to(device)]
        if accelerator.num_processes > 1:  # ranks may hold fewer rows: filled up with row -1, left out again below
            padded: Any = [accelerator.pad_across_processes(part, pad_index=-1) for part in parts]
            parts = [accelerator.gather(part) for part in padded]
        known = parts[2] >= 0
        found.append([part[known].cpu() for part in parts])
    features, labels, rows = (torch.cat(column) for column in zip(*found, strict=True))
    order = rows.argsort()
    return features[order], labels[order], rows[order]


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Return the top-1 accuracy of k-nearest-neighbour voting by cosine similarity.

    Args:
        train: [N, D] features of the bank.
        train_labels: [N] class indices.
        test: [M, D] features to classify.
        test_labels: [M] class indices.
        k: neighbours that vote (fewer if the bank is smaller).
        temperature: a vote weighs exp(similarity / temperature). None is a plain majority: every vote weighs the same,
            and of classes with as many votes the one with the larger sum of similarities wins.

    Returns:
        Fraction of `test` classified correctly.
        Source: Wu et al. 2018, section 3.4, with the settings of Caron et al. 2021 (DINO).

    Raises:
        ValueError: there is no example to vote, or none to classify.
    """
    return knn_accuracies(train, train_labels, test, test_labels, k=k, temperatures=(temperature,))[0]


def knn_accuracies(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperatures: Sequence[float | None] = (0.07, None),
    accelerator: Accelerator | None = None,
) -> list[float]:
    """Return what `knn_accuracy` does for several temperatures, from one search for the neighbours.

    The search runs on the accelerator's device, blocks of the bank against blocks of queries, so that the device holds
    `BANK` features and `QUERIES` * `BANK` similarities at a time whatever N and M are. Ranks share the queries and the
    counts of right answers are added up: the result is the same for any number of them.

    Args:
        train: as of `knn_accuracy`, the same on every rank; likewise the next three.
        train_labels: see there.
        test: see there.
        test_labels: see there.
        k: see there.
        temperatures: of each vote.
        accelerator: carries device and ranks; the call is then a collective. None is this process alone, on the CPU.

    Raises:
        ValueError: there is no example to vote, or none to classify.
    """
    _check_examples(train, test)
    device = torch.device("cpu") if accelerator is None else accelerator.device
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    queries = F.normalize(test, dim=1).split(QUERIES)[rank::world]
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = torch.zeros(len(temperatures), dtype=torch.int64)
    found = zip(_nearest(train, queries, k, device), test_labels.split(QUERIES)[rank::world], strict=True)
    for (similarity, neighbours), labels in found:
        for i, temperature in enumerate(temperatures):
            right[i] += (_vote(similarity, train_labels[neighbours], classes, temperature) == labels).sum()
    if accelerator is not None:
        total: Any = accelerator.reduce(right.to(device), reduction="sum")
        right = total.cpu()
    return [count / len(test_labels) for count in right.tolist()]


def _nearest(bank: Tensor, queries: Sequence[Tensor], k: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the `k` most similar rows of the bank [N, D] for each block of unit queries [n, D]: on the CPU.

    Returns:
        For each block, similarities float32 [n, k], the largest first, and rows int64 [n, k].
    """
    best: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(bank), BANK):
        block = F.normalize(bank[start : start + BANK].to(device), dim=1)
        for i, rows in enumerate(queries):
            similarity, neighbours = (rows.to(device) @ block.T).topk(min(k, len(block)), dim=1)
            neighbours += start
            if start == 0:
                best.append((similarity, neighbours))
                continue
            both = [torch.cat(pair, dim=1) for pair in zip(best[i], (similarity, neighbours), strict=True)]
            similarity, places = both[0].topk(min(k, both[0].shape[1]), dim=1)
            best[i] = similarity, both[1].gather(1, places)
    return [(similarity.cpu(), neighbours.cpu()) for similarity, neighbours in best]


def _vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float | None) -> Tensor:
    """Return the class int64 [n] that wins among neighbours of these similarities and labels [n, k]."""
    # Similarities lie in [-1, 1]: k of them over 4k do not outweigh a vote. float64 keeps both.
    plain = 1 + similarity.double() / (4 * similarity.shape[1])
    # Relative to the nearest: the vote is the same, and no exponential overflows.
    weights = plain if temperature is None else ((similarity - similarity[:, :1]) / temperature).exp()
    votes = torch.zeros(len(labels), classes, dtype=weights.dtype)
    return votes.scatter_add_(1, labels, weights).argmax(1)


def _check_examples(train: Tensor, test: Tensor) -> None:
    if not len(train) or not len(test):
        raise ValueError(
            f"{len(train):,} training and {len(test):,} test examples with a label are not enough to compare; name "
            "splits whose images can be decoded and have labels"
        )


def rankme(features: Tensor) -> float:
    """Return the effective rank of features [N, D]: exp of the entropy of their normalised singular values.

    About how many directions the features use: between 1 (collapsed) and min(N, D). Higher is better, between models of
    one width on the same images. Source: Garrido et al. 2023, "RankMe", equation 1; no labels are needed.

    Raises:
        ValueError: there are no features.
    """
    if not len(features):
        raise ValueError("there are no features to take the rank of; name data whose images can be decoded")
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum() + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))


def probe_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Return the top-1 accuracy of multinomial logistic regression on standardised, frozen features.

    This is a quick probe for small data, not the paper's linear protocol; `logistic_is_too_large` says what is small.

    Args:
        train: [N, D] features.
        train_labels: [N] class indices. If they are all the same, it is predicted.
        test: [M, D] features to classify.
        test_labels: [M] class indices.

    Raises:
        ValueError: there is no example to learn from, or none to classify.
    """
    from sklearn.linear_model import LogisticRegression

    _check_examples(train, test)
    if (train_labels == train_labels[0]).all():
        return float((test_labels == train_labels[0]).double().mean())
    mean, std = train.mean(0), train.std(0) + 1e-6
    classifier = LogisticRegression(C=1.0, max_iter=1000)
    classifier.fit(((train - mean) / std).numpy(), train_labels.numpy())
    return float(np.mean(classifier.predict(((test - mean) / std).numpy()) == test_labels.numpy()))


def _probe_once(labelled: tuple[Tensor, Tensor, Tensor, Tensor], accelerator: Accelerator) -> float:
    """Return `probe_accuracy`, computed by the main process for all; what goes wrong there is raised by all."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:  # the others wait at the broadcast instead of doing the same work
        try:
            outcome = [probe_accuracy(*labelled)]
        except Exception as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def logistic_is_too_large(rows: int, features: int, classes: int) -> str | None:
    """Return a sentence if logistic regression on so many training examples would take too long; None if it would not.

    One process fits it on the CPU while the others wait: up to 1,000 iterations of rows * features * classes products.
    At `MAX_LOGISTIC` of them one core of a server needs about ten minutes at worst, and a collective waits for thirty.
    """
    if rows * features * classes <= MAX_LOGISTIC:
        return None
    return (
        f"logistic regression is left out: {rows:,} training images are more than the "
        f"{MAX_LOGISTIC // (features * classes):,} that are fitted at {features:,} features and {classes:,} classes; "
        "the linear probe (hf-mae probe) is for data of this size"
    )


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
        probe: compute the logistic probe, at the start and the end only; for small data, see `logistic_is_too_large`.
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
                votes = knn_accuracies(*labelled, temperatures=(0.07,), accelerator=self.accelerator)
                numbers["knn_accuracy"] = votes[0]
            if self.probe and step in {0, self.total}:
                numbers["probe_accuracy"] = _probe_once(labelled, self.accelerator)
        return numbers

    def finish(self, task: nn.Module, step: int) -> None:
        """Nothing is made once."""


class FrozenFeatures:
    """Evaluator: nearest neighbours and a logistic probe on the encoder's features, before the first update.

    What the encoder knows before anything is trained: the cheap protocols beside the linear probe.

    Args:
        train: features (float32 [N, D]) and labels (int64 [N]) of the training split, see `split_features`.
        test: the same of the split to classify.
        accelerator: carries the ranks.
        knn: nearest neighbours, weighted and plain.
        logistic: logistic regression on standardised features; for small data, see `logistic_is_too_large`.
        k: neighbours that vote.
        temperature: of the weighted vote.
    """

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        accelerator: Accelerator,
        *,
        knn: bool = True,
        logistic: bool = True,
        k: int = 20,
        temperature: float = 0.07,
    ):
        self.train, self.test, self.accelerator = train, test, accelerator
        self.knn, self.logistic, self.k, self.temperature = knn, logistic, k, temperature

    def due(self, step: int, total: int) -> bool:
        """Return whether to run: once, before the first update, while the encoder is as it was given."""
        return step == 0 and (self.knn or self.logistic)

    def __call__(self, task: nn.Module, step: int) -> dict[str, float]:
        """Return `knn_top1`, `knn_plain_top1` and `logistic_top1`, as far as asked for."""
        numbers: dict[str, float] = {}
        labelled = *self.train, *self.test
        if self.knn:
            temperatures = (self.temperature, None)
            votes = knn_accuracies(*labelled, k=self.k, temperatures=temperatures, accelerator=self.accelerator)
            numbers |= dict(zip(("knn_top1", "knn_plain_top1"), votes, strict=True))
        if self.logistic:
            numbers["logistic_top1"] = _probe_once(labelled, self.accelerator)
        return numbers

    def finish(self, task: nn.Module, step: int) -> None:
        """Nothing is made once."""
