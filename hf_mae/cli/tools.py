"""The commands that measure, plan, draw and prepare data: evaluate, plan, reconstruct, split, background."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hf_mae.cli.arguments import choose_preset, list_presets, parse_recipe, require_data
from hf_mae.planning.hardware import Hardware
from hf_mae.planning.plan import as_dict, make_run_plan
from hf_mae.planning.report import published_report, report
from hf_mae.recipes.base import Data, Recipe
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.recipes.mae import PRESETS


def evaluate_command(arguments: Sequence[str]) -> None:
    """Evaluate a classifier."""
    if "--list" in arguments:
        sys.stdout.write(list_presets(EVALUATIONS))
        return
    recipe = parse_recipe(EVALUATIONS, arguments, default="own", command="evaluate")
    require_data(recipe)
    from hf_mae.evaluate import evaluate

    evaluate(recipe)


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
    preset, flags = choose_preset(presets, arguments, default)
    return tyro.cli(
        PlanArguments,
        prog=f"hf-mae plan {preset.name}",
        description="FLOPs, memory, time, input and disk of a run, by arithmetic. Fields of the recipe are flags too.",
        default=PlanArguments(hardware=Hardware(), recipe=preset),
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )


def plan_command(arguments: Sequence[str]) -> None:
    """Say what a run takes."""
    if "--list" in arguments:
        sys.stdout.write(list_presets(PRESETS))
        return
    given = parse_plan(PRESETS, arguments, default="mae-vit-b")
    if given.check:
        sys.stdout.write(published_report())
        return
    plan = make_run_plan(given.recipe, given.hardware)
    sys.stdout.write(json.dumps(as_dict(plan), indent=2) + "\n" if given.json else report(given.recipe, plan))


def reconstruct_command(arguments: Sequence[str]) -> None:
    """Draw reconstructions."""

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


def split_command(arguments: Sequence[str]) -> None:
    """Divide a split and store the lists."""

    def split(
        path: tyro.conf.Positional[str],
        rule: tyro.conf.Positional[str] = "stratified:80/10/10@3334",
        out: Path = Path("splits.json"),
        of: str | None = None,
    ) -> None:
        """Divide one split of labelled images, and store the lists of its rows. Use them with --data.splits FILE.

        Args:
            path: a folder, Parquet or tar files, or a Hub id.
            rule: stratified:PARTS or random:PARTS, parts in percent (train/validation[/test]), @SEED.
            out: the file to write (JSON).
            of: which split to divide; the only one, or train.
        """
        from hf_mae.data.sources import open_source
        from hf_mae.data.splits import parse_rule, split_source, write_splits

        parsed = parse_rule(rule)
        if parsed is None:
            raise ValueError(f"rule={rule!r} is no rule; use such as stratified:80/10/10@3334 or random:95/5")
        source = open_source(Data(path=path, split=of))
        splits = split_source(source, parsed, split=of or "train")
        write_splits(out, splits)
        parts = ", ".join(f"{name} {len(rows):,}" for name, rows in splits.parts.items())
        sys.stdout.write(f"{source.where}: {parts}; written to {out}, use it with --data.splits {out}\n")

    tyro.cli(split, prog="hf-mae split", args=list(arguments))


def background_command(arguments: Sequence[str]) -> None:
    """Copy pictures without their backgrounds."""

    def background(
        source: tyro.conf.Positional[Path],
        out: tyro.conf.Positional[Path],
        inset: float = 0.05,
        iterations: int = 5,
    ) -> None:
        """Copy a folder of pictures with their backgrounds removed by GrabCut; needs hf_mae[birds].

        Where less than a tenth or more than nine tenths of a picture would be left, the original is kept.

        Args:
            source: a folder tree of pictures.
            out: the folder to make; a run that was interrupted goes on.
            inset: the foreground lies within the picture less this share of each side.
            iterations: of GrabCut.
        """
        from hf_mae.data.background import remove_backgrounds

        found = remove_backgrounds(source, out, inset=inset, iterations=iterations)
        sys.stdout.write(json.dumps({k: v for k, v in found.items() if isinstance(v, int | float | str)}) + "\n")

    tyro.cli(background, prog="hf-mae background", args=list(arguments))
