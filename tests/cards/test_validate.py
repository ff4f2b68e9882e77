"""The offline checks find what is wrong, one thing at a time."""

from __future__ import annotations

import numpy as np
import pytest
from huggingface_hub import ModelCardData

from hf_mae.cards import validate_card

HEAD = """license: mit
library_name: transformers
pipeline_tag: image-classification
language: [en]
datasets: [ada/animals]
base_model: ada/encoder
tags: [vision]
widget: [{src: samples/owl.jpg, example_title: Owl}]
model-index:
- name: animals
  results:
  - task: {type: image-classification}
    dataset: {type: ada/animals, name: Animals}
    metrics: [{type: accuracy, value: 0.5}]"""
BODY = """# Animals

![curve](pictures/curve.png) and [recipe](records/recipe.json)

## Usage

```python
x = None
```
"""
FILES = ["samples/owl.jpg", "pictures/curve.png", "records/recipe.json"]


def _problems(head: str = HEAD, body: str = BODY, files: list[str] | None = None) -> list[str]:
    return validate_card(f"---\n{head}\n---\n\n{body}", files=FILES if files is None else files)


def test_good_card_has_no_problem():
    assert _problems() == []


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("license: mit\n", "", "license is missing"),
        ("license: mit", "license: MIT License", "not one of the Hub's names"),
        ("license: mit", "license: other", "license_name"),
        ("library_name: transformers", "library_name: torch", "library_name='torch'"),
        ("pipeline_tag: image-classification", "pipeline_tag: nope", "pipeline_tag='nope'"),
        ("pipeline_tag: image-classification", "pipeline_tag: robotics", "has no widget"),
        ("[en]", "[english]", "language='english'"),
        ("[en]", "[no]", "language=False"),
        ("ada/animals]", "'my animals']", "datasets='my animals'"),
        ("ada/encoder", "/data/encoder", "base_model="),
        ("[vision]", "[5]", "tags has 5"),
        ("samples/owl.jpg", "samples/cat.jpg", "neither https nor among the files"),
        ("{src: samples/owl.jpg, example_title: Owl}", "{example_title: Owl}", "without src"),
        ("name: animals", "title: animals", "without a name"),
        ("task: {type: image-classification}", "task: {}", "without task.type"),
        ("type: ada/animals, name: Animals", "type: ada/animals", "without dataset.name"),
        ("metrics: [{type: accuracy, value: 0.5}]", "metrics: []", "without metrics"),
        ("value: 0.5", "name: x", "without type or value"),
        ("value: 0.5", "value: .nan", "not finite"),
        ("license: mit", "license: mit\ninference: false", "switches the widget off"),
        ("license: mit", "license: [mit", "not plain YAML"),
    ],
)
def test_front_matter_is_checked(before: str, after: str, said: str):
    assert before in HEAD
    problems = _problems(HEAD.replace(before, after))
    assert any(said in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[More Information Needed]", "More Information Needed"),
        ("{{ value }}", "template"),
        ("TODO: measure", "placeholder"),
        ("from ORG/NAME", "ORG/NAME"),
        ("accuracy: None", "Python value"),
        ("loss nan", "as a number"),
        ("trained on /home/ada/photos", "path of this machine"),
        ("hf_" + "a" * 34, "access token"),
        ("![x](pictures/other.png)", "pictures/other.png"),
        ("[x](records/none.json)", "no file"),
    ],
)
def test_text_is_checked(text: str, said: str):
    problems = _problems(body=BODY.replace("# Animals", f"# Animals\n\n{text}"))
    assert any(said in problem for problem in problems), problems


def test_usage_and_heading_are_asked_for():
    assert any("## Usage" in p for p in _problems(body="# Animals\n"))
    assert any("heading" in p for p in _problems(body=BODY.replace("# Animals", "Animals")))


def test_numpy_numbers_are_found_before_they_break_the_card():
    head = ModelCardData(license="mit", library_name="transformers", value=np.float64(0.5)).to_yaml()
    assert any("!!python" in problem for problem in _problems(head))


def test_text_without_front_matter_is_no_card():
    assert validate_card("# Animals\n") == [
        "the card does not begin with front matter between two lines of ---; the Hub would know nothing of it"
    ]
