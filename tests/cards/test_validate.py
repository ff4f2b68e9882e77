"""The offline checks find what is wrong, one thing at a time."""

from __future__ import annotations

import numpy as np
import pytest
from huggingface_hub import ModelCardData

from hf_mae.cards.validate import validate_card

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
load("ada/small")
```

## Results

Not measured.
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
        ("[vision]", "[yes]", "tags has True"),
        ("[vision]", "vision", "tags='vision' is no list"),
        ("license: mit", "license: [mit, other]", "license=['mit', 'other']"),
        ("license: mit", "license: {a: 1}", "license={'a': 1}"),
        ("license: mit", "license: mit\nlicense: other", "license stands there twice"),
        ("license: mit", "license: other\nlicense_name: My Licence\nlicense_link: LICENSE", "license_name="),
        ("license: mit", "license: other\nlicense_name: mine\nlicense_link: nowhere", "license_link='nowhere'"),
        ("library_name: transformers", "library_name: [transformers]", "library_name=["),
        ("pipeline_tag: image-classification", "pipeline_tag: [image-classification]", "pipeline_tag=["),
        ("license: mit", "license: mit\nmetrics: 3", "metrics=3"),
        ("license: mit", "license: mit\nbase_model_relation: child", "base_model_relation='child'"),
        ("license: mit", "license: mit\nnew_version: nothing", "new_version='nothing'"),
        ("ada/encoder", "ada/small", "is the repository itself"),
        ("[en]", "[qqq]", "language='qqq'"),
        ("value: 0.5", "value: not measured", "accuracy='not measured'"),
        ("value: 0.5", "value: nan", "accuracy='nan'"),
        ("value: 0.5", "value: true", "accuracy=True"),
        ("value: 0.5", "value: 2020-01-01", "which is no number"),
        ("value: 0.5", "value: 5206", "no fraction"),
        ("value: 0.5", "value: -1", "no fraction"),
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
        ("{# a note #}", "template"),
        ("push to your-organisation/x", "left to fill in"),
        ("![x][y]\n\n[y]: other.png", "other.png"),
        ("![x](<an other.png>)", "an other.png"),
        ("<img src='other.png'>", "other.png"),
        ("<img width=3 src=other.png>", "other.png"),
        ("from C:\\Users\\jane", "path of this machine"),
        ("from ~/pics", "path of this machine"),
        ("from /srv/jane/x", "path of this machine"),
        ("<script>alert(1)</script>", "HTML"),
        ("| top-1 | NaN % |", "as a number"),
        ("hf_" + "aB3" * 12, "access token"),
    ],
)
def test_text_is_checked(text: str, said: str):
    problems = _problems(body=BODY.replace("# Animals", f"# Animals\n\n{text}"))
    assert any(said in problem for problem in problems), problems


def test_usage_and_heading_are_asked_for():
    assert any("## Usage" in p for p in _problems(body="# Animals\n"))
    assert any("heading" in p for p in _problems(body=BODY.replace("# Animals", "Animals")))


@pytest.mark.parametrize(
    "text", ["| None | 0.5 |", "the class todo", "XXX-large", "todo-list and tbd", "None of these"]
)
def test_words_that_only_look_like_placeholders_are_let_be(text: str):
    assert _problems(body=BODY.replace("# Animals", f"# Animals\n\n{text}")) == []
    assert _problems(HEAD.replace("[vision]", "[vision, 2026]")) == []


def test_line_ends_of_windows_change_nothing():
    assert validate_card(f"---\n{HEAD}\n---\n\n{BODY}".replace("\n", "\r\n"), files=FILES) == []


def test_result_that_is_no_mapping_is_a_problem_not_a_crash():
    head = HEAD[: HEAD.index("  - task")] + "  - hello"
    assert any("'hello'" in problem for problem in _problems(head))


def test_results_and_closed_blocks_are_asked_for():
    assert any("## Results" in p for p in _problems(body=BODY.replace("## Results", "## Other")))
    assert any("not closed" in p for p in _problems(body=f"{BODY}\n```python\nx\n"))


def test_lines_that_call_a_pipeline_need_its_tag():
    body = BODY.replace("x = None", 'pipeline("image-classification", model="ada/small")')
    assert _problems(body=body) == []
    problems = _problems(HEAD.replace("pipeline_tag: image-classification\n", ""), body)
    assert any("pipeline_tag is missing" in problem for problem in problems)


def test_numpy_numbers_are_found_before_they_break_the_card():
    head = ModelCardData(license="mit", library_name="transformers", value=np.float64(0.5)).to_yaml()
    assert any("!!python" in problem for problem in _problems(head))


def test_text_without_front_matter_is_no_card():
    assert validate_card("# Animals\n") == [
        "the card does not begin with front matter between two lines of ---; the Hub would know nothing of it"
    ]
