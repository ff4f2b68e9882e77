"""Batches of pixels for one rank, the same whatever decodes them.

`num_workers` threads, or processes, or none, fill slots of a uint8 batch; the order is that of the stream, so neither
their kind nor their number can matter. A batch carries its positions and the cursor after it: save the cursor of the
last batch trained on, never the reader's, which is ahead.

A picture that cannot be decoded is replaced by the next good row of its chunk, then of the chunks after it: a function
of (chunk, row) alone, so all ranks, workers and restarts agree. It is listed in its batch. Whether there are too many
is for `Loader.count_bad` to say, from the lists of all ranks, so that no rank stops before another.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_mae.data.formats import Buffer, Chunk, Source
from hf_mae.data.images import NUM_UNIFORMS, ImageError, augment_image, decode_image
from hf_mae.data.order import Ints, Order, uniforms
from hf_mae.data.stream import Piece, Remainder, Stream, check_state, loader_state, steps_per_epoch
from hf_mae.recipes.base import Augment

__all__ = [
    "BadSample",
    "Batch",
    "Loader",
    "Stream",
    "check_state",
    "loader_state",
    "steps_per_epoch",
]

Extras = Callable[[Ints, Ints], Mapping[str, Tensor]]
Failures = list[tuple[int, str]]

THREAD_GROUP = 8
"""Images a thread decodes before it looks for other work."""
PROCESS_GROUP = 64
"""Images sent to a process at once."""
IMAGES_AHEAD = 2048
"""Decoded ahead of the training step, within one to eight batches."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal to get when the thread that forked us ends."""


class BadSample(TypedDict):
    """A sample whose picture was replaced."""

    batch: int
    """Number of the global batch, from 0."""
    epoch: int
    position: int
    shard: str
    row: int
    reason: str


