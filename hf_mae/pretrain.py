"""Masked-autoencoder pretraining from a recipe: its model, its random numbers, and what is measured meanwhile."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from hf_mae.data.augment import check_augment
from hf_mae.data.examples import check_pixels, load_examples
from hf_mae.data.images import ImageError, Range, crop_center, decode_image, to_array
from hf_mae.data.order import NOISE, uniforms
from hf_mae.data.sources import Source, list_splits, open_source
from hf_mae.evaluation.features import FeatureQuality, logistic_is_too_large
from hf_mae.evaluation.reconstruction import Pictures, is_grid, reconstruct
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.masking import mask_noise, num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, Recipe
from hf_mae.recipes.checks import check
from hf_mae.recipes.crop import EvalCrop
from hf_mae.recipes.defaults import Chosen
from hf_mae.resolve import model_folder, read_config
from hf_mae.run import Training, last_model, load_preparation, run
from hf_mae.training.loop import Evaluator
from hf_mae.training.monitors import Printer
from hf_mae.training.optim import MovingAverage, build_adamw
from hf_mae.training.tasks import Pretraining

BASELINE_IMAGES = 256
"""Training images that the mean-patch baseline is measured on."""

RANKME_IMAGES = 2000
"""Training images for RankMe where no kNN needs more: above the width of any preset, which bounds the rank."""


def pretrain(recipe: Recipe, *, chosen: Chosen = None) -> Path:
    """Pretrain a masked autoencoder, or continue the run in `recipe.out`.

    Everything a user can get wrong is checked before the first update. A collective: every process calls it.

    Args:
        recipe: what to do.
        chosen: names of its fields that have to stay; the others may be adapted to the data, which is said. None: all.

    Returns:
        The run folder.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    check(recipe)
    check_augment(recipe.augment)
    return run(MaskedPretraining(recipe), chosen)


