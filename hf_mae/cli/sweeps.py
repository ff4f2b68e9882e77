"""The commands that compare runs: sweep partial, seeds, over, augment, transfer, resolution."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import tyro

from hf_mae.cli.arguments import TRAINED, choose_preset, chosen_fields, nearest, parse_with, require_data
from hf_mae.recipes.base import Size
from hf_mae.recipes.classification import ClassifierAugment, ClassifierRecipe
from hf_mae.recipes.evaluation import EVALUATIONS, Evaluation
from hf_mae.recipes.fields import parse_values
from hf_mae.recipes.supervised import BIRD_AUGMENTS, SUPERVISE, TRANSFER, SuperviseRecipe
from hf_mae.recipes.transfer import FINETUNE

HELP = """hf-mae sweep partial [PRESET] --init-from MODEL [...]            linear probe, then 0.5, 1, 2, ... blocks
hf-mae sweep seeds [COMMAND] [PRESET] --n 5 [...]                one recipe with n seeds
hf-mae sweep over [COMMAND] [PRESET] --vary FIELD=V1,V2 [...]    one field of a recipe with several values
hf-mae sweep augment [PRESET] --data.path DATA [...]             the augmentations of the bird slides, and two of timm's
hf-mae sweep transfer --init-from MODEL [...]                    fine-tune one model on 5 of the 7 data sets of RSB
hf-mae sweep resolution [PRESET] --models M1 M2 --sizes 160 224  top-1 by test resolution

