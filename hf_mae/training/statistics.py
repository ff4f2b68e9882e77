"""Running statistics of batch normalisation, updated once for each global batch however it is split.

By itself, a normalisation layer moves them at every forward pass, and each rank by its own images: they would depend
on micro-batches and ranks, and under DDP those of one rank would replace the others'. Here every micro-batch of an
update starts from the same values, and the mean of what they make of them is kept.
# Differs from the official probe, where each GPU keeps its own.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hf_mae.training.distributed import reduce_sum

KINDS = ("running_mean", "running_var")


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of all batch normalisation layers by name: the buffers themselves."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    tensors = {f"{name}.{kind}": getattr(m, kind) for name, m in layers.items() for kind in KINDS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class RunningStatistics:
    """Means and variances of all batch normalisation layers of a task, moved once per update.

    Args:
        task: prepared; without such layers nothing is done.
    """

    def __init__(self, task: nn.Module):
        layers = [m for m in task.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.tensors = list(running_statistics(task).values())
        self.counters = [m.num_batches_tracked for m in layers if m.num_batches_tracked is not None]
        self.start = [t.clone() for t in self.tensors]
        self.sums = [torch.zeros_like(t) for t in self.tensors]
        self.micro_batches = 0

    @torch.no_grad()
    def collect(self) -> None:
        """Take note of what a micro-batch has made of the statistics, and take it back."""
        self.micro_batches += 1
        for total, tensor, start in zip(self.sums, self.tensors, self.start, strict=True):
            total += tensor
            tensor.copy_(start)

    @torch.no_grad()
    def update(self, accelerator: Accelerator) -> None:
        """Keep the mean over the micro-batches of all ranks. A collective."""
        share = 1 / (self.micro_batches * accelerator.num_processes)
        for total, tensor, start in zip(self.sums, self.tensors, self.start, strict=True):
            tensor.copy_(reduce_sum(total, accelerator) * share)
            start.copy_(tensor)
            total.zero_()
        for counter in self.counters:
            counter -= self.micro_batches - 1  # it counts updates
        self.micro_batches = 0
