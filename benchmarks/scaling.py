"""What an image costs our training step: by tokens, batch, model, threads and ranks; memory; and the paper's Table 2.

    python benchmarks/scaling.py [tokens batch size threads threads_b ranks memory table2] [--seconds 120] [--out FILE]

Each section is one run of `rounds.py`: its points take turns, each in a process of its own, for `--seconds` at most
(building them comes on top). Costs are per image of a whole step, AdamW included; ratios are paired, against the first
point of the section. FLOPs are those of the official model, so a cost may grow less than they do.

CPU time of two threads contains waiting for each other: read `threads` by wall time.
`ranks` is weak scaling under DDP by gloo: every rank has the same batch and one thread, on this machine. The gradients
of all ranks pass through shared caches and memory, and no network: what it shows is the machinery, not a cluster.
`memory` is one ViT-B step with and without activation checkpointing. `table2` compares an encoder with mask tokens with
the visible-only one, for decoders of 8 and 1 blocks; the paper's ratios beside it are wall times of its ViT-L and ViT-H
on 128 TPU v3 cores (He et al. 2022, Table 2) and FLOPs (Table 1c).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from methods import CONFIGS, Sizes, make_pixels, ours, step_flops
from rounds import (
    QUIET,
    Ratio,
    Run,
    Variant,
    Work,
    describe_machine,
    paired_ratio,
    quartiles,
    readings_record,
    run_rounds,
    table,
    write_record,
)
from step import train_step
from torch.nn.parallel import DistributedDataParallel

B = CONFIGS["vit-b"]
S = replace(B, width=384, heads=6)
TI = replace(B, width=192, heads=3)
L = replace(B, width=1024, depth=24, heads=16)

PAPER_TABLE2 = {"with mask tokens, decoder 8": (1.0, 1.0), "MAE, decoder 8": (2.8, 3.5), "MAE, decoder 1": (3.7, 4.1)}
"""Speed-up of ViT-L and ViT-H in wall time; that of ViT-H rests on an estimate (He et al. 2022, Table 2)."""


@dataclass(frozen=True)
class Point:
    """One setting of a section."""

    sizes: Sizes
    batch: int
    """Images per step and rank."""
    threads: int = 1
    """Per rank."""
    ranks: int = 1
    checkpoint: Literal["none", "gelu", "blocks"] = "none"


def tokens() -> dict[str, Point]:
    """ViT-S/16 by image size at 75 % masked, and by mask ratio at 224 px."""
    by_size = {f"{side} px": Point(replace(S, image=side), 4) for side in (224, 112, 160, 320)}
    by_ratio = {f"224 px, {ratio:.0%} masked": Point(replace(S, mask_ratio=ratio), 4) for ratio in (0.5, 0.9)}
    return by_size | by_ratio


def batch() -> dict[str, Point]:
    """The small configuration by batch."""
    return {f"batch {n}": Point(CONFIGS["small"], n) for n in (64, 1, 4, 16, 128)}


def size() -> dict[str, Point]:
    """ViT-Ti to ViT-L, 224 px, with the decoder of ViT-B."""
    return {f"ViT-{name}": Point(sizes, 2) for name, sizes in (("B", B), ("Ti", TI), ("S", S), ("L", L))}


def threads() -> dict[str, Point]:
    """The small configuration with one and two threads."""
    return {f"{n} thread{'s' * (n > 1)}": Point(CONFIGS["small"], 64, threads=n) for n in (1, 2)}


def threads_b() -> dict[str, Point]:
    """ViT-B with one and two threads."""
    return {f"{n} thread{'s' * (n > 1)}": Point(B, 4, threads=n) for n in (1, 2)}


def ranks() -> dict[str, Point]:
    """One and two processes under DDP, beside two threads in one; one image costs the time of a step of all ranks."""
    small = CONFIGS["small"]
    return {
        "1 rank": Point(small, 32),
        "2 ranks": Point(small, 32, ranks=2),
        "1 rank of 2 threads": Point(small, 64, threads=2),
    }


def memory() -> dict[str, Point]:
    """ViT-B with every kind of activation checkpointing."""
    return {
        "ViT-B": Point(B, 4),
        "ViT-B, GELU again": Point(B, 4, checkpoint="gelu"),
        "ViT-B, blocks again": Point(B, 4, checkpoint="blocks"),
    }


def table2() -> dict[str, Point]:
    """ViT-B: mask tokens in the encoder or not, decoder of 8 or 1 blocks; at 8 images AdamW is a small part."""
    return {
        f"{name}, decoder {blocks}": Point(replace(B, decoder_depth=blocks, mask_tokens_in_encoder=inside), 8)
        for name, inside in (("with mask tokens", True), ("MAE", False))
        for blocks in (8, 1)
    }


SECTIONS: dict[str, Callable[[], dict[str, Point]]] = {
    f.__name__: f for f in (tokens, batch, size, threads, threads_b, ranks, memory, table2)
}


# ------------------------------------------------------------------------------------------------ units of work


def build_point(point: Point) -> tuple[Work, dict[str, Any]]:
    """Build a point for `rounds.Variant`."""
    if point.ranks > 1:
        return build_ranks(point)
    torch.manual_seed(0)
    return train_step(ours(point.sizes, checkpoint=point.checkpoint), make_pixels(point.sizes, point.batch))


def build_ranks(point: Point) -> tuple[Work, dict[str, Any]]:
    """Build a step of several processes; this one is the first of them, and tells the others when to begin."""
    meeting = tempfile.NamedTemporaryFile(prefix="hf_mae_ranks_")  # noqa: SIM115  (lives as long as the work)
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(1, point.ranks):
        here, there = context.Pipe()
        # A daemon: it ends with this process.
        context.Process(target=follow, args=(there, point, rank, meeting.name), daemon=True).start()
        pipes.append(here)
    step, facts = join_ranks(point, 0, meeting.name)

    def work() -> dict[str, float] | None:
        for pipe in pipes:
            pipe.send("step")
        return step()

    work.meeting = meeting  # type: ignore[attr-defined]
    return work, facts


def join_ranks(point: Point, rank: int, meeting: str) -> tuple[Work, dict[str, Any]]:
    """Return this rank's part of the step."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name may lead nowhere
    torch.set_num_threads(point.threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=point.ranks)
    torch.manual_seed(0)
    method = ours(point.sizes, wrap=partial(DistributedDataParallel, gradient_as_bucket_view=True))
    return train_step(method, make_pixels(point.sizes, point.batch))


