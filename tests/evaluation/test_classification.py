"""Counts of a classifier against plain references, over batches and ranks."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from hf_mae.evaluation.classification import (
    ClassCounts,
    ClassificationQuality,
    evaluate_real,
    place_of,
    right_in_sets,
)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def answers(n=101, classes=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=g)
    return torch.randn(n, classes, generator=g) * 2 + 2 * F.one_hot(labels, classes), labels, torch.arange(n)


def count(accelerator, logits, labels, rows, batch=200, **options):
    counts = ClassCounts(logits.shape[1], "cpu", **options)
    for part in zip(logits.split(batch), labels.split(batch), rows.split(batch), strict=True):
        counts.add(*part)
    return counts.reduce(accelerator)


def test_counts_equal_a_plain_reference(accelerator):
    logits, labels, rows = answers()
    results = count(accelerator, logits, labels, rows)
    predicted = logits.argmax(1)
    assert results.examples == 101
    assert results.top1 == (predicted == labels).sum().item() / 101
    assert results.top5 == (logits.topk(5).indices == labels[:, None]).any(1).sum().item() / 101
    assert results.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-7)
    confusion = torch.zeros(7, 7, dtype=torch.int64)
    for t, p in zip(labels.tolist(), predicted.tolist(), strict=True):
        confusion[t, p] += 1
    assert torch.equal(results.confusion, confusion)
    assert torch.allclose(results.per_class_accuracy, confusion.diag() / confusion.sum(1).double(), rtol=0, atol=1e-15)
    wrong = [(-p.max().item(), i) for i, p in enumerate(logits.softmax(1)) if predicted[i] != labels[i]]
    assert [m.row for m in results.worst] == [i for _, i in sorted(wrong)[:16]]
    first = results.worst[0]
    assert (first.true, first.predicted) == (labels[first.row].item(), predicted[first.row].item())
    assert set(results.numbers()) == {"top1", "top5", "eval_loss", "ece"}


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_batches_make_no_difference_to_the_last_bit(accelerator, batch):
    logits, labels, rows = answers()
    assert (
        count(accelerator, logits, labels, rows, batch).to_dict() == count(accelerator, logits, labels, rows).to_dict()
    )


def test_an_empty_batch_counts_nothing(accelerator):
    logits, labels, rows = answers()
    counts = ClassCounts(7, "cpu")
    counts.add(logits[:0], labels[:0], rows[:0])
    counts.add(logits, labels, rows)
    counts.add(logits[:0], labels[:0], rows[:0])
    assert counts.reduce(accelerator).to_dict() == count(accelerator, logits, labels, rows).to_dict()


def test_two_ranks_with_unequal_shares_give_the_numbers_of_one(accelerator):
    """Stands in for the collectives: the sum of two ranks' counters and the two lists of mistakes side by side."""
    logits, labels, rows = answers()
    logits[60] = logits[2]  # equal confidence on both ranks: the lower row must win in either case
    labels[60], labels[2] = 3, 3
    a, b = ClassCounts(7, "cpu", worst=4), ClassCounts(7, "cpu", worst=4)
    a.add(logits[:30], labels[:30], rows[:30])
    b.add(logits[30:], labels[30:], rows[30:])

    class TwoRanks:
        num_processes = 2

        def reduce(self, tensor, reduction):
            assert reduction == "sum"
            parts = b.totals, b.class_examples, b.class_right, b.confusion
            return tensor + torch.cat([*parts, b.bin_examples, b.bin_right, b.bin_confidence])

        def gather(self, tensors):
            return tuple(map(torch.cat, zip(tensors, (b.worst_confidence, b.worst), strict=True)))

    assert a.reduce(TwoRanks()).to_dict() == count(accelerator, logits, labels, rows, worst=4).to_dict()


def test_calibration_error_by_hand(accelerator):
    # Ten answers of confidence 0.78, of which five are right: the distance is 0.28. Ten of 0.55, all right: 0.45.
    sure, unsure = math.log(0.78 / 0.22), math.log(0.55 / 0.45)
    logits = torch.tensor([[sure, 0.0]] * 10 + [[unsure, 0.0]] * 10)
    labels = torch.tensor([0] * 5 + [1] * 5 + [0] * 10)
    results = count(accelerator, logits, labels, torch.arange(20))
    assert results.ece == pytest.approx((0.28 + 0.45) / 2, abs=1e-6)
    used = [b for b in results.bins if b.count]
    assert [(b.count, b.accuracy) for b in used] == [(10, 1.0), (10, 0.5)]
    assert used[1].lower < 0.78 <= used[1].upper
    assert results.top5 is None
    assert "top5" not in results.numbers()


