"""Objectives. A Task holds a model and turns a batch into losses; the loop knows nothing else about it.

Accelerate prepares the task, so all training goes through `forward` and the hooks of DDP and FSDP2 run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.models.targets import make_target
from hf_mae.training.mixing import mix_images, mix_targets

if TYPE_CHECKING:
    from hf_mae.models.modeling_classification import MAEForImageClassification


class Task(Protocol):
    """What the loop needs of an objective (an `nn.Module` with these on it)."""

    model: nn.Module

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return scalar tensors: `loss`, the mean over the batch, and whatever else should be logged."""
        ...

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a loadable model folder from the whole, gathered weights."""
        ...


class ImageTask(nn.Module):
    """What the objectives share: uint8 images are normalised here, and a model folder says how.

    Args:
        model: one of the classes of `hf_mae.models`; its config says size and channels of the images.
        mean: per-channel mean of the input scaled to [0, 1].
        std: per-channel standard deviation of the same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # what `accelerate config` shards by, read off the task
        self.architecture = type(model).__name__  # FSDP2 renames the class of what it wraps
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    @property
    def config(self) -> MAEConfig:
        """The config of the model."""
        return cast(MAEConfig, self.model.config)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """uint8 [N, C, H, W] in 0..255 -> float32, scaled to [0, 1], then minus mean over std."""
        return (pixel_values.float() / 255 - self.mean) / self.std

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder that `from_pretrained` of the model's class loads: config, weights and image processor."""
        folder.mkdir(parents=True)
        self.config.architectures = [self.architecture]
        self.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor(), indent=2) + "\n")

    def processor(self) -> dict[str, Any]:
        """Return the evaluation transform as transformers' BitImageProcessor states it: every field, nothing implied.

        Resize the short side to 256/224 of the crop, or to the crop itself above 224 pixels (bicubic), centre crop,
        scale to [0, 1], normalise. One exception it cannot state: our evaluation takes a picture of exactly the crop's
        size as it is, unresized.
        Source: official `build_transform`, crop_pct 224/256 up to 224 pixels and 1.0 above.
        """
        height, width = height_width(self.config.image_size)
        side = max(height, width)
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": self.config.num_channels == 3,
            "do_resize": True,
            "size": {"shortest_edge": side if side > 224 else int(side * 256 / 224)},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean.flatten().tolist(),
            "image_std": self.std.flatten().tolist(),
        }


class Pretraining(ImageTask):
    """Masked-autoencoder pretraining on uint8 images; see `ImageTask` for the arguments."""

    model: MAEForPreTraining

    def __init__(self, model: MAEForPreTraining, mean: Sequence[float], std: Sequence[float]):
        super().__init__(model, mean, std)

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


class Classification(ImageTask):
    """Classification of uint8 images, or of features of a frozen encoder.

    One loss for hard, smoothed and mixed labels: the cross-entropy of soft targets, in float32. Images are mixed here,
    after normalisation as in the official code, by the draws that come with the batch.

    Args:
        model: an `MAEForImageClassification`.
        mean: per-channel mean of the input scaled to [0, 1].
        std: per-channel standard deviation of the same.
        label_smoothing: share of each training target that is spread evenly over all classes.
    """

    model: MAEForImageClassification

    def __init__(
        self,
        model: MAEForImageClassification,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        label_smoothing: float = 0.0,
    ):
        super().__init__(model, mean, std)
        self.num_classes, self.label_smoothing = cast(int, model.config.num_labels), label_smoothing

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `loss`, the mean over the batch.

        Args:
            batch: `labels` int64 [n] and `pixel_values` uint8 [n, C, H, W], or `features` float [n, D] in their place;
                for images also, where there are any, `mix_lam` [n] and `mix_box` [n, 4] of `MixDraws`, and
                `drop_path_noise` [n, draws].
        """
        lam = batch["mix_lam"] if "mix_lam" in batch else torch.ones_like(batch["labels"], dtype=torch.float32)
        targets = mix_targets(batch["labels"], lam, self.num_classes, self.label_smoothing)  # [n, classes]
        log_probs = F.log_softmax(self.logits(batch).float(), dim=-1)
        return {"loss": -(targets * log_probs).sum(-1).mean()}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores [n, classes] of `pixel_values`, mixed if the batch says so, or of `features`."""
        if "features" in batch:
            return self.model.forward_head(batch["features"])
        pixels = self.normalize(batch["pixel_values"])
        if "mix_lam" in batch:
            pixels = mix_images(pixels, batch["mix_lam"], batch["mix_box"])
        features = self.model.forward_features(pixels, drop_path_noise=batch.get("drop_path_noise"))
        return self.model.forward_head(features)

    def features(self, pixel_values: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> [n, D]: what the head reads."""
        return self.model.forward_features(self.normalize(pixel_values))

    @torch.no_grad()
    def attention(self, pixel_values: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> [n, heads, L]: how the cls token of the last block attends to the patches.

        Computed by eager attention, which alone returns its weights; the implementation is put back afterwards.
        """
        before = self.config._attn_implementation or "sdpa"
        self.model.set_attn_implementation("eager")
        try:
            out = self.model(self.normalize(pixel_values), output_attentions=True)
        finally:
            self.model.set_attn_implementation(before)
        return out.attentions[-1][:, :, 0, 1:]  # [n, heads, 1 + L, 1 + L] -> [n, heads, L]

    def trivial_loss(self, labels: Tensor) -> float:
        """Return the loss of guessing every image by the frequencies of the training labels [n].

        The entropy of the mean target: mixing changes no mean, and smoothing is part of it.
        """
        counts = torch.bincount(labels.cpu(), minlength=self.num_classes).double()
        mean = counts / len(labels) * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes  # [classes]
        return float(torch.special.entr(mean).sum())