def follow(pipe: Connection, point: Point, rank: int, meeting: str) -> None:
    """Be one of the other ranks."""
    step, _ = join_ranks(point, rank, meeting)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        step()


# ------------------------------------------------------------------------------------------------ report


def per_image(run: Run, points: Mapping[str, Point], measure: str) -> dict[str, list[float]]:
    """Return the seconds per image of each point, one value per kept round."""
    return {name: [v / (p.batch * p.ranks) for v in run.values(name, measure)] for name, p in points.items()}


def report(run: Run, points: Mapping[str, Point], measure: str, section: str) -> tuple[str, dict[str, Any]]:
    """Return a table of a section, and its figures."""
    costs = per_image(run, points, measure)
    first = next(iter(points))
    base = step_flops(points[first].sizes)
    head = [
        "",
        "tokens seen",
        "batch",
        "GFLOP/image",
        f"{measure} ms/image",
        "speed against the first [IQR]",
        "by FLOPs",
    ]
    head += ["saved MB/image", "peak RSS MB (growth)"]
    rows, figures = [head + (["paper, ViT-L / ViT-H"] if section == "table2" else [])], {}
    for name, point in points.items():
        flops, facts, rss = step_flops(point.sizes), run.facts[name], run.rounds[-1][name].rss
        ratio: Ratio | None = None if name == first else paired_ratio(costs[first], costs[name])
        milliseconds = 1000 * quartiles(costs[name])[1]
        seen = point.sizes.patches if point.sizes.mask_tokens_in_encoder else point.sizes.kept
        rows.append(
            [
                name,
                str(1 + seen),
                f"{point.ranks} x {point.batch}" if point.ranks > 1 else str(point.batch),
                f"{flops / 1e9:.2f}",
                f"{milliseconds:.2f}",
                "1" if ratio is None else str(ratio),
                f"x{base / flops:.2f}",
                f"{facts['saved_mb']:.2f}",
                f"{rss:.0f} ({rss - facts['built_mb']:.0f})",
            ]
        )
        if section == "table2":
            paper = PAPER_TABLE2.get(name)
            rows[-1].append("-" if paper is None else f"x{paper[0]} / x{paper[1]}")
        figures[name] = {
            "ms_per_image": milliseconds,
            "gflop_per_image": flops / 1e9,
            "ratio": None if ratio is None else ratio.to_dict(),
            "flops_ratio": base / flops,
            "saved_mb": facts["saved_mb"],
            "peak_mb": rss,
        }
    return table(rows), figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"default: all of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=120.0, help="per section, without building")
    parser.add_argument("--rounds", type=int, default=20, help="per section, at most")
    parser.add_argument("--quiet", type=float, default=QUIET, help="discard rounds below this share of the best probe")
    parser.add_argument("--measure", choices=("wall", "cpu"), default="wall", help="cpu leaves out other ranks")
    parser.add_argument("--out", type=Path, help="append figures and readings to this file, as JSON lines")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.sections) - SECTIONS.keys():
        parser.error(f"unknown section {' '.join(sorted(unknown))}; choose from {' '.join(SECTIONS)}")
    machine = describe_machine(("torch", "transformers", "accelerate"))
    print(machine)
    for section in arguments.sections or SECTIONS:
        points = SECTIONS[section]()
        print(f"\n{section}: {SECTIONS[section].__doc__}")
        variants = {name: Variant(build_point, {"point": point}, point.threads) for name, point in points.items()}
        run = run_rounds(variants, rounds=arguments.rounds, seconds=arguments.seconds, quiet=arguments.quiet)
        if not run.kept:
            print("no round was quiet; try again on an idle machine, or --quiet 0 for a trial without meaning")
            continue
        text, figures = report(run, points, arguments.measure, section)
        print(text)
        if section == "table2":
            flops = step_flops(replace(L, mask_tokens_in_encoder=True)) / step_flops(L)
            print(f"ViT-L, decoder 8, mask tokens or not: x3.3 FLOPs (paper, Table 1c), x{flops:.2f} by this formula")
        if arguments.out:
            settings = {"benchmark": "scaling", "section": section, "measure": arguments.measure, "machine": machine}
            write_record(arguments.out, settings | {"points": figures} | readings_record(run))


if __name__ == "__main__":
    main()
