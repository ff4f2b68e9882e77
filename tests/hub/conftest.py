"""A Hub on this machine, clients in clean processes, and the real parts: npm packages, a browser, a photograph.

Client code runs in processes of its own, because the Hub's address and the cache are read when huggingface_hub is
imported. What is not installed skips with its name; with HF_MAE_ALL_PARTS=1, which .ci/run sets once it has installed
them, it fails, so that nothing is left out unseen.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.hub.server import HubServer

NODE = Path(__file__).with_name("node")


def absent(what: str) -> NoReturn:
    """Skip for want of `what`; where all parts were promised, fail."""
    if os.environ.get("HF_MAE_ALL_PARTS") == "1":
        pytest.fail(f"{what}; HF_MAE_ALL_PARTS=1 says that it is there", pytrace=False)
    pytest.skip(what)


def clean_environment(hub: HubServer, home: Path, token: str = "hf_alice_write") -> dict[str, str]:
    """The environment of a client that knows nothing but this Hub: an empty cache, one thread, no other address."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "GRADIO_"))}
    local = {
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    return kept | hub.env(str(home), token) | local | quiet


@contextmanager
def serving(argv: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[str]:
    """A server in a process of its own, which prints its address first; its errors go to `log`."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            argv, env=dict(env), stdout=subprocess.PIPE, stderr=errors, text=True, cwd=log.parent
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), log.read_text()[-3000:]
            yield address
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """One Hub a test file: `org` belongs to alice, tokens are hf_{alice,bob}_{write,read}."""
    with HubServer() as server:
        yield server


@pytest.fixture
def client_env(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """A clean client of `hub`, with alice's write token and a cache of its own."""
    return clean_environment(hub, tmp_path / "hf_home")


@pytest.fixture(scope="session")
def run_client(tmp_path_factory) -> Callable[..., str]:
    """Run Python code (a str) or a command (a list) in a clean process; return what it printed, or fail with its end.

    Code runs isolated (`python -I`): it sees installed packages only, neither this folder nor PYTHONPATH.
    """

    def run(code_or_argv: str | Sequence[str], env: Mapping[str, str], *, cwd: Path | None = None, timeout=120) -> str:
        argv = [sys.executable, "-I", "-c", code_or_argv] if isinstance(code_or_argv, str) else list(code_or_argv)
        done = subprocess.run(
            argv,
            env=dict(env),
            cwd=cwd or tmp_path_factory.mktemp("client"),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A tiny classifier of ours, random but decided, as `hf_mae.export` writes it: a stock class, with a card."""
    from hf_mae import MAEConfig, MAEForImageClassification, export

    names = dict(enumerate(["dahlia", "tulip", "sunflower", "daisy", "rose", "pagoda", "bridge"]))
    config = MAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        id2label=names,
        label2id={name: index for index, name in names.items()},
        pool="mean",
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = MAEForImageClassification(config).eval()
        torch.nn.init.normal_(model.head.weight, std=0.3)  # or all scores are 1/7
    folder = export(model, tmp_path_factory.mktemp("exported") / "flowers")
    card = {"license": "mit", "library_name": "transformers", "pipeline_tag": "image-classification", "tags": ["mae"]}
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in card.items())
    (folder / "README.md").write_text(f"---\n{lines}---\n# Flowers\n")
    return folder


@pytest.fixture(scope="module")
def upload(hub: HubServer, run_client, tmp_path_factory) -> Callable[[Path, str], str]:
    """Upload a folder to `hub` with the stock client; return its repository's id."""

    def run(folder: Path, repo_id: str) -> str:
        code = "import sys, huggingface_hub as h; a = h.HfApi(); a.create_repo(sys.argv[1])\n"
        code += "a.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
        env = clean_environment(hub, tmp_path_factory.mktemp("hf_home"))
        run_client([sys.executable, "-I", "-c", code, repo_id, str(folder)], env)
        return repo_id

    return run


@pytest.fixture(scope="module")
def classifier(upload, exported: Path) -> str:
    """`org/flowers` on `hub`: the exported classifier."""
    return upload(exported, "org/flowers")


@pytest.fixture(scope="module")
def inference(hub: HubServer, classifier: str, tmp_path_factory) -> Iterator[str]:
    """The address of a serverless inference API that serves `classifier`."""
    if find_spec("api_inference_community") is None:
        absent("needs pip install api-inference-community")
    folder = tmp_path_factory.mktemp("inference")
    env = clean_environment(hub, folder / "hf_home") | {"TASK": "image-classification", "MODEL_ID": classifier}
    app = Path(__file__).with_name("inference_app.py")
    with serving([sys.executable, str(app)], env, folder / "errors.txt") as address:
        yield address


@pytest.fixture(scope="module")
def scores(hub: HubServer, classifier: str, run_client, picture: Path, tmp_path_factory) -> list[dict]:
    """What the stock pipeline answers for `classifier` on `picture`, all labels, best first."""
    code = "import json, sys; from transformers import pipeline\n"
    code += "print(json.dumps(pipeline('image-classification', sys.argv[1])(sys.argv[2], top_k=7)))"
    env = clean_environment(hub, tmp_path_factory.mktemp("hf_home"))
    return json.loads(run_client([sys.executable, "-I", "-c", code, classifier, str(picture)], env))


@pytest.fixture(scope="session")
def node_modules() -> Iterator[Path]:
    """A folder with our node scripts and the packages of node/package.json beside them, in exact versions.

    The packages are installed once into HF_MAE_NODE_MODULES (a folder that is kept) or into a temporary one.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        absent("needs node and npm (Debian: apt-get install nodejs npm)")
    wanted = (NODE / "package.json").read_bytes()
    with tempfile.TemporaryDirectory(prefix="hf_mae_node_") as temporary:
        cache = Path(os.environ.get("HF_MAE_NODE_MODULES") or Path(temporary) / "cache")
        installed = cache / "installed.json"
        if not installed.is_file() or installed.read_bytes() != wanted:
            cache.mkdir(parents=True, exist_ok=True)
            (cache / "package.json").write_bytes(wanted)
            options = ["--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(
                [npm, "install", *options], cwd=cache, capture_output=True, text=True, timeout=300, check=False
            )
            if done.returncode != 0:
                absent(f"npm could not install the packages of tests/hub/node: {done.stderr[-500:]}")
            installed.write_bytes(wanted)
        # Node looks for packages beside the script that asks for them.
        scripts = Path(temporary) / "scripts"
        shutil.copytree(NODE, scripts)
        (scripts / "node_modules").symlink_to(cache.resolve() / "node_modules", target_is_directory=True)
        yield scripts


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium (HF_MAE_CHROMIUM names another one)."""
    found = os.environ.get("HF_MAE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        absent("needs chromium (Debian: apt-get install chromium)")
    return found


@pytest.fixture(scope="session")
def picture() -> Path:
    """A real photograph that every installation has: a dahlia, 640 by 427 pixels (scikit-learn's sample image)."""
    return Path(str(files("sklearn.datasets") / "images" / "flower.jpg"))


@pytest.fixture(scope="session")
def screenshots(tmp_path_factory) -> Path:
    """Where screenshots go: HF_MAE_SCREENSHOTS to keep them for looking at."""
    kept = os.environ.get("HF_MAE_SCREENSHOTS")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()
