"""From encoded images to the training loop: what handing batches over costs, who waits, and whether memory stays flat.

    python benchmarks/loop.py --images DIR                                  all three parts
    python benchmarks/loop.py handover --images DIR --rounds 12 --seconds 900
    python benchmarks/loop.py end-to-end --images DIR --steps 12 --rounds 3
    python benchmarks/loop.py memory --images DIR --epochs 10

handover: CPU time per image, child processes included, of the same batches decoded in the calling thread, by threads
and by processes, and by a plain loop over bytes in memory ("alone": no reading, no order, no batches). Each reading is
the difference of a long and a short run of a new loader, so that starting, the first touch of buffers and ending
cancel. Variants run side by side as `rounds.py` describes.

end-to-end: the real `pretrain`, in new processes: images/s and the share of wall time spent waiting for data, of the
rows of metrics.jsonl behind the first. Where the model runs on the CPU, decoders take its cores: what data costs is
seen against "no data", the same run on its first batch again and again.

memory: resident memory of `pretrain` with a tiny model at every batch, over epochs of streamed data.

DIR is a folder of Parquet files, or of images, of which at most --limit are written to Parquet first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rounds import (
    QUIET,
    Variant,
    Work,
    call_apart,
    compare,
    describe_machine,
    readings_record,
    run_rounds,
    table,
    write_record,
)

import hf_mae.pretrain
import hf_mae.run
from hf_mae.data.augment import NUM_UNIFORMS, sample_pixels
from hf_mae.data.images import EXTENSIONS
from hf_mae.data.loader import Batch, Loader
from hf_mae.data.order import Order, choose_lanes_and_window, uniforms
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import Augment, Data, Evals, Model, Optim, Recipe, Schedule
from hf_mae.recipes.mae import PRESETS
from hf_mae.training.memory import keep_freed_memory

PACKAGES = ("torch", "torchvision", "pillow", "simplejpeg", "pyarrow", "numpy", "transformers", "accelerate")
NO_EVALS = Evals(pictures=0, knn=False, rankme=False, probe=False, at_start=False)


def as_parquet(images: Path, folder: Path, limit: int) -> str:
    """Return a folder of Parquet files with these images."""
    if any(images.rglob("*.parquet")):
        return str(images)
    files = sorted(f for f in images.rglob("*") if f.suffix.lower() in EXTENSIONS)[:limit]
    if not files:
        raise SystemExit(f"--images {images} holds neither Parquet files nor images")
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": rows}), folder / "train-00000-of-00001.parquet", row_group_size=50)
    return str(folder)


# ------------------------------------------------------------------------------------------------ handing over


def build_handover(
    path: str, kind: str, workers: int, decoder: Any, batch: int, batches: int, keep_freed: bool
) -> tuple[Work, dict[str, Any]]:
    """Return a unit of work that makes `batches` batches and tells the CPU milliseconds per image."""
    if keep_freed:
        keep_freed_memory()
    data = Data(path=path)
    source = open_source(data)
    lanes, window = choose_lanes_and_window(source.sizes, source.bytes_per_row, data)
    short = min(6, batches // 2)

    def load(count: int) -> None:
        options: dict[str, Any] = {"augment": Augment(), "image_size": (224, 224), "channels": 3, "decoder": decoder}
        # So few ahead that even the short run has been through all slots of shared memory: what is measured is the
        # steady state, not the first touch of each page.
        options["depth"] = 2
        order = Order(source.sizes, 3, lanes, window)
        with Loader(
            source, order, global_batch=batch, stop=count, num_workers=workers, worker_kind=kind, **options
        ) as loader:
            for _ in loader:
                pass

    if kind == "alone":
        n = batch * batches
        epochs, positions = np.divmod(np.arange(n), int(source.sizes.sum()))
        places = Order(source.sizes, 3, lanes, window).locate(epochs, positions)
        chunks = {int(c): source.read(int(c)) for c in np.unique(places.chunks)}
        pairs = zip(places.chunks.tolist(), places.rows.tolist(), strict=True)
        encoded = [bytes(chunks[c].images[r] or b"") for c, r in pairs]
        del chunks
        draws = uniforms(NUM_UNIFORMS, 3, epochs, positions)[:, None]

        def load(count: int) -> None:
            for start in range(0, batch * count, batch):
                out = torch.empty(batch, 1, 3, 224, 224, dtype=torch.uint8).numpy()
                for i in range(batch):
                    sample_pixels(encoded[start + i], draws[start + i], out[i], Augment(), decoder=decoder)

    def work() -> dict[str, float]:
        spent = []
        for count in (short, batches):
            before, faults = cpu_and_faults()
            load(count)
            after, faults_now = cpu_and_faults()
            spent.append((after - before, faults_now - faults))
        images = batch * (batches - short)
        ms, faults = (1000 * (spent[1][0] - spent[0][0]) / images, (spent[1][1] - spent[0][1]) / images)
        return {"cpu_ms": ms, "faults": faults, "start_ms": 1000 * spent[0][0] - ms * batch * short}

    return work, {"kind": kind, "workers": workers, "decoder": decoder}


def cpu_and_faults() -> tuple[float, int]:
    """Return CPU seconds and page faults of this process and of the children it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in both), sum(u.ru_minflt for u in both)


