"""What a pretrained encoder is worth: every protocol on real images, several seeds, at one fine-tuning budget.

    python benchmarks/protocols.py pretrain --cifar10 DIR --birds DIR --out DIR     the two encoders
    python benchmarks/protocols.py run --cifar10 DIR --birds DIR --out DIR          every protocol, every seed
    python benchmarks/protocols.py report --out DIR                                 table, plot and record

Everything is a run of `hf-mae`, as a user would start it, on one thread each and `--jobs` at a time; a run that is
finished is passed over, so all three can be killed and started again.

Sizes: the encoders are pretrained without labels on all training images (CIFAR-10 50,000 of 32 px; birds 3,171 at 64
px). The classifiers learn from 5,000 labelled CIFAR-10 images (500 a class) or all 3,171 of birds (72 species) and are
tested on the whole test split (10,000; 720) after the last update: no epoch is picked. Scratch, fine-tuning and partial
fine-tuning have the same updates, batch, augmentation and schedule; the layer-wise decay of the lr is off from scratch,
as in the paper. All seeds start from the one encoder of their data set; nearest neighbours and logistic regression on
its features depend on nothing else, so they have no deviation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rounds import describe_machine

from hf_mae.evaluation.charts import draw_partial, draw_protocols
from hf_mae.training.monitors import read_rows

# ViT-N: 96 wide, 6 blocks, 3 heads; 64 patches in both data sets.
SIZE = {"cifar10": [], "birds": ["--model.image-size", "64", "--model.patch-size", "8", "--data.decoder", "fast"]}
PRETRAIN = {
    "cifar10": ["--epochs", "30", "--schedule.warmup-epochs", "2"],
    "birds": ["--epochs", "300", "--schedule.warmup-epochs", "20", "--evals.crop-pct", "0.875"],
}
CROP = {"cifar10": ["--evals.crop-pct", "1"], "birds": []}  # images of CIFAR have the input's size
EPOCHS = {"cifar10": 15, "birds": 20}
LABELLED = {"cifar10": 500, "birds": None}
"""Labelled training images of each class; None is all."""
SCRATCH = ["--model.patch-size", "{patch}", "--model.image-size", "{size}", "--model.hidden-size", "96"]
SCRATCH += ["--model.num-hidden-layers", "6", "--model.num-attention-heads", "3", "--optim.layer-decay", "1"]
SCRATCH += ["--model.head-init-std", "0.02"]  # the run of 2026-11-22 had 2e-5
PROTOCOLS: dict[str, list[str]] = {
    "scratch": ["finetune", "finetune-small", *SCRATCH],
    "fine-tune": ["finetune", "finetune-small", "--init-from", "{encoder}"],
    "2 blocks": ["finetune", "finetune-small", "--init-from", "{encoder}", "--trainable-blocks", "2"],
    "1 block": ["finetune", "finetune-small", "--init-from", "{encoder}", "--trainable-blocks", "1"],
    "0.5 block": ["finetune", "finetune-small", "--init-from", "{encoder}", "--trainable-blocks", "0.5"],
    "0 blocks": ["finetune", "finetune-small", "--init-from", "{encoder}", "--trainable-blocks", "0"],
    "probe": ["probe", "probe-small", "--init-from", "{encoder}", "--cached-features"],
}
FROM_PROBE = {"kNN": "knn_top1", "kNN, plain": "knn_plain_top1", "logistic": "logistic_top1"}
"""Protocols whose numbers are by-products of the probe's run."""
COMMON = [
    "--evals.split",
    "test",
    "--evals.no-pictures",
    "--eval-every",
    "0",
    "--save-every",
    "200",
    "--num-workers",
    "1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pretrain", "run", "report"])
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--birds", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(PROTOCOLS))
    given = parser.parse_args()
    if given.what == "report":
        report(given.out)
        return
    data = {name: getattr(given, name) for name in SIZE}
    if missing := [name for name, path in data.items() if path is None]:
        parser.error(f"--{missing[0]} is needed")
    if given.what == "pretrain":
        jobs = [pretrain_command(name, path, given.out) for name, path in data.items()]
    else:
        labelled = {
            name: label(path, given.out / name / "labelled", limit) if (limit := LABELLED[name]) else path
            for name, path in data.items()
        }
        jobs = [
            protocol_command(name, path, protocol, seed, given.out)
            for seed, name, protocol in itertools.product(range(given.seeds), SIZE, given.only)
            for path in [labelled[name]]
        ]
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda job: start(*job), jobs))