def test_confidences_of_one_and_at_a_border_fall_into_the_bin_below(accelerator):
    logits = torch.tensor([[200.0, 0.0], [0.0, 0.0]])  # confidences 1 and 0.5
    results = count(accelerator, logits, torch.tensor([0, 0]), torch.arange(2), bins=2)
    assert [b.count for b in results.bins] == [1, 1]


def test_equal_logits_are_decided_by_the_lower_class():
    logits = torch.zeros(3, 4)
    assert place_of(logits, torch.tensor([0, 1, 3])).tolist() == [0, 1, 3]


def test_absent_classes_have_no_accuracy_and_json_has_no_nan(accelerator):
    results = count(accelerator, torch.eye(4)[:2], torch.tensor([0, 0]), torch.arange(2))
    assert math.isnan(results.per_class_accuracy[3])
    written = results.to_dict()
    assert written["per_class_accuracy"] == [0.5, None, None, None]
    assert written["mean_per_class_accuracy"] == 0.5
    assert written["confusion"] == [[0, 0, 1], [0, 1, 1]]
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_many_classes_keep_accuracy_but_no_matrix(accelerator):
    logits = torch.zeros(2, 2001)
    logits[:, 5] = 1
    results = count(accelerator, logits, torch.tensor([5, 6]), torch.arange(2))
    assert results.confusion is None
    assert results.to_dict()["confusion"] is None
    assert results.per_class_accuracy[5] == 1
    assert results.per_class_accuracy[6] == 0


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda logits, labels: labels.__setitem__(3, 7), RuntimeError, r"1 of the labels .* outside of 0\.\.6"),
        (lambda logits, labels: labels.__setitem__(3, -1), RuntimeError, "1 of the labels"),
        (lambda logits, labels: logits.__setitem__((3, 2), math.nan), FloatingPointError, "logits of 1 examples"),
        (lambda logits, labels: logits.__setitem__((3, 2), math.inf), FloatingPointError, "logits of 1 examples"),
    ],
)
def test_what_cannot_be_counted_is_refused(accelerator, spoil, error, message):
    logits, labels, rows = answers()
    spoil(logits, labels)
    with pytest.raises(error, match=message):
        count(accelerator, logits, labels, rows)


def test_a_split_without_examples_is_refused(accelerator):
    with pytest.raises(ValueError, match="no example"):
        ClassCounts(3, "cpu").reduce(accelerator)


class Table(nn.Module):
    """A task that knows the logits of every row."""

    def __init__(self, logits):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("table", logits)

    def logits(self, batch):
        return self.table[batch["pixel_values"][:, 0, 0, 0].long()] * self.scale

    def features(self, pixel_values):
        return self.table[pixel_values[:, 0, 0, 0].long()]


def batches(labels, size=30):
    rows = torch.arange(len(labels))
    pixels = rows.to(torch.uint8).view(-1, 1, 1, 1)
    return [
        {"pixel_values": pixels[i : i + size], "labels": labels[i : i + size], "rows": rows[i : i + size]}
        for i in range(0, len(rows) + 1, size)
    ]


class Negated:
    """An average whose weights are the negative of the task's."""

    def __init__(self, task):
        self.task = task

    @contextmanager
    def swapped(self):
        self.task.scale.data.neg_()
        yield
        self.task.scale.data.neg_()


