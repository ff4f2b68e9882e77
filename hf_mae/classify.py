"""Classification from a recipe: fine-tuning, linear probe, partial fine-tuning and training from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoImageProcessor

from hf_mae.data.augment import check_augment
from hf_mae.data.cached import FeatureBatches, Features, digest, read_features, write_features
from hf_mae.data.labels import check_labels
from hf_mae.data.order import DROP_PATH, Order, uniforms
from hf_mae.data.sources import SPLIT_NAMES, Source, list_splits, open_source
from hf_mae.data.whole import WholeSplit
from hf_mae.evaluation.classification import ClassificationQuality
from hf_mae.evaluation.features import FrozenFeatures, split_features
from hf_mae.evaluation.report import Drawing
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.classification import ClassifierRecipe, check_classifier
from hf_mae.run import Training, last_model, model_folder, progress, run
from hf_mae.training.best import Best
from hf_mae.training.checkpoint import TrainState
from hf_mae.training.distributed import full, gather_objects
from hf_mae.training.loop import Evaluator
from hf_mae.training.mixing import MixDraws
from hf_mae.training.monitors import Printer
from hf_mae.training.optim import MovingAverage, build_optimizer, describe_groups
from hf_mae.training.schedules import Plan
from hf_mae.training.tasks import Classification

EVAL_BATCH = 64
"""Images of an evaluation's forward pass, per process."""

