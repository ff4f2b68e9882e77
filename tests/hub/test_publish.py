"""What a publish sends, keeps and removes: one commit, nothing of others, nothing without a check before."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.hub.stage import MANIFEST, collect, compare, describe, is_inside, manifest_of, read_file, read_manifest

# ------------------------------------------------------------------------------------------------ what is staged


def on_hub(file, *, large: bool = False):
    """A file as `list_repo_tree` gives it."""
    lfs = SimpleNamespace(sha256=file.sha256) if large else None
    return SimpleNamespace(path=file.path, size=file.size, blob_id="of the pointer" if large else file.blob, lfs=lfs)


@pytest.fixture
def written(tmp_path):
    """Write a file and read it as one to upload."""

    def write(path: str, text: str):
        local = tmp_path / path
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_text(text)
        return read_file(local, path)

    return write


def test_a_blob_is_named_as_git_names_it(written):
    # echo -n hello | git hash-object --stdin; sha256sum
    file = written("a", "hello")
    assert file.blob == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"
    assert file.sha256 == "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def test_each_path_is_new_changed_or_there_already(written):
    new, same, large, other = (written(name, name) for name in ("new", "same", "large", "other"))
    there = {f.path: on_hub(f, large=f is large) for f in (same, large)}
    there["other"] = on_hub(written("old/other", "before"))
    rows = compare([new, same, large, other], there, {})
    assert [(row.path, row.state) for row in rows] == [
        ("new", "new"), ("same", "same"), ("large", "same"), ("other", "changed"),
    ]  # fmt: skip


def test_only_what_an_earlier_publish_wrote_and_nobody_changed_is_removed(written):
    shard, edited, theirs = written("shard", "1"), written("edited", "2"), written("theirs", "3")
    earlier = read_manifest(manifest_of([shard, edited], {}))
    there = {f.path: on_hub(f) for f in (shard, theirs)} | {"edited": on_hub(written("x/edited", "by hand"))}
    rows = compare([written("model", "4")], there, earlier)
    assert [(row.path, row.state) for row in rows] == [("model", "new"), ("shard", "remove")]


def test_a_file_that_someone_edited_on_the_hub_is_said_to_be(written):
    ours = written("README.md", "as published")
    there = {"README.md": on_hub(written("x/README.md", "edited"))}
    rows = compare([written("y/README.md", "new")], {}, {})
    assert rows[0].state == "new"
    rows = compare([ours], there, read_manifest(manifest_of([ours], {})))
    assert rows[0].state == "edited"
    assert any("undoing an edit made on the Hub" in line for line in describe(rows))


def test_a_run_published_earlier_stays_until_another_run_takes_its_place(written):
    old, model, new = (
        written("run/checkpoints/step_1/a", "1"),
        written("model", "2"),
        written("run/checkpoints/s2", "3"),
    )
    earlier = read_manifest(manifest_of([old, model], {}))
    there = {f.path: on_hub(f) for f in (old, model)}
    assert [row.state for row in compare([model], there, earlier)] == ["same"]
    assert old.path in read_manifest(manifest_of([model], earlier))
    assert ("run/checkpoints/step_1/a", "remove") in [(r.path, r.state) for r in compare([model, new], there, earlier)]
    assert old.path not in read_manifest(manifest_of([model, new], earlier))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": {"a": ["x"]}}'])
def test_a_list_that_is_none_removes_nothing(text):
    assert read_manifest(text) == {}


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "..", "a\\..\\b", "C:x", ""])
def test_a_path_that_leads_out_of_the_folder_is_seen(path):
    assert not is_inside(path)
    assert read_manifest(json.dumps({"files": {path: ["a", "b"]}})) == {}


def test_caches_and_half_written_files_stay_at_home(tmp_path):
    for name in ("model.safetensors", ".cache/x", ".tmp", "a/.hidden", ".eval_results/x.yaml", MANIFEST):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert [file.path for file in collect(tmp_path)] == [".eval_results/x.yaml", "model.safetensors"]


# ------------------------------------------------------------------------------------------------ against a Hub

CLIENT = """
import json, sys
import hf_mae.hub.publish as publishing
from hf_mae.cards.options import CardOptions
from hf_mae.hub.widget import Verdict
# Checked by their own tests and by test_journey.py; they start several processes each.
publishing.run_usage = lambda *_, **__: {"blocks": []}
publishing.check_folder = lambda *_, **__: Verdict((), True, "passed")
card = CardOptions(license="apache-2.0", data_license="none: random weights")
for folder, repo_id, options in json.loads(sys.argv[1]):
    said = []
    try:
        done = publishing.publish(folder, repo_id, card=card, say=said.append, **options)
        found = {"commit": done.commit, "pull_request": done.pull_request, "url": done.url}
    except (ValueError, RuntimeError) as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found | {"said": said}))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    from hf_mae.exporting.write import export

    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    MAEForImageClassification(config).save_pretrained(folder / "model")
    return export(folder / "model", folder / "export")


@pytest.fixture
def publish(client_env, run_client):
    def run(*calls, **environment) -> list[dict]:
        argv = [sys.executable, "-c", CLIENT, json.dumps([[str(a), b, c] for a, b, c in calls])]
        return [json.loads(line) for line in run_client(argv, client_env | environment).splitlines()]

    return run


