"""The rows one rank reads, batch after batch: slots of the order, and chunks read ahead.

Global stream position g = epoch * N + p; global batch k is [k*B, (k+1)*B); rank r of R takes its slots r, r+R, ... The
stream is endless over epochs. Its whole state is k: any rank can compute any position, so a run may go on with another
number of ranks.

With repeated augmentation (Hoffer et al. 2020, as DeiT and timm sample it) every image takes R places in a row, so that
its copies go to neighbouring ranks: place s of an epoch holds image s // R of its order. An epoch stays N places long,
made of its first N / R images; the next one shuffles all of them anew.

Chunks are held by reference count: those of the window each lane is in, and of the lane's next window once part of the
current one is used. A lane keeps its rank over epochs when the ranks divide the lanes and the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hf_mae.data.formats import Chunk, Source
from hf_mae.data.order import Ints, Order
from hf_mae.recipes.fields import unknown

Remainder = Literal["carry", "drop"]


def steps_per_epoch(rows: int, global_batch: int, remainder: Remainder) -> float:
    """Return the optimizer updates of one epoch: fractional when the remainder carries over, whole when it is dropped.

    Args:
        rows: of the data.
        global_batch: rows of one update; with repeated sampling fewer than its samples.
        remainder: see `Stream`.

    Raises:
        ValueError: dropping would leave nothing.
    """
    if rows < 1 or global_batch < 1:
        raise ValueError(f"rows={rows} and global_batch={global_batch} must be at least 1")
    if remainder == "carry":
        return rows / global_batch
    if remainder != "drop":
        raise unknown("data.remainder", remainder, ("carry", "drop"))
    if rows < global_batch:
        raise ValueError(
            f"global_batch={global_batch} is larger than the data set ({rows} rows), so data.remainder='drop' leaves "
            "nothing; lower --global-batch or use --data.remainder carry"
        )
    return float(rows // global_batch)


def images_per_epoch(rows: int, images: int, remainder: Remainder) -> int:
    """Return the images of one epoch, `images` of which make a global batch: all rows, or those of whole batches.

    With repeated augmentation these are places: as many, taken by fewer different images.
    """
    return rows if remainder == "carry" else int(steps_per_epoch(rows, images, remainder)) * images


def loader_state(
    source: Source, order: Order, global_batch: int, remainder: Remainder, repeats: int = 1, repeat_augment: int = 1
) -> dict[str, Any]:
    """Return what decides the order, to be saved beside the cursor and compared by `check_state` at resume.

    Args:
        source: what is read.
        order: in which order.
        global_batch: samples of all ranks together, `repeats` of each image.
        remainder: see `Stream`.
        repeats: samples made of each image.
        repeat_augment: places that an image takes in a row.
    """
    former = source.former_fingerprint
    return ({} if former is None else {"former_fingerprint": former}) | {
        "seed": order.seed,
        "lanes": order.lanes,
        "window": order.window,
        "global_batch": global_batch,
        "repeats": repeats,
        "repeat_augment": repeat_augment,
        "remainder": remainder,
        "fingerprint": source.fingerprint,
        "rows": order.num_rows,
    }


def check_state(saved: Mapping[str, Any], current: Mapping[str, Any], cursor: int) -> int:
    """Compare two `loader_state`s and return the cursor to go on from.

    The global batch may change where the samples seen so far are whole batches of the new size, and nothing is dropped:
    their order stays, only the grouping changes.

    Raises:
        ValueError: something that decides the order differs; names it, with both values.
    """
    saved = {"repeats": 1, "repeat_augment": 1, **saved}  # the first checkpoints do not say
    for name in ("rows", "fingerprint", "seed", "remainder", "lanes", "window", "repeats", "repeat_augment"):
        same = saved[name] == current[name]
        if not same and not (name == "fingerprint" and saved[name] == current.get("former_fingerprint")):
            what = (
                "the data has changed (its files, or data.splits)"
                if name in ("rows", "fingerprint")
                else "the order of the samples would change"
            )
            raise ValueError(
                f"{name} was {saved[name]!r} in the checkpoint and is {current[name]!r} now: {what}; restore it, or "
                "start a new run"
            )
    old, new = saved["global_batch"], current["global_batch"]
    if old == new:
        return cursor
    if saved["remainder"] == "carry" and cursor * old % new == 0:
        return cursor * old // new
    raise ValueError(
        f"global_batch was {old} in the checkpoint and is {new} now: {cursor * old} samples seen are not whole batches "
        f"of {new} in one order of samples (data.remainder={saved['remainder']!r}); keep global_batch={old}"
    )


@dataclass(frozen=True)
class Piece:
    """One rank's part of a global batch, still encoded. Arrays are [n]."""

    index: int
    """Number of the global batch."""
    epochs: Ints
    positions: Ints
    """Places in their epochs; with repeated augmentation each copy of an image has its own."""
    chunks: Ints
    rows: Ints
    futures: list[Future[Chunk]]
    """The chunk of each row, perhaps still being read."""

    def __len__(self) -> int:
        return len(self.positions)


@dataclass
class _Live:
    """A chunk that is held, and by how many windows."""

    users: int
    future: Future[Chunk]


