"""A plan as text for people."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from hf_mae.planning.hardware import DECODE_RATES, HAND_OVER, Hardware
from hf_mae.planning.plan import RunPlan
from hf_mae.planning.published import PUBLISHED, PUBLISHED_MEMORY
from hf_mae.recipes.base import Recipe

WIDTH = 120
TOO_SMALL = (
    "  WARNING: a forward and backward pass would take under 10 ms, and starting its kernels takes as long: matrix\n"
    "  products do not bound this run, and its times and rates are far too good. Measure it: pretrain --max-steps 50\n"
)


def report(recipe: Recipe, plan: RunPlan) -> str:
    """Return the plan as a report: run, FLOPs, memory, time, input, disk, assumptions."""
    parts = [
        _head(plan),
        _computation(recipe, plan),
        _memory(recipe, plan),
        _time(recipe, plan),
        _input(recipe, plan),
        _disk(recipe, plan),
        "Assumptions\n" + _table([(f"  {name}", value, source) for name, value, source in plan.assumptions], "<<<"),
    ]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def published_report() -> str:
    """Return the table of published runs with the share of the peak that each implies, and what we would have said."""
    mfu = Hardware.mfu
    rows = [
        ("run", "on", "images/s/GPU", "GFLOP/image", "peak TFLOP/s", "implied MFU", f"plan at {mfu:.0%} / reported")
    ]
    rows += [
        (
            run.what,
            f"{run.gpus} x {run.gpu}",
            f"{run.images_per_second_per_gpu:,.0f}",
            f"{run.flops / 1e9:.1f}",
            f"{run.peak_tflops:g}",
            f"{run.mfu:.1%}",
            f"x{mfu / run.mfu:.2f}",
        )
        for run in PUBLISHED
    ]
    notes = _table([(f"  {run.what}", f"{run.source}; {run.note}") for run in PUBLISHED], "<<")
    run, planned, reported = PUBLISHED_MEMORY
    return (
        "Published runs and the share of the peak they imply\n"
        + _table(rows, "<<>>>>>")
        + "\nFLOPs: the official code's order at 224 px, 2 per multiply-add, forward and backward. Peak: dense half\n"
        "precision of the datasheet. The last column is the rate that `hf-mae plan` assumes over the reported one:\n"
        "where it is far above 1, whatever held that run back (loader, attention, network) would hold back yours.\n"
        f"{notes}"
        "\nMemory of a published run\n"
        f"  {run}: reported {reported:g} GB, this model says {planned:.1f} GB (x{planned / reported:.2f})\n"
        "  unknown whether the report is what was allocated or what the driver shows, which is more\n"
    )


def _head(plan: RunPlan) -> str:
    memory = f", {plan.memory_gb:g} GB" if plan.memory_gb is not None else ""
    precision = plan.precision if plan.precision != "no" else "float32"
    if plan.precision != plan.recipe_precision:
        precision += (
            f" (the recipe says precision={plan.recipe_precision}: start it with --engine.precision {precision})"
        )
    return (
        f"{plan.preset} on {plan.gpus} x {plan.gpu}: {plan.peak_tflops:g} TFLOP/s{memory} each\n"
        f"  planned in {precision}\n"
        f"  {_hours(plan.rate.hours)}, {_short(plan.rate.gpu_hours)} GPU-hours at {100 * plan.rate.mfu:.3g}% of the "
        "peak, if the loader keeps up\n"
        "  Arithmetic, not a measurement: see the assumptions at the end, and --check for published runs.\n"
        + (TOO_SMALL if plan.too_small else "")
    )


def _computation(recipe: Recipe, plan: RunPlan) -> str:
    rows: list[Sequence[str]] = [
        ("  GFLOP per image", "embed", "encoder", "decoder", "head", "forward", "backward", "step", "decoder share")
    ]
    for name, flops in (("  as trained here", plan.flops), ("  plain order", plan.flops_plain)):
        parts = (flops.embed, flops.encoder, flops.decoder, flops.head, flops.forward, flops.backward, flops.step)
        rows.append([name, *(f"{part / 1e9:.3g}" for part in parts), f"{flops.decoder_share:.0%}"])
    saved = 1 - plan.flops.step / plan.flops_plain.step
    p = plan.parameters
    lines = [
        f"  exact shortcuts save {saved:.1%}: kept patches embedded; last decoder block and head for removed ones",
        f"  parameters {p.trained / 1e6:.2f} M: encoder {p.encoder / 1e6:.2f} M, decoder {p.decoder / 1e6:.2f} M; "
        f"fixed position tables {p.tables / 1e6:.2f} M",
    ]
    if recipe.engine.checkpoint_activations == "blocks":
        lines.append(f"  with activation checkpointing {plan.flops_executed / 1e9:.3g} GFLOP per image are executed")
    lines.append(f"  the run: {plan.flops_run:.3g} FLOP over {_count(plan.images_seen)} images")
    return "Computation\n" + _table(rows, "<>>>>>>>>") + "\n".join(lines)


def _memory(recipe: Recipe, plan: RunPlan) -> str:
    title = ["  GB per rank", "weights", "grads", "AdamW", "copies", "MB/image", f"total at {plan.micro_batch}", "fits"]
    rows = [[*title, "largest", f"dividing {plan.images_per_gpu}"]]
    for i, m in enumerate(plan.memory):
        if m.sharding == "FSDP" and plan.gpus == 1:
            continue  # nothing to shard over
        again = "" if m.checkpoint == "none" else f", {m.checkpoint} again"
        name = f"  {m.sharding}{again}{' *' if i == plan.memory_chosen else ''}"
        parts = [f"{part / 1e9:.2f}" for part in (m.weights, m.gradients, m.optimizer, m.copies)]
        split = f"{m.activations_per_image / 1e6:.3g}+{m.working_per_image / 1e6:.3g}"
        total = m.fixed + plan.micro_batch * (m.activations_per_image + m.working_per_image)
        fit = ("?", "?", "?") if m.largest is None else _fit(m.largest, m.largest_even, plan.micro_batch)
        rows.append([name, *parts, split, f"{total / 1e9:.2f}", *fit])
    how = "from the recipe" if isinstance(recipe.micro_batch, int) else "at most 64 by default"
    if recipe.micro_batch == "auto":
        how = "auto: the largest that fits"
    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"
    lines = [
        "  * the recipe's; FSDP is chosen with `accelerate config`, what the backward pass computes again with",
        "    --engine.checkpoint-activations gelu or blocks",
        "  MB/image: saved activations + working memory. copies: half-precision weights (DDP), gathered blocks (FSDP)",
        f"  global batch {plan.global_batch:,} = {gpus} x {plan.accumulation} x {plan.micro_batch} (accumulation x "
        f"micro-batch: {plan.images_per_gpu:,} images per GPU); micro-batch {how}",
    ]
    best = plan.memory[plan.memory_chosen].largest_even
    if recipe.micro_batch is None and best is not None and best > plan.micro_batch:
        lines.append(f"  a larger micro-batch fits, with fewer passes per update: --micro-batch {best}")
    if all(m.largest is not None and m.largest < plan.micro_batch for m in plan.memory):
        lines.append("  nothing fits: take more memory per GPU, a smaller --micro-batch or a smaller model")
    return "Memory\n" + _table(rows, "<>>>>>>>>>") + "\n".join(lines)


def _fit(largest: int, even: int | None, micro_batch: int) -> tuple[str, str, str]:
    return "yes" if largest >= micro_batch else "NO", f"{largest:,}", f"{even:,}" if even else "none"


def _time(recipe: Recipe, plan: RunPlan) -> str:
    rows = [("  MFU", "images/s/GPU", "images/s", "run", "GPU-hours", "s/update", "cores/GPU", "cores", "read MB/s")]
    for rate in plan.rates:
        rows.append(
            (
                f"  {100 * rate.mfu:.3g}%{' *' if rate.mfu == plan.rate.mfu else ''}",
                _short(rate.images_per_second_per_gpu),
                _short(rate.images_per_second),
                _hours(rate.hours),
                _short(rate.gpu_hours),
                _short(plan.global_batch / rate.images_per_second),
                _short(rate.cores_per_gpu),
                _short(rate.cores),
                _short(rate.read_megabytes_per_second),
            )
        )
    length = f"max_steps={recipe.max_steps}" if recipe.max_steps is not None else f"{recipe.epochs:g} epochs"
    repeats = f", {recipe.data.repeats} samples of each" if recipe.data.repeats > 1 else ""
    return (
        "Time, and what the loader has to deliver\n"
        + _table(rows, "<>>>>>>>>")
        + f"  * planned with; {length} of {plan.images:,} images{repeats} = {plan.updates:,} updates"
    )


def _input(recipe: Recipe, plan: RunPlan) -> str:
    rate, lines = plan.rate, [_workers(recipe, plan)]
    if plan.data_bytes is not None and rate.read_megabytes_per_second is not None:
        read = rate.read_megabytes_per_second
        lines.append(
            f"  data set {_bytes(plan.data_bytes)}, read once an epoch: {_short(read)} MB/s "
            f"({_short(read * 8 / 1000)} Gbit/s) from disk or network, all ranks together"
        )
    if plan.gpus > 1:
        lines.append(
            f"  gradients (DDP): {_bytes(plan.gradient_traffic)} sent and received by each rank per update "
            f"({_bytes(plan.gradient_traffic * rate.images_per_second / plan.global_batch)}/s)"
        )
    return "Input and network\n" + "\n".join(lines)


def _workers(recipe: Recipe, plan: RunPlan) -> str:
    """Say what the recipe's workers deliver, and how many would do."""
    rate, kind, decoder = plan.rate, recipe.data.workers, recipe.data.decoder
    if plan.decode_rate is None or rate.cores_per_gpu is None or plan.hours_as_fed is None:
        return (
            f"  how fast a core decodes pictures as small as those of {recipe.data.path} is not known: "
            "give --decode-rate and --image-bytes"
        )
    lines = [
        f"  one core decodes {plan.decode_rate:g} samples/s (decoder={decoder}); by {kind} "
        f"{plan.decode_rate / (1 + HAND_OVER[kind]):.0f} reach the batch"
    ]
    if plan.decode_rate == DECODE_RATES[decoder]:
        cores = rate.cores_per_gpu * plan.decode_rate
        each = ", ".join(f"{name} {_short(cores / speed)}" for name, speed in DECODE_RATES.items())
        lines.append(f"  cores per GPU with each transform: {each} (--data.decoder)")
    now, waiting = f"num_workers={recipe.num_workers}", 1 - rate.hours / plan.hours_as_fed
    if recipe.num_workers == 0:
        now += " decodes between steps"
    else:
        now += f" feeds {plan.workers_feed:,.0f} images/s to each GPU"
    if waiting <= 0.005:
        lines.append(f"  {now}: enough")
    else:
        needed = math.ceil(rate.cores_per_gpu)
        lines.append(f"  {now}: it would wait {waiting:.0%} of the time, and the run take {_hours(plan.hours_as_fed)}")
        faster = "" if decoder == "fast" else ", or fewer with --data.decoder fast"
        lines.append(f"  remedy: --num-workers {needed}, with as many free cores per GPU{faster}")
    return "\n".join(lines)


