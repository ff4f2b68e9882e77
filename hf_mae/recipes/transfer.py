"""Presets for what a pretrained encoder is worth: fine-tuning, linear probe, training from scratch, other data sets."""

from __future__ import annotations

import re
from dataclasses import replace

from hf_mae.recipes.base import VIT_SIZES, Data, Schedule
from hf_mae.recipes.classification import (
    Classifier,
    ClassifierAugment,
    ClassifierEvals,
    ClassifierOptim,
    ClassifierRecipe,
)

# ------------------------------------------------------------------------------------------------ ImageNet fine-tuning


def _encoder(size: str, **fields: object) -> Classifier:
    architecture = {"patch_size": 16, **VIT_SIZES[size]}
    return Classifier(**(architecture | fields))  # type: ignore[arg-type]


_IMAGENET = Data(path="ILSVRC/imagenet-1k", remainder="drop")

# RandAugment(9, 0.5), mixup 0.8, cutmix 1.0 and smoothing 0.1: Tables 9 and 11 alike.
_STRONG = ClassifierAugment(rand_augment="rand-m9-mstd0.5-inc1", mixup=0.8, cutmix=1.0, label_smoothing=0.1)

# He et al. 2022, Table 9.
_TABLE_9 = ClassifierRecipe(
    name="",
    source="He et al. 2022, Table 9",
    expected="",
    global_batch=1024,
    save_every=1000,
    eval_every=1251 * 5,
    data=_IMAGENET,
    augment=_STRONG,
    optim=ClassifierOptim(base_lr=1e-3, weight_decay=0.05, layer_decay=0.75),
    schedule=Schedule(warmup_epochs=5, min_lr=1e-6),
)
_EPOCHS = {"b": 100.0, "l": 50.0, "h": 50.0}
_TABLE_3 = {"b": 83.6, "l": 85.9, "h": 86.9}
# facebookresearch/mae FINETUNE.md, top-1 of its released fine-tuned weights.
_RELEASED = {"b": 83.664, "l": 85.952, "h": 86.928}


def _table_9(size: str) -> ClassifierRecipe:
    return replace(
        _TABLE_9,
        name=f"finetune-vit-{size}-table9",
        expected=f"paper, Table 3: {_TABLE_3[size]} % (1600 epochs, ImageNet-1K alone)",
        epochs=_EPOCHS[size],
        model=_encoder(size, drop_path_rate={"b": 0.1, "l": 0.1, "h": 0.2}[size]),
    )


def _repository(size: str) -> ClassifierRecipe:
    base_lr, layer_decay = {"b": (5e-4, 0.65), "l": (1e-3, 0.75), "h": (1e-3, 0.75)}[size]
    return replace(
        _table_9(size),
        name=f"finetune-vit-{size}",
        source="facebookresearch/mae FINETUNE.md, the recipe of the released weights (differs from Table 9)",
        expected=f"authors' repository: {_RELEASED[size]} % with their weights; paper, Table 3: {_TABLE_3[size]} %",
        model=_encoder(size, drop_path_rate={"b": 0.1, "l": 0.2, "h": 0.3}[size]),
        augment=replace(_STRONG, erase_prob=0.25),
        optim=replace(_TABLE_9.optim, base_lr=base_lr, layer_decay=layer_decay),
    )


_H448 = replace(
    _repository("h"),
    name="finetune-vit-h-448",
    source="ours: the recipe of finetune-vit-h at 448 pixels; the authors' own was never published",
    expected="paper, Table 3: 87.8 %; mmpretrain's reproduction: 87.3 %",
    model=_encoder("h", image_size=448, drop_path_rate=0.3),
)

# ------------------------------------------------------------------------------------------------ from scratch

# He et al. 2022, Table 11. The official code trains the positions of a ViT from scratch; so do these. Its
# main_finetune.py makes the head small (2e-5) only where it loads an encoder: from scratch the head is timm's.
_SCRATCH_HEAD = 0.02
_SCRATCH_EXPECTED = {"b": (82.3, 82.1), "l": (82.6, 81.5), "h": (83.1, 80.9)}


def _scratch(size: str) -> ClassifierRecipe:
    with_ema, without = _SCRATCH_EXPECTED[size]
    return replace(
        _TABLE_9,
        name=f"scratch-vit-{size}",
        source="He et al. 2022, Table 11; first weights: the head as timm's (sd .02), the blocks xavier-uniform as in "
        "pretraining (the authors' PyTorch code leaves timm's there, sd .02)",
        expected=f"paper, Table 3: {with_ema} %; without averaged weights {without} % (A.2)",
        epochs={"b": 300.0, "l": 200.0, "h": 200.0}[size],
        global_batch=4096,
        eval_every=312 * 10,
        model=_encoder(
            size,
            image_size=224,
            drop_path_rate={"b": 0.1, "l": 0.2, "h": 0.2}[size],
            head_init_std=_SCRATCH_HEAD,
        ),
        optim=ClassifierOptim(base_lr=1e-4, weight_decay=0.3, betas=(0.9, 0.95), ema_decay=0.9999),
        schedule=Schedule(warmup_epochs=20, min_lr=1e-6),
        evals=ClassifierEvals(best="ema_top1"),
    )


