"""The Hub's own widget (npm @huggingface/widgets) in Chromium, with our model's answer to model_info."""

from __future__ import annotations

import json
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture
def show(hub, inference, node_modules, chromium, screenshots, client_env, run_client, tmp_path):
    """Show the widget for an answer of the Hub, give it a picture, and return what is on the page."""

    def run(info, picture, name):
        path = tmp_path / "info.json"
        path.write_text(json.dumps(info))
        script, shot = node_modules / "widget_page.mjs", screenshots / f"{name}.png"
        page = json.loads(
            run_client(
                ["node", str(script), chromium, inference, str(path), str(picture or "-"), str(shot)], client_env
            )
        )
        assert page["errors"] == []
        assert shot.stat().st_size > 2000
        return page

    return run


def info_of(hub, repo_id):
    with urllib.request.urlopen(f"{hub.url}/api/models/{repo_id}", timeout=10) as answer:
        return json.load(answer)


def test_the_widget_takes_a_picture_and_shows_the_pipelines_labels_and_scores(hub, classifier, scores, show, picture):
    page = show(info_of(hub, classifier) | {"inference": "Yes"}, picture, "widget")
    assert page["inputs"] >= 1
    assert page["rows"] == [[row["label"], f"{row['score']:.3f}"] for row in scores[:5]]
    assert "Image Classification" in page["text"]
    assert "Computation time on cpu" in page["text"]


def test_a_repository_with_custom_code_gets_no_file_input(hub, classifier, show):
    """Why a classifier is published as a stock class: the Hub gives this state to repositories with an auto_map."""
    page = show(info_of(hub, classifier) | {"inference": "CustomCode"}, None, "widget_custom_code")
    assert page["inputs"] == 0
    assert "custom code" in page["text"]