def _disk(recipe: Recipe, plan: RunPlan) -> str:
    whole = plan.checkpoint_weights + plan.checkpoint_optimizer + plan.checkpoint_average
    average = f" + average {_bytes(plan.checkpoint_average)}" if plan.checkpoint_average else ""
    return (
        "Disk\n"
        f"  one checkpoint {_bytes(whole)} = weights {_bytes(plan.checkpoint_weights)} + AdamW "
        f"{_bytes(plan.checkpoint_optimizer)}{average}\n"
        f"  {plan.checkpoints_written:,} written (every {recipe.save_every:,} updates), "
        f"{recipe.engine.keep_checkpoints} kept and one in the making: {_bytes(plan.checkpoints_on_disk)}\n"
        f"  export: pretraining model with decoder {_bytes(plan.checkpoint_weights)}, encoder alone "
        f"{_bytes(plan.export_encoder)} (float32)"
    )


def _table(rows: Sequence[Sequence[str]], align: str) -> str:
    """Align columns; the last one is wrapped under itself when it is text."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines: list[str] = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row[:-1], align, widths[:-1], strict=False)]
        if align[-1] == "<":
            last = f"\n{'':{indent}}".join(textwrap.wrap(row[-1], max(40, WIDTH - indent)))
        else:
            last = f"{row[-1]:>{widths[-1]}}"
        lines.append("  ".join([*cells, last]).rstrip())
    return "\n".join(lines) + "\n"


def _hours(hours: float) -> str:
    if hours < 1 / 60:
        return f"{hours * 3600:.2g} s"
    if hours < 2:
        return f"{hours * 60:.3g} min"
    if hours < 72:
        return f"{hours:.1f} h"
    return f"{hours / 24:.1f} days" if hours < 24 * 730 else f"{hours / 24 / 365.25:,.1f} years"


def _short(number: float | None) -> str:
    """Return two or three digits, or all of a large whole part; `?` where there is no number."""
    if number is None:
        return "?"
    return f"{number:,.0f}" if number >= 100 or number == 0 else f"{number:.2g}" if number < 10 else f"{number:.3g}"


def _bytes(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _count(number: float) -> str:
    return f"{number / 1e6:,.4g} M" if number < 1e9 else f"{number / 1e9:,.4g} billion"
