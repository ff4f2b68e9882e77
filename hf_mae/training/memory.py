"""Memory of a training process: what the allocator keeps, and how many images fit."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_mae.training.distributed import gather_objects

# From glibc's malloc.h: parameters of mallopt.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

# Limit and use of a container's memory: version 2, version 1.
CGROUPS = [
    (Path("/sys/fs/cgroup") / limit, Path("/sys/fs/cgroup") / used)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    )
]

GPU_SHARE, CPU_SHARE = 0.9, 0.8
"""Parts of the free memory that a micro-batch may fill: the rest is for fragments, buckets and other programs."""


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, up to 2 GiB: a step then finds its memory instead of faulting in every page.

    By default glibc maps every large block anew and gives it back to the system when it is freed: each step on a CPU
    then pays for zeroed pages (benchmarks/README.md). Holds for the whole process, from now on.

    Returns:
        Whether it took effect; False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Where glibc takes no more than 32 MiB, that is still worth having.
    mapped = bool(mallopt(M_MMAP_THRESHOLD, 2**30)) or bool(mallopt(M_MMAP_THRESHOLD, 2**25))
    return mapped and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def largest_micro_batch(
    task: nn.Module,
    sample: Callable[[int], dict[str, Tensor]],
    share: int,
    accelerator: Accelerator,
    *,
    moments_exist: bool = False,
) -> int:
    """Return the largest divisor of `share` whose forward and backward pass fits into memory, the same on all ranks.

    Memory is measured with one, two and four images and grows in a straight line from there, so nothing is provoked to
    fail, which would leave the other ranks of a sharded model waiting. On a GPU its peak counts; on a CPU what autograd
    saves for the backward pass or what is alive at once in the forward pass, whichever is more: a frozen encoder saves
    nothing and still needs room. Gradients are dropped again and torch's random state is put back. A collective: call
    it on all ranks.

    Args:
        task: as prepared, but without the wrapper of DDP.
        sample: makes a batch of n images.
        share: images that a process takes of a global batch.
        accelerator: carries device, precision and ranks.
        moments_exist: the optimizer's state is in memory already, as after loading a checkpoint.

    Raises:
        RuntimeError: not even one image fits, or the device's memory cannot be asked for.
    """
    if (device := accelerator.device).type not in ("cuda", "cpu"):
        raise RuntimeError(
            f"micro_batch=auto cannot measure the memory of {device.type}; give a number: --micro-batch 64"
        )
    sizes = [n for n in (1, 2, 4) if n <= share]
    # Batch normalisation has no statistics of one image, and must not make any of these: it takes those it has.
    layers = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for layer in layers:
        layer.eval()
    # As written, not compiled: each size would be a graph of its own.
    devices = [device] if device.type == "cuda" else []
    with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices):
        needs = [_measure(task, sample(n), accelerator) for n in (1, *sizes)][1:]  # the first fills caches
    for layer in layers:
        layer.train()
    per_image = (needs[-1] - needs[0]) / max(1, sizes[-1] - sizes[0])
    parameters = sum(p.numel() * p.element_size() for p in _local(task))
    # Gradients of earlier micro-batches are there when the next begins; AdamW's two moments come with the first update.
    fixed = needs[0] - per_image * sizes[0] + (1 + 2 * (not moments_exist)) * parameters
    budget = _budget(device)
    fitting = [d for d in range(1, share + 1) if share % d == 0 and fixed + per_image * d <= budget]
    chosen = min(gather_objects(max(fitting, default=0), accelerator))
    if chosen == 0:
        raise RuntimeError(
            f"micro_batch=auto: one image needs {(fixed + per_image) / 1e9:.1f} GB and {budget / 1e9:.1f} GB may be "
            "used; use --engine.checkpoint-activations blocks, --engine.precision bf16, FSDP, or a smaller model"
        )
    return chosen


def _local(task: nn.Module) -> list[Tensor]:
    """Return what this rank holds of the parameters that are trained."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in task.parameters() if p.requires_grad]


def _measure(task: nn.Module, batch: dict[str, Tensor], accelerator: Accelerator) -> float:
    """Return the bytes that a forward and a backward pass hold at most, without gradients that were there before.

    On a GPU its peak, with all that was held already; on a CPU what is saved for the backward pass, or what the
    operations of the forward pass hold at once if that is more.
    """
    device = accelerator.device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alive = Alive()
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        accelerator.autocast(),
        alive if device.type == "cpu" else nullcontext(),
    ):
        loss = task(batch)["loss"]
    loss.backward()
    task.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    for parameter in _local(task):
        seen.pop(parameter.untyped_storage().data_ptr(), None)
    return float(max(sum(seen.values()), alive.most))


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that are alive at once.

    Attributes:
        most: bytes at the fullest moment. What an operation needs inside of itself is not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and take note of its results."""
        result = func(*args, **(kwargs or {}))
        self.sizes = {key: entry for key, entry in self.sizes.items() if not entry[0].expired()}
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            # A view, or a result written into an argument, is no new memory.
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()).data_ptr() not in known:
                self.sizes[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.sizes.values()))
        return result


def _budget(device: torch.device) -> float:
    """Return the bytes that may be used: on a GPU of all that is not another program's, on a CPU of what is free."""
    if device.type == "cuda":
        return GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    free = psutil.virtual_memory().available
    for limit, used in CGROUPS:  # a container may have less than the machine
        if limit.exists() and (most := limit.read_text().strip()).isdigit():
            free = min(free, int(most) - int(used.read_text()))
    return CPU_SHARE * free / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
