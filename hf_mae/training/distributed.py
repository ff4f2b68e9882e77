"""One process or many: what really started, and the few places where DDP and FSDP2 differ.

Launch forms that work (measured; `accelerate launch --cpu --num_processes 2` silently starts ONE process):

    python scripts/pretrain.py ...                                            one process
    accelerate launch --multi_gpu --num_processes 8 scripts/pretrain.py ...   one process per GPU
    torchrun --standalone --nproc_per_node 2 scripts/pretrain.py ...          works without a GPU as well (gloo)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_mae.recipes.base import Engine
from hf_mae.threads import choose_threads, describe_threads

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; what one of them waits for, such as the Hub, has to take less."""


def make_accelerator(engine: Engine) -> Accelerator:
    """Start Accelerate and refuse a world that is not the one that was asked for.

    Raises:
        RuntimeError: the launcher started another number of processes than Accelerate uses, or than
            `engine.expect_processes` says. Without this check two processes would each believe to be alone and write
            one run folder.
    """
    if engine.tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(
        # Without a GPU, Accelerate joins the launched processes only when told to use the CPU.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=engine.precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            # Not static_graph: it fails when the first micro-batch runs without synchronisation (torch 2.14), and every
            # parameter takes part in every loss anyway.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(choose_threads(torch.get_num_threads()))
    launched, used = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if launched != used:
        raise RuntimeError(
            f"the launcher started WORLD_SIZE={launched} process(es) but Accelerate uses {used}; they would "
            "overwrite each other. Without a GPU set ACCELERATE_USE_CPU=true, or use: "
            "torchrun --nproc_per_node N scripts/pretrain.py"
        )
    if engine.expect_processes is not None and engine.expect_processes != used:
        raise RuntimeError(
            f"engine.expect_processes={engine.expect_processes} but {used} process(es) started. `accelerate "
            "launch --cpu --num_processes N` and a launch without GPUs start one process: use "
            "torchrun --standalone --nproc_per_node N"
        )
    return accelerator


def describe_world(accelerator: Accelerator) -> str:
    """Return one line: how many processes, on what, in which precision, and whether the launcher asked for another."""
    n = accelerator.num_processes
    kind = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    used = accelerator.mixed_precision
    line = (
        f"{n} process{'es' if n > 1 else ''} ({kind}) on {accelerator.device.type}, precision {used}, "
        f"{describe_threads(torch.get_num_threads())}"
    )
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", used)) not in (used, "no"):
        line += f" (the {asked} of `accelerate config` is not used: --engine.precision {asked} chooses it)"
    if accelerator.device.type == "cuda" and used == "no" and torch.get_float32_matmul_precision() == "highest":
        line += " (float32 leaves most of a GPU unused: --engine.precision bf16, or --engine.tf32)"
    return line


@contextmanager
def accumulate(accelerator: Accelerator, module: nn.Module, last: bool) -> Iterator[None]:
    """Run one micro-batch; gradients are synchronised over ranks only in the last one.

    Forward AND backward belong inside: under DDP a forward outside of `no_sync` synchronises anyway.
    """
    with nullcontext() if last else accelerator.no_sync(module):
        yield


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a possibly sharded tensor. A collective when it is sharded: call it on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole` laid out as `like`: this rank's shard if `like` is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    return whole


def reduce_sum(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum over ranks. A collective: call it on all ranks."""
    if accelerator.num_processes > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(value: Any, accelerator: Accelerator) -> list[Any]:
    """Return every rank's value, in rank order. A collective: call it on all ranks."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(gathered, value)
    return gathered


def agree(error: BaseException | None, accelerator: Accelerator, doing: str) -> None:
    """Raise on every rank what happened on any. A collective: call it on all ranks.

    Raises:
        BaseException: this rank's own error, or a RuntimeError that quotes another rank's.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", accelerator)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed while {doing}: {message}")