class MaskedPretraining(Training[Recipe]):
    """An encoder and a decoder that learn to reconstruct masked patches."""

    forward_methods = ("features", "predict")
    baseline = "the mean-patch baseline"

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.config = MAEConfig(**asdict(recipe.model))
        self.image_size, self.channels = height_width(self.config.image_size), self.config.num_channels

    def build(self, source: Source, resume_from: Path | None, accelerator: Accelerator, say: Printer) -> nn.Module:
        """Return the task, with fresh weights."""
        self.source = source
        model = MAEForPreTraining(self.config)
        model.checkpoint_activations(self.recipe.engine.checkpoint_activations)
        if self.recipe.engine.compile:
            for block in [*model.blocks, *model.decoder_blocks]:
                block.compile(fullgraph=True, dynamic=False)  # in place, so that parameter names stay
        augment = self.recipe.augment
        return Pretraining(model, augment.mean, augment.std, crop_pct=self.recipe.evals.crop_pct)

    def optimizer(self, task: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW over the official parameter groups."""
        return build_adamw(task, self.recipe.optim)

    def extras(self, images_per_epoch: int) -> Callable[..., Mapping[str, Tensor]]:
        """Return what draws the masks."""
        return MaskNoise(self.config, self.recipe.seed)

    def sample(self, n: int) -> dict[str, Tensor]:
        """Return n black images under some masks."""
        pixel_values = torch.zeros(n, self.channels, *self.image_size, dtype=torch.uint8)
        noise = MaskNoise(self.config, self.recipe.seed)(np.zeros(n, np.int64), np.arange(n))["noise"]
        return {"pixel_values": pixel_values, "noise": noise}

    def evaluators(
        self, out: Path, inner: nn.Module, average: MovingAverage | None, accelerator: Accelerator, say: Printer
    ) -> list[Evaluator]:
        """Return the feature monitors and the pictures; keep a few training images for the baseline."""
        recipe, evals, every = self.recipe, self.recipe.evals, self.recipe.eval_every
        load = partial(
            load_examples,
            seed=recipe.seed,
            image_size=self.image_size,
            channels=self.channels,
            max_pixels=recipe.data.max_pixels,
            crop_pct=evals.crop_pct,
        )
        found = _labelled_split(recipe, self.source, say) if evals.knn or evals.probe else None
        self.tested_on, labelled = found or (None, None)
        evaluators: list[Evaluator] = []
        count = evals.train_examples if labelled else min(evals.train_examples, RANKME_IMAGES) if evals.rankme else 0
        count = max(count, BASELINE_IMAGES)
        say(f"loading up to {count:,} training images{f' and {evals.test_examples:,} to test on' if labelled else ''}")
        train = load(self.source, count)
        self.baseline_images = train[0][:BASELINE_IMAGES].to(accelerator.device)
        shown = train[0]
        if labelled or evals.rankme:
            test = load(labelled, evals.test_examples) if labelled else None
            if test and not ((train[1] >= 0).any() and (test[1] >= 0).any()):
                say("kNN: off, none of the images read has a label")
                test = None
            shown = test[0] if test else shown
            classes = int(train[1].max()) + 1
            too_large = logistic_is_too_large(len(train[1]), self.config.hidden_size, classes) if test else None
            if evals.probe and too_large:
                say(f"note: {too_large}")
            evaluators.append(
                FeatureQuality(
                    train,
                    test,
                    accelerator,
                    every=every,
                    at_start=evals.at_start,
                    knn=evals.knn,
                    rank=evals.rankme,
                    probe=evals.probe and not too_large,
                )
            )
        if evals.pictures:
            shown = shown[: evals.pictures]
            rows = np.arange(len(shown))
            evaluators.append(
                Pictures(
                    shown,
                    MaskNoise(self.config, recipe.seed)(np.zeros_like(rows), rows)["noise"],
                    out / "pictures",
                    mean=recipe.augment.mean,
                    std=recipe.augment.std,
                    accelerator=accelerator,
                    every=every,
                )
            )
        return evaluators

    def baseline_loss(self, inner: nn.Module) -> float:
        """Return the loss of predicting the mean target patch everywhere."""
        assert isinstance(inner, Pretraining)
        return inner.trivial_loss(self.baseline_images)

    def report(self, out: Path, rows: list[dict[str, Any]], verdict: str, say: Printer) -> None:
        """Say what came out, and what to do next."""
        say(verdict)
        names = (("knn_accuracy", "kNN accuracy"), ("probe_accuracy", "logistic probe"), ("rankme", "RankMe"))
        for name, title in names:
            values = [(row["step"], row[name]) for row in rows if name in row]
            if values and values[0][0] == 0:
                width = self.config.hidden_size
                meaning = f" (directions the features use, 1 to {width}: higher is better)" if name == "rankme" else ""
                say(
                    f"{title}: {values[0][1]:.3f} untrained -> {values[-1][1]:.3f} after {values[-1][0]} updates"
                    f"{meaning}"
                )
        if pictures := sorted((out / "pictures").glob("*.png")):
            say(f"reconstructions: {pictures[-1]}")
        if model := last_model(out):
            folder = json.dumps(str(model), ensure_ascii=False)
            say(f"model: {model}, load it with hf_mae.MAEModel.from_pretrained({folder})")
            say(f"on the Hub: hf-mae publish {shlex.quote(str(out))} ORG/NAME --license LICENCE --dry-run")
        if self.recipe.data.path == "digits":
            say("next, on your own images: hf-mae pretrain mae-vit-s --data.path DIR_OR_HUB_ID --global-batch 256")


class MaskNoise:
    """Makes the mask of each sample from (seed, epoch, position) alone: {"noise": float32 [n, L]}."""

    def __init__(self, config: MAEConfig, seed: int):
        self.config, self.seed = config, seed

    def __call__(self, epochs: np.ndarray, positions: np.ndarray) -> dict[str, Tensor]:
        """Return the noise of the samples at these places of the stream."""
        count = num_uniforms(self.config.mask_strategy, self.config.grid)
        drawn = torch.from_numpy(uniforms(count, self.seed, epochs, positions, NOISE)).float()
        return {"noise": mask_noise(self.config.mask_strategy, drawn, self.config.grid, self.config.mask_ratio)}


def _labelled_split(recipe: Recipe, source: Source, say: Printer) -> tuple[str, Source] | None:
    """Open the labelled split to test on, by its name, or say why there is none."""
    if not source.has_labels:
        say("kNN: off, the training split has no labels")
        return None
    data, split = replace(recipe.data, revision=source.revision), recipe.evals.split  # the same commit
    if split is None:
        split = next((s for s in ("test", "validation", "val") if s in list_splits(data)), None)
    if split is None:
        say("kNN: off, no test or validation split was found (--evals.split names one)")
        return None
    test = open_source(data, split=split, field="evals.split")
    check_pixels(test, data, refuse=False)  # what is trained on was looked at before
    for warning in (note for note in test.notes if note.startswith("warning")):
        say(f"{test.where}: {warning}")
    if not test.has_labels:
        say(f"kNN: off, split {split} has no labels")
        return None
    return split, test


def load_pretrained(
    name: str, *, field: str
) -> tuple[MAEForPreTraining, list[float], list[float], Range | None, EvalCrop]:
    """Load a model with its decoder, in float32 and evaluation mode: it, mean, std, pixel range and crop of its input.

    Args:
        name: a run folder (its newest checkpoint), a model folder or Hub id of ours or a vit_mae, or an official file.
        field: the argument that it was given as, for messages.

    Raises:
        ValueError: there is no such model, it has no decoder, or its mean and std are not known.
    """
    folder = model_folder(name, field=field)
    if isinstance(folder, Path) and folder.is_file():
        try:
            model = MAEForPreTraining.from_official(folder)
        except ValueError as error:
            raise ValueError(
                f"{field}={name} cannot be used as it is: {error} (`hf-mae convert` takes what the file does not say "
                "as options; then name the folder it writes)"
            ) from error
        if model.config.num_channels != len(IMAGENET_MEAN):
            raise ValueError(
                f"{field}={name} takes {model.config.num_channels} channel(s), and the file does not say their mean "
                "and std; use `hf-mae convert` with --image-mean and --image-std"
            )
        crop = EvalCrop(height_width(model.config.image_size))
        return model.eval(), list(IMAGENET_MEAN), list(IMAGENET_STD), None, crop
    values = read_config(folder)
    kind, architectures = values.get("model_type"), [str(one) for one in values.get("architectures") or ()]
    ours = kind in ("hf_mae", "vit_mae")
    if not ours or (architectures and not any(one.endswith("ForPreTraining") for one in architectures)):
        held = "a model of timm" if "pretrained_cfg" in values else f"a model without model_type ({architectures})"
        raise ValueError(
            f"{field}={name} holds {', '.join(architectures if kind else ()) or kind or held}, which cannot "
            "reconstruct; name a pretraining model with its decoder (what hf-mae pretrain makes)"
        )
    model = MAEForPreTraining.from_pretrained(folder, dtype=torch.float32).eval()
    return model, *load_preparation(folder, model.config, what=f"{field}={name}", say=Printer(True))


def reconstruct_files(name: str, files: Sequence[Path], out: Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """Write one picture with the reconstructions of image files.

    Args:
        name: as for `load_pretrained`.
        files: images of any format that training reads.
        out: where the picture goes; its suffix says the format.
        seed: chooses the masks.
        overwrite: replace a file that is there and that this function did not write, or that was edited since.

    Raises:
        ValueError: no file is named, one is missing or not an image, the model has no decoder, or `out` cannot be
            written.
    """
    if not files:
        raise ValueError(
            f"no image is named; name one or more image files: hf-mae reconstruct {shlex.quote(name)} IMAGE ..."
        )
    if missing := [str(path) for path in files if not path.is_file()]:
        raise ValueError(f"{', '.join(missing[:3])} is not a file; name image files")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out} cannot be written: its folder does not exist; make it or choose another --out")
    if out.is_dir() or out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"out={out} is not the name of an image file; use one such as reconstruction.png")
    if any(out.resolve() == path.resolve() for path in files):
        raise ValueError(f"out={out} is one of the images that are read; choose another --out")
    if out.exists() and not overwrite and not is_grid(out):
        raise ValueError(
            f"out={out} exists and is not known to be a reconstruction of ours; choose another --out, or replace it "
            "with --overwrite"
        )
    model, mean, std, pixel_range, crop = load_pretrained(name, field="model")
    config = model.config
    images = []
    for path in files:
        try:
            image = decode_image(path.read_bytes(), config.num_channels, pixel_range=pixel_range)
            images.append(torch.from_numpy(to_array(crop_center(image, crop)).copy()))
        except (ImageError, OSError) as error:
            raise ValueError(f"{path} cannot be used: {error}; name an image file") from error
    rows = np.arange(len(images))
    pictures = reconstruct(
        model,
        torch.stack(images),
        noise=MaskNoise(config, seed)(np.zeros_like(rows), rows)["noise"],
        mean=mean,
        std=std,
    )
    try:
        pictures.grid(out)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"out={out} cannot be written ({error}); choose another --out") from error
