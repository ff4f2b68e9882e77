"""What a run is: typed, frozen, plain data (standard library only).

A recipe says everything that decides the numbers of a run. It is written to `recipe.json` in the run folder and in
every checkpoint, and is compared at resume. Presets are instances of `Recipe`; the command line overrides single
fields. Rates are fractions, sizes are pixels, lr is per optimizer update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, cast, get_type_hints

Size: TypeAlias = int | tuple[int, int]
"""One side of a square, or (height, width)."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Width, depth and heads of the encoder. Ti and S are DeiT's (Touvron et al. 2021, Table 1); B, L and H are ViT's
# (Dosovitskiy et al. 2021, Table 1). MAE trains H with patch size 14.
VIT_SIZES: dict[str, dict[str, int]] = {
    "ti": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3},
    "s": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6},
    "b": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "l": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "h": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14},
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """The architecture and the objective: the fields of `hf_mae.MAEConfig`, with its defaults (ViT-B) but for one.

    `norm_pix_loss` is True here, as in the paper's best runs, and False in `MAEConfig`, as in `ViTMAEConfig`: a
    config.json that does not say means raw pixels.
    """

    image_size: Size = 224
    """Input height and width in pixels: one number, or two for non-square images."""
    patch_size: Size = 16
    """Patch height and width in pixels; must divide the image size."""
    num_channels: int = 3
    """Colour channels: 3 reads images as RGB, 1 as grey."""
    hidden_size: int = 768
    """Encoder width."""
    num_hidden_layers: int = 12
    """Encoder blocks."""
    num_attention_heads: int = 12
    """Encoder heads."""
    intermediate_size: int | None = None
    """Encoder MLP width; None is four times the encoder width."""
    decoder_hidden_size: int = 512
    """Decoder width."""
    decoder_num_hidden_layers: int = 8
    """Decoder blocks."""
    decoder_num_attention_heads: int = 16
    """Decoder heads."""
    decoder_intermediate_size: int | None = None
    """Decoder MLP width; None is four times the decoder width."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    mask_ratio: float = 0.75
    """Fraction of patches removed, in [0, 1)."""
    mask_strategy: Literal["random", "block", "grid"] = "random"
    """How the removed patches are chosen (paper, Table 1f)."""
    mask_tokens_in_encoder: bool = False
    """Feed mask tokens to the encoder, as BEiT does (paper, Table 1c): slower and worse."""
    target: Literal["pixel", "pca", "token"] = "pixel"
    """What is predicted (paper, Table 1d). Only `pixel`: pca and token are not available yet, and are refused."""
    norm_pix_loss: bool = True
    """Normalise each target patch by its own mean and standard deviation (paper, Table 1d); off: raw pixels."""
    pos_embed: Literal["sincos", "learned"] = "sincos"
    """Fixed 2-D sine-cosine positions, or learned ones."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the images come from and in which order they are read."""

    path: str = ""
    """A folder of images (with or without class folders), of Parquet or of webdataset tars; a Hub id; or `digits`."""
    name: str | None = None
    """Configuration name of a Hub data set that has several."""
    split: str | None = None
    """Which split to train on; None takes `train`, or the only one."""
    splits: str | None = None
    """How data of one split are divided into train, validation and (with three parts) test: a file that `hf-mae split`
    wrote, or a rule such as `stratified:80/10/10@3334` or `random:95/5@3334` (parts in percent, seed)."""
    streaming: bool = True
    """Read a Hub data set by ranges as training goes. False downloads it to the cache first."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; resolved to a commit at start and recorded."""
    image_column: str | None = None
    """Column of encoded images, or of paths from the folder of the data; None finds it. In a metadata table NAME is the
    column NAME_file_name."""
    label_column: str | None = None
    """Column of labels: what a classifier learns, and what the monitors of pretraining use; integers, or text in the
    metadata table of an image folder. None finds it, `none` ignores labels and with them every metadata table."""
    lanes: int | None = None
    """Parallel reading positions of the order; None is 64, fewer if `window_bytes` is exceeded."""
    window_rows: int = 8192
    """Rows shuffled together at any moment, over all lanes."""
    window_bytes: int = 2**30
    """Ceiling for the encoded bytes of those rows."""
    remainder: Literal["carry", "drop"] = "carry"
    """What happens to the last `rows % global_batch` rows of an epoch: open the next epoch, or are left out of it."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the rows cannot be decoded. Below 1,000 rows one damaged image is allowed,
    whatever the fraction, unless it is 0."""
    max_pixels: int = 89_478_485
    """Refuse to decode images with more pixels than this (decompression bombs)."""
    pixel_range: tuple[float, float] | None = None
    """Stored values (LOW, HIGH) that become black and white, for images that do not fill 8 or 16 bits: `0 4095` for
    12-bit X-rays, `-1024 1023` for CT, `0 1` for floats. Values beyond are clipped. None is the range of the type."""
    workers: Literal["thread", "process"] = "thread"
    """What the `num_workers` decoders are. Neither kind nor number changes any batch."""
    decoder: Literal["exact", "fast"] = "exact"
    """`exact` gives the bits of torchvision on Pillow; `fast` resizes with another kernel: the same crops, pixels that
    differ by rounding."""
    repeats: int = 1
    """Samples made of each decoded image, each with its own crop and mask, in the same batch. For slow disks or few
    cores; changes training above 1: a batch holds fewer different images, and an epoch, one pass over the images, takes
    so many times the updates (divide `epochs` by it for the same number)."""
    repeat_augment: int = 1
    """Repeated augmentation (Hoffer et al. 2020; DeiT): each image takes so many places of the stream in a row, each
    with its own augmentation, so that its copies lie on different processes. An epoch stays as many samples as there
    are rows, made of fewer different images. 1 is off; DeiT and ResNet strikes back use 3."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """From a decoded image to `image_size`."""

    crop: Literal["random-resized", "clamped", "fixed", "center", "resize"] = "random-resized"
    """Random resized crop; the same with sides clamped to the image instead of ten tries (the official linear probe);
    random crop after resizing the short side (paper, Table 1e "fixed size"); centre; or the whole image, its sides
    resized to the input's whatever its aspect."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Area fraction of a random resized crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of a random resized crop."""
    flip: bool = True
    """Mirror half of the images."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast and saturation jitter (paper, Table 1e "color jit"); 0 is off."""
    vertical_flip: bool = False
    """Turn half of the images upside down."""
    rotate: tuple[float, ...] = ()
    """Rotations, one after the other, each by an angle uniform in plus or minus so many degrees."""
    rotate_once: bool = False
    """Rotate once, by the sum of the angles of `rotate`: pixels are read once, and corners are lost once."""
    rotate_resample: Literal["bilinear", "nearest"] = "bilinear"
    """How a rotated pixel is read. `nearest` holds for AutoAugment's rotations, shears and shifts too, as in
    torchvision; without it they are bicubic, as in timm."""
    rotate_fill: Literal["mean", "black"] = "mean"
    """Colour of the corners a rotation leaves, AutoAugment's too: `augment.mean`, or black."""
    auto_augment: Literal["original", "v0"] | None = None
    """AutoAugment's policy for ImageNet (Cubuk et al. 2019) as timm names it: of the paper, or of TensorFlow's code."""
    rand_augment: str | None = None
    """RandAugment as timm writes it: `rand-m9-mstd0.5-inc1` is magnitude 9, its deviation .5, the increasing ops."""
    erase_prob: float = 0.0
    """Share of the images of which a rectangle is erased (random erasing, Zhong et al. 2020)."""
    erase_fill: Literal["noise", "mean", "black"] = "noise"
    """With noise (timm's `pixel` mode), with `augment.mean` (0 after normalising), or black (0 before)."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per-channel mean of the input, after scaling to [0, 1]."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per-channel standard deviation of the input."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW."""

    base_lr: float = 1.5e-4
    """Learning rate at a global batch of 256; lr = base_lr * global_batch / 256."""
    weight_decay: float = 0.05
    """Decoupled weight decay of everything with two or more dimensions (tokens included, as the official code does)."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float | None = None
    """Clip the global gradient norm to this value."""
    decay_tokens: bool = True
    """Weight-decay the cls and mask tokens. True is the official behaviour."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per update."""
    ema_warmup: bool = False
    """Let the decay rise to `ema_decay`: min(ema_decay, 1 - update ** (-2/3)), as timm's `ModelEmaV3` does."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of each optimizer update."""

    name: Literal["cosine", "timm-cosine", "constant", "step", "exponential"] = "cosine"
    """Half a cosine from the end of the warm-up to the end of the run (MAE); timm's, which starts with the run, its
    first epochs replaced by the warm-up; the peak throughout; the peak times `gamma` every `step_epochs`; or
    geometrically from `warmup_lr` to the peak (what `hf-mae lr-find` runs)."""
    warmup_epochs: float = 40.0
    """Length of the linear warm-up. With `max_steps` it keeps its share of the run."""
    warmup_lr: float = 0.0
    """Where the warm-up starts."""
    min_lr: float = 0.0
    """Where a cosine ends."""
    per_epoch: bool = False
    """Change the value once per epoch, as timm does unless told otherwise, rather than at every update."""
    gamma: float = 0.95
    """Of `step`."""
    step_epochs: float = 1.0
    """Of `step`: epochs between two falls."""


