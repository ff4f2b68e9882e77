"""The modules of `evaluate`: loaded from their files without a network, and against plain references."""

from __future__ import annotations

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import hf_mae.metrics
from hf_mae.metrics import PerClassAccuracy, TopKAccuracy

FILES = Path(hf_mae.metrics.__file__).parent


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def answers(n=50, classes=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=g), torch.randint(0, classes, (n,), generator=g)


@pytest.mark.parametrize("k", [1, 3, 5, 8])
@pytest.mark.parametrize("form", [lambda t: t, torch.Tensor.numpy, torch.Tensor.tolist], ids=["torch", "numpy", "list"])
def test_top_k_of_scores_equals_torch_topk(k, form):
    scores, truth = answers()
    expected = (scores.topk(k).indices == truth[:, None]).any(1).double().mean().item()
    assert TopKAccuracy(k=k).compute(predictions=form(scores), references=form(truth)) == {f"top{k}": expected}


def test_ranked_ids_give_the_accuracy_of_the_scores_they_come_from():
    scores, truth = answers()
    ids, metric = scores.topk(5).indices, TopKAccuracy()
    for k in (1, 3, 5):
        expected = metric.compute(predictions=scores, references=truth, k=k)
        assert metric.compute(predictions=ids, references=truth, k=k) == expected
    assert metric.compute(predictions=ids[:, 0], references=truth) == metric.compute(
        predictions=scores, references=truth
    )


def test_batches_and_single_examples_equal_one_call_and_are_forgotten_after():
    scores, truth = answers()
    whole = TopKAccuracy(k=2).compute(predictions=scores, references=truth)
    metric = TopKAccuracy(k=2)
    metric.add_batch(predictions=scores[:30], references=truth[:30])
    metric.add_batch(predictions=scores[:0], references=truth[:0])
    for score, label in zip(scores[30:], truth[30:], strict=True):
        metric.add(prediction=score, reference=int(label))
    assert len(metric) == 50
    assert metric.compute() == whole
    with pytest.raises(ValueError, match="no example"):
        metric.compute()


def test_per_class_accuracy_by_hand():
    metric = PerClassAccuracy(num_classes=4)
    metric.add_batch(predictions=[0, 1, 1], references=[0, 0, 1])
    metric.add_batch(predictions=np.array([2, 1]), references=np.array([1, 1]))
    assert metric.compute() == {
        "per_class_accuracy": [0.5, 2 / 3, None, None],
        "mean_per_class_accuracy": pytest.approx((0.5 + 2 / 3) / 2),
    }
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1]])
    assert PerClassAccuracy().compute(predictions=scores, references=[1, 2]) == {
        "per_class_accuracy": [None, 1.0, 0.0],
        "mean_per_class_accuracy": 0.5,
    }


def test_mean_per_class_accuracy_is_scikit_learns_balanced_accuracy():
    from sklearn.metrics import balanced_accuracy_score

    scores, truth = answers()
    found = PerClassAccuracy().compute(predictions=scores, references=truth)["mean_per_class_accuracy"]
    assert found == pytest.approx(balanced_accuracy_score(truth.numpy(), scores.argmax(1).numpy()), abs=1e-12)


def test_both_load_from_their_files_without_a_network():
    scores, truth = answers()
    top = evaluate.load(str(FILES / "topk_accuracy.py"), k=3)
    assert top.compute(predictions=scores, references=truth) == TopKAccuracy(k=3).compute(
        predictions=scores, references=truth
    )
    per_class = evaluate.load(str(FILES / "per_class_accuracy.py"))
    assert per_class.compute(predictions=scores, references=truth) == PerClassAccuracy().compute(
        predictions=scores, references=truth
    )
    both = evaluate.combine([top, per_class]).compute(predictions=scores, references=truth)
    assert set(both) == {"top3", "mean_per_class_accuracy", "per_class_accuracy"}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[0.1, 0.9]], [2], r"references lie in 2\.\.2, but the scores are of classes 0\.\.1"),
        ([[0.1, 0.9]], [-1], r"references lie in -1\.\.-1"),
        ([0.1, 0.9], [0, 1], r"predictions are torch.float32 \(2,\); give scores"),
        ([[0.1, 0.9]], [0.5], "references are torch.float32"),
        ([1, 2], [1], "2 predictions for 1 references"),
    ],
)
@pytest.mark.parametrize("metric", [TopKAccuracy, PerClassAccuracy])
def test_what_cannot_be_read_is_refused(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric().compute(predictions=predictions, references=references)


def test_more_guesses_than_there_are_ids_are_refused():
    with pytest.raises(ValueError, match="k=5 needs as many ids per example, of which there are 1"):
        TopKAccuracy(k=5).compute(predictions=[1, 2], references=[1, 2])


@pytest.mark.parametrize("metric", [TopKAccuracy, PerClassAccuracy])
def test_several_processes_are_refused(metric):
    with pytest.raises(ValueError, match="num_process=2: this metric counts in one process"):
        metric(num_process=2)


def test_a_class_outside_of_the_number_given_is_refused():
    with pytest.raises(ValueError, match=r"references lie in 0\.\.3, outside of 0\.\.2"):
        PerClassAccuracy(num_classes=3).compute(predictions=[0, 1], references=[0, 3])