def handover(path: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    kinds = {"alone": ("alone", 0), "inline": ("thread", 0)}
    for workers in arguments.workers:
        kinds |= {f"threads {workers}": ("thread", workers), f"processes {workers}": ("process", workers)}
    records = []
    for decoder in arguments.decoders:
        fixed = {
            "path": path,
            "decoder": decoder,
            "batch": arguments.batch,
            "batches": arguments.batches,
            "keep_freed": not arguments.plain_malloc,
        }
        variants = {
            name: Variant(
                build_handover, fixed | {"kind": kind, "workers": workers}, environment={"OMP_NUM_THREADS": "1"}
            )
            for name, (kind, workers) in kinds.items()
        }
        run = run_rounds(
            variants,
            rounds=arguments.rounds,
            seconds=arguments.seconds / len(arguments.decoders),
            warmup=1,
            quiet=arguments.quiet,
        )
        if not run.kept:
            print(f"{decoder}: no round was quiet")
            continue
        # compare() gives cost of the other over cost of the named one.
        inline, alone = compare(run, "inline", "cpu_ms"), compare(run, "alone", "cpu_ms")
        rows = [["decoder " + decoder, "CPU ms/image", "over inline", "over decoding alone", "faults", "start ms"]]
        for name in kinds:
            values = [statistics.median(run.values(name, measure)) for measure in ("cpu_ms", "faults", "start_ms")]
            cells = [f"{r.median:.3f} [{r.low:.3f}, {r.high:.3f}] n={r.n}" if r else "1" for r in
                     (inline.get(name), alone.get(name))]  # fmt: skip
            rows.append([name, f"{values[0]:.3f}", *cells, f"{values[1]:.0f}", f"{values[2]:.0f}"])
        print(table(rows))
        records.append(
            {
                "part": "handover",
                "decoder": decoder,
                "keep_freed_memory": not arguments.plain_malloc,
                "over_inline": {name: ratio.to_dict() for name, ratio in inline.items()},
                "over_alone": {name: ratio.to_dict() for name, ratio in alone.items()},
                **readings_record(run),
            }
        )
    return records


# ------------------------------------------------------------------------------------------------ end to end


class Watched(Loader):
    """A loader that notes resident memory at every batch, and what it was told."""

    seen: list[tuple[int, int]]
    told: dict[str, Any]
    first: Batch | None = None
    again = False
    """Whether to give the first batch for ever."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        super().__init__(*positional, **named)
        Watched.seen, Watched.told, Watched.first = [], named, None

    def __next__(self) -> Batch:
        if Watched.again and Watched.first is not None:
            return Watched.first
        batch = Watched.first = super().__next__()
        Watched.seen.append((int(batch.epochs[-1]), psutil.Process().memory_info().rss))
        return batch


def tiny(recipe: Recipe) -> Recipe:
    """Make model and pictures so small that decoding is the limit."""
    small = Model(
        image_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    )
    return replace(recipe, model=small, optim=Optim())


def train(recipe: Recipe, again: bool = False) -> dict[str, Any]:
    """Run `pretrain`; return the clock columns of metrics.jsonl without its first row, and the memory of each batch."""
    hf_mae.run.Loader = Watched  # type: ignore[attr-defined]
    Watched.again = again
    began = time.perf_counter()
    out = hf_mae.pretrain.pretrain(recipe)
    seconds = time.perf_counter() - began
    for name in ("decoder", "repeats"):
        if Watched.told.get(name) != getattr(recipe.data, name):
            raise RuntimeError(f"pretrain did not hand data.{name} to the loader: nothing is measured")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "waiting_share" in row]
    steps = np.diff([row["step"] for row in rows])
    images = int(steps.sum()) * recipe.global_batch
    took = sum(int(s) * recipe.global_batch / row["images_per_second"] for s, row in zip(steps, rows[1:], strict=True))
    waited = sum(row["seconds_waiting_for_data"] for row in rows[1:])
    return {
        "images_per_second": images / took,
        "waiting_share": waited / took,
        "measured_seconds": took,
        "whole_run_seconds": seconds,
        "memory": Watched.seen,
    }


def suggestion(name: str, found: dict[str, dict[str, float]]) -> str:
    """Say what would help, from the runs of this script alone."""
    model = name.split(",")[0]
    others = {n: v["images_per_second"] for n, v in found.items() if n.split(",")[0] == model and "repeats" not in n}
    limit = others.pop(f"{model}, no data")
    if name not in others or found[name]["images_per_second"] > 0.97 * limit:
        return "nothing: the model is the limit"
    best = max(others, key=others.__getitem__)
    gain = others[best] / others[name]
    more = "more cores, or --data.repeats (changes training)"
    return f"{best}: x{gain:.2f} images/s here" if best != name and gain > 1.03 else more


def end_to_end(path: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    base = replace(
        PRESETS["mae-vit-s"],
        global_batch=arguments.global_batch,
        max_steps=arguments.steps,
        log_every=2,
        save_every=0,
        eval_every=0,
        evals=NO_EVALS,
        data=Data(path=path, label_column="none"),
    )
    little = replace(tiny(base), max_steps=10 * arguments.steps, log_every=10)

    def using(recipe: Recipe, num_workers: int, **data: Any) -> Recipe:
        return replace(recipe, num_workers=num_workers, data=replace(recipe.data, **data))

    settings = {
        "ViT-S, no data": using(base, 1),
        "ViT-S, exact, 2 threads": using(base, 2),
        "ViT-S, fast, 2 threads": using(base, 2, decoder="fast"),
        "ViT-S, exact, inline": using(base, 0),
        "tiny, no data": using(little, 1),
        "tiny, exact, 2 threads": using(little, 2),
        "tiny, fast, 2 threads": using(little, 2, decoder="fast"),
        "tiny, fast, 2 processes": using(little, 2, decoder="fast", workers="process"),
        "tiny, fast, 2 threads, repeats 2": using(little, 2, decoder="fast", repeats=2),
        "tiny, exact, inline": using(little, 0),
    }
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    began = time.monotonic()
    for number in range(arguments.rounds):
        names = list(settings) if number % 2 == 0 else list(settings)[::-1]
        for name in names:
            with tempfile.TemporaryDirectory() as out:
                recipe = replace(settings[name], out=str(Path(out) / "run"))
                result = call_apart(train, recipe=recipe, again="no data" in name)
            del result["memory"]
            taken[name].append(result | {"load": round(os.getloadavg()[0], 2)})
            print(f"{name}: {result['images_per_second']:.1f} images/s, {result['waiting_share']:.1%} waiting")
        elapsed = time.monotonic() - began
        if elapsed + elapsed / (number + 1) > arguments.seconds:
            break
    found = {
        name: {m: statistics.median(r[m] for r in results) for m in ("images_per_second", "waiting_share")}
        for name, results in taken.items()
    }
    for name, v in found.items():
        v["lost_to_data"] = 1 - v["images_per_second"] / found[name.split(",")[0] + ", no data"]["images_per_second"]
    rows = [["run", "images/s", "waiting for data", "slower than without data", "runs", "what would help"]]
    for name, v in found.items():
        shares = f"{v['waiting_share']:.1%}", f"{v['lost_to_data']:.1%}"
        rows.append([name, f"{v['images_per_second']:.1f}", *shares, str(len(taken[name])), suggestion(name, found)])
    print(table(rows))
    return [
        {
            "part": "end-to-end",
            "threads": torch.get_num_threads(),
            "global_batch": arguments.global_batch,
            "median": found,
            "help": {name: suggestion(name, found) for name in found},
            "runs": taken,
        }
    ]


# ------------------------------------------------------------------------------------------------ memory


def memory(path: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    recipe = replace(
        tiny(PRESETS["mae-vit-s"]),
        global_batch=arguments.global_batch,
        epochs=float(arguments.epochs),
        max_steps=None,
        schedule=Schedule(warmup_epochs=1),
        log_every=10,
        save_every=0,
        eval_every=0,
        evals=NO_EVALS,
        # A window that is smaller than the data, so that chunks come and go as in a long run.
        data=Data(path=path, label_column="none", decoder="fast", window_rows=256),
    )
    with tempfile.TemporaryDirectory() as out:
        seen = call_apart(train, recipe=replace(recipe, out=str(Path(out) / "run")))["memory"]
    epochs = sorted({epoch for epoch, _ in seen})
    of_epoch = {epoch: [rss / 1e6 for e, rss in seen if e == epoch] for epoch in epochs}
    peaks = [max(of_epoch[e]) for e in epochs]
    means = [statistics.fmean(of_epoch[e]) for e in epochs]
    rows = [["epoch", "batches", "peak MB", "mean MB"]]
    for e, peak, mean in zip(epochs, peaks, means, strict=True):
        rows.append([str(e + 1), str(len(of_epoch[e])), f"{peak:.1f}", f"{mean:.1f}"])
    print(table(rows))
    growth = {"peak": peaks[-1] / peaks[1] - 1, "mean": means[-1] / means[1] - 1} if len(peaks) > 2 else {}
    print("growth from epoch 2 to the last: " + ", ".join(f"{name} {g:+.2%}" for name, g in growth.items()))
    return [{"part": "memory", "peak_mb": peaks, "mean_mb": means, "growth": growth, "images": len(seen)}]


def main() -> None:
    parts: dict[str, Callable[[str, argparse.Namespace], list[dict[str, Any]]]] = {
        "handover": handover,
        "end-to-end": end_to_end,
        "memory": memory,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images or of Parquet files")
    parser.add_argument("--limit", type=int, default=1000, help="images taken from a folder of images")
    parser.add_argument("--rounds", type=int, default=10, help="at most, in each part")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end each part after about this long")
    parser.add_argument("--quiet", type=float, default=QUIET, help="handover: see rounds.py; 0 keeps busy rounds")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2], help="handover: numbers of decoders")
    parser.add_argument("--decoders", nargs="*", default=["exact", "fast"], help="handover: data.decoder")
    parser.add_argument("--batch", type=int, default=64, help="handover: images in a batch")
    parser.add_argument("--batches", type=int, default=20, help="handover: batches of a long run")
    parser.add_argument("--plain-malloc", action="store_true", help="handover: without engine.keep_freed_memory")
    parser.add_argument("--global-batch", type=int, default=32, help="end-to-end and memory")
    parser.add_argument("--steps", type=int, default=12, help="end-to-end: updates of ViT-S; tiny makes ten times that")
    parser.add_argument("--epochs", type=int, default=10, help="memory: passes over the data")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    with tempfile.TemporaryDirectory() as folder:
        path = as_parquet(arguments.images, Path(folder), arguments.limit)
        for name in arguments.parts or parts:
            machine = describe_machine(PACKAGES)
            print(f"{name}, load {machine['load'][0]}")
            for record in parts[name](path, arguments):
                if arguments.out is not None:
                    write_record(arguments.out, machine | record)


if __name__ == "__main__":
    main()