@dataclass(frozen=True, kw_only=True)
class Evals:
    """What is measured besides the loss while training."""

    pictures: int = 8
    """Images in each reconstruction picture; 0 draws none."""
    knn: bool = True
    """Weighted k-nearest-neighbour accuracy of the encoder on a labelled split, when there is one."""
    rankme: bool = True
    """RankMe, the effective rank of the features (Garrido et al. 2023): about how many directions they use, from 1
    (collapsed) to their width; higher is better between runs of one width on the same data. Needs no labels."""
    probe: bool = False
    """Logistic regression on frozen features at the start and the end of the run. Left out, with a sentence, where
    `train_examples` * features * classes are more than 5,000,000,000."""
    split: str | None = None
    """Labelled split to test on; None takes `test` or `validation`."""
    train_examples: int = 5000
    """Images of the training split in the kNN bank."""
    test_examples: int = 2000
    """Images of the test split."""
    at_start: bool = True
    """Measure the untrained encoder as well: the number to compare with."""
    crop_pct: float | None = None
    """Share of the resized image that the centre crop of every evaluation keeps. None is the official rule (224/256 up
    to 224 pixels, 1 above; 1 for inputs that are not square), also for images of exactly the input size; 1 shows the
    whole of small images made for this size (CIFAR). The model folder states it."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the computation is carried out. Nothing here is meant to change what is learned."""

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast type of the forward pass; loss, targets and weights stay float32. `no` is float32 throughout, and the
    default of every preset: any device has it, and a CPU gives the same bits at every start. The papers trained with
    mixed precision: on a GPU set bf16 (fp16 on one without it)."""
    compile: bool = False
    """Compile each transformer block. Takes about a minute; meant for GPUs."""
    tf32: bool = False
    """Let float32 matrix products use TensorFloat-32 on GPUs that have it: faster, about three decimal digits."""
    deterministic: bool = False
    """Compute on GPUs with kernels that give the same bits every time, as CPUs do anyway; slower. What has no such
    kernel is refused. Order, crops, masks and draws are the same without it."""
    keep_freed_memory: bool = True
    """Ask glibc to keep freed memory for the next step rather than return it to the system each time."""
    checkpoint_activations: Literal["none", "gelu", "blocks"] = "none"
    """What the backward pass computes again rather than keep: nothing; the GELU of every block, a quarter of the memory
    for hardly any time; or whole blocks, nearly all of it for a fifth to a third more time."""
    expect_processes: int | None = None
    """Refuse to start with another number of processes."""
    track: Literal["none", "tensorboard", "trackio"] = "none"
    """A tracker beside metrics.jsonl, which is always written."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""


