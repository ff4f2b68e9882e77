"""Small generated data sets: every picture is noise made from its number, so that equal pixels mean the same row."""

from __future__ import annotations

import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hf_mae.data.formats import Chunk, Source, fingerprint
from hf_mae.data.images import decode_image

SIDE = 12


def picture(number: int, kind: str = "JPEG", side: int = SIDE) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def write_parquet(
    path: Path, numbers, *, groups: int = 10, bad=(), names=("a", "b", "c"), label: str = "label"
) -> None:
    """Rows as the Hub stores them; a number in `bad` gets a truncated picture. The label is number % len(names)."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=list(names))})
    images = [{"bytes": picture(i)[:40] if i in bad else picture(i), "path": f"{i}.jpg"} for i in numbers]
    columns = {"image": images, label: [i % len(names) for i in numbers]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), path, row_group_size=groups)


def write_folder(root: Path, numbers, *, classes: int = 3) -> None:
    for i in numbers:
        path = root / f"class{i % classes}" / f"{i:04d}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i))


def write_tar(path: Path, numbers, *, label: str = "cls") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            text = str(i % 3) if label == "cls" else json.dumps({"label": i % 3, "other": "x"})
            for ending, data in (("jpg", picture(i)), (label, text.encode())):
                member = tarfile.TarInfo(f"part/{i:04d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


class FakeSource(Source):
    """Chunks in memory, with optional delays and bad rows, that counts its reads."""

    kind, notes = "fake chunks", []

    def __init__(self, sizes, *, delay: float = 0.0, bad=(), broken=(), fails: int | None = None) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.has_labels, self.bytes_per_row, self.fingerprint = True, 500.0, fingerprint(list(map(int, sizes)))
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.delay, self.bad, self.broken, self.fails = delay, set(bad), set(broken), fails
        self.reads: list[int] = []

    def read(self, chunk: int) -> Chunk:
        self.reads.append(chunk)
        if self.delay:
            time.sleep(np.random.default_rng(len(self.reads)).uniform(0, self.delay))
        if chunk == self.fails:
            raise RuntimeError(f"shard {chunk} is gone")
        n = int(self.sizes[chunk])
        if chunk in self.broken:
            return Chunk([None] * n, np.full(n, -1), error="damaged chunk")
        numbers = self.starts[chunk] + np.arange(n)
        return Chunk([b"no picture" if i in self.bad else _cached(int(i)) for i in numbers], numbers.astype(np.int64))

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        return f"shard{chunk}", row


_pictures: dict[int, bytes] = {}


def _cached(number: int) -> bytes:
    if number not in _pictures:
        _pictures[number] = picture(number, "PNG")
    return _pictures[number]


def rows_of(source: Source) -> list[tuple[bytes, int]]:
    """Every (pixels, label) of a source, in its own order."""
    rows = []
    for c in range(len(source.sizes)):
        chunk = source.read(c)
        assert len(chunk.images) == source.sizes[c]
        rows += [(decode_image(image).tobytes(), int(n)) for image, n in zip(chunk.images, chunk.labels, strict=True)]
    return rows
