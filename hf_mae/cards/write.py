"""Write the card of an export: prose from the templates of model_cards/, every number from a record."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import eval_result_entries_to_yaml, metadata_load

from hf_mae.cards.citations import citations
from hf_mae.cards.facts import NOT_MEASURED, Fact, maybe
from hf_mae.cards.options import CardOptions
from hf_mae.cards.pictures import Picture, copy_samples, draw_pictures
from hf_mae.cards.private import published
from hf_mae.cards.records import Records, read_records, run_of_export
from hf_mae.cards.results import Result, evaluations_before_best, measured, split_words, weights_words
from hf_mae.cards.tables import (
    architecture_table,
    data_table,
    exactness_table,
    hardware_table,
    preprocessing_table,
    processor_words,
    training_table,
)
from hf_mae.cards.terms import base_model, data_name, eval_entries, measured_on, metadata, terms
from hf_mae.cards.vocabulary import is_hub_id
from hf_mae.data.sources import SPLIT_NAMES
from hf_mae.exporting.folders import is_edited, write_files
from hf_mae.exporting.stock import HOW_TO_LOAD
from hf_mae.exporting.telling import Say, silent

_KINDS = {
    "run": ", a run of the author",
    "hub": ", from the Hub",
    "conversion": ", weights of others that were converted",
    "export": ", an export on the author's machine",
    "folder": ", a model folder on the author's machine",
    "file": ", a file of weights",
    "missing": ", which was not there, or could not be asked",
}
"""What an ancestor is that has no page of its own, by its kind."""
FOLDERS = ("pictures/", "samples/", "records/", ".eval_results/")
"""Folders of a card."""
USAGE = "records/usage.json"
"""What the usage lines printed, which `hf-mae publish` adds."""
DENSE_TASKS = frozenset({"object-detection", "image-segmentation"})


def write_card(
    export: Path,
    repo_id: str,
    options: CardOptions,
    *,
    run: Path | None = None,
    evaluations: Sequence[Path] = (),
    overwrite: bool = False,
    keep_edits: bool = False,
    say: Say = silent,
) -> Path:
    """Write README.md, pictures/, samples/, records/ and .eval_results/ into an export folder.

    All of it is made before anything is replaced. What an earlier call wrote there is replaced if it is still as it was
    written; files that the user added stay, and the weights are not touched.

    Args:
        export: from `hf_mae.export`.
        repo_id: ORG/NAME, as the usage lines will say.
        options: what no record says.
        run: the run folder it was made from; None finds it where the export lies in RUN/export/TARGET. Without any
            only the export is told of.
        evaluations: folders of `hf-mae evaluate --out`, of the exported weights.
        overwrite: also replace files that the user edited.
        keep_edits: leave those as they are. An edited README.md states its licence itself, which has to agree with
            `options` and the records; other options do not change it.
        say: called with lines for the user.

    Returns:
        The path of README.md.

    Raises:
        ValueError: a record is missing or of other weights, the licence is not known or not allowed, a sample cannot be
            read, or a file was edited (`WouldOverwriteError`). Nothing is written then.
    """
    if not is_hub_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r} is not of the form ORG/NAME; name the repository it will be")
    _check_one_line(options)
    card = export / "README.md"
    edited = keep_edits and is_edited(export, card.name)
    if edited:
        options = _as_stated(card, options)
    run = run or run_of_export(export)
    records = read_records(export, run, evaluations)
    terms(records, options)  # refuses before anything is written
    with tempfile.TemporaryDirectory(prefix="hf_mae_card_") as name:
        folder = Path(name)
        samples = copy_samples(folder, options.sample)
        pictures = draw_pictures(folder, records, options, samples, run)
        results = measured(records, *measured_on(records, options))
        text, printed = card_text(records, repo_id, options, results, pictures, samples)
        _write_records(folder, records, printed)
        _write_eval_results(folder, results)
        made = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    if not edited:
        made[card.name] = text.encode()  # the last to be replaced: what it shows is there
    # What an edited card shows stays there, and so does what its usage lines printed.
    kept = write_files(
        export,
        made,
        stale=lambda path: not edited and path.startswith(FOLDERS) and path != USAGE,
        overwrite=overwrite,
        keep=keep_edits,
    )
    if kept := [card.name] * edited + kept:
        say(
            f"kept in {export}, because edited by you (or written by an earlier version of hf_mae): {', '.join(kept)}; "
            f"to write the card anew: {shlex.join(['hf-mae', 'card', str(export), repo_id, '--overwrite'])}"
        )
    return card


def _as_stated(card: Path, options: CardOptions) -> CardOptions:
    """Return the options with the licence that an edited card states, which is what goes up."""
    try:
        data = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{card}: the front matter cannot be read ({' '.join(str(error).split())[:200]})") from error
    fields = {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name) is not None}
    for name, stated in fields.items():
        if (given := getattr(options, name)) not in (None, stated):
            raise ValueError(
                f"{name}={given} and {card}, which was edited, states {name}: {stated}; change one of them, or write "
                "the card anew (hf-mae card --overwrite)"
            )
    return replace(options, **fields)


def _check_one_line(options: CardOptions) -> None:
    for name, value in vars(options).items():
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f\u2028\u2029]", text):
                raise ValueError(f"{name}={text!r} has more than one line (or control characters); write it in one")


def card_text(
    records: Records,
    repo_id: str,
    options: CardOptions,
    results: Sequence[Result] = (),
    pictures: Sequence[Picture] = (),
    samples: Sequence[str] = (),
) -> tuple[str, list[Fact]]:
    """Return the whole card, front matter and all, and the facts it prints.

    Args:
        records: of the export.
        repo_id: ORG/NAME.
        options: of the author.
        results: from `measured`.
        pictures: of the repository, shown in this order.
        samples: paths of pictures in the repository, for the widget.

    Raises:
        ValueError: as `write_card`.
    """
    head = metadata(records, repo_id, options, results, samples)
    body, printed = render(template_of(records), _context(records, repo_id, options, results, pictures))
    return f"---\n{head.to_yaml(line_break=None)}\n---\n\n{body}", printed


def templates_folder() -> Path:
    """Return the folder of the templates: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "model_cards"
    return inside if inside.is_dir() else package.parent / "model_cards"


