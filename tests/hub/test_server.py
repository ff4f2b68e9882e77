"""The loopback Hub keeps the Hub's rules: whatever is proved against it is worth as much as these tests."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
import struct
import textwrap
import threading
import time
from urllib.parse import urlsplit

import pytest

from tests.hub.server import HubServer

ALICE, READER, BOB = "hf_alice_write", "hf_alice_read", "hf_bob_write"


@pytest.fixture(scope="module")
def hub():
    """Small pages and parts, so that both are seen."""
    with HubServer(page_size=3, multipart_above=1000, chunk_size=400) as server:
        yield server


def ask(hub, method, url, value=None, *, token=ALICE, headers=None, data=None):
    """One request, no redirect followed: (status, headers, body)."""
    address = urlsplit(url if url.startswith("http") else hub.url + url)
    sent = dict(headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    body = json.dumps(value).encode() if value is not None else data
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=10)
    try:
        connection.request(method, address.path + (f"?{address.query}" if address.query else ""), body, sent)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def make(hub, name, kind="model", **settings):
    status, _, _ = ask(hub, "POST", "/api/repos/create", {"name": name, "organization": "org", "type": kind})
    assert status == 200
    if settings:
        assert ask(hub, "PUT", f"/api/{kind}s/org/{name}/settings", settings)[0] == 200
    return f"/api/{kind}s/org/{name}"


def regular(path, content):
    return {"key": "file", "value": {"path": path, "encoding": "base64", "content": base64.b64encode(content).decode()}}


def commit(hub, repo, *operations, revision="main", parent=None, token=ALICE, query=""):
    head = {"summary": "a commit", "description": ""} | ({"parentCommit": parent} if parent else {})
    lines = [{"key": "header", "value": head}, *operations]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    return ask(hub, "POST", f"{repo}/commit/{revision}{query}", data=body, token=token)


def batch(hub, name, data, operation="upload"):
    """What the LFS batch route says of one object."""
    sha = hashlib.sha256(data).hexdigest()
    wanted = {
        "operation": operation,
        "transfers": ["basic", "multipart"],
        "objects": [{"oid": sha, "size": len(data)}],
    }
    status, _, body = ask(hub, "POST", f"/org/{name}.git/info/lfs/objects/batch", wanted)
    assert status == 200
    return sha, json.loads(body)["objects"][0].get("actions", {})


def store(hub, name, path, data):
    """Upload one object the basic way; return the line that commits it."""
    sha, actions = batch(hub, name, data)
    if actions:
        assert ask(hub, "PUT", actions["upload"]["href"], data=data, token=None)[0] == 200
    return {"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": sha, "size": len(data)}}


def head_of(hub, repo, token=ALICE):
    return json.loads(ask(hub, "GET", repo, token=token)[2])["sha"]


def safetensors(*shape):
    count = 4
    for size in shape:
        count *= size
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, count]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(count)


def test_files_have_the_ids_that_git_gives_them(hub):
    repo = make(hub, "ids")
    content = b"x" * 100
    assert commit(hub, repo, regular("a.txt", b"hello\n"), store(hub, "ids", "b.bin", content))[0] == 200
    rows = {}
    url = f"{repo}/tree/main"
    while url:
        _, headers, body = ask(hub, "GET", url)
        rows |= {row["path"]: row for row in json.loads(body)}
        url = (re.search(r"<(.+)>", headers.get("Link", "")) or [None, None])[1]
    # `printf 'hello\n' | git hash-object --stdin`, and of the pointer text of git-lfs
    assert rows["a.txt"]["oid"] == "ce013625030ba8dba906f756967f9e9ca394464a"
    sha = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize 100\n".encode()
    assert rows["b.bin"]["oid"] == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert rows["b.bin"]["lfs"] == {"oid": sha, "size": 100, "pointerSize": len(pointer)}


@pytest.mark.parametrize(
    ("path", "token", "status", "code"),
    [
        ("/api/models/org/none", None, 401, "RepoNotFound"),
        ("/api/models/org/none", ALICE, 404, "RepoNotFound"),
        ("/api/models/org/secret", BOB, 404, "RepoNotFound"),
        ("/api/models/org/secret", None, 401, "RepoNotFound"),
        ("/api/models/org/secret", READER, 200, None),
        ("/api/models/org/secret/revision/nope", ALICE, 404, "RevisionNotFound"),
        ("/org/secret/resolve/main/none.txt", ALICE, 404, "EntryNotFound"),
        ("/api/models/org/gated", None, 200, None),
        ("/org/gated/resolve/main/.gitattributes", None, 401, "GatedRepo"),
        ("/org/gated/resolve/main/.gitattributes", BOB, 403, "GatedRepo"),
        ("/api/models/org/secret", "hf_wrong", 401, None),
        ("/api/whoami-v2", None, 401, None),
    ],
)
def test_errors_are_told_apart_by_status_and_header(hub, path, token, status, code):
    if ("model", "org/secret") not in hub.repos:
        make(hub, "secret", private=True)
        make(hub, "gated", gated="auto")
    found, headers, body = ask(hub, "GET", path, token=token)
    assert (found, headers.get("X-Error-Code")) == (status, code), body
    if path.endswith("none.txt"):  # clients remember that this commit has no such file
        assert headers["X-Repo-Commit"] == head_of(hub, "/api/models/org/secret")


def test_only_a_write_token_of_a_member_changes_a_repository(hub):
    repo = make(hub, "rights")
    head = head_of(hub, repo)
    for token, status in ((READER, 403), (BOB, 403), (None, 401)):
        assert commit(hub, repo, regular("a", b"1"), token=token)[0] == status
        assert ask(hub, "POST", "/api/repos/create", {"name": "x", "organization": "org"}, token=token)[0] == status
    assert head_of(hub, repo) == head
    assert ask(hub, "POST", "/api/repos/create", {"name": "rights", "organization": "org"})[0] == 409


def test_a_tree_is_paged_and_its_pages_hold_each_file_once(hub):
    repo = make(hub, "pages")
    names = [f"f{i}.txt" for i in range(8)]
    commit(hub, repo, *(regular(name, name.encode()) for name in names))
    found, pages, url = [], 0, f"{repo}/tree/main?recursive=true"
    while url:
        _, headers, body = ask(hub, "GET", url)
        found += [row["path"] for row in json.loads(body)]
        assert len(json.loads(body)) <= 3
        pages += 1
        url = (re.search(r'<(.+)>; rel="next"', headers.get("Link", "")) or [None, None])[1]
    assert (pages, found) == (3, sorted([".gitattributes", *names]))


def test_a_stale_parent_is_refused_and_without_a_parent_all_commits_land(hub):
    repo = make(hub, "race")
    head = head_of(hub, repo)
    assert commit(hub, repo, regular("a", b"1"), parent=head)[0] == 200
    status, _, body = commit(hub, repo, regular("a", b"2"), parent=head)
    assert (status, b"A commit has happened since" in body) == (412, True)
    threads = [threading.Thread(target=commit, args=(hub, repo, regular(f"t{i}", b"t"))) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    history = json.loads(ask(hub, "GET", f"{repo}/commits/main")[2])
    assert len(history) == 2 + 8
    tree = hub.resolve(hub.repos["model", "org/race"], "main").tree
    assert {"a", *(f"t{i}" for i in range(8))} <= set(tree)
    assert tree["a"].data == b"1"


def test_a_commit_is_whole_or_nothing(hub):
    repo = make(hub, "atomic")
    head = head_of(hub, repo)
    missing = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 5}}
    assert commit(hub, repo, regular("card.md", b"1"), missing)[0] == 400
    gone = {"key": "deletedFile", "value": {"path": "none"}}
    assert commit(hub, repo, regular("card.md", b"1"), gone)[0] == 404
    assert head_of(hub, repo) == head


def test_large_objects_come_in_parts_and_their_hash_is_checked(hub):
    repo = make(hub, "parts")
    data = bytes(range(250)) * 5  # 1,250 bytes: parts of 400, 400, 400 and 50
    sha, actions = batch(hub, "parts", data)
    header = actions["upload"]["header"]
    assert header.pop("chunk_size") == "400"
    assert len(header) == 4
    parts = []
    for number, url in sorted(header.items()):
        at = 400 * (int(number) - 1)
        status, headers, _ = ask(hub, "PUT", url, data=data[at : at + 400], token=None)
        assert status == 200
        parts.append({"partNumber": int(number), "etag": headers["ETag"]})
    too_few = {"oid": sha, "parts": parts[:-1]}
    assert ask(hub, "POST", actions["upload"]["href"], too_few)[0] == 400
    assert ask(hub, "POST", actions["upload"]["href"], {"oid": sha, "parts": parts})[0] == 200
    assert batch(hub, "parts", data)[1] == {}, "an object that is there is not asked for again"
    line = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": sha, "size": len(data)}}
    assert commit(hub, repo, line)[0] == 200
    assert hub.blob(sha).read_bytes() == data

    sha, actions = batch(hub, "parts", b"right")
    assert ask(hub, "PUT", actions["upload"]["href"], data=b"wrong", token=None)[0] == 400
    assert not hub.blob(sha).exists()


def test_the_store_is_another_origin_that_wants_a_signature_and_no_token(hub):
    repo = make(hub, "origin")
    commit(hub, repo, store(hub, "origin", "w.bin", b"0123456789"), regular("config.json", b"{}"))
    status, headers, _ = ask(hub, "GET", "/org/origin/resolve/main/w.bin")
    assert status == 302
    url = headers["Location"]
    assert urlsplit(url).netloc == urlsplit(hub.store_url).netloc != urlsplit(hub.url).netloc
    assert headers["X-Linked-Size"] == "10"
    assert headers["X-Linked-Etag"].strip('"') == hashlib.sha256(b"0123456789").hexdigest()
    assert headers["X-Repo-Commit"] == head_of(hub, repo)
    assert ask(hub, "GET", url, token=None)[2] == b"0123456789"
    assert ask(hub, "GET", url, token=ALICE)[0] == 400
    assert ask(hub, "GET", url.replace("sig=ok", "sig="), token=None)[0] == 403

    status, headers, _ = ask(hub, "GET", "/org/origin/resolve/main/config.json")
    assert (status, headers["Location"][0]) == (307, "/")  # small files: on this origin
    assert ask(hub, "GET", headers["Location"])[2] == b"{}"


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=8-99", 206, b"89"),
        ("bytes=10-", 416, None),
    ],
)
def test_ranges_are_answered_exactly(hub, asked, status, content):
    if ("model", "org/ranges") not in hub.repos:
        commit(hub, make(hub, "ranges"), store(hub, "ranges", "w.bin", b"0123456789"))
    _, headers, _ = ask(hub, "GET", "/org/ranges/resolve/main/w.bin")
    found, headers, body = ask(hub, "GET", headers["Location"], token=None, headers={"Range": asked} if asked else {})
    assert found == status
    assert content is None or body == content
    assert content is None or headers["Content-Length"] == str(len(content))


def test_injected_faults_hit_the_requests_they_name_and_no_others(hub):
    repo = make(hub, "faults")
    busy = hub.fault("GET", r"/models/org/faults$", status=429, times=2, skip=1, headers={"Retry-After": "7"})
    answers = [ask(hub, "GET", repo) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 429, 429, 200]
    assert answers[1][1]["Retry-After"] == "7"
    assert busy["hits"] == 2
    assert ask(hub, "GET", "/api/whoami-v2")[0] == 200

    data = b"y" * 900
    commit(hub, repo, store(hub, "faults", "w.bin", data), regular("config.json", b"{" + b" " * 500 + b"}"))
    for name in ("w.bin", "config.json"):
        url = ask(hub, "GET", f"/org/faults/resolve/main/{name}")[1]["Location"]
        hub.fault("GET", r"/_store/get|resolve-cache", cut=300)
        with pytest.raises(http.client.IncompleteRead) as error:
            ask(hub, "GET", url, token=None if name == "w.bin" else ALICE)
        assert len(error.value.partial) == 300

    head = head_of(hub, repo)
    hub.fault("POST", r"/commit/", cut=20)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        commit(hub, repo, regular("a", b"1"))
    assert head_of(hub, repo) == head, "a commit that was cut on its way did not happen"
    hub.fault("POST", r"/commit/", lost=True)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        commit(hub, repo, regular("a", b"1"))
    assert head_of(hub, repo) != head, "a commit whose answer was lost did"


def test_after_an_outage_the_same_address_has_the_same_files(hub):
    repo = make(hub, "outage")
    kept = http.client.HTTPConnection("127.0.0.1", urlsplit(hub.url).port, timeout=10)
    kept.request("GET", repo)
    assert kept.getresponse().read()
    hub.down()
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(hub, "GET", repo)
    with pytest.raises((http.client.HTTPException, ConnectionError)):  # a connection from before
        kept.request("GET", repo), kept.getresponse()
    kept.close()
    hub.up()
    assert ask(hub, "GET", repo)[0] == 200


def test_the_log_names_each_request_and_the_token_that_came_with_it(hub):
    path = "/api/whoami-v2?of=the-log"
    for token in (BOB, None):
        ask(hub, "GET", path, token=token)
    told: list[dict] = []
    while len(told) < 2:  # a request is logged just after it was answered
        time.sleep(0.01)
        told = [row for row in hub.log if row["path"] == path]
    found = {(row["m"], row["status"], row["auth"], row["port"]) for row in told}
    assert found == {("GET", 200, f"Bearer {BOB}"[-14:], "hub"), ("GET", 401, None, "hub")}


def test_renamed_and_deleted_repositories(hub):
    make(hub, "old")
    assert ask(hub, "POST", "/api/repos/move", {"fromRepo": "org/old", "toRepo": "org/new"})[0] == 200
    status, headers, _ = ask(hub, "GET", "/api/models/org/old")
    assert (status, headers["Location"]) == (307, "/api/models/org/new")
    assert ask(hub, "DELETE", "/api/repos/delete", {"name": "new", "organization": "org"})[0] == 200
    assert ask(hub, "GET", "/api/models/org/new")[0] == 404


def test_a_stranger_opens_a_pull_request_and_only_a_member_merges_it(hub):
    repo = make(hub, "pull")
    head = head_of(hub, repo)
    status, _, body = commit(hub, repo, regular("a", b"1"), token=BOB, query="?create_pr=1")
    assert status == 200
    assert json.loads(body)["pullRequestUrl"].endswith("/org/pull/discussions/1")
    assert head_of(hub, repo) == head
    assert ask(hub, "GET", "/org/pull/raw/refs%2Fpr%2F1/a", token=None)[0] in (200, 307)
    assert ask(hub, "POST", f"{repo}/discussions/1/merge", {}, token=BOB)[0] == 403
    assert ask(hub, "POST", f"{repo}/discussions/1/merge", {})[0] == 200
    assert "a" in hub.resolve(hub.repos["model", "org/pull"], "main").tree


def test_branches_and_tags_name_commits(hub):
    repo = make(hub, "named")
    first = head_of(hub, repo)
    assert ask(hub, "POST", f"{repo}/branch/dev", {})[0] == 200
    assert ask(hub, "POST", f"{repo}/branch/dev", {})[0] == 409
    assert ask(hub, "POST", f"{repo}/tag/main", {"tag": "v1"})[0] == 200
    assert commit(hub, repo, regular("a", b"1"), revision="dev")[0] == 200
    refs = json.loads(ask(hub, "GET", f"{repo}/refs")[2])
    heads = {row["name"]: row["targetCommit"] for row in refs["branches"]}
    assert heads["main"] == first != heads["dev"]
    assert [(row["name"], row["targetCommit"]) for row in refs["tags"]] == [("v1", first)]
    assert ask(hub, "GET", "/org/named/resolve/main/a")[0] == 404
    assert ask(hub, "GET", "/org/named/resolve/dev/a")[0] == 307


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("", {"model_type": "vit", "architectures": ["ViTForImageClassification"]}, ("transformers", "image-class", 0)),
        ("", {"model_type": "vit", "architectures": ["ViTModel"]}, ("transformers", None, 0)),
        ("", {"architecture": "resnet18", "num_classes": 3}, ("timm", "image-class", 0)),
        ("library_name: hf_mae", {"model_type": "hf_mae", "auto_map": {"AutoModel": "m.M"}}, ("hf_mae", None, 1)),
        ("pipeline_tag: image-feature-extraction", {"model_type": "vit"}, ("transformers", "image-featu", 0)),
    ],
)
def test_the_answer_about_a_model_follows_from_its_files(hub, card, config, expected):
    name = f"info{len(hub.repos)}"
    repo = make(hub, name)
    readme = f"---\nlicense: mit\n{card}\n---\n# Title\n".encode()
    files = [regular("README.md", readme), regular("config.json", json.dumps(config).encode())]
    commit(hub, repo, *files, store(hub, name, "model.safetensors", safetensors(3, 5)))
    info = json.loads(ask(hub, "GET", repo)[2])
    task = info.get("pipeline_tag")
    assert (info["library_name"], task and task[:11], int("custom_code" in info["tags"])) == expected
    assert {"safetensors", "license:mit"} <= set(info["tags"])
    assert info["safetensors"] == {"parameters": {"F32": 15}, "total": 15}


def test_stock_clients_tell_its_errors_apart_and_get_back_what_they_sent(hub, client_env, run_client):
    start = len(hub.log)
    for name, settings in (("gate", {"gated": "auto"}), ("hidden", {"private": True})):
        make(hub, name, **settings)
    code = textwrap.dedent(
        """
        import os, pathlib
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub import CommitOperationAdd as Add
        from huggingface_hub.errors import (
            EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError)

        api, bob = HfApi(), HfApi(token="hf_bob_write")
        folder = pathlib.Path("folder"); (folder / "sub").mkdir(parents=True)
        sent = {"sub/w.safetensors": os.urandom(5000), "s.bin": os.urandom(500), "README.md": b"---\\ntags: [a]\\n---"}
        for name, data in sent.items():
            (folder / name).write_bytes(data)
        api.create_repo("org/stock")
        head = api.model_info("org/stock").sha
        first = api.upload_folder(repo_id="org/stock", folder_path=folder)
        back = pathlib.Path(snapshot_download("org/stock"))
        assert {n: (back / n).read_bytes() for n in sent} == sent
        again = api.upload_folder(repo_id="org/stock", folder_path=folder)
        assert again.oid == first.oid == api.model_info("org/stock").sha

        def refused(kind, call, status):
            try:
                call()
            except HfHubHTTPError as error:
                assert type(error) is kind, (type(error), error)
                assert error.response.status_code == status, error
            else:
                raise AssertionError(kind)

        refused(RepositoryNotFoundError, lambda: api.model_info("org/none"), 404)
        refused(RepositoryNotFoundError, lambda: bob.model_info("org/hidden"), 404)
        refused(RevisionNotFoundError, lambda: api.model_info("org/stock", revision="nope"), 404)
        refused(GatedRepoError, lambda: bob.auth_check("org/gate"), 403)
        refused(HfHubHTTPError, lambda: api.create_commit("org/stock", [Add("a", b"1")], commit_message="late",
                                                          parent_commit=head), 412)
        refused(HfHubHTTPError, lambda: HfApi(token="hf_alice_read").create_repo("org/new"), 403)
        try:
            hf_hub_download("org/stock", "none.txt")
        except EntryNotFoundError as error:
            print("done")
        """
    )
    assert run_client(code, client_env) == "done\n"
    parts = [row for row in hub.log[start:] if "/_store/part/" in row["path"]]
    assert len(parts) == 13  # 5,000 bytes in parts of 400
    assert not [row for row in hub.log[start:] if row["port"] == "store" and row["auth"] and row["status"] < 400]
