"""Batches of pixels for one rank, the same whatever decodes them.

`num_workers` threads, or processes, or none, fill slots of a uint8 batch; the order is that of the stream, so neither
their kind nor their number can matter. A batch carries its positions and the cursor after it: save the cursor of the
last batch trained on, never the reader's, which is ahead.

`repeats` samples are made of each image, each with its own crop and mask (Hoffer et al. 2020, "Augment your batch";
Feichtenhofer et al. 2022, "Masked autoencoders as spatiotemporal learners"). The stream then runs over global_batch /
repeats images, and a rank's batch holds the first sample of each of its images, then the second of each, and so on.
`repeat_augment` is the other way to have several samples of an image: they take places in a row of the stream, go to
different ranks, and each decodes its own.

A picture that cannot be decoded is replaced by the next good row of its chunk, then of the chunks after it: a function
of (chunk, row) alone, so all ranks, workers and restarts agree. It is listed in its batch. Whether there are too many
is for `Loader.count_bad` to say, from the lists of all ranks, so that no rank stops before another.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from hf_mae.data.decoding import Decoder, Failures, Work, WorkerProcesses, sample_places
from hf_mae.data.formats import Buffer, Chunk, Source
from hf_mae.data.images import Pixels
from hf_mae.data.order import Ints, Order
from hf_mae.data.stream import Piece, Remainder, Stream, check_state, loader_state, steps_per_epoch
from hf_mae.recipes.base import Augment
from hf_mae.recipes.fields import choose

__all__ = [
    "BadSample",
    "Batch",
    "Loader",
    "Stream",
    "bad_allowed",
    "check_state",
    "loader_state",
    "repeat_note",
    "steps_per_epoch",
]

Extras = Callable[[Ints, Ints], Mapping[str, Tensor]]

THREAD_GROUP = 8
"""Images a thread decodes before it looks for other work."""
PROCESS_GROUP = 64
"""Images sent to a process at once."""
SMALL = 1000
"""Rows below which one bad image is allowed whatever the fraction: it is more than 1 % of 36."""
SAMPLES_AHEAD = 2048
"""Samples decoded ahead of the training step, within one to eight batches."""


class BadSample(TypedDict):
    """An image that was replaced."""

    batch: int
    """Number of the global batch, from 0."""
    epoch: int
    position: int
    """Of the image in its epoch."""
    shard: str
    row: int
    reason: str


@dataclass
class Batch:
    """One rank's part of a global batch; n samples, those of one image n / repeats apart."""

    pixel_values: Tensor
    """uint8 [n, C, H, W]."""
    labels: Tensor
    """int64 [n], -1 where there is none."""
    epochs: Ints
    positions: Ints
    """int64 [n]: sample v of the image at position p of its epoch is at p * repeats + v, with `repeat_augment` at p *
    repeat_augment + v."""
    extras: dict[str, Tensor]
    cursor: int
    """Global batches consumed, including this one."""
    bad: list[BadSample]

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a task needs."""
        return {"pixel_values": self.pixel_values, "labels": self.labels, **self.extras}


class Loader:
    """An endless iterator over the batches of one rank; also a context manager.

    Args:
        source: from `open_source`.
        order: of its chunks.
        augment: from picture to `image_size`.
        image_size: (height, width) in pixels.
        channels: 3 or 1.
        global_batch: samples of all ranks together; a multiple of `world * repeats`.
        rank: of this process.
        world: number of processes.
        cursor: global batches consumed before.
        stop: global batch to end at, None for never.
        remainder: `carry` or `drop`, see `hf_mae.recipes.base.Data`.
        num_workers: decoders; 0 decodes in `next()`.
        worker_kind: threads, or processes for more than about eight cores a rank.
        max_bad_fraction: of the rows; `count_bad` raises when there are more, see `bad_allowed`.
        max_pixels: largest picture that is decoded.
        decoder: see `hf_mae.data.augment.sample_pixels`.
        repeats: samples made of each image, all in one batch.
        repeat_augment: places in a row of the stream that each image takes, see `hf_mae.recipes.base.Data`.
        pin_memory: put the batches into page-locked memory, from which copies to a GPU need not be waited for. Without
            CUDA it changes nothing.
        extras: (epochs [n], positions [n]) to more tensors of the batch, such as mask noise; called in a worker thread.
        num_classes: refuse a batch with a label outside 0 to num_classes - 1; None takes any. `check_labels` has seen
            most labels before, this sees all that are used.
        depth: batches decoded ahead; None is what makes about 2,048 samples.
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
        decoder: Literal["exact", "fast"] = "exact",
        repeats: int = 1,
        repeat_augment: int = 1,
        pin_memory: bool = False,
        extras: Extras | None = None,
        num_classes: int | None = None,
        depth: int | None = None,
        ahead: float = 0.5,
        readers: int = 4,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must not be negative")
        if repeats < 1:
            raise ValueError(f"repeats={repeats} must be at least 1")
        if repeat_augment < 1:
            raise ValueError(f"repeat_augment={repeat_augment} must be at least 1; 1 is off")
        assert repeats == 1 or repeat_augment == 1, "two ways to the same end; the recipe refuses both at once"
        if global_batch % (world * repeats):
            raise ValueError(
                f"global_batch={global_batch} is not a multiple of the {world} processes"
                + (f" times repeats={repeats}" if repeats > 1 else "")
                + "; use a multiple"
            )
        self.seconds_waiting = 0.0
        self._source, self._order = source, order
        self._decoder = Decoder(
            order.seed, augment, image_size, channels, max_pixels, decoder, repeats, source.pixel_range
        )
        self._pin = pin_memory and torch.cuda.is_available()
        self._stream = Stream(
            source,
            order,
            global_batch=global_batch // repeats,
            rank=rank,
            world=world,
            cursor=cursor,
            stop=stop,
            remainder=remainder,
            repeat_augment=repeat_augment,
            ahead=ahead,
            readers=readers,
        )
        self._cursor, self._stop = cursor, stop
        self._extras, self._num_workers, self._num_classes = extras, num_workers, num_classes
        self._images = global_batch // repeats // world  # of this rank, in one batch
        self._depth = depth if depth is not None else min(8, max(1, SAMPLES_AHEAD // (global_batch // world)))
        self._max_bad_fraction = max_bad_fraction
        self._counted: dict[tuple[str, int], str] = {}
        # Rows that failed as stand-ins, by (chunk, row): what is known here saves time and changes no choice.
        self._undecodable: dict[tuple[int, int], str] = {}
        self._spare: deque[tuple[int, Chunk]] = deque(maxlen=2)
        kinds = {"thread": self._threads, "process": self._processes}
        engine = choose("data.workers", worker_kind, kinds) if num_workers else self._inline
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
                pixels = self._empty()
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
                pixels, n = self._empty(), len(piece)
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
        pending: deque[Piece] = deque()
        rows = min(max(1, PROCESS_GROUP // self._decoder.repeats), self._images)
        groups = range(0, self._images, rows)
        workers = WorkerProcesses(
            self._decoder,
            self._work(pending, rows),
            rows=rows,
            num_workers=self._num_workers,
            ahead=(self._depth + 1) * len(groups),
            bytes_per_row=self._source.bytes_per_row,
        )
        results = None
        try:
            # The workers start before the threads that read: forking a process with threads can deadlock.
            results = iter(workers)
            pixels, failures = self._empty(), []
            for number, (part, failed) in enumerate(results):
                a = groups[number % len(groups)]
                pixels.numpy()[:, a : a + rows] = part
                failures += [(a + i, reason) for i, reason in failed]
                if a == groups[-1]:
                    piece = pending.popleft()
                    yield self._finish(piece, pixels, failures, self._make_extras(piece))
                    pixels, failures = self._empty(), []
            for piece in pending:  # the one that could not be read ended the work: now is its turn to be heard
                _encoded(piece, slice(None))
        finally:
            self._stream.close()
            del results  # ends the workers

    def _work(self, pending: deque[Piece], rows: int) -> Iterator[Work]:
        for piece in self._stream:
            pending.append(piece)
            if any(future.exception() for future in piece.futures):
                return  # raising here, inside the DataLoader, would lose the batches before
            for a in range(0, len(piece), rows):
                part = slice(a, a + rows)
                yield _encoded(piece, part), piece.epochs[part], piece.positions[part]

    # -------------------------------------------------------------------------------------------- one batch

    def _empty(self) -> Tensor:
        return torch.empty(self._decoder.shape(self._images), dtype=torch.uint8, pin_memory=self._pin)

    def _decode(self, piece: Piece, out: Pixels, a: int, b: int) -> Failures:
        part = slice(a, b)
        failures = self._decoder(_encoded(piece, part), piece.epochs[part], piece.positions[part], out[:, part])
        return [(a + i, reason) for i, reason in failures]

    def _make_extras(self, piece: Piece) -> dict[str, Tensor]:
        if self._extras is None:
            return {}
        return dict(self._extras(*sample_places(piece.epochs, piece.positions, self._decoder.repeats)))

    def _finish(self, piece: Piece, pixels: Tensor, failures: Failures, extras: dict[str, Tensor]) -> Batch:
        """Make a batch of pixels [repeats, images, C, H, W], with stand-ins for the images that failed."""
        chunks = [future.result() for future in piece.futures]
        rows = zip(chunks, piece.rows.tolist(), strict=True)
        labels = torch.tensor([int(chunk.labels[row]) for chunk, row in rows], dtype=torch.int64)
        replaced = {i for i, _ in failures}  # these bring the label of their stand-in
        for i, label in enumerate(labels.tolist() if self._num_classes is not None else ()):
            if i not in replaced:
                self._check_label(label, int(piece.chunks[i]), int(piece.rows[i]))
        bad: list[BadSample] = []
        for i, reason in sorted(failures):
            chunk, row = int(piece.chunks[i]), int(piece.rows[i])
            reason = chunks[i].error or reason
            self._undecodable[chunk, row] = reason
            labels[i] = self._stand_in(piece, i, chunks[i], pixels.numpy()[:, i : i + 1])
            shard, number = self._source.describe(chunk, row)
            epoch, position = int(piece.epochs[i]), int(piece.positions[i]) // self._stream.repeat_augment
            bad.append(
                BadSample(batch=piece.index, epoch=epoch, position=position, shard=shard, row=number, reason=reason)
            )
        labels = labels.repeat(self._decoder.repeats)
        if self._pin:
            labels, extras = labels.pin_memory(), {name: tensor.pin_memory() for name, tensor in extras.items()}
        places = sample_places(piece.epochs, piece.positions, self._decoder.repeats)
        return Batch(pixels.flatten(0, 1), labels, *places, extras, piece.index + 1, bad)

    # -------------------------------------------------------------------------------------------- bad samples

    def _stand_in(self, piece: Piece, i: int, data: Chunk, out: Pixels) -> int:
        """Fill image i from the next good row of its chunk, or of the chunks after it; return its label.

        Args:
            piece: the batch.
            i: which of its images failed.
            data: the chunk it is in.
            out: [repeats, 1, C, H, W].
        """
        chunk, row, total = int(piece.chunks[i]), int(piece.rows[i]), len(self._order.sizes)
        place = piece.epochs[i : i + 1], piece.positions[i : i + 1]
        for step in range(total):
            number = (chunk + step) % total
            data = data if step == 0 else self._read_spare(number)
            for k in range(len(data.images)):
                other = (row + k) % len(data.images)
                if (number, other) in self._undecodable:
                    continue
                if failed := self._decoder([data.images[other]], *place, out):
                    self._undecodable[number, other] = data.error or failed[0][1]
                    continue
                self._check_label(int(data.labels[other]), number, other)
                return int(data.labels[other])
        bad = {self._source.describe(c, r): reason for (c, r), reason in list(self._undecodable.items())[:5]}
        raise RuntimeError(f"none of the {self._order.num_rows} images can be decoded; {first_reasons(bad)}")

    def _check_label(self, label: int, chunk: int, row: int) -> None:
        if self._num_classes is None or 0 <= label < self._num_classes:
            return
        shard, number = self._source.describe(chunk, row)
        what = "has no label" if label == -1 else f"has the label {label}"
        raise RuntimeError(
            f"{shard} row {number} {what}, and the classes are 0 to {self._num_classes - 1}; mend or remove that row, "
            "then start again: the run continues from its last checkpoint"
        )

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
        if len(self._counted) > bad_allowed(self._max_bad_fraction, rows):
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
            sharing = max(1, stream.world // stream.repeat_augment) if order.lanes % stream.world == 0 else 1
            held = min(1.65 * mixed / sharing, order.num_rows) * source.bytes_per_row
            line += f", about {held / 1e6:,.0f} MB of encoded images held per process"
        lines = [line]
        if (repeats := self._decoder.repeats) > 1:
            lines.append(
                f"repeats: {repeats} samples of each image, {stream.global_batch} different images a batch; this "
                "changes what is learned, not only the speed"
            )
        if (copies := stream.repeat_augment) > 1:
            different = -(-stream.global_batch // copies)
            line = f"repeated augmentation: {copies} copies of each image, about {different} different images a batch"
            lines.append(f"{line}, {-(-stream.length // copies):,} of {order.num_rows:,} an epoch")
        if (note := repeat_note(copies, stream.world)) is not None:
            lines.append(note)
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


def repeat_note(repeat_augment: int, world: int) -> str | None:
    """Say that copies of an image meet on one process, where there are fewer processes than copies; else None."""
    if repeat_augment <= 1 or world >= repeat_augment:
        return None
    return (
        f"note: data.repeat_augment={repeat_augment} over {world} process(es): copies of an image share a process, so "
        "batch normalisation sees fewer different images than with a process for each copy"
    )


def bad_allowed(max_bad_fraction: float, rows: int) -> float:
    """Return how many of the rows may be bad: the fraction of them, but one below 1,000 rows unless none may be."""
    allowed = max_bad_fraction * rows
    return max(allowed, 1.0) if max_bad_fraction > 0 and rows < SMALL else allowed


def first_reasons(bad: Mapping[tuple[str, int], str]) -> str:
    """Name the first five bad rows and what is wrong with them."""
    return "first " + "; ".join(f"{shard} row {row}: {why}" for (shard, row), why in list(bad.items())[:5])


def _encoded(piece: Piece, part: slice) -> list[Buffer | None]:
    """Wait for the chunks of these slots and look the rows up."""
    rows = piece.rows[part].tolist()
    return [future.result().images[row] for future, row in zip(piece.futures[part], rows, strict=True)]
