"""What the machinery costs: checkpoints of ViT-B, resuming, and the loop around a ViT-S step.

The loop's share is what is left of its wall time after forward, backward, optimizer and waiting for data, each timed
inside the real `fit`; one thread, so that the parts do not overlap.

    python benchmarks/overhead.py [--steps 40] [--batch 16] [--folder DIR]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from PIL import Image

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order, choose_lanes_and_window
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, Augment, Data, Recipe, to_dict
from hf_mae.recipes.mae import PRESETS
from hf_mae.training.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from hf_mae.training.loop import fit
from hf_mae.training.monitors import Monitor, Window
from hf_mae.training.optim import build_adamw
from hf_mae.training.schedules import make_plan
from hf_mae.training.signals import StopSignal
from hf_mae.training.tasks import Pretraining


def build(size: str, recipe: Recipe) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    task = Pretraining(MAEForPreTraining(MAEConfig.from_size(size, norm_pix_loss=True)), IMAGENET_MEAN, IMAGENET_STD)
    return accelerator, *accelerator.prepare(task, build_adamw(task, recipe.optim))


class Fixed:
    """The same batch again and again, at no cost."""

    seconds_waiting = 0.0

    def __init__(self, batch: int):
        g = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=g)
        self.values = {"pixel_values": pixels, "noise": torch.rand(batch, 196, generator=g)}
        self.cursor, self.bad = 0, []

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.values

    def count_bad(self, samples: list[Any]) -> None:
        assert not samples

    def __iter__(self):
        while True:
            self.cursor += 1
            yield self


def checkpoints(folder: Path) -> dict[str, Any]:
    recipe = PRESETS["mae-vit-b"]
    accelerator, task, optimizer = build("b", recipe)
    batch = Fixed(1).values
    task(batch)["loss"].backward()
    optimizer.step()
    times: dict[str, list[float]] = {"save": [], "verify": [], "load": []}
    for step in range(1, 4):
        start = time.perf_counter()
        save_checkpoint(
            folder,
            accelerator=accelerator,
            task=task,
            optimizer=optimizer.optimizer,
            average=None,
            state=TrainState(step=step),
            rank_state={},
            recipe=to_dict(recipe),
            data={},
            keep=1,
        )
        times["save"].append(time.perf_counter() - start)
        start = time.perf_counter()
        found, _ = newest_checkpoint(folder)
        times["verify"].append(time.perf_counter() - start)
        assert found is not None
        start = time.perf_counter()
        load_checkpoint(found, task=task, optimizer=optimizer.optimizer, average=None)
        times["load"].append(time.perf_counter() - start)
    size = sum(p.stat().st_size for p in found.rglob("*") if p.is_file()) / 1e6
    return {"MB": round(size), **{k: [round(t, 2) for t in v] for k, v in times.items()}}


def resume(folder: Path) -> dict[str, Any]:
    """Time to the first batch at the start and at 90 % of an epoch of ImageNet-sized metadata, with real footers."""
    source_folder = folder / "parquet"
    source_folder.mkdir()
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 128).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    rows, shards = 1_281_167, 294
    for shard in range(shards):
        n = rows // shards + (shard < rows % shards)
        table = pa.table({"image": [image] * n, "label": pa.array(np.arange(n) % 1000)})
        pq.write_table(table, source_folder / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=100)
    found: dict[str, Any] = {"MB": round(sum(p.stat().st_size for p in source_folder.iterdir()) / 1e6)}
    data = Data(path=str(source_folder))
    for name, share in (("at the start", 0.0), ("at 90 %", 0.9), ("at 90 % again", 0.9)):
        start = time.perf_counter()
        source = open_source(data)
        opened = time.perf_counter() - start
        order = Order(source.sizes, 0, *choose_lanes_and_window(source.sizes, source.bytes_per_row, data))
        loader = Loader(
            source,
            order,
            augment=Augment(),
            image_size=(8, 8),
            channels=3,
            global_batch=4096,
            cursor=int(share * rows / 4096),
            num_workers=2,
        )
        with loader:
            next(iter(loader))
        found[name] = {"open": round(opened, 2), "first batch": round(time.perf_counter() - start - opened, 2)}
        found["chunks"] = len(source.sizes)
    return found


def loop_share(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    recipe = replace(
        PRESETS["mae-vit-s"], max_steps=steps, global_batch=batch, log_every=20, save_every=0, eval_every=0
    )
    accelerator, task, optimizer = build("s", recipe)
    spent = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)

    def timed(name: str, call: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            value = call(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return value

        return inner

    task.forward = timed("forward", task.forward)
    accelerator.backward = timed("backward", accelerator.backward)
    optimizer.step = timed("optimizer", optimizer.step)
    optimizer.zero_grad = timed("optimizer", optimizer.zero_grad)
    monitor = Monitor(folder, step=-1, total_steps=steps, judge_from=steps, track="none", is_main=True, name="bench")
    stop = StopSignal(1)
    start = time.perf_counter()
    fit(
        task,
        optimizer,
        Fixed(batch),
        recipe=recipe,
        plan=make_plan(recipe, steps_per_epoch=100),
        micro_batch=batch,
        accelerator=accelerator,
        state=TrainState(),
        window=Window(torch.device("cpu")),
        monitor=monitor,
        stop=stop,
        save=lambda state, window: folder,
    )
    wall = time.perf_counter() - start
    monitor.close()
    stop.close()
    rest = wall - sum(spent.values())
    return {
        "steps": steps,
        "batch": batch,
        "ms per step": round(1000 * wall / steps, 1),
        **{f"{k} ms": round(1000 * v / steps, 2) for k, v in spent.items()},
        "the rest ms": round(1000 * rest / steps, 3),
        "the rest, share": round(rest / wall, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        (folder / "checkpoints").mkdir()
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
        versions = {"torch": torch.__version__, "numpy": np.__version__, "date": time.strftime("%F")}
        print(json.dumps(machine | versions))
        print(json.dumps({"resume, 1,281,167 rows in 294 shards, seconds": resume(folder)}))
        print(json.dumps({"checkpoint ViT-B, seconds": checkpoints(folder / "checkpoints")}))
        print(json.dumps({"loop around ViT-S": loop_share(folder, arguments.steps, arguments.batch)}))


if __name__ == "__main__":
    main()
