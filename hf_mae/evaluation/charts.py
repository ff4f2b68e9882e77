"""Pictures of how runs compare: over seeds, settings, protocols and resolutions, and how they learn.

Drawn with matplotlib's object interface: no global figure, no window system. Colours are those of Okabe and Ito (2008)
and single-hue scales, which colour-blind readers can tell apart. Accuracies are given as fractions and shown in per
cent. Files are written in one move; the suffix of the path decides the format.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


Points = Sequence[tuple[float, float, float | None]]


def draw_partial(
    points: Mapping[str, Points],
    path: Path,
    *,
    depth: int | None = None,
    reference: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    zero: str = "head only",
) -> None:
    """Draw accuracy against the number of trained blocks, like Figure 9 of the paper.

    Args:
        points: per name of a line, (blocks, mean, standard deviation); blocks may be 0.5, and inf for all of them;
            the deviation of a single run is None.
        path: of the picture.
        depth: blocks of the encoder; so many are marked as all.
        reference: per name, (blocks, accuracy) that was published: dashed.
        zero: what the point at 0 blocks is, for the axis; the paper's is the linear probe.
    """
    published = reference or {}
    blocks = sorted({k for line in [*points.values(), *published.values()] for k, *_ in line})
    place = {k: i for i, k in enumerate(blocks)}  # equal steps, as in the paper: 0 and 0.5 stay apart
    fig = Figure(figsize=(max(4.8, 0.75 * len(blocks) + 1.4), 3.8), layout="constrained")
    ax = fig.add_subplot()
    for i, (name, line) in enumerate(points.items()):
        ordered = sorted(line, key=lambda point: point[0])
        ax.errorbar(
            [place[k] for k, _, _ in ordered],
            [100 * mean for _, mean, _ in ordered],
            yerr=[math.nan if sd is None else 100 * sd for _, _, sd in ordered],  # nan draws nothing
            color=CYCLE[i % len(CYCLE)],
            marker=MARKERS[i % len(MARKERS)],
            capsize=3,
            label=plain(name),
        )
    for i, (name, line) in enumerate(published.items()):
        ordered_reference = sorted(line)
        ax.plot(
            [place[k] for k, _ in ordered_reference],
            [100 * accuracy for _, accuracy in ordered_reference],
            color=GREY,
            linestyle=("--", ":", "-.")[i % 3],
            marker=MARKERS[i % len(MARKERS)],
            markerfacecolor="white",
            label=plain(name),
        )
    ax.set_xticks(
        range(len(blocks)), ["all" if math.isinf(k) else f"{k:g}{' (all)' if k == depth else ''}" for k in blocks]
    )
    ax.set_xlabel(f"trained blocks (0: {zero}, 0.5: MLP of the last block)")
    ax.set_ylabel("top-1 accuracy in %")
    ax.grid(axis="y", color="0.9")
    _legend(ax)
    bare(ax)
    save(fig, path)


def draw_seeds(values: Sequence[float], path: Path, name: str) -> None:
    """Draw how a number varies over seeds: histogram, each run, mean and standard deviation.

    Args:
        values: one fraction per seed.
        path: of the picture.
        name: of the number.
    """
    percent = [100 * v for v in values]
    mean, sd = statistics.fmean(percent), statistics.stdev(percent) if len(percent) > 1 else 0.0
    fig = Figure(figsize=(5.6, 3.2), layout="constrained")
    ax = fig.add_subplot()
    bins = min(max(5, round(2 * math.sqrt(len(percent)))), 30)
    heights, _, _ = ax.hist(percent, bins=bins, color="#9DC6E0", edgecolor="white")
    top = float(max(heights))
    ax.plot(
        percent, [-0.07 * top] * len(percent), linestyle="none", marker="|", markersize=12, color="black", label="a run"
    )
    ax.axvline(mean, color=ORANGE, linewidth=2, label="mean")
    ax.errorbar(
        [mean], [1.1 * top], xerr=[sd], color=ORANGE, capsize=5, linewidth=2, label=f"mean {PLUS_MINUS} sd"
    )  # fmt: skip
    ax.set_ylim(-0.14 * top, 1.2 * top)
    ax.set_yticks(range(0, int(top) + 1, max(1, int(top) // 5)))
    ax.set_xlabel(f"{plain(name)} in %")
    ax.set_ylabel("runs")
    told = f"{mean:.2f} {PLUS_MINUS} {sd:.2f}, min {min(percent):.2f}, max {max(percent):.2f}"
    ax.set_title(f"{plain(name)} over {len(percent)} seeds: {told}", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    bare(ax)
    save(fig, path)


def draw_protocols(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the accuracy of each protocol as bars with their deviation, a panel per data set.

    Args:
        rows: each with `data` and `protocol` (names), `mean` and `sd` (fractions; sd is None for a single run) and
            `values` (one per run). Protocols and data sets keep the order of their first appearance.
        path: of the picture.
    """
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    sets = list(dict.fromkeys(row["data"] for row in rows))
    fig = Figure(figsize=(2.0 + 3.6 * len(sets), 1.3 + 0.36 * len(protocols)), layout="constrained")
    axes = fig.subplots(1, len(sets), sharey=True, squeeze=False)[0]
    for i, (ax, data) in enumerate(zip(axes, sets, strict=True)):
        mine = [row for row in rows if row["data"] == data]
        places = [protocols.index(row["protocol"]) for row in mine]
        means = [100 * row["mean"] for row in mine]
        sds = [math.nan if row["sd"] is None else 100 * row["sd"] for row in mine]  # nan draws nothing
        ends = [m if math.isnan(s) else m + s for m, s in zip(means, sds, strict=True)]
        ax.barh(places, means, color=CYCLE[i % len(CYCLE)], height=0.7)
        ax.errorbar(means, places, xerr=sds, linestyle="none", color="black", capsize=3, linewidth=1.2)
        for place, mean, sd, end in zip(places, means, sds, ends, strict=True):
            told = f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f} {PLUS_MINUS} {sd:.1f}"
            ax.text(end, place, f"  {told}", va="center", fontsize=8)
        ax.set_xlim(0, 1.35 * max(ends) or 1)
        ax.set_title(plain(data), fontsize=10)
        ax.set_xlabel("top-1 accuracy in %")
    axes[0].set_yticks(range(len(protocols)), [plain(p) for p in protocols])
    axes[0].invert_yaxis()
    runs = sorted({len(row["values"]) for row in rows})
    told = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    fig.suptitle(f"Mean {PLUS_MINUS} standard deviation over {told} run{'' if runs == [1] else 's'}", fontsize=10)
    bare(*axes)
    save(fig, path)