# ------------------------------------------------------------------------------------------------ linear probe

# He et al. 2022, Table 10; head, crop and the frozen parts as in the official main_linprobe.py.
_TABLE_10 = ClassifierRecipe(
    name="",
    source="He et al. 2022, Table 10; head and crop of the official code",
    expected="",
    epochs=90,
    global_batch=16384,
    save_every=200,
    eval_every=78 * 10,
    trainable_blocks=0,
    data=_IMAGENET,
    augment=ClassifierAugment(crop="clamped"),
    optim=ClassifierOptim(name="lars", base_lr=0.1, weight_decay=0.0),
    schedule=Schedule(warmup_epochs=10, min_lr=0.0),
)
_TABLE_12 = {"b": 68.0, "l": 75.8, "h": 76.6}
_RELEASED_PROBE = {"b": 67.8, "l": 76.0, "h": 77.2}


def _probe(size: str) -> ClassifierRecipe:
    return replace(
        _TABLE_10,
        name=f"probe-vit-{size}",
        expected=f"paper, Table 12: {_TABLE_12[size]} %; authors' repository: {_RELEASED_PROBE[size]} %",
        model=_encoder(size, pool="cls", head="batchnorm", head_init_std=0.01),
    )


# ------------------------------------------------------------------------------------------------ other data sets

# He et al. 2022, Table 6, top-1 % of B, L, H and H at 448 pixels.
_TABLE_6 = {
    "inat2017": ("iNaturalist 2017", (70.5, 75.7, 79.3, 83.4)),
    "inat2018": ("iNaturalist 2018", (75.4, 80.1, 83.0, 86.8)),
    "inat2019": ("iNaturalist 2019", (80.5, 83.4, 85.7, 88.3)),
    "places205": ("Places205", (63.9, 65.8, 65.9, 66.8)),
    "places365": ("Places365", (57.9, 59.4, 59.8, 60.3)),
}


def _transfer(recipe: ClassifierRecipe, data: str, place: int) -> ClassifierRecipe:
    title, numbers = _TABLE_6[data]
    return replace(
        recipe,
        name=f"{recipe.name}-{data}",
        source=f"ours: {recipe.name} on {title}; lr and epochs of the authors' runs were never published",
        expected=f"paper, Table 6: {numbers[place]} %",
        data=replace(_IMAGENET, path=""),
        eval_every=5000,
    )


# ------------------------------------------------------------------------------------------------ one's own data

_SMALL = ClassifierRecipe(
    name="finetune-small",
    source="ours: Table 9 with a batch and augmentation for thousands of images rather than a million",
    expected="depends on the data",
    epochs=100,
    global_batch=128,
    save_every=500,
    eval_every=500,
    model=Classifier(drop_path_rate=0.1),
    augment=ClassifierAugment(scale=(0.2, 1.0), mixup=0.8, cutmix=1.0, label_smoothing=0.1),
    optim=ClassifierOptim(base_lr=2e-3, weight_decay=0.05, layer_decay=0.75),
    schedule=Schedule(warmup_epochs=5, min_lr=1e-6),
)
_SMALL_PROBE = replace(
    _TABLE_10,
    name="probe-small",
    source="ours: Table 10 for thousands of images rather than a million; SGD, as LARS needs thousands of updates",
    expected="depends on the data",
    global_batch=512,
    save_every=500,
    eval_every=500,
    data=Data(),
    model=Classifier(pool="cls", head="batchnorm", head_init_std=0.01),
    optim=ClassifierOptim(name="sgd", base_lr=0.2, weight_decay=0.0),
    evals=ClassifierEvals(knn=True, logistic=True),
)
_SMALL_SCRATCH = replace(
    _SMALL,
    name="scratch-small",
    source="ours: finetune-small with the optimizer of Table 11; a ViT-Ti unless --model.* says otherwise",
    model=_encoder("ti", image_size=224, drop_path_rate=0.1, head_init_std=_SCRATCH_HEAD),
    optim=ClassifierOptim(base_lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95)),
)

