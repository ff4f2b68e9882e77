"""Pictures of what a classifier gets right and wrong, and of how protocols compare.

Drawn with matplotlib's object interface: no global figure, no window system. Colours are those of Okabe and Ito (2008)
and single-hue scales, which colour-blind readers can tell apart. Accuracies are given as fractions and shown in per
cent. Files are written in one move; the suffix of the path decides the format.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from hf_mae.evaluation.classification import ClassResults

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C"
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9")
MAX_MATRIX = 100
"""Above so many classes the names of a matrix cannot be read."""
MAX_BARS, NUM_ENDS = 100, 30
"""Above so many classes, so many of the best and of the worst are drawn."""
PLUS_MINUS = "\N{PLUS-MINUS SIGN}"


def draw_confusion(results: ClassResults, names: Sequence[str], path: Path, *, pairs: int = 20) -> None:
    """Draw which class is taken for which: a matrix up to 100 classes, the most confused pairs as bars above.

    Above 2,000 classes there are no such counts, and nothing is drawn.

    Args:
        results: of one split.
        names: of the classes.
        path: of the picture.
        pairs: how many bars.
    """
    if results.confusion is None:
        return
    share = results.confusion.double() / results.class_examples.clamp(min=1).unsqueeze(1)  # of the true class
    if len(names) <= MAX_MATRIX:
        _draw_matrix(share, results, names, path)
        return
    off = share.clone().fill_diagonal_(0)
    top = off.flatten().argsort(descending=True, stable=True)[:pairs].tolist()
    found = [divmod(int(i), len(names)) for i in top if off.flatten()[i] > 0]
    labels = [f"{_short(names[t])} taken for {_short(names[p])}" for t, p in found]
    fig = Figure(figsize=(9, 1.4 + 0.27 * max(len(found), 1)), layout="constrained")
    ax = fig.add_subplot()
    counts = [f"{int(results.confusion[t, p])} of {int(results.class_examples[t])}" for t, p in found]
    _bars(ax, labels, [100 * float(off[t, p]) for t, p in found], [ORANGE] * len(found), notes=counts)
    ax.set_xlabel("% of the true class's examples")
    ax.set_title(f"Most confused pairs of {len(names)} classes ({_headline(results)})", fontsize=10)
    _save(fig, path)


def _draw_matrix(share: Tensor, results: ClassResults, names: Sequence[str], path: Path) -> None:
    n = len(names)
    side = max(3.2, 0.14 * n if n > 20 else 0.46 * n)
    fig = Figure(figsize=(side + 2.6, side + 2.2), layout="constrained")
    ax = fig.add_subplot()
    # The square root of the share, so that a rare confusion can be seen beside the diagonal.
    image = ax.imshow(
        (100 * share).numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100), interpolation="nearest"
    )
    size = 5.5 if n > 50 else 7 if n > 20 else 9
    labels = [_short(name) for name in names]
    ax.set_xticks(range(n), labels, rotation=90, fontsize=size)
    ax.set_yticks(range(n), labels, fontsize=size)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    ax.set_title(f"Confusion ({_headline(results)})", fontsize=11)
    if n <= 20:
        for row in range(n):
            for column in range(n):
                percent = 100 * float(share[row, column])
                if percent > 0:
                    colour = "white" if percent > 35 else "black"  # the scale is dark from there on
                    text = f"{percent:.0f}" if percent >= 0.5 else "<1"
                    ax.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    else:
        for position in range(n):  # lines to follow from a cell to its names
            ax.axhline(position - 0.5, color="0.93", linewidth=0.3)
            ax.axvline(position - 0.5, color="0.93", linewidth=0.3)
    bar = fig.colorbar(image, ax=ax, shrink=0.6, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 100])
    bar.set_label("% of the true class's examples")
    _save(fig, path)


def draw_per_class(results: ClassResults, names: Sequence[str], path: Path) -> None:
    """Draw the accuracy of each class as bars, the best first; above 100 classes, of the 30 best and the 30 worst."""
    accuracy = results.per_class_accuracy.tolist()
    order = [i for i in range(len(names)) if not math.isnan(accuracy[i])]
    order.sort(key=lambda i: (-accuracy[i], i))
    mean = 100 * results.mean_per_class_accuracy
    labels = [f"{_short(names[i])} ({int(results.class_examples[i])})" for i in order]
    values = [100 * accuracy[i] for i in order]
    if len(order) > MAX_BARS:
        labels[NUM_ENDS:-NUM_ENDS] = [f"... {len(order) - 2 * NUM_ENDS} classes between ..."]
        values[NUM_ENDS:-NUM_ENDS] = [0.0]
    fig = Figure(figsize=(7.5, 1.5 + 0.155 * max(len(values), 6)), layout="constrained")
    ax = fig.add_subplot()
    colours = [BLUE if v >= mean else ORANGE for v in values]
    _bars(ax, labels, values, colours, size=6 if len(values) > 30 else 8)
    ax.axvline(mean, color="black", linewidth=1, linestyle="--")
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"accuracy in %; dashed: mean over classes, {mean:.1f}")
    ax.set_title(f"Accuracy per class, number of examples in brackets ({_headline(results)})", fontsize=10)
    _save(fig, path)


def draw_worst(pictures: Sequence[Tensor] | Tensor, results: ClassResults, names: Sequence[str], path: Path) -> None:
    """Draw the most confident mistakes with their true and predicted classes.

    Args:
        pictures: uint8 [C, H, W], in the order of `results.worst`.
        results: of one split.
        names: of the classes.
        path: of the picture.
    """
    columns = min(4, max(len(pictures), 1))
    rows = max(1, -(-len(pictures) // columns))
    fig = Figure(figsize=(2.3 * columns, 2.95 * rows + 0.5), layout="constrained")
    fig.suptitle(f"Most confident mistakes ({_headline(results)})" if len(pictures) else "No mistakes", fontsize=11)
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    for ax, picture, mistake in zip(axes, pictures, results.worst, strict=False):
        _show(ax, picture)
        said = _wrapped(f"predicted: {names[mistake.predicted]} ({100 * mistake.confidence:.0f}%)")
        caption = f"{said}\n{_wrapped(f'true: {names[mistake.true]}')}"
        ax.set_title(caption, fontsize=8)
    _save(fig, path)


def draw_attention(images: Tensor, attention: Tensor, grid: tuple[int, int], path: Path, *, heads: int = 6) -> None:
    """Draw where the cls token of the last block looks: each image, the mean over heads, and the first heads.

    Args:
        images: uint8 [n, C, H, W].
        attention: [n, heads, L], from the cls token to the patches.
        grid: rows and columns of patches; their product is L.
        path: of the picture.
        heads: how many heads are drawn.

    Raises:
        ValueError: L is not the number of patches of the grid.
    """
    n, num_heads, length = attention.shape
    if length != grid[0] * grid[1]:
        raise ValueError(
            f"attention has {length} patches, but grid={grid} has {grid[0] * grid[1]}; leave the cls token out of it"
        )
    maps = attention.float().cpu().view(n, num_heads, *grid)
    maps = torch.cat([maps.mean(1, keepdim=True), maps[:, :heads]], 1)  # [n, 1 + heads, h, w]
    titles = ["image", f"mean of {num_heads}", *(f"head {i + 1}" for i in range(min(heads, num_heads)))]
    fig = Figure(figsize=(1.35 * len(titles), 1.35 * n + 0.7), layout="constrained")
    axes = fig.subplots(n, len(titles), squeeze=False)
    for row in range(n):
        _show(axes[row, 0], images[row])
        for column, values in enumerate(maps[row], start=1):
            axes[row, column].imshow(values.numpy(), cmap="magma", vmin=0, interpolation="nearest")
        for ax in axes[row]:
            ax.set_axis_off()
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=9)
    fig.suptitle("Attention of the cls token, last block; bright: much, each map on its own scale", fontsize=9)
    _save(fig, path)


def draw_reliability(results: ClassResults, path: Path) -> None:
    """Draw accuracy against confidence, and how many examples have which confidence."""
    fig = Figure(figsize=(4.8, 5.5), layout="constrained")
    upper, lower = fig.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    used = [b for b in results.bins if b.count]
    middle = [50 * (b.lower + b.upper) for b in used]
    width = 100 * (results.bins[0].upper - results.bins[0].lower)
    upper.bar(middle, [100 * (b.accuracy or 0) for b in used], width, color=BLUE, edgecolor="white", label="accuracy")
    confidence = [100 * (b.confidence or 0) for b in used]
    upper.plot(
        confidence, confidence, linestyle="none", marker="_", markersize=16, markeredgewidth=2.5, color=ORANGE,
        label="mean confidence",
    )  # fmt: skip
    upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="perfect calibration")
    upper.set_ylim(0, 100)
    upper.set_ylabel("accuracy in %")
    fig.legend(fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    upper.set_title(f"Calibration: expected error {100 * results.ece:.1f} points ({_headline(results)})", fontsize=9)
    lower.bar(middle, [100 * b.count / results.examples for b in used], width, color=GREY, edgecolor="white")
    lower.set_xlim(0, 100)
    lower.set_xlabel("confidence in %")
    lower.set_ylabel("% of examples")
    _bare(upper, lower)
    _save(fig, path)


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
    markers = ("o", "s", "^", "D", "v", "P")
    for i, (name, line) in enumerate(points.items()):
        ordered = sorted(line, key=lambda point: point[0])
        ax.errorbar(
            [place[k] for k, _, _ in ordered],
            [100 * mean for _, mean, _ in ordered],
            yerr=[math.nan if sd is None else 100 * sd for _, _, sd in ordered],  # nan draws nothing
            color=CYCLE[i % len(CYCLE)],
            marker=markers[i % len(markers)],
            capsize=3,
            label=_plain(name),
        )
    for i, (name, line) in enumerate(published.items()):
        ordered_reference = sorted(line)
        ax.plot(
            [place[k] for k, _ in ordered_reference],
            [100 * accuracy for _, accuracy in ordered_reference],
            color=GREY,
            linestyle=("--", ":", "-.")[i % 3],
            marker=markers[i % len(markers)],
            markerfacecolor="white",
            label=_plain(name),
        )
    ax.set_xticks(
        range(len(blocks)), ["all" if math.isinf(k) else f"{k:g}{' (all)' if k == depth else ''}" for k in blocks]
    )
    ax.set_xlabel("trained blocks (0: head only, 0.5: MLP of the last block)")
    ax.set_ylabel("top-1 accuracy in %")
    ax.grid(axis="y", color="0.9")
    ax.legend(fontsize=8, frameon=False, loc="best")
    _bare(ax)
    _save(fig, path)


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
    ax.set_xlabel(f"{_plain(name)} in %")
    ax.set_ylabel("runs")
    told = f"{mean:.2f} {PLUS_MINUS} {sd:.2f}, min {min(percent):.2f}, max {max(percent):.2f}"
    ax.set_title(f"{_plain(name)} over {len(percent)} seeds: {told}", fontsize=10)
    ax.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _bare(ax)
    _save(fig, path)


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
        ax.set_title(_plain(data), fontsize=10)
        ax.set_xlabel("top-1 accuracy in %")
    axes[0].set_yticks(range(len(protocols)), [_plain(p) for p in protocols])
    axes[0].invert_yaxis()
    runs = sorted({len(row["values"]) for row in rows})
    told = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    fig.suptitle(f"Mean {PLUS_MINUS} standard deviation over {told} run{'' if runs == [1] else 's'}", fontsize=10)
    _bare(*axes)
    _save(fig, path)


def _headline(results: ClassResults) -> str:
    return f"top-1 {100 * results.top1:.1f}% of {results.examples:,}"


def _bars(
    ax: Axes,
    labels: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    *,
    notes: Sequence[str] = (),
    size: float = 8,
) -> None:
    """Draw horizontal bars from top to bottom, each with a note at its end."""
    ax.barh(range(len(values)), values, color=list(colours), height=0.75)
    for position, (value, note) in enumerate(zip(values, notes, strict=False)):
        ax.text(value, position, f" {note}", va="center", fontsize=size)
    ax.set_yticks(range(len(values)), labels, fontsize=size)
    ax.set_ylim(len(values) - 0.4, -0.6)
    if notes and values:
        ax.set_xlim(0, 1.15 * max(values))
    _bare(ax)


def _bare(*axes: Axes) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)


def _show(ax: Axes, picture: Tensor) -> None:
    array = picture.permute(1, 2, 0).cpu().numpy()  # [H, W, C]
    if array.shape[2] == 3:
        ax.imshow(array)
    else:  # one channel is grey; of other numbers the first is shown
        ax.imshow(array[:, :, 0], cmap="gray", vmin=0, vmax=255)


def _plain(name: str) -> str:
    """A name as text: matplotlib would read $...$ as a formula."""
    return name.replace("_", " ").replace("$", r"\$")


def _short(name: str, limit: int = 30) -> str:
    return _plain(name if len(name) <= limit else f"{name[: limit - 3]}...")


def _wrapped(name: str) -> str:
    return _plain("\n".join(textwrap.wrap(name.replace("_", " "), 34, max_lines=2, placeholder=" ...")))


def _save(fig: Figure, path: Path) -> None:
    partial = path.with_name(f".{path.name}")
    fig.savefig(partial, dpi=150)
    partial.replace(path)