@dataclass
class Batch:
    """One rank's part of a global batch; n samples."""

    pixel_values: Tensor
    """uint8 [n, C, H, W]."""
    labels: Tensor
    """int64 [n], -1 where there is none."""
    epochs: Ints
    positions: Ints
    extras: dict[str, Tensor]
    cursor: int
    """Global batches consumed, including this one."""
    bad: list[BadSample]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a task needs."""
        return {"pixel_values": self.pixel_values, "labels": self.labels, **self.extras}


@dataclass(frozen=True)
class Decoder:
    """From encoded images and their places in the stream to pixels; plain data, so that it can be sent to a process."""

    seed: int
    augment: Augment
    image_size: tuple[int, int]
    channels: int
    max_pixels: int

    def __call__(
        self, images: Sequence[Buffer | None], epochs: Ints, positions: Ints, out: npt.NDArray[np.uint8]
    ) -> Failures:
        """Fill out [n, C, H, W]; return (slot, reason) of those that could not be decoded."""
        draws = uniforms(NUM_UNIFORMS, self.seed, epochs, positions)
        failures: Failures = []
        for slot, (data, u) in enumerate(zip(images, draws, strict=True)):
            try:
                image = decode_image(data, self.channels, max_pixels=self.max_pixels)
            except ImageError as error:
                failures.append((slot, str(error)))
                continue
            out[slot] = augment_image(image, u, self.image_size, self.augment)
        return failures


class Loader:
    """An endless iterator over the batches of one rank; also a context manager.

    Args:
        source: from `open_source`.
        order: of its chunks.
        augment: from picture to `image_size`.
        image_size: (height, width) in pixels.
        channels: 3 or 1.
        global_batch: samples of all ranks together; a multiple of `world`.
        rank: of this process.
        world: number of processes.
        cursor: global batches consumed before.
        stop: global batch to end at, None for never.
        remainder: `carry` or `drop`, see `hf_mae.recipes.base.Data`.
        num_workers: decoders; 0 decodes in `next()`.
        worker_kind: threads, or processes for more than about eight cores a rank.
        max_bad_fraction: of the rows; `count_bad` raises when there are more.
        max_pixels: largest picture that is decoded.
        extras: (epochs [n], positions [n]) to more tensors of the batch, such as mask noise; called in a worker thread.
        depth: batches decoded ahead; None is what makes about 2,048 images.
        ahead: see `Stream`.
        readers: see `Stream`.

    Attributes:
        seconds_waiting: wall-clock seconds the consumer spent in `next()`.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        *,
        augment: Augment,
        image_size: tuple[int, int],
        channels: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        cursor: int = 0,
        stop: int | None = None,
        remainder: Remainder = "carry",
        num_workers: int = 2,
        worker_kind: Literal["thread", "process"] = "thread",
        max_bad_fraction: float = 0.01,
        max_pixels: int = 89_478_485,
        extras: Extras | None = None,
        depth: int | None = None,
        ahead: float = 0.5,
        readers: int = 4,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must not be negative")
        self.seconds_waiting = 0.0
        self._source, self._order = source, order
        self._decoder = Decoder(order.seed, augment, image_size, channels, max_pixels)
        self._stream = Stream(
            source,
            order,
            global_batch=global_batch,
            rank=rank,
            world=world,
            cursor=cursor,
            stop=stop,
            remainder=remainder,
            ahead=ahead,
            readers=readers,
        )
        self._cursor, self._stop = cursor, stop
        self._extras, self._num_workers = extras, num_workers
        share = global_batch // world
        self._depth = depth if depth is not None else min(8, max(1, IMAGES_AHEAD // share))
        self._max_bad_fraction = max_bad_fraction
        self._counted: dict[tuple[str, int], str] = {}
        # Rows that failed as stand-ins, by (chunk, row): what is known here saves time and changes no choice.
        self._undecodable: dict[tuple[int, int], str] = {}
        self._spare: deque[tuple[int, Chunk]] = deque(maxlen=2)
        engine = self._inline if not num_workers else self._threads if worker_kind == "thread" else self._processes
        self._batches: Generator[Batch, None, None] = engine()

    def __iter__(self) -> Iterator[Batch]:
        """Return itself: a loader is one pass that never ends before `stop`."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch, waiting for it if need be."""
        began = time.perf_counter()
        try:
            batch = next(self._batches)
        except StopIteration:
            if self._stop is not None and self._cursor >= self._stop:
                raise
            raise RuntimeError("this loader was closed, or failed before; make a new one at the cursor") from None
        finally:
            self.seconds_waiting += time.perf_counter() - began
        self._cursor = batch.cursor
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all threads and processes; waits for the image or chunk each is at."""
        self._batches.close()
        self._stream.close()  # the engine has done so if it ever ran

    # -------------------------------------------------------------------------------------------- who decodes

    def _inline(self) -> Generator[Batch, None, None]:
        try:
            for piece in self._stream:
                pixels = self._empty(len(piece))
                failures = self._decode(piece, pixels.numpy(), 0, len(piece))
                yield self._finish(piece, pixels, failures, self._make_extras(piece))
        finally:
            self._stream.close()

    def _threads(self) -> Generator[Batch, None, None]:
        pool = ThreadPoolExecutor(self._num_workers, thread_name_prefix="decode")
        queue: deque[tuple[Piece, Tensor, list[Future[Failures]], Future[dict[str, Tensor]]]] = deque()

        def take() -> Batch:
            piece, pixels, jobs, extras = queue.popleft()
            failures = [failure for job in jobs for failure in job.result()]
            return self._finish(piece, pixels, failures, extras.result())

        try:
            for piece in self._stream:
                pixels, n = self._empty(len(piece)), len(piece)
                jobs = [
                    pool.submit(self._decode, piece, pixels.numpy(), a, min(a + THREAD_GROUP, n))
                    for a in range(0, n, THREAD_GROUP)
                ]
                queue.append((piece, pixels, jobs, pool.submit(self._make_extras, piece)))
                if len(queue) > self._depth:
                    yield take()
            while queue:
                yield take()
        finally:
            # Reading first: a decoder may be waiting for a chunk.
            self._stream.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def _processes(self) -> Generator[Batch, None, None]:
        """Feed a stock DataLoader: order and reading stay here, a worker is a pure function of what it is sent."""
        pending: deque[Piece] = deque()
        share = self._stream.global_batch // self._stream.world
        groups = -(-share // PROCESS_GROUP)
        loader = DataLoader(
            _Decoding(self._decoder),
            sampler=_Feed(self._work, pending),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_depend_on_the_parent,
            prefetch_factor=max(2, -(-(self._depth + 1) * groups // self._num_workers)),
            generator=torch.Generator(),  # else it draws from the global one
        )
        results = None
        try:
            # The workers start before the threads that read: forking a process with threads can deadlock.
            results = iter(loader)
            for first in results:
                parts = [first, *(next(results) for _ in range(groups - 1))]
                pixels = parts[0][0] if groups == 1 else torch.cat([part[0] for part in parts])
                failures = [(PROCESS_GROUP * i + s, why) for i, part in enumerate(parts) for s, why in part[1]]
                piece = pending.popleft()
                yield self._finish(piece, pixels, failures, self._make_extras(piece))
            for piece in pending:  # the one that could not be read ended the feed: now is its turn to be heard
                _encoded(piece, slice(None))
        finally:
            self._stream.close()
            del results  # ends the workers

    def _work(self, pending: deque[Piece]) -> Iterator[tuple[list[bytes | None], Ints, Ints]]:
        for piece in self._stream:
            pending.append(piece)
            if any(future.exception() for future in piece.futures):
                return  # raising here, inside the DataLoader, would lose the batches before
            for a in range(0, len(piece), PROCESS_GROUP):
                part = slice(a, a + PROCESS_GROUP)
                images = [None if v is None else bytes(v) for v in _encoded(piece, part)]
                yield images, piece.epochs[part], piece.positions[part]

    # -------------------------------------------------------------------------------------------- one batch

    def _empty(self, n: int) -> Tensor:
        return torch.empty((n, self._decoder.channels, *self._decoder.image_size), dtype=torch.uint8)

    def _decode(self, piece: Piece, out: npt.NDArray[np.uint8], a: int, b: int) -> Failures:
        part = slice(a, b)
        failures = self._decoder(_encoded(piece, part), piece.epochs[part], piece.positions[part], out[part])
        return [(a + slot, reason) for slot, reason in failures]

    def _make_extras(self, piece: Piece) -> dict[str, Tensor]:
        return dict(self._extras(piece.epochs, piece.positions)) if self._extras else {}

    def _finish(self, piece: Piece, pixels: Tensor, failures: Failures, extras: dict[str, Tensor]) -> Batch:
        chunks = [future.result() for future in piece.futures]
        rows = zip(chunks, piece.rows.tolist(), strict=True)
        labels = torch.tensor([int(chunk.labels[row]) for chunk, row in rows], dtype=torch.int64)
        bad: list[BadSample] = []
        for slot, reason in sorted(failures):
            chunk, row = int(piece.chunks[slot]), int(piece.rows[slot])
            reason = chunks[slot].error or reason
            self._undecodable[chunk, row] = reason
            encoded, label = self._stand_in(chunk, row, chunks[slot])
            place = slice(slot, slot + 1)
            failed = self._decoder([encoded], piece.epochs[place], piece.positions[place], pixels.numpy()[place])
            assert not failed, "a stand-in decodes"
            labels[slot] = label
            shard, number = self._source.describe(chunk, row)
            epoch, position = int(piece.epochs[slot]), int(piece.positions[slot])
            bad.append(
                BadSample(batch=piece.index, epoch=epoch, position=position, shard=shard, row=number, reason=reason)
            )
        return Batch(pixels, labels, piece.epochs, piece.positions, extras, piece.index + 1, bad)

    # -------------------------------------------------------------------------------------------- bad samples

    def _stand_in(self, chunk: int, row: int, data: Chunk) -> tuple[Buffer | None, int]:
        """Find the next good row of the chunk, then of the chunks after it in the source's order."""
        total = len(self._order.sizes)
        for step in range(total):
            number = (chunk + step) % total
            data = data if step == 0 else self._read_spare(number)
            for k in range(len(data.images)):
                other = (row + k) % len(data.images)
                if (number, other) in self._undecodable:
                    continue
                try:
                    decode_image(data.images[other], self._decoder.channels, max_pixels=self._decoder.max_pixels)
                except ImageError as error:
                    self._undecodable[number, other] = data.error or str(error)
                    continue
                return data.images[other], int(data.labels[other])
        bad = {self._source.describe(c, r): reason for (c, r), reason in list(self._undecodable.items())[:5]}
        raise RuntimeError(f"none of the {self._order.num_rows} images can be decoded; {first_reasons(bad)}")

    def _read_spare(self, chunk: int) -> Chunk:
        for number, data in self._spare:
            if number == chunk:
                return data
        self._spare.append((chunk, self._source.read(chunk)))
        return self._spare[-1][1]

    def count_bad(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Count distinct bad rows; the only place that finds them too many.

        A function of what it is given: call it on every rank with the samples gathered from all of them, and at the
        start with those that the run listed before.

        Raises:
            RuntimeError: with them, more than `max_bad_fraction` of the rows are bad.
        """
        for sample in samples:
            self._counted.setdefault((sample["shard"], sample["row"]), sample["reason"])
        rows = self._order.num_rows
        if len(self._counted) > self._max_bad_fraction * rows:
            raise RuntimeError(
                f"{len(self._counted)} of {rows} images cannot be decoded, more than max_bad_fraction="
                f"{self._max_bad_fraction:g} allows; {first_reasons(self._counted)}; mend the data, or raise "
                "--data.max-bad-fraction"
            )

    # -------------------------------------------------------------------------------------------- in words

    def describe(self) -> list[str]:
        """Say how the data is shuffled and what it costs, and warn of what will be slow; one line each."""
        order, source, stream = self._order, self._source, self._stream
        mixed = min(order.num_rows, round(order.lanes * order.window * float(order.sizes.mean())))
        line = f"order: {order.lanes} lanes, {order.window} chunks a window: {mixed:,} rows mixed"
        if source.bytes_per_row:
            # Read ahead at half a window, 1.65 windows are held on average; with lanes not shared out, on every rank.
            sharing = stream.world if order.lanes % stream.world == 0 else 1
            held = min(1.65 * mixed / sharing, order.num_rows) * source.bytes_per_row
            line += f", about {held / 1e6:,.0f} MB of encoded images held per process"
        lines = [line]
        if (classes := self._classes_per_window()) is not None:
            lines.append(f"classes: {classes[0]:,} of {classes[1]:,} in the first {mixed:,} rows")
        if order.lanes % stream.world:
            lines.append(
                f"warning: {order.lanes} lanes over {stream.world} processes: the batches are exact, but every process "
                "reads every chunk; choose --data.lanes as a multiple of the processes"
            )
        largest = int(order.sizes.max()) * (source.bytes_per_row or 0)
        if largest > 256 * 2**20:
            lines.append(
                f"warning: a row group of about {largest / 2**20:,.0f} MiB is read as a whole; rewrite the files with "
                "smaller row groups to save memory"
            )
        return lines

    def _classes_per_window(self) -> tuple[int, int] | None:
        """Count the classes of the first windows and of all chunks looked at, where labels are cheap."""
        order, names = self._order, self._source.label_names
        if not names or self._source.labels(0) is None:
            return None
        chunks: set[int] = set()
        for lane in range(order.lanes):
            chunks.update(order.window_places(0, lane, 0)[0].tolist())
        seen: set[int] = set()
        for chunk in sorted(chunks):
            labels = self._source.labels(chunk)
            seen.update([] if labels is None else labels.tolist())
        return len(seen - {-1}), len(names)


def first_reasons(bad: Mapping[tuple[str, int], str]) -> str:
    """Name the first five bad rows and what is wrong with them."""
    return "first " + "; ".join(f"{shard} row {row}: {why}" for (shard, row), why in list(bad.items())[:5])


def _encoded(piece: Piece, part: slice) -> list[Buffer | None]:
    """Wait for the chunks of these slots and look the rows up."""
    rows = piece.rows[part].tolist()
    return [future.result().images[row] for future, row in zip(piece.futures[part], rows, strict=True)]


# ------------------------------------------------------------------------------------------------ processes


class _Feed(Sampler[Any]):
    """What a DataLoader takes for indices is the work itself."""

    def __init__(self, work: Callable[[deque[Piece]], Iterator[Any]], pending: deque[Piece]) -> None:
        self._work, self._pending = work, pending

    def __iter__(self) -> Iterator[Any]:
        return self._work(self._pending)


class _Decoding(Dataset[tuple[Tensor, Failures]]):
    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __getitem__(self, work: tuple[list[bytes | None], Ints, Ints]) -> tuple[Tensor, Failures]:
        images, epochs, positions = work
        out = torch.empty((len(images), self.decoder.channels, *self.decoder.image_size), dtype=torch.uint8)
        return out, self.decoder(images, epochs, positions, out.numpy())


def _as_it_is(item: Any) -> Any:
    return item


def _depend_on_the_parent(worker: int) -> None:
    """Outlive Ctrl-C and one SIGTERM, which reach the whole process group: the parent has a step to finish.

    But not the parent, however it ends: a worker holds what it inherited, such as the lock of the run folder. torch
    looks for the parent every five seconds; Linux tells at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The second is meant for us: it is how an exiting parent ends its children.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    torch.set_num_threads(1)
