"""The pictures of an evaluation: what it confuses, where it is wrong, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from hf_mae.evaluation.class_charts import (
    draw_attention,
    draw_confusion,
    draw_per_class,
    draw_reliability,
    draw_worst,
)
from hf_mae.evaluation.classification import ClassResults

SHOWN = 8
"""Images whose attention is drawn."""


class Drawing:
    """Draws all pictures of one evaluation. A collective: the attention, where there is any, the model computes.

    Args:
        names: of the classes.
        picture: decodes a row of the split: uint8 [C, H, W].
        num_rows: of the split.
        folder: where the pictures go.
        accelerator: carries device and ranks.
    """

    def __init__(
        self,
        names: Sequence[str],
        picture: Callable[[int], Tensor],
        num_rows: int,
        folder: Path,
        accelerator: Accelerator,
    ):
        self.names, self.picture, self.num_rows = names, picture, num_rows
        self.folder, self.accelerator = folder, accelerator

    def __call__(self, results: ClassResults, inner: Any) -> None:
        """Draw the results of a task; if it `can_attend`, it has `attention` and `config`."""
        images, attention = self._examples() if inner.can_attend else torch.empty(0), None
        if len(images):
            with self.accelerator.autocast():
                attention = inner.attention(images.to(self.accelerator.device)).float().cpu()
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        draw_confusion(results, self.names, self.folder / "confusion.png")
        draw_per_class(results, self.names, self.folder / "per_class.png")
        draw_reliability(results, self.folder / "reliability.png")
        if results.worst:
            wrong = torch.stack([self.picture(mistake.row) for mistake in results.worst])
            draw_worst(wrong, results, self.names, self.folder / "worst.png")
        if attention is not None:
            draw_attention(images, attention, inner.config.grid, self.folder / "attention.png")

    def _examples(self) -> Tensor:
        """Return images from all over the split; those that cannot be decoded are passed over."""
        found: list[Tensor] = []
        for row in range(0, self.num_rows, max(1, self.num_rows // SHOWN)):
            try:
                found.append(self.picture(row))
            except ValueError:  # an ImageError: the evaluation has listed it
                continue
        return torch.stack(found[:SHOWN]) if found else torch.empty(0)