def template_of(records: Records) -> str:
    """Return which family's template a model has, by its library and task."""
    task = records.export["task"]
    if task in DENSE_TASKS:
        return "dense.md.jinja"
    if records.export["library"] == "timm":
        return "timm.md.jinja"
    return "classifier.md.jinja" if records.classifies else "mae-pretrained.md.jinja"


def cell(text: str) -> str:
    """Return a text as it reads in a line or a cell of a table of Markdown: no markup, no HTML, no new line."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()))
    return text.replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> str:
    """Return a text as inline code of Markdown, which knows no escapes."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "/") + "`"


def render(template: str, context: Mapping[str, Any]) -> tuple[str, list[Fact]]:
    """Fill a template.

    Args:
        template: file name in the folder of templates.
        context: names it uses. Numbers only as `Fact`.

    Returns:
        The text, and the facts it prints.

    Raises:
        ValueError: the template prints a number that is no fact, nothing (None), or a name that the context lacks.
    """
    printed: list[Fact] = []

    def only_facts(value: Any) -> Any:
        if isinstance(value, Fact):
            printed.append(value)
            return str(value)
        if value is None or isinstance(value, bool | int | float):
            raise ValueError(f"{template} prints {value!r}, which is no fact: a card holds no number without a record")
        return value

    def in_a_cell(value: Any) -> str:
        text = only_facts(value)
        return text if isinstance(value, Fact) and value.style == "markdown" else cell(str(text))

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        finalize=only_facts,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": in_a_cell, "code": lambda value: code(str(only_facts(value)))}
    try:
        text = environment.get_template(template).render(**context)
    except jinja2.UndefinedError as error:
        raise ValueError(f"{template}: {error}; the records lack what it prints") from error
    lines = [line.rstrip() for line in text.strip().splitlines()]
    tidy = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]  # one empty line at most
    return "\n".join(tidy) + "\n", printed


def _context(
    records: Records, repo_id: str, options: CardOptions, results: Sequence[Result], pictures: Sequence[Picture]
) -> dict[str, Any]:
    name, dataset_id = data_name(records, options)
    licence = terms(records, options)
    export = records.export
    config = records.config
    known = records.conversion.get("known") or {}
    labels = config.get("id2label") or config.get("label_names") or ()
    return {
        "repo_id": repo_id,
        "best_split": split_words(records),
        "best_on_test": split_words(records) in SPLIT_NAMES["test"],
        "how_to_load": HOW_TO_LOAD.get(export["class"], ""),
        "title": options.title or repo_id.rsplit("/", 1)[-1],
        "author": options.author or "",
        "target": export["target"],
        "library": export["library"],
        "task": export["task"] or "",
        "cls": export["class"],
        "kind": export["source"]["kind"],
        "weights": export["source"]["weights"],
        "classifies": records.classifies,
        "grey": records.channels == 1,
        "sigmoid": records.asks_each_class,
        "processor_words": processor_words(records),
        "of_run": any(result.of_run for result in results),
        "monitors": any(result.name in ("knn_accuracy", "probe_accuracy") for result in results),
        "has_run": bool(records.recipe),
        "exported_weights": weights_words(records),
        "data": name,
        "dataset_id": dataset_id or "",
        "licence": licence,
        "license_name": options.license_name or "",
        "license_link": options.license_link or "",
        "base_model": base_model(records, repo_id, options) or "",
        "ancestors": records.ancestors,
        "derived": _derived(records),
        "words": _KINDS,
        "conversion": bool(records.conversion),
        "converted_from": records.conversion.get("source") or "",
        "known": known.get("name", ""),
        "paper": _paper(known),
        "f": {
            "parameters": None if records.parameters is None else Fact(records.parameters, "weights", "count"),
            "classes": Fact(len(labels), "config.json: number of classes", "count") if labels else None,
            "recipe": maybe(records.recipe, "name", "recipe.json"),
            "mask_ratio": maybe(records.recipe, "model.mask_ratio", "recipe.json")
            or maybe(config, "mask_ratio", "config.json"),
            "norm_pix": maybe(config, "norm_pix_loss", "config.json"),
            "loss": maybe(records.recipe, "loss.name", "recipe.json"),
            "best_of": evaluations_before_best(records),
            "best_metric": maybe(records.best, "metric", "best/best.json"),
            "seed": maybe(records.recipe, "seed", "recipe.json"),
            "images": Fact(records.starts[-1]["data"]["rows"], "environment.json: last start, data, rows", "count")
            if records.starts
            else None,
        },
        "architecture": architecture_table(records),
        "results": results,
        "training": training_table(records),
        "hardware": hardware_table(records),
        "data_rows": data_table(records, name, dataset_id, options.data_license),
        "data_license": options.data_license or "",
        "preprocessing": preprocessing_table(records),
        "exactness": exactness_table(records),
        "answers": _answers(export),
        "changes": export.get("changes") or [],
        "pictures": pictures,
        "citations": citations(records),
        "not_measured": NOT_MEASURED,
    }


def _derived(records: Records) -> str:
    """Return what the weights are to the first of their ancestors."""
    source = records.source
    if source["kind"] not in ("model", "conversion"):
        return "These weights were trained from"
    # An object in memory has no file to be hashed, and nobody knows what was done to it.
    return "These weights are those of" if source["sha256"] else "These weights come from"


def _paper(known: Mapping[str, Any]) -> list[tuple[str, Fact]]:
    """Return the numbers that others published of converted weights."""
    result = known.get("result")
    if not result:
        return []
    if isinstance(result, Mapping):
        return [(str(k), Fact(v, f"conversion.json: known.result.{k}")) for k, v in result.items() if v is not None]
    return [("result", Fact(str(result), "conversion.json: known.result"))]


def _answers(export: Mapping[str, Any]) -> list[tuple[str, Fact]]:
    pipeline = export.get("pipeline") or {}
    return [
        (str(a["label"]), Fact(float(a["score"]), f"export.json: pipeline, {a['label']}", "short"))
        for a in (pipeline.get("answers") or [])[:5]
        if isinstance(a, Mapping) and "label" in a
    ]


def _write_records(folder: Path, records: Records, printed: Sequence[Fact]) -> None:
    folder = folder / "records"
    folder.mkdir()
    facts = [{"value": value, "source": where} for value, where in dict.fromkeys((str(f), f.source) for f in printed)]
    whole: dict[str, Any] = {
        "recipe": records.recipe,
        "environment": {"starts": records.starts} if records.starts else {},
        "evaluation": records.evaluation,
        "best": records.best,
        "export": records.export,
        "conversion": records.conversion,
        "facts": facts,
    }
    keep = {records.dataset_id or "", *(a.name for a in records.ancestors)}
    whole |= {
        f"evaluation_{re.sub(r'[^A-Za-z0-9.-]+', '_', e.name)}": {"summary": e.summary, "evaluation": e.evaluation}
        for e in records.evaluated
    }
    for name, record in whole.items():
        if record:
            (folder / f"{name}.json").write_text(json.dumps(published(record, keep), indent=1) + "\n")
    if records.rows:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records.rows))


def _write_eval_results(folder: Path, results: Sequence[Result]) -> None:
    folder = folder / ".eval_results"
    for name, entries in eval_entries(results).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))
