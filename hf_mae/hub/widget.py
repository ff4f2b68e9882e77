"""Will the Hub's page of a model offer a widget, and will it answer? Checked before and after publishing.

The Hub maps a repository to one library and one task, from the card and `config.json` (docs: hub/models-widgets). Its
page then offers an input, unless one of the preconditions here fails. Whether a provider runs the model is decided by
the Hub (`inference == "warm"`), so no verdict promises that. Tables are of `hf_mae.cards.vocabulary` and of npm
@huggingface/widgets 0.2.12 (`WIDGET_COMPONENTS`), cut to what this package writes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import yaml

from hf_mae.cards import vocabulary
from hf_mae.exporting.write import RECORD
from hf_mae.hub.folder_checks import Check as Check  # part of what this module offers
from hf_mae.hub.folder_checks import labels_checks, pipeline_check, processor_check, read_json, timm_checks

OUR_TASKS = frozenset({"image-classification", "image-feature-extraction"})
"""Tasks of the models that this package publishes."""

LIBRARY_TASKS = {name: tasks & OUR_TASKS for name, tasks in vocabulary.LIBRARY_TASKS.items() if tasks}
"""Those among them that the Hub's page knows for a library, of the libraries that it runs."""

WIDGET_TASKS = frozenset({"image-classification"})
"""Tasks among those for which the page has an input; `image-feature-extraction` has none."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".msgpack")
"""File names of weights that can carry code, or that stock classes prefer to safetensors."""

DECISION = "Whether a provider serves it is the Hub's decision; a Space (hf-mae space) is the demo that always works."


@dataclass(frozen=True)
class Verdict:
    """What the Hub's page will do with a model.

    Attributes:
        checks: all that was looked at.
        works: every precondition of a widget holds. False with every check in order is a repository that has no widget
            by design; the sentence says why.
        sentence: the outcome, for people.
    """

    checks: tuple[Check, ...]
    works: bool
    sentence: str

    @property
    def problems(self) -> list[Check]:
        """The checks that do not hold."""
        return [check for check in self.checks if not check.ok]

    def lines(self) -> list[str]:
        """Return one line per check and the sentence, to print."""
        rows = [
            f"{'ok ' if c.ok else 'NO '} {c.name}: {c.found}" + ("" if c.ok or not c.remedy else f" -> {c.remedy}")
            for c in self.checks
        ]
        return [*rows, self.sentence]


@dataclass(frozen=True)
class _Page:
    """What the Hub reads of a repository."""

    card: Mapping[str, Any]
    config: Mapping[str, Any]
    files: frozenset[str]
    library: str | None
    task: str | None
    custom_code: bool
    channels: int = 3


# ------------------------------------------------------------------------------------------------ the two entries


def check_folder(folder: Path, *, picture: Path | None = None) -> Verdict:
    """Say what the Hub will make of a folder, and run it as a stranger would: stock classes in a new process.

    Args:
        folder: an export with its card (`README.md`).
        picture: shown to the pipeline; None takes a photograph that comes with scikit-learn.

    Raises:
        ValueError: the folder or the picture does not exist, or its config.json is not JSON.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name an export or a model folder")
    if picture is not None and not picture.is_file():
        raise ValueError(f"picture={picture} is not a file; name an image")
    files = frozenset(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    )
    config = read_json(folder / "config.json") if "config.json" in files else {}
    card, card_check = _read_card(folder / "README.md")
    export = read_json(folder / RECORD) if RECORD in files else {}
    page = _infer(card, config, files, _channels(export, config))
    checks = [card_check, *_common_checks(page)]
    if _no_pipeline(page) is None:
        checks += timm_checks(config, page.task) if page.library == "timm" else labels_checks(config, page.task)
        if page.library != "timm":
            checks.append(processor_check(folder, config))
        checks.append(_samples_check(card, files))
        if page.task in LIBRARY_TASKS.get(page.library or "", ()):
            checks.append(pipeline_check(folder, page.task or "", picture))
    return _verdict(page, checks, served="not known before it is on the Hub")


def check_remote(info: Mapping[str, Any], export: Mapping[str, Any] | None = None) -> Verdict:
    """Say what the Hub makes of a repository.

    Args:
        info: the JSON of `GET /api/models/ORG/NAME`.
        export: the repository's export.json, which says how many channels the model reads; the Hub's answer does not.

    Raises:
        ValueError: this is not such an answer.
    """
    if "siblings" not in info or not ("id" in info or "modelId" in info):
        raise ValueError("info has no `id` and `siblings`; give the JSON of GET /api/models/ORG/NAME")
    files = frozenset(str(entry["rfilename"]) for entry in info["siblings"])
    card, config = info.get("cardData") or {}, info.get("config") or {}
    page = _Page(
        card=card,
        config=config,
        files=files,
        library=info.get("library_name"),
        task=info.get("pipeline_tag"),
        custom_code="custom_code" in (info.get("tags") or ()) or "auto_map" in config,
        channels=_channels(export or {}, config),
    )
    checks = [_card_of(files), *_common_checks(page)]
    if _no_pipeline(page) is None:
        checks.append(_samples_check(card, files))
    hidden = [word for word in ("private", "gated", "disabled") if info.get(word)]
    checks.append(
        Check(
            "visibility",
            not info.get("disabled"),
            " and ".join(hidden) + ": others see no widget" if hidden else "public",
            "the Hub disabled the repository; its owner was told why",
        )
    )
    return _verdict(page, checks, served=_served(info))


