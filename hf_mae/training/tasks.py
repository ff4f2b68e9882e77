"""Objectives. A Task holds a model and turns a batch into losses; the loop knows nothing else about it.

Accelerate prepares the task, so all training goes through `forward` and the hooks of DDP and FSDP2 run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.models.targets import make_target
from hf_mae.models.timm_models import classifier, drop_paths, evaluating, write_timm_folder
from hf_mae.models.timm_spec import TimmSpec
from hf_mae.recipes.classification import ClassifierAugment, Loss
from hf_mae.recipes.crop import EvalCrop
from hf_mae.training.losses import classification_loss, trivial_loss
from hf_mae.training.mixing import mix_images

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
    """What the objectives share: uint8 images are normalised here.

    Args:
        model: takes normalised images.
        mean: per-channel mean of the input scaled to [0, 1].
        std: per-channel standard deviation of the same.

    Attributes:
        pixel_range: stored values (low, high) that became 0 and 255 before, see `hf_mae.recipes.base.Data`; model
            folders say it. None is the range of the files' type.
    """

    mean: Tensor
    std: Tensor
    pixel_range: tuple[float, float] | None = None

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self._no_split_modules: list[str] = []  # what `accelerate config` shards by, read off the task
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """uint8 [N, C, H, W] in 0..255 -> float32, scaled to [0, 1], then minus mean over std."""
        return (pixel_values.float() / 255 - self.mean) / self.std


class EncoderTask(ImageTask):
    """What the objectives of this package's models share: a model folder says how images are prepared.

    Args:
        model: one of the classes of `hf_mae.models`; its config says size and channels of the images.
        mean: see `ImageTask`.
        std: see `ImageTask`.
        crop_pct: of evaluation, see `EvalCrop`.
    """

    crop_pct: float | None

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], *, crop_pct: float | None = None):
        super().__init__(model, mean, std)
        self.crop_pct = crop_pct
        self._no_split_modules = cast("list[str]", model._no_split_modules)
        self.architecture = type(model).__name__  # FSDP2 renames the class of what it wraps

    @property
    def config(self) -> MAEConfig:
        """The config of the model."""
        return cast(MAEConfig, self.model.config)

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder that `from_pretrained` of the model's class loads: config, weights and image processor."""
        folder.mkdir(parents=True)
        self.config.architectures = [self.architecture]
        self.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor(), indent=2) + "\n")

    def processor(self) -> dict[str, Any]:
        """Return the evaluation transform as transformers' BitImageProcessor states it: every field, nothing implied.

        Resize and crop as `EvalCrop` says, scale to [0, 1], normalise.
        """
        return {
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": self.config.num_channels == 3,
            **EvalCrop(height_width(self.config.image_size), self.crop_pct).processor(),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean.flatten().tolist(),
            "image_std": self.std.flatten().tolist(),
        } | ({} if self.pixel_range is None else {"pixel_range": list(self.pixel_range)})


class Pretraining(EncoderTask):
    """Masked-autoencoder pretraining on uint8 images; see `ImageTask` for the arguments."""

    model: MAEForPreTraining

    def __init__(
        self, model: MAEForPreTraining, mean: Sequence[float], std: Sequence[float], *, crop_pct: float | None = None
    ):
        super().__init__(model, mean, std, crop_pct=crop_pct)

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


