"""From encoded images and their places in the stream to pixels, in this process or in others.

A worker process is a pure function of its work. Neither the encoded bytes nor the pixels are pickled: both lie in
memory that all processes share, in slots made once before the workers start. A fresh block of shared memory for every
message cost more than a tenth of decoding in page faults; copying a picture out of its slot costs far less.

A slot is safe without any lock: `DataLoader` hands results out in the order of the work, and asks for the work that
reuses a slot only after the result before it was taken.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from hf_mae.data.augment import check_augment, num_uniforms, sample_pixels
from hf_mae.data.formats import Buffer
from hf_mae.data.images import ImageError, Pixels, Range
from hf_mae.data.order import Ints, uniforms
from hf_mae.data.rand_augment import operations
from hf_mae.recipes.base import Augment
from hf_mae.recipes.fields import unknown

Failures = list[tuple[int, str]]
"""(image, reason) of those that could not be decoded."""

ROOM = 2.0
"""Shared bytes kept for each image, in mean encoded sizes; what does not fit is sent through the pipe."""
UNKNOWN_BYTES = 256 * 2**10
"""The mean encoded size where the source does not know it."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h: the signal to get when the thread that forked us ends."""


def sample_places(epochs: Ints, positions: Ints, repeats: int) -> tuple[Ints, Ints]:
    """Return (epochs, positions) of the samples made of n images: [repeats * n], all first samples, all second, ...

    Sample v of the image at position p draws what belongs to position p * repeats + v. With all first samples in front,
    every a-th sample of a batch is made of every a-th image.
    """
    samples = positions * repeats + np.arange(repeats)[:, None]  # [repeats, n]
    return np.tile(epochs, repeats), samples.reshape(-1)


@dataclass(frozen=True)
class Decoder:
    """Makes `repeats` samples of each image; plain data, so that it can be sent to a process."""

    seed: int
    augment: Augment
    image_size: tuple[int, int]
    channels: int
    max_pixels: int
    kind: Literal["exact", "fast"] = "exact"
    repeats: int = 1
    pixel_range: Range | None = None

    def __post_init__(self) -> None:
        check_augment(self.augment)
        if self.kind not in ("exact", "fast"):
            raise unknown("data.decoder", self.kind, ("exact", "fast"))
        if self.augment.rand_augment is not None or self.augment.auto_augment is not None:
            operations()  # before any worker is forked, or each would import them anew

    @property
    def num_uniforms(self) -> int:
        """Numbers drawn for each sample: no more than the recipe needs."""
        return num_uniforms(self.augment)

    def shape(self, images: int) -> tuple[int, int, int, int, int]:
        """Return (repeats, images, C, H, W), the shape that this many images are decoded to."""
        return self.repeats, images, self.channels, *self.image_size

    def __call__(self, images: Sequence[Buffer | None], epochs: Ints, positions: Ints, out: Pixels) -> Failures:
        """Fill out [repeats, n, C, H, W] from n images; say which could not be decoded, and why."""
        places = sample_places(epochs, positions, self.repeats)
        draws = uniforms(self.num_uniforms, self.seed, *places).reshape(self.repeats, len(images), self.num_uniforms)
        failures: Failures = []
        for i, data in enumerate(images):
            try:
                sample_pixels(
                    data,
                    draws[:, i],
                    out[:, i],
                    self.augment,
                    max_pixels=self.max_pixels,
                    decoder=self.kind,
                    pixel_range=self.pixel_range,
                )
            except ImageError as error:
                failures.append((i, str(error)))
        return failures


# ------------------------------------------------------------------------------------------------ processes

Work = tuple[Sequence[Buffer | None], Ints, Ints]
"""Images, epochs and positions of at most `rows` images."""