# Beside the bird classifiers of `hf-mae supervise`, under their limit of five million parameters: a ViT-Ti has
# 5,563,792 with 400 species, with ten blocks 4,674,064. Its encoder: `hf-mae pretrain mae-vit-ti
# --model.num-hidden-layers 10`.
_BIRDS = replace(
    _SMALL,
    name="finetune-vit-ti10-birds",
    source="ours: finetune-small, a ViT-Ti of ten blocks, the split and the smoothing of rexnet-birds-corrected",
    expected="not measured",
    data=Data(splits="stratified:80/10/10@3334"),
    model=_encoder("ti", num_hidden_layers=10, drop_path_rate=0.1),
    augment=replace(_SMALL.augment, label_smoothing=0.06),
    evals=ClassifierEvals(split="validation", crop_pct=1.0),
)

# ------------------------------------------------------------------------------------------------ the embedded default

_DIGITS = replace(
    _SMALL,
    name="finetune-digits",
    source="ours: scikit-learn's bundled digits, from the encoder of `hf-mae pretrain` (runs/quickstart)",
    expected="top-1 0.990 +- 0.002 (3 seeds, one encoder); half a minute on 2 cores",
    epochs=40,
    init_from="runs/quickstart",
    log_every=50,
    save_every=200,
    eval_every=200,
    data=Data(path="digits"),
    augment=ClassifierAugment(scale=(0.8, 1.0), flip=False, mean=(0.5,), std=(0.5,)),
    evals=ClassifierEvals(split="test", crop_pct=1.0),
)
_DIGITS_PROBE = replace(
    _SMALL_PROBE,
    name="probe-digits",
    source=_DIGITS.source,
    expected="top-1 0.927 +- 0.003 (3 seeds, one encoder), kNN 0.875; seconds on 2 cores",
    init_from="runs/quickstart",
    cached_features=True,
    data=Data(path="digits"),
    augment=replace(_DIGITS.augment, crop="clamped"),
    evals=ClassifierEvals(split="test", knn=True, logistic=True, crop_pct=1.0),
)

_TRANSFER: list[ClassifierRecipe] = [
    _transfer(recipe, data, place)
    for data in _TABLE_6
    for place, recipe in enumerate([_repository("b"), _repository("l"), _repository("h"), _H448])
]

FINETUNE: dict[str, ClassifierRecipe] = {
    recipe.name: recipe
    for recipe in [
        _DIGITS,
        _SMALL,
        _SMALL_SCRATCH,
        _BIRDS,
        *(_repository(size) for size in "blh"),
        _H448,
        *(_table_9(size) for size in "blh"),
        *(_scratch(size) for size in "blh"),
        *_TRANSFER,
    ]
}
"""Presets of `hf-mae finetune`: all or some of the encoder is trained."""

PROBE: dict[str, ClassifierRecipe] = {
    recipe.name: recipe for recipe in [_DIGITS_PROBE, _SMALL_PROBE, *(_probe(size) for size in "blh")]
}
"""Presets of `hf-mae probe`: only a head is trained, on a frozen encoder."""

_AS_TYPED = (
    "seed",
    "out",
    "max_steps",
    "global_batch",
    "num_workers",
    "log_every",
    "save_every",
    "eval_every",
    "resume",
)


def probe_of(recipe: ClassifierRecipe) -> ClassifierRecipe:
    """Return the linear probe that belongs to a fine-tuning: the preset of its size, on the same encoder and data.

    Epochs, optimizer, schedule, head and crop are the probe's own (Table 10: LARS and a head with batch normalisation;
    SGD for small data). Of the fine-tuning stay encoder, data, test split, engine, size and normalisation of the
    images, and what was changed of its preset in seed, out, max_steps, global_batch, num_workers, resume and the
    intervals.
    """
    size = re.match(r"(?:finetune|scratch)-vit-([blh])\b", recipe.name)
    name = f"probe-vit-{size[1]}" if size else "probe-digits" if recipe.name == "finetune-digits" else "probe-small"
    probe, preset = PROBE[name], FINETUNE.get(recipe.name)
    typed = {f: getattr(recipe, f) for f in _AS_TYPED if preset is None or getattr(recipe, f) != getattr(preset, f)}
    head = {f: getattr(probe.model, f) for f in ("pool", "head", "head_init_std", "drop_path_rate")}
    images = {f: getattr(recipe.augment, f) for f in ("flip", "vertical_flip", "mean", "std")}
    return replace(
        probe,
        **typed,
        init_from=recipe.init_from,
        data=replace(recipe.data, repeats=1, repeat_augment=1),
        model=replace(recipe.model, **head),
        augment=replace(probe.augment, **images),
        evals=replace(recipe.evals, best="top1", knn=probe.evals.knn, logistic=probe.evals.logistic),
        engine=recipe.engine,
    )