class LabelledTask(ImageTask):
    """Classification of images: the loss is the same whatever the model.

    One form for hard, smoothed and mixed labels. Images are mixed here, after normalisation as in the official code, by
    the draws that come with the batch.

    Args:
        model: see `ImageTask`.
        mean: see `ImageTask`.
        std: see `ImageTask`.
        num_classes: width of the scores.
        label_smoothing: share of each training target that is spread evenly over all classes.
        loss: what the scores are trained for.

    Attributes:
        can_attend: whether `attention` shows what the model looks at.
    """

    can_attend: ClassVar[bool]

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        num_classes: int,
        label_smoothing: float,
        loss: Loss,
    ):
        super().__init__(model, mean, std)
        self.num_classes, self.label_smoothing, self.loss = num_classes, label_smoothing, loss

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `loss`, the mean over the batch.

        Args:
            batch: `labels` int64 [n], what `logits` reads, and for mixed images `mix_lam` [n] and `mix_box` [n, 4] of
                `MixDraws`.
        """
        labels = batch["labels"]
        lam = batch["mix_lam"] if "mix_lam" in batch else torch.ones_like(labels, dtype=torch.float32)
        return {"loss": classification_loss(self.logits(batch), labels, lam, self.loss, self.label_smoothing)}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores [n, classes]."""
        raise NotImplementedError

    def features(self, pixel_values: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> [n, D]: what the last layer reads."""
        raise NotImplementedError

    def pixels(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the images [n, C, H, W], normalised, and mixed if the batch says so."""
        pixels = self.normalize(batch["pixel_values"])
        return mix_images(pixels, batch["mix_lam"], batch["mix_box"]) if "mix_lam" in batch else pixels

    def trivial_loss(
        self, labels: Tensor, augment: ClassifierAugment | None = None, size: tuple[int, int] = (224, 224)
    ) -> float:
        """Return the loss of guessing every image by the frequencies of the training labels [n].

        Args:
            labels: int64 [n].
            augment: what mixes the images, which changes the targets of `bce`.
            size: of the images, see `losses.trivial_loss`.
        """
        return trivial_loss(labels, self.loss, self.label_smoothing, self.num_classes, augment, size)


class Classification(LabelledTask, EncoderTask):
    """Classification with an encoder of this package, of images or of features of a frozen encoder.

    Args:
        model: an `MAEForImageClassification`.
        mean: per-channel mean of the input scaled to [0, 1].
        std: per-channel standard deviation of the same.
        label_smoothing: see `LabelledTask`.
        loss: see `LabelledTask`.
        crop_pct: see `EncoderTask`.
    """

    model: MAEForImageClassification
    can_attend = True

    def __init__(
        self,
        model: MAEForImageClassification,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        label_smoothing: float = 0.0,
        loss: Loss = Loss(),  # noqa: B008 (frozen)
        crop_pct: float | None = None,
    ):
        num_classes = cast(int, model.config.num_labels)
        super().__init__(model, mean, std, num_classes=num_classes, label_smoothing=label_smoothing, loss=loss)
        self.crop_pct = crop_pct

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores [n, classes].

        Args:
            batch: `pixel_values` uint8 [n, C, H, W], also `mix_lam`, `mix_box` and `drop_path_noise` [n, draws] where
                there are any; or `features` float [n, D] in their place.
        """
        if "features" in batch:
            return self.model.forward_head(batch["features"])
        features = self.model.forward_features(self.pixels(batch), drop_path_noise=batch.get("drop_path_noise"))
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


class TimmClassification(LabelledTask):
    """Classification with a model of timm.

    Dropout before the last layer is done here, by draws that come with the batch: timm's own takes PyTorch's global
    generator.

    Args:
        model: made by `timm_models`.
        spec: what it is.
        loss: see `LabelledTask`.
        label_smoothing: see `LabelledTask`.
        drop_rate: share of the features that training sets to 0 before the last layer.
        augment: what mixes the images, for `trivial_loss`.

    Attributes:
        num_features: D, width of what the last layer reads.
    """

    can_attend = False

    def __init__(
        self,
        model: nn.Module,
        spec: TimmSpec,
        *,
        loss: Loss = Loss(),  # noqa: B008 (frozen)
        label_smoothing: float = 0.0,
        drop_rate: float = 0.0,
        augment: ClassifierAugment | None = None,
    ):
        super().__init__(
            model,
            spec.mean,
            spec.std,
            num_classes=len(spec.names),
            label_smoothing=label_smoothing,
            loss=loss,
        )
        self.spec, self.drop_rate, self.augment = spec, drop_rate, augment
        self.num_features = classifier(model).in_features
        self.has_depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules())
        for parameter in model.parameters():
            if parameter.ndim == 4 and parameter.requires_grad:
                parameter.register_hook(_contiguous)

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the scores [n, classes].

        Args:
            batch: `pixel_values` uint8 [n, C, H, W], also `mix_lam` and `mix_box` where images are mixed; in training
                uniforms in [0, 1): `drop_path_noise` [n, len(drop_paths(model))] where the model has stochastic depth,
                and `dropout_noise` [n, num_features] where there is dropout.

        Raises:
            ValueError: draws are missing, or their shape does not fit.
        """
        self._plan(batch.get("drop_path_noise"))
        features = self._features(self.pixels(batch))
        if self.training and self.drop_rate > 0:
            noise = batch.get("dropout_noise")
            if noise is None or noise.shape != features.shape:
                raise ValueError(
                    f"dropout_noise of shape {None if noise is None else tuple(noise.shape)} does not fit; dropout "
                    f"{self.drop_rate} needs {list(features.shape)} uniforms"
                )
            features = features * (noise >= self.drop_rate).to(features.dtype) / (1 - self.drop_rate)
        return classifier(self.model)(features)

    def _plan(self, noise: Tensor | None) -> None:
        layers = drop_paths(self.model)
        if noise is not None and noise.shape[1:] != (len(layers),):
            raise ValueError(
                f"drop_path_noise of shape {tuple(noise.shape)} does not fit; pass [n, {len(layers)}], one uniform for "
                "each layer of stochastic depth"
            )
        for index, layer in enumerate(layers):
            layer.draws = None if noise is None else noise[:, index]

    def _features(self, pixels: Tensor) -> Tensor:
        if not len(pixels):  # not all of timm's models can reshape an empty batch: one image, whose row is cut off
            with evaluating(self.model):  # without statistics and draws
                return self._features(pixels.new_zeros(1, *pixels.shape[1:]))[:0]
        # Measured on a CPU: channels last makes networks with depthwise convolutions 1.3 times as fast and those
        # without 1.4 times as slow. The weights stay as they are, which FSDP2 wants.
        if self.has_depthwise or pixels.device.type == "cuda":
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        model = cast(Any, self.model)
        return model.forward_head(model.forward_features(pixels), pre_logits=True)

    def features(self, pixel_values: Tensor) -> Tensor:
        """uint8 [n, C, H, W] -> [n, D]: what the last layer reads."""
        return self._features(self.normalize(pixel_values))

    def trivial_loss(
        self, labels: Tensor, augment: ClassifierAugment | None = None, size: tuple[int, int] | None = None
    ) -> float:
        """Return the loss of guessing every image by the frequencies of the training labels [n].

        Args:
            labels: int64 [n].
            augment: what mixes the images; None is the task's.
            size: of the images in pixels; None is the model's.
        """
        return super().trivial_loss(labels, augment or self.augment, size or self.spec.image_size)

    def write_model(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write a folder in timm's format, which timm and transformers load."""
        write_timm_folder(folder, replace(self.spec, pixel_range=self.pixel_range), weights)


def _contiguous(gradient: Tensor) -> Tensor:
    # A convolution on channels-last images gives gradients with other strides than their weights, if only along sides
    # of 1, and DDP warns of that.
    return gradient.flatten().view(gradient.shape)