Band = Sequence[Mapping[str, float | None]]
"""One entry for each evaluation of several runs: `epoch`, `mean`, `sd` (None of one run), `min` and `max`."""


def draw_band(bands: Mapping[str, Band], path: Path, name: str) -> None:
    """Draw how a number grows with the epochs: the mean over runs, its deviation, and for one band the range as well.

    Args:
        bands: by name of a line; of fractions.
        path: of the picture.
        name: of the number.
    """
    fig = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = fig.add_subplot()
    for i, (label, band) in enumerate(bands.items()):
        colour, epochs = _colour(i), [point["epoch"] or 0.0 for point in band]
        mean, low, high = ([100 * (point[key] or 0.0) for point in band] for key in ("mean", "min", "max"))
        spread = [100 * (point["sd"] or 0.0) for point in band]
        if len(bands) == 1:
            ax.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0, label="min to max")
        ax.fill_between(
            epochs,
            [m - s for m, s in zip(mean, spread, strict=True)],
            [m + s for m, s in zip(mean, spread, strict=True)],
            color=colour,
            alpha=0.3 if len(bands) == 1 else 0.15,
            linewidth=0,
            label=f"mean {PLUS_MINUS} sd" if len(bands) == 1 else None,
        )
        # Marks only where they do not run together.
        marker = MARKERS[i % len(MARKERS)] if len(band) <= 30 else None
        label = "mean" if len(bands) == 1 else plain(label)
        ax.plot(epochs, mean, color=colour, linestyle=_dash(i), marker=marker, markersize=4, label=label)
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{plain(name)} in %")
    ax.grid(axis="y", color="0.9")
    _legend(ax)
    bare(ax)
    save(fig, path)


