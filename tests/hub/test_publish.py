"""What a publish sends, keeps and removes: one commit, nothing of others, nothing without a check before."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.hub.stage import (
    MANIFEST,
    clashes,
    collect,
    compare,
    describe,
    is_inside,
    keep_times,
    manifest_of,
    read_file,
    read_manifest,
    take,
)
from hf_mae.training.checkpoint import RunLock

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
    before = written("old/other", "before")
    there["other"] = on_hub(before)
    for earlier, state in (({"other": [before.sha256, before.blob]}, "changed"), ({}, "foreign")):
        rows = compare([new, same, large, other], there, earlier)
        assert [(row.path, row.state) for row in rows] == [
            ("new", "new"), ("same", "same"), ("large", "same"), ("other", state),
        ]  # fmt: skip
    assert any("replaces a file that hf-mae did not write" in line for line in describe(rows))


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "old/x.pth", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
     "adapter_config.json"],
)  # fmt: skip
def test_a_file_of_others_that_stock_classes_would_read_is_named(written, name):
    model, theirs = written("model.safetensors", "1"), written(name, "2")
    there = {name: on_hub(theirs), "notes.md": on_hub(written("notes.md", "3"))}
    assert clashes(compare([model], there, {}), there) == [name]
    # One that an earlier publish of ours wrote is removed, so it is none.
    assert clashes(compare([model], there, read_manifest(manifest_of([theirs], {}))), there) == []


def test_weights_in_folders_of_others_are_left_in_peace(written):
    there = {"checkpoints/old.safetensors": on_hub(written("checkpoints/old.safetensors", "1"))}
    assert clashes(compare([written("model.safetensors", "2")], there, {}), there) == []


def test_what_is_taken_stays_as_it_was_hashed_while_the_run_goes_on(tmp_path):
    log, weights = tmp_path / "metrics.jsonl", tmp_path / "model.safetensors"
    log.write_text('{"step": 1}\n{"ste')
    weights.write_bytes(b"old")
    taken = take([("run/metrics.jsonl", log), ("model.safetensors", weights)], tmp_path / "taken")
    log.write_text('{"step": 1}\n{"step": 2}\n')
    new = tmp_path / "new"
    new.write_bytes(b"new")
    new.replace(weights)
    assert [file.local.read_bytes() for file in taken] == [b'{"step": 1}\n', b"old"]
    assert [read_file(file.local, file.path) for file in taken] == taken


def test_a_file_that_goes_away_while_it_is_read_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="went away while it was read"):
        take([("a.safetensors", tmp_path / "a.safetensors")], tmp_path / "taken")


@pytest.mark.parametrize(("there", "kept"), [
    ({"time": "before", "parity": 1e-13, "blocks": [{"seconds": 3}]}, True),
    ({"time": "before", "parity": 2e-13, "blocks": [{"seconds": 3}]}, False),
    ("not a record", False),
])  # fmt: skip
def test_a_record_that_differs_in_times_only_stays_as_it_is_there(written, there, kept):
    text = {"time": "now", "parity": 1e-13, "blocks": [{"seconds": 4}]}
    ours, theirs = written("export.json", json.dumps(text)), written("x/export.json", json.dumps(there))
    (file,) = keep_times([ours], {"export.json": on_hub(theirs)}, lambda _: json.dumps(there).encode())
    assert (file.sha256 == theirs.sha256) is kept
    assert read_file(file.local, file.path) == file


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
    assert [path for path, _ in collect(tmp_path)] == [".eval_results/x.yaml", "model.safetensors"]


# ------------------------------------------------------------------------------------------------ against a Hub

CLIENT = """
import json, sys, time
import hf_mae.hub.publish as publishing
from hf_mae.cards.options import CardOptions
from hf_mae.hub.widget import Verdict
# Checked by their own tests and by test_journey.py; they start several processes each.
publishing.run_usage = lambda *_, **__: {"blocks": [{"seconds": time.time()}]}
publishing.check_folder = lambda *_, **__: Verdict((), True, "passed")
card = CardOptions(license="apache-2.0", data_license="none: random weights")
for folder, repo_id, options in json.loads(sys.argv[1]):
    said = []
    exec(options.pop("before", ""))
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
    start = len(hub.log)
    refused, third = publish((exported, "org/once", {}), (exported, "org/once", {"overwrite_edits": True}))
    assert refused["error"].startswith("ValueError: org/once: README.md changed on the Hub")
    assert "--overwrite-edits" in refused["error"]
    assert sum("/commit/" in path for path in writes(hub, start)) == 1
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
    assert "org/secret, new and private: branch main, licence apache-2.0" in private["said"]


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
        (exported, "org/x", {"weights": "best"}),
        (exported, "org/x", {"target": "onnx"}),
    )
    for one, words in zip(
        found,
        (
            "is not a folder",
            "not of the form ORG/NAME",
            "is no run folder",
            "a pull request is against main",
            "is a commit",
            "is an export already",
            "is an export already",
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
    said = "\n".join(dry["said"])
    assert "org/off, not compared with the Hub: branch main" in said
    assert "HF_HUB_OFFLINE" in said
    assert "new and public" not in said
    assert "there already" not in said
    assert "offline mode is on; unset HF_HUB_OFFLINE" in real["error"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_dry_run_without_a_network_waits_a_second_and_no_longer(hub, publish, exported):
    (found,) = publish((exported, "org/cut", {"dry_run": True}), HF_ENDPOINT="http://127.0.0.1:9")
    waits = [line for line in found["said"] if "trying again in" in line]
    assert len(waits) == 1
    assert "trying again in 1 s" in waits[0]
    assert any("not compared with the Hub" in line for line in found["said"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_beside_weights_of_others_nothing_is_written_but_a_pull_request(hub, publish, exported):
    from tests.hub.server import Entry, git_blob

    repo = hub.create("model", "org/foreign", ("alice", "write", ["org"]))
    theirs = {name: Entry(git_blob(b"x"), 1, None, b"x") for name in ("README.md", "pytorch_model.bin", "notes.txt")}
    hub.add_commit(repo, "refs/heads/main", theirs, "theirs", "", "carol", repo.refs["refs/heads/main"])
    start = len(hub.log)
    dry, real = publish((exported, "org/foreign", {"dry_run": True}), (exported, "org/foreign", {}))
    for one in (dry, real):
        assert (
            "pytorch_model.bin; delete them there, name another repository, or propose it with --create-pr"
            in (one["error"])
        )
        assert "replaces a file that hf-mae did not write" in "\n".join(one["said"])
    assert writes(hub, start) == []
    (pull,) = publish((exported, "org/foreign", {"create_pr": True}))
    assert "error" not in pull
    assert any("delete them before the pull request is merged" in line for line in pull["said"])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_verdict_that_fails_after_the_publish_is_an_error_that_says_it_is_there(hub, publish, exported):
    bad = "from hf_mae.hub.widget import Check\n"
    bad += "publishing.check_remote = lambda *_: Verdict((Check('no pickles', False, 'x.bin', 'remove'),), False, 'no')"
    (found,) = publish((exported, "org/bad", {"before": bad}))
    assert found["error"].startswith("RuntimeError: org/bad is published")
    assert "not as it should be: no pickles: x.bin (remove)" in found["error"]
    assert "model.safetensors" in hub.resolve(hub.repos["model", "org/bad"], "main").tree


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_model_that_is_exported_anew_and_unchanged_makes_no_second_commit(hub, publish, exported):
    model = exported.parent / "model"
    first, again = publish((model, "org/twice", {}), (model, "org/twice", {}))
    assert again["commit"] == first["commit"]
    assert "everything is there already; nothing to commit" in again["said"]
    assert any(line.startswith("unchanged: ") for line in again["said"])
    assert len(hub.repos["model", "org/twice"].commits) == 2


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_was_made_before_an_upload_failed_is_told(hub, publish, exported):
    publish((exported, "org/made", {}))
    main = hub.repos["model", "org/made"].refs["refs/heads/main"]
    hub.fault("POST", "/commit/", status=403, times=2)
    model = exported.parent / "model"
    repository, branch = publish(
        (exported, "org/empty", {}), (model, "org/made", {"revision": "b", "target": "hf_mae"})
    )
    assert "the new public repository org/empty was made, and is empty" in repository["error"]
    assert set(hub.resolve(hub.repos["model", "org/empty"], "main").tree) == {".gitattributes"}
    assert f"the new branch b was made, and holds what main held ({main[:10]})" in branch["error"]
    assert hub.repos["model", "org/made"].refs["refs/heads/b"] == main


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_error_of_a_value_is_not_taken_for_the_hubs_word_on_the_card(publish, exported):
    other = "publishing.HfApi.create_commit = lambda *_, **__: (_ for _ in ()).throw(ValueError('something else'))"
    (found,) = publish((exported, "org/value", {"before": other}))
    assert "something else" in found["error"]
    assert "refuses the card" not in found["error"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_token_that_cannot_be_sent_and_a_repository_of_others_are_refused_before_any_work(publish, exported):
    (token,) = publish((exported, "org/x", {}), HF_TOKEN="\u201chf_alice_write\u201d")
    assert token["error"].startswith("ValueError: the token holds characters that no token has")
    assert "alice" not in token["error"]
    other, proposed = publish(
        (exported, "org/x", {}), (exported, "org/once", {"create_pr": True}), HF_TOKEN="hf_bob_write"
    )
    assert "org is not you (bob) nor an organisation of yours (you have none); publish to bob/x" in other["error"]
    assert other["said"] == []
    assert "is not you" not in proposed.get("error", "")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_publishes_of_one_folder_do_not_write_into_it_at_once(publish, exported):
    lock = RunLock(exported)
    lock.acquire()
    try:
        (found,) = publish((exported, "org/both", {"dry_run": True}))
    finally:
        lock.release()
    assert "RuntimeError: " in found["error"]
    assert "is being published by another process" in found["error"]


@pytest.mark.parametrize(
    ("tail", "runs"),
    [
        ("ValueError: no such class", 1),
        ("KeyError: 500", 1),
        ("huggingface_hub.errors.HfHubHTTPError: 503 Server Error: Service Unavailable for url", 3),
        ("Client error '429 Too Many Requests' for url", 3),
        ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", 3),
    ],
)
def test_usage_lines_are_run_again_only_if_the_network_failed_them(monkeypatch, tail, runs):
    import hf_mae.hub.publish as publishing
    from hf_mae.cards.options import CardOptions

    calls = []

    def fail(*_, **__):
        calls.append(1)
        raise RuntimeError(f"usage block 1 of the card does not run. It ended with:\n{tail}")

    monkeypatch.setattr(publishing, "run_usage", fail)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="is published and whole, but the lines of its card did not run"):
        publishing._try_there("", "org/x", CardOptions(), on_main=True, say=lambda line: None)
    assert len(calls) == runs


@pytest.mark.parametrize(
    ("text", "empty"),
    [
        (b"---\nlicense: mit\n---\n", True),
        (b"---\r\nlicense: mit\r\n---\r\n\r\n", True),
        (b"\n", True),
        (b"---\nlicense: mit\n---\n# Mine\n", False),
        (b"# Mine\n", False),
    ],
)
def test_a_card_that_the_hub_wrote_is_told_from_one_that_somebody_wrote(text, empty):
    from hf_mae.hub.publish import _is_empty_card

    assert _is_empty_card(text) == empty


@pytest.mark.slow
@pytest.mark.multiprocess
def test_files_that_somebody_else_put_there_are_replaced_only_when_asked(hub, publish, exported):
    from tests.hub.server import Entry, git_blob

    def put(name, text):
        repo = hub.create("model", name, ("alice", "write", ["org"]))
        theirs = {"README.md": Entry(git_blob(text), len(text), None, text)}
        hub.add_commit(repo, "refs/heads/main", theirs, "theirs", "", "carol", repo.refs["refs/heads/main"])

    put("org/theirs", b"---\nlicense: mit\n---\n# Mine, of years\n")
    put("org/begun", b"---\nlicense: mit\n---\n")
    start = len(hub.log)
    dry, refused, asked, begun = publish(
        (exported, "org/theirs", {"dry_run": True}),
        (exported, "org/theirs", {}),
        (exported, "org/theirs", {"overwrite_edits": True}),
        (exported, "org/begun", {}),
    )
    for one in (dry, refused):
        assert one["error"].startswith("ValueError: org/theirs holds README.md")
        assert "--overwrite-edits" in one["error"]
    assert asked["commit"]
    assert begun["commit"]
    assert sum("/org/theirs/commit/" in path for path in writes(hub, start)) == 1


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_edited_card_is_what_goes_up(hub, publish, exported, tmp_path):
    """`card`, an edit by hand, and `publish EXPORT`, twice."""
    from hf_mae.cards.options import CardOptions
    from hf_mae.cards.write import write_card

    folder = Path(shutil.copytree(exported, tmp_path / "export"))
    write_card(folder, "org/edited", CardOptions(license="apache-2.0"))
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    first, again = publish((folder, "org/edited", {}), (folder, "org/edited", {"overwrite_edits": True}))
    for one in (first, again):
        tree = hub.repos["model", "org/edited"].commits[one["commit"]].tree
        assert tree["README.md"].data.decode() == card.read_text()
        assert any("kept" in line and "README.md" in line and "--overwrite" in line for line in one["said"])
    assert "My own words." in card.read_text()
    assert ".hf_mae_files.json" not in tree


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_export_that_was_edited_stops_the_publish_of_its_run(hub, publish, exported, tmp_path):
    from hf_mae import MAEForImageClassification

    run = tmp_path / "run"
    model = MAEForImageClassification.from_pretrained(exported.parent / "model")
    inner = run / "checkpoints" / "step_00000001"
    shutil.copytree(exported.parent / "model", inner / "model")
    (inner / "model" / "preprocessor_config.json").write_text((exported / "preprocessor_config.json").read_text())
    recipe = {"name": "finetune-small", "source": "ours", "data": {"path": "animals", "splits": None}}
    recipe |= {"model": {"head": model.config.head, "pool": model.config.pool}, "trainable_blocks": None}
    (run / "recipe.json").write_text(json.dumps(recipe))
    row = {"step": 1, "epoch": 1.0, "examples_seen": 64, "loss": 1.0, "lr": 0.1, "images_per_second": 10.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    entries = {
        p.relative_to(inner).as_posix(): [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()]
        for p in inner.rglob("*")
        if p.is_file()
    }
    (inner / "manifest.json").write_text(json.dumps(entries))
    (first,) = publish((run, "org/of-a-run", {}))
    assert first.get("commit"), first
    (card,) = run.glob("export/*/README.md")
    card.write_text(card.read_text() + "\nMy own words.\n")
    refused, dry = publish((run, "org/of-a-run", {}), (run, "org/of-a-run", {"dry_run": True}))
    for one in (refused, dry):
        assert re.search(r"README\.md.*hf-mae publish .*export/\w+ org/of-a-run.*--overwrite-edits", one["error"])
    assert "My own words." in card.read_text()
    named, anew = publish((card.parent, "org/of-a-run", {}), (run, "org/of-a-run", {"overwrite_edits": True}))
    tree = hub.repos["model", "org/of-a-run"].commits[named["commit"]].tree
    assert tree["README.md"].data.decode().endswith("My own words.\n")
    assert anew.get("commit"), anew
    assert "My own words." not in card.read_text()
