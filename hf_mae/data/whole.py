"""A split read once from end to end, for evaluation: every row counts exactly once, whatever the number of ranks.

The rows are cut into one contiguous block for each rank, so that a chunk is read by one rank (by two at a cut) and once
in a pass. All ranks yield the same number of batches, the last of them smaller or empty: a sharded model needs every
rank at every forward pass, and no row is repeated to fill up. All models take an empty batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hf_mae.data.formats import Chunk, Source
from hf_mae.data.images import ImageError, crop_center, decode_image, to_array
from hf_mae.data.loader import first_reasons
from hf_mae.recipes.crop import CropMode, EvalCrop

GROUP = 8
"""Rows a thread decodes before it looks for other work."""
AHEAD = 2
"""Batches decoded ahead of the one that is used."""


class BadRow(NamedTuple):
    """A row that was left out."""

    shard: str
    row: int
    reason: str


class _Part(NamedTuple):
    """Neighbouring rows of one chunk."""

    chunk: int
    first: int
    end: int


class WholeSplit:
    """Every row of a source once, over all ranks, with the transform of evaluation; iterate as often as you like.

    A batch is {"pixel_values": uint8 [n, C, H, W], "labels": int64 [n] (-1 none), "rows": int64 [n]}, the rows numbered
    in the order of the source. n is at most `batch`: less where rows are bad, and less or 0 at the end of a block.

    Args:
        source: from `open_source`.
        image_size: (height, width) in pixels.
        channels: 3 or 1.
        batch: rows of this rank in a batch, at most.
        rank: of this process.
        world: number of processes.
        num_workers: threads that decode; 0 counts as 1.
        max_pixels: largest picture that is decoded.
        crop_pct: see `EvalCrop`; None is the default of this size.
        crop_mode: likewise.
        names: `file_names` will be asked for: refuse now a format that keeps none.

    Raises:
        ValueError: a number out of its range, or a format without file names where `names` asks for them.
    """

    def __init__(
        self,
        source: Source,
        *,
        image_size: tuple[int, int],
        channels: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 2,
        max_pixels: int = 89_478_485,
        crop_pct: float | None = None,
        crop_mode: CropMode | None = None,
        names: bool = False,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch} must be at least 1")
        if names and source.names(0) is None:
            raise ValueError(
                f"{source.where}: the rows carry no file names, which this evaluation needs; use a folder of the "
                "original files"
            )
        self.source, self.crop = source, EvalCrop(image_size, crop_pct, crop_mode)
        self._channels, self._max_pixels = channels, max_pixels
        self._batch, self._workers = batch, max(1, num_workers)
        self._ends = np.cumsum(source.sizes)
        self.num_rows = int(self._ends[-1])
        """Of all ranks together."""
        self._start, self._end = self.num_rows * rank // world, self.num_rows * (rank + 1) // world
        largest = math.ceil(self.num_rows / world)
        self._batches = math.ceil(largest / batch)
        self._bad: dict[int, BadRow] = {}
        self._chunk_names: dict[int, list[str]] = {}

    def __len__(self) -> int:
        """Return the number of batches, the same on every rank."""
        return self._batches

    @property
    def bad(self) -> list[BadRow]:
        """Rows of this rank that could not be decoded in the passes so far, in order."""
        return [self._bad[row] for row in sorted(self._bad)]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches of this rank, decoding ahead in threads."""
        readers = ThreadPoolExecutor(2, thread_name_prefix="read")
        decoders = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        open_chunks: dict[int, Future[Chunk]] = {}
        queue: deque[tuple[int, npt.NDArray[np.uint8], list[Future[_Decoded]]]] = deque()
        try:
            for start in range(self._start, self._start + len(self) * self._batch, self._batch):
                stop = max(start, min(start + self._batch, self._end))
                parts = self._parts(start, stop)
                wanted = {part.chunk for part in parts}
                # Kept while rows of it are to come; decoding jobs hold what they need themselves.
                open_chunks = {chunk: future for chunk, future in open_chunks.items() if chunk in wanted}
                for chunk in sorted(wanted - set(open_chunks)):
                    open_chunks[chunk] = readers.submit(self.source.read, chunk)
                pixels = np.empty((stop - start, self._channels, *self.crop.size), dtype=np.uint8)
                jobs, at = [], 0
                for group in _groups(parts):
                    work = [(part, open_chunks[part.chunk]) for part in group]
                    rows = sum(part.end - part.first for part in group)
                    jobs.append(decoders.submit(self._decode, work, pixels[at : at + rows]))
                    at += rows
                queue.append((start, pixels, jobs))
                if len(queue) > AHEAD:
                    yield self._finish(*queue.popleft())
            while queue:
                yield self._finish(*queue.popleft())
        finally:
            # A decoder may be waiting for a chunk; a cancelled one ends its wait.
            decoders.shutdown(wait=False, cancel_futures=True)
            readers.shutdown(wait=True, cancel_futures=True)
            decoders.shutdown(wait=True)

    def _parts(self, start: int, stop: int) -> list[_Part]:
        """Cut rows [start, stop) at the ends of chunks."""
        parts, row = [], start
        while row < stop:
            chunk = int(np.searchsorted(self._ends, row, side="right"))
            before = int(self._ends[chunk] - self.source.sizes[chunk])
            end = min(stop, int(self._ends[chunk]))
            parts.append(_Part(chunk, row - before, end - before))
            row = end
        return parts

    def _decode(self, work: Sequence[tuple[_Part, Future[Chunk]]], out: npt.NDArray[np.uint8]) -> _Decoded:
        """Fill out [n, C, H, W]; return the labels, and what could not be decoded by its place in `out`."""
        labels: list[int] = []
        failures: dict[int, str] = {}
        for part, future in work:
            chunk = future.result()
            for row in range(part.first, part.end):
                at = len(labels)
                labels.append(int(chunk.labels[row]))
                try:
                    image = self._image(chunk, row)
                except ImageError as error:
                    failures[at] = chunk.error or str(error)
                    continue
                out[at] = to_array(crop_center(image, self.crop))
        return _Decoded(labels, failures)

    def _image(self, chunk: Chunk, row: int) -> Image.Image:
        return decode_image(
            chunk.images[row], self._channels, max_pixels=self._max_pixels, pixel_range=self.source.pixel_range
        )

    def _finish(self, start: int, pixels: npt.NDArray[np.uint8], jobs: Sequence[Future[_Decoded]]) -> dict[str, Tensor]:
        labels: list[int] = []
        good: list[int] = []
        for job in jobs:
            at, decoded = len(labels), job.result()
            labels += decoded.labels
            good += [at + i for i in range(len(decoded.labels)) if i not in decoded.failures]
            for i, reason in decoded.failures.items():
                row = start + at + i
                self._bad[row] = BadRow(*self.source.describe(*self._place(row)), reason)
        if len(good) < len(pixels):
            pixels = pixels[good]
        return {
            "pixel_values": torch.from_numpy(pixels),  # [n, C, H, W]
            "labels": torch.tensor([labels[i] for i in good], dtype=torch.int64),
            "rows": torch.tensor([start + i for i in good], dtype=torch.int64),
        }

    def _place(self, row: int) -> tuple[int, int]:
        """Return (chunk, row in it) of a row of the source."""
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        return chunk, row - int(self._ends[chunk] - self.source.sizes[chunk])

    def picture(self, row: int) -> Tensor:
        """Decode one row, of any rank, as evaluation sees it: uint8 [C, H, W]. Reads its whole chunk.

        Raises:
            ImageError: it cannot be decoded.
        """
        number, at = self._place(row)
        image = self._image(self.source.read(number), at)
        return torch.from_numpy(to_array(crop_center(image, self.crop)).copy())

    def check(self) -> None:
        """Refuse a split of which no image can be decoded; reads chunks up to the first good image.

        Raises:
            ValueError: there is none; gives the first reasons.
        """
        bad: dict[tuple[str, int], str] = {}
        for number in range(len(self.source.sizes)):
            chunk = self.source.read(number)
            for row in range(len(chunk.images)):
                try:
                    self._image(chunk, row)
                except ImageError as error:
                    bad[self.source.describe(number, row)] = chunk.error or str(error)
                    continue
                return
        raise ValueError(
            f"{self.source.where}: none of the {self.num_rows:,} images can be decoded; {first_reasons(bad)}; name "
            "another split, or fix the data"
        )

    def file_names(self, rows: Sequence[int]) -> list[str]:
        """Return the file names that rows came with; without the pixels, as far as the format allows.

        Raises:
            ValueError: the format keeps none.
        """
        found = []
        for row in rows:
            chunk, at = self._place(row)
            if chunk not in self._chunk_names:
                names = self.source.names(chunk)
                if names is None:
                    raise ValueError(f"{self.source.where}: the rows carry no file names")
                self._chunk_names[chunk] = names
            found.append(self._chunk_names[chunk][at])
        return found


class _Decoded(NamedTuple):
    labels: list[int]
    failures: dict[int, str]


def _groups(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Cut and join parts to groups of `GROUP` rows."""
    group: list[_Part] = []
    room = GROUP
    for part in parts:
        first = part.first
        while first < part.end:
            end = min(part.end, first + room)
            group.append(_Part(part.chunk, first, end))
            room, first = room - (end - first), end
            if not room:
                yield group
                group, room = [], GROUP
    if group:
        yield group