def draw_over(values: Mapping[str, Sequence[float]], path: Path, *, field: str, name: str) -> None:
    """Draw a number against the values of one field of a recipe: each run, the mean and its deviation.

    Numbers lie on an axis of their own scale (logarithmic where they span a factor of 20 or more), other values side by
    side.

    Args:
        values: by value of the field as text, one fraction per run.
        path: of the picture.
        field: of the recipe.
        name: of the number.
    """
    places, ticks = _places(list(values))
    fig = Figure(figsize=(max(4.8, 0.8 * len(values) + 2), 3.6), layout="constrained")
    ax = fig.add_subplot()
    means, spread = [], []
    for place, runs in zip(places, values.values(), strict=True):
        percent = [100 * v for v in runs]
        ax.plot([place] * len(percent), percent, linestyle="none", marker=".", color=ORANGE, zorder=3)
        means.append(statistics.fmean(percent))
        spread.append(statistics.stdev(percent) if len(percent) > 1 else math.nan)  # nan draws nothing
    line = "-" if ticks is None else "none"
    order = sorted(range(len(places)), key=lambda i: places[i])
    ax.errorbar(
        [places[i] for i in order], [means[i] for i in order], yerr=[spread[i] for i in order],
        color=BLUE, marker="o", capsize=3, linestyle=line, label=f"mean {PLUS_MINUS} sd",
    )  # fmt: skip
    ax.plot([], [], linestyle="none", marker=".", color=ORANGE, label="a run")
    if ticks is None and min(places) > 0 and max(places) >= 20 * min(places):
        ax.set_xscale("log")
    if ticks is None:
        ax.set_xticks(places, list(values))
        ax.set_xticks([], minor=True)
    else:
        long = max(map(len, ticks)) > 8
        ax.set_xticks(places, [plain(t) for t in ticks], rotation=30 if long else 0, ha="right" if long else "center")
    ax.set_xlabel(field)
    ax.set_ylabel(f"{plain(name)} in %")
    ax.grid(axis="y", color="0.9")
    _legend(ax)
    bare(ax)
    save(fig, path)


def _places(values: Sequence[str]) -> tuple[list[float], list[str] | None]:
    """Return where values lie on an axis, and their names unless they are numbers."""
    try:
        return [float(v) for v in values], None
    except ValueError:
        return [float(i) for i in range(len(values))], list(values)


def draw_variants(values: Mapping[str, Sequence[float]], path: Path, *, title: str, name: str) -> None:
    """Draw named variants as bars with their deviation and each run.

    Args:
        values: by name, one fraction per run, drawn in this order.
        path: of the picture.
        title: over the picture.
        name: of the number.
    """
    means = [100 * statistics.fmean(runs) for runs in values.values()]
    spread = [100 * statistics.stdev(runs) if len(runs) > 1 else math.nan for runs in values.values()]
    fig = Figure(figsize=(6.8, 1.5 + 0.36 * len(values)), layout="constrained")
    ax = fig.add_subplot()
    rows = range(len(values))
    ax.barh(rows, means, color=BLUE, height=0.7)
    ax.errorbar(means, rows, xerr=spread, linestyle="none", color="black", capsize=3, linewidth=1.2)
    ends = []
    for row, runs, mean, sd in zip(rows, values.values(), means, spread, strict=True):
        ax.plot([100 * v for v in runs], [row + 0.2] * len(runs), linestyle="none", marker=".", color=ORANGE)
        told = f"{mean:.1f}" if math.isnan(sd) else f"{mean:.1f} {PLUS_MINUS} {sd:.1f}"
        ends.append(max([100 * v for v in runs] + [mean if math.isnan(sd) else mean + sd]))
        ax.text(ends[-1], row, f"  {told}", va="center", fontsize=8)
    ax.set_yticks(rows, [plain(variant) for variant in values])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * max(ends) or 1)
    ax.set_xlabel(f"{plain(name)} in %; dots: single runs")
    ax.set_title(plain(title), fontsize=10)
    bare(ax)
    save(fig, path)


def draw_lr_find(
    rows: Sequence[Mapping[str, float]], path: Path, *, suggestion: float | None, used: int, title: str
) -> None:
    """Draw the loss against the learning rate of a search.

    Args:
        rows: of each update `lr`, `loss` and `smoothed`.
        path: of the picture.
        suggestion: a learning rate to mark.
        used: so many rows, from the first, count; those after lie beyond the divergence and are drawn pale.
        title: over the picture.
    """
    fig = Figure(figsize=(6.4, 3.8), layout="constrained")
    ax = fig.add_subplot()
    lrs = [row["lr"] for row in rows]
    ax.plot(lrs, [row["loss"] for row in rows], color=GREY, linewidth=0.8, alpha=0.7, label="loss of an update")
    smoothed = [row["smoothed"] for row in rows]
    ax.plot(lrs[:used], smoothed[:used], color=BLUE, linewidth=2, label="smoothed")
    ax.plot(lrs[used - 1 :], smoothed[used - 1 :], color=BLUE, linewidth=2, linestyle=":", alpha=0.5)
    if suggestion is not None:
        ax.axvline(suggestion, color=ORANGE, linestyle="--", label=f"steepest descent: {suggestion:.3g}")
    ax.set_xscale("log")
    if lrs[0] > lrs[-1]:
        ax.invert_xaxis()
    best = smoothed.index(min(smoothed[:used]))
    low, high = smoothed[best], max(smoothed[: best + 1])
    margin = 0.2 * (high - low) or 0.1 * abs(high) or 1.0
    ax.set_ylim(low - margin, high + 2 * margin)  # what comes after the divergence would flatten the rest
    ax.set_xlabel("learning rate of an update" + (" (falling: read from left to right)" if lrs[0] > lrs[-1] else ""))
    ax.set_ylabel("training loss")
    ax.set_title(plain(title), fontsize=10)
    ax.grid(axis="y", color="0.9")
    _legend(ax)
    bare(ax)
    save(fig, path)