def pretrain_command(name: str, path: Path, out: Path) -> tuple[Path, list[str]]:
    folder = out / name / "encoder"
    command = [
        "pretrain",
        "mae-vit-n-cifar10",
        "--data.path",
        str(path),
        "--out",
        str(folder),
        *SIZE[name],
        *PRETRAIN[name],
    ]
    command += ["--global-batch", "128", "--optim.base-lr", "2e-3", "--num-workers", "1", "--evals.probe"]
    return folder, [*command, "--log-every", "100", "--save-every", "1000", "--eval-every", "3000"]


def protocol_command(name: str, path: Path, protocol: str, seed: int, out: Path) -> tuple[Path, list[str]]:
    folder = out / name / protocol.replace(" ", "_") / f"seed_{seed}"
    values = {"encoder": str(out / name / "encoder"), "patch": {"cifar10": 4, "birds": 8}[name]}
    values["size"] = {"cifar10": 32, "birds": 64}[name]
    command = [part.format(**values) for part in PROTOCOLS[protocol]]
    command += ["--data.path", str(path), "--out", str(folder), "--seed", str(seed), *COMMON, *CROP[name]]
    if protocol != "probe":
        command += ["--epochs", str(EPOCHS[name]), "--augment.mixup", "0", "--augment.cutmix", "0"]
    if name == "birds":
        command += ["--data.decoder", "fast"]
    return folder, command


def start(folder: Path, arguments: list[str]) -> None:
    """Run `hf-mae` on one thread; its output goes to a file beside the run folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (folder.parent / f"{folder.name}.done").exists():
        return
    began = time.time()
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "hf_mae.cli", *arguments], check=True, stderr=log, env=environment)
    record = {"command": ["hf-mae", *arguments], "seconds": round(time.time() - began, 1)}
    (folder.parent / f"{folder.name}.done").write_text(json.dumps(record) + "\n")
    print(f"{folder}: {record['seconds']:.0f} s", flush=True)


def label(path: Path, folder: Path, limit: int) -> Path:
    """Write the first `limit` training images of each class, and the whole test split, to a folder; return it."""
    if (folder / "test.parquet").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.concat_tables(pq.read_table(file) for file in sorted(path.glob("train-*.parquet")))
    seen: dict[int, int] = {}
    rows = []
    for row, value in enumerate(table["label"].to_pylist()):
        if seen.setdefault(value, 0) < limit:
            seen[value] += 1
            rows.append(row)
    pq.write_table(table.take(rows), folder / "train.parquet", row_group_size=100)
    test = pa.concat_tables(pq.read_table(file) for file in sorted(path.glob("test-*.parquet")))
    pq.write_table(test, folder / "test.parquet", row_group_size=100)
    return folder


def report(out: Path) -> None:
    """Print the table; write plot and record beside the runs."""
    values: dict[tuple[str, str], list[float]] = {}
    seconds: dict[str, float] = {}
    for done in sorted(out.glob("*/*/seed_*.done")):
        name, protocol = done.parts[-3], done.parts[-2].replace("_", " ")
        rows = read_rows(done.with_suffix("") / "metrics.jsonl")
        seconds[name] = seconds.get(name, 0.0) + json.loads(done.read_text())["seconds"]
        values.setdefault((name, protocol), []).append([row["top1"] for row in rows if "top1" in row][-1])
        if protocol == "probe" and done.stem == "seed_0":  # the encoder and the data are the same for all seeds
            for title, key in FROM_PROBE.items():
                values[name, title] = [row[key] for row in rows if key in row][:1]
    rows_out: list[dict[str, Any]] = []
    order = [*PROTOCOLS, *FROM_PROBE]
    for (name, protocol), found in sorted(values.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        sd = statistics.stdev(found) if len(found) > 1 else None
        rows_out.append(
            {"data": name, "protocol": protocol, "mean": statistics.fmean(found), "sd": sd, "values": found}
        )
        deviation = "" if sd is None else f" +- {100 * sd:.2f}"
        print(f"| {name} | {protocol} | {100 * rows_out[-1]['mean']:.2f}{deviation} | {len(found)} |")
    machine = describe_machine()
    record = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "seconds": seconds, "rows": rows_out}
    (out / "protocols.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_protocols(rows_out, out / "protocols.png")
    blocks = {"probe": 0.0, "0.5 block": 0.5, "1 block": 1.0, "2 blocks": 2.0, "fine-tune": 6.0}
    points: dict[str, list[tuple[float, float, float | None]]] = {}
    for row in rows_out:
        if row["protocol"] in blocks:
            points.setdefault(row["data"], []).append((blocks[row["protocol"]], row["mean"], row["sd"]))
    draw_partial(
        {name: sorted(found) for name, found in points.items()}, out / "partial.png", depth=6, zero="linear probe"
    )
    print(f"core-seconds: {seconds}; {out / 'protocols.json'}, {out / 'protocols.png'}, {out / 'partial.png'}")


if __name__ == "__main__":
    main()
