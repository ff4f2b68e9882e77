"""Features of a frozen encoder in place of images: encoded once, then read in the order of the stream.

The order is the one the images would have had, so that a probe on cached features takes the steps of a probe that
encodes the same, unaugmented images anew for each of them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_mae.data.order import Ints, Order


@dataclass(frozen=True)
class Features:
    """What a frozen encoder makes of the rows of a split; rows that cannot be decoded are absent."""

    features: Tensor
    """float32 [n, D]."""
    labels: Tensor
    """int64 [n]."""
    rows: Tensor
    """int64 [n], ascending: which row of the source each is."""
    bad: tuple[tuple[str, int, str], ...] = ()
    """Shard, row and reason of the rows that could not be decoded."""

    def batches(self, size: int, *, rank: int = 0, world: int = 1) -> list[dict[str, Tensor]]:
        """Cut this rank's part into batches for evaluation, the same number of them on every rank."""
        n = len(self.rows)
        mine = torch.arange(n * rank // world, n * (rank + 1) // world)
        count = math.ceil(math.ceil(n / world) / size)
        return [
            {"features": self.features[part], "labels": self.labels[part], "rows": self.rows[part]}
            for part in (mine[i * size : (i + 1) * size] for i in range(count))
        ]


def digest(*facts: Any, weights: Mapping[str, Tensor]) -> str:
    """Hash what features depend on, weights included, to 16 hex digits."""
    sha = hashlib.sha256(json.dumps(facts, default=str).encode())
    for name in sorted(weights):
        sha.update(name.encode())
        sha.update(weights[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:16]


def read_features(path: Path) -> Features | None:
    """Read what `write_features` has written; None if there is no such file, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(name) for name in ("features", "labels", "rows")]
            bad = json.loads(file.metadata()["bad"])
    except (OSError, SafetensorError):
        return None
    return Features(*tensors, bad=tuple((shard, row, reason) for shard, row, reason in bad))


def write_features(path: Path, features: Features) -> None:
    """Write a safetensors file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {"features": features.features, "labels": features.labels, "rows": features.rows}
    metadata = {"bad": json.dumps(features.bad)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass
class FeatureBatch:
    """This rank's part of a global batch, as `hf_mae.training.loop.Batch`."""

    features: Tensor
    """float32 [n, D]."""
    labels: Tensor
    """int64 [n]."""
    cursor: int
    bad: list[Any] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a task needs."""
        return {"features": self.features, "labels": self.labels}


class FeatureBatches:
    """An endless iterator over the batches of one rank, as `Loader` makes them of images.

    A bad image is replaced as in the loader: by the next good one of its chunk, then of the chunks after it.

    Args:
        features: of the training split.
        order: of its rows.
        images_per_epoch: rows of an epoch that are used.
        global_batch: rows of all ranks together.
        rank: of this process.
        world: number of processes.
        cursor: global batches consumed before.
    """

    def __init__(
        self,
        features: Features,
        order: Order,
        *,
        images_per_epoch: int,
        global_batch: int,
        rank: int,
        world: int,
        cursor: int,
    ) -> None:
        self.seconds_waiting = 0.0
        self._data, self._order, self._length = features, order, images_per_epoch
        self._global_batch, self._rank, self._world, self._cursor = global_batch, rank, world, cursor
        self._starts = np.cumsum(order.sizes) - order.sizes
        self._place = _places(features.rows.numpy(), order, self._starts)

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Yield batches from the cursor on."""
        while True:
            first = self._cursor * self._global_batch + self._rank
            at = np.arange(first, first - self._rank + self._global_batch, self._world)
            epochs, positions = np.divmod(at, self._length)
            places = self._order.locate(epochs, positions)
            chosen = torch.from_numpy(self._place[self._starts[places.chunks] + places.rows])
            self._cursor += 1
            yield FeatureBatch(self._data.features[chosen], self._data.labels[chosen], self._cursor)

    def __enter__(self) -> FeatureBatches:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def describe(self) -> list[str]:
        """Say what is read."""
        return [f"features: {len(self._data.rows):,} x {self._data.features.shape[1]}, encoded once, not augmented"]

    def count_bad(self, samples: Any) -> None:
        """Nothing is decoded here: what was bad has been left out before."""


def _places(known: Ints, order: Order, starts: Ints) -> Ints:
    """Return which of the features belongs to each row: its own, or that of its stand-in."""
    place = np.full(order.num_rows, -1, dtype=np.int64)
    place[known] = np.arange(len(known))
    good = place >= 0
    for row in np.flatnonzero(~good).tolist():
        chunk = int(np.searchsorted(starts, row, side="right")) - 1
        for step in range(len(starts)):
            number = (chunk + step) % len(starts)
            # From the same place on in every chunk, and round to its beginning.
            inside = np.roll(np.arange(order.sizes[number]), int(starts[chunk]) - row) + starts[number]
            if good[inside].any():
                place[row] = place[inside[good[inside]][0]]
                break
    return place