def writes(hub, start: int = 0) -> list[str]:
    # paths-info is a question that is POSTed, and so is the check of the card.
    questions = ("/paths-info/", "/validate-yaml", "/preupload/")
    asked = [r for r in hub.log[start:] if r["m"] not in ("GET", "HEAD")]
    return [r["path"] for r in asked if not any(q in r["path"] for q in questions)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_dry_run_writes_nothing_and_says_what_it_would(hub, publish, exported):
    start = len(hub.log)
    (found,) = publish((exported, "org/dry", {"dry_run": True}))
    assert found["commit"] == ""
    assert writes(hub, start) == []
    said = "\n".join(found["said"])
    assert "org/dry, new and public: branch main, licence apache-2.0" in said
    assert "model.safetensors" in said
    assert "dry run: nothing was written to the Hub" in said


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_commit_brings_everything_and_the_next_sends_what_changed(hub, publish, exported):
    first, again = publish((exported, "org/once", {}), (exported, "org/once", {}))
    repo = hub.repos["model", "org/once"]
    tree = repo.commits[first["commit"]].tree
    assert {"README.md", "config.json", "model.safetensors", "export.json", MANIFEST} <= set(tree)
    assert repo.commits[first["commit"]].parent in repo.commits
    assert len(repo.commits) == 2
    assert again["commit"] == first["commit"]
    assert "everything is there already; nothing to commit" in again["said"]

    # Someone adds a file, someone edits the card, and weights of an earlier publish lie about.
    large = {p: e for p, e in tree.items() if e.sha256}["model.safetensors"]
    listed = read_manifest(tree[MANIFEST].data.decode()) | {
        "model-00001-of-00002.safetensors": [large.sha256, large.oid]
    }
    text = json.dumps({"files": listed}).encode()
    from tests.hub.server import Entry, git_blob

    edited = dict(tree) | {
        "model-00001-of-00002.safetensors": large,
        "theirs.txt": Entry(git_blob(b"x"), 1, None, b"x"),
        "README.md": Entry(git_blob(b"y"), 1, None, b"y"),
        MANIFEST: Entry(git_blob(text), len(text), None, text),
    }
    hub.add_commit(repo, "refs/heads/main", edited, "by hand", "", "carol", first["commit"])
    (third,) = publish((exported, "org/once", {}))
    after = repo.commits[third["commit"]].tree
    assert "theirs.txt" in after
    assert "model-00001-of-00002.safetensors" not in after
    said = "\n".join(third["said"])
    assert "removed, of an earlier publish" in said
    assert "README.md" in said
    assert "changed, undoing an edit made on the Hub" in said
    assert after["README.md"].oid == tree["README.md"].oid


@pytest.mark.slow
@pytest.mark.multiprocess
def test_branches_pull_requests_and_private_repositories(hub, publish, exported):
    branch, pull, private = publish(
        (exported, "org/where", {"revision": "next"}),
        (exported, "org/where", {"create_pr": True}),
        (exported, "org/secret", {"private": True}),
    )
    repo = hub.repos["model", "org/where"]
    assert repo.refs["refs/heads/next"] == branch["commit"]
    assert "model.safetensors" not in repo.commits[repo.refs["refs/heads/main"]].tree
    assert pull["pull_request"].endswith("/org/where/discussions/1")
    assert repo.refs["refs/pr/1"] == pull["commit"]
    assert "model.safetensors" not in repo.commits[repo.refs["refs/heads/main"]].tree
    assert hub.repos["model", "org/secret"].private
    assert "private" in private["said"][1] or "private" in private["said"][0], private["said"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_cannot_be_published_is_refused_before_anything_is_asked_of_the_hub(hub, publish, exported, tmp_path):
    start = len(hub.log)
    found = publish(
        (tmp_path / "none", "org/x", {}),
        (exported, "x", {}),
        (exported, "org/x", {"checkpoint": True}),
        (exported, "org/x", {"create_pr": True, "revision": "next"}),
        (exported, "org/x", {"revision": "a" * 40}),
    )
    for one, words in zip(
        found,
        (
            "is not a folder",
            "not of the form ORG/NAME",
            "is no run folder",
            "a pull request is against main",
            "is a commit",
        ),
        strict=True,
    ):
        assert one["error"].startswith("ValueError: ")
        assert words in one["error"]
    assert writes(hub, start) == []
    assert ("model", "org/x") not in hub.repos


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_token_is_in_no_file_and_in_no_line(hub, publish, exported):
    (found,) = publish((exported, "org/quiet", {}))
    assert "alice_write" not in json.dumps(found)
    tree = hub.repos["model", "org/quiet"].commits[found["commit"]].tree
    assert not [path for path, entry in tree.items() if b"alice_write" in hub.read(entry)]
    assert not [p for p in exported.rglob("*") if p.is_file() and b"alice_write" in p.read_bytes()]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_offline_a_dry_run_still_checks_and_a_publish_says_why_not(hub, publish, exported):
    dry, real = publish(
        (exported, "org/off", {"dry_run": True}), (exported, "org/off", {}), HF_HUB_OFFLINE="1"
    )  # fmt: skip
    assert any("not compared with the Hub" in line and "HF_HUB_OFFLINE" in line for line in dry["said"])
    assert "offline mode is on; unset HF_HUB_OFFLINE" in real["error"]
