"""Training beside one busy process: what idle OpenMP threads cost there, and what it costs alone not to spin.

The same short pretraining run with each setting, alone and beside a process that keeps one core busy in a session of
its own (the kernel shares cores between sessions), in alternating order. Needs Linux and two cores or more.

    python benchmarks/busy.py --data DIR_OF_CIFAR10 --rounds 3 --out benchmarks/results/busy.jsonl

`spin 300000` is what libgomp does when nothing is set (its documentation, GOMP_SPINCOUNT); `spin 10000` is what hf_mae
sets; `passive` is OMP_WAIT_POLICY=PASSIVE.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rounds import describe_machine, write_record

SETTINGS = {
    "spin 300000": {"GOMP_SPINCOUNT": "300000"},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS, WARM = 24, 8


def images_per_second(setting: str, data: str, preset: str, busy: bool) -> float:
    """Run once; return the median rate of the updates after the first."""
    environment = {k: v for k, v in os.environ.items() if k not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [sys.executable, "-m", "hf_mae.cli", "pretrain", preset, "--data.path", data, "--out", f"{folder}/run",
                 "--global-batch", "64", "--max-steps", str(STEPS), "--log-every", "8", "--evals.no-knn",
                 "--evals.no-rankme", "--evals.pictures", "0"],
                env=environment | SETTINGS[setting] | {"HF_HUB_OFFLINE": "1"}, check=True, capture_output=True,
                start_new_session=True,
            )  # fmt: skip
            rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()
    return statistics.median(r["images_per_second"] for r in rows if "loss" in r and r["step"] > WARM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="mae-vit-t-cifar10")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found: dict[tuple[str, bool], list[float]] = {}
    for turn in range(given.rounds):
        for setting in list(SETTINGS)[:: 1 if turn % 2 == 0 else -1]:
            for busy in (False, True):
                rate = images_per_second(setting, given.data, given.preset, busy)
                found.setdefault((setting, busy), []).append(rate)
                print(f"round {turn}: {setting}, {'beside one busy process' if busy else 'alone'}: {rate:.0f} images/s")
    rows = []
    for setting in SETTINGS:
        alone, busy = found[setting, False], found[setting, True]
        ratio = statistics.median(a / b for a, b in zip(alone, found["spin 300000", False], strict=True))
        rows.append({"setting": setting, "alone": alone, "busy": busy, "alone_over_default": round(ratio, 3)})
        print(
            f"{setting}: alone {statistics.median(alone):.0f}, busy {statistics.median(busy):.0f} images/s; "
            f"alone {ratio:.3f} of the default"
        )
    if given.out:
        write_record(given.out, {"benchmark": "busy", "rows": rows} | describe_machine())


if __name__ == "__main__":
    main()
