"""The commands that measure, plan, draw and prepare data: evaluate, plan, doctor, reconstruct, split, background."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from hf_mae.cli.arguments import choose_preset, fit_warmup, list_presets, parse_recipe, require_data
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
    given = tyro.cli(
        PlanArguments,
        prog=f"hf-mae plan {preset.name}",
        description="FLOPs, memory, time, input and disk of a run, by arithmetic. Fields of the recipe are flags too.",
        default=PlanArguments(hardware=Hardware(), recipe=preset),
        args=flags,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return replace(given, recipe=fit_warmup(given.recipe, preset, flags))


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
        model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")],
        images: tyro.conf.Positional[tuple[Path, ...]] = (),
        out: Path = Path("reconstruction.png"),
        seed: int = 0,
        overwrite: tyro.conf.FlagCreatePairsOff[bool] = False,
    ) -> None:
        """Draw what a model makes of images with most patches removed.

        Args:
            model: a run folder, a model folder, a Hub id or an official .pth file.
            images: one or more image files.
            out: where to write the picture.
            seed: chooses the masks.
            overwrite: replace a file that is not a reconstruction of ours.
        """
        from hf_mae.pretrain import reconstruct_files

        reconstruct_files(model, images, out, seed=seed, overwrite=overwrite)
        sys.stdout.write(f"{out}\n")

    tyro.cli(reconstruct, prog="hf-mae reconstruct", args=list(arguments))


@dataclass(frozen=True)
class SplitArguments:
    """What `hf-mae split` takes: the data, the rule and the file."""

    what: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[DATA] [RULE]")] = ()
    """A folder, Parquet or tar files, or a Hub id (or --data.path); then a rule: stratified:PARTS or random:PARTS,
    PARTS in percent (train/validation[/test]), @SEED. Without a rule stratified:80/10/10@3334."""
    out: Path = Path("splits.json")
    """The file to write (JSON)."""
    of: str | None = None
    """Which split to divide; train, or the only one."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace a file that holds other lists."""
    data: Data = field(default_factory=Data)


def split_command(arguments: Sequence[str]) -> None:
    """Divide a split and store the lists."""
    given = tyro.cli(
        SplitArguments,
        prog="hf-mae split",
        description="Divide one split of labelled images, and store the lists of its rows: use them with --data.splits "
        "FILE. Columns, configuration and streaming are named as for training, and must be the same there.",
        args=list(arguments),
        config=(tyro.conf.AvoidSubcommands,),
    )
    from hf_mae.data.parts import divided
    from hf_mae.data.sources import list_splits, open_source
    from hf_mae.data.splits import counts_in_words, parse_rule, split_source, write_splits

    data, text = _data_and_rule(given)
    rule = parse_rule(text)
    if rule is None:
        raise ValueError(f"rule={text!r} is no rule; use such as stratified:80/10/10@3334 or random:95/5")
    source = open_source(data, field="of" if given.of is not None else "data.split")
    splits = split_source(source, rule, split=divided(list_splits(data), data.split))
    write_splits(given.out, splits, overwrite=given.overwrite)
    sys.stdout.write(
        f"{source.where}: {counts_in_words(splits)}; written to {given.out}, use it with "
        f"--data.splits {shlex.quote(str(given.out))}\n"
    )


def _data_and_rule(given: SplitArguments) -> tuple[Data, str]:
    """Return the data with the split to divide, and the rule: `DATA RULE`, or `--data.path DATA` and `RULE`."""
    data, words = given.data, list(given.what)
    if data.splits is not None:
        raise ValueError(f"data.splits={data.splits!r}: this command makes such a file; give the rule as RULE")
    if not data.path and words:
        data = replace(data, path=words.pop(0))
    if not data.path:
        raise ValueError("data.path is empty; name a folder, Parquet or tar files, or a Hub id: hf-mae split DATA RULE")
    if len(words) > 1:
        raise ValueError(
            f"{' '.join(given.what)}: one data set and one rule are taken, and the data set is {data.path}; leave out "
            "the rest"
        )
    if given.of is not None and data.split not in (None, given.of):
        raise ValueError(f"of={given.of!r} and data.split={data.split!r} name two splits to divide; leave one out")
    return replace(data, split=given.of or data.split), words[0] if words else "stratified:80/10/10@3334"


def doctor_command(arguments: Sequence[str]) -> None:
    """Look at this machine."""

    def doctor(
        out: Path = Path("hf-mae-doctor.json"),
        train: tyro.conf.FlagCreatePairsOff[bool] = False,
        only: tuple[str, ...] = (),
    ) -> bool:
        """Say what this machine has, what each missing part costs, and whether training works on it.

        Args:
            out: where to write the record, to attach to a report; it names no user and no token.
            train: train for at most 8 minutes in all the ways this machine allows (float32 and bf16, compiled, stopped
                and resumed, DDP and FSDP2 on all GPUs), and compare losses, bits, speed and memory.
            only: with --train, only these parts, such as float32 resume.
        """
        from hf_mae.doctor import examine

        return examine(out, train=train, only=only, say=lambda line: print(line, flush=True))  # noqa: T201

    if not tyro.cli(doctor, prog="hf-mae doctor", args=list(arguments)):
        raise SystemExit(1)


def background_command(arguments: Sequence[str]) -> None:
    """Copy pictures without their backgrounds."""

    def background(
        source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
        out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")],
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
        from hf_mae.data.background import RECORD, remove_backgrounds

        counts = remove_backgrounds(source, out, inset=inset, iterations=iterations)["counts"]
        sys.stdout.write(
            f"{counts['removed']:,} backgrounds removed, {counts['kept']:,} pictures kept whole, "
            f"{counts['undecodable']:,} undecodable; which and why is in {out / RECORD}\n"
        )

    tyro.cli(background, prog="hf-mae background", args=list(arguments))
