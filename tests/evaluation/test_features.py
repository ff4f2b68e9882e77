"""kNN, RankMe and the probe against hand-made and plain-reference cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from hf_mae.evaluation import features
from hf_mae.evaluation.features import (
    FeatureQuality,
    FrozenFeatures,
    extract_features,
    knn_accuracies,
    knn_accuracy,
    logistic_is_too_large,
    probe_accuracy,
    rankme,
    split_features,
)


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


def test_a_low_temperature_leaves_the_nearest_alone_to_vote():
    train, labels = blobs(100, 1, spread=1.0)
    test, expected = blobs(50, 2, spread=1.0)
    assert knn_accuracy(train, labels, test, expected, temperature=1e-4) == knn_accuracy(
        train, labels, test, expected, k=1
    )


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


def test_plain_voting_is_the_majority_and_breaks_ties_by_similarity():
    train, labels = blobs(300, 1, spread=1.5)
    test, expected = blobs(400, 2, spread=1.5)
    correct = 0
    for row, truth in zip(test, expected, strict=True):
        similarity = torch.nn.functional.cosine_similarity(row[None], train).double()
        near = similarity.argsort(descending=True)[:20].tolist()
        sums = dict.fromkeys(range(4), (0, 0.0))
        for i in near:
            votes, total = sums[int(labels[i])]
            sums[int(labels[i])] = votes + 1, total + float(similarity[i])
        correct += max(sums, key=lambda c: sums[c]) == truth
    assert knn_accuracy(train, labels, test, expected, temperature=None) == correct / 400


def test_plain_voting_differs_from_weighted_where_the_nearest_is_outvoted():
    train = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.5, 1.1]])
    labels, test, expected = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, test, expected, k=3) == 1
    assert knn_accuracy(train, labels, test, expected, k=3, temperature=None) == 0


def test_neighbours_are_found_block_by_block_as_all_at_once(monkeypatch):
    """The bank of ImageNet does not fit beside its similarities; votes are the same whatever the blocks."""
    train, labels = blobs(300, 1, spread=1.5)
    test, expected = blobs(130, 2, spread=1.5)
    whole = [knn_accuracy(train, labels, test, expected, temperature=t) for t in (0.07, None, 1e-3)]
    exact = F.normalize(test, dim=1).double() @ F.normalize(train, dim=1).double().T
    nearest = exact.sort(dim=1, descending=True).values[:, :20]
    for queries, bank in ((512, 2**17), (64, 128), (7, 13), (130, 299), (1, 300)):
        monkeypatch.setattr(features, "QUERIES", queries)
        monkeypatch.setattr(features, "BANK", bank)
        assert knn_accuracies(train, labels, test, expected, temperatures=(0.07, None, 1e-3)) == whole
        ((similarity, rows),) = features._nearest(train, [F.normalize(test, dim=1)], 20, torch.device("cpu"))
        torch.testing.assert_close(similarity.double(), nearest, atol=1e-6, rtol=0)
        torch.testing.assert_close(exact.gather(1, rows), nearest, atol=1e-6, rtol=0)
        assert all(len(set(row)) == 20 for row in rows.tolist())


class Shared:
    """An accelerator of one of several processes, whose sums over ranks are taken by the test."""

    device, is_main_process = torch.device("cpu"), True

    def __init__(self, rank, world, sums):
        self.process_index, self.num_processes, self.sums = rank, world, sums

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.sums.append(tensor)
        return torch.stack(self.sums).sum(0)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_rank_searches_for_its_own_queries_alone(monkeypatch, world):
    monkeypatch.setattr(features, "QUERIES", 8)
    train, labels = blobs(100, 1, spread=1.5)
    test, expected = blobs(50, 2, spread=1.5)  # seven blocks
    asked, search = [], features._nearest

    def count(bank, queries, k, device):
        asked.append(sum(len(block) for block in queries))
        return search(bank, queries, k, device)

    monkeypatch.setattr(features, "_nearest", count)
    sums = []
    for rank in range(world):
        found = knn_accuracies(train, labels, test, expected, accelerator=Shared(rank, world, sums))
    assert sum(asked) == 50
    assert len(asked) == world
    assert max(asked) <= 8 * math.ceil(7 / world)
    assert found == knn_accuracies(train, labels, test, expected)


def test_nothing_to_compare_is_said():
    some, labels = blobs(5, 1)
    for train, test in ((some[:0], some), (some, some[:0])):
        for measure in (knn_accuracy, probe_accuracy):
            with pytest.raises(ValueError, match=r"0 (training|test).* examples"):
                measure(train, labels[: len(train)], test, labels[: len(test)])
    with pytest.raises(ValueError, match="no features"):
        rankme(some[:0])
    assert extract_features(Flat(), torch.zeros(0, 1, 2, 2, dtype=torch.uint8), Accelerator(cpu=True)).shape == (0, 4)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_probe_that_saw_one_class_predicts_it(rows):
    some, _ = blobs(rows, 1)
    expected = torch.tensor([3, 0, 3, 3])
    assert probe_accuracy(some, torch.full((rows,), 3), blobs(4, 2)[0], expected) == 0.75
    evaluator = FrozenFeatures((some, torch.full((rows,), 3)), (blobs(4, 2)[0], expected), Accelerator(cpu=True))
    assert evaluator(Flat(), 0) == {"knn_top1": 0.75, "knn_plain_top1": 0.75, "logistic_top1": 0.75}


def test_logistic_regression_has_a_limit_that_is_said():
    assert logistic_is_too_large(1437, 384, 10) is None
    assert logistic_is_too_large(50_000, 1000, 100) is None
    said = logistic_is_too_large(1_281_167, 768, 1000)
    assert "1,281,167" in said
    assert "6,510" in said
    assert logistic_is_too_large(6_510, 768, 1000) is None
    assert logistic_is_too_large(6_511, 768, 1000)


def as_batches(features, labels, order, size=16):
    """Rows in the order given, as a loader over ranks would mix them; the last batch is empty."""
    parts = [*torch.tensor(order).split(size), torch.tensor([], dtype=torch.int64)]
    return [{"pixel_values": features[p].view(-1, 2, 2, 2), "labels": labels[p], "rows": p} for p in parts]


def test_split_features_come_in_the_order_of_the_rows():
    features, labels = blobs(60, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tolist()
    got = split_features(Flat(), as_batches(features, labels, order), Accelerator(cpu=True))
    assert torch.equal(got[0], features)
    assert torch.equal(got[1], labels)
    assert got[2].tolist() == list(range(60))


def test_frozen_features_are_measured_once_before_the_first_update():
    train, labels = blobs(80, 1, spread=1.0)
    test, expected = blobs(40, 2, spread=1.0)
    evaluator = FrozenFeatures((train, labels), (test, expected), Accelerator(cpu=True))
    assert [step for step in range(11) if evaluator.due(step, 10)] == [0]
    assert evaluator(Flat(), 0) == {
        "knn_top1": knn_accuracy(train, labels, test, expected),
        "knn_plain_top1": knn_accuracy(train, labels, test, expected, temperature=None),
        "logistic_top1": probe_accuracy(train, labels, test, expected),
    }
    assert not FrozenFeatures((train, labels), (test, expected), Accelerator(cpu=True), knn=False, logistic=False).due(
        0, 10
    )