def _served(info: Mapping[str, Any]) -> str:
    providers = info.get("inferenceProviderMapping") or ()
    # The Hub writes a list of {"provider": ...} or an object by provider, depending on how it is asked.
    names = sorted(str(p["provider"]) if isinstance(p, Mapping) else str(p) for p in providers)
    if info.get("inference") == "warm":
        return f"yes, now ({', '.join(names) or 'provider not named'})"
    if "inference" not in info:
        return "not known (the answer does not say)"
    return f"not now (inference: {info['inference']})"


def _verdict(page: _Page, checks: Sequence[Check], *, served: str) -> Verdict:
    no_widget = _no_pipeline(page) or _no_input(page)
    failed = [check.name for check in checks if not check.ok]
    if failed:
        what = "This is not as it should be" if no_widget else "The widget cannot work"
        sentence = f"{what}: {len(failed)} of {len(checks)} checks fail ({', '.join(failed)})."
    elif no_widget:
        sentence = f"No widget, by design: {no_widget}"
    else:
        sentence = (
            f"The preconditions of the widget hold ({page.library}, {page.task}). Served by a provider: {served}. "
            f"{DECISION}"
        )
    return Verdict(tuple(checks), not failed and no_widget is None, sentence)


# ------------------------------------------------------------------------------------------------ what the Hub infers


def _infer(card: Mapping[str, Any], config: Mapping[str, Any], files: Collection[str], channels: int) -> _Page:
    """Map card and config to library and task, by the rules of the Hub's documentation."""
    tags = [str(tag) for tag in card.get("tags") or ()]
    library = card.get("library_name")
    if library is None:
        by_file = "transformers" if "model_type" in config else "timm" if "pretrained_cfg" in config else None
        library = next((tag for tag in tags if tag in LIBRARY_TASKS), by_file)
    known = frozenset[str]().union(*LIBRARY_TASKS.values())
    task = card.get("pipeline_tag") or next((tag for tag in tags if tag in known), None)
    if (
        task is None
        and library == "transformers"
        and any("ForImageClassification" in a for a in _architectures(config))
    ):
        task = "image-classification"
    if task is None and library == "timm":
        task = "image-classification"
    code = "auto_map" in config or "custom_code" in tags
    return _Page(card, config, frozenset(files), library, task, code, channels)


