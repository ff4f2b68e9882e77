"""Templates print facts, and no number of their own."""

from __future__ import annotations

import re

import pytest

from hf_mae.cards.facts import Fact
from hf_mae.cards.options import CardOptions
from hf_mae.cards.write import render, templates_folder

OPTIONS = CardOptions(license="apache-2.0", language=("en",))


@pytest.mark.parametrize("value", [0.5, 3, None, True])
def test_template_may_not_print_a_number_without_a_record(value):
    with pytest.raises(ValueError, match="no fact"):
        render("dense.md.jinja", _dense() | {"title": value})


def test_template_may_not_print_what_it_was_not_given():
    context = _dense()
    del context["repo_id"]
    with pytest.raises(ValueError, match="repo_id"):
        render("dense.md.jinja", context)


def test_dense_family_renders():
    text, printed = render("dense.md.jinja", _dense())
    assert 'pipeline("object-detection", model="org/boxes")' in text
    assert [str(f) for f in printed] == ["41.50 %"]


def _dense() -> dict:
    names = "author conversion converted_from known license_name license_link base_model dataset_id data_license"
    blank: dict = dict.fromkeys(names.split(), "")
    lists = "architecture answers pictures data_rows training hardware preprocessing exactness changes ancestors"
    blank |= {name: [] for name in lists.split()}
    result = {"label": "box AP", "data": "birds", "split": "val", "transform": "", "images": "32"}
    result["value"] = Fact(0.415, "evaluation.json: ap", "percent")  # type: ignore[assignment]
    return blank | {
        "repo_id": "org/boxes",
        "title": "Boxes",
        "task": "object-detection",
        "library": "transformers",
        "cls": "X",
        "kind": "finetune",
        "grey": False,
        "has_run": True,
        "exported_weights": "last",
        "results": [result],
        "paper": [],
        "licence": {"license": "mit", "why": "stated"},
        "citations": [],
        "of_run": True,
        "words": {},
        "derived": "",
        "processor_words": "",
        "not_measured": "not measured",
        "f": {"classes": None, "best_of": None, "seed": None},
    }


def test_templates_hold_no_results_and_no_names_of_models():
    for path in templates_folder().glob("*.jinja"):
        text = re.sub(r"\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)
        prose = re.sub(r"^```.*?^```", "", text.replace("Apache-2.0", ""), flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"\d+\.\d|\d+ ?%(?!\})", prose), path.name
        assert not re.search(r"rexnet|resnet|vit_base|vit-b", text, re.IGNORECASE), path.name
