"""Images per second and core: from encoded JPEGs to training samples of 224 x 224, ours beside the usual transforms.

    python benchmarks/input.py --images DIR
    python benchmarks/input.py --images DIR --threads 1 2 --rounds 20 --seconds 900 --out FILE

DIR holds Parquet files with an `image` column, or images; only JPEGs are used. A round is one chunk of pictures, the
same for all variants, each in a process of its own as `rounds.py` describes. With --threads N, N processes each take a
share of the chunk (as the workers of a DataLoader would, but nothing is handed over), and ours also runs in N threads
of one process, as its loader does. Handing over is measured by `loop.py`.

`official`          Pillow, then torchvision v1 RandomResizedCrop (bicubic), flip, ToTensor, Normalize: float32, as in
                    the official pretraining script. The base of the ratios.
`ours-exact`        hf_mae.data.augment.sample_pixels, decoder exact: uint8, the bits of `official` before ToTensor.
`ours-fast`         decoder fast: the same crops, resized by torch.
`torchvision-v2`    torchvision.io.decode_jpeg and v2 transforms on uint8.
`timm`              its training transform without colour jitter, uint8 (for its prefetcher), where timm is installed.
`lightly`           its MAETransform, where lightly is installed: float32.
`decode-libjpeg`    the whole picture decoded by simplejpeg, and no more: the stand-in for libjpeg-turbo itself.
`decode-pillow`     the same by Pillow.

Before anything is timed, `ours-exact` must equal torchvision on Pillow to the bit on the same boxes, and `ours-fast`
must have 50 dB PSNR against it at the 5th percentile. Boxes are random in each variant, from the same distribution.

At the end: CPU time of whole epochs of our loader, decoding inline from Parquet, over the same samples made from bytes
in memory in the same order. That is what reading and order cost.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
import torchvision.io
import torchvision.transforms as v1
from PIL import Image
from rounds import (
    QUIET,
    Run,
    Variant,
    Work,
    describe_machine,
    paired_ratio,
    readings_record,
    run_rounds,
    table,
    write_record,
)
from torchvision.transforms import InterpolationMode, v2

from hf_mae.data.augment import FLIP, NUM_UNIFORMS, random_resized_crop_box, sample_pixels
from hf_mae.data.images import EXTENSIONS
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order, choose_lanes_and_window, uniforms
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, Augment, Data

SIZE = 224
SCALE = (0.2, 1.0)
BICUBIC = InterpolationMode.BICUBIC
PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "numpy", "pyarrow", "timm", "lightly")
BASE, CEILING = "official", "decode-libjpeg"

One = Callable[[int], Any]
"""Treat the picture of this number."""


def read_jpegs(folder: Path, limit: int) -> list[bytes]:
    """Read the first JPEGs of a folder of Parquet files or of images."""
    found: list[bytes] = []
    files = sorted(folder.rglob("*.parquet"))
    if files:
        for file in files:
            for batch in pq.ParquetFile(file).iter_batches(64, columns=["image"]):
                found += [row["bytes"] for row in batch.column("image").to_pylist() if row and row["bytes"]]
            if len(found) >= limit:
                break
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
        found = [path.read_bytes() for path in paths[:limit]]
    found = [data for data in found if data.startswith(b"\xff\xd8\xff")][:limit]
    if not found:
        raise SystemExit(f"--images {folder} holds no JPEGs, neither as files nor in Parquet files")
    return found


def draws_for(n: int) -> np.ndarray:
    """Return uniforms [n, 1, NUM_UNIFORMS]."""
    return np.random.default_rng(0).random((n, 1, NUM_UNIFORMS))


# ------------------------------------------------------------------------------------------------ variants


def official(data: list[bytes]) -> One:
    transform = v1.Compose(
        [
            v1.RandomResizedCrop(SIZE, scale=SCALE, interpolation=BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return lambda i: transform(Image.open(io.BytesIO(data[i])).convert("RGB"))


def torchvision_v2(data: list[bytes]) -> One:
    transform = v2.Compose(
        [v2.RandomResizedCrop(SIZE, scale=SCALE, interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip()]
    )
    encoded = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in data]
    mode = torchvision.io.ImageReadMode.RGB
    return lambda i: transform(torchvision.io.decode_jpeg(encoded[i], mode=mode))


def ours(data: list[bytes], decoder: Any) -> One:
    draws, augment = draws_for(len(data)), Augment()
    out = np.empty((64, 1, 3, SIZE, SIZE), np.uint8)  # written in turn, as the slots of a batch
    return lambda i: sample_pixels(data[i], draws[i], out[i % 64], augment, decoder=decoder)


def timm(data: list[bytes]) -> One:
    from timm.data import create_transform

    transform = create_transform(
        SIZE,
        is_training=True,
        use_prefetcher=True,
        scale=SCALE,
        interpolation="bicubic",
        color_jitter=None,
    )
    return lambda i: transform(Image.open(io.BytesIO(data[i])).convert("RGB"))


def lightly(data: list[bytes]) -> One:
    from lightly.transforms import MAETransform

    transform = MAETransform(input_size=SIZE, min_scale=SCALE[0])
    return lambda i: transform(Image.open(io.BytesIO(data[i])).convert("RGB"))


VARIANTS: dict[str, Callable[[list[bytes]], One]] = {
    "official": official,
    "ours-exact": lambda data: ours(data, "exact"),
    "ours-fast": lambda data: ours(data, "fast"),
    "torchvision-v2": torchvision_v2,
    "timm": timm,
    "lightly": lightly,
    "decode-libjpeg": lambda data: lambda i: simplejpeg.decode_jpeg(data[i]),
    "decode-pillow": lambda data: lambda i: Image.open(io.BytesIO(data[i])).convert("RGB"),
}


def build(images: Path, limit: int, name: str, chunk: int, hands: int, kind: str) -> tuple[Work, dict[str, Any]]:
    """Return a unit of work: the next chunk of pictures, shared by so many hands (threads or processes)."""
    data = read_jpegs(images, limit)
    shares = [chunk * h // hands for h in range(hands + 1)]
    begin = 0
    if hands == 1 or kind == "threads":
        one = VARIANTS[name](data)
        pool = ThreadPoolExecutor(hands)

        def share(a: int, b: int) -> None:
            for i in range(begin + a, begin + b):
                one(i % len(data))

        def treat() -> float:
            start = time.process_time()
            if hands == 1:
                share(0, chunk)
            else:
                list(pool.map(share, shares[:-1], shares[1:]))
            return time.process_time() - start

    else:
        pipes, one = [], VARIANTS[name](data)
        for _ in range(hands - 1):
            here, there = multiprocessing.get_context("spawn").Pipe()
            # Daemons end with this process, which ends when the parent closes its pipe.
            multiprocessing.get_context("spawn").Process(
                target=help_out, args=(there, images, limit, name), daemon=True
            ).start()
            there.close()
            pipes.append(here)

        def treat() -> float:
            for pipe, a, b in zip(pipes, shares[1:-1], shares[2:], strict=True):
                pipe.send((begin + a, begin + b))
            start = time.process_time()
            for i in range(begin, begin + shares[1]):
                one(i % len(data))
            return time.process_time() - start + sum(pipe.recv() for pipe in pipes)

    def work() -> dict[str, float]:
        nonlocal begin
        start = time.perf_counter()
        cpu = treat()
        begin += chunk
        # As `cpu` this replaces the reading of the harness, which does not see the other processes.
        return {"cpu": cpu, "core_seconds": hands * (time.perf_counter() - start), "images": chunk}

    return work, {"name": name, "hands": hands, "kind": kind, "pictures": len(data)}


def help_out(pipe: Connection, images: Path, limit: int, name: str) -> None:
    """Treat the ranges of pictures that arrive; answer with the CPU seconds it took."""
    torch.set_num_threads(1)
    data = read_jpegs(images, limit)
    one = VARIANTS[name](data)
    while True:
        try:
            a, b = pipe.recv()
        except EOFError:
            return
        start = time.process_time()
        for i in range(a, b):
            one(i % len(data))
        pipe.send(time.process_time() - start)


def transforms(arguments: argparse.Namespace, hands: int) -> tuple[Run, dict[str, Any]]:
    names = [name for name in VARIANTS if name in {BASE, CEILING, *arguments.variants}]
    installed = [n for n in names if n not in ("timm", "lightly") or importlib.util.find_spec(n) is not None]
    plan = [(name, name, "processes") for name in installed]
    if hands > 1:
        plan += [(f"{name}-threads", name, "threads") for name in installed if name.startswith("ours")]
    fixed = {"images": arguments.images, "limit": arguments.limit, "chunk": arguments.chunk, "hands": hands}
    variants = {
        label: Variant(build, fixed | {"name": name, "kind": kind}, environment={"OMP_NUM_THREADS": "1"})
        for label, name, kind in plan
    }
    run = run_rounds(
        variants, rounds=arguments.rounds, seconds=arguments.seconds, warmup=1, quiet=arguments.quiet, say=say
    )
    if not run.kept:
        say("no round was quiet: nothing to report (see --quiet)")
        return run, {}
    measure = {"CPU": "cpu", "wall": "core_seconds"}
    rows = [[f"{hands} at once", "CPU ms/image", "images/s/core, CPU", "images/s/core, wall"]]
    rows[0] += [f"{BASE} / this, CPU", f"{BASE} / this, wall", f"{CEILING} / this, CPU"]
    ratios: dict[str, Any] = {}
    for label in variants:
        speed = {m: arguments.chunk / statistics.median(run.values(label, field)) for m, field in measure.items()}
        found = {
            "over_official_cpu": paired_ratio(run.values(BASE, "cpu"), run.values(label, "cpu")),
            "over_official_wall": paired_ratio(run.values(BASE, "core_seconds"), run.values(label, "core_seconds")),
            "over_decode_cpu": paired_ratio(run.values(CEILING, "cpu"), run.values(label, "cpu")),
        }
        cells = ["1" if ratio.above == ratio.below == 0 else str(ratio) for ratio in found.values()]
        rows.append([label, f"{1000 / speed['CPU']:.3f}", f"{speed['CPU']:.0f}", f"{speed['wall']:.0f}", *cells])
        ratios[label] = {"images_per_second_per_core": {m: round(v, 1) for m, v in speed.items()}} | {
            key: ratio.to_dict() for key, ratio in found.items()
        }
    say(table(rows))
    return run, ratios


# ------------------------------------------------------------------------------------------------ the same pictures


def verify(data: list[bytes]) -> dict[str, float]:
    """Hold ours to torchvision on Pillow, on the same boxes.

    Raises:
        SystemExit: the exact decoder has another bit, or the fast one less than 50 dB at the 5th percentile.
    """
    draws, augment, psnr, equal = draws_for(len(data)), Augment(), [], 0
    out = np.empty((1, 3, SIZE, SIZE), np.uint8)
    for i, encoded in enumerate(data):
        u = draws[i, 0]
        sample_pixels(encoded, draws[i], out, augment)
        image = Image.open(io.BytesIO(encoded))
        # Turned as their EXIF says, which torchvision leaves to the caller; only decoders differ in that, not samples.
        if image.getexif().get(0x0112, 1) == 1:
            image = image.convert("RGB")
            box = random_resized_crop_box(u, image.height, image.width, augment.scale, augment.ratio)
            part = v1.functional.resized_crop(image, *box, [SIZE, SIZE], BICUBIC)
            part = v1.functional.hflip(part) if u[FLIP] < 0.5 else part
            if not np.array_equal(out[0], np.asarray(part).transpose(2, 0, 1)):
                raise SystemExit(f"ours-exact differs from torchvision on Pillow in picture {i}: nothing is timed")
            equal += 1
        exact = out[0].astype(np.int32)
        sample_pixels(encoded, draws[i], out, augment, decoder="fast")
        psnr.append(10 * np.log10(255**2 / max(float(((exact - out[0]) ** 2).mean()), 1e-9)))
    low, middle = np.percentile(psnr, [5, 50])
    say(
        f"{len(data)} crops: ours-exact bit-equal in {equal}, the others turned by EXIF; ours-fast PSNR median "
        f"{middle:.1f} dB, 5th percentile {low:.1f} dB"
    )
    if low < 50:
        raise SystemExit("ours-fast is not within rounding of ours-exact: nothing is timed")
    return {
        "crops": len(data),
        "bit_equal": equal,
        "psnr_median": round(float(middle), 1),
        "psnr_5th_percentile": round(float(low), 1),
    }


# ------------------------------------------------------------------------------------------------ reading and order


def build_epoch(path: str, decoder: Any, kind: str, batch: int) -> tuple[Work, dict[str, Any]]:
    """Return a unit of work: as many samples as fill an epoch with whole batches, by the loader or from memory."""
    source = open_source(Data(path=path, label_column="none"))
    order = Order(source.sizes, 3, *choose_lanes_and_window(source.sizes, source.bytes_per_row, Data(path=path)))
    batches = max(1, int(source.sizes.sum()) // batch)
    if kind == "loader":
        # One that lives on, as in training: what it has read ahead after an epoch it had read before the epoch too.
        loader = Loader(
            source,
            order,
            augment=Augment(),
            image_size=(SIZE, SIZE),
            channels=3,
            global_batch=batch,
            num_workers=0,
            decoder=decoder,
        )

        def work() -> dict[str, float]:
            for _ in range(batches):
                next(loader)
            return {}

    else:
        chunks = [source.read(c) for c in range(len(source.sizes))]
        encoded = [[None if v is None else bytes(v) for v in chunk.images] for chunk in chunks]
        size = int(source.sizes.sum())
        begin = 0

        def samples() -> list[tuple[bytes | None, np.ndarray]]:
            epochs, positions = np.divmod(begin + np.arange(batches * batch), size)
            places = order.locate(epochs, positions)
            draws = uniforms(NUM_UNIFORMS, 3, epochs, positions)[:, None]
            pairs = zip(places.chunks.tolist(), places.rows.tolist(), strict=True)
            return [(encoded[chunk][row], u) for (chunk, row), u in zip(pairs, draws, strict=True)]

        def work() -> dict[str, float]:
            nonlocal begin
            todo = samples()
            begin += len(todo)
            start, wall = time.process_time(), time.perf_counter()
            for a in range(0, len(todo), batch):
                out = torch.empty((batch, 1, 3, SIZE, SIZE), dtype=torch.uint8).numpy()
                for slot, (one, u) in zip(out, todo[a : a + batch], strict=True):
                    sample_pixels(one, u, slot, Augment(), decoder=decoder)
            return {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall}

    return work, {"kind": kind, "images": batches * batch, "chunks": len(source.sizes)}


def reading(arguments: argparse.Namespace, data: list[bytes]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"bytes": one, "path": None} for one in data]
        pq.write_table(pa.table({"image": rows}), Path(folder) / "train.parquet", row_group_size=100)
        for decoder in ("exact", "fast"):
            variants = {
                kind: Variant(
                    build_epoch,
                    {"path": folder, "decoder": decoder, "kind": kind, "batch": min(64, len(data))},
                    environment={"OMP_NUM_THREADS": "1"},
                )
                for kind in ("memory", "loader")
            }
            run = run_rounds(
                variants, rounds=arguments.rounds, seconds=arguments.seconds / 4, quiet=arguments.quiet, say=say
            )
            if not run.kept:
                say("no round was quiet: nothing to report (see --quiet)")
                continue
            cost = paired_ratio(run.values("loader", "cpu"), run.values("memory", "cpu"))
            say(
                f"decoder {decoder}: the loader takes {cost.median:.3f} [{cost.low:.3f}, {cost.high:.3f}] n={cost.n} "
                "times the CPU of the same samples from memory"
            )
            found[decoder] = {"loader_over_memory_cpu": cost.to_dict(), **readings_record(run)}
    return found


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--limit", type=int, default=1000, help="pictures to use")
    parser.add_argument("--chunk", type=int, default=100, help="pictures in a round")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="all unless said")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="how many at once: 1, or 1 2")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=600.0, help="for each number of threads")
    parser.add_argument("--quiet", type=float, default=QUIET, help="see rounds.py; 0 keeps all rounds")
    parser.add_argument("--skip-reading", action="store_true", help="leave out the last part")
    parser.add_argument("--out", type=Path, default=None, help="append one JSON line per variant")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe_machine(PACKAGES)
    say(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']}; {machine['versions']}")
    data = read_jpegs(arguments.images, arguments.limit)
    same = verify(data)
    records = []
    for hands in arguments.threads:
        run, ratios = transforms(arguments, hands)
        every = readings_record(run)
        for label, ratio in ratios.items():
            readings = [one[label] for one in every["readings"]]
            records.append({"part": "transforms", "variant": label} | run.facts[label] | ratio | {"readings": readings})
    if not arguments.skip_reading:
        records += [{"part": "reading", "decoder": k} | v for k, v in reading(arguments, data).items()]
    if arguments.out is not None:
        for record in records:
            write_record(arguments.out, machine | {"same": same, "quiet": arguments.quiet} | record)


if __name__ == "__main__":
    main()
