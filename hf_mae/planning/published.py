"""Runs that others report, to judge the assumed share of the peak by."""

from __future__ import annotations

from dataclasses import dataclass

from hf_mae.planning.counts import activation_bytes, count_flops, count_parameters, working_bytes
from hf_mae.planning.hardware import GPUS, IMAGENET_IMAGES
from hf_mae.recipes.base import VIT_SIZES, Model


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run that others report, as hours or as images per second."""

    what: str
    size: str
    gpu: str
    gpus: int
    images_per_second_per_gpu: float
    source: str
    note: str

    @property
    def flops(self) -> int:
        """FLOPs per image of the official code's order at 224 px."""
        return count_flops(Model(**VIT_SIZES[self.size]), shortcuts=False).step  # type: ignore[arg-type]

    @property
    def peak_tflops(self) -> float:
        """Dense half-precision peak of one GPU by its datasheet."""
        return GPUS[self.gpu].half

    @property
    def mfu(self) -> float:
        """The share of the datasheet's peak that the report implies."""
        return self.images_per_second_per_gpu * self.flops / (self.peak_tflops * 1e12)


def _rate_of(epochs: float, hours: float, gpus: int) -> float:
    return epochs * IMAGENET_IMAGES / (hours * 3600) / gpus


PUBLISHED = (
    Published(
        what="MAE ViT-L, 800 epochs, ~42 h",
        size="l",
        gpu="v100",
        gpus=64,
        images_per_second_per_gpu=_rate_of(800, 42, 64),
        source="facebookresearch/mae PRETRAIN.md",
        note="eager attention, fp16; 8 nodes",
    ),
    Published(
        what="DailyMAE ViT-B, 800 epochs, 18 h",
        size="b",
        gpu="a100",
        gpus=8,
        images_per_second_per_gpu=_rate_of(800, 18, 8),
        source="arXiv 2404.00509, abstract",
        note="an upper bound: it trains progressively, part of the time on smaller images",
    ),
    Published(
        what="MAE ViT-B, 0.408 s per 128",
        size="b",
        gpu="a6000",
        gpus=8,
        images_per_second_per_gpu=128 / 0.408,
        source="Alpha-VL/ConvMAE issue 5",
        note="unknown whether the loader was the limit",
    ),
    Published(
        what="lightly MAE ViT-B, ~35 min an epoch",
        size="b",
        gpu="rtx4090",
        gpus=2,
        images_per_second_per_gpu=_rate_of(1, 35 / 60, 2),
        source="lightly docs, ImageNet benchmarks",
        note="unknown whether the loader was the limit; decoder taken as the paper's",
    ),
)


def _official_memory(size: str, batch: int) -> float:
    """Return GB of a step of the official code: eager attention, fp16 autocast, its order, AdamW, DDP."""
    model = Model(**VIT_SIZES[size])  # type: ignore[arg-type]
    saved = activation_bytes(model, "fp16", "eager", shortcuts=False)
    working = working_bytes(model, "fp16", "eager", shortcuts=False)
    return (batch * (saved + working) + 18 * count_parameters(model).trained) / 1e9


PUBLISHED_MEMORY = ("MAE ViT-B, 128 images per A6000 (Alpha-VL/ConvMAE issue 5)", _official_memory("b", 128), 17.9)
"""Run, GB by this model, GB reported."""
