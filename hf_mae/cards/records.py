"""The records a card is made of: what the export, the run and the evaluations wrote. Nothing else is believed.

A record is a JSON file. `hf_mae.cards.private` cuts what is nobody's business before anything is published.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_mae.cards.vocabulary import is_hub_id
from hf_mae.exporting.files import hash_weights
from hf_mae.exporting.lineage import with_official_terms
from hf_mae.recipes.fields import choose, unknown
from hf_mae.training.monitors import read_rows

LIBRARIES = ("transformers", "timm", "onnx", "hf_mae")
"""What loads an export, by which its card is written."""
WEIGHTS = ("last", "best", "average")
"""Which weights of a run an export may hold."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation after training, `hf-mae evaluate`."""

    name: str
    """Of its folder."""
    summary: dict[str, Any]
    evaluation: dict[str, Any] | None


@dataclass(frozen=True)
class Ancestor:
    """A model that the weights come from, as of `hf_mae.training.origins`."""

    name: str
    """A Hub id, else the name of a run or the last part of a path."""
    kind: str
    is_hub: bool = False
    """It is on record that it came from the Hub under this name."""
    recipe: str | None = None
    """Of the run that made it, if it is one of ours."""
    license: str | None = None
    license_source: str = ""


@dataclass(frozen=True)
class Records:
    """Everything a card may say, as it was written; empty where there is no record.

    Attributes:
        folder: of the export.
        export: export.json.
        config: config.json of the export.
        preprocessing: preprocessor_config.json of the export, or timm's pretrained_cfg.
        parameters: counted in the headers of the weights; None if there are none (ONNX).
        conversion: conversion.json, of weights that others trained.
        recipe: of the run.
        rows: of its metrics.jsonl.
        starts: of its environment.json.
        evaluation: its evaluation.json.
        best: its best/best.json.
        evaluated: evaluations after training, of the exported weights.
        ancestors: what the weights come from, the nearest first.
    """

    folder: Path
    export: dict[str, Any]
    config: dict[str, Any]
    preprocessing: dict[str, Any]
    parameters: int | None
    conversion: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    evaluated: tuple[Evaluated, ...] = ()
    ancestors: tuple[Ancestor, ...] = ()

    @property
    def source(self) -> dict[str, Any]:
        """What was exported: `kind`, `weights`, `step`, `sha256`."""
        return self.export["source"]

    @property
    def classifies(self) -> bool:
        """Whether it gives scores of classes."""
        return self.export["classifies"]

    @property
    def channels(self) -> int:
        """Colour channels of the input."""
        return self.export["channels"]

    @property
    def asks_each_class(self) -> bool:
        """Whether each score is the answer to a question of its own (binary cross-entropy), to be read by a sigmoid."""
        return self.export["problem_type"] == "multi_label_classification"

    @property
    def dataset_id(self) -> str | None:
        """Hub id of the training data, if it is on record that it was read from there: at a commit."""
        path = str(self.recipe.get("data", {}).get("path") or "")
        found = any(_is_commit(start.get("data", {}).get("revision")) for start in self.starts)
        return path if found and is_hub_id(path) else None


def run_of_export(export: Path) -> Path | None:
    """Return the run folder that an export lies in (RUN/export/TARGET), None if it lies elsewhere."""
    run = export.absolute().parent.parent
    return run if export.absolute().parent.name == "export" and (run / "recipe.json").is_file() else None


def read_records(export: Path, run: Path | None = None, evaluations: Sequence[Path] = ()) -> Records:
    """Read what an export, its run and later evaluations put on record.

    Args:
        export: an export folder.
        run: the run folder it was made from; None where there is none.
        evaluations: folders that `hf-mae evaluate --out` wrote (or their summary.json), of the exported weights.

    Raises:
        ValueError: export.json is missing or unreadable, or an evaluation is of other weights.
    """
    told = _read(export / "export.json")
    if not told:
        raise ValueError(f"export={export} is no export: it has no export.json; make one with `hf-mae export`")
    if told.get("format") != 1:
        raise ValueError(f"{export / 'export.json'} has format={told.get('format')!r}, not 1; export again")
    if told["library"] not in LIBRARIES:
        raise unknown(f"{export / 'export.json'}: library", told["library"], LIBRARIES)
    if told["source"]["weights"] not in WEIGHTS:
        raise unknown(f"{export / 'export.json'}: source.weights", told["source"]["weights"], WEIGHTS)
    config = _read(export / "config.json")
    found: dict[str, Any] = {}
    if run is not None:
        environment = _read(run / "environment.json")
        found = {
            "recipe": _read(run / "recipe.json"),
            "rows": read_rows(run / "metrics.jsonl"),
            "starts": environment.get("starts", []),
            "evaluation": _read(run / "evaluation.json"),
            "best": _read(run / "best" / "best.json"),
        }
        _check_belongs(told, run, found)
    return Records(
        folder=export,
        export=told,
        config=config,
        preprocessing=_read(export / "preprocessor_config.json") or config.get("pretrained_cfg", {}),
        parameters=count_parameters(export),
        conversion=_read(export / "conversion.json"),
        evaluated=tuple(_evaluated(path, told["source"], run) for path in evaluations),
        ancestors=tuple(_ancestor(link) for link in with_official_terms(told["lineage"])),
        **found,
    )


