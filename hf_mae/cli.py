"""The command line: `hf-mae COMMAND PRESET --group.field value`.

The only importer of tyro. A preset is a complete recipe; flags override single fields.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

import hf_mae
from hf_mae.planning.hardware import Hardware
from hf_mae.planning.plan import as_dict, make_run_plan
from hf_mae.planning.report import published_report, report
from hf_mae.recipes.base import Recipe
from hf_mae.recipes.classification import ClassifierRecipe
from hf_mae.recipes.evaluation import EVALUATIONS, Evaluation
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.transfer import FINETUNE, PROBE

AnyPreset = TypeVar("AnyPreset", Recipe, ClassifierRecipe, Evaluation)

USAGE = f"""hf-mae {hf_mae.__version__}: masked autoencoders for the Hugging Face ecosystem

  hf-mae pretrain [PRESET] [--group.field value ...]   pretrain, or continue the run in --out (default: quickstart)
  hf-mae pretrain --list                               every preset, with its source and what to expect
  hf-mae pretrain PRESET --help                        every field of a recipe, with the preset's values
  hf-mae finetune [PRESET] --init-from MODEL [...]     train a classifier: all of it, --trainable-blocks K, or scratch
  hf-mae probe [PRESET] --init-from MODEL [...]        train a head on the frozen encoder; nearest neighbours as well
  hf-mae evaluate [PRESET] --model MODEL [...]         accuracy, calibration, confusion and mistakes of a classifier
  hf-mae sweep partial [PRESET] --init-from MODEL      fine-tune 0, 0.5, 1, 2, ... blocks: table and plot
  hf-mae sweep seeds [COMMAND] [PRESET] --n 5 [...]    one recipe with n seeds: mean, deviation, histogram
  hf-mae plan [PRESET] --gpu a100 --gpus 64 [...]      FLOPs, memory, hours, loader and disk of a run, by arithmetic
  hf-mae plan --check                                  what published runs say of its assumptions
  hf-mae reconstruct MODEL IMAGE ... [--out FILE]      masked / predicted / pasted pictures of your images

