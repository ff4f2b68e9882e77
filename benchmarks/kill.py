"""The kill test: a run that is killed again and again ends with the same bits as one that never was.

The command line is started as a user would, killed with SIGKILL (launcher, ranks and workers at one moment) at
random moments, every third time inside a checkpoint write, and started again with the same command. At the end
weights, optimizer state and metrics must equal those of an uninterrupted run exactly; only clock columns may differ.

    python benchmarks/kill.py --data ../shared/data/cifar10 --kills 20 --workers 0 2 --processes 1 2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
CLOCK = {"images_per_second", "seconds_waiting_for_data", "waiting_share"}
TINY = [
    "--model.image-size", "32", "--model.patch-size", "8", "--model.hidden-size", "32",
    "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2", "--model.decoder-hidden-size", "16",
    "--model.decoder-num-hidden-layers", "1", "--model.decoder-num-attention-heads", "2",
]  # fmt: skip


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

    def command(self, out: Path) -> list[str]:
        python = [sys.executable, "-m", "hf_mae.cli", "pretrain"]
        if self.processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
            python = [sys.executable, *launch, str(ROOT / "scripts" / "pretrain.py")]
        return [
            *python, "mae-vit-n-cifar10", "--data.path", self.data, "--out", str(out), *TINY,
            "--max-steps", str(self.steps), "--global-batch", str(self.batch), "--micro-batch", str(self.batch // 2),
            "--num-workers", str(self.workers), "--data.workers", self.kind, "--data.window-rows", "2000",
            "--save-every", str(self.save_every), "--log-every", "5", "--eval-every", "0",
            "--evals.no-knn", "--evals.no-rankme", "--evals.pictures", "0",
        ]  # fmt: skip


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
    return {
        "checkpoint": newest.name,
        **{name: manifest[name] for name in names},
        "metrics": [{k: v for k, v in row.items() if k not in CLOCK} for row in rows],
    }


def compare(setting: Setting, folder: Path, kills: int, seed: int = 0) -> dict[str, object]:
    """Run once undisturbed and once with kills; return what was found."""
    began = time.time()
    straight, killed = folder / "straight", folder / "killed"
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
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        json.dumps(
            {"machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "date": time.strftime("%F")}
        )
    )
    failed = False
    for processes in arguments.processes:
        for workers in arguments.workers:
            for kind in arguments.kinds:
                setting = Setting(str(Path(arguments.data).resolve()), workers, kind, processes, arguments.steps)
                with tempfile.TemporaryDirectory() as folder:
                    found = compare(setting, Path(folder), arguments.kills, arguments.seed)
                print(json.dumps(found), flush=True)
                failed |= not all(found["equal"].values())  # type: ignore[attr-defined]
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