Rule: TypeAlias = tuple[str, str, Callable[[Any], bool]]
"""What a number may be: field, rule as a sentence, test."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    name: str
    source: str
    """Where the numbers come from: paper, table, row."""
    expected: str
    """What the source reports for it, or what we measured and where; "not published" where there is neither."""
    out: str = ""
    """Run folder; empty is runs/NAME."""
    seed: int = 0
    epochs: float = 800.0
    """Length of the run, in passes over the data."""
    max_steps: int | None = None
    """Length of the run in optimizer updates, in place of `epochs`; the schedule is squeezed to fit."""
    global_batch: int = 4096
    """Images per optimizer update, over all processes and accumulation."""
    micro_batch: int | Literal["auto"] | None = None
    """Images per process and forward pass. None is as many as the global batch gives each process, at most 64 (256
    with models of timm and 512 with a batchnorm head, whose statistics are of a micro-batch); `auto` measures a few
    images before training starts and takes as many as will fit into memory."""
    num_workers: int = 2
    """Decoders per process; 0 decodes in the training process between steps."""
    log_every: int = 20
    """Updates between rows of metrics.jsonl."""
    save_every: int = 500
    """Updates between checkpoints."""
    eval_every: int = 1000
    """Updates between evaluations and pictures."""
    resume: str = "auto"
    """`auto` continues the run in `out` if there is one, `never` refuses to, a path names a checkpoint."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    evals: Evals = field(default_factory=Evals)
    engine: Engine = field(default_factory=Engine)

    deciding: ClassVar[frozenset[str]] = frozenset()
    """Fields of `evals` that decide what is learned; the others may change when a run is resumed."""
    only_fresh: ClassVar[frozenset[str]] = frozenset()
    """Fields that say what new weights are and nothing else: a run that is resumed has its weights."""
    rules: ClassVar[tuple[Rule, ...]] = ()
    """Rules for the fields that only this kind of recipe has."""

    @property
    def mixes_pairs(self) -> bool:
        """Whether images of a micro-batch are mixed in pairs, so that it must be even."""
        return False

    @property
    def max_micro_batch(self) -> int:
        """The micro-batch when none is given: the largest divisor of a process's share up to this."""
        return 64

    @property
    def min_micro_batch(self) -> int:
        """The smallest micro-batch that can be trained on: 2 where the model takes statistics of it."""
        return 1


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as JSON-able nested dictionaries (tuples become lists when written)."""
    return asdict(recipe)


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def from_dict(values: Mapping[str, Any], kind: type[AnyRecipe]) -> AnyRecipe:
    """Rebuild a recipe from `to_dict` or from a recipe.json.

    Args:
        values: nested dictionaries.
        kind: the class of the recipe.

    Raises:
        ValueError: a field is unknown to this version or to this kind of recipe, named with its group.
    """
    return cast(AnyRecipe, _build(kind, values, ""))


def _build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"recipe field(s) {', '.join(where + u for u in unknown)} are unknown to a {cls.__name__} of this "
            "version of hf_mae"
        )
    hints = get_type_hints(cls)
    built: dict[str, Any] = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            value = _build(cast(type[Any], hints[name]), value, f"{where}{name}.")
        elif isinstance(value, list):
            value = tuple(cast(list[Any], value))
        built[name] = value
    return cls(**built)


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return `{"optim.base_lr": 1.5e-4, ...}`: one entry per field, groups joined by dots."""
    out: dict[str, Any] = {}
    for name, value in to_dict(recipe).items():
        if isinstance(value, dict):
            out |= {f"{name}.{inner}": v for inner, v in cast(dict[str, Any], value).items()}
        else:
            out[name] = value
    return out


HARMLESS = frozenset(
    {
        "name",
        "source",
        "expected",
        "out",
        "resume",
        "num_workers",
        "micro_batch",
        "log_every",
        "save_every",
        "eval_every",
    }
    | {"data.path", "data.splits", "data.streaming", "data.workers", "data.max_bad_fraction", "data.revision"}
    | {f"engine.{f.name}" for f in fields(Engine) if f.name not in {"precision", "tf32"}}
)
"""Fields that may change when a run is resumed. The data may move: names and sizes of its files are compared."""


def changed_fields(saved: Recipe, current: Recipe) -> dict[str, tuple[Any, Any]]:
    """Return `{field: (saved, current)}` of the fields that differ and decide what is learned."""
    before, now = flat(saved), flat(current)
    return {
        k: (before.get(k), now[k])
        for k in now
        if before.get(k) != now[k]
        and k not in HARMLESS | saved.only_fresh
        and (not k.startswith("evals.") or k in saved.deciding)
    }