def _channels(export: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return how many channels a model reads: by its export, else by its config, stock or timm's."""
    sizes = (config.get("pretrained_cfg") or {}).get("input_size") or (3,)
    return int(export.get("channels") or config.get("num_channels") or sizes[0])


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def _no_pipeline(page: _Page) -> str | None:
    """Say why no stock pipeline answers for a repository, by its kind; None where one should."""
    kind, names = page.config.get("model_type"), _architectures(page.config)
    if kind == "vit_mae":
        return (
            "a vit_mae model reconstructs, and the stock feature pipeline would mask 75 % of each picture at random. A "
            "Space (hf-mae space) shows its reconstructions."
        )
    if kind == "hf_mae":
        remedy = (
            "hf-mae export RUN --target auto makes the classifier stock"
            if any("ForImageClassification" in name for name in names)
            else "a Space (hf-mae space) shows its reconstructions"
        )
        return f"this is the research repository; the Hub runs only classes of its own libraries. To try it: {remedy}."
    if page.channels != 3:
        plural = "s" * (page.channels != 1)
        return (
            f"the stock pipelines read colour, and this model takes {page.channels} channel{plural}. The usage lines "
            "of its card give it pictures as it wants them."
        )
    endings = {PurePosixPath(name).suffix for name in page.files}
    if ".onnx" in endings and ".safetensors" not in endings:
        return "an ONNX file alone is no model of a library that the Hub's page runs; publish a stock export for that."
    return None


def _no_input(page: _Page) -> str | None:
    """Say why the page has no input for a repository that is in order."""
    if page.task in LIBRARY_TASKS.get(page.library or "", ()) and page.task not in WIDGET_TASKS:
        return f"the Hub's page has no input for {page.task}. pipeline() and the Auto classes load it."
    return None


# ------------------------------------------------------------------------------------------------ checks of both


def _common_checks(page: _Page) -> list[Check]:
    of_ours = page.config.get("model_type") in ("vit_mae", "hf_mae")
    if page.channels != 3 and page.library in LIBRARY_TASKS and not of_ours:
        return [_stock_check(page), *_weights_checks(page.files)]  # the page infers its task, whatever the card says
    if _no_pipeline(page):
        promised = page.card.get("pipeline_tag")
        return [
            Check(
                "no widget promised",
                promised is None,
                f"pipeline_tag: {promised}" if promised else "no pipeline_tag",
                "leave pipeline_tag out of the card: no stock pipeline answers for this model",
            ),
            *_weights_checks(page.files),
        ]
    tasks = LIBRARY_TASKS.get(page.library or "", frozenset[str]())
    return [
        Check(
            "library",
            page.library in LIBRARY_TASKS,
            page.library or "none",
            f"write library_name: {' or '.join(LIBRARY_TASKS)} into the card; others get no widget",
        ),
        Check(
            "task",
            page.task in tasks,
            f"{page.task or 'none'} with {page.library or 'no library'}",
            f"write pipeline_tag: {' or '.join(sorted(tasks or LIBRARY_TASKS['transformers']))} into the card",
        ),
        _stock_check(page),
        Check(
            "no code",
            not page.custom_code,
            "auto_map: the page refuses repositories with code" if page.custom_code else "no auto_map",
            "publish the stock export (hf-mae export --target auto) without auto_map and the tag custom_code",
        ),
        Check(
            "no opt-out",
            page.card.get("inference") is not False,
            "inference: false" if page.card.get("inference") is False else "the card does not opt out",
            "remove `inference: false` from the card",
        ),
        *_weights_checks(page.files),
    ]


def _stock_check(page: _Page) -> Check:
    remedy = "export to a stock class: hf-mae export --target auto"
    if page.library == "timm":
        architecture = page.config.get("architecture")
        if architecture is None:  # the Hub's answer leaves it out
            return Check("stock class", True, "timm (the architecture is not in the Hub's answer)")
        import timm

        return Check("stock class", timm.is_model(str(architecture)), f"timm's {architecture}", remedy)
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    classifies = page.task != "image-feature-extraction"
    if page.channels != 3:  # no task is promised
        classifies = any("ForImageClassification" in name for name in _architectures(page.config))
    table = cast(Any, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES if classifies else MODEL_MAPPING_NAMES)
    names, kind = _architectures(page.config), str(page.config.get("model_type"))
    stock = table.get(kind, ())
    accepted = {stock} if isinstance(stock, str) else set(stock)
    found = f"{', '.join(names) or 'no architectures'} of model_type {kind}"
    return Check("stock class", bool(names) and set(names) <= accepted, found, remedy)


def _weights_checks(files: Collection[str]) -> list[Check]:
    safe = sorted(name for name in files if name.endswith(".safetensors") and not name.startswith("run/"))
    pickles = sorted(name for name in files if name.endswith(PICKLES))
    onnx = sorted(name for name in files if name.endswith(".onnx"))
    return [
        Check(
            "weights",
            bool(safe or onnx),
            ", ".join((safe or onnx)[:3]) or "no safetensors",
            "save the weights as safetensors (hf-mae export does)",
        ),
        Check("no pickles", not pickles, ", ".join(pickles[:5]) or "none", "remove them: they can carry code"),
    ]


def _card_of(files: Collection[str]) -> Check:
    return Check("card", "README.md" in files, "README.md" if "README.md" in files else "none", "hf-mae card makes one")


def _samples_check(card: Mapping[str, Any], files: Collection[str]) -> Check:
    """Look for the sample pictures of the card's `widget:` among the files."""
    remedy = "give pictures with --sample, which are copied into the repository, or https addresses of images"
    widget = card.get("widget")
    if not widget:
        return Check("samples", True, "none; visitors bring their own picture")
    if not isinstance(widget, Sequence) or not all(isinstance(entry, Mapping) and "src" in entry for entry in widget):
        return Check("samples", False, "widget is not a list of {src, example_title}", remedy)
    sources = [str(entry["src"]) for entry in widget]
    missing = [source for source in sources if not _is_there(source, files)]
    found = f"missing: {', '.join(missing)}" if missing else ", ".join(PurePosixPath(s).name for s in sources)
    return Check("samples", not missing, found, remedy)


def _is_there(source: str, files: Collection[str]) -> bool:
    if not re.match(r"[a-z]+:", source):
        return source.removeprefix("./") in files
    # Of an address into a repository the end is its file; one without is elsewhere, where we do not look.
    inside = re.fullmatch(r"https://[^/]+/[^/]+/[^/]+/resolve/[^/]+/(.+)", source)
    return inside[1] in files if inside else source.startswith("https://")


def _read_card(path: Path) -> tuple[Mapping[str, Any], Check]:
    """Return the front matter of a card, and whether there is one."""
    if not path.is_file():
        return {}, _card_of(())
    block = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(), re.DOTALL)
    try:
        values = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        return {}, Check("card", False, f"front matter is not YAML: {reason}", "mend README.md or run hf-mae card")
    if not isinstance(values, Mapping):
        return {}, Check("card", False, "README.md without front matter", "hf-mae card makes one")
    return values, _card_of({"README.md"})
