"""Checks of a card that need no network: what the Hub would refuse or silently ignore, and what is unfinished."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from typing import Any

import yaml

from hf_mae.cards.usage import usage_blocks
from hf_mae.cards.vocabulary import LIBRARY_TASKS, LICENSE_NAME, LICENSES, PIPELINE_TAGS, is_hub_id, is_language

_PLACEHOLDERS = (
    (re.compile(r"\[More Information Needed\]", re.IGNORECASE), "[More Information Needed]"),
    (re.compile(r"\{\{|\}\}|\{%|%\}|\{#|#\}"), "an unfilled template expression ({{, {% or {#)"),
    (re.compile(r"(?m)\b(?:TODO|FIXME|TBD|XXX)(?::|\b *$)|\blorem ipsum\b"), "a placeholder (TODO, FIXME, TBD, XXX)"),
    (
        re.compile(r"\bORG/NAME\b|\byour-(?:username|organisation|organization)\b|<your[ -][^>]*>", re.IGNORECASE),
        "a name left to fill in (ORG/NAME, your-organisation)",
    ),
    # A class may be named None: a value that was printed as it is ends a line of its own words.
    (re.compile(r"\bFact\(|\bUndefined\b|:[ \t]*None\b"), "a Python value that was printed as it is (None, Undefined)"),
)
_LOCAL_PATHS = re.compile(
    r"(?<![\w/.:~])/(?:home|root|tmp|work|Users|mnt|data|scratch|var|opt|workspace|srv|nfs|lustre|gpfs|media)/[\w.-]+"
    r"|\b[A-Za-z]:\\[\w.-]+|(?<![\w/.])~/[\w.-]+|\bfile:///?[\w.-]+"
)
_TOKENS = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
_HTML = re.compile(r"<\s*(?:script|iframe|object|embed|style|link|meta|form)\b", re.IGNORECASE)


class _Loader(yaml.SafeLoader):
    """YAML without a name twice, of which the Hub would take one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [key.value for key, _ in node.value]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)} stands there twice")
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def validate_card(text: str, *, files: Collection[str] = ()) -> list[str]:
    """Return what is wrong with a card, as sentences that say what to do; an empty list is a card fit to publish.

    Args:
        text: the whole card, front matter included.
        files: paths in the repository, with forward slashes: what pictures and samples are looked for in.
    """
    text = text.replace("\r\n", "\n")
    found = re.match(r"\A---\n(.*?)\n---[ \t]*\n(.*)\Z", text, re.DOTALL)
    if found is None:
        return ["the card does not begin with front matter between two lines of ---; the Hub would know nothing of it"]
    head, body = found.groups()
    problems: list[str] = []
    if "!!python" in head:
        problems.append("the front matter holds !!python objects (numpy numbers?); cast them with float() or int()")
    try:
        data = yaml.load(head, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date of month 13
        why = str(error).splitlines()[0]
        return [*problems, f"the front matter is not plain YAML ({why}); mend or regenerate it"]
    if not isinstance(data, dict):
        return [*problems, "the front matter is not a mapping of names to values"]
    for check in (_terms, _task, _names, _widget):
        problems += check(data, set(files))
    problems += _model_index(data)
    problems += _numbers(data)
    problems += _body(body, head, set(files))
    return problems


def _terms(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    license_id, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not license_id:
        yield "license is missing; name one of the Hub's (apache-2.0, cc-by-nc-4.0, other)"
    elif not isinstance(license_id, str) or license_id not in LICENSES:
        yield f"license={license_id!r} is not one of the Hub's names; see huggingface.co/docs/hub/repositories-licenses"
    elif license_id == "other" and not (name and (link or "LICENSE" in files)):
        yield "license=other needs license_name, and license_link or a LICENSE file; add them"
    if name is not None and not (isinstance(name, str) and re.fullmatch(LICENSE_NAME, name)):
        yield f"license_name={name!r} is not of lower-case letters, digits, dots and hyphens; write it so"
    if link is not None and not (isinstance(link, str) and (link.startswith("https://") or link in files)):
        yield f"license_link={link!r} is neither an address (https://) nor a file of the repository"


def _task(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    library, tag = data.get("library_name"), data.get("pipeline_tag")
    known = isinstance(library, str) and library in LIBRARY_TASKS
    if not known:
        yield f"library_name={library!r} is not one of {', '.join(LIBRARY_TASKS)}; the Hub would show no lines of code"
    if tag is None:
        return
    if not isinstance(tag, str) or tag not in PIPELINE_TAGS:
        yield f"pipeline_tag={tag!r} is no task of the Hub; image-classification and image-feature-extraction are"
    elif known and (tasks := LIBRARY_TASKS[str(library)]) is not None and tag not in tasks:
        yield f"pipeline_tag={tag} has no widget with library_name={library}; use {' or '.join(sorted(tasks))}"


def _names(data: dict[str, Any], files: set[str]) -> Iterator[str]:
    for code in _listed(data.get("language")):
        if not isinstance(code, str) or not is_language(code):
            yield f"language={code!r} is no ISO 639 code; English is en (quote no: YAML reads it as false)"
    for field in ("datasets", "base_model", "new_version"):
        for name in _listed(data.get(field)):
            if not isinstance(name, str) or not (is_hub_id(name) or (field == "datasets" and _is_word(name))):
                yield f"{field}={name!r} is no name of a repository (ORG/NAME); leave out what is not on the Hub"
    relation = data.get("base_model_relation")
    if relation is not None and relation not in ("finetune", "adapter", "merge", "quantized"):
        yield f"base_model_relation={relation!r} is unknown to the Hub; finetune, adapter, merge and quantized are"
    for field in ("tags", "metrics"):
        value = data.get(field)
        if value is not None and not isinstance(value, list):
            yield f"{field}={value!r} is no list; write one name a line, each after a hyphen"
            continue
        for one in _listed(value):
            # A plain number is a word to the Hub; true, dates and nothing are what YAML made of one.
            if isinstance(one, bool) or not isinstance(one, str | int | float) or not str(one).strip():
                yield f"{field} has {one!r}, which is no text; quote it or leave it out"
            elif field == "metrics" and not isinstance(one, str):
                yield f"metrics has {one!r}, which is no name of a metric; accuracy is one"
    if data.get("inference") is False or str(data.get("inference")).lower() == "false":
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
        results = model.get("results") or [{}]
        for result in results if isinstance(results, list) else [results]:
            if not isinstance(result, dict):
                yield f"model-index has the result {result!r}, which is no mapping of task, dataset and metrics"
                continue
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
                else:
                    yield from _metric(str(metric["type"]), metric["value"])


def _metric(kind: str, value: Any) -> Iterator[str]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        yield f"model-index has {kind}={value!r}, which is no number; leave the metric out or measure it"
    elif "accuracy" in kind and not 0 <= value <= 1:
        yield f"model-index has {kind}={value}, which is no fraction between 0 and 1; our cards give fractions"


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
    if len(re.findall(r"^```", body, re.MULTILINE)) % 2:
        yield "a block of code (```) is not closed; close it"
    body = re.sub(r"^```bibtex\n.*?^```", "", body, flags=re.MULTILINE | re.DOTALL)  # full of braces
    prose = re.sub(r"^```.*?^```", "", body, flags=re.MULTILINE | re.DOTALL)
    if not re.search(r"^# \S", prose, re.MULTILINE):
        yield "the card has no heading (# Title)"
    if not re.search(r"^## Results", prose, re.MULTILINE):
        yield 'the card has no section "## Results"; say what was measured, or that nothing was'
    for pattern, what in _PLACEHOLDERS:
        # Blocks of code are left out of the last: None is an honest word of Python.
        if hit := pattern.search(prose if "None" in what else head + "\n" + body):
            yield f"the card holds {what} at {hit.group()!r}; fill it in"
    if hit := re.search(r"(?<![\w.])[-+]?(?:nan|inf)(?![\w])|\bNaN(?= *%)|\| *NaN *\|", prose):
        yield f"the card prints {hit.group()!r} as a number; leave it out or measure it again"
    if hit := _LOCAL_PATHS.search(head + "\n" + body):
        yield f"the card names a path of this machine ({hit.group()}); only its last part may be told"
    if _TOKENS.search(head + body):
        yield "the card holds what looks like an access token; remove it and revoke the token"
    if hit := _HTML.search(prose):
        yield f"the card holds HTML that the Hub does not show ({hit.group()}); leave it out"
    for target in _pictures(body):
        if not target.startswith(("https://", "data:")) and target.removeprefix("./") not in files:
            yield f"the picture {target} is not among the files; add it or remove the line"
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)[^)]*\)", prose):
        if not target.startswith(("https://", "http://", "#", "mailto:")) and target.removeprefix("./") not in files:
            yield f"the link to {target} leads to no file of the repository"
    blocks = usage_blocks(body)
    if not blocks:
        yield 'there is no ```python block under "## Usage"; say how to load the model'
    asked = {task for block in blocks for task in re.findall(r"\bpipeline\(\s*[\"']([\w-]+)[\"']", block)}
    if asked and not re.search(r"^pipeline_tag:", head, re.MULTILINE):
        yield f"pipeline_tag is missing, and the usage lines call the pipeline of {' and '.join(sorted(asked))}; add it"
    base = re.search(r"^base_model:[ \t]*(\S+)", head, re.MULTILINE)
    if base and any(f'"{base.group(1)}"' in block or f'"hf-hub:{base.group(1)}"' in block for block in blocks):
        yield f"base_model={base.group(1)} is the repository itself; leave it out"


def _pictures(body: str) -> list[str]:
    """Return what the pictures of a text are read from, in Markdown of any style and in HTML."""
    inline = re.findall(r"!\[[^\]]*\]\((?:<([^>]*)>|([^)\s]+))[^)]*\)", body)
    html = re.findall(r"<img[^>]+src\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s>\"']+))", body, re.IGNORECASE)
    named = dict(re.findall(r"^ {0,3}\[([^\]]+)\]:\s*<?([^\s>]+)", body, re.MULTILINE))
    by_name = [target or text for text, target in re.findall(r"!\[([^\]]*)\]\[([^\]]*)\]", body)]
    return ["".join(parts) for parts in inline + html] + [named.get(name, name) for name in by_name]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
