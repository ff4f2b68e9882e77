"""Our published classifier behind Hugging Face's own inference routes, asked by the stock clients."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def same(answers, scores):
    """Label for label, with the scores of the pipeline; the server rounds nothing."""
    assert [row["label"] for row in answers] == [row["label"] for row in scores[: len(answers)]]
    assert [row["score"] for row in answers] == pytest.approx(
        [row["score"] for row in scores[: len(answers)]], abs=1e-6
    )


def test_python_clients_get_the_scores_of_the_pipeline(inference, scores, client_env, run_client, picture):
    code = """
import asyncio, json, pathlib, sys
from huggingface_hub import AsyncInferenceClient, InferenceClient

address, picture = sys.argv[1:]
data = pathlib.Path(picture).read_bytes()
asked = {
    "path": InferenceClient(model=address).image_classification(picture),
    "bytes": InferenceClient(base_url=address).image_classification(data),
    "top 2": InferenceClient(model=address).image_classification(picture, top_k=2),
    "async": asyncio.run(AsyncInferenceClient(model=address).image_classification(data)),
}
print(json.dumps({name: [{"label": row.label, "score": row.score} for row in rows] for name, rows in asked.items()}))
"""
    argv = [sys.executable, "-I", "-c", code, inference, str(picture)]
    answers = json.loads(run_client(argv, client_env))
    assert {name: len(rows) for name, rows in answers.items()} == {"path": 5, "bytes": 5, "top 2": 2, "async": 5}
    for rows in answers.values():
        same(rows, scores)


def test_the_npm_client_gets_the_scores_of_the_pipeline(
    inference, scores, node_modules, client_env, run_client, picture
):
    script = node_modules / "inference.mjs"
    answers = json.loads(run_client(["node", str(script), inference, str(picture)], client_env))
    assert sorted(answers) == ["byEndpoint", "byFunction"]
    for rows in answers.values():
        assert len(rows) == 5
        same(rows, scores)


def test_what_is_no_picture_is_a_client_error(inference):
    request = urllib.request.Request(inference, b"no picture", {"Content-Type": "image/jpeg"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    with error.value as answer:
        assert answer.code == 400
