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
) -> None:
    """Draw accuracy against the number of trained blocks, like Figure 9 of the paper.

    Args:
        points: per name of a line, (blocks, mean, standard deviation); blocks may be 0.5, and inf for all of them;
            the deviation of a single run is None.
        path: of the picture.
        depth: blocks of the encoder; so many are marked as all.
        reference: per name, (blocks, accuracy) that was published: dashed.
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
    ax.set_xlabel("trained blocks (0: head only, 0.5: MLP of the last block)")
    ax.set_ylabel("top-1 accuracy in %")
    ax.grid(axis="y", color="0.9")
    ax.legend(fontsize=8, frameon=False, loc="best")
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