ARCHITECTURE = (
    *("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "layer_norm_eps"),
)
"""Fields of a recipe's model that an encoder brings with it."""


def classify(recipe: ClassifierRecipe) -> Path:
    """Train a classifier, or continue the run in `recipe.out`.

    Everything a user can get wrong is checked before the first update. A collective: every process calls it.

    Returns:
        The run folder. `checkpoints/` has the last model, `best/` the best one.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    check_classifier(recipe)
    check_augment(recipe.augment)
    return run(ClassifierTraining(recipe))


class ClassifierTraining(Training[ClassifierRecipe]):
    """An encoder, pretrained or not, and a head; all of it is trained, or the last blocks, or the head alone."""

    forward_methods = ("features", "logits", "attention")
    baseline = "guessing by the frequency of the classes"

    def labels(self, source: Source, say: Printer) -> dict[str, Any]:
        """Refuse labels that cannot be trained on; find the split to test on."""
        self.source = source
        self.test = self._test_split(source, say)
        classes = check_labels(source, self.test, self.recipe.data)
        for note in classes.notes:
            say(note)
        self.names = list(classes.names)
        self.num_classes = len(self.names)
        return {"classes": self.names}

    def _test_split(self, source: Source, say: Printer) -> Source | None:
        data, evals = replace(self.recipe.data, revision=source.revision), self.recipe.evals  # the same commit
        usual = [name for kind in ("validation", "test") for name in SPLIT_NAMES[kind]]
        splits = [evals.split] if evals.split is not None else [s for s in usual if s in list_splits(data)]
        for split in splits:
            test = open_source(data, split=split, field="evals.split")
            if test.where != source.where:
                say(f"testing on {test.summary().removeprefix('data: ')}")
                return test
            if evals.split is not None:
                raise ValueError(
                    f"evals.split={split} is what is trained on ({source.where}); testing on it measures memory, name "
                    "another"
                )
        if evals.patience is not None:
            raise ValueError(
                f"evals.patience={evals.patience} needs a split to test on and none was found; name one with "
                "--evals.split, or leave the patience out"
            )
        say("no validation or test split was found (--evals.split names one): nothing is measured but the loss")
        return None

    def build(self, source: Source, resume_from: Path | None, accelerator: Accelerator, say: Printer) -> nn.Module:
        """Return the task: the model of the checkpoint, of the pretrained encoder, or a new one."""
        recipe, id2label = self.recipe, dict(enumerate(self.names))
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
        else:
            fields = {k: v for k, v in asdict(wish).items() if v is not None}
            # The official code trains the positions of a ViT from scratch.
            positions = "sincos" if recipe.freeze_pos_embed else "learned"
            model = MAEForImageClassification(MAEConfig(**fields, pos_embed=positions, id2label=id2label))
            say("encoder: new weights (from scratch)")
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
        config = self.config = model.config
        self.image_size, self.channels = height_width(config.image_size), config.num_channels
        if len(recipe.augment.mean) != self.channels:
            example = " ".join(["0.5"] * self.channels)
            raise ValueError(
                f"augment.mean={recipe.augment.mean} has {len(recipe.augment.mean)} values but the encoder takes "
                f"{self.channels} channel(s); add --augment.mean {example} --augment.std {example}"
            )
        return Classification(
            model, recipe.augment.mean, recipe.augment.std, label_smoothing=recipe.augment.label_smoothing
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

    def optimizer(self, task: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW, LARS or SGD over the trainable parameters, grouped by layer."""
        assert isinstance(task, Classification)
        return build_optimizer(task.model, self.recipe.optim, num_layers=self.config.num_hidden_layers)

    def describe(self, optimizer: torch.optim.Optimizer, plan: Plan) -> list[str]:
        """Return the learning rate of each group."""
        return describe_groups(optimizer, plan.lr)

    def extras(self, images_per_epoch: int) -> Callable[..., Mapping[str, Tensor]] | None:
        """Return what draws stochastic depth and mixing."""
        recipe, draws = self.recipe, list[Callable[..., Mapping[str, Tensor]]]()
        if self.config.drop_path_rate > 0:
            draws.append(DropPathNoise(2 * self.config.num_hidden_layers, recipe.seed))
        if recipe.mixes_pairs:
            draws.append(
                MixDraws(
                    recipe.augment,
                    recipe.seed,
                    size=self.image_size,
                    images=recipe.global_batch // recipe.data.repeats,
                    length=images_per_epoch,
                    repeats=recipe.data.repeats,
                )
            )

        def all_draws(epochs: Any, positions: Any) -> dict[str, Tensor]:
            return {name: tensor for draw in draws for name, tensor in draw(epochs, positions).items()}

        return all_draws

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
        test = self._whole(self.test, accelerator) if self.test is not None else None
        neighbours = evals.knn or evals.logistic
        if neighbours and recipe.trainable_blocks != 0:
            say("note: evals.knn and evals.logistic judge frozen features; without --trainable-blocks 0 they are off")
            neighbours = False
        neighbours = neighbours and test is not None and not self.resumed  # measured before the first update
        self.cached: Features | None = None
        cached_test: Features | None = None
        if recipe.cached_features or neighbours:
            self.cached = self._encode(self._whole(self.source, accelerator), inner, out, accelerator, say)
            _limit_bad(self.cached, recipe.data.max_bad_fraction)
            if test is not None:
                cached_test = self._encode(test, inner, out, accelerator, say)
        evaluators: list[Evaluator] = []
        if neighbours and cached_test is not None and self.cached is not None:
            evaluators.append(
                FrozenFeatures(
                    (self.cached.features, self.cached.labels),
                    (cached_test.features, cached_test.labels),
                    accelerator,
                    knn=evals.knn,
                    logistic=evals.logistic,
                )
            )
        self.test_images = test
        if test is not None:
            batches: Any = test
            drawing = Drawing(self.names, test.picture, test.num_rows, out / "pictures", accelerator)
            if recipe.cached_features and cached_test is not None:
                rank, world = accelerator.process_index, accelerator.num_processes
                batches = cached_test.batches(4096, rank=rank, world=world)
            evaluators.append(
                ClassificationQuality(
                    batches,
                    self.names,
                    accelerator,
                    every=recipe.eval_every,
                    at_start=evals.at_start,
                    average=average,
                    out=out,
                    draw=drawing if evals.pictures else None,
                )
            )
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

    def _whole(self, source: Source, accelerator: Accelerator) -> WholeSplit:
        return WholeSplit(
            source,
            image_size=self.image_size,
            channels=self.channels,
            batch=EVAL_BATCH,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            num_workers=max(1, self.recipe.num_workers),
            max_pixels=self.recipe.data.max_pixels,
        )

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

    def baseline_loss(self, inner: nn.Module) -> float:
        """Return the entropy of the classes' frequencies, or of even ones where counting means reading the images."""
        assert isinstance(inner, Classification)
        labels = self.source.all_labels()
        if labels is None or not (labels >= 0).any():
            return math.log(len(self.names))
        return inner.trivial_loss(torch.from_numpy(labels[labels >= 0]))

    def judge(
        self, out: Path, task: nn.Module, average: MovingAverage | None, accelerator: Accelerator
    ) -> Callable[[Mapping[str, float], TrainState], bool] | None:
        """Return what keeps the best model."""
        if self.test is None:
            return None
        evals = self.recipe.evals
        return Best(
            out / "best",
            metric=evals.best,
            accelerator=accelerator,
            task=task,
            average=average,
            patience=evals.patience,
        )

    def report(self, out: Path, rows: list[dict[str, Any]], verdict: str, say: Printer) -> None:
        """Say what came out, and what to do next."""
        say(verdict)
        for name, title in (
            ("top1", "top-1"),
            ("ema_top1", "top-1 of the averaged weights"),
            ("knn_top1", "kNN (k = 20, T = 0.07)"),
            ("knn_plain_top1", "kNN (k = 20, plain vote)"),
            ("logistic_top1", "logistic regression"),
        ):
            values = [(row[name], row["step"]) for row in rows if name in row]
            if values:
                top, step = max(values, key=lambda value: value[0])
                best = f"; best {top:.4f} at step {step}" if len(values) > 1 else ""
                say(f"{title}: {values[-1][0]:.4f} on {len(self.names)} classes{best}")
        if self.test_images is not None and (bad := self.test_images.bad):
            say(f"warning: {len(bad)} test images of this process cannot be decoded and were left out: {bad[0]} ...")
        if pictures := sorted((out / "pictures").glob("*.png")):
            say(f"pictures: {', '.join(p.name for p in pictures)} in {out / 'pictures'}")
        if model := last_model(out):
            load = "hf_mae.MAEForImageClassification.from_pretrained"
            say(f'model: {model}, load it with {load}("{model}")')


class DropPathNoise:
    """Draws stochastic depth for each sample from (seed, epoch, position): {"drop_path_noise": float32 [n, draws]}."""

    def __init__(self, draws: int, seed: int):
        self.draws, self.seed = draws, seed

    def __call__(self, epochs: np.ndarray, positions: np.ndarray) -> dict[str, Tensor]:
        """Return the draws of the samples at these places of the stream."""
        drawn = uniforms(self.draws, self.seed, epochs, positions, DROP_PATH)
        return {"drop_path_noise": torch.from_numpy(drawn).float()}


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
    key = (split.source.fingerprint, *facts, config, inner.processor(), accelerator.mixed_precision)
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
    if len(features.bad) > max_bad_fraction * rows:
        raise RuntimeError(
            f"{len(features.bad)} of {rows} training images cannot be decoded, more than data.max_bad_fraction="
            f"{max_bad_fraction}; mend the data, or raise --data.max-bad-fraction"
        )