def count_parameters(folder: Path) -> int | None:
    """Return how many numbers the weights of a folder hold, read from their headers; None if there are no weights."""
    total, files = 0, sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total if files else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it or leave the record out") from error


def _evaluated(path: Path, source: Mapping[str, Any], run: Path | None) -> Evaluated:
    folder = path if path.is_dir() else path.parent
    summary = _read(folder / "summary.json")
    if not summary:
        raise ValueError(f"evaluations={path} holds no summary.json; name a folder that `hf-mae evaluate --out` wrote")
    if not _is_of(summary["model"], source, run):
        raise ValueError(
            f"evaluations={path} is of other weights (model={Path(summary['model']).name!r}) than the export "
            f"(weights={source['weights']}, step={source['step']}); evaluate what was exported: hf-mae evaluate own "
            "--model RUN or RUN/best/model"
        )
    return Evaluated(folder.name, summary, _read(folder / "evaluation.json") or None)


def _is_of(model: str, source: Mapping[str, Any], run: Path | None) -> bool:
    """Return whether an evaluated model is the exported one: by the hash of its weights, else by its place."""
    found = hash_weights(Path(model).expanduser())
    if found is not None and source.get("sha256"):
        return found == source["sha256"]
    return run is not None and Path(model).as_posix().endswith(f"{run.name}/{_place(source)}")


def _place(source: Mapping[str, Any]) -> str:
    """Return where in its run the exported model lies."""
    step = f"checkpoints/step_{source.get('step') or 0:08d}"
    places = {"best": "best/model", "average": f"{step}/model_ema", "last": f"{step}/model"}
    return choose("source.weights of export.json", source["weights"], places)


def _check_belongs(told: Mapping[str, Any], run: Path, found: Mapping[str, Any]) -> None:
    """Refuse the records of a run that the export was not made from.

    Raises:
        ValueError: it is another run, or was trained anew since.
    """
    source, name = told["source"], run.resolve().name
    remedy = f"export {run} again, or name the run that it was made from (--run)"
    if not found["recipe"]:
        raise ValueError(f"run={run} is no run folder (no recipe.json); name the run that the export was made from")
    if source.get("step") is None or source.get("run") != found["recipe"].get("name"):
        made_from = f"of recipe {source['run']!r}" if source.get("run") else "of no run"
        raise ValueError(
            f"run={run} has recipe {found['recipe'].get('name')!r}, and the export is {made_from}; {remedy}"
        )
    there = hash_weights(run / _place(source))
    if there is not None and source.get("sha256"):
        if there != source["sha256"]:
            raise ValueError(
                f"run={run} holds other weights in {_place(source)} than were exported (weights={source['weights']}, "
                f"step={source['step']}), so its records are not theirs; {remedy}"
            )
        return
    # The checkpoint was pruned since: its name and times have to fit.
    first = found["starts"][0]["time"] if found["starts"] else ""
    last = max((row["step"] for row in found["rows"]), default=source["step"])
    if source["name"] != name or source["step"] > last or told.get("time", first) < first:
        raise ValueError(
            f"run={run} no longer holds the exported weights ({_place(source)}), and is not the run that the export "
            f"names ({source['name']}, step {source['step']}, {told.get('time')}); {remedy}"
        )


def _ancestor(link: Mapping[str, Any]) -> Ancestor:
    return Ancestor(
        name=str(link["name"]),
        kind=str(link["kind"]),
        is_hub=link["kind"] == "hub" and _is_commit(link.get("revision")) and is_hub_id(str(link["name"])),
        recipe=link.get("recipe"),
        license=link.get("license"),
        license_source=str(link.get("source") or ""),
    )


def _is_commit(revision: Any) -> bool:
    return isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None