def draw_resolution(
    lines: Mapping[str, Sequence[tuple[int, float]]], path: Path, *, trained: Mapping[str, int], name: str
) -> None:
    """Draw accuracy against the test resolution, like Figure 4 of "ResNet strikes back"; train sizes are ringed.

    Args:
        lines: by model, (pixels, fraction).
        path: of the picture.
        trained: by model, the size it was trained at.
        name: of the number.
    """
    fig = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = fig.add_subplot()
    for i, (model, line) in enumerate(lines.items()):
        ordered = sorted(line)
        sizes, percent = [s for s, _ in ordered], [100 * v for _, v in ordered]
        marker = MARKERS[i % len(MARKERS)]
        ax.plot(
            sizes, percent, color=_colour(i), linestyle=_dash(i), marker=marker, markersize=5,
            label=f"{plain(model)} (trained at {trained[model]})",
        )  # fmt: skip
        at = [(s, v) for s, v in zip(sizes, percent, strict=True) if s == trained[model]]
        ax.plot(
            [s for s, _ in at], [v for _, v in at], linestyle="none", marker="o", markersize=12, markerfacecolor="none",
            markeredgecolor=_colour(i), markeredgewidth=1.5,
        )  # fmt: skip
    ax.plot(
        [], [], linestyle="none", marker="o", markersize=10, markerfacecolor="none", color=GREY,
        label="tested at the train size",
    )  # fmt: skip
    ax.set_xticks(sorted({size for line in lines.values() for size, _ in line}))
    ax.set_xlabel("test resolution in pixels")
    ax.set_ylabel(f"{plain(name)} in %")
    ax.grid(axis="y", color="0.9")
    _legend(ax)
    bare(ax)
    save(fig, path)


def draw_learning(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, name: str = "top1") -> None:
    """Draw training loss and a measured number by epoch, one line for each run.

    Args:
        runs: by name, the rows of a metrics.jsonl.
        path: of the picture.
        name: of the number, a fraction; runs without it have their loss drawn alone.
    """
    fig = Figure(figsize=(9.0, 3.7), layout="constrained")
    left, right = fig.subplots(1, 2)
    for i, (label, rows) in enumerate(runs.items()):
        colour, style = _colour(i), _dash(i)
        losses = [(row["epoch"], row["loss"]) for row in rows if row.get("loss") is not None]
        measured = [(row["epoch"], 100 * row[name]) for row in rows if row.get(name) is not None]
        left.plot(
            [e for e, _ in losses], [v for _, v in losses],
            color=colour, linestyle=style, linewidth=1, label=plain(label),
        )  # fmt: skip
        marker = MARKERS[i % len(MARKERS)] if len(measured) <= 30 else None
        right.plot(
            [e for e, _ in measured], [v for _, v in measured],
            color=colour, linestyle=style, marker=marker, markersize=4,
        )  # fmt: skip
    left.set_ylabel("training loss")
    right.set_ylabel(f"{plain(name)} in %")
    for ax in (left, right):
        ax.set_xlabel("epoch")
        ax.grid(axis="y", color="0.9")
    if len(runs) > 1:
        fig.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=min(4, len(runs)))
    bare(left, right)
    save(fig, path)


def _colour(i: int) -> str:
    return CYCLE[i % len(CYCLE)]


def _dash(i: int) -> str:
    """Return a stroke that sets lines apart whose colour comes again."""
    return ("-", "--", ":", "-.")[i // len(CYCLE) % 4]


def _legend(ax: Axes) -> None:
    ax.legend(fontsize=8, frameon=False, loc="best")


def bare(*axes: Axes) -> None:
    """Take the upper and the right frame away."""
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def plain(name: str) -> str:
    """Return a name as text: matplotlib would read $...$ as a formula."""
    return name.replace("_", " ").replace("$", r"\$")


def save(fig: Figure, path: Path) -> None:
    """Write a figure in one move."""
    partial = path.with_name(f".{path.name}")
    fig.savefig(partial, dpi=150)
    partial.replace(path)