class WorkerProcesses:
    """Decodes work in processes: a stock `DataLoader` for starting, feeding and ending them, and shared memory.

    The processes start at the first `next()`; order and reading stay in the process that iterates.

    Args:
        decoder: what the workers do.
        work: what to decode, in order; advanced ahead of the results.
        rows: the most images in one piece of work.
        num_workers: processes.
        ahead: pieces of work that are sent ahead of the results, at least.
        bytes_per_row: mean encoded size, None if unknown.
    """

    def __init__(
        self,
        decoder: Decoder,
        work: Iterator[Work],
        *,
        rows: int,
        num_workers: int,
        ahead: int,
        bytes_per_row: float | None,
    ) -> None:
        each = max(2, -(-ahead // num_workers))
        # One more than can be under way: the loader takes new work before it hands a result out.
        slots = each * num_workers + 1
        room = max(1, int(rows * ROOM * (bytes_per_row or UNKNOWN_BYTES)))
        self._encoded = _shared(slots, room)
        self._pixels = _shared(slots, *decoder.shape(rows))
        self._work = work
        self._sizes: list[int] = [0] * slots
        self._loader = DataLoader(
            _Decoding(decoder, self._encoded, self._pixels),
            sampler=_Feed(self),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_depend_on_the_parent,
            prefetch_factor=each,
            multiprocessing_context=START_METHOD,
            generator=torch.Generator(),  # else it draws from the global one
        )

    def __iter__(self) -> Iterator[tuple[Pixels, Failures]]:
        """Yield (pixels [repeats, n, C, H, W], failures) of each piece of work; the pixels hold until the next one."""
        pixels = self._pixels.numpy()
        for number, failures in enumerate(self._loader):
            slot = number % len(pixels)
            yield pixels[slot, :, : self._sizes[slot]], failures

    def messages(self) -> Iterator[Any]:
        """Put the encoded bytes of each piece of work into its slot, and yield what is to be told to a worker."""
        encoded = self._encoded.numpy()
        for number, (images, epochs, positions) in zip(count(), self._work, strict=False):
            slot = number % len(encoded)
            room, end = encoded[slot], 0
            places: list[tuple[int, int] | bytes | None] = []
            for data in images:
                if data is None or end + len(data) > len(room):
                    places.append(None if data is None else bytes(data))
                    continue
                room[end : end + len(data)] = np.frombuffer(data, np.uint8)
                places.append((end, end + len(data)))
                end += len(data)
            self._sizes[slot] = len(images)
            yield slot, places, epochs, positions


START_METHOD = "fork" if sys.platform == "linux" else None


def _shared(*shape: int) -> Tensor:
    """Return a uint8 tensor that worker processes see as well."""
    if START_METHOD == "fork":
        # Not a file in /dev/shm, which containers keep small. Pages that are never touched cost nothing.
        return torch.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=torch.uint8).view(shape)
    return torch.empty(shape, dtype=torch.uint8).share_memory_()


class _Feed(Sampler[Any]):
    """What a DataLoader takes for indices is the work itself."""

    def __init__(self, processes: WorkerProcesses) -> None:
        self.processes = processes

    def __iter__(self) -> Iterator[Any]:
        return self.processes.messages()


class _Decoding(Dataset[Failures]):
    """The worker's side."""

    def __init__(self, decoder: Decoder, encoded: Tensor, pixels: Tensor) -> None:
        self.decoder, self.encoded, self.pixels = decoder, encoded, pixels

    def __getitem__(self, message: tuple[int, list[tuple[int, int] | bytes | None], Ints, Ints]) -> Failures:
        slot, places, epochs, positions = message
        room = self.encoded[slot].numpy().data
        images = [room[place[0] : place[1]] if isinstance(place, tuple) else place for place in places]
        return self.decoder(images, epochs, positions, self.pixels[slot].numpy()[:, : len(images)])


def _as_it_is(item: Any) -> Any:
    return item


def _depend_on_the_parent(worker: int) -> None:
    """Outlive Ctrl-C, SIGUSR1 and one SIGTERM, which reach the whole process group: the parent has a step to finish.

    But not the parent, however it ends: a worker holds what it inherited, such as the lock of the run folder. torch
    looks for the parent every five seconds; Linux tells at once.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):  # Windows has the first only
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The second is meant for us: it is how an exiting parent ends its children.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    torch.set_num_threads(1)
