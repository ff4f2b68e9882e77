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


@pytest.mark.parametrize("zero", ["head only", "linear probe"])
def test_partial_says_what_no_block_is(figures, tmp_path, zero):
    charts.draw_partial({"ours": [(0, 0.3, None), (1, 0.5, None)]}, tmp_path / "p.png", zero=zero)
    assert f"0: {zero}" in figures[0].axes[0].get_xlabel()


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


def points(*values, sd=0.01):
    return [
        {"step": 10 * i, "epoch": i / 2, "mean": v, "sd": sd, "min": v - 0.02, "max": v + 0.03}
        for i, v in enumerate(values)
    ]


def test_a_band_shows_mean_deviation_and_range_by_epoch(figures, tmp_path):
    charts.draw_band({"all": points(0.1, 0.5, 0.6)}, tmp_path / "b.png", "top1")
    ax = figures[0].axes[0]
    assert ax.lines[0].get_xdata().tolist() == [0, 0.5, 1]
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([10, 50, 60])
    whole, inner = (area.get_paths()[0].get_extents() for area in ax.collections)
    assert (whole.ymin, whole.ymax) == pytest.approx((8, 63))
    assert (inner.ymin, inner.ymax) == pytest.approx((9, 61))
    charts.draw_band({"a": points(0.1, 0.2, sd=None), "b_c": points(0.3, 0.4)}, tmp_path / "b.png", "top1")
    assert [t.get_text() for t in figures[1].axes[0].get_legend().get_texts()] == ["a", "b c"]


@pytest.mark.parametrize(
    ("values", "places", "scale", "ticks"),
    [
        (["0", "0.02", "0.1"], [0, 0.02, 0.1], "linear", ["0", "0.02", "0.1"]),
        (["0.01", "0.0001"], [0.0001, 0.01], "log", ["0.01", "0.0001"]),
        (["none", "rand-m9", "15 25"], [0, 1, 2], "linear", ["none", "rand-m9", "15 25"]),
    ],
)
def test_values_lie_on_their_own_scale(figures, tmp_path, values, places, scale, ticks):
    runs = {value: [0.5, 0.6] for value in values}
    charts.draw_over(runs, tmp_path / "o.png", field="augment.label_smoothing", name="top1")
    ax = figures[0].axes[0]
    assert ax.get_xscale() == scale
    assert ax.containers[0].lines[0].get_xdata().tolist() == places
    assert [t.get_text() for t in ax.get_xticklabels()] == ticks
    assert not overlaps(ax.get_xticklabels(), figures[0])
    assert ax.containers[0].lines[0].get_ydata().tolist() == pytest.approx([55] * len(values))
    assert ax.get_xlabel() == "augment.label_smoothing"


def test_variants_are_bars_with_their_runs(figures, tmp_path):
    charts.draw_variants({"a_b": [0.4, 0.5], "one run": [0.3]}, tmp_path / "v.png", title="Birds", name="top1")
    ax = figures[0].axes[0]
    assert [p.get_width() for p in ax.patches] == [45, 30]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a b", "one run"]
    assert words(figures[0]) == ["  45.0 \N{PLUS-MINUS SIGN} 7.1", "  30.0"]


@pytest.mark.parametrize("falling", [False, True])
def test_a_search_marks_its_suggestion_and_leaves_the_divergence_out_of_the_scale(figures, tmp_path, falling):
    rows = [{"lr": 10.0 ** (i - 5), "loss": v, "smoothed": v} for i, v in enumerate([4, 3.9, 3, 2.5, 9, 900])]
    rows = rows[::-1] if falling else rows
    charts.draw_lr_find(rows, tmp_path / "l.png", suggestion=None if falling else 1e-3, used=5, title="x")
    ax = figures[0].axes[0]
    assert ax.get_xscale() == "log"
    assert (ax.get_xlim()[0] > ax.get_xlim()[1]) == falling
    if not falling:
        assert ax.get_ylim()[1] < 6
        assert "steepest descent: 0.001" in [t.get_text() for t in ax.get_legend().get_texts()]


def test_resolutions_ring_the_train_size(figures, tmp_path):
    lines = {"a1": [(224, 0.8), (160, 0.7)], "a3": [(160, 0.76), (224, 0.78)]}
    charts.draw_resolution(lines, tmp_path / "r.png", trained={"a1": 224, "a3": 160}, name="top1")
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figures[0].axes[0].lines[:4]]
    assert drawn == [([160, 224], [70, 80]), ([224], [80]), ([160, 224], [76, 78]), ([160], [76])]


def test_learning_has_loss_and_accuracy_of_each_run(figures, tmp_path):
    rows = [{"epoch": 0.5, "loss": 2.0}, {"epoch": 1.0, "loss": 1.0}, {"epoch": 1.0, "top1": 0.5}, {"epoch": 2.0}]
    charts.draw_learning({"a": rows, "b": rows[:2]}, tmp_path / "l.png")
    left, right = figures[0].axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[2, 1], [2, 1]]
    assert [list(line.get_ydata()) for line in right.lines] == [[50], []]
