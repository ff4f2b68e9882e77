"""What a classification run is: fine-tuning, linear probe, partial fine-tuning and training from scratch.

The same recipe as for pretraining, with a head in place of the decoder. The four protocols differ in numbers only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hf_mae.recipes.base import Augment, Optim, Recipe, Rule, Schedule, Size
from hf_mae.recipes.checks import check


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Encoder and head. None is what the encoder of `--init-from` has; from scratch, what `hf_mae.MAEConfig` has."""

    image_size: Size | None = None
    """Input height and width in pixels. Where it is not the encoder's, its positions are resized (bicubic)."""
    patch_size: Size | None = None
    """Patch height and width in pixels."""
    num_channels: int | None = None
    """Colour channels: 3 reads images as RGB, 1 as grey."""
    hidden_size: int | None = None
    """Encoder width."""
    num_hidden_layers: int | None = None
    """Encoder blocks."""
    num_attention_heads: int | None = None
    """Encoder heads."""
    intermediate_size: int | None = None
    """Encoder MLP width; from scratch, None is four times the encoder width."""
    layer_norm_eps: float | None = None
    """Epsilon of every LayerNorm."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the patch tokens, then `fc_norm`; or `norm`, then the cls token."""
    head: Literal["linear", "batchnorm"] = "linear"
    """A linear layer, or batch normalisation without scale and shift before it (the official linear probe)."""
    head_init_std: float = 2e-5
    """Standard deviation of the head's first weights (truncated normal); its bias starts at 0. The official code has
    2e-5 on a pretrained encoder and 0.01 in a linear probe; from scratch it leaves timm's 0.02, which the scratch-*
    presets have."""
    drop_path_rate: float = 0.0
    """Stochastic depth: the rate of the last block; the first has 0, those between lie on a line."""


@dataclass(frozen=True, kw_only=True)
class ClassifierAugment(Augment):
    """From a decoded image to `image_size`, and what is done to a batch and its labels."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area fraction of a random resized crop."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix (Yun et al. 2019); 0 is off. With both, each mix is one or the other with equal chance."""
    mix_prob: float = 1.0
    """Chance that a mix takes place at all."""
    mix_mode: Literal["batch", "pair"] = "batch"
    """One draw of mixup or cutmix for each global batch, or one for each pair of images in it."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes."""


@dataclass(frozen=True, kw_only=True)
class ClassifierOptim(Optim):
    """The optimizer, with a learning rate that may fall from the head to the first layer."""

    name: Literal["adamw", "adam", "lamb", "lars", "rmsprop", "sgd"] = "adamw"
    """The optimizer. LARS adapts matrices only, as in the official linear probe; LAMB and RMSProp (TensorFlow's) are
    timm's; Adam's weight decay is part of the gradient."""
    base_lr: float = 1e-3
    """Learning rate at a global batch of 256; lr = base_lr * global_batch / 256."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors, biases, tokens and positions have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW, Adam and LAMB."""
    decay_tokens: bool = False
    """Weight-decay the cls token and the positions too. False is the official behaviour of fine-tuning."""
    decay_vectors: bool = False
    """Weight-decay biases and normalisation too: torch's own default, where groups are not thought of."""
    momentum: float = 0.9
    """Of LARS, RMSProp and SGD."""
    nesterov: bool = False
    """Of SGD."""
    agc: float | None = None
    """Adaptive gradient clipping (Brock et al. 2021): the largest ratio of a unit's gradient to its weights."""
    layer_decay: float = 1.0
    """lr of block i of L is multiplied by layer_decay ** (L - i), counted from 0; of the embedding by one power more;
    1 gives all the same."""


