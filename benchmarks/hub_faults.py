"""Every fault of a Hub while our commands publish, load and pull: what the user sees, and what is left behind.

    python benchmarks/hub_faults.py --out benchmarks/hub_faults.md

The Hub is the loopback server of the tests. Waits are counted, not waited: `time.sleep` is cut to a hundredth of a
second, and the table says how long the pauses would have been. The checks that need no network (card, pipeline, usage
lines) run for real in the first publish and are taken as passed in the others. `--kill` adds the upload of 200 MB that
is killed with SIGKILL and run again, once by LFS and, where hf_xet is installed, once by xet. What is asked with xet on
is asked of a process of its own, because the client reads that switch when it is imported. `--json` writes the rows for
tests/hub/test_faults.py.
"""

# ruff: noqa: E402 (the Hub's address is read when huggingface_hub is imported)

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.hub.server import HubServer

FOLDER = Path(tempfile.mkdtemp(prefix="hub_faults_"))
HUB: Any = None


def connect() -> None:
    """Start a Hub and point this process at it, unless it is a client of another process's Hub."""
    global HUB
    if "--client" in sys.argv:
        return
    HUB = HubServer()
    os.environ.update(HUB.env(str(FOLDER / "home")))
    os.environ.update({"HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"})


connect()

import torch
from huggingface_hub import HfApi

import hf_mae.hub.publish as publishing
import hf_mae.hub.pull as pulling
from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.cards.options import CardOptions
from hf_mae.exporting.write import export
from hf_mae.hub.widget import Verdict
from hf_mae.run import model_folder

CARD = CardOptions(license="apache-2.0", data_license="none: the weights are random")
REAL_SLEEP = time.sleep
WAITED: list[float] = []


def count_sleep(seconds: float) -> None:
    """Sleep a little, and note how long was asked for."""
    WAITED.append(seconds)
    REAL_SLEEP(min(seconds, 0.01))


class Listener(logging.Handler):
    """Hears the waits of commands that take no `say`."""

    said: list[str] = []  # noqa: RUF012

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


LISTENER = Listener()
logging.getLogger("hf_mae.patience").addHandler(LISTENER)


def pass_local_checks() -> None:
    """Take what needs no network as passed."""
    publishing.run_usage = lambda *_, **__: {"blocks": [], "mode": "taken as passed by this benchmark"}
    publishing.check_folder = lambda *_, **__: Verdict((), True, "taken as passed by this benchmark")


def make_model() -> Path:
    """Write a small classifier of random weights, for loads, and its stock export, to publish."""
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    MAEForImageClassification(config).save_pretrained(FOLDER / "model")
    return export(FOLDER / "model", FOLDER / "export", "auto")


# ------------------------------------------------------------------------------------------------ one row


Do = Callable[[str, Callable[[str], None]], Any]


def tree_of(repo_id: str) -> dict[str, str] | None:
    repo = HUB.repos.get(("model", repo_id))
    if repo is None:
        return None
    return {path: entry.oid for path, entry in repo.commits[repo.refs["refs/heads/main"]].tree.items()}


