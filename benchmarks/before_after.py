"""Two checkouts of this package side by side: the training step and the input, so that a change shows what it costs.

One process for each checkout and kind of work, one thread each; they work in turn, A B, then B A, and the ratios are of
the same round. Each checkout is measured by its own `methods.py`, `step.py` and `input.py`.

    git worktree add /tmp/before 341adb0
    python benchmarks/before_after.py --before /tmp/before --images DIR_OF_JPEGS --rounds 12 --out FILE.jsonl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

KINDS = {"step small, batch 64": 1, "step vit-b, batch 4": 1, "input exact": 60, "input fast": 60}
"""Kinds of work, and how many units of it make one reading."""

CHILD = """
import sys, time
tree, kind, images, units = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
sys.path[:0] = [tree, tree + "/benchmarks"]
import hf_mae, torch
assert hf_mae.__file__.startswith(tree), hf_mae.__file__
torch.set_num_threads(1)
if kind.startswith("step"):
    from methods import CONFIGS, make_method, make_pixels
    from step import train_step
    sizes = CONFIGS[kind.split()[1].rstrip(",")]
    work, _ = train_step(make_method("ours", sizes, None), make_pixels(sizes, sizes.batch))
else:
    from input import VARIANTS, read_jpegs
    from pathlib import Path
    data = read_jpegs(Path(images), 200)
    one, at = VARIANTS["ours-" + kind.split()[1]](data), 0
    def work():
        global at
        at = (at + 1) % len(data)
        one(at)
for _ in range(2 * units):
    work()
print("ready", flush=True)
for line in sys.stdin:
    start = time.process_time()
    for _ in range(units):
        work()
    print(time.process_time() - start, flush=True)
"""


def main() -> None:
    from rounds import describe_machine, quartiles, write_record

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, type=Path)
    parser.add_argument("--after", default=Path(__file__).resolve().parents[1], type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    rows = []
    for kind, units in KINDS.items():
        children = []
        for tree in (given.before, given.after):
            command = [sys.executable, "-c", CHILD, str(tree.resolve()), kind, given.images, str(units)]
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
            )
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            children.append(child)
        seconds: list[list[float]] = [[], []]
        for turn in range(given.rounds):
            for i in (0, 1) if turn % 2 == 0 else (1, 0):
                child = children[i]
                child.stdin.write("go\n")
                seconds[i].append(float(child.stdout.readline()))
        for child in children:
            child.stdin.close()
            child.wait()
        low, middle, high = quartiles([before / after for before, after in zip(*seconds, strict=True)])
        print(f"{kind}: speed after / before {middle:.3f} [{low:.3f}, {high:.3f}] in {given.rounds} rounds", flush=True)
        rows.append({"kind": kind, "ratio": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]})
    if given.out:
        write_record(given.out, {"benchmark": "before_after", "rows": rows} | describe_machine())


if __name__ == "__main__":
    main()
