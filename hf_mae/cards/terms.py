"""Under which terms weights may be published, what they derive from, and what the Hub is told about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from hf_mae.cards.options import CardOptions
from hf_mae.cards.private import last_part
from hf_mae.cards.records import Records
from hf_mae.cards.results import Result, comparable
from hf_mae.cards.vocabulary import LICENSE_NAME, LICENSES, is_noncommercial
from hf_mae.exporting.lineage import OFFICIAL_TERMS, is_official
from hf_mae.exporting.official import LICENSE

NO_PIPELINE = frozenset({"ViTMAEForPreTraining", "MAEForPreTraining"})
"""Classes without a task of the Hub: the stock pipeline masks and shuffles at random, so that its features are none."""


_NAMES_OF_THE_HUB = (
    "see huggingface.co/docs/hub/repositories-licenses, and use other (with license_name) for one that is not there"
)


@dataclass(frozen=True)
class Terms:
    """The licence of the weights and where it comes from, in words."""

    license: str
    why: str


def terms(records: Records, options: CardOptions) -> Terms:
    """Return the licence that the weights are published under.

    Raises:
        ValueError: nobody says which, it is no name of the Hub, or non-commercial weights would become something else.
    """
    inherited: list[tuple[str, str]] = []
    if given := records.conversion.get("license"):
        inherited.append((given, "conversion.json"))
    inherited += [(a.license, f"{a.name}: {a.license_source}") for a in records.ancestors if a.license]
    if options.base_model and is_official(options.base_model):
        inherited.append((LICENSE, f"{options.base_model}: {OFFICIAL_TERMS}"))
    if options.base_license is not None:
        if options.base_license not in LICENSES:
            raise ValueError(
                f"base_license={options.base_license!r} is not one of the Hub's names; {_NAMES_OF_THE_HUB}"
            )
        inherited.append((options.base_license, "--base-license, stated by who publishes the weights"))
    # Of runs of our own the new licence speaks; so it does of weights that are published as they were converted.
    spoken_for = {"run", "conversion"} if records.conversion else {"run"}
    unknown = next((a for a in records.ancestors if not a.license and a.kind not in spoken_for), None)
    if unknown is not None and options.base_license is None and not any(is_noncommercial(x) for x, _ in inherited):
        gone = ", which is not there, or could not be asked, and" if unknown.kind == "missing" else ","
        raise ValueError(
            f"license is not known: the weights derive from {unknown.name}{gone} whose terms are on no record; look "
            "them up and say --base-license NAME (non-commercial terms bind what derives from them)"
        )
    bound = next(((name, where) for name, where in inherited if is_noncommercial(name)), None)
    chosen = options.license
    if chosen is not None and chosen not in LICENSES:
        raise ValueError(f"license={chosen!r} is not one of the Hub's names; {_NAMES_OF_THE_HUB}")
    if chosen == "other" and not (options.license_name and options.license_link):
        raise ValueError("license=other needs license_name and license_link; add --license-name and --license-link")
    if options.license_name is not None and not re.fullmatch(LICENSE_NAME, options.license_name):
        raise ValueError(
            f"license_name={options.license_name!r} is not of lower-case letters, digits, dots and hyphens; write it so"
        )
    if bound is not None and chosen is not None and not is_noncommercial(chosen):
        raise ValueError(
            f"license={chosen} cannot be given to weights that derive from weights under {bound[0]} ({bound[1]}): "
            f"non-commercial terms stay; leave --license out, or use {bound[0]}"
        )
    if chosen is not None:
        return Terms(chosen, "stated by who publishes the weights")
    if bound is not None:
        return Terms(bound[0], f"of the weights these derive from ({bound[1]})")
    if inherited:
        return Terms(inherited[0][0], f"of the weights these derive from ({inherited[0][1]})")
    raise ValueError("license is not known: nothing records it; say --license NAME (such as apache-2.0)")


def data_name(records: Records, options: CardOptions) -> tuple[str, str | None]:
    """Return the name of the training data without a path, and its Hub id if it has one."""
    dataset_id = options.datasets[0] if options.datasets else records.dataset_id
    if options.data_name:
        return options.data_name, dataset_id
    return last_part(dataset_id or _path(records)) or "data", dataset_id


def measured_on(records: Records, options: CardOptions) -> tuple[str, str | None]:
    """Return the name of the data that the run measured on, which is not that of a part of it, and its Hub id."""
    dataset_id = options.datasets[0] if options.datasets else records.dataset_id
    return options.test_name or last_part(dataset_id or _path(records)) or "data", dataset_id


def _path(records: Records) -> str:
    return str(records.recipe.get("data", {}).get("path") or "")


def base_model(records: Records, repo_id: str, options: CardOptions) -> str | None:
    """Return the Hub id of what the weights derive from, None if that is not on the Hub.

    It is none of the repository itself either, where its weights were trained further or written in another format:
    the Hub takes no model for its own base.
    """
    nearest = records.ancestors[0] if records.ancestors else None
    name = nearest.name if nearest is not None and nearest.is_hub else options.base_model
    return None if name == repo_id else name


def pipeline_tag(records: Records) -> str | None:
    """Return the task of the Hub, None where its pipeline would give nothing of sense."""
    return None if records.export["class"] in NO_PIPELINE else records.export["task"]


def metadata(
    records: Records, repo_id: str, options: CardOptions, results: Sequence[Result], samples: Sequence[str]
) -> ModelCardData:
    """Return the front matter of a card.

    Args:
        records: of the export.
        repo_id: ORG/NAME.
        options: of the author.
        results: measured numbers; those of a data set go into the model index.
        samples: paths of pictures in the repository.
    """
    licence, base = terms(records, options), base_model(records, repo_id, options)
    dataset_id = data_name(records, options)[1]
    extra: dict[str, Any] = {}
    if licence.license == "other":
        extra |= {"license_name": options.license_name, "license_link": options.license_link}
    if base is not None and records.source["kind"] in ("finetune", "probe", "supervise"):
        extra["base_model_relation"] = "finetune"
    tag = pipeline_tag(records)
    if samples and tag == "image-classification":
        extra["widget"] = [
            {
                "src": f"https://huggingface.co/{repo_id}/resolve/main/{path}",
                "example_title": Path(path).stem.replace("_", " ").replace("-", " ").capitalize(),
            }
            for path in samples
        ]
    listed = [result for result in comparable(results) if result.name in ("top1", "top5", "real_top1")]
    evaluated = [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=r.dataset_id or re.sub(r"[^a-z0-9]+", "-", r.data.lower()).strip("-"),
            dataset_name=r.data,
            dataset_split=r.split,
            dataset_revision=r.revision,
            metric_type=r.metric,
            metric_name=r.label,
            metric_value=round(float(r.value.value), 6),
        )
        for r in listed
    ]
    if evaluated:
        extra |= {"model_name": repo_id.rsplit("/", 1)[-1], "eval_results": evaluated, "metrics": ["accuracy"]}
    datasets = list(options.datasets) or ([dataset_id] if dataset_id else None)
    return ModelCardData(
        license=licence.license,
        library_name=records.export["library"],
        pipeline_tag=tag,
        language=list(options.language) or None,
        base_model=base,
        datasets=datasets,
        tags=_tags(records, tag, options),
        **extra,
    )


def _tags(records: Records, tag: str | None, options: CardOptions) -> list[str]:
    tags = ["vision"]
    if records.export["library"] == "timm":
        tags += ["timm", "transformers"]  # transformers reads timm's folders too
    if records.export["target"] == "onnx":
        tags.append("onnx")
    if records.source["kind"] in ("pretrain", "finetune", "probe", "conversion") or records.conversion:
        tags += ["masked-autoencoder", "mae"]
    if records.export["class"] in NO_PIPELINE:
        tags.append("self-supervised-learning")
    if tag is not None:
        tags.append(tag)
    return list(dict.fromkeys([*tags, "hf_mae", *options.tags]))


def eval_entries(results: Sequence[Result]) -> dict[str, list[EvalResultEntry]]:
    """Return entries for `.eval_results/`, by file name: the top-1 accuracy in each data set of the Hub."""
    found: dict[str, list[EvalResultEntry]] = {}
    for r in comparable(results):
        if r.name == "top1" and r.dataset_id is not None:
            entry = EvalResultEntry(
                dataset_id=r.dataset_id,
                task_id="default",
                value=round(float(r.value.value), 6),
                dataset_revision=r.revision,
                notes=f"{r.label}, a fraction; {r.split}; {r.images} images; weights: {r.weights}",
            )
            found.setdefault(r.dataset_id.replace("/", "--") + ".yaml", []).append(entry)
    return found