On several GPUs: accelerate launch --multi_gpu --num_processes N scripts/pretrain.py PRESET ...
On several CPU processes: torchrun --standalone --nproc_per_node N scripts/pretrain.py PRESET ...
HF_MAE_TRACEBACK=1 shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exit 2 with one plain sentence if the user can mend it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    commands = {
        "pretrain": _pretrain,
        "finetune": _finetune,
        "probe": _probe,
        "evaluate": _evaluate,
        "sweep": _sweep,
        "plan": _plan,
        "reconstruct": _reconstruct,
    }
    if command in {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return
    if command == "--version":
        sys.stdout.write(f"{hf_mae.__version__}\n")
        return
    try:
        if command not in commands:
            raise ValueError(f"command {command!r} is unknown; {_nearest(command, commands)}")
        commands[command](arguments)
        _end_processes()
    except KeyboardInterrupt:
        sys.stderr.write("hf-mae: interrupted before training began; nothing was changed\n")
        raise SystemExit(130) from None
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        if not _ours(error) or os.environ.get("HF_MAE_TRACEBACK"):
            raise
        sys.stderr.write(f"hf-mae: error: {error}\n")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


def _end_processes() -> None:
    """Leave the process group, if a command has joined one. Not after an error: others may be waiting in it."""
    distributed = sys.modules.get("torch.distributed")  # not imported: some commands answer without torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def parse_recipe(
    presets: Mapping[str, AnyPreset], arguments: Sequence[str], *, default: str, command: str = "pretrain"
) -> AnyPreset:
    """Return the preset named first in `arguments` (or `default`) with the flags after it applied.

    Args:
        presets: by name, all of one kind.
        arguments: of the command line, after the command.
        default: the preset where none is named.
        command: for the title of the help.

    Raises:
        ValueError: no preset has that name; the nearest ones are listed.
    """
    preset, flags = _choose_preset(presets, arguments, default)
    return tyro.cli(
        type(preset),
        prog=f"hf-mae {command} {preset.name}",
        description=f"Source: {preset.source}. Expected: {preset.expected}.",
        default=preset,
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What `hf-mae plan` takes: the hardware and its assumptions, the form of the answer, and a whole recipe."""

    hardware: Annotated[Hardware, tyro.conf.arg(name="")]
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the numbers as JSON."""
    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print published runs, with the share of the peak that each implies, and nothing else."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]


def parse_plan(presets: Mapping[str, Recipe], arguments: Sequence[str], *, default: str) -> PlanArguments:
    """Return the preset named first in `arguments` (or `default`) and the hardware, with the flags after it applied.

    Raises:
        ValueError: no preset has that name; the nearest ones are listed.
    """
    preset, flags = _choose_preset(presets, arguments, default)
    return tyro.cli(
        PlanArguments,
        prog=f"hf-mae plan {preset.name}",
        description="FLOPs, memory, time, input and disk of a run, by arithmetic. Fields of the recipe are flags too.",
        default=PlanArguments(hardware=Hardware(), recipe=preset),
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _choose_preset(
    presets: Mapping[str, AnyPreset], arguments: Sequence[str], default: str
) -> tuple[AnyPreset, Sequence[str]]:
    name, flags = default, list(arguments)
    if flags and not flags[0].startswith("-"):
        name = flags.pop(0)
    if name not in presets:
        raise ValueError(f"preset {name!r} is unknown; {_nearest(name, presets)} (--list prints all)")
    return presets[name], flags


def _pretrain(arguments: Sequence[str]) -> None:
    if "--list" in arguments:
        sys.stdout.write(list_presets(PRESETS))
        return
    recipe = parse_recipe(PRESETS, arguments, default="quickstart")
    _require_data(recipe)
    from hf_mae.pretrain import pretrain  # torch and transformers take seconds: --help and --list need neither

    pretrain(recipe)


def _require_data(recipe: Recipe | Evaluation) -> None:
    if not recipe.data.path:
        raise ValueError(
            "data.path is empty; name a folder, Parquet or tar files, or a Hub id: --data.path DIR_OR_HUB_ID"
        )


def _finetune(arguments: Sequence[str]) -> None:
    if "--list" in arguments:
        sys.stdout.write(list_presets(FINETUNE))
        return
    recipe = parse_recipe(FINETUNE, arguments, default="finetune-digits", command="finetune")
    _classify(recipe)


def _probe(arguments: Sequence[str]) -> None:
    if "--list" in arguments:
        sys.stdout.write(list_presets(PROBE))
        return
    recipe = parse_recipe(PROBE, arguments, default="probe-digits", command="probe")
    if not recipe.init_from:
        raise ValueError(
            "init_from is empty; name the encoder to probe: --init-from RUN_FOLDER, a model folder, a Hub id or an "
            "official .pth file"
        )
    _classify(recipe)


def _classify(recipe: ClassifierRecipe) -> None:
    _require_data(recipe)
    from hf_mae.classify import classify

    classify(recipe)


def _evaluate(arguments: Sequence[str]) -> None:
    if "--list" in arguments:
        sys.stdout.write(list_presets(EVALUATIONS))
        return
    recipe = parse_recipe(EVALUATIONS, arguments, default="own", command="evaluate")
    _require_data(recipe)
    from hf_mae.evaluate import evaluate

    evaluate(recipe)


@dataclass(frozen=True, kw_only=True)
class PartialArguments:
    """What `hf-mae sweep partial` takes: the blocks, the seeds, and a whole recipe."""

    blocks: tuple[float, ...] = (0, 0.5, 1, 2, 4, 6, 12, 18, 24)
    """Trainable blocks of each run; those beyond the encoder's depth are left out."""
    seeds: int = 1
    """Runs for each number of blocks."""
    recipe: Annotated[ClassifierRecipe, tyro.conf.arg(name="")]


@dataclass(frozen=True, kw_only=True)
class SeedsArguments:
    """What `hf-mae sweep seeds` takes: how many, and a whole recipe."""

    n: Annotated[int, tyro.conf.arg(aliases=["--num-seeds"])] = 5
    """Seeds: the recipe's own and those after it. Under torchrun, which takes --n for its own, --num-seeds."""
    recipe: Annotated[Any, tyro.conf.arg(name="")]


def parse_sweep(arguments: Sequence[str]) -> Any:
    """Return what `hf-mae sweep KIND [COMMAND] [PRESET] [flags]` asks for: `PartialArguments` or `SeedsArguments`.

    Raises:
        ValueError: there is no such kind or preset.
    """
    kind, *rest = arguments or [""]
    if kind not in {"partial", "seeds"}:
        raise ValueError(f"sweep {kind!r} is unknown; use `hf-mae sweep partial ...` or `hf-mae sweep seeds ...`")
    presets: Mapping[str, Any] = FINETUNE
    command = "finetune"
    if kind == "seeds" and rest and rest[0] in {"pretrain", "finetune", "probe"}:
        command = rest.pop(0)
        presets = {"pretrain": PRESETS, "finetune": FINETUNE, "probe": PROBE}[command]
    preset, flags = _choose_preset(presets, rest, next(iter(presets)))
    group: Any = PartialArguments
    if kind == "seeds":  # the flags are those of this kind of recipe
        field = ("recipe", Annotated[type(preset), tyro.conf.arg(name="")])
        group = make_dataclass("SeedsArguments", [field], bases=(SeedsArguments,), frozen=True, kw_only=True)
    return tyro.cli(
        group,
        prog=f"hf-mae sweep {kind} {command} {preset.name}",
        description=f"Source: {preset.source}. Expected: {preset.expected}.",
        default=group(recipe=preset),
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )


def _sweep(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0] in {"-h", "--help"}:
        sys.stdout.write("".join(line + "\n" for line in USAGE.splitlines() if "hf-mae sweep" in line))
        return
    given = parse_sweep(arguments)
    _require_data(given.recipe)
    from hf_mae.sweep import sweep_partial, sweep_seeds

    if isinstance(given, PartialArguments):
        sweep_partial(given.recipe, blocks=given.blocks, seeds=given.seeds)
    else:
        sweep_seeds(given.recipe, n=given.n)


def _plan(arguments: Sequence[str]) -> None:
    if "--list" in arguments:
        sys.stdout.write(list_presets(PRESETS))
        return
    given = parse_plan(PRESETS, arguments, default="mae-vit-b")
    if given.check:
        sys.stdout.write(published_report())
        return
    plan = make_run_plan(given.recipe, given.hardware)
    sys.stdout.write(json.dumps(as_dict(plan), indent=2) + "\n" if given.json else report(given.recipe, plan))


def _reconstruct(arguments: Sequence[str]) -> None:
    def reconstruct(
        model: tyro.conf.Positional[str],
        images: tyro.conf.Positional[list[Path]],
        out: Path = Path("reconstruction.png"),
        seed: int = 0,
    ) -> None:
        """Draw what a model makes of images with most patches removed.

        Args:
            model: a model folder (runs/NAME/checkpoints/step_N/model) or a Hub id.
            images: image files.
            out: where to write the picture.
            seed: chooses the masks.
        """
        from hf_mae.pretrain import reconstruct_files

        reconstruct_files(model, images, out, seed=seed)
        sys.stdout.write(f"{out}\n")

    tyro.cli(reconstruct, prog="hf-mae reconstruct", args=list(arguments))


def list_presets(presets: Mapping[str, Recipe] | Mapping[str, ClassifierRecipe] | Mapping[str, Evaluation]) -> str:
    """Return a table of presets: length, batch, source and expected result."""
    width = max(20, *(len(name) + 2 for name in presets))
    trained = not any(isinstance(recipe, Evaluation) for recipe in presets.values())
    numbers = f"{'epochs':>7}{'batch':>7}{'pixels':>9}" if trained else ""
    lines = [f"{'preset':<{width}}{numbers}  data"]
    for name, recipe in presets.items():
        if isinstance(recipe, Recipe):
            numbers = f"{recipe.epochs:>7g}{recipe.global_batch:>7}{recipe.model.image_size or 'encoder':>9}"
        lines.append(f"{name:<{width}}{numbers}  {recipe.data.path or 'yours (--data.path)'}")
        lines.append(f"{'':<{width}}source: {recipe.source}")
        lines.append(f"{'':<{width}}expected: {recipe.expected}")
    return "\n".join(lines) + "\n"


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"did you mean {', '.join(near)}?" if near else f"use one of {', '.join(known)}"


def _ours(error: BaseException) -> bool:
    """Return whether a `raise` of this package made the error, rather than a library or the interpreter met it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(hf_mae.__file__).parent)
    return inside and (frames[-1].line or "").startswith("raise")


if __name__ == "__main__":
    main()