def test_the_evaluator_reports_weights_and_average_and_writes_the_last(accelerator, tmp_path):
    logits, labels, rows = answers()
    task, drawn = Table(logits), []
    quality = ClassificationQuality(
        batches(labels),
        list("abcdefg"),
        accelerator,
        every=10,
        average=Negated(task),
        out=tmp_path,
        draw=lambda results, inner: drawn.append((results, inner.scale.item())),
    )
    assert [s for s in range(26) if quality.due(s, 25)] == [10, 20, 25]
    numbers = quality(task, 10)
    plain, average = count(accelerator, logits, labels, rows), count(accelerator, -logits, labels, rows)
    for name, value in plain.numbers().items():
        assert numbers[name] == value
        assert numbers[f"ema_{name}"] == average.numbers()[name]
    assert numbers["eval_images_per_second"] > 0
    assert task.scale.item() == 1
    assert not list(tmp_path.iterdir())
    quality(task, 25)
    quality.finish(task, 25)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["step"] == 25
    assert written["classes"] == list("abcdefg")
    assert written["weights"] == plain.to_dict()
    assert written["ema"] == average.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]
    assert [(r.top1, scale) for r, scale in drawn] == [(plain.top1, 1.0)]  # the better of the two


def test_pictures_are_drawn_with_the_average_where_it_is_better(accelerator):
    logits, labels, _ = answers()
    task, drawn = Table(-logits), []
    quality = ClassificationQuality(
        batches(labels),
        list("abcdefg"),
        accelerator,
        every=0,
        average=Negated(task),
        draw=lambda _, inner: drawn.append(inner.scale.item()),
    )
    assert [s for s in range(26) if quality.due(s, 25)] == [25]
    quality(task, 25)
    assert drawn == []
    quality.finish(task, 25)
    assert drawn == [-1.0]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no such class"), RuntimeError("no memory")])
def test_what_cannot_be_written_or_drawn_is_a_warning(accelerator, tmp_path, error):
    def fail(results, inner):
        raise error

    logits, labels, _ = answers()
    task = Table(logits)
    quality = ClassificationQuality(
        batches(labels), list("abcdefg"), accelerator, every=0, out=tmp_path / "absent", draw=fail
    )
    quality.finish(task, 1)  # nothing was measured: nothing to write
    quality(task, 1)
    with pytest.warns(RuntimeWarning) as warned:
        quality.finish(task, 1)
    first, second = (str(w.message) for w in warned)
    assert "absent/evaluation.json was not written" in first
    assert second == f"not all pictures were drawn: {error}"


def test_only_the_classes_kept_compete_and_classes_are_matched_by_number(accelerator):
    """The data has three classes, which are 5, 1 and 2 of the model; the model's class 0 would always win."""
    logits = torch.tensor([[9, 0, 0, 0, 0, 1.0], [9, 1, 0, 0, 0, 0], [9, 1, 2, 0, 0, 0], [9, 1, 0, 0, 0, 0]])
    labels = torch.tensor([0, 1, 2, 2])
    names = ["n0", "n1", "n2", "n3", "n4", "n5"]
    quality = ClassificationQuality(batches(labels), names, accelerator, every=0, keep=[1, 2, 5], align=[5, 1, 2])
    assert quality(Table(logits), 1)["top1"] == 0.75
    assert quality.names == ["n1", "n2", "n5"]
    assert quality.latest["weights"].confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    unmasked = ClassificationQuality(batches(labels), names, accelerator, every=0, align=[5, 1, 2])
    assert unmasked(Table(logits), 1)["top1"] == 0


def test_a_label_of_a_class_that_is_not_kept_is_refused(accelerator):
    quality = ClassificationQuality(batches(torch.tensor([0, 2])), ["a", "b", "c"], accelerator, every=0, keep=[0, 1])
    with pytest.raises(RuntimeError, match="1 of the labels"):
        quality(Table(torch.eye(3)), 1)


def test_real_accuracy_accepts_any_answer_and_leaves_out_images_without():
    logits = torch.eye(4)  # predictions 0, 1, 2, 3
    assert right_in_sets(logits, [[0], [0, 1], [], [0, 1, 2]]) == (2, 3)
    assert right_in_sets(logits[:0], []) == (0, 0)


def test_real_accuracy_of_a_split_looks_answers_up_by_row(accelerator):
    task = Table(torch.eye(4).repeat(2, 1))
    sets = {0: [0], 1: [2], 2: [2, 3], 5: [1], 7: []}
    parts = batches(torch.zeros(8, dtype=torch.int64), size=3)
    assert evaluate_real(task, parts, lambda row: sets.get(row, []), accelerator) == {
        "real_top1": 0.75,
        "real_examples": 4,
    }
    with pytest.raises(ValueError, match="no image has a ReaL label"):
        evaluate_real(task, parts, lambda row: [], accelerator)