def case(name: str, fault: str, do: Do, *, command: str, prepare: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Run a command under a fault; say what was told, what came out, and whether anything is half there."""
    repo_id = f"org/fault-{name}"
    HUB.faults.clear()
    injected = prepare(repo_id) if prepare else None
    before = tree_of(repo_id)
    WAITED.clear()
    said: list[str] = []
    LISTENER.said = said
    outcome, told = "done", ""
    try:
        do(repo_id, said.append)
    except (ValueError, RuntimeError, OSError) as error:
        outcome, told = type(error).__name__, str(error)
    waits = [line for line in said if "trying again in" in line]
    HUB.faults.clear()
    after = tree_of(repo_id)
    # A new repository has nothing but what the Hub itself puts there.
    untouched, empty = after == before, before is None and set(after or {}) == {".gitattributes"}
    complete = after is not None and {"README.md", "model.safetensors", "config.json"} <= set(after)
    return {
        "name": name, "fault": fault, "command": command, "outcome": outcome, "told": told, "waits": waits,
        "said": said, "waited": round(sum(WAITED)), "hits": injected["hits"] if isinstance(injected, dict) else None,
        "state": "untouched" if untouched else "empty" if empty else "whole" if complete else "HALF",
    }  # fmt: skip


def publish_it(repo_id: str, say: Callable[[str], None]) -> None:
    publishing.publish(FOLDER / "export", repo_id, card=CARD, say=say)


def fault(method: str, path: str, **options: Any) -> Callable[[str], Any]:
    """Prepare a fault for a case; {repo} in the path is its repository."""
    return lambda repo_id: HUB.fault(method, path.replace("{repo}", repo_id), **options)


@contextmanager
def token(value: str | None) -> Iterator[None]:
    kept = os.environ["HF_TOKEN"]
    os.environ["HF_TOKEN"] = value or ""
    yield
    os.environ["HF_TOKEN"] = kept


def with_token(value: str | None, do: Callable[..., None]) -> Callable[..., None]:
    def run(repo_id: str, say: Callable[[str], None]) -> None:
        try:
            with token(value):
                do(repo_id, say)
        finally:
            os.environ["HF_TOKEN"] = "hf_alice_write"

    return run


def anew(prepare: Callable[[str], Any]) -> Callable[[str], Any]:
    """Make the Hub forget the files of earlier cases: it takes no file twice."""

    def forget(repo_id: str) -> Any:
        shutil.rmtree(HUB.root / "lfs", ignore_errors=True)
        return prepare(repo_id)

    return forget


def lose_answer(repo_id: str) -> None:
    """The next commit is made, and its answer does not arrive."""

    def cut(*_: Any) -> None:
        HUB.on_commit.remove(cut)
        raise ConnectionResetError

    HUB.on_commit.append(cut)


def push_between(repo_id: str) -> None:
    """Someone else's commit lands while ours is on its way."""
    HfApi().create_repo(repo_id, exist_ok=True)
    original = HUB.take_fault

    def take(method: str, path: str) -> Any:
        if "/commit/" in path and repo_id in path:
            HUB.take_fault = original
            repo = HUB.repos["model", repo_id]
            head = repo.refs["refs/heads/main"]
            HUB.add_commit(repo, "refs/heads/main", dict(repo.commits[head].tree), "theirs", "", "carol", head)
        return original(method, path)

    HUB.take_fault = take


@contextmanager
def full_disk(module: Any, name: str) -> Iterator[None]:
    """Let a function that writes find no room."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = getattr(module, name)
    setattr(module, name, fail)
    try:
        yield
    finally:
        setattr(module, name, kept)


def publish_without_room(repo_id: str, say: Callable[[str], None]) -> None:
    with full_disk(shutil, "copyfile"):
        publish_it(repo_id, say)


@contextmanager
def no_network() -> Iterator[None]:
    """Drop every connection."""

    def drop(*_: Any) -> None:
        raise ConnectionResetError

    kept, HUB.take_fault = HUB.take_fault, drop
    try:
        yield
    finally:
        HUB.take_fault = kept


def publish_without_network(repo_id: str, say: Callable[[str], None]) -> None:
    with no_network():
        publish_it(repo_id, say)


def publish_cases() -> Iterator[dict[str, Any]]:
    def row(name: str, words: str, prepare: Any = None, do: Any = publish_it) -> dict[str, Any]:
        return case(name, words, do, command="publish", prepare=prepare)

    retry = {"Retry-After": "1"}
    yield row("plain", "none")
    yield row("no-token", "no token", do=with_token(None, publish_it))
    yield row("bad-token", "401: unknown token", do=with_token("hf_nobody", publish_it))
    yield row("read-token", "a token with the role read", do=with_token("hf_alice_read", publish_it))
    yield row("not-mine", "403: not a member of the organisation", do=with_token("hf_bob_write", publish_it))
    yield row("whoami", "whoami: 429, then 503", fault("GET", "whoami", status=429, times=1, headers=retry))
    yield row("create", "create_repo: 503, twice", fault("POST", "/api/repos/create", status=503, times=2))
    yield row("info", "model_info: 429, twice", fault("GET", "/api/models/{repo}", status=429, times=2, headers=retry))
    yield row("preupload", "preupload: 503, eight times", fault("POST", "/preupload/", status=503, times=8))
    yield row("batch", "LFS batch: 503, twice", anew(fault("POST", "/lfs/objects/batch", status=503, times=2)))
    yield row("put", "PUT of a file: 503, twice", anew(fault("PUT", "/_store/", status=503, times=2)))
    yield row("put-cut", "PUT of a file: cut", anew(fault("PUT", "/_store/", cut=100, times=2)))
    yield row("put-never", "PUT of a file: 503 for ever", anew(fault("PUT", "/_store/", status=503, times=10**6)))
    yield row("commit-500", "commit: 500, three times", fault("POST", "/commit/", status=500, times=3))
    yield row("commit-never", "commit: 500 for ever", fault("POST", "/commit/", status=500, times=10**6))
    yield row("commit-cut", "commit: cut before it is made", fault("POST", "/commit/", cut=10, times=1))
    yield row("commit-lost", "commit: made, its answer lost", lose_answer)
    yield row("commit-403", "commit: 403, the token was revoked", fault("POST", "/commit/", status=403, times=9))
    yield row("commit-412", "commit: 412, someone else pushed", push_between)
    yield row("commit-409", "commit: 409, a conflict", fault("POST", "/commit/", status=409, times=9))
    yield row("no-space", "no space left for the copy", do=publish_without_room)
    yield row("card-400", "the Hub refuses the card: 400", fault("POST", "/validate-yaml", status=400, times=9))
    yield row("tree", "reading back: 503, eight times", fault("GET", "/tree/", status=503, times=8))
    yield row("away", "no network", do=publish_without_network)


def load_cases() -> Iterator[dict[str, Any]]:
    def load(repo_id: str, say: Callable[[str], None], **more: Any) -> None:
        cache = tempfile.mkdtemp(dir=FOLDER)
        MAEForImageClassification.from_pretrained(more.pop("name", "org/ours"), cache_dir=cache, **more)

    api = HfApi()
    for name in ("org/ours", "bob/hidden", "org/gated"):
        HUB.create("model", name, ("alice" if name[:3] == "org" else "bob", "write", ["org"]), name == "bob/hidden")
    api.upload_folder(repo_id="org/ours", folder_path=FOLDER / "model")
    HUB.repos["model", "org/gated"].gated = "auto"

    def row(name: str, words: str, prepare: Any = None, do: Any = load) -> dict[str, Any]:
        return case(name, words, do, command="from_pretrained", prepare=prepare)

    def of(name: str, **more: Any) -> Callable[..., None]:
        return lambda repo_id, say: load(repo_id, say, name=name, **more)

    ours = "/org/ours/"
    yield row("load", "none")
    yield row("load-get", "GET of the weights: 503, three times", fault("GET", "/_store/get", status=503, times=3))
    yield row("load-small", "GET of config.json: 503, twice", fault("GET", f"{ours}.*config.json", status=503, times=2))
    yield row("load-head", "HEAD: 503, eight times", fault("HEAD", "/resolve/", status=503, times=8))
    yield row("load-cut", "GET of the weights: cut", fault("GET", "/_store/get", cut=2000, times=2))
    yield row("load-never", "GET of the weights: 503 for ever", fault("GET", "/_store/get", status=503, times=10**6))
    yield row("load-missing", "no such repository", do=of("org/missing"))
    yield row("load-private", "a private repository of others", do=of("bob/hidden"))
    yield row("load-gated", "a gated repository", do=with_token("hf_bob_read", of("org/gated")))
    yield row("load-revision", "no such revision", do=of("org/ours", revision="nope"))

    def opened(repo_id: str, say: Callable[[str], None], name: str = "org/ours") -> None:
        model_folder(name, field="init_from")

    def named(name: str) -> Callable[..., None]:
        return lambda repo_id, say: opened(repo_id, say, name)

    def opening(name: str, words: str, prepare: Any = None, do: Any = opened) -> dict[str, Any]:
        return case(name, words, do, command="--init-from", prepare=prepare)

    small = fault("GET", f"{ours}.*config.json", status=503, times=3)
    yield opening("open-get", "GET of config.json: 503, three times", small)
    yield opening("open-missing", "no such repository", do=named("org/missing"))
    yield opening("open-gated", "a gated repository", do=with_token("hf_bob_read", named("org/gated")))
    yield from gated_cases()


def gated_cases() -> Iterator[dict[str, Any]]:
    """Every other command that loads a model or a run, at the repository of others that wants conditions accepted."""
    from hf_mae.demo.models import load_classifier, load_reconstructor

    commands: dict[str, Callable[[], Any]] = {
        "evaluate": lambda: model_folder("org/gated", field="model"),
        "export": lambda: export("org/gated", FOLDER / "gated"),
        "demo --reconstruct": lambda: load_reconstructor("org/gated"),
        "demo --classify": lambda: load_classifier("org/gated"),
    }
    for command, call in commands.items():
        do = with_token("hf_bob_read", lambda repo_id, say, call=call: call())
        yield case(f"gated-{command}", "a gated repository", do, command=command)


def pull_cases() -> Iterator[dict[str, Any]]:
    """A run with one checkpoint, made of bytes: pulling does not look into it."""
    from hf_mae.training.checkpoint import commit

    run = FOLDER / "run"
    temporary = run / "checkpoints" / ".tmp"
    (temporary / "model").mkdir(parents=True)
    shutil.copy(FOLDER / "model" / "model.safetensors", temporary / "model")
    for name in ("recipe.json", "training_state/state.json", "data_state/rank_0.json"):
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text("{}")
    commit(temporary, run / "checkpoints" / "step_00000002")
    (run / "recipe.json").write_text("{}")
    api = HfApi()
    api.create_repo("org/run", exist_ok=True)
    api.upload_folder(repo_id="org/run", folder_path=run, path_in_repo="run")

    api.create_repo("org/gated-run", exist_ok=True)
    api.upload_folder(repo_id="org/gated-run", folder_path=run, path_in_repo="run")
    HUB.repos["model", "org/gated-run"].gated = "auto"

    def gated(repo_id: str, say: Callable[[str], None]) -> None:
        pulling.pull("org/gated-run", FOLDER / "gated-run", say=say)

    def bring(repo_id: str, say: Callable[[str], None]) -> None:
        out = FOLDER / "pulled" / repo_id.rpartition("/")[2]
        try:
            pulling.pull("org/run", out, say=say)
        finally:
            if out.exists() and not (out / "checkpoints" / "step_00000002" / "manifest.json").is_file():
                raise AssertionError("half a run folder was left")

    def row(name: str, words: str, prepare: Any = None, do: Any = bring) -> dict[str, Any]:
        return case(name, words, do, command="pull", prepare=prepare)

    def without_room(repo_id: str, say: Callable[[str], None]) -> None:
        with full_disk(pulling, "hf_hub_download"):
            bring(repo_id, say)

    yield row("pull", "none")
    yield row("gated-pull", "a gated repository", do=with_token("hf_bob_read", gated))
    yield row("pull-no-space", "no space left for a file", do=without_room)
    yield row("pull-get", "GET of a file: 503, three times", fault("GET", "/_store/get", status=503, times=3))
    yield row("pull-cut", "GET of a file: cut", fault("GET", "/_store/get", cut=2000, times=2))
    yield row(
        "pull-tree", "tree: 429, eight times", fault("GET", "/tree/", status=429, times=8, headers={"Retry-After": "1"})
    )
    sha = next(e.sha256 for e in HUB.resolve(HUB.repos["model", "org/run"], "main").tree.values() if e.sha256)
    kept = HUB.blob(sha).read_bytes()
    HUB.blob(sha).write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    yield row("pull-damaged", "a file whose bytes are not those it was named by")
    HUB.blob(sha).write_bytes(kept)
    yield row("pull-damaged", "the same pull, after it was mended")


# ------------------------------------------------------------------------------------------------ killed and resumed


def large_export(files: int = 10, megabytes: int = 20) -> Path:
    """Make an export with ten files of noise beside it."""
    import numpy as np
    from safetensors.numpy import save_file

    big = FOLDER / "big"
    shutil.copytree(FOLDER / "export", big)
    draw = np.random.default_rng(0)
    (big / "extra").mkdir()
    for i in range(files):
        save_file({"noise": draw.integers(0, 256, megabytes << 20, dtype=np.uint8)}, big / "extra" / f"{i}.safetensors")
    return big


def killed_xet_upload(big: Path) -> dict[str, Any]:
    """The same by xet, whose store is a folder here: kill when half of it is there, run again, count what it grew.

    Xet finds chunks again through the list that it writes when a session ends, so a killed one is sent anew.
    """
    with HubServer(xet=True) as hub:
        environment = os.environ | hub.env(str(FOLDER / "xet_home"))
        command = [sys.executable, __file__, "--client", str(big), "org/big"]

        def stored() -> int:
            return sum(path.stat().st_size for path in (hub.root / "cas").rglob("*") if path.is_file())

        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while stored() < 90e6 and process.poll() is None:
            REAL_SLEEP(0.005)
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        first = stored()
        repo = hub.repos.get(("model", "org/big"))
        visible = sorted(hub.resolve(repo, "main").tree) if repo else []
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        repo = hub.repos["model", "org/big"]
        return {
            "killed while uploading": alive, "MB stored before the kill": round(first / 1e6, 1),
            "visible after the kill": visible, "exit of the second": again.returncode,
            "MB stored by the second": round((stored() - first) / 1e6, 1),
            "files there": len(hub.resolve(repo, "main").tree), "commits": len(repo.commits),
            "told": again.stdout[-1500:] + again.stderr[-1500:],
        }  # fmt: skip


def xet_cases() -> Iterator[dict[str, Any]]:
    """Faults while the client uploads by xet, from a process of its own for each."""
    with HubServer(xet=True) as hub:
        environment = os.environ | hub.env(str(FOLDER / "xet_rows"))
        faults = {
            "xet": ("none, by xet", None),
            "xet-commit-500": ("by xet; commit: 500, three times", ("POST", "/commit/", 500, 3)),
            "xet-token-404": ("by xet; no route for its write token", ("GET", "/xet-write-token/", 404, 10**6)),
        }
        for name, (words, injected) in faults.items():
            hub.faults.clear()
            if injected:
                method, path, status, times = injected
                hub.fault(method, path, status=status, times=times)
            repo_id, told = f"org/fault-{name}", FOLDER / f"{name}.json"
            command = [sys.executable, __file__, "--client", str(FOLDER / "export"), repo_id, "--json", str(told)]
            subprocess.run(command, env=environment, check=True, timeout=300, capture_output=True)
            row = json.loads(told.read_text())
            repo = hub.repos.get(("model", repo_id))
            files = set(hub.resolve(repo, "main").tree) if repo else set()
            whole = {"README.md", "model.safetensors", "config.json"} <= files
            empty = files == {".gitattributes"}
            state = "whole" if whole else "empty" if empty else "HALF" if files else "untouched"
            waits = [line for line in row["said"] if "trying again in" in line]
            yield {"name": name, "fault": words, "command": "publish", "waits": waits, "state": state, **row}


def run_client(folder: str, repo_id: str, told: Path | None) -> None:
    """Publish from this process to the Hub of another; with `told` the pauses are counted and the end is written."""
    pass_local_checks()
    if told is None:
        say: Callable[[str], Any] = lambda line: print(line, flush=True)  # noqa: E731
        publishing.publish(folder, repo_id, card=CARD, say=say)
        return
    time.sleep = count_sleep
    said: list[str] = []
    outcome, words = "done", ""
    try:
        publishing.publish(folder, repo_id, card=CARD, say=said.append)
    except (ValueError, RuntimeError, OSError) as error:
        outcome, words = type(error).__name__, str(error)
    waited = round(sum(WAITED))
    told.write_text(json.dumps({"outcome": outcome, "told": words, "said": said, "waited": waited, "hits": None}))


def killed_upload(big: Path, files: int = 10, megabytes: int = 20) -> dict[str, Any]:
    """Kill the upload of 200 MB after half of its ten files, then run it again; count what was sent each time."""
    slow = HUB.fault("PUT", "/_store/", delay=0.25, times=10**6)
    command = [sys.executable, __file__, "--client", str(big), "org/big"]

    def sent(start: int) -> int:
        return sum(r["in"] for r in HUB.log[start:] if r["m"] == "PUT" and r["status"] == 200)

    def stored() -> int:
        return sum(path.stat().st_size > (megabytes << 20) for path in (HUB.root / "lfs").rglob("*") if path.is_file())

    start = len(HUB.log)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while stored() < files // 2 and process.poll() is None:
        REAL_SLEEP(0.02)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    REAL_SLEEP(2)  # the server is still reading what was on its way
    finished, first = stored(), sent(start)
    after_kill = sorted(tree_of("org/big") or {})
    slow["times"] = 0
    start = len(HUB.log)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    second = sent(start)
    return {
        "killed while uploading": alive, "files finished before the kill": finished,
        "MB sent before the kill": round(first / 1e6, 1), "visible after the kill": after_kill,
        "exit of the second": again.returncode, "MB sent by the second": round(second / 1e6, 1),
        "files there": len(tree_of("org/big") or {}), "told": again.stdout[-1500:] + again.stderr[-1500:],
        "commits": len(HUB.repos["model", "org/big"].commits),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the table


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| command | fault | outcome | waits | seconds of pauses | on the Hub | what the user reads |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lost = [line for line in row["said"] if "was lost" in line]
        told = row["told"] or next(iter(row["waits"] + lost), "")
        told = (
            told.replace(str(FOLDER), "FOLDER")
            .replace(HUB.url, "HUB")
            .replace(tempfile.gettempdir(), "TMP")
            .replace("|", "\\|")
            .replace("\n", " ")
        )
        state = "" if row["command"] != "publish" else row["state"]
        lines.append(
            f"| {row['command']} | {row['fault']} | {row['outcome']} | {len(row['waits'])} | {row['waited']} | {state} "
            f"| {told} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the table, as Markdown")
    parser.add_argument("--json", type=Path, help="the rows")
    parser.add_argument("--kill", action="store_true", help="upload 200 MB, killed and run again")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        run_client(given.client[0], given.client[1], given.json)
        return
    make_model()
    said: list[str] = []
    publishing.publish(FOLDER / "export", "org/real", card=CARD, say=said.append)
    pass_local_checks()
    with_xet = find_spec("hf_xet") is not None
    killed: dict[str, dict[str, Any]] = {}
    if given.kill:
        big = large_export()
        killed["LFS"] = killed_upload(big)
        if with_xet:
            killed["xet"] = killed_xet_upload(big)
    by_xet = [*xet_cases()] if with_xet else []
    time.sleep = count_sleep
    rows = [*publish_cases(), *by_xet, *load_cases(), *pull_cases()]
    text = table(rows)
    for way, found in killed.items():
        text += f"\n200 MB by {way}, killed and run again:\n\n"
        text += "\n".join(f"- {name}: {value}" for name, value in found.items() if name != "told") + "\n"
    if given.out:
        given.out.write_text(text)
    else:
        print(text)
    if given.json:
        given.json.write_text(json.dumps({"rows": rows, "killed": killed, "real": said}, indent=1))
    HUB.close()
    shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
