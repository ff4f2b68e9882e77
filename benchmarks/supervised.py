"""The supervised recipes on real images: the slides' bird classifier, as printed and corrected, and A3 in miniature.

    python benchmarks/supervised.py run --birds DIR --cifar10 DIR --out DIR [--encoder DIR]
    python benchmarks/supervised.py report --out DIR

Every job is a command of `hf-mae`, or a sweep of it, on one thread, `--jobs` at a time; a run that is finished is
passed over, so both can be killed and started again. The CPU time of each job is that of its processes (`wait4`).

Sizes. Birds: 72 species, the 3,171 training images divided by the rule of the recipe, tested on 720 that nothing
learns from; batches of 128 and the lr of the recipe, stages at 64 px, sweeps at 32 px. CIFAR-10: 1,000 a class, tested
on all 10,000; ResNet-10-T, 24 px in training and 32 px in testing, the proportion of A3's 160 and 224. No epoch is
picked but where the slides do it, on their validation split. Seeds change weights, order and augmentation; the parts
of the data stay.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from protocols import label
from rounds import describe_machine

from hf_mae.evaluation.charts import draw_variants
from hf_mae.recipes.base import Recipe
from hf_mae.recipes.classification import ClassifierOptim, Loss
from hf_mae.recipes.supervised import BIRD_AUGMENTS, SUPERVISE, SuperviseRecipe
from hf_mae.sweep import sweep_over, sweep_variants

STAGES = 300
"""Updates of stages 1 to 8, at 64 px."""
SWEEP = 200
"""Updates of a run of the sweeps of birds, at 32 px."""
BATCH = 128
CIFAR_EPOCHS = 5
LABELLED = 1000
"""Training images of each class of CIFAR-10."""
VARIANTS = ("published-effective", "published-intended", "corrected")
SWEEPS = ("augment", "rotation", "smoothing", "cifar")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "report", *SWEEPS])
    parser.add_argument("--birds", type=Path)
    parser.add_argument("--cifar10", type=Path)
    parser.add_argument("--encoder", type=Path, help="a run of `hf-mae pretrain` on the birds at 64 px")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    if given.what == "report":
        report(given.out)
    elif given.what == "run":
        if given.birds is None or given.cifar10 is None:
            parser.error("--birds and --cifar10 are needed")
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(lambda job: start(*job), jobs(given)))
    else:
        sweep(given.what, given)


# ------------------------------------------------------------------------------------------------ jobs


def jobs(given: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """Return (folder, command) of every job."""
    label(given.cifar10, given.out / "cifar10", LABELLED)
    found: list[tuple[Path, list[str]]] = []
    data = [
        "--data.path",
        str(given.birds),
        "--data.decoder",
        "fast",
        "--num-workers",
        "1",
        "--global-batch",
        str(BATCH),
    ]
    length = ["--max-steps", str(STAGES), "--save-every", "100", "--log-every", "10", "--evals.no-pictures"]
    for seed in range(given.seeds):
        for variant in VARIANTS:
            folder = given.out / "birds" / variant / f"seed_{seed}"
            command = ["-m", "hf_mae.cli", "birds", variant, *data, *length, "--model.image-size", "64"]
            command += ["--eval-every", "22", "--seed", str(seed), "--out", str(folder)]
            if variant == "corrected":  # its own test part would be smaller, and another one than the others'
                command += ["--data.splits", "stratified:90/10@3334"]
            if seed == 0 and variant != "published-intended":
                command += ["--find-lr", "ascending" if variant == "corrected" else "descending"]
            found.append((folder, command))
        folder = given.out / "birds" / "efficientnet" / f"seed_{seed}"
        command = ["-m", "hf_mae.cli", "supervise", "efficientnet-b0-birds", *data, *length, "--model.image-size", "64"]
        command += ["--data.splits", "stratified:90/10@3334", "--evals.split", "test", "--eval-every", "0"]
        found.append((folder, [*command, "--seed", str(seed), "--out", str(folder)]))
        if given.encoder is not None:
            folder = given.out / "birds" / "mae" / f"seed_{seed}"
            command = [
                "-m",
                "hf_mae.cli",
                "finetune",
                "finetune-small",
                "--init-from",
                str(given.encoder),
                *data,
                *length,
            ]
            command += ["--data.splits", "stratified:90/10@3334", "--evals.split", "test", "--eval-every", "0"]
            command += ["--augment.mixup", "0", "--augment.cutmix", "0", "--seed", str(seed), "--out", str(folder)]
            found.append((folder, command))
    for what in SWEEPS:
        command = [__file__, what, "--out", str(given.out), "--seeds", str(given.seeds)]
        found.append((given.out / what, [*command, "--birds", str(given.birds), "--cifar10", str(given.cifar10)]))
    return sorted(found, key=lambda job: job[0].parent.name == "efficientnet")


def start(folder: Path, arguments: list[str]) -> None:
    """Run Python on one thread; its output goes to a file beside the run folder, its time into another."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.parent / f"{folder.name}.done"
    if done.exists():
        return
    began = time.time()
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = {"wall": round(time.time() - began, 1), "cpu": round(usage.ru_utime + usage.ru_stime, 1)}
    print(f"{folder}: status {status}, {seconds}", flush=True)
    if status == 0:
        done.write_text(json.dumps({"command": arguments, **seconds}) + "\n")


