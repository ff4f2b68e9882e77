"""Hugging Face's own tables and JavaScript clients, on what we write: library, task, the code shown to visitors."""

from __future__ import annotations

import hashlib
import json
import sys
import urllib.request

import pytest

from hf_mae import export
from hf_mae.cards import vocabulary
from hf_mae.hub import widget

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


@pytest.fixture
def judge(hub, node_modules, client_env, run_client, tmp_path):
    """What npm @huggingface/tasks makes of the Hub's answer about a repository."""

    def run(repo_id):
        with urllib.request.urlopen(f"{hub.url}/api/models/{repo_id}", timeout=10) as answer:
            info = json.load(answer)
        (tmp_path / "info.json").write_text(json.dumps(info))
        argv = ["node", str(node_modules / "tasks.mjs"), str(tmp_path / "info.json")]
        return info, json.loads(run_client(argv, client_env))

    return run


def test_our_tables_are_those_of_the_npm_package(node_modules, run_client, client_env):
    theirs = json.loads(run_client(["node", str(node_modules / "tasks.mjs")], client_env))
    assert set(theirs["tasks"]) == vocabulary.PIPELINE_TAGS
    for library, tasks in widget.LIBRARY_TASKS.items():
        assert tasks <= set(theirs["mapping"][library])
    for library, tasks in vocabulary.LIBRARY_TASKS.items():
        if tasks is None:
            assert library not in theirs["mapping"]
        else:
            assert tasks <= set(theirs["mapping"][library])


def test_the_code_shown_for_a_transformers_model_runs(classifier, scores, judge, client_env, run_client, picture):
    info, found = judge(classifier)
    assert (found["library"], found["task"], found["pair"]) == ("Transformers", True, True)
    assert "custom_code" not in info["tags"]
    assert widget.check_remote(info).works
    by_pipeline, by_classes = found["snippets"]
    # The picture of the snippet lies on the Internet; ours is here. Nothing else is changed.
    lines = by_pipeline.splitlines()
    assert lines[-1].startswith('pipe("https://')
    lines[-1] = f"print(__import__('json').dumps(pipe({str(picture)!r})))"
    assert json.loads(run_client("\n".join(lines), client_env)) == scores[:5]
    assert "trust_remote_code" not in by_classes
    inputs = f"processor(__import__('PIL.Image').Image.open({str(picture)!r}), return_tensors='pt')"
    best = f"print(model.config.id2label[model(**{inputs}).logits.argmax().item()])"
    assert run_client(f"{by_classes}\n{best}", client_env).strip() == scores[0]["label"]


def test_the_code_shown_for_a_timm_model_runs(exported, upload, judge, client_env, run_client, tmp_path):
    from hf_mae import MAEForImageClassification

    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MAEForImageClassification(MAEForImageClassification.config_class(**shape, num_labels=7, pool="mean"))
    folder = export(model.eval(), tmp_path / "timm", "timm")
    (folder / "README.md").write_text("---\nlicense: mit\nlibrary_name: timm\n---\n")
    info, found = judge(upload(folder, "org/flowers-timm"))
    assert info["pipeline_tag"] == "image-classification"
    assert (found["library"], found["task"], found["pair"]) == ("timm", True, True)
    [snippet] = found["snippets"]
    shown = "print(tuple(model.eval()(__import__('torch').zeros(1, 3, 32, 32)).shape))"
    assert run_client(f"{snippet}\n{shown}", client_env).strip() == "(1, 7)"


def test_a_library_of_our_own_gets_neither_code_nor_widget(hub, upload, judge, tmp_path):
    """Why the research repository is a repository of its own."""
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae/README.md").write_text("---\nlicense: mit\nlibrary_name: hf_mae\n---\n")
    (tmp_path / "mae/config.json").write_text('{"model_type": "hf_mae", "architectures": ["MAEForPreTraining"]}')
    info, found = judge(upload(tmp_path / "mae", "org/mae-research"))
    assert found == {"library": None, "task": False, "pair": False, "snippets": []}
    assert not widget.check_remote(info).works


def test_the_javascript_client_reads_and_writes_the_same_bytes(
    hub, exported, upload, node_modules, run_client, client_env
):
    name = upload(exported, "org/flowers-js")
    script = node_modules / "hub.mjs"
    found = json.loads(run_client(["node", str(script), hub.url, name, "hf_alice_write"], client_env))
    assert found["info"]["library_name"] == "transformers"
    sent = {p.relative_to(exported).as_posix(): p.read_bytes() for p in exported.rglob("*") if p.is_file()}
    hashes = {path: hashlib.sha256(content).hexdigest() for path, content in sent.items()}
    assert {path: digest for path, digest in found["hashes"].items() if path != ".gitattributes"} == hashes
    assert found["written"] is True
    code = "import sys, huggingface_hub as h; print(open(h.hf_hub_download(sys.argv[1], 'note.txt')).read())"
    assert run_client([sys.executable, "-I", "-c", code, name], client_env).strip() == "from JavaScript"