COMMAND is pretrain, finetune (default), probe or supervise. Every run has a folder of its own; a sweep that was stopped
goes on where it was.
"""


@dataclass(frozen=True, kw_only=True)
class PartialArguments:
    """What `hf-mae sweep partial` takes: the blocks, the seeds, and a whole recipe."""

    blocks: tuple[float, ...] = (0, 0.5, 1, 2, 4, 6, 12, 18, 24)
    """Trainable blocks of each run; 0 is the linear probe by its own recipe (probe-*: epochs, optimizer and head of
    Table 10), 0.5 the MLP of the last block. Those beyond the encoder's depth are left out."""
    seeds: int = 1
    """Runs for each number of blocks."""
    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class SeedsArguments:
    """What `hf-mae sweep seeds` takes: how many, and a whole recipe."""

    n: Annotated[int, tyro.conf.arg(aliases=["--num-seeds"])] = 5
    """Seeds: the recipe's own and those after it. Under torchrun, which takes --n for its own, --num-seeds."""
    recipe: Annotated[Any, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class OverArguments:
    """What `hf-mae sweep over` takes: a field with its values, and a whole recipe."""

    vary: str = ""
    """FIELD=V1,V2,...; such as augment.label_smoothing=0,0.06,0.1. The parts of a tuple are parted by spaces."""
    seeds: int = 1
    """Runs of each value."""
    recipe: Annotated[Any, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class AugmentArguments:
    """What `hf-mae sweep augment` takes: which pipelines, and a whole recipe."""

    pipelines: tuple[str, ...] = tuple(name for name in BIRD_AUGMENTS if name != "a")
    """Pipelines of the bird slides, (a) to (f); none; auto-augment; rand-augment. (a) is (b) at 64 pixels
    (`--model.image-size 64`), and left out by default; erasing and the strengths of (d) are timm's."""
    seeds: int = 1
    """Runs of each pipeline."""
    recipe: Annotated[SuperviseRecipe, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class TransferArguments:
    """What `hf-mae sweep transfer` takes: which data sets, and what all of their recipes share.

    One learning rate, batch and length for all data sets, where the paper tuned each and did not publish its values.
    """

    init_from: str
    """The model to fine-tune: a run folder, a folder in timm's format, a Hub id, or a name of timm's weights."""
    data_sets: tuple[str, ...] = tuple(r.name.removeprefix("transfer-") for r in TRANSFER if r.data.path)
    """Data sets of RSB's Table 5: by default the five of seven with a copy on the Hub. inat2018 and inat2019 are
    trained by themselves (supervise transfer-NAME --data.path DATA)."""
    seeds: int = 1
    """Runs of each data set."""
    architecture: str = "resnet50"
    """Architecture of the model."""
    image_size: Size = 224
    """Height and width of images in pixels."""
    epochs: float = 100.0
    """Length of each run, in passes over its data."""
    global_batch: int = 256
    """Images per optimizer update."""
    base_lr: float = 0.005
    """Learning rate at a global batch of 256, the same for every data set; the paper tuned each."""
    num_workers: int = 2
    """Decoders per process."""
    out: str = "runs/transfer"
    """Folder of the runs, the table and the picture."""


@dataclass(frozen=True, kw_only=True)
class ResolutionArguments:
    """What `hf-mae sweep resolution` takes: models, sizes, and what an evaluation takes."""

    models: tuple[str, ...] = ()
    """Run folders, model folders, Hub ids or names of timm's weights."""
    sizes: tuple[int, ...] = (128, 160, 192, 224, 256, 288, 320)
    """Test sizes in pixels."""
    recipe: Annotated[Evaluation, tyro.conf.arg(name="")]


def parse_sweep(arguments: Sequence[str]) -> Any:
    """Return what `hf-mae sweep KIND [COMMAND] [PRESET] [flags]` asks for: one of the argument groups above.

    Raises:
        ValueError: there is no such kind or preset.
    """
    kind, *rest = arguments or [""]
    if kind not in _KINDS:
        raise ValueError(f"sweep {kind!r} is unknown; {nearest(kind, _KINDS)}")
    if kind == "transfer":
        return tyro.cli(TransferArguments, prog="hf-mae sweep transfer", args=list(rest))
    group, presets, command = _KINDS[kind][0], _PRESETS[kind], ""
    if kind in ("seeds", "over"):
        command = rest.pop(0) if rest and rest[0] in TRAINED else "finetune"
        presets = TRAINED[command]
    preset, flags = choose_preset(presets, rest, next(iter(presets)))
    return parse_with(group, preset, flags, " ".join(f"hf-mae sweep {kind} {command} {preset.name}".split()))


def sweep_command(arguments: Sequence[str]) -> None:
    """Run a sweep of any kind."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write(HELP)
        return
    given = parse_sweep(arguments)
    if not isinstance(given, TransferArguments):
        require_data(given.recipe)
    _KINDS[arguments[0]][1](given, chosen_fields(arguments))


def _with_defaults(chosen: Collection[str]) -> Callable[[Any], Any]:
    """Return what trains a recipe of any kind, and may adapt what was not chosen to its data."""
    from hf_mae.sweep import trainer_of

    def train(recipe: Any) -> Any:
        return trainer_of(recipe)(recipe, chosen=chosen)

    return train


def _partial(given: PartialArguments, chosen: Collection[str]) -> None:
    from hf_mae.sweep import sweep_partial

    sweep_partial(given.recipe, blocks=given.blocks, seeds=given.seeds, train=_with_defaults(chosen))


def _seeds(given: SeedsArguments, chosen: Collection[str]) -> None:
    from hf_mae.sweep import sweep_seeds

    sweep_seeds(given.recipe, n=given.n, train=_with_defaults(chosen))


def _over(given: OverArguments, chosen: Collection[str]) -> None:
    field, found, values = given.vary.partition("=")
    if not found or not values:
        raise ValueError(f"vary={given.vary!r} must be FIELD=V1,V2,...; such as augment.label_smoothing=0,0.06,0.1")
    field = field.strip().replace("-", "_")
    parsed = parse_values(given.recipe, field, values)
    from hf_mae.sweep import sweep_over

    sweep_over(given.recipe, field, parsed, seeds=given.seeds, train=_with_defaults({*chosen, field}))


def _augment(given: AugmentArguments, chosen: Collection[str]) -> None:
    recipe = given.recipe
    if unknown := [name for name in given.pipelines if name not in BIRD_AUGMENTS]:
        raise ValueError(f"pipeline {unknown[0]!r} is unknown; {nearest(unknown[0], BIRD_AUGMENTS)}")
    # What the pipelines differ in, among each other and from the corrected birds, is theirs; the rest is the recipe's.
    pipelines = [*BIRD_AUGMENTS.values(), *(bird.augment for bird in _BIRDS.values())]
    preset = SUPERVISE.get(recipe.name, recipe).augment
    names = [field.name for field in fields(ClassifierAugment)]
    defined = [name for name in names if len({getattr(pipeline, name) for pipeline in pipelines}) > 1]
    if lost := [name for name in defined if getattr(recipe.augment, name) != getattr(preset, name)]:
        flags = ", ".join(f"--augment.{name.replace('_', '-')}" for name in lost)
        raise ValueError(
            f"{flags}: set by the pipelines that are compared, so it would have no effect; leave it out, or compare "
            f"its values: hf-mae sweep over supervise {recipe.name} --vary augment.{lost[0]}=V1,V2"
        )
    recipes = {
        name: replace(recipe, augment=replace(recipe.augment, **{f: getattr(BIRD_AUGMENTS[name], f) for f in defined}))
        for name in given.pipelines
    }
    from hf_mae.sweep import sweep_variants

    out = recipe.out or f"runs/{recipe.name}-augment"
    title, train = f"{recipe.name}: augmentation", _with_defaults(chosen)
    sweep_variants(recipes, seeds=given.seeds, out=out, title=title, train=train)


def _transfer(given: TransferArguments, chosen: Collection[str]) -> None:
    recipes = {recipe.name.removeprefix("transfer-"): recipe for recipe in TRANSFER}
    runs = {}
    for name in given.data_sets:
        if name not in recipes:
            raise ValueError(f"data set {name!r} is unknown; {nearest(name, recipes)}")
        if not recipes[name].data.path:
            raise ValueError(
                f"data set {name!r} has no public Hub copy; train it by itself: hf-mae supervise transfer-{name} "
                "--data.path DATA"
            )
        runs[name] = replace(
            recipes[name],
            init_from=given.init_from,
            epochs=given.epochs,
            global_batch=given.global_batch,
            num_workers=given.num_workers,
            model=replace(recipes[name].model, architecture=given.architecture, image_size=given.image_size),
            optim=replace(recipes[name].optim, base_lr=given.base_lr),
        )
    from hf_mae.sweep import sweep_variants

    title, train = f"transfer of {given.init_from}, one lr for all", _with_defaults(chosen)
    sweep_variants(runs, seeds=given.seeds, out=given.out, title=title, train=train)


def _resolution(given: ResolutionArguments, chosen: Collection[str]) -> None:
    if not given.models:
        raise ValueError("models is empty; name run folders, model folders, Hub ids or timm's weights: --models M1 M2")
    from hf_mae.resolution import sweep_resolution

    sweep_resolution(given.models, given.recipe, sizes=given.sizes, out=given.recipe.out or "runs/resolution")


_BIRDS = {name: recipe for name, recipe in SUPERVISE.items() if name.endswith("-corrected")}
_PRESETS: dict[str, Mapping[str, Any]] = {
    "partial": FINETUNE,
    "augment": _BIRDS | SUPERVISE,
    "resolution": EVALUATIONS,
    "seeds": FINETUNE,
    "over": FINETUNE,
}
_KINDS: dict[str, tuple[Any, Callable[[Any, Collection[str]], None]]] = {
    "partial": (PartialArguments, _partial),
    "seeds": (SeedsArguments, _seeds),
    "over": (OverArguments, _over),
    "augment": (AugmentArguments, _augment),
    "transfer": (TransferArguments, _transfer),
    "resolution": (ResolutionArguments, _resolution),
}