# ------------------------------------------------------------------------------------------------ sweeps


def sweep(what: str, given: argparse.Namespace) -> None:
    """Run one sweep in this process."""
    out, seeds = given.out / what, given.seeds
    if what == "cifar":
        sweep_variants(
            cifar(label(given.cifar10, given.out / "cifar10", LABELLED)),
            seeds=seeds,
            out=out,
            title="A3 in miniature, CIFAR-10",
        )
        return
    if what == "smoothing":
        recipe = small(SUPERVISE["rexnet-birds-published-effective"], given.birds)
        recipe = replace(recipe, out=str(out))
        sweep_over(recipe, "augment.label_smoothing", [0.0, 0.02, 0.06, 0.08], seeds=seeds)
        return
    recipe = small(SUPERVISE["rexnet-birds-corrected"], given.birds)
    recipe = replace(recipe, data=replace(recipe.data, splits="stratified:90/10@3334"))
    variants: dict[str, Recipe] = {}
    if what == "rotation":
        base = recipe.augment
        variants["sum of 15 and 25"] = recipe
        variants["one of 40"] = replace(recipe, augment=replace(base, rotate=(40.0,), rotate_once=False))
        variants["15 and 25"] = replace(recipe, augment=replace(base, rotate_once=False))
        black = replace(base, rotate_once=False, rotate_resample="nearest", rotate_fill="black")
        variants["15 and 25, black"] = replace(recipe, augment=black)
    else:
        for name, augment in BIRD_AUGMENTS.items():
            if name not in ("a", "e", "rand-augment"):  # (b) at another size; (f) with larger angles
                variants[name] = replace(recipe, augment=augment)
    sweep_variants(variants, seeds=seeds, out=out, title=f"birds at 32 px: {what}")


def small(recipe: SuperviseRecipe, birds: Path) -> SuperviseRecipe:
    """Return a bird recipe at 32 px, measured on the test split after its last update."""
    return replace(
        recipe,
        seed=0,
        max_steps=SWEEP,
        global_batch=BATCH,
        num_workers=1,
        log_every=20,
        save_every=100,
        eval_every=0,
        data=replace(recipe.data, path=str(birds), decoder="fast"),
        model=replace(recipe.model, image_size=32),
        optim=replace(recipe.optim, ema_decay=None, ema_warmup=False),
        evals=replace(recipe.evals, split="test", best="top1", pictures=False),
    )


