"""The records a card is made of: what the export, the run and the evaluations wrote. Nothing else is believed.

A record is a JSON file. Local paths are cut to their last part, and process numbers and machine names left out, before
anything is published.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_mae.cards.vocabulary import is_hub_id
from hf_mae.exporting.official import LICENSE, is_copy
from hf_mae.training.monitors import read_rows

PRIVATE = frozenset({"pids", "hostname", "host", "user", "command"})
"""Names of what is nobody's business."""
NAMES = frozenset({"classes", "label_names", "id2label", "label2id"})
"""Lists of class names, which may hold slashes."""
MAX_LINEAGE = 8
"""Runs that a run may come from, one after another."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation after training, `hf-mae evaluate`."""

    name: str
    """Of its folder."""
    summary: dict[str, Any]
    evaluation: dict[str, Any] | None


@dataclass(frozen=True)
class Ancestor:
    """A model that the weights come from."""

    name: str
    """A Hub id or a name of timm's, else the last part of a path."""
    is_hub: bool
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


def run_of(export: Path) -> Path | None:
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
        found["ancestors"] = tuple(_ancestors(found["recipe"].get("init_from") or ""))
    conversion = _read(export / "conversion.json") or (_read(run / "conversion.json") if run is not None else {})
    return Records(
        folder=export,
        export=told,
        config=config,
        preprocessing=_read(export / "preprocessor_config.json") or config.get("pretrained_cfg", {}),
        parameters=count_parameters(export),
        conversion=conversion,
        evaluated=tuple(_evaluated(path, told["source"], run) for path in evaluations),
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
        return json.loads(path.read_text())
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
    weights = Path(model).expanduser() / "model.safetensors"
    if weights.is_file() and source.get("sha256"):
        with weights.open("rb") as file:
            found = sha256()
            while block := file.read(1 << 20):
                found.update(block)
        return found.hexdigest() == source["sha256"]
    if run is None:
        return False
    name = f"checkpoints/step_{source['step'] or 0:08d}"
    place = {"best": "best/model", "average": f"{name}/model_ema"}.get(source["weights"], f"{name}/model")
    return Path(model).as_posix().endswith(f"{run.name}/{place}")


def _ancestors(init_from: str) -> list[Ancestor]:
    found: list[Ancestor] = []
    while init_from and len(found) < MAX_LINEAGE:
        path = Path(init_from).expanduser()
        if not path.exists():
            found.append(_known(init_from))
            break
        conversion, recipe = _beside(path, "conversion.json"), _beside(path, "recipe.json")
        license_id = conversion.get("license")
        source = "conversion.json of what it was trained from" if license_id else ""
        card = path / "README.md"
        if license_id is None and card.is_file():
            license_id, source = ModelCard.load(card).data.get("license"), "the card of what it was trained from"
        if license_id is None and is_official(path.name):
            license_id, source = LICENSE, "the LICENSE of facebookresearch/mae"
        found.append(Ancestor(path.name, False, recipe.get("name"), license_id, source))
        init_from = recipe.get("init_from") or ""
    return found


def is_official(name: str) -> bool:
    """Return whether weights are the official ones of MAE, or a known copy of them, by their name."""
    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    return (
        re.search(r"mae_(?:pretrain|finetuned|visualize)_vit_", name) is not None
        or is_copy(name)
        or ("/" not in name and is_copy(f"timm/{name}"))
    )


def _known(name: str) -> Ancestor:
    if is_official(name):
        return Ancestor(name, is_hub_id(name), None, LICENSE, "the LICENSE of facebookresearch/mae")
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if is_hub_id(plain) and not name.startswith((".", "~")):
        return Ancestor(plain, True)
    if "/" in name:
        return Ancestor(Path(name).name, False)
    import timm  # takes seconds

    if not timm.is_model(name.partition(".")[0]):
        return Ancestor(name, False)
    known = timm.models.get_pretrained_cfg(name)
    license_id = known.license if known is not None else None
    return Ancestor(
        f"timm/{name}" if "." in name else name, "." in name, None, license_id, "timm's record of the weights"
    )


def _beside(path: Path, name: str) -> dict[str, Any]:
    """Return a record of the run or folder that a model lies in: RUN, RUN/best/model, RUN/checkpoints/step_N/model."""
    for folder in [path, *path.parents][:4]:
        if record := _read(folder / name):
            return record
    return {}


def published(value: Any) -> Any:
    """Return a record as it may be published: paths of this machine cut to their last part, private names left out."""
    if isinstance(value, Mapping):
        return {k: v if k in NAMES else published(v) for k, v in value.items() if k not in PRIVATE}
    if isinstance(value, list | tuple):
        return [published(v) for v in value]
    if isinstance(value, str):
        return without_path(value)
    return value


def without_path(text: str) -> str:
    """Return a path of this machine as its last part; everything else as it is."""
    if is_hub_id(text) and not Path(text).exists():
        return text
    if re.match(r"^(?:[/~.]|[A-Za-z]:[\\/])\S*$", text) or (re.fullmatch(r"[\w.-]+(?:/[\w.-]+)+", text)):
        return re.split(r"[\\/]", text.rstrip("/\\"))[-1] or text
    # A path inside a sentence.
    return re.sub(r"(?<![\w:/.])(?:/[\w.@+-]+){2,}/?", lambda m: m.group().rstrip("/").rsplit("/", 1)[-1], text)
