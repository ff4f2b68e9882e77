"""Pictures of a classifier show what they say: read back from the drawn figure, and from the files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch import nn

from hf_mae.evaluation import class_charts as charts
from hf_mae.evaluation.classification import ClassCounts


def results_of(labels, predicted, classes, margin=3.0):
    labels, predicted = torch.tensor(labels), torch.tensor(predicted)
    counts = ClassCounts(classes, "cpu")
    counts.add(nn.functional.one_hot(predicted, classes) * margin, labels, torch.arange(len(labels)))
    return counts.reduce(Accelerator(cpu=True))


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are saved."""
    saved, save = [], charts.save
    monkeypatch.setattr(charts, "save", lambda fig, path: (saved.append(fig), save(fig, path)))
    return saved


def words(fig):
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def overlaps(labels, fig):
    """Pairs of texts whose boxes intersect."""
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in labels if t.get_text()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]


def test_the_matrix_holds_shares_of_the_true_class(figures, tmp_path):
    results = results_of([0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 2, 2], 3)
    charts.draw_confusion(results, ["a_b", "b", "c"], tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert np.asarray(image.convert("L")).std() > 5  # not an empty page
    assert len(list(tmp_path.iterdir())) == 1
    ax = figures[0].axes[0]
    assert ax.images[0].get_array().tolist() == [[75, 25, 0], [0, 0, 100], [0, 0, 100]]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a b", "b", "c"]
    assert words(figures[0]) == ["75", "25", "100", "100"]
    assert ax.get_title() == "Confusion (top-1 66.7% of 6)"


@pytest.mark.parametrize("classes", [10, 21, 72, 100])
def test_names_of_a_matrix_do_not_overlap(figures, tmp_path, classes):
    results = results_of(list(range(classes)), list(range(classes)), classes)
    charts.draw_confusion(results, [f"American_Three_toed_Woodpecker_{i}" for i in range(classes)], tmp_path / "c.png")
    ax = figures[0].axes[0]
    assert not overlaps(ax.get_yticklabels(), figures[0])
    assert not overlaps(ax.get_xticklabels(), figures[0])


def test_of_many_classes_the_most_confused_pairs_are_drawn(figures, tmp_path):
    labels, predicted = list(range(150)) + [7, 7, 7, 9], list(range(150)) + [8, 8, 8, 3]
    charts.draw_confusion(results_of(labels, predicted, 150), [f"n{i}" for i in range(150)], tmp_path / "c.png")
    ax = figures[0].axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["n7 taken for n8", "n9 taken for n3"]
    assert [p.get_width() for p in ax.patches] == [75, 50]
    assert words(figures[0]) == [" 3 of 4", " 1 of 2"]


def test_without_a_matrix_nothing_is_drawn(tmp_path):
    charts.draw_confusion(results_of([0], [0], 2001), ["x"] * 2001, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())


def test_classes_are_sorted_by_accuracy_and_absent_ones_left_out(figures, tmp_path):
    charts.draw_per_class(results_of([0, 0, 1, 3], [0, 1, 1, 0], 4), ["a", "b", "c", "d"], tmp_path / "p.png")
    ax = figures[0].axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b (1)", "a (2)", "d (1)"]
    assert [p.get_width() for p in ax.patches] == [100, 50, 0]


def test_of_many_classes_the_ends_are_drawn_and_the_rest_is_counted(figures, tmp_path):
    charts.draw_per_class(
        results_of(list(range(150)), list(range(150)), 150), list(map(str, range(150))), tmp_path / "p.png"
    )
    labels = [t.get_text() for t in figures[0].axes[0].get_yticklabels()]
    assert len(labels) == 61
    assert labels[30] == "... 90 classes between ..."
    assert not overlaps(figures[0].axes[0].get_yticklabels(), figures[0])


def test_mistakes_carry_prediction_confidence_and_truth(figures, tmp_path):
    results = results_of([0, 1, 2, 0, 1], [0, 2, 2, 0, 0], 3, margin=6.0)
    pictures = [torch.full((3, 8, 8), 40 * m.row, dtype=torch.uint8) for m in results.worst]
    charts.draw_worst(pictures, results, ["owl", "gull", "$tern$"], tmp_path / "w.png")
    found = {ax.get_title(): int(ax.images[0].get_array()[0, 0, 0]) for ax in figures[0].axes}
    # Dollars are words, not formulas.
    assert found == {
        "predicted: " + r"\$tern\$" + " (100%)\ntrue: gull": 40,
        "predicted: owl (100%)\ntrue: gull": 160,
    }


def test_a_perfect_model_has_an_empty_page_of_mistakes(figures, tmp_path):
    charts.draw_worst([], results_of([0, 1], [0, 1], 2), ["a", "b"], tmp_path / "w.png")
    assert figures[0].get_suptitle() == "No mistakes"


def test_attention_is_laid_out_as_the_patches_lie(figures, tmp_path):
    attention = torch.arange(12.0).view(1, 2, 6)
    images = torch.zeros(1, 1, 8, 12, dtype=torch.uint8)
    charts.draw_attention(images, attention, (2, 3), tmp_path / "a.png")
    maps = [ax.images[0].get_array().tolist() for ax in figures[0].axes[1:]]
    assert maps == [[[3, 4, 5], [6, 7, 8]], [[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    with pytest.raises(ValueError, match=r"attention has 6 patches, but grid=\(2, 2\) has 4"):
        charts.draw_attention(images, attention, (2, 2), tmp_path / "a.png")


def test_reliability_bars_are_the_accuracy_of_each_bin(figures, tmp_path):
    results = results_of([0, 0, 1, 1], [0, 1, 1, 1], 2, margin=1.0)  # confidence .731, in the bin up to .7333
    charts.draw_reliability(results, tmp_path / "r.png")
    bars = figures[0].axes[0].patches
    assert [(round(b.get_x() + b.get_width(), 3), b.get_height()) for b in bars] == [(73.333, 75.0)]
    assert [p.get_height() for p in figures[0].axes[1].patches] == [100]