def cifar(folder: Path) -> dict[str, Recipe]:
    """Return A3 at 24 and 32 px, and one ingredient changed at a time."""
    preset = SUPERVISE["resnet50-a3"]
    batch = 128
    a3 = replace(
        preset,
        name="a3-miniature",
        epochs=CIFAR_EPOCHS,
        global_batch=batch,
        num_workers=1,
        log_every=50,
        save_every=200,
        eval_every=0,
        data=replace(preset.data, path=str(folder), remainder="carry", decoder="fast"),
        model=replace(preset.model, architecture="resnet10t", image_size=24, test_image_size=32, crop_pct=1.0),
        # 8e-3 at 2,048 would be 5e-4 at 128 in proportion; LAMB's lr is kept, as its updates are scaled by the weights.
        optim=replace(preset.optim, base_lr=8e-3 * 256 / batch),
        schedule=replace(preset.schedule, warmup_epochs=1, per_epoch=False),  # an epoch is a fifth of the run
        evals=replace(preset.evals, split="test", pictures=False),
    )
    adamw = ClassifierOptim(base_lr=2e-3 * 256 / batch, weight_decay=0.05)
    return {
        "A3 (BCE, LAMB)": a3,
        "cross-entropy": replace(a3, loss=Loss()),
        "repeated augmentation": replace(a3, data=replace(a3.data, repeat_augment=3)),
        "AdamW": replace(a3, optim=adamw),
    }


# ------------------------------------------------------------------------------------------------ report


def report(out: Path) -> None:
    """Print the tables; write record and plot beside the runs."""
    times = {str(done.relative_to(out).with_suffix("")): json.loads(done.read_text()) for done in out.rglob("*.done")}
    rows: dict[str, list[float]] = {}
    for file in sorted((out / "birds").glob("*/seed_*/birds.json")):
        for stage, found in json.loads(file.read_text())["results"].items():
            rows.setdefault(f"{file.parts[-3]}: {stage}", []).append(found["test"])
    for kind in ("efficientnet", "mae"):
        for file in sorted((out / "birds" / kind).glob("seed_*/metrics.jsonl")):
            measured = [json.loads(line) for line in file.read_text().splitlines()]
            metric = "ema_top1" if kind == "efficientnet" else "top1"
            rows.setdefault(kind, []).extend([row[metric] for row in measured if metric in row][-1:])
    sweeps = {
        name: {key: summary([run["last"] for run in row["runs"]]) for key, row in values.items()}
        for name in SWEEPS
        if (out / name / "sweep.json").exists()
        for values in [json.loads((out / name / "sweep.json").read_text())["values"]]
    }
    rows = {name: values for name, values in rows.items() if values}
    table = {name: summary(values) for name, values in rows.items()}
    print("| birds at 64 px, test top-1 | mean | sd | runs |\n|---|---|---|---|")
    for name, row in table.items():
        print(f"| {name} | {row['mean']:.4f} | {row['sd']:.4f} | {len(row['values'])} |")
    for name, values in sweeps.items():
        print(f"\n| {name} | mean | sd | runs |\n|---|---|---|---|")
        for key, row in values.items():
            print(f"| {key} | {row['mean']:.4f} | {row['sd'] or float('nan'):.4f} | {len(row['values'])} |")
    cpu = sum(row["cpu"] for row in times.values())
    print(f"\nCPU seconds: {cpu:.0f}, of two cores {cpu / 120:.0f} minutes")
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_machine() | {"command": "supervised.py run"},
        "birds": table,
    }
    record |= {"sweeps": sweeps, "seconds": {name: {k: row[k] for k in ("wall", "cpu")} for name, row in times.items()}}
    (out / "supervised.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_variants(rows, out / "birds.png", title="birds at 64 px, 300 updates of 128", name="top1")


def summary(values: list[float]) -> dict[str, Any]:
    """Return mean, deviation and the values."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


if __name__ == "__main__":
    main()
