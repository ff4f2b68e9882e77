"""Pretraining presets: quickstart, CIFAR-10 sized, and the paper's."""

from __future__ import annotations

from dataclasses import replace

from hf_mae.recipes.base import VIT_SIZES, Augment, Data, Evals, Model, Optim, Recipe, Schedule

# ------------------------------------------------------------------------------------------------ the embedded default

QUICKSTART = Recipe(
    name="quickstart",
    source="ours: scikit-learn's bundled digits (1,797 grey images of 8x8), offline",
    expected="kNN on held-out digits from 0.45 untrained to 0.82 .. 0.92 (seeds 0 to 2); under 2 minutes on 2 cores",
    epochs=120,
    global_batch=128,
    log_every=50,
    save_every=400,
    eval_every=400,
    data=Data(path="digits"),
    model=Model(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        mask_ratio=0.75,
        norm_pix_loss=False,  # four pixels are too few to normalise by
    ),
    # Digits have an orientation and fill the frame: no flip, hardly any crop.
    augment=Augment(scale=(0.8, 1.0), flip=False, mean=(0.5,), std=(0.5,)),
    optim=Optim(base_lr=8e-3),
    schedule=Schedule(warmup_epochs=10),
    evals=Evals(probe=True, split="test", crop_pct=1.0),
)

# ------------------------------------------------------------------------------------------------ CIFAR-10 sized

_CIFAR = Recipe(
    name="",
    source="ours: He et al. 2022, Table 8, with a batch and a learning rate for small models and short runs",
    expected="not measured",
    epochs=200,
    global_batch=256,
    save_every=500,
    eval_every=1000,
    data=Data(path="uoft-cs/cifar10"),
    model=Model(image_size=32, patch_size=4),
    schedule=Schedule(warmup_epochs=10),
    optim=Optim(base_lr=1e-3),
    evals=Evals(crop_pct=1.0),  # made for 32 pixels: nothing is a border
)


def _cifar(letter: str, width: int, depth: int, heads: int, decoder: tuple[int, int, int], expected: str) -> Recipe:
    model = replace(
        _CIFAR.model,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        decoder_hidden_size=decoder[0],
        decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2],
    )
    return replace(_CIFAR, name=f"mae-vit-{letter}-cifar10", model=model, expected=expected)


CIFAR10 = [
    _cifar("n", 96, 6, 3, (64, 2, 4), "200 epochs not measured; 12 epochs: kNN 0.33 -> 0.45 (benchmarks/README.md)"),
    _cifar("t", 192, 12, 3, (128, 4, 4), "not measured"),
    _cifar("s", 384, 12, 6, (192, 4, 6), "not measured"),
]

# ------------------------------------------------------------------------------------------------ the paper's

# Source: He et al. 2022, Table 8 (pretraining setting). The paper's ablations, Fig. 7 among them, are of raw pixels;
# Table 1d and Tables 3 and 12 are of normalised ones, which these presets train.
_PAPER = Recipe(
    name="",
    source="He et al. 2022, Table 8; norm-pix as in Table 1d",
    expected="not published",
    save_every=1000,
    eval_every=5000,
    data=Data(path="ILSVRC/imagenet-1k", remainder="drop"),
)
_FIG7 = {100: (82.3, 57.3), 200: (83.3, 64.4), 400: (84.3, 69.7), 800: (84.9, 73.5), 1600: (85.1, 75.1)}
_TABLE_1D = {("l", 800): (85.4, 73.9)}
# open-mmlab/mmpretrain configs/mae/README.md (third party, normalised pixels): ViT-B fine-tune, probe.
_MMPRETRAIN_B = {400: (83.3, 62.5), 800: (83.3, 65.1), 1600: (83.5, 67.1)}
_TABLES_3_12 = {"b": (83.6, 68.0), "l": (85.9, 75.8), "h": (86.9, 76.6)}


def _paper(size: str, epochs: int) -> Recipe:
    lines: list[str] = []
    if found := _TABLE_1D.get((size, epochs)):
        lines.append(f"paper, Table 1d (norm-pix, as here): {_percent(found)}")
    if epochs == 1600 and size in _TABLES_3_12:
        tuned, probe = _TABLES_3_12[size]
        lines.append(f"paper, Table 3: {tuned} % fine-tuned; Table 12: {probe} % linear probe (norm-pix, as here)")
    if size == "b" and epochs in _MMPRETRAIN_B:
        lines.append(f"mmpretrain's reproduction (norm-pix): {_percent(_MMPRETRAIN_B[epochs])}")
    if size == "l":
        unpublished = "" if lines else "not published with norm-pix; "
        lines.append(f"{unpublished}Fig. 7 (raw pixels, --model.no-norm-pix-loss): {_percent(_FIG7[epochs])}")
    if size == "s" and epochs == 800:
        lines.append("a CrossMAE user's run: 49.7 % linear probe")
    model = Model(**VIT_SIZES[size])  # type: ignore[arg-type]
    if size in {"ti", "s"}:  # smaller than the paper's encoders: a decoder that is not wider than the encoder
        model = replace(model, decoder_hidden_size=256, decoder_num_attention_heads=8)
    return replace(
        _PAPER,
        name=f"mae-vit-{size}-{epochs}ep",
        epochs=float(epochs),
        model=model,
        expected="; ".join(lines) or "not published",
        source=_PAPER.source
        if size in {"b", "l", "h"}
        else f"{_PAPER.source}; size from DeiT, decoder 256 wide is ours",
    )


def _percent(numbers: tuple[float, float]) -> str:
    return f"{numbers[0]} % fine-tuned, {numbers[1]} % linear probe"


PAPER = [_paper(size, epochs) for size in ("s", "b", "l", "h") for epochs in (100, 200, 400, 800, 1600)]

# The names to type for one's own images: the 800-epoch setting, with a batch that small data can fill.
_OWN = [
    replace(
        _paper(size, 800),
        name=f"mae-vit-{size}",
        source="He et al. 2022, Table 8, with a global batch of 1024 for data smaller than ImageNet",
        expected="depends on the data",
        global_batch=1024,
        eval_every=1000,
        data=Data(),
        evals=Evals(),
    )
    for size in ("ti", "s", "b", "l", "h")
]

PRESETS: dict[str, Recipe] = {recipe.name: recipe for recipe in [QUICKSTART, *CIFAR10, *_OWN, *PAPER]}