class Stream:
    """Yields a rank's `Piece` of every global batch from `cursor` to `stop`, reading ahead in threads.

    Args:
        source: what to read.
        order: in which order.
        global_batch: rows of all ranks together; a multiple of `world`.
        rank: which slots are ours.
        world: number of ranks.
        cursor: global batches consumed before.
        stop: global batch to end at, None for never.
        remainder: whether the last rows of an epoch open the next one or are left out.
        repeat_augment: places in a row that each image takes.
        ahead: fraction of a window that is still unused when the next one is asked for, in [0, 1].
        readers: threads that read chunks.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        *,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        cursor: int = 0,
        stop: int | None = None,
        remainder: Remainder = "carry",
        repeat_augment: int = 1,
        ahead: float = 0.5,
        readers: int = 4,
    ) -> None:
        if global_batch % world:
            raise ValueError(f"global_batch={global_batch} is not a multiple of the {world} processes; use a multiple")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank} must be in [0, {world})")
        self._source, self._order = source, order
        self.global_batch, self.rank, self.world = global_batch, rank, world
        self.cursor, self.stop, self.ahead, self.repeat_augment = cursor, stop, ahead, repeat_augment
        steps_per_epoch(order.num_rows, global_batch, remainder)  # refuses what leaves nothing
        # Places of an epoch that are used.
        self.length = images_per_epoch(order.num_rows, global_batch, remainder)
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="reader")
        self._live: dict[int, _Live] = {}
        # Per slot (a copy of a lane's images, followed over epochs): its open windows (epoch, lane, window) and their
        # chunks. A rank that gets several copies of an image opens a window in several slots; it is read once.
        self._open: dict[int, dict[tuple[int, int, int], list[int]]] = {}
        self._slots = order.lanes * repeat_augment
        self.num_reads = self.most_live = 0

    def __iter__(self) -> Iterator[Piece]:
        """Go on from the cursor; one iteration in a stream's life."""
        while self.stop is None or self.cursor < self.stop:
            yield self._next()

    def _next(self) -> Piece:
        batch = self.global_batch
        g = np.arange(self.cursor * batch + self.rank, (self.cursor + 1) * batch, self.world, dtype=np.int64)
        epochs, positions = np.divmod(g, self.length)
        images = positions // self.repeat_augment
        places = self._order.locate(epochs, images)
        # The windows that are touched, in the order of their first use, with the last image used in each.
        key = (epochs - epochs[0]) * self._slots + positions % self._slots
        key = key * (int(places.windows.max()) + 1) + places.windows
        _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
        last = np.zeros(len(first), dtype=np.int64)
        np.maximum.at(last, inverse, np.arange(len(g)))
        by_use = np.argsort(first)
        touched: dict[int, tuple[int, int, int]] = {}
        for i, j in zip(first[by_use].tolist(), last[by_use].tolist(), strict=True):
            window = int(epochs[i]), int(places.lanes[i]), int(places.windows[i])
            slot = int(g[i] % self._slots)
            self._ask(slot, window)
            touched[slot] = window
            self._look_ahead(slot, window, int(images[j]))
        futures = [self._live[chunk].future for chunk in places.chunks.tolist()]
        for slot, window in touched.items():
            for old in [w for w in self._open[slot] if _before(w, window)]:
                self._release(slot, old)
        piece = Piece(self.cursor, epochs, positions, places.chunks, places.rows, futures)
        self.cursor += 1
        return piece

    def _look_ahead(self, slot: int, window: tuple[int, int, int], image: int) -> None:
        """Ask for the slot's next window when enough of this one is used."""
        epoch, lane, number = window
        order = self._order
        start = order.window_start(epoch, lane, number)
        end = order.window_start(epoch, lane, number + 1)
        if image < end - self.ahead * (end - start):
            return
        if number + 1 < order.num_windows(epoch, lane) and self._place(slot, epoch, end) < self.length:
            self._ask(slot, (epoch, lane, number + 1))
        else:
            # The next epoch gives the slot another lane: its label turns by the length of an epoch.
            label = self._label(slot, epoch + 1)
            if label < self.length:
                self._ask(slot, (epoch + 1, label // self.repeat_augment, 0))

    def _label(self, slot: int, epoch: int) -> int:
        """Return the first place of an epoch that is a slot's."""
        return (slot - epoch * self.length) % self._slots

    def _place(self, slot: int, epoch: int, image: int) -> int:
        """Return the place of a slot's copy of an image in its epoch."""
        return image * self.repeat_augment + self._label(slot, epoch) % self.repeat_augment

    def _ask(self, slot: int, window: tuple[int, int, int]) -> None:
        windows = self._open.setdefault(slot, {})
        if window in windows:
            return
        epoch, lane, number = window
        first = self._place(slot, epoch, self._order.window_start(epoch, lane, number))
        if self.stop is not None and epoch * self.length + first >= self.stop * self.global_batch:
            return
        chunks = np.unique(self._order.window_places(epoch, lane, number)[0]).tolist()
        for chunk in chunks:
            if chunk not in self._live:
                self.num_reads += 1
                self._live[chunk] = _Live(0, self._pool.submit(self._source.read, chunk))
            self._live[chunk].users += 1
        windows[window] = chunks
        self.most_live = max(self.most_live, len(self._live))

    def _release(self, slot: int, window: tuple[int, int, int]) -> None:
        for chunk in self._open[slot].pop(window):
            live = self._live[chunk]
            live.users -= 1
            if not live.users:
                del self._live[chunk]  # pieces on their way hold the future themselves

    def close(self) -> None:
        """End the reading threads. Chunks that were asked for and not begun raise CancelledError."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _before(window: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    return (window[0], window[2]) < (other[0], other[2])
