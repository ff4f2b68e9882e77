"""Pictures show what they say: read back from the drawn figure, and from the files."""

from __future__ import annotations

import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_mae.evaluation import charts


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


def test_partial_lines_share_the_blocks_of_all(figures, tmp_path):
    lines = {"ours": [(1, 0.5, 0.02), (0, 0.3, 0.01), (math.inf, 0.6, None)]}
    charts.draw_partial(lines, tmp_path / "p.png", depth=1, reference={"paper": [(0, 0.735), (0.5, 0.791)]})
    ax = figures[0].axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "0.5", "1 (all)", "all"]
    ours = ax.containers[0].lines[0]
    assert ours.get_xdata().tolist() == [0, 2, 3]
    assert ours.get_ydata().tolist() == pytest.approx([30, 50, 60])


def test_seeds_tell_mean_deviation_and_range(figures, tmp_path):
    charts.draw_seeds([0.80, 0.82, 0.84], tmp_path / "s.png", "top1")
    assert figures[0].axes[0].get_title() == "top1 over 3 seeds: 82.00 \N{PLUS-MINUS SIGN} 2.00, min 80.00, max 84.00"
    assert sum(p.get_height() for p in figures[0].axes[0].patches) == 3
    charts.draw_seeds([0.5], tmp_path / "s.png", "top1")  # one run has no deviation, and no range to divide


def test_protocols_have_a_panel_per_data_set_and_no_deviation_for_one_run(figures, tmp_path):
    rows = [
        {"data": "birds", "protocol": "scratch", "mean": 0.3, "sd": 0.01, "values": [0.0] * 3},
        {"data": "cifar10", "protocol": "kNN", "mean": 0.6, "sd": None, "values": [0.0] * 1},
        {"data": "birds", "protocol": "kNN", "mean": 0.4, "sd": None, "values": [0.0] * 1},
    ]
    charts.draw_protocols(rows, tmp_path / "p.png")
    birds, cifar = figures[0].axes
    assert [t.get_text() for t in birds.get_yticklabels()] == ["scratch", "kNN"]
    assert [p.get_width() for p in birds.patches] == [30, 40]
    assert [p.get_y() + 0.35 for p in cifar.patches] == [1]
    assert figures[0].get_suptitle() == "Mean \N{PLUS-MINUS SIGN} standard deviation over 1 to 3 runs"
    assert words(figures[0]) == ["  30.0 \N{PLUS-MINUS SIGN} 1.0", "  40.0", "  60.0"]
