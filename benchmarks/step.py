"""The whole training step, side by side: the official code, transformers, lightly and ours.

A step is forward, backward, AdamW and zero_grad on random images that are in memory already. Before anything is timed,
ours must give the loss and the gradients of each other implementation, with its weights and the same mask, to 1e-5.

    python benchmarks/step.py --config small --threads 1 --official ~/mae --out benchmarks/results/step.jsonl
    python benchmarks/step.py --config vit-b --batch 8 --threads 2 --official ~/mae
    python benchmarks/step.py --config vit-b --batch 128 --gpu        # bf16 autocast; written, never run: no GPU here

What each variant is stands in `methods.py`; none is vendored.
Useful GFLOP/s count what the official model has to compute, for everyone, over seconds. The peak is that of float32
matrix products of these shapes, measured in the same rounds with the same threads (bf16 with --gpu).
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import (
    CONFIGS,
    OUR_NAMES,
    PEERS,
    Method,
    Sizes,
    check_equal,
    make_method,
    make_pixels,
    normalize,
    step_flops,
)
from rounds import (
    QUIET,
    Ratio,
    Run,
    Variant,
    Work,
    call_apart,
    compare,
    describe_machine,
    peak_memory,
    quartiles,
    readings_record,
    run_rounds,
    table,
    wait_for,
    write_record,
)
from torch import Tensor, nn


def build_step(
    name: str, sizes: Sizes, batch: int, device: str = "cpu", checkout: str | None = None
) -> tuple[Work, dict[str, Any]]:
    """Build a variant for `rounds.Variant`."""
    torch.manual_seed(0)
    return train_step(make_method(name, sizes, checkout), make_pixels(sizes, batch), device)


def train_step(method: Method, pixels: Tensor, device: str = "cpu") -> tuple[Work, dict[str, Any]]:
    """Return one training step as a unit of work, and its memory.

    Facts: `saved_mb`, what the graph holds between forward and backward pass beside the weights, per image; `built_mb`,
    the largest resident memory before the first step.
    """
    gpu = device != "cpu"
    model = method.model.to(device)
    images = (pixels if method.uint8 else normalize(pixels)).to(device)
    autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16) if gpu else nullcontext
    built = peak_memory()

    def loss() -> Tensor:
        with autocast():
            return method.loss(images, None)

    def update(loss: Tensor) -> None:
        loss.backward()
        method.before_update(loss)
        method.optimizer.step()
        method.optimizer.zero_grad()

    def step() -> dict[str, float] | None:
        if not gpu:
            return update(loss())
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait_for(images.device)
        start.record()
        update(loss())
        end.record()
        wait_for(images.device)
        return {"device": start.elapsed_time(end) / 1000, "device_mb": torch.cuda.max_memory_allocated() / 1e6}

    first, saved = count_saved(loss, model)
    update(first)
    facts = {"device": device, "saved_mb": round(saved / len(images) / 1e6, 3), "built_mb": round(built, 1)}
    return step, facts


def count_saved(forward: Callable[[], Tensor], model: nn.Module) -> tuple[Tensor, int]:
    """Return the result of a forward pass, and the bytes its graph keeps beside the model's weights and tables."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()  # views of one storage count once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    return result, sum(kept.values())


# Rows, inputs and outputs of a few layers: ViT-B's MLP, its decoder's MLP and qkv, those of `small`, and a square.
GEMM_SHAPES = (
    (400, 768, 3072),
    (400, 3072, 768),
    (1576, 512, 2048),
    (1576, 512, 1536),
    (1088, 192, 768),
    (4160, 128, 512),
    (1024, 1024, 1024),
)


