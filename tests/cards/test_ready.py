"""The ready cards are what the code renders, say whose numbers they print, and are valid."""

from __future__ import annotations

import pytest
import yaml
from huggingface_hub import ModelCardData

from hf_mae.cards.html import render_html
from hf_mae.cards.ready import READY, official_card, repository
from hf_mae.cards.validate import validate_card
from hf_mae.cards.write import templates_folder


@pytest.mark.parametrize("official", READY, ids=repository)
def test_card_of_an_official_file_is_up_to_date_and_non_commercial(official):
    text = (templates_folder() / "official" / f"{repository(official)}.md").read_text()
    assert text == official_card(official), "run hf_mae.cards.ready.write_official_cards('model_cards/official')"
    assert validate_card(_named(text)) == []
    assert any("your-organisation" in problem for problem in validate_card(text))
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-nc-4.0"
    assert "model-index" not in head  # numbers of others are no results of ours
    assert "not measured here" in text
    for value in official.result.values():
        assert f"| {value:g} |" in text


def _named(text: str) -> str:
    return text.replace("your-organisation/", "ada/")


def test_there_is_a_card_for_every_size_and_kind():
    assert len(READY) == 12
    assert len({repository(one) for one in READY}) == 12


@pytest.mark.parametrize("name", sorted(p.name for p in (templates_folder() / "examples").glob("*.md")))
def test_example_cards_are_valid(name: str):
    text = (templates_folder() / "examples" / name).read_text()
    linked = ["records/recipe.json", "records/metrics.jsonl"]
    assert validate_card(_named(text), files=linked) == []
    if "birds" in name:  # whose pictures are not for commercial use
        assert "license: cc-by-nc-4.0" in text


def test_page_shows_tables_pictures_and_the_front_matter():
    pytest.importorskip("markdown", reason="needs the package markdown")
    head = ModelCardData(license="mit").to_yaml()
    page = render_html(f"---\n{head}\n---\n\n# A & B\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n![c](pictures/c.png)\n")
    assert "<td>1</td>" in page
    assert 'src="pictures/c.png"' in page
    assert "license: mit" in page
    assert "<title>A &amp; B</title>" in page
