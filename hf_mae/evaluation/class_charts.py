"""Pictures of what a classifier gets right and wrong, drawn in the style of `charts`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from hf_mae.evaluation.charts import BLUE, GREY, ORANGE, bare, plain, save
from hf_mae.evaluation.classification import ClassResults

MAX_MATRIX = 100
"""Above so many classes the names of a matrix cannot be read."""
MAX_BARS, NUM_ENDS = 100, 30
"""Above so many classes, so many of the best and of the worst are drawn."""


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
    save(fig, path)


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
    save(fig, path)


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
    save(fig, path)


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
    save(fig, path)


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
    save(fig, path)


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
    bare(upper, lower)
    save(fig, path)


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
    bare(ax)


def _show(ax: Axes, picture: Tensor) -> None:
    array = picture.permute(1, 2, 0).cpu().numpy()  # [H, W, C]
    if array.shape[2] == 3:
        ax.imshow(array)
    else:  # one channel is grey; of other numbers the first is shown
        ax.imshow(array[:, :, 0], cmap="gray", vmin=0, vmax=255)


def _short(name: str, limit: int = 30) -> str:
    return plain(name if len(name) <= limit else f"{name[: limit - 3]}...")


def _wrapped(name: str) -> str:
    return plain("\n".join(textwrap.wrap(name.replace("_", " "), 34, max_lines=2, placeholder=" ...")))
