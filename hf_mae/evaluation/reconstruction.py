"""Pictures of what a masked autoencoder sees, predicts and gets: original, masked, predicted, pasted."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.masking import mask_noise, num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD

GRID = "hf_mae: SHA-256 of the pixels"
GREY = 128
"""What a removed patch is painted with."""


@dataclass(frozen=True)
class Reconstruction:
    """Pictures as uint8 tensors [N, C, H, W]."""

    original: Tensor
    masked: Tensor
    """Removed patches grey."""
    predicted: Tensor
    """The decoder's output at every patch, visible ones included."""
    pasted: Tensor
    """Prediction at the removed patches, original elsewhere."""
    uses_true_statistics: bool
    """The model predicts normalised patches; the true mean and deviation of each patch were put back to show them."""

    def grid(self, path: str | Path | None = None, *, scale: int | None = None) -> Image.Image:
        """Return one picture: a row per image, four columns with their names; saved to `path` if given."""
        return draw_grid(self, path, scale=scale)


def fixed_noise(config: MAEConfig, n: int, *, seed: int) -> Tensor:
    """Return noise [n, L] whose masks are those of the model: of its strategy and its ratio, drawn with a seed."""
    drawn = torch.rand(
        n, num_uniforms(config.mask_strategy, config.grid), generator=torch.Generator().manual_seed(seed)
    )
    return mask_noise(config.mask_strategy, drawn, config.grid, config.mask_ratio)


@torch.no_grad()
def reconstruct(
    model: MAEForPreTraining,
    images: Tensor,
    *,
    noise: Tensor | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    forward: Callable[..., Any] | None = None,
) -> Reconstruction:
    """Mask images, predict them, and return the four pictures of each.

    Args:
        model: a pretraining model, with its decoder.
        images: uint8 [N, C, H, W] of the model's size.
        noise: [N, L], the smallest are kept; None draws it from torch's random state.
        mean: per channel, of the input scaled to [0, 1]; one value for grey images.
        std: per channel, likewise.
        forward: how to call the model, where not directly (FSDP2 needs its own way in).

    Returns:
        The pictures. A model trained with `norm_pix_loss` predicts each patch up to its own mean and deviation: the
        true ones are put back, which adds information the model never had. Pictures say so.

    Raises:
        ValueError: images are not uint8 [N, C, H, W].
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images is {images.dtype} {tuple(images.shape)}; give uint8 of shape [N, C, H, W]")
    config, device = model.config, next(model.parameters()).device
    channels, grid = images.shape[1], model.grid_of(images)
    shift, spread = (torch.tensor(v[:channels], device=device).view(1, -1, 1, 1) for v in (mean, std))
    pixels = (images.to(device).float() / 255 - shift) / spread
    was_training = model.training
    model.eval()
    out = (forward or model)(pixels, noise=noise)
    model.train(was_training)
    patches, pred = model.patchify(pixels), out.pred.float()  # [N, L, p*p*C]
    if config.norm_pix_loss:
        pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    mask = out.mask.unsqueeze(-1)  # [N, L, 1], 1 = removed

    def to_image(tokens: Tensor) -> Tensor:
        whole = model.unpatchify(tokens, grid)
        return ((whole * spread + shift) * 255).round().clamp(0, 255).to(torch.uint8).cpu()

    hidden = model.unpatchify(mask.expand_as(patches), grid).bool().cpu()
    return Reconstruction(
        original=images.cpu(),
        masked=torch.where(hidden, torch.tensor(GREY, dtype=torch.uint8), images.cpu()),
        predicted=to_image(pred),
        pasted=torch.where(hidden, to_image(pred), images.cpu()),
        uses_true_statistics=bool(config.norm_pix_loss),
    )


def draw_grid(pictures: Reconstruction, path: str | Path | None = None, *, scale: int | None = None) -> Image.Image:
    """Lay out a `Reconstruction` as one RGB picture with a caption per column.

    Args:
        pictures: what to draw.
        path: where to save it (format by suffix); None only returns it.
        scale: whole-number enlargement; None makes small images about 112 pixels high.
    """
    columns = [
        ("original", pictures.original),
        ("masked", pictures.masked),
        ("predicted", pictures.predicted),
        ("pasted", pictures.pasted),
    ]
    n, _, height, width = pictures.original.shape
    factor = scale or max(1, round(112 / height))
    h, w, gap, head = height * factor, width * factor, 4, 16
    note = "predicted and pasted use the true mean and deviation of each patch" if pictures.uses_true_statistics else ""
    canvas = Image.new("RGB", (4 * (w + gap) + gap, head + n * (h + gap) + gap + (head if note else 0)), "white")
    pen = ImageDraw.Draw(canvas)
    for column, (title, images) in enumerate(columns):
        left = gap + column * (w + gap)
        pen.text((left, 2), title, fill="black")
        for row, image in enumerate(images):
            array = image.permute(1, 2, 0).numpy()
            tile = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0]).convert("RGB")
            canvas.paste(tile.resize((w, h), Image.Resampling.NEAREST), (left, head + row * (h + gap)))
    if note:
        pen.text((gap, canvas.height - head), note, fill="black")
    if path is not None:
        # By the hash of its pixels a PNG is known again, if nobody has edited it.
        about = PngInfo()
        about.add_text(GRID, _hash(canvas))
        canvas.save(path, pnginfo=about)  # other formats pass over it
    return canvas


def is_grid(path: Path) -> bool:
    """Return whether a file is a PNG as `draw_grid` wrote it."""
    try:
        with Image.open(path) as opened:
            return opened.info.get(GRID) == _hash(opened.convert("RGB"))
    except (OSError, ValueError):
        return False


def _hash(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


class Pictures:
    """Evaluator: writes a reconstruction grid of fixed images under fixed masks into the run folder; returns no number.

    Args:
        images: uint8 [N, C, H, W].
        noise: [N, L] of their masks.
        folder: where `step_*.png` go.
        mean: per channel, of the input scaled to [0, 1].
        std: per channel, likewise.
        accelerator: carries device and ranks.
        every: updates between pictures.
    """

    def __init__(
        self,
        images: Tensor,
        noise: Tensor,
        folder: Path,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        accelerator: Accelerator,
        every: int,
    ):
        self.images, self.noise, self.folder, self.mean, self.std = images, noise, folder, mean, std
        self.accelerator, self.every = accelerator, every

    def due(self, step: int, total: int) -> bool:
        """Return whether to draw after update `step`."""
        return step == 0 or step == total or (self.every > 0 and step % self.every == 0)

    def __call__(self, task: nn.Module, step: int) -> dict[str, float]:
        """Draw. Every rank computes (sharded weights need all of them); the main process writes.

        Warns:
            RuntimeWarning: the picture could not be written; no picture ends a run.
        """
        inner = self.accelerator.unwrap_model(task)
        noise = self.noise.to(self.accelerator.device)
        grid = reconstruct(inner.model, self.images, noise=noise, mean=self.mean, std=self.std, forward=inner.predict)
        if self.accelerator.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self.folder / f".step_{step:08d}.png"
                grid.grid(partial)
                partial.replace(self.folder / f"step_{step:08d}.png")
            except OSError as error:
                warnings.warn(f"no picture was drawn in {self.folder}: {error}", RuntimeWarning, stacklevel=2)
        return {}

    def finish(self, task: nn.Module, step: int) -> None:
        """Nothing is made once."""
