"""The plan of a run: memory of a rank, time, input and disk, from a recipe and some hardware.

What cannot be derived (the share of the peak that a step reaches, decoding rates, memory that the framework keeps) is
an assumption, and `RunPlan.assumptions` says whose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_mae.planning.counts import (
    Checkpoint,
    Flops,
    Parameters,
    Precision,
    activation_bytes,
    count_flops,
    count_parameters,
    item_size,
    shapes,
    working_bytes,
)
from hf_mae.planning.hardware import (
    DECODE_RATES,
    GPUS,
    HAND_OVER,
    IMAGE_BYTES,
    IMAGENET_IMAGES,
    IMAGES,
    MFU_ROWS,
    RESERVE,
    SMALL_PICTURES,
    Gpu,
    Hardware,
)
from hf_mae.recipes.base import Recipe
from hf_mae.recipes.checks import check, choose_micro_batch, largest_divisor
from hf_mae.recipes.fields import unknown
from hf_mae.training.schedules import make_plan

CHECKPOINTS: tuple[Checkpoint, ...] = ("none", "gelu", "blocks")
SHORTEST_PASS = 0.01  # seconds; some 2,000 kernels of 5 microseconds, as a forward and backward of 20 blocks starts


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One way to hold a run: bytes on every rank."""

    sharding: Literal["DDP", "FSDP"]
    checkpoint: Checkpoint
    weights: float
    gradients: float
    optimizer: float
    """Both moments of AdamW, and the moving average if there is one."""
    copies: float
    """Weights in the type of autocast (DDP), or what is gathered at a time (FSDP)."""
    activations_per_image: float
    working_per_image: float
    micro_batch: int
    total: float
    """At `micro_batch` images."""
    largest: int | None
    """The largest micro-batch that fits; None where the memory is not known."""
    largest_even: int | None
    """The largest that divides the images of a rank and fits; 0 if none does."""

    @property
    def fixed(self) -> float:
        """What does not grow with the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.copies


def plan_memory(
    recipe: Recipe, hardware: Hardware, precision: Precision, memory_gb: float | None, micro_batch: int | None
) -> tuple[Memory, ...]:
    """Return the memory of DDP and FSDP, each with every kind of activation checkpointing.

    `micro_batch` None is the largest even one that fits each way (at least 1).
    """
    model, ranks = recipe.model, hardware.gpus
    trained, item = count_parameters(model).trained, item_size(precision)
    s, share = shapes(model), recipe.global_batch // ranks
    moments = 2 + (recipe.optim.ema_decay is not None)
    largest_block = max(block.parameters for block in (*s.encoder, *s.decoder))
    root = trained - sum(block.parameters for block in (*s.encoder, *s.decoder))
    ways: list[Memory] = []
    for sharding in ("DDP", "FSDP"):
        held = trained / ranks if sharding == "FSDP" else trained
        copies = item * trained if item < 4 else 0
        if sharding == "FSDP":  # this block and the next, the gradient of one, and what belongs to no block
            copies = item * (3 * largest_block + root)
        for checkpoint in CHECKPOINTS:
            activations = activation_bytes(model, precision, hardware.attention, checkpoint=checkpoint)
            working = working_bytes(model, precision, hardware.attention, checkpoint=checkpoint)
            fixed, per_image = 4 * held * (2 + moments) + copies, activations + working
            largest = even = None
            if memory_gb is not None:
                largest = max(0, int((memory_gb * 1e9 * (1 - RESERVE) - fixed) // per_image))
                even = largest_divisor(share, largest)
            chosen = micro_batch or max(even or 1, 1)
            ways.append(
                Memory(
                    sharding=sharding,
                    checkpoint=checkpoint,
                    weights=4 * held,
                    gradients=4 * held,
                    optimizer=4 * held * moments,
                    copies=copies,
                    activations_per_image=activations,
                    working_per_image=working,
                    micro_batch=chosen,
                    total=fixed + chosen * per_image,
                    largest=largest,
                    largest_even=even,
                )
            )
    return tuple(ways)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What follows from one share of the peak."""

    mfu: float
    images_per_second_per_gpu: float
    images_per_second: float
    hours: float
    gpu_hours: float
    cores_per_gpu: float | None
    """Decoding cores that keep one GPU busy; None where the decoding rate is not known."""
    cores: float | None
    read_megabytes_per_second: float | None
    """Encoded images, all ranks together; None where their size is not known."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All numbers of a plan. FLOPs are per image unless said; sizes are bytes."""

    preset: str
    gpu: str
    gpus: int
    precision: Precision
    recipe_precision: Precision
    peak_tflops: float
    memory_gb: float | None
    flops: Flops
    flops_plain: Flops
    flops_executed: int
    """Per image, with what activation checkpointing computes twice."""
    flops_run: float
    parameters: Parameters
    images: int
    updates: int
    images_seen: int
    global_batch: int
    images_per_gpu: int
    micro_batch: int
    accumulation: int
    memory: tuple[Memory, ...]
    memory_chosen: int
    """Index into `memory`: DDP with the recipe's choice of activation checkpointing."""
    rates: tuple[Rate, ...]
    rate: Rate
    """At the chosen MFU."""
    too_small: bool
    """A pass is so short that starting its kernels takes as long: the arithmetic does not hold."""
    decode_rate: float | None
    workers_feed: float | None
    """Images per second and GPU that the recipe's workers decode."""
    hours_as_fed: float | None
    """Hours if those workers are the limit, or the GPU if it is slower."""
    data_bytes: float | None
    gradient_traffic: float
    """Bytes that each rank sends, and receives, per update: a ring all-reduce of float32 gradients."""
    checkpoint_weights: int
    checkpoint_optimizer: int
    checkpoint_average: int
    checkpoints_on_disk: float
    """The kept ones and the one being written."""
    checkpoints_written: int
    export_encoder: int
    assumptions: tuple[tuple[str, str, str], ...]
    """Name, value, whose it is."""


