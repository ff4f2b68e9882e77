"""A few images of a source: a fixed subset for evaluation, pictures and the baseline; and a look before all else."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_mae.data.formats import Source
from hf_mae.data.images import ImageError, Stored, decode_image, eval_image, look_inside, map_range
from hf_mae.data.loader import first_reasons
from hf_mae.data.order import EXAMPLES, permutation
from hf_mae.recipes.base import Data

EXAMPLE_CHUNKS = 64
"""Chunks that `load_examples` takes its rows from, where they hold enough."""
LOOKED_AT = 16
"""Images that `check_pixels` looks at."""
LOOK_BYTES = 64 * 2**20
"""Encoded bytes that it reads for that, about; and one chunk of a remote source."""
FEW_LEVELS = 64
"""Grey levels from which on down a pixel range looks like a slip."""
FULL_16_BITS = 2**15
"""16-bit images of which none has a value as large leave more than half of the 256 grey levels unused."""


def load_examples(
    source: Source,
    count: int,
    *,
    seed: int,
    image_size: tuple[int, int],
    channels: int,
    max_pixels: int = 89_478_485,
    crop_pct: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Load a fixed subset for evaluation, with the centre transform; bad images are passed over.

    The rows come in turn from 64 chunks (from more where those hold too few good ones), so that a large data set is not
    read as a whole, and a small count still sees many places of it.

    Args:
        source: from `open_source`.
        count: how many images; fewer are returned when there are no more.
        seed: which ones.
        image_size: (height, width) in pixels.
        channels: 3 or 1.
        max_pixels: largest picture that is decoded.
        crop_pct: see `EvalCrop`; None is the default of this size.

    Returns:
        pixel_values uint8 [n, C, H, W], labels int64 [n] (-1 none).

    Raises:
        ValueError: none of the rows looked at can be decoded; gives the first reasons.
    """
    order = permutation(len(source.sizes), seed, EXAMPLES)
    sizes = source.sizes[order]
    few = max(EXAMPLE_CHUNKS, int(np.searchsorted(np.cumsum(sizes), count)) + 1)
    # Good rows that each chunk is asked for, and the rows of each that have been tried.
    turns = next((t for t in range(1, int(sizes.max())) if np.minimum(sizes[:few], t).sum() >= count), int(sizes.max()))
    tried, good = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    bad: dict[tuple[str, int], str] = {}

    def take(place: int) -> list[_Example]:
        """Decode rows of one chunk until it has given its turns."""
        chunk, found = int(order[place]), []
        data = source.read(chunk)
        for row in permutation(len(data.images), seed, EXAMPLES, chunk)[tried[place] :].tolist():
            if good[place] == turns:
                break
            tried[place] += 1
            try:
                image = decode_image(data.images[row], channels, max_pixels=max_pixels, pixel_range=source.pixel_range)
            except ImageError as error:
                bad[source.describe(chunk, row)] = data.error or str(error)  # the training loop counts and lists them
                continue
            pixels = eval_image(image, image_size, crop_pct)
            found.append(_Example(int(good[place]), place, pixels, int(data.labels[row])))
            good[place] += 1
        return found

    examples: list[_Example] = []
    start, end = 0, few
    with ThreadPoolExecutor(4, thread_name_prefix="examples") as pool:
        while len(examples) < count and (tried < sizes).any():
            places = [i for i in range(start, min(end, len(order))) if tried[i] < sizes[i]]
            examples += [example for found in pool.map(take, places) for example in found]
            # The k-th good row of every chunk stands before the (k+1)-th of any.
            examples = sorted(examples, key=lambda e: (e.turn, e.place))[:count]
            if not examples:
                looked = f"none of the {int(tried.sum()):,} images looked at can be decoded"
                raise ValueError(f"{source.where}: {looked}; {first_reasons(dict(sorted(bad.items())))}; mend the data")
            start, end = end, end + max(16, few // 4)
            if start >= len(order):  # all chunks were asked: ask those that hold more
                missing, holding = count - len(examples), int((tried < sizes).sum())
                start, end, turns = 0, few, turns + -(-missing // max(1, holding))
    pixels = np.empty((len(examples), channels, *image_size), dtype=np.uint8)
    for i, example in enumerate(examples):
        pixels[i] = example.pixels
    return torch.from_numpy(pixels), torch.tensor([example.label for example in examples], dtype=torch.int64)


class _Example(NamedTuple):
    turn: int
    """How many good rows of its chunk come before it."""
    place: int
    """Of its chunk in the order of chunks."""
    pixels: npt.NDArray[np.uint8]
    label: int


# ------------------------------------------------------------------------------------------------ before all else


def check_pixels(source: Source, data: Data, *, refuse: bool = True) -> None:
    """Look at a few images spread over a source for what would come out wrong without a word.

    That is: none can be read; floats, signed or 32-bit integers, whose range is not known; 16-bit images that do not
    fill 16 bits, of which few grey levels would be left; a `pixel_range` that all values lie outside of. Several pages
    and a few odd images among others are only said, in `source.notes`.

    Args:
        source: from `open_source`.
        data: what it was opened with.
        refuse: False says everything in the notes, for runs that began before.

    Raises:
        ValueError: most of the images looked at would come out wrong; says the range seen and what to type.
        RuntimeError: a file is gone.
    """
    images, bad = _look(source, data)
    most = len(images) / 2
    named = f"{source.where}: "
    notes: list[str] = []
    problem = None
    if not images and bad:
        if data.max_bad_fraction < 1:
            (shard, row), why = next(iter(bad.items()))
            problem = (
                f"none of the {len(bad):,} images looked at can be decoded, first {shard} row {row}: {why}; correct or "
                "convert the files"
            )
    elif (limits := source.pixel_range) is not None:
        problem = _outside(images, limits)
        notes += [] if problem is not None else _mapped(images, limits)
    else:
        undefined = [i for i in images if i.kind == "floats" or i.low < 0 or i.high > 65535]
        deep = [image for image in images if image.kind != "8 bits"]
        dark = [] if undefined or max((i.high for i in deep), default=FULL_16_BITS) >= FULL_16_BITS else deep
        if odd := undefined or dark:
            low, high = min(i.low for i in deep), max(i.high for i in deep)
            if undefined:
                kind = "floats" if any(i.kind == "floats" for i in undefined) else "signed or 32-bit integers"
                what = f"hold {kind}, from {low:g} to {high:g}, which are no colours before their range is known"
            else:
                levels = int(high // 257) + 1
                what = (
                    f"hold 16 bits, and no value above {high:g}, so only {levels} of 256 grey levels would be left "
                    "(--data.pixel-range 0 65535 keeps it so)"
                )
            flag = f"--data.pixel-range {_suggest(low, high, kind='floats' if undefined else '')}"
            said = f"{len(odd)} of {len(images)} images looked at {what}"
            if len(deep) > most:
                problem = f"{said}; add {flag}, or the range that you know them to have"
            else:
                notes.append(f"warning: {said}; convert them to 8 bits as you wish them to look")
    if several := [image.pages for image in images if image.pages > 1]:
        notes.append(
            f"{len(several)} of {len(images)} images looked at have several pages or frames (up to {max(several)}); "
            "page 1 is used"
        )
    if problem is not None and refuse:
        raise ValueError(named + problem)
    if problem is not None:
        notes.append(f"warning: {problem}")
    source.notes += [note for note in notes if note not in source.notes]


def _look(source: Source, data: Data) -> tuple[list[Stored], dict[tuple[str, int], str]]:
    """Look inside images from the first to the last chunk: what they hold, and which cannot be read."""
    rows, chunks = int(source.sizes.sum()), len(source.sizes)
    affordable = LOOK_BYTES / max(1.0, (source.bytes_per_row or 0) * rows / chunks)
    count = 1 if source.remote else int(max(1, min(LOOKED_AT, chunks, affordable)))
    images: list[Stored] = []
    bad: dict[tuple[str, int], str] = {}
    for number, chunk in enumerate(np.linspace(0, chunks - 1, count).astype(int).tolist()):
        here = LOOKED_AT * (number + 1) // count - LOOKED_AT * number // count
        read = source.read(chunk)
        for row in sorted(set(np.linspace(0, len(read.images) - 1, here).astype(int).tolist())):
            try:
                asked = source.pixel_range is not None
                images.append(look_inside(read.images[row], max_pixels=data.max_pixels, decode=asked))
            except ImageError as error:
                bad[source.describe(chunk, row)] = read.error or str(error)
    return images, bad


def _outside(images: list[Stored], limits: tuple[float, float]) -> str | None:
    """Say that all values of all images become one, if they do."""
    low, high = min(i.low for i in images), max(i.high for i in images)
    if low == high or len(set(map_range(np.array([low, high]), limits).tolist())) > 1:
        return None
    return (
        f"data.pixel_range={limits[0]:g} {limits[1]:g} makes one grey level of all {len(images)} images looked at, "
        f"which hold values from {low:g} to {high:g}; give their range, or leave it out where they fill their bits"
    )


def _mapped(images: list[Stored], limits: tuple[float, float]) -> list[str]:
    """Say what a pixel range does to the values seen."""
    low, high = min(i.low for i in images), max(i.high for i in images)
    named = f"data.pixel_range={limits[0]:g} {limits[1]:g}"
    beyond = ", what is beyond is clipped" if low < limits[0] or high > limits[1] else ""
    notes = [f"{named}, values from {low:g} to {high:g} seen{beyond}"]
    levels = int(np.ptp(map_range(np.array([low, high]), limits).astype(int))) + 1
    if levels <= FEW_LEVELS:
        notes.append(f"warning: {levels} of 256 grey levels are left; is the range right?")
    eight = [image for image in images if image.kind == "8 bits"]
    if eight and len(eight) < len(images):
        notes.append(f"{len(eight)} of {len(images)} images looked at hold 8 bits, which are mapped as 0 to 255")
    return notes


def _suggest(low: float, high: float, *, kind: str) -> str:
    """Return the likely range of what was seen: 0 to 1, all bits that are used, or what was seen."""
    if low >= 0 and kind == "floats" and high <= 1:
        return "0 1"
    if low >= 0 and high == int(high):
        return f"0 {2 ** max(1, int(high).bit_length()) - 1}"
    return f"{low:g} {high:g}"