def build_gemm(device: str = "cpu") -> tuple[Work, dict[str, Any]]:
    """Build the measurement of the peak: the three products of a linear layer, in several shapes."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    scale = 1 if device == "cpu" else 8  # rows of a batch that fills a GPU
    products: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for rows, inputs, outputs in GEMM_SHAPES:
        x, w, g = (
            torch.randn(*shape, device=device, dtype=dtype)
            for shape in ((rows * scale, inputs), (outputs, inputs), (rows * scale, outputs))
        )
        for a, b in ((x, w.t()), (g, w), (g.t(), x)):
            products.append(
                (2 * x.numel() * outputs, a, b, torch.empty(len(a), b.shape[1], device=device, dtype=dtype))
            )

    def work() -> dict[str, float]:
        best = 0.0
        for flops, a, b, out in products:
            wait_for(a.device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            wait_for(a.device)
            best = max(best, flops / (time.perf_counter() - start) / 1e9)
        return {"gflops": best}

    return work, {"device": device}


# ------------------------------------------------------------------------------------------------ report


def summarize(run: Run, sizes: Sizes, batch: int, measure: str) -> dict[str, Any]:
    """Return the figures of all variants."""
    peak = max(reading["gemm"].extra["gflops"] for reading in run.kept)
    gflop = step_flops(sizes) * batch / 1e9
    figures = {}
    for name in run.facts:
        if name == "gemm":
            continue
        seconds, cpu = run.values(name, measure), run.values(name, "cpu")
        median = quartiles(seconds)[1]
        figures[name] = {
            "seconds": median,
            "cpu": quartiles(cpu)[1],
            "images_per_second": batch / median,
            "gflops": gflop / median,
            "of_peak": gflop / median / peak,
            "of_peak_best": gflop / min(seconds) / peak,
            "saved_mb": run.facts[name]["saved_mb"],
            "peak_mb": run.rounds[-1][name].rss,
            "growth_mb": run.rounds[-1][name].rss - run.facts[name]["built_mb"],
        }
    return {"gflop_per_image": step_flops(sizes) / 1e9, "gemm_peak_gflops": peak, "variants": figures}


def report(summary: dict[str, Any], ratios: dict[str, dict[str, Ratio]], mine: str) -> str:
    """Lay out the figures, and the sentence each comparison allows."""
    head = ["", "ms", "CPU ms", "images/s", "GFLOP/s", "of peak (best)", "saved MB/image", "peak RSS MB (growth)"]
    rows = [head + [f"{mine} is, by {measure}" for measure in ratios]]
    for name, f in summary["variants"].items():
        rows.append(
            [
                name,
                f"{1000 * f['seconds']:.1f}",
                f"{1000 * f['cpu']:.1f}",
                f"{f['images_per_second']:.2f}",
                f"{f['gflops']:.1f}",
                f"{f['of_peak']:.2f} ({f['of_peak_best']:.2f})",
                f"{f['saved_mb']:.2f}",
                f"{f['peak_mb']:.0f} ({f['growth_mb']:.0f})",
                *(str(by_name[name]) if name in by_name else "-" for by_name in ratios.values()),
            ]
        )
    peak = (
        f"{summary['gflop_per_image']:.3f} GFLOP/image; GEMM peak of this run {summary['gemm_peak_gflops']:.1f} GFLOP/s"
    )
    return f"{peak}\n{table(rows)}"


def choose_variants(asked: Sequence[str], checkout: str | None, say: Callable[[str], None]) -> list[str]:
    """Return the variants that can run here; tell which cannot."""
    names = list(asked) or [*PEERS, *OUR_NAMES]
    plain = {name.partition("+")[0] for name in names}
    if unknown := plain - {*PEERS, *OUR_NAMES}:
        raise SystemExit(
            f"--variants {' '.join(sorted(unknown))}: unknown; choose from {' '.join((*PEERS, *OUR_NAMES))}"
        )
    needs = {
        "official": {
            "--official CHECKOUT of github.com/facebookresearch/mae": checkout,
            "pip install timm": has("timm"),
        },
        "lightly": {"pip install lightly": has("lightly"), "pip install timm": has("timm")},
    }
    missing = {family: [r for r, there in remedies.items() if not there] for family, remedies in needs.items()}
    for family, remedies in missing.items():
        if remedies and any(name.startswith(family) for name in names):
            say(f"without {family}: needs {', '.join(remedies)}")
    missing = {family for family, remedies in missing.items() if remedies}
    return [name for name in names if not name.startswith(tuple(missing))]


def has(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="small")
    parser.add_argument("--batch", type=int, help="images per step; default: 64 for small, 4 for vit-b")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the rounds after about this long")
    parser.add_argument("--quiet", type=float, default=QUIET, help="discard rounds below this share of the best probe")
    parser.add_argument("--official", metavar="CHECKOUT", help="of facebookresearch/mae")
    parser.add_argument("--variants", nargs="*", default=[], metavar="NAME", help="default: all that can run")
    parser.add_argument("--out", type=Path, help="append the figures and all readings to this file, as JSON lines")
    parser.add_argument("--gpu", action="store_true", help="CUDA, bf16 autocast, timed by CUDA events")
    arguments = parser.parse_args(argv)
    sizes = CONFIGS[arguments.config]
    sizes = replace(sizes, batch=arguments.batch or sizes.batch)
    checkout = str(Path(arguments.official).expanduser().resolve()) if arguments.official else None
    device, measure = ("cuda", "device") if arguments.gpu else ("cpu", "wall")
    names = choose_variants(arguments.variants, checkout, print)

    machine = describe_machine(("torch", "transformers", "timm", "lightly", "accelerate", "numpy"))
    print(machine)
    print(f"{arguments.config}, batch {sizes.batch}, {arguments.threads} thread(s), {device}; {', '.join(names)}")
    compared = [name for name in names if name in PEERS]
    check = call_apart(check_equal, names=compared, sizes=sizes, checkout=checkout)
    for name, errors in check.items():
        print(f"ours equals {name}: loss to {errors['loss']:.1e}, gradients to {errors['gradient']:.1e}")

    variants = {
        name: Variant(
            build_step,
            {"name": name, "sizes": sizes, "batch": sizes.batch, "device": device, "checkout": checkout},
            arguments.threads,
        )
        for name in names
    }
    variants["gemm"] = Variant(build_gemm, {"device": device}, arguments.threads)
    run = run_rounds(variants, rounds=arguments.rounds, seconds=arguments.seconds, quiet=arguments.quiet)
    if not run.kept:
        raise SystemExit("no round was quiet; try again on an idle machine, or --quiet 0 for a trial without meaning")
    summary = summarize(run, sizes, sizes.batch, measure)
    mine = next((name for name in names if name.startswith("ours")), names[0])
    ratios = {m: compare(run, mine, m, names) for m in (measure, "cpu")}
    print(report(summary, ratios, mine))
    others = [name for name in compared if name in summary["variants"]]
    if others:
        best = min(others, key=lambda name: summary["variants"][name]["seconds"])
        print(f"fastest of the others: {best}; against it {mine} is {ratios[measure].get(best)}")
    if arguments.out:
        settings = {"config": arguments.config, "batch": sizes.batch, "threads": arguments.threads, "device": device}
        found = {m: {name: ratio.to_dict() for name, ratio in by_name.items()} for m, by_name in ratios.items()}
        record = {"benchmark": "step", "machine": machine, **settings, "equal": check, **summary}
        write_record(arguments.out, record | {"ratios": found, "of": mine} | readings_record(run))


if __name__ == "__main__":
    main()
