"""Which row of the data stands at which position of an epoch: one pure function, and all host-side randomness.

The order is a function of (row counts, seed, lanes, window, epoch, position). Workers, ranks, prefetch and restarts are
not inputs, so they cannot change it. Randomness is a counter hash (splitmix64, Steele et al. 2014): there is no
generator object whose state could drift, and nothing depends on NumPy's streams, which may change (NEP 19).

One epoch: the chunks (a row group, a file, a run of tar members) are permuted and laid end to end; that line of N rows
is cut into `lanes` pieces equal to +-1, so a cut may fall inside a chunk. Position p is element p // lanes of lane
p % lanes. Inside a lane every `window` chunks are shuffled together: about lanes * window chunks are open at once.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hf_mae.recipes.base import Data

Ints = npt.NDArray[np.int64]

# The second word of every hash says what it is for, so that no two uses share their numbers.
CHUNKS, ROWS, AUGMENT, NOISE, EXAMPLES, DROP_PATH, MIX, DROPOUT = 1, 2, 7, 8, 9, 10, 11, 12

DEFAULT_LANES = 64
SINGLE_ROW_WINDOW = 16


def mix(*words: int | npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Hash integers, or arrays of integers that broadcast, to uint64: splitmix64, one round per word."""
    h = np.asarray(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            h = (np.asarray(word).astype(np.uint64) ^ h) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return h


def permutation(n: int, *key: int) -> Ints:
    """Return a permutation of range(n) that is a pure function of `key`."""
    return np.argsort(mix(*key, np.arange(n, dtype=np.uint64)), kind="stable").astype(np.int64)


def uniforms(n: int, seed: int, epochs: Ints, positions: Ints, purpose: int = AUGMENT) -> npt.NDArray[np.float64]:
    """Draw n numbers for every sample of a batch, each row a function of (seed, purpose, epoch, position).

    Args:
        n: numbers per sample.
        seed: the run's seed.
        epochs: [batch] epoch of each sample.
        positions: [batch] position of each sample in its epoch.
        purpose: what the numbers are for; different purposes are independent.

    Returns:
        [batch, n] float64 in [0, 1).
    """
    keys = mix(seed, purpose, epochs, positions)
    bits = mix(keys[:, None], np.arange(n, dtype=np.uint64)[None]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def choose_lanes_and_window(sizes: npt.ArrayLike, bytes_per_row: float | None, data: Data) -> tuple[int, int]:
    """Choose how many chunks are shuffled together, from metadata only (never from ranks or the machine's memory).

    More lanes mix better than wider windows at equal memory (measured on class-sorted data), so the window shrinks
    before the lanes do.

    Args:
        sizes: rows of each chunk.
        bytes_per_row: mean encoded bytes of a row; None does not limit the bytes.
        data: gives `lanes` (None takes 64, fewer for tiny data or beyond `window_bytes`), `window_rows` and
            `window_bytes`, which a fixed number of lanes may exceed.

    Returns:
        (lanes, window): lanes, and chunks per window of a lane.
    """
    for name in ("lanes", "window_rows", "window_bytes"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise ValueError(f"data.{name}={value} must be at least 1")
    counts = np.asarray(sizes, dtype=np.int64)
    rows, mean = int(counts.sum()), float(counts.mean())
    lanes = DEFAULT_LANES if data.lanes is None else data.lanes
    while data.lanes is None and lanes > max(rows, 1):
        lanes //= 2
    window = int(np.ceil(data.window_rows / (lanes * mean)))
    if counts.max() == 1:
        # Single rows are fully shuffled by the permutation of chunks: a window only batches the reads.
        window = min(window, SINGLE_ROW_WINDOW)
    if bytes_per_row:
        chunk_bytes = mean * bytes_per_row
        window = min(window, max(1, int(data.window_bytes / (lanes * chunk_bytes))))
        while data.lanes is None and lanes > 1 and lanes * window * chunk_bytes > data.window_bytes:
            lanes //= 2
    return lanes, window


class Table(NamedTuple):
    """The layout of one epoch."""

    chunks: Ints
    """Chunk numbers in the order of the line."""
    ends: Ints
    """Row of the line after each of them."""
    starts: Ints
    """[lanes + 1] first row of each lane on the line, and the end."""
    cuts: list[Ints]
    """Per lane: first row of each of its windows on the line, and the end of the last."""


class Places(NamedTuple):
    """Where the samples of a batch are; every field is [batch] int64."""

    chunks: Ints
    rows: Ints
    lanes: Ints
    windows: Ints


class Order:
    """The order of all epochs. Keeps the last window of each lane: cheap in order, right in any order.

    Not thread-safe: one reader owns it.

    Args:
        sizes: rows of each chunk, all at least 1.
        seed: the run's seed.
        lanes: number of pieces an epoch is cut into.
        window: chunks shuffled together in a lane.
    """

    def __init__(self, sizes: npt.ArrayLike, seed: int, lanes: int, window: int) -> None:
        self.sizes: Ints = np.asarray(sizes, dtype=np.int64)
        if self.sizes.ndim != 1 or not len(self.sizes) or self.sizes.min() < 1:
            raise ValueError("sizes must be a non-empty list of row counts, all at least 1; leave out empty chunks")
        if lanes < 1 or window < 1:
            raise ValueError(f"lanes={lanes} and window={window} must be at least 1")
        self.num_rows = int(self.sizes.sum())
        self.seed, self.lanes, self.window = seed, lanes, window
        self._tables: dict[int, Table] = {}
        # The window that each lane is in, as times of the lane, and their rows one lane after the other.
        self._epoch, self._open, self._lo, self._hi = (np.full(lanes, -1, dtype=np.int64) for _ in range(4))
        self._places: list[tuple[Ints, Ints]] = [(np.empty(0, np.int64), np.empty(0, np.int64))] * lanes

    def table(self, epoch: int) -> Table:
        """Lay out one epoch; the last four are kept. A few milliseconds for 13,000 chunks."""
        if epoch not in self._tables:
            chunks = permutation(len(self.sizes), self.seed, CHUNKS, epoch)
            ends = np.cumsum(self.sizes[chunks])
            share, longer = divmod(self.num_rows, self.lanes)
            starts = np.concatenate([[0], np.cumsum(share + (np.arange(self.lanes) < longer))])
            cuts: list[Ints] = []
            for l in range(self.lanes):
                a, b = starts[l], starts[l + 1]
                lo, hi = np.searchsorted(ends, [a, b - 1], side="right") if b > a else (0, 0)
                # The first window is shorter, more so in low lanes: lanes do not all turn over at once.
                inner = ends[lo + l * self.window // self.lanes : hi : self.window]
                cuts.append(np.concatenate([[a], inner, [b]]))
            while len(self._tables) >= 4:
                del self._tables[min(self._tables)]
            self._tables[epoch] = Table(chunks, ends, starts, cuts)
        return self._tables[epoch]

    def num_windows(self, epoch: int, lane: int) -> int:
        """Count the windows of a lane."""
        return len(self.table(epoch).cuts[lane]) - 1

    def window_start(self, epoch: int, lane: int, window: int) -> int:
        """Return the first position of a window in its epoch (a window may be empty when rows < lanes)."""
        table = self.table(epoch)
        return int(table.cuts[lane][window] - table.starts[lane]) * self.lanes + lane

    def window_places(self, epoch: int, lane: int, window: int) -> tuple[Ints, Ints]:
        """Return (chunks, rows) of every step of a window, in reading order."""
        chunks, ends, _, cuts = self.table(epoch)
        a, b = cuts[lane][window : window + 2]
        at = a + permutation(int(b - a), self.seed, ROWS, epoch, lane, window)
        i = np.searchsorted(ends, at, side="right")
        return chunks[i], at - (ends[i] - self.sizes[chunks[i]])

    def locate(self, epochs: npt.ArrayLike, positions: npt.ArrayLike) -> Places:
        """Find the rows of a batch.

        Args:
            epochs: [batch] epochs.
            positions: [batch] positions in their epochs, in [0, num_rows).

        Returns:
            Chunk, row in the chunk, lane and window of each.
        """
        epochs, positions = np.asarray(epochs, dtype=np.int64), np.asarray(positions, dtype=np.int64)
        lanes, times = positions % self.lanes, positions // self.lanes
        chunks, rows, windows = (np.empty(len(positions), dtype=np.int64) for _ in range(3))
        left = np.arange(len(positions))
        while True:
            l, t = lanes[left], times[left]
            found = (self._epoch[l] == epochs[left]) & (self._lo[l] <= t) & (t < self._hi[l])
            here, l, t = left[found], l[found], t[found]
            if len(here):
                lengths = np.array([len(c) for c, _ in self._places])
                at = (np.cumsum(lengths) - lengths)[l] + t - self._lo[l]
                chunks[here] = np.concatenate([c for c, _ in self._places])[at]
                rows[here] = np.concatenate([r for _, r in self._places])[at]
                windows[here] = self._open[l]
            left = left[~found]
            if not len(left):
                return Places(chunks, rows, lanes, windows)
            # Every lane moves on to the window of its first position that was not found.
            for i in left[np.unique(lanes[left], return_index=True)[1]]:
                self._move(int(lanes[i]), int(epochs[i]), int(times[i]))

    def _move(self, lane: int, epoch: int, time: int) -> None:
        _, _, starts, cuts = self.table(epoch)
        start = starts[lane]
        w = int(np.searchsorted(cuts[lane], start + time, side="right")) - 1
        assert 0 <= w < len(cuts[lane]) - 1, "position beyond the epoch"
        self._places[lane] = self.window_places(epoch, lane, w)
        self._epoch[lane], self._open[lane] = epoch, w
        self._lo[lane], self._hi[lane] = cuts[lane][w : w + 2] - start