@dataclass(frozen=True, kw_only=True)
class ClassifierEvals:
    """What is measured while training: always top-1, top-5, loss and calibration on a labelled split."""

    split: str | None = None
    """Labelled split to test on; None takes `validation` or `test`."""
    best: Literal["top1", "eval_loss", "ema_top1"] = "top1"
    """The number that decides which model is kept as the best."""
    patience: int | None = None
    """Stop after this many evaluations without a better one; None trains to the end."""
    pictures: bool = True
    """Draw confusion matrix, worst mistakes, attention maps and accuracy per class at the end."""
    at_start: bool = False
    """Evaluate before the first update as well."""
    knn: bool = False
    """Nearest neighbours (k = 20, weighted with temperature 0.07, and plain) on the frozen encoder's features."""
    logistic: bool = False
    """Logistic regression on the frozen encoder's features. Left out, with a sentence, where training images * features
    * classes are more than 5,000,000,000: one process would fit it for hours."""
    crop_pct: float | None = None
    """Share of the resized image that the centre crop of every evaluation keeps. None is the official rule (224/256 up
    to 224 pixels, 1 above; 1 for inputs that are not square), also for images of exactly the input size; 1 shows the
    whole of small images made for this size (CIFAR). The model folder states it. For models of timm: `model.crop_pct`.
    """


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What the scores are trained for."""

    name: Literal["ce", "bce"] = "ce"
    """Cross-entropy of one distribution over the classes, or binary cross-entropy of each class by itself."""
    target: Literal["soft", "threshold", "binarize"] = "threshold"
    """Targets of `bce` for mixed images. `soft`: the shares of both labels, summing to 1. `threshold`: 1 for each class
    whose smoothed share is above `threshold` (timm). `binarize`: 1 for both labels, then smoothed (the wording of
    ResNet strikes back)."""
    threshold: float = 0.2
    """Of `threshold`."""
    sum_classes: bool = False
    """Sum `bce` over the classes rather than average it."""


@dataclass(frozen=True, kw_only=True)
class LabelledRecipe(Recipe):
    """A run that learns labels: what all kinds of classification share."""

    epochs: float = 100.0
    """Length of the run, in passes over the data."""
    global_batch: int = 1024
    """Images per optimizer update, over all processes and accumulation."""
    init_from: str = ""
    """The pretrained model whose weights are taken, all but the head's: see the command. Empty trains from scratch."""
    loss: Loss = field(default_factory=Loss)
    augment: ClassifierAugment = field(default_factory=ClassifierAugment)
    optim: ClassifierOptim = field(default_factory=ClassifierOptim)
    schedule: Schedule = field(default_factory=lambda: Schedule(warmup_epochs=5, min_lr=1e-6))
    evals: ClassifierEvals = field(default_factory=ClassifierEvals)  # pyright: ignore[reportIncompatibleVariableOverride]

    deciding: ClassVar[frozenset[str]] = frozenset({"evals.patience", "evals.best", "evals.split", "evals.crop_pct"})
    rules: ClassVar[tuple[Rule, ...]] = (
        ("model.drop_path_rate", "must lie in [0, 1); the paper uses 0.1 to 0.3", lambda v: 0 <= v < 1),
        ("augment.mixup", "must be at least 0 and finite; 0 is off", lambda v: 0 <= v < float("inf")),
        ("augment.cutmix", "must be at least 0 and finite; 0 is off", lambda v: 0 <= v < float("inf")),
        (
            "augment.mix_prob",
            "must lie in (0, 1]; mixup and cutmix of 0 switch mixing off",
            lambda v: 0 < v <= 1,
        ),
        ("augment.label_smoothing", "must lie in [0, 1)", lambda v: 0 <= v < 1),
        ("loss.threshold", "must lie in [0, 1)", lambda v: 0 <= v < 1),
        ("optim.momentum", "must lie in [0, 1)", lambda v: 0 <= v < 1),
        ("optim.layer_decay", "must be above 0 and at most 1; 1 is off", lambda v: 0 < v <= 1),
        ("optim.agc", "must be above 0; leave it out for none", lambda v: v is None or v > 0),
        ("evals.patience", "must be at least 1; leave it out to train to the end", lambda v: v is None or v >= 1),
    )

    @property
    def mixes_pairs(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.augment.mixup > 0 or self.augment.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe(LabelledRecipe):
    """A whole classification run with an encoder of ours: fine-tuning, linear probe, partial, from scratch."""

    init_from: str = ""
    """The pretrained encoder: a run folder, a model folder, a Hub id or an official .pth file. Empty trains from
    scratch."""
    trainable_blocks: float | None = None
    """Train the last so many blocks and the head; 0.5 is the MLP of the last block, 0 the head alone. None trains
    everything."""
    freeze_pos_embed: bool = False
    """Keep the positions fixed. The official code trains them in fine-tuning."""
    cached_features: bool = False
    """Encode every image once, without augmentation, and train the head on the features. Needs
    `--trainable-blocks 0`."""
    model: Classifier = field(default_factory=Classifier)  # pyright: ignore[reportIncompatibleVariableOverride]

    only_fresh: ClassVar[frozenset[str]] = frozenset({"model.head_init_std"})
    rules: ClassVar[tuple[Rule, ...]] = (
        *LabelledRecipe.rules,
        ("model.head_init_std", "must be at least 0 and finite", lambda v: 0 <= v < float("inf")),
        (
            "trainable_blocks",
            "must be 0, 0.5 (the MLP of the last block) or a whole number; leave it out to train everything",
            lambda v: v is None or v == 0.5 or (v >= 0 and v == int(v)),
        ),
    )

    @property
    def max_micro_batch(self) -> int:
        """The statistics of the official probe's batch normalisation are of 512 images."""
        return 512 if self.model.head == "batchnorm" else super().max_micro_batch

    @property
    def min_micro_batch(self) -> int:
        """Batch normalisation has no statistics of one image."""
        return 2 if self.model.head == "batchnorm" else 1


def check_labelled(recipe: LabelledRecipe) -> None:
    """Refuse what makes no sense for any kind of classification, before anything is opened or made.

    Raises:
        ValueError: the first rule that is broken, with the values and the remedy.
    """
    check(recipe)
    if recipe.mixes_pairs and recipe.global_batch % 2:
        raise ValueError(
            f"global_batch={recipe.global_batch} is odd, and mixup and cutmix mix pairs of images; use "
            f"{recipe.global_batch + 1}"
        )
    if recipe.mixes_pairs and recipe.data.repeats % 2 == 0:
        raise ValueError(
            f"data.repeats={recipe.data.repeats} is even: mixup and cutmix would mix each image with itself, since "
            "partners are half a batch apart; use an odd number, or set augment.mixup and augment.cutmix to 0"
        )
    if recipe.mixes_pairs and recipe.global_batch < 2 * recipe.data.repeat_augment:
        raise ValueError(
            f"global_batch={recipe.global_batch} is less than twice data.repeat_augment={recipe.data.repeat_augment}: "
            "mixup and cutmix would mix copies of one image; use at least "
            f"{2 * recipe.data.repeat_augment}"
        )
    if recipe.evals.best == "ema_top1" and recipe.optim.ema_decay is None:
        raise ValueError("evals.best=ema_top1 needs averaged weights; add --optim.ema-decay 0.9999")
    if recipe.optim.nesterov and recipe.optim.name != "sgd":
        raise ValueError(f"optim.nesterov is for SGD, and optim.name={recipe.optim.name}; leave it out, or take sgd")
    if recipe.optim.decay_vectors and recipe.optim.name == "lars":
        raise ValueError("optim.decay_vectors with optim.name=lars would decay what LARS does not adapt; leave it out")
    smoothing = recipe.augment.label_smoothing
    if recipe.loss.name == "bce" and recipe.loss.target == "threshold" and recipe.loss.threshold == 0 and smoothing > 0:
        raise ValueError(
            f"loss.threshold=0 with augment.label_smoothing={smoothing} makes every class of every image positive; use "
            "--loss.threshold 0.2, --loss.target binarize, or --augment.label-smoothing 0"
        )


def check_classifier(recipe: ClassifierRecipe) -> None:
    """Refuse what makes no sense before anything is opened or made.

    Raises:
        ValueError: the first rule that is broken, with the values and the remedy.
    """
    check_labelled(recipe)
    if recipe.cached_features and recipe.trainable_blocks != 0:
        raise ValueError(
            f"cached_features=True trains a head on frozen features, but trainable_blocks={recipe.trainable_blocks}; "
            "add --trainable-blocks 0"
        )
    if recipe.cached_features and recipe.model.head != "batchnorm":
        raise ValueError(
            f"cached_features=True needs model.head=batchnorm: with model.head={recipe.model.head} the norm before the "
            "head is trained as well, and features are what comes after it; add --model.head batchnorm"
        )
    if recipe.trainable_blocks is not None and not recipe.init_from:
        raise ValueError(
            f"trainable_blocks={recipe.trainable_blocks} would freeze an encoder that has learned nothing; name a "
            "pretrained one with --init-from"
        )
    if recipe.optim.layer_decay < 1 and not recipe.init_from:
        raise ValueError(
            f"init_from is empty and optim.layer_decay={recipe.optim.layer_decay} is meant for a pretrained encoder; "
            "name one with --init-from, or train from scratch with a scratch-* preset (--optim.layer-decay 1)"
        )
    if recipe.mixes_pairs and recipe.cached_features:
        raise ValueError(
            "augment.mixup and augment.cutmix mix pixels, and cached_features=True has none; set both to 0"
        )
    if recipe.cached_features and max(recipe.data.repeats, recipe.data.repeat_augment) > 1:
        name = "repeats" if recipe.data.repeats > 1 else "repeat_augment"
        times = getattr(recipe.data, name)
        raise ValueError(
            f"data.{name}={times} augments each image several times, and cached_features=True does not augment; leave "
            "it out"
        )
