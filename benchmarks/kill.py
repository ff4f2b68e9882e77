"""The kill test: a run that is killed again and again ends with the same bits as one that never was.

The command line is started as a user would, killed with SIGKILL (launcher, ranks and workers at one moment) at
random moments, every third time inside a checkpoint write, and started again with the same command. At the end
weights, optimizer state and metrics must equal those of an uninterrupted run exactly; only clock columns may differ.

    python benchmarks/kill.py --data ../shared/data/cifar10 --kills 20 --workers 0 2 --processes 1 2
    python benchmarks/kill.py --data ../shared/data/cifar10 --commands finetune probe --steps 300

`finetune` has mixup, cutmix, averaged weights and stochastic depth; `probe` has LARS and batch statistics, on an
encoder of a few updates. Both keep the best model, which has to be equal as well.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
CLOCK = {"images_per_second", "eval_images_per_second", "seconds_waiting_for_data", "waiting_share"}
ENCODER = [
    "--model.image-size", "32", "--model.patch-size", "8", "--model.hidden-size", "32",
    "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2",
]  # fmt: skip
DECODER = [
    "--model.decoder-hidden-size", "16", "--model.decoder-num-hidden-layers", "1",
    "--model.decoder-num-attention-heads", "2",
]  # fmt: skip
COMMANDS = {
    "pretrain": [
        "mae-vit-n-cifar10", *ENCODER, *DECODER, "--evals.no-knn", "--evals.no-rankme", "--evals.pictures", "0"
    ],
    "finetune": [
        "scratch-small", *ENCODER, "--optim.ema-decay", "0.99", "--model.drop-path-rate", "0.2", "--evals.no-pictures",
        "--evals.best", "ema_top1",
    ],
    "probe": [
        "probe-small", "--optim.name", "lars", "--optim.base-lr", "5", "--evals.no-pictures", "--evals.no-knn",
        "--evals.no-logistic",
    ],
    "supervise": [
        "supervise-small", "--model.architecture", "test_resnet", "--model.image-size", "32", "--optim.name", "lamb",
        "--optim.ema-decay", "0.99", "--optim.ema-warmup", "--data.repeat-augment", "3", "--evals.no-pictures",
        "--evals.best", "ema_top1",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One way of running."""

    data: str
    workers: int = 0
    kind: str = "thread"
    processes: int = 1
    steps: int = 1200
    batch: int = 64
    save_every: int = 7
    what: str = "pretrain"
    """The command of `hf-mae`; `probe` needs `encoder` beside the run folder, see `prepare`."""

    def command(self, out: Path) -> list[str]:
        python = [sys.executable, "-m", "hf_mae.cli", self.what]
        if self.processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
            python = [sys.executable, *launch, str(ROOT / "scripts" / f"{self.what}.py")]
        return [
            *python, *COMMANDS[self.what], "--data.path", self.data, "--out", str(out),
            *(["--init-from", str(out.parent / "encoder")] if self.what == "probe" else []),
            "--max-steps", str(self.steps), "--global-batch", str(self.batch), "--micro-batch", str(self.batch // 2),
            "--num-workers", str(self.workers), "--data.workers", self.kind, "--data.window-rows", "2000",
            "--save-every", str(self.save_every), "--log-every", "5",
            "--eval-every", "0" if self.what == "pretrain" else str(self.steps // 3),
        ]  # fmt: skip


def prepare(setting: Setting, folder: Path) -> None:
    """Make the encoder that a probe starts from: a few updates."""
    if setting.what == "probe" and not (folder / "encoder").exists():
        out = folder / "encoder"
        finish(start(replace(setting, what="pretrain", steps=5, processes=1), out), out)


def start(setting: Setting, out: Path) -> subprocess.Popen[bytes]:
    log = (out.parent / f"{out.name}.log").open("ab")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log:
        return subprocess.Popen(
            setting.command(out), stdout=log, stderr=log, env=environment, start_new_session=True, cwd=out.parent
        )


def finish(process: subprocess.Popen[bytes], out: Path, timeout: float = 900) -> None:
    if process.wait(timeout) != 0:
        raise RuntimeError(
            f"the run failed with {process.returncode}:\n" + (out.parent / f"{out.name}.log").read_text()[-3000:]
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill launcher, ranks and workers at one moment; torchrun gives its ranks sessions of their own."""
    parent = psutil.Process(process.pid)
    family = [parent, *parent.children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def run_killed(setting: Setting, out: Path, kills: int, seed: int, longest: float = 2.5) -> dict[str, int]:
    """Run to the end through `kills` kills; return how many fell into which moment."""
    rng, moments = random.Random(seed), {"running": 0, "writing": 0, "starting": 0, "ended before": 0}
    for number in range(kills):
        process = start(setting, out)
        before = progress(out)
        if number % 7 == 6:
            time.sleep(rng.uniform(1, 6))  # anywhere, also before the first step
            moment = "starting" if progress(out) == before else "running"
        else:
            while process.poll() is None and progress(out) == before:
                time.sleep(0.01)
            moment = "running"
            time.sleep(rng.uniform(0, longest))
            if number % 3 == 0:
                deadline = time.monotonic() + 20
                while process.poll() is None and time.monotonic() < deadline and moment != "writing":
                    if any((out / "checkpoints").glob(".t*_step_*")):
                        time.sleep(rng.uniform(0, 0.02))
                        moment = "writing"
        if process.poll() is not None:
            finish(process, out)
            moments["ended before"] += 1
            continue
        kill(process)
        moments[moment] += 1
    finish(start(setting, out), out)
    return moments


def progress(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() and path.stat().st_size else 0


def result(out: Path) -> dict[str, object]:
    """Return everything of a finished run that must not depend on kills."""
    newest = sorted((out / "checkpoints").glob("step_*"))[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    names = ("model/model.safetensors", "training_state/optimizer.safetensors", "training_state/state.json")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = out / "best" / "manifest.json"
    return {
        "checkpoint": newest.name,
        **{name: manifest[name] for name in names},
        "best": json.loads(best.read_text()) if best.exists() else None,
        "metrics": [{k: v for k, v in row.items() if k not in CLOCK} for row in rows],
    }


def compare(setting: Setting, folder: Path, kills: int, seed: int = 0) -> dict[str, object]:
    """Run once undisturbed and once with kills; return what was found."""
    began = time.time()
    straight, killed = folder / "straight", folder / "killed"
    prepare(setting, folder)
    finish(start(setting, straight), straight)
    moments = run_killed(setting, killed, kills, seed)
    a, b = result(straight), result(killed)
    log = (folder / "killed.log").read_text()
    return {
        **asdict(setting) | {"data": Path(setting.data).name},
        "kills": moments,
        "resumed": log.count("resuming at step"),
        "damaged checkpoints skipped": log.count("skipping damaged"),
        "rows of metrics": len(a["metrics"]),  # type: ignore[arg-type]
        "equal": {name: a[name] == b[name] for name in a},
        "seconds": round(time.time() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--kinds", nargs="+", default=["thread"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=["pretrain"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        json.dumps(
            {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "date": time.strftime("%F")}
        )
    )
    failed = False
    data, steps = str(Path(arguments.data).resolve()), arguments.steps
    ways = itertools.product(arguments.commands, arguments.processes, arguments.workers, arguments.kinds)
    for what, processes, workers, kind in ways:
        setting = Setting(data, workers, kind, processes, steps, what=what)
        with tempfile.TemporaryDirectory() as folder:
            found = compare(setting, Path(folder), arguments.kills, arguments.seed)
        print(json.dumps(found), flush=True)
        failed |= not all(found["equal"].values())  # type: ignore[attr-defined]
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
