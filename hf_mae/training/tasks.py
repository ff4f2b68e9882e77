"""Objectives. A Task holds a model and turns a batch into losses; the loop knows nothing else about it.

Accelerate prepares the task, so all training goes through `forward` and the hooks of DDP and FSDP2 run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_mae.models.configuration_mae import height_width
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.models.targets import make_target


class Task(Protocol):
    """What the loop needs of an objective (an `nn.Module` with these on it)."""

    model: nn.Module

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalar tensors: `loss`, the mean over the batch, and whatever else should be logged."""
        ...

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a loadable model folder from the whole, gathered weights."""
        ...


class Pretraining(nn.Module):
    """Masked-autoencoder pretraining on uint8 images.

    Args:
        model: an `MAEForPreTraining`.
        mean: per-channel mean of the input scaled to [0, 1].
        std: per-channel standard deviation of the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: MAEForPreTraining, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what `accelerate config` shards by, read off the task
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """uint8 [N, C, H, W] in 0..255 -> float32, scaled to [0, 1], then minus mean over std."""
        return (pixel_values.float() / 255 - self.mean) / self.std

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Reconstruct the masked patches of `pixel_values` (uint8 [N, C, H, W]) under the mask of `noise` ([N, L])."""
        return {"loss": self.model(self.normalize(batch["pixel_values"]), noise=batch["noise"]).loss}

    def features(self, pixel_values: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> [N, D]: mean of the encoder's patch tokens, nothing masked."""
        return self.model.forward_features(self.normalize(pixel_values))

    @torch.no_grad()
    def trivial_loss(self, pixel_values: Tensor) -> float:
        """Return the loss of predicting the mean target patch of these images everywhere: the mean-patch baseline.

        A model whose loss is not below this has learned nothing about the image at hand.
        """
        patches = self.model.patchify(self.normalize(pixel_values))
        target = make_target(self.model.config, patches).flatten(0, 1)  # [N*L, p*p*C]
        return float((target - target.mean(0)).square().mean())

    def predict(self, pixel_values: Tensor, noise: Tensor) -> Any:
        """Normalised float [N, C, H, W] and noise [N, L] -> the model's whole output, with `pred`."""
        return self.model(pixel_values, noise=noise)

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder that `MAEForPreTraining.from_pretrained` loads: config.json and model.safetensors."""
        folder.mkdir(parents=True)
        self.model.config.architectures = [MAEForPreTraining.__name__]  # FSDP2 renames the class of what it wraps
        self.model.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor(), indent=2) + "\n")

    def processor(self) -> dict[str, Any]:
        """Return the evaluation transform as transformers' BitImageProcessor states it: every field, nothing implied.

        Resize the short side to 256/224 of the crop (bicubic), centre crop, scale to [0, 1], normalise.
        """
        height, width = height_width(self.model.config.image_size)
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": self.model.config.num_channels == 3,
            "do_resize": True,
            "size": {"shortest_edge": int(max(height, width) * 256 / 224)},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean.flatten().tolist(),
            "image_std": self.std.flatten().tolist(),
        }
