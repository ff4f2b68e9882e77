"""Classification from a recipe: fine-tuning, linear probe, partial fine-tuning and training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoImageProcessor

from hf_mae.data.augment import check_augment
from hf_mae.data.cached import FeatureBatches, Features, digest, read_features, write_features
from hf_mae.data.images import stated_range
from hf_mae.data.loader import bad_allowed
from hf_mae.data.order import DROP_PATH, Order
from hf_mae.data.sources import Source
from hf_mae.data.whole import WholeSplit
from hf_mae.evaluation.features import FrozenFeatures, logistic_is_too_large, split_features
from hf_mae.labelled import LabelledTraining, Noise, together
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.classification import Classifier, ClassifierRecipe, check_classifier
from hf_mae.recipes.defaults import Chosen
from hf_mae.run import model_folder, progress, run
from hf_mae.training.distributed import full, gather_objects
from hf_mae.training.loop import Evaluator
from hf_mae.training.monitors import Printer
from hf_mae.training.optim import MovingAverage, build_optimizer
from hf_mae.training.origins import lineage_of
from hf_mae.training.tasks import Classification

ARCHITECTURE = (
    *("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "layer_norm_eps"),
)
"""Fields of a recipe's model that an encoder brings with it."""


def classify(recipe: ClassifierRecipe, *, chosen: Chosen = None) -> Path:
    """Train a classifier, or continue the run in `recipe.out`.

    Everything a user can get wrong is checked before the first update. A collective: every process calls it.

    Args:
        recipe: what to do.
        chosen: names of its fields that have to stay; the others may be adapted to the data, which is said. None: all.

    Returns:
        The run folder. `checkpoints/` has the last model, `best/` the best one.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    check_classifier(recipe)
    check_augment(recipe.augment)
    return run(ClassifierTraining(recipe), chosen)


class ClassifierTraining(LabelledTraining[ClassifierRecipe]):
    """An encoder, pretrained or not, and a head; all of it is trained, or the last blocks, or the head alone."""

    forward_methods = ("features", "logits", "attention")
    load_with: ClassVar[str] = "hf_mae.MAEForImageClassification.from_pretrained"

    def find_weights(self) -> None:
        """Refuse an encoder that is not there."""
        if self.recipe.init_from:
            model_folder(self.recipe.init_from, field="init_from")

    def build(self, source: Source, resume_from: Path | None, accelerator: Accelerator, say: Printer) -> nn.Module:
        """Return the task: the model of the checkpoint, of the pretrained encoder, or a new one."""
        recipe, id2label = self.recipe, dict(enumerate(self.names))
        self.warn_of_loss(say)
        wish, self.resumed = recipe.model, resume_from is not None
        if resume_from is not None:
            model = MAEForImageClassification(MAEConfig.from_pretrained(resume_from / "model"))
        elif recipe.init_from:
            architecture = {k: v for k, v in asdict(wish).items() if k in ARCHITECTURE and v is not None}
            encoder = model_folder(recipe.init_from, field="init_from")
            model = MAEForImageClassification.from_encoder(
                encoder,
                id2label=id2label,
                image_size=wish.image_size,
                pool=wish.pool,
                head=wish.head,
                head_init_std=wish.head_init_std,
                drop_path_rate=wish.drop_path_rate,
                train_pos_embed=not recipe.freeze_pos_embed,
                **architecture,
            )
            say(f"encoder: {encoder}")
            self._compare_normalisation(encoder, say)
            weights = {k: v for k, v in model.state_dict().items() if not k.startswith(("head", "fc_norm"))}
            self.origin = {"init_from": str(encoder), "encoder_digest": digest(weights=weights)}
            if accelerator.is_main_process:  # which writes it down, and may have to ask the Hub
                self.origin["lineage"] = lineage_of(recipe.init_from)
        else:
            fields = {k: v for k, v in asdict(wish).items() if v is not None}
            # The official code trains the positions of a ViT from scratch.
            positions = "sincos" if recipe.freeze_pos_embed else "learned"
            model = MAEForImageClassification(MAEConfig(**fields, pos_embed=positions, id2label=id2label))
            say("encoder: new weights (from scratch)")
            if wish.head_init_std == Classifier.head_init_std:
                say(
                    f"note: model.head_init_std={wish.head_init_std:g} is for a pretrained encoder; from scratch the "
                    "official code starts at timm's: --model.head-init-std 0.02"
                )
        model.config.label2id = {name: i for i, name in id2label.items()}
        if (recipe.trainable_blocks or 0) > (depth := model.config.num_hidden_layers):
            raise ValueError(
                f"trainable_blocks={recipe.trainable_blocks:g} is more than the {depth} blocks of the encoder; use 0, "
                f"0.5 or a whole number up to {depth}, or leave it out to train everything"
            )
        model.set_trainable(recipe.trainable_blocks, freeze_pos_embed=recipe.freeze_pos_embed)
        model.checkpoint_activations(recipe.engine.checkpoint_activations)
        if recipe.engine.compile:
            for block in model.blocks:
                block.compile(fullgraph=True, dynamic=False)
        config, self.crop_pct = model.config, recipe.evals.crop_pct
        self.config = config
        self.image_size, self.channels = height_width(config.image_size), config.num_channels
        if len(recipe.augment.mean) != self.channels:
            example = " ".join(["0.5"] * self.channels)
            raise ValueError(
                f"augment.mean={recipe.augment.mean} has {len(recipe.augment.mean)} values but the encoder takes "
                f"{self.channels} channel(s); add --augment.mean {example} --augment.std {example}"
            )
        return Classification(
            model,
            recipe.augment.mean,
            recipe.augment.std,
            label_smoothing=recipe.augment.label_smoothing,
            loss=recipe.loss,
            crop_pct=recipe.evals.crop_pct,
        )

    def _compare_normalisation(self, encoder: Path | str, say: Printer) -> None:
        """Warn where images are not normalised as they were in pretraining, as far as the encoder's folder says."""
        try:
            processor = AutoImageProcessor.from_pretrained(encoder)
        except (OSError, ValueError):
            return
        augment = self.recipe.augment
        theirs, ours = (processor.image_mean, processor.image_std), (list(augment.mean), list(augment.std))
        if any(not np.allclose(x, y, atol=1e-4) for x, y in zip(theirs, ours, strict=True) if len(x) == len(y)):
            flags = " ".join(
                f"--augment.{name} {' '.join(f'{v:g}' for v in values)}"
                for name, values in zip(("mean", "std"), theirs, strict=True)
            )
            say(f"warning: the encoder was pretrained with another augment.mean and augment.std: {flags}")
        if (limits := stated_range(processor)) is not None and limits != self.recipe.data.pixel_range:
            say(f"warning: the encoder was pretrained with --data.pixel-range {limits[0]:g} {limits[1]:g}")

    def optimizer(self, task: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW, LARS or SGD over the trainable parameters, grouped by layer."""
        assert isinstance(task, Classification)
        return build_optimizer(task.model, self.recipe.optim, num_layers=self.config.num_hidden_layers)

    def extras(self, images_per_epoch: int) -> Callable[..., Mapping[str, Tensor]] | None:
        """Return what draws stochastic depth and mixing."""
        draws = self.mixing(images_per_epoch)
        if self.config.drop_path_rate > 0:
            draws.append(Noise("drop_path_noise", 2 * self.config.num_hidden_layers, self.recipe.seed, DROP_PATH))
        return together(draws)

    def sample(self, n: int) -> dict[str, Tensor]:
        """Return n black images of the first class, or n features."""
        labels = torch.zeros(n, dtype=torch.int64)
        if self.recipe.cached_features:
            return {"features": torch.zeros(n, self.config.hidden_size), "labels": labels}
        pixel_values = torch.zeros(n, self.channels, *self.image_size, dtype=torch.uint8)
        keep_all = torch.ones(n, 2 * self.config.num_hidden_layers)
        return {"pixel_values": pixel_values, "labels": labels, "drop_path_noise": keep_all}

    def evaluators(
        self, out: Path, inner: nn.Module, average: MovingAverage | None, accelerator: Accelerator, say: Printer
    ) -> list[Evaluator]:
        """Return accuracy and calibration on the test split; for a frozen encoder also neighbours and regression."""
        recipe, evals = self.recipe, self.recipe.evals
        test = self.whole_test(accelerator)
        neighbours = evals.knn or evals.logistic
        if neighbours and recipe.trainable_blocks != 0:
            say("note: evals.knn and evals.logistic judge frozen features; without --trainable-blocks 0 they are off")
            neighbours = False
        neighbours = neighbours and test is not None and not self.resumed  # measured before the first update
        self.cached: Features | None = None
        cached_test: Features | None = None
        if recipe.cached_features or neighbours:
            self.cached = self._encode(self.whole(self.source, accelerator), inner, out, accelerator, say)
            _limit_bad(self.cached, recipe.data.max_bad_fraction)
            if test is not None:
                cached_test = self._encode(test, inner, out, accelerator, say)
        evaluators: list[Evaluator] = []
        if neighbours and cached_test is not None and self.cached is not None:
            rows, width = self.cached.features.shape
            if evals.logistic and (too_large := logistic_is_too_large(rows, width, len(self.names))):
                say(f"note: {too_large}")
                evals = replace(evals, logistic=False)
            evaluators.append(
                FrozenFeatures(
                    (self.cached.features, self.cached.labels),
                    (cached_test.features, cached_test.labels),
                    accelerator,
                    knn=evals.knn,
                    logistic=evals.logistic,
                )
            )
        if test is not None:
            batches: Any = test
            if recipe.cached_features and cached_test is not None:
                rank, world = accelerator.process_index, accelerator.num_processes
                batches = cached_test.batches(4096, rank=rank, world=world)
            evaluators.append(self.quality(batches, test, out, average, accelerator))
        return evaluators

    def _encode(
        self, split: WholeSplit, inner: nn.Module, out: Path, accelerator: Accelerator, say: Printer
    ) -> Features:
        data = (self.names, self.recipe.data.label_column)
        with torch.compiler.set_stance("force_eager") if self.recipe.engine.compile else nullcontext():
            features = encode(split, inner, out.parent / "features", accelerator, say, facts=data)
        wrong = (features.labels < 0) | (features.labels >= len(self.names))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise RuntimeError(
                f"{split.source.where}: row {int(features.rows[at])} has the label {int(features.labels[at])}, "
                f"which is none of the {len(self.names)} classes; leave such rows out, or number the classes from 0"
            )
        return features

    def batches(
        self, order: Order, images_per_epoch: int, cursor: int, accelerator: Accelerator
    ) -> FeatureBatches | None:
        """Return features in place of images where the recipe says so."""
        if not self.recipe.cached_features:
            return None
        assert self.cached is not None
        return FeatureBatches(
            self.cached,
            order,
            images_per_epoch=images_per_epoch,
            global_batch=self.recipe.global_batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            cursor=cursor,
        )


def encode(
    split: WholeSplit,
    inner: nn.Module,
    folder: Path,
    accelerator: Accelerator,
    say: Printer,
    *,
    facts: Sequence[Any] = (),
) -> Features:
    """Return the features of a whole split, from `folder` if this encoder has made them before.

    A collective: call it on all ranks. Rows that cannot be decoded are left out, and said.

    Args:
        split: the images.
        inner: the task; its `features` method is used.
        folder: where features are kept, named by what they depend on.
        accelerator: carries device and ranks.
        say: for a line on what is being done.
        facts: what else the labels depend on.
    """
    assert isinstance(inner, Classification)
    weights = {k: full(v) for k, v in inner.model.state_dict().items() if not k.startswith("head")}
    config = {k: v for k, v in inner.config.to_dict().items() if k in (*ARCHITECTURE, "image_size", "pool")}
    pixels = (asdict(split.crop), inner.processor())
    key = (split.source.fingerprint, *facts, config, *pixels, accelerator.mixed_precision)
    path = folder / f"{digest(*key, weights=weights)}.safetensors"
    found = read_features(path)
    if all(gather_objects(found is not None, accelerator)):  # all have read it, or all encode
        assert found is not None
        say(f"features: {len(found.rows):,} images were encoded before: {path}")
        return _tell_bad(found, split, say)
    say(f"features: encoding {split.num_rows:,} images once, without augmentation")
    inner.eval()
    tensors = split_features(inner, progress(split, accelerator), accelerator)
    bad = [(row.shard, row.row, row.reason) for rank in gather_objects(split.bad, accelerator) for row in rank]
    features = Features(*tensors, bad=tuple(bad))
    if accelerator.is_main_process:
        try:
            write_features(path, features)
        except OSError as error:
            say(f"warning: the features could not be kept for other probes: {error}")
    accelerator.wait_for_everyone()
    return _tell_bad(features, split, say)


def _tell_bad(features: Features, split: WholeSplit, say: Printer) -> Features:
    if features.bad:
        shard, row, reason = features.bad[0]
        say(
            f"warning: {len(features.bad)} of {split.num_rows:,} images cannot be decoded and are left out, first "
            f"{shard}, row {row}: {reason}"
        )
    return features


def _limit_bad(features: Features, max_bad_fraction: float) -> None:
    rows = len(features.rows) + len(features.bad)
    if not len(features.rows):
        raise RuntimeError(f"none of {rows} training images can be decoded; name other data, or fix them")
    if len(features.bad) > bad_allowed(max_bad_fraction, rows):
        raise RuntimeError(
            f"{len(features.bad)} of {rows} training images cannot be decoded, more than data.max_bad_fraction="
            f"{max_bad_fraction}; mend the data, or raise --data.max-bad-fraction"
        )
