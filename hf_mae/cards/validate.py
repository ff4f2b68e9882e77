"""Checks of a card that need no network: what the Hub would refuse or silently ignore, and what is unfinished."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from hf_mae.cards.usage import usage_blocks
from hf_mae.cards.vocabulary import LIBRARY_TASKS, LICENSES, PIPELINE_TAGS, is_hub_id, is_language

_PLACEHOLDERS = (
    (re.compile(r"\[More Information Needed\]", re.IGNORECASE), "[More Information Needed]"),
    (re.compile(r"\{\{|\}\}|\{%|%\}"), "an unfilled template expression ({{ or {%)"),
    (re.compile(r"\b(?:TODO|FIXME|TBD|XXX|lorem ipsum)\b", re.IGNORECASE), "a placeholder (TODO, FIXME, TBD, XXX)"),
    (re.compile(r"\bORG/NAME\b|\byour-username\b|<your[ -][^>]*>", re.IGNORECASE), "a name left to fill in (ORG/NAME)"),
    (re.compile(r"\b(?:Fact\(|Undefined\b|None\b)"), "a Python value that was printed as it is (None, Undefined)"),
)
_LOCAL_PATHS = re.compile(r"(?<![\w/.:])/(?:home|root|tmp|work|Users|mnt|data|scratch|var|opt|workspace)/[\w.-]+")
_TOKENS = re.compile(r"\bhf_[A-Za-z]{30,}\b")


def validate_card(text: str, *, files: Collection[str] = ()) -> list[str]:
    """Return what is wrong with a card, as sentences that say what to do; an empty list is a card fit to publish.

    Args:
        text: the whole card, front matter included.
        files: paths in the repository, with forward slashes: what pictures and samples are looked for in.
    """
    found = re.match(r"\A---\r?\n(.*?)\r?\n---[ \t]*\r?\n(.*)\Z", text, re.DOTALL)
    if found is None:
        return ["the card does not begin with front matter between two lines of ---; the Hub would know nothing of it"]
    head, body = found.groups()
    problems: list[str] = []
    if "!!python" in head:
        problems.append("the front matter holds !!python objects (numpy numbers?); cast them with float() or int()")
    try:
        data = yaml.safe_load(head)
    except yaml.YAMLError as error:
        return [*problems, f"the front matter is not plain YAML ({str(error).splitlines()[0]}); mend or regenerate it"]
    if not isinstance(data, dict):
        return [*problems, "the front matter is not a mapping of names to values"]
    for check in (_terms, _task, _names, _widget):
        problems += check(data, set(files))
    problems += _model_index(data)
    problems += _numbers(data)
    problems += _body(body, head, set(files))
    return problems


def _terms(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    license_id = data.get("license")
    if not license_id:
        yield "license is missing; name one of the Hub's (apache-2.0, cc-by-nc-4.0, other)"
    elif license_id not in LICENSES:
        yield f"license={license_id!r} is not one of the Hub's names; see huggingface.co/docs/hub/repositories-licenses"
    elif license_id == "other" and not (data.get("license_name") and (data.get("license_link") or "LICENSE" in files)):
        yield "license=other needs license_name, and license_link or a LICENSE file; add them"


def _task(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    library, tag = data.get("library_name"), data.get("pipeline_tag")
    if library not in LIBRARY_TASKS:
        yield f"library_name={library!r} is not one of {', '.join(LIBRARY_TASKS)}; the Hub would show no lines of code"
    if tag is None:
        return
    if tag not in PIPELINE_TAGS:
        yield f"pipeline_tag={tag!r} is no task of the Hub; image-classification and image-feature-extraction are"
    elif library in LIBRARY_TASKS and (tasks := LIBRARY_TASKS[library]) is not None and tag not in tasks:
        yield f"pipeline_tag={tag} has no widget with library_name={library}; use {' or '.join(sorted(tasks))}"


def _names(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    for code in _listed(data.get("language")):
        if not isinstance(code, str) or not is_language(code):
            yield f"language={code!r} is no ISO 639 code; English is en (quote no: YAML reads it as false)"
    for field in ("datasets", "base_model"):
        for name in _listed(data.get(field)):
            if not isinstance(name, str) or not (is_hub_id(name) or (field == "datasets" and _is_word(name))):
                yield f"{field}={name!r} is no name of a repository (ORG/NAME); leave out what is not on the Hub"
    for tag in _listed(data.get("tags")):
        if not isinstance(tag, str) or not tag.strip():
            yield f"tags has {tag!r}, which is no text; quote it or leave it out"
    if data.get("inference") is False:
        yield "inference: false switches the widget off; leave it out"


def _is_word(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) is not None  # the Hub's first data sets have no owner


def _widget(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    widget = data.get("widget")
    if widget is None:
        return
    if not isinstance(widget, list):
        yield "widget is not a list of {src, example_title}"
        return
    for entry in widget:
        src = entry.get("src") if isinstance(entry, dict) else None
        if not isinstance(src, str):
            yield f"widget has {entry!r}, without src; give each example the path of a picture"
            continue
        if src.startswith("https://"):
            own = re.search(r"/resolve/[^/]+/(samples/.+)$", src)  # where `write_card` puts them
            if own and own.group(1) not in files:
                yield f"widget src={src} is not among the files"
        elif src not in files:
            yield f"widget src={src} is neither https nor among the files; add the picture or remove the example"


def _model_index(data: dict[str, Any]) -> Iterator[str]:
    index = data.get("model-index")
    if index is None:
        return
    if not isinstance(index, list) or not index:
        yield "model-index is not a list of {name, results}"
        return
    for model in index:
        if not isinstance(model, dict) or not model.get("name"):
            yield "model-index has an entry without a name"
            continue
        for result in model.get("results") or [{}]:
            for path in ("task.type", "dataset.type", "dataset.name"):
                group, field = path.split(".")
                if not (isinstance(result.get(group), dict) and result[group].get(field)):
                    yield f"model-index has a result without {path}"
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                yield "model-index has a result without metrics"
                continue
            for metric in metrics:
                if not (isinstance(metric, dict) and metric.get("type") and metric.get("value") is not None):
                    yield "model-index has a metric without type or value"


def _numbers(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _numbers(inner, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}={value} is not finite; leave the number out or measure it again"


def _body(body: str, head: str, files: set[str]) -> Iterator[str]:
    body = re.sub(r"^```bibtex\n.*?^```", "", body, flags=re.MULTILINE | re.DOTALL)  # full of braces
    prose = re.sub(r"^```.*?^```", "", body, flags=re.MULTILINE | re.DOTALL)
    if not re.search(r"^# \S", body, re.MULTILINE):
        yield "the card has no heading (# Title)"
    for pattern, what in _PLACEHOLDERS:
        # Blocks of code are left out of the last: None is an honest word of Python.
        if hit := pattern.search(prose if "None" in what else head + body):
            yield f"the card holds {what} at {hit.group()!r}; fill it in"
    if hit := re.search(r"(?<![\w.])[-+]?(?:nan|inf)(?![\w])", prose):
        yield f"the card prints {hit.group()!r} as a number; leave it out or measure it again"
    if hit := _LOCAL_PATHS.search(head + body):
        yield f"the card names a path of this machine ({hit.group()}); only its last part may be told"
    if _TOKENS.search(head + body):
        yield "the card holds what looks like an access token; remove it and revoke the token"
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)[^)]*\)", body) + re.findall(r"<img[^>]+src=\"([^\"]+)\"", body):
        if not target.startswith(("https://", "data:")) and target.removeprefix("./") not in files:
            yield f"the picture {target} is not among the files; add it or remove the line"
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)[^)]*\)", prose):
        if not target.startswith(("https://", "http://", "#", "mailto:")) and target.removeprefix("./") not in files:
            yield f"the link to {target} leads to no file of the repository"
    if not usage_blocks(body):
        yield 'there is no ```python block under "## Usage"; say how to load the model'


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
