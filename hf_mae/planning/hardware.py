"""Processors by their datasheets, and what is assumed of a run on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hf_mae.planning.counts import Attention, Precision
from hf_mae.recipes.fields import choose

IMAGENET_IMAGES = 1_281_167
IMAGES = {"ILSVRC/imagenet-1k": IMAGENET_IMAGES, "uoft-cs/cifar10": 50_000, "digits": 1_437}
"""Training images of the data sets that presets name."""

DECODE_RATES = {"official": 339.0, "exact": 435.0, "fast": 587.0}
"""Samples (decode, crop to 224, flip) per second and core: the official transform on Pillow, and `data.decoder`. One
core of an Intel Xeon at 2.3 GHz, 1,000 ImageNet originals (benchmarks/README.md, 2026-11-22)."""

IMAGE_BYTES = 110_000.0
"""Mean of 1,000 ImageNet originals."""

SMALL_PICTURES = ("uoft-cs/cifar10", "digits")
"""Data for which the two figures above mean nothing."""

HAND_OVER = {"thread": 0.06, "process": 0.12}
"""Decoding time lost between a worker and its batch, at most, on 2 cores (benchmarks/README.md, 2026-11-22)."""

RESERVE = 0.10
"""Fraction of a GPU's memory that is left to the context, NCCL, cuBLAS workspaces and fragmentation."""
MFU_ROWS = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense peaks in TFLOP/s (never the sparse ones) and memory, as the vendor states them."""

    name: str
    source: str
    memory_gb: tuple[float, ...]
    """The sizes it is sold with, in GB of 1e9 bytes; the first is planned with."""
    fp32: float
    half: float
    """Tensor cores with float32 accumulation: bf16, or fp16 where `bf16` is False."""
    tf32: float | None = None
    bf16: bool = True

    def peak(self, precision: Precision) -> float:
        """Return TFLOP/s of matrix products in this precision."""
        peaks = {"no": self.fp32, "tf32": self.tf32 or self.fp32, "bf16": self.half, "fp16": self.half}
        return choose("engine.precision", precision, peaks)


_GPUS = (
    Gpu(name="t4", source="NVIDIA T4 datasheet", memory_gb=(16,), fp32=8.1, half=65, bf16=False),
    Gpu(name="v100", source="NVIDIA V100 datasheet, SXM2", memory_gb=(16, 32), fp32=15.7, half=125, bf16=False),
    Gpu(name="a10", source="NVIDIA A10 datasheet", memory_gb=(24,), fp32=31.2, half=125, tf32=62.5),
    Gpu(name="rtx3090", source="NVIDIA GA102 whitepaper", memory_gb=(24,), fp32=35.6, half=71, tf32=35.6),
    Gpu(name="a6000", source="NVIDIA RTX A6000, GA102 whitepaper", memory_gb=(48,), fp32=38.7, half=154.8, tf32=77.4),
    Gpu(name="a100", source="NVIDIA A100 datasheet", memory_gb=(40, 80), fp32=19.5, half=312, tf32=156),
    Gpu(name="l4", source="NVIDIA L4 datasheet, dense = half of sparse", memory_gb=(24,), fp32=30.3, half=121, tf32=60),
    Gpu(name="l40s", source="NVIDIA L40S datasheet", memory_gb=(48,), fp32=91.6, half=362, tf32=183),
    Gpu(name="rtx4090", source="NVIDIA Ada whitepaper", memory_gb=(24,), fp32=82.6, half=165.2, tf32=82.6),
    Gpu(name="h100", source="NVIDIA H100 SXM datasheet, dense", memory_gb=(80,), fp32=67, half=989, tf32=494),
    Gpu(name="h200", source="NVIDIA H200 SXM datasheet, dense", memory_gb=(141,), fp32=67, half=989, tf32=494),
    Gpu(name="mi300x", source="AMD MI300X datasheet, dense", memory_gb=(192,), fp32=163.4, half=1307.4, tf32=653.7),
)
GPUS = {gpu.name: gpu for gpu in _GPUS}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the run is planned for, and what is assumed of it."""

    gpu: str | None = None
    """A known GPU (a100, h100, ...); a100 unless --tflops describes another processor."""
    gpus: int = 8
    """Processes, one per GPU."""
    tflops: float | None = None
    """Peak TFLOP/s of one processor, in place of the datasheet's: for another GPU, or for a CPU."""
    gpu_memory: float | None = None
    """Memory of one processor in GB (1e9 bytes), in place of the datasheet's."""
    precision: Literal["best", "recipe"] = "best"
    """Where the recipe says engine.precision=no: plan the type that the GPU is fastest in, or float32 as it says."""
    attention: Attention = "sdpa"
    """Attention kernel: sdpa saves no attention weights, eager does."""
    mfu: float = 0.3
    """Share of the peak that the matrix products of a step reach."""
    images: int | None = None
    """Training images; None is the preset's data set if its size is known, else ImageNet's 1,281,167."""
    image_bytes: float | None = None
    """Mean size of an encoded image in bytes; None is that of ImageNet originals, 110,000."""
    decode_rate: float | None = None
    """Samples per second that one core decodes; None is what was measured for data.decoder on ImageNet originals."""