def make_run_plan(recipe: Recipe, hardware: Hardware) -> RunPlan:
    """Compute what a recipe takes on this hardware.

    Raises:
        ValueError: the recipe or the hardware has to be changed; the message says what.
    """
    check(recipe)
    _check_hardware(hardware)
    gpu, peak, memory_gb, precision = _resolve(recipe, hardware)
    batch, ranks, model = recipe.global_batch, hardware.gpus, recipe.model
    micro = choose_micro_batch(recipe, ranks)
    share = batch // ranks
    flops, plain, parameters = count_flops(model), count_flops(model, shortcuts=False), count_parameters(model)
    blocks = sum(block.flops for block in (*shapes(model).encoder, *shapes(model).decoder))
    executed = flops.step + (blocks if recipe.engine.checkpoint_activations == "blocks" else 0)

    # Length. Repeats make several samples of an image: an epoch reads every image once and trains on each of them.
    images = hardware.images or IMAGES.get(recipe.data.path, IMAGENET_IMAGES)
    steps_per_epoch = images / (batch // recipe.data.repeats)
    if recipe.data.remainder == "drop":
        steps_per_epoch = math.floor(steps_per_epoch)
    updates = make_plan(recipe, steps_per_epoch=steps_per_epoch).total_steps

    # Memory.
    auto = recipe.micro_batch == "auto"
    if auto and memory_gb is None:
        raise ValueError(
            "micro_batch=auto needs to know the memory; add --gpu-memory GB, or give --micro-batch a number"
        )
    wanted = None if auto else micro
    memory = plan_memory(recipe, hardware, precision, memory_gb, wanted)
    chosen = CHECKPOINTS.index(recipe.engine.checkpoint_activations)

    # Time and input.
    decode_rate, image_bytes = _decoding(recipe, hardware)
    core = None if decode_rate is None else decode_rate / (1 + HAND_OVER[recipe.data.workers])
    seen = updates * batch

    def rate_at(mfu: float) -> Rate:
        per_gpu = mfu * peak * 1e12 / executed
        hours = seen / (per_gpu * ranks) / 3600
        return Rate(
            mfu=mfu,
            images_per_second_per_gpu=per_gpu,
            images_per_second=per_gpu * ranks,
            hours=hours,
            gpu_hours=hours * ranks,
            cores_per_gpu=None if core is None else per_gpu / core,
            cores=None if core is None else per_gpu * ranks / core,
            read_megabytes_per_second=None
            if image_bytes is None
            else per_gpu * ranks * image_bytes / recipe.data.repeats / 1e6,
        )

    rate = rate_at(hardware.mfu)
    feed = hours_as_fed = None
    if core is not None and decode_rate is not None:
        feed = core * recipe.num_workers if recipe.num_workers else decode_rate
        fed = min(feed, rate.images_per_second_per_gpu)
        if recipe.num_workers == 0:  # the training process decodes between steps
            fed = 1 / (1 / rate.images_per_second_per_gpu + 1 / decode_rate)
        hours_as_fed = seen / (fed * ranks) / 3600
    weights = 4 * (parameters.trained + parameters.tables)
    average = weights if recipe.optim.ema_decay is not None else 0
    whole = weights + 8 * parameters.trained + average
    return RunPlan(
        preset=recipe.name,
        gpu=gpu.name if gpu is not None else "custom",
        gpus=ranks,
        precision=precision,
        recipe_precision=_recipe_precision(recipe),
        peak_tflops=peak,
        memory_gb=memory_gb,
        flops=flops,
        flops_plain=plain,
        flops_executed=executed,
        flops_run=float(executed) * seen,
        parameters=parameters,
        images=images,
        updates=updates,
        images_seen=seen,
        global_batch=batch,
        images_per_gpu=share,
        micro_batch=memory[chosen].micro_batch,
        accumulation=share // memory[chosen].micro_batch,
        memory=memory,
        memory_chosen=chosen,
        rates=tuple(rate_at(mfu) for mfu in sorted({*MFU_ROWS, hardware.mfu})),
        rate=rate,
        too_small=memory[chosen].micro_batch / rate.images_per_second_per_gpu < SHORTEST_PASS and gpu is not None,
        decode_rate=decode_rate,
        workers_feed=feed,
        hours_as_fed=hours_as_fed,
        data_bytes=None if image_bytes is None else images * image_bytes,
        gradient_traffic=2 * (ranks - 1) / ranks * 4 * parameters.trained,
        checkpoint_weights=weights,
        checkpoint_optimizer=8 * parameters.trained,
        checkpoint_average=average,
        checkpoints_on_disk=float(whole) * (recipe.engine.keep_checkpoints + 1),
        checkpoints_written=math.ceil(updates / recipe.save_every) if recipe.save_every else 1,
        export_encoder=4 * (parameters.encoder + parameters.encoder_tables),
        assumptions=tuple(_assumptions(recipe, hardware, gpu, peak, memory_gb, precision)),
    )


def as_dict(plan: RunPlan) -> dict[str, Any]:
    """Return a plan as JSON-able numbers, sums included."""
    out = asdict(plan)
    for name in ("flops", "flops_plain"):
        flops: Flops = getattr(plan, name)
        out[name] |= {"forward": flops.forward, "backward": flops.backward, "step": flops.step}
    out["parameters"]["trained"] = plan.parameters.trained
    return out


def _decoding(recipe: Recipe, hardware: Hardware) -> tuple[float | None, float | None]:
    """Return samples per second and core, and bytes per image; None where neither given nor known."""
    small = recipe.data.path in SMALL_PICTURES
    rate = hardware.decode_rate or (None if small else DECODE_RATES[recipe.data.decoder])
    return rate, hardware.image_bytes or (None if small else IMAGE_BYTES)


def _recipe_precision(recipe: Recipe) -> Precision:
    return "tf32" if recipe.engine.precision == "no" and recipe.engine.tf32 else recipe.engine.precision


def _check_hardware(hardware: Hardware) -> None:
    for flag, value in (
        ("gpus", hardware.gpus),
        ("tflops", hardware.tflops),
        ("gpu-memory", hardware.gpu_memory),
        ("images", hardware.images),
        ("image-bytes", hardware.image_bytes),
        ("decode-rate", hardware.decode_rate),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{flag} {value} must be above 0 and finite")
    if not 0 < hardware.mfu <= 1:
        raise ValueError(f"--mfu {hardware.mfu} must lie in 0 .. 1: it is a share of the peak, such as 0.3")
    if hardware.gpu is not None and hardware.gpu not in GPUS:
        raise ValueError(
            f"--gpu {hardware.gpu} is unknown; use one of {', '.join(GPUS)}, or describe it: --tflops T --gpu-memory GB"
        )


def _resolve(recipe: Recipe, hardware: Hardware) -> tuple[Gpu | None, float, float | None, Precision]:
    """Return the GPU, its peak and memory, and the precision that is planned."""
    precision = _recipe_precision(recipe)
    if hardware.gpu is None and hardware.tflops is not None:
        return None, hardware.tflops, hardware.gpu_memory, precision
    gpu = GPUS[hardware.gpu or "a100"]
    if hardware.precision not in ("best", "recipe"):
        raise unknown("precision", hardware.precision, ("best", "recipe"))
    if precision == "no" and hardware.precision == "best":
        precision = "bf16" if gpu.bf16 else "fp16"
    if precision == "bf16" and not gpu.bf16:
        raise ValueError(f"engine.precision=bf16 is not in the tensor cores of {gpu.name}; use --engine.precision fp16")
    return gpu, hardware.tflops or gpu.peak(precision), hardware.gpu_memory or gpu.memory_gb[0], precision


def _assumptions(
    recipe: Recipe, hardware: Hardware, gpu: Gpu | None, peak: float, memory_gb: float | None, precision: Precision
) -> Iterable[tuple[str, str, str]]:
    if hardware.tflops is not None or gpu is None:
        yield "peak", f"{peak:g} TFLOP/s", "--tflops"
    else:
        chosen = "" if hardware.gpu else "; no --gpu was named"
        yield "peak", f"{peak:g} TFLOP/s, {_precision_name(precision)}", gpu.source + chosen
    if memory_gb is not None:
        sizes = gpu.memory_gb if gpu is not None else ()
        others = "".join(f", also sold with {m:g}: --gpu-memory {m:g}" for m in sizes[1:])
        yield (
            "GPU memory",
            f"{memory_gb:g} GB",
            "--gpu-memory" if hardware.gpu_memory or gpu is None else gpu.source + others,
        )
        yield "kept free", f"{RESERVE:.0%} of it", "ours: context, NCCL, workspaces, fragmentation; not measured"
    if precision != _recipe_precision(recipe):
        yield (
            "precision",
            precision,
            f"the fastest of this GPU; the recipe says {recipe.engine.precision!r}, so start the run with "
            f"--engine.precision {precision}, or plan with --precision recipe",
        )
    yield (
        "MFU",
        f"{100 * hardware.mfu:.3g}% of the peak",
        "ours: published runs reach 10 to 12 %, the best at most 37 % (--check); no GPU was measured by us"
        if hardware.mfu == Hardware.mfu
        else "--mfu",
    )
    if recipe.engine.checkpoint_activations == "blocks":
        yield "recomputation", "at the same MFU", "ours"
    yield (
        "FLOPs",
        "2 per multiply-add, backward = 2 x forward",
        "counted; equal to torch's counter (tests)",
    )
    yield "AdamW, all-reduce", "no time of their own", "part of what the MFU leaves out"
    yield (
        "activations",
        f"{hardware.attention} attention",
        "counted; torch's saved tensors within 2 % (tests); fused kernels may keep less",
    )
    yield "working memory", "one block more", "ours: gradients in flight, and a block recomputed; not measured on a GPU"
    yield (
        "FSDP gathers",
        "3 blocks and the rest",
        "ours: a block, the next, the gradients of one, and what is in no block",
    )
    if hardware.images:
        whose = "--images"
    elif recipe.data.path in IMAGES:
        whose = f"the size of {recipe.data.path}"
    else:
        whose = "ImageNet-1k's, as the preset names no data of known size; set --images"
    yield "training images", f"{hardware.images or IMAGES.get(recipe.data.path, IMAGENET_IMAGES):,}", whose
    rate, size = _decoding(recipe, hardware)
    if size is not None:
        yield (
            "encoded image",
            f"{size / 1e3:g} KB",
            "--image-bytes" if hardware.image_bytes else "mean of 1,000 ImageNet originals",
        )
    if rate is not None:
        measured = (
            f"measured, decoder={recipe.data.decoder}, ImageNet originals to 224 px, one core of a Xeon at 2.3 GHz; "
            "smaller pictures decode faster"
        )
        yield "decoding", f"{rate:g} samples/s/core", "--decode-rate" if hardware.decode_rate else measured
        yield (
            f"hand-over by {recipe.data.workers}",
            f"{HAND_OVER[recipe.data.workers]:.0%} more time",
            "measured on 2 cores: at most 6 % (threads) and 12 % (processes)",
        )
    yield "evaluations, saving", "no time", "not modelled"


def _precision_name(precision: Precision) -> str:
    return {"no": "float32", "tf32": "tf32 tensor", "bf16": "bf16 tensor", "fp16": "fp16 tensor"}[precision] + ", dense"
