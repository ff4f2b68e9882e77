"""Our page in Chromium: a visitor's picture through classification and reconstruction, models from the Hub."""

from __future__ import annotations

import json
import socket
import sys
from importlib.util import find_spec

import pytest
import torch

from hf_mae import MAEConfig, MAEForPreTraining, export
from tests.hub.conftest import absent, clean_environment, serving

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

SERVE = """
import sys
from hf_mae.demo.app import launch
reconstruct, classify, port = sys.argv[1:]
launch(reconstruct=reconstruct, classify=classify, port=int(port),
       say=lambda line: print(next(word for word in line.split() if word.startswith("http")), flush=True))
"""


@pytest.fixture(scope="module")
def page(hub, upload, classifier, tmp_path_factory):
    """The address of the page, with a classifier and a pretraining model from `hub`."""
    if find_spec("gradio") is None:
        absent('needs gradio (pip install "hf_mae[demo]")')
    folder = tmp_path_factory.mktemp("demo")
    shape = {"image_size": 64, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = MAEForPreTraining(MAEConfig(**shape, **decoder, norm_pix_loss=True))
    mae = upload(export(model.eval(), folder / "mae", "vit_mae"), "org/mae-tiny")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = clean_environment(hub, folder / "hf_home")
    argv = [sys.executable, "-I", "-c", SERVE, mae, classifier, str(port)]
    with serving(argv, env, folder / "errors.txt") as address:
        yield address


def test_a_visitors_picture_is_classified_and_reconstructed(
    page, scores, node_modules, chromium, picture, screenshots, client_env, run_client, tmp_path
):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    argv = ["node", str(node_modules / "demo_page.mjs"), chromium, page, str(picture)]
    shown = json.loads(run_client([*argv, str(tmp_path / "broken.jpg"), str(screenshots)], client_env, timeout=200))
    assert (shown["errors"], shown["elsewhere"]) == ([], []), "the page asks nobody but its own server"
    assert shown["best"] == scores[0]["label"]
    assert [row.split("\n") for row in shown["rows"]] == [[r["label"], f"{100 * r['score']:.0f}%"] for r in scores[:5]]
    assert shown["captions"] == ["original", "masked", "predicted", "pasted"]
    assert len(shown["sizes"]) == 4
    assert all(min(size) >= 64 for size in shown["sizes"])
    assert "There is no picture yet" in shown["refused"]["empty"]
    assert "no picture that can be read" in shown["refused"]["broken"]
