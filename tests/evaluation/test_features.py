"""kNN, RankMe and the probe against hand-made and plain-reference cases."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from hf_mae.evaluation.features import FeatureQuality, extract_features, knn_accuracy, probe_accuracy, rankme


def blobs(n, seed, classes=4, dim=8, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, classes, (n,), generator=g)
    return centres[labels] + spread * torch.randn(n, dim, generator=g), labels


def test_knn_by_hand():
    # Two neighbours vote: the nearer one weighs more, so the tie of classes is broken by similarity.
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    test = torch.tensor([[1.0, 0.2], [0.2, 1.0], [-1.0, 0.1]])
    assert knn_accuracy(train, torch.tensor([0, 1, 2]), test, torch.tensor([0, 1, 2]), k=2) == 1.0
    assert knn_accuracy(train, torch.tensor([0, 1, 2]), test, torch.tensor([0, 1, 0]), k=2) == pytest.approx(2 / 3)


def test_knn_ignores_the_length_of_features():
    train, labels = blobs(100, 1)
    test, expected = blobs(50, 2)
    scaled = test * torch.logspace(-2, 2, 50)[:, None]
    assert knn_accuracy(train, labels, scaled, expected) == knn_accuracy(train, labels, test, expected)


def test_knn_with_a_hot_temperature_is_plain_majority_voting_by_cosine():
    train, labels = blobs(300, 1, spread=1.5)
    test, expected = blobs(600, 2, spread=1.5)
    plain = KNeighborsClassifier(20, metric="cosine").fit(train.numpy(), labels.numpy())
    reference = plain.score(test.numpy(), expected.numpy())
    # Votes still differ by similarity where counts tie.
    assert knn_accuracy(train, labels, test, expected, temperature=1e6) == pytest.approx(reference, abs=0.02)


def test_rankme_counts_the_directions_that_are_used():
    eye = torch.eye(6).repeat(10, 1)
    assert rankme(eye) == pytest.approx(6, rel=1e-4)
    assert rankme(eye[:, :1].expand(-1, 6) @ torch.ones(6, 6)) == pytest.approx(1, abs=1e-3)
    two = torch.cat([eye[:, :2], torch.zeros(60, 4)], 1) * torch.tensor([3.0, 1, 1, 1, 1, 1])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert rankme(two) == pytest.approx(math.exp(entropy), abs=1e-3)


def test_probe_separates_what_is_linearly_separable():
    train, labels = blobs(200, 1)
    test, expected = blobs(100, 2)
    assert probe_accuracy(train, labels, test, expected) > 0.95
    assert probe_accuracy(train, labels[torch.randperm(200)], test, expected) < 0.6


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def features(self, pixel_values):
        self.calls += 1
        return pixel_values.flatten(1).float()


def test_features_keep_the_order_of_the_images_over_batches():
    images = torch.randint(0, 256, (11, 1, 2, 2), dtype=torch.uint8)
    task = Flat()
    assert torch.equal(extract_features(task, images, Accelerator(cpu=True), batch=4), images.flatten(1).float())
    assert task.calls == 3


def test_the_evaluator_leaves_out_unlabelled_rows_and_reports_only_what_it_can():
    features, labels = blobs(60, 1)
    images = (features.clamp(-4, 4) * 30 + 128).to(torch.uint8).view(60, 2, 2, 2)
    quality = FeatureQuality((images, labels), (images, labels), Accelerator(cpu=True), every=10, probe=True)
    assert quality.due(0, 100)
    numbers = quality(Flat(), 0)
    assert set(numbers) == {"rankme", "knn_accuracy", "probe_accuracy"}
    assert "probe_accuracy" not in quality(Flat(), 10)
    partly = labels.clone()
    partly[:30] = -1
    assert (
        FeatureQuality((images, partly), (images, labels), Accelerator(cpu=True), every=10)(Flat(), 0)["knn_accuracy"]
        > 0
    )
    assert set(FeatureQuality((images, labels), None, Accelerator(cpu=True), every=10)(Flat(), 0)) == {"rankme"}
    assert [s for s in range(1, 26) if quality.due(s, 25)] == [10, 20, 25]
