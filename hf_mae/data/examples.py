"""A fixed subset of a source for evaluation, pictures and the baseline, with the centre transform."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hf_mae.data.formats import Source
from hf_mae.data.images import ImageError, decode_image, eval_image
from hf_mae.data.loader import first_reasons
from hf_mae.data.order import EXAMPLES, permutation

EXAMPLE_CHUNKS = 64
"""Chunks that `load_examples` takes its rows from, where they hold enough."""


def load_examples(
    source: Source, count: int, *, seed: int, image_size: tuple[int, int], channels: int, max_pixels: int = 89_478_485
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
                image = decode_image(data.images[row], channels, max_pixels=max_pixels)
            except ImageError as error:
                bad[source.describe(chunk, row)] = data.error or str(error)  # the training loop counts and lists them
                continue
            found.append(_Example(int(good[place]), place, eval_image(image, image_size), int(data.labels[row])))
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
