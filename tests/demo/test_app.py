"""The page and the Space: served from a process of their own, called as a visitor's client calls them."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import BitImageProcessor, ViTConfig, ViTForImageClassification

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.demo.app import build, launch
from hf_mae.demo.space import REQUIREMENTS, write_space

pytest.importorskip("gradio", reason='needs gradio (pip install "hf_mae[demo]")')

SIZES = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
REVISION = "0" * 40

# A visitor: the answers of the page in one line of JSON.
VISIT = """
import json, sys
from gradio_client import Client, handle_file
client, picture = Client(sys.argv[1], verbose=False), handle_file(sys.argv[2])
said = {"ends": sorted(client.view_api(return_format="dict", print_info=False)["named_endpoints"])}
tiles, note = client.predict(picture, 0.5, "random", 0, api_name="/reconstruct")
said["tiles"], said["note"] = [tile["caption"] for tile in tiles], note
said["classes"] = client.predict(picture, api_name="/classify")["confidences"]
said["errors"] = []
for call in ((picture, 0.6, "grid", 0), (handle_file(sys.argv[3]), 0.5, "random", 0), (None, 0.5, "random", 0)):
    try:
        client.predict(*call, api_name="/reconstruct")
    except Exception as error:
        said["errors"].append(str(error))
print(json.dumps(said))
"""


def _write_models(pretrained: Path, classifier: Path) -> None:
    torch.manual_seed(0)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    MAEForPreTraining(MAEConfig(**SIZES, **decoder)).save_pretrained(pretrained)
    labels = {0: "ant", 1: "bee"}
    config = ViTConfig(**SIZES, intermediate_size=32, id2label=labels, label2id={v: k for k, v in labels.items()})
    ViTForImageClassification(config).save_pretrained(classifier)
    for folder in (pretrained, classifier):
        BitImageProcessor(
            do_convert_rgb=True, size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}
        ).save_pretrained(folder)


@contextmanager
def _serving(command: list[str], cwd: Path, env: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Start a page and yield its address and what it printed; end it by its own process id."""
    process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    seen: list[str] = []
    try:
        while True:
            line = lines.get(timeout=120)
            assert line is not None, "the page ended: " + "".join(seen)[-3000:]
            seen.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0], "".join(seen)
                return
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stdout is not None
        process.stdout.close()


def _visit(url: str, tmp_path: Path) -> dict:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    (tmp_path / "notes.png").write_text("no picture")
    done = subprocess.run(
        [sys.executable, "-I", "-c", VISIT, url, str(tmp_path / "red.png"), str(tmp_path / "notes.png")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _environment(tmp_path: Path) -> dict[str, str]:
    quiet = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1"}
    return os.environ | quiet | {"GRADIO_TEMP_DIR": str(tmp_path / "gradio"), "HF_HOME": str(tmp_path / "home")}


def _check_answers(said: dict) -> None:
    assert said["ends"] == ["/classify", "/reconstruct"]
    assert said["tiles"] == ["original", "masked", "predicted", "pasted"]
    assert "8 of 16 patches removed" in said["note"]
    assert {answer["label"] for answer in said["classes"]} == {"ant", "bee"}
    grid, notes, nothing = said["errors"]
    assert "use mask_ratio 0.5 or 0.75" in grid
    assert "no picture that can be read" in notes
    assert "There is no picture yet" in nothing


@pytest.mark.slow
def test_the_page_answers_and_leaves_no_file_in_the_package(tmp_path):
    _write_models(tmp_path / "pretrained", tmp_path / "classifier")
    code = (
        "from hf_mae.demo.app import launch\n"
        f"launch(reconstruct={str(tmp_path / 'pretrained')!r}, classify={str(tmp_path / 'classifier')!r}, "
        f"port={_free_port()}, say=lambda line: print(line, flush=True))"
    )
    with _serving([sys.executable, "-c", code], tmp_path, _environment(tmp_path)) as (url, _):
        _check_answers(_visit(url, tmp_path))
    import hf_mae.demo

    assert not list(Path(hf_mae.demo.__file__).parent.glob("*.pyi"))  # gradio writes them for classes of one's own


@pytest.mark.slow
def test_a_space_runs_from_its_own_folder_without_this_checkout(tmp_path):
    for name in ("mae-tiny", "vit-tiny"):  # the cache as a download leaves it
        repository = tmp_path / "home" / "hub" / f"models--org--{name}"
        (repository / "snapshots" / REVISION).mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)
    models = [
        tmp_path / "home" / "hub" / f"models--org--{n}" / "snapshots" / REVISION for n in ("mae-tiny", "vit-tiny")
    ]
    _write_models(*models)
    space = write_space(tmp_path / "space", reconstruct="org/mae-tiny", classify="org/vit-tiny")
    checkout = Path(__file__).resolve().parents[2]
    # The checkout is taken off the path and the Space put on it, as `python app.py` does; then app.py runs as it is.
    code = f"""
import atexit, json, runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = ["."] + [p for p in sys.path if p not in ("", {str(checkout)!r})]
import hf_mae, gradio
assert hf_mae.__file__.startswith({str(space)!r}), hf_mae.__file__
start = gradio.Blocks.launch
def launch(page, **options):
    import hf_mae.demo.app
    print("IMPORTED", json.dumps(sorted({{m.partition(".")[0] for m in sys.modules}})), flush=True)
    return start(page, **options)
gradio.Blocks.launch = launch
runpy.run_path("app.py", run_name="__main__")
"""
    env = _environment(tmp_path) | {"GRADIO_SERVER_PORT": str(_free_port())}
    with _serving([sys.executable, "-u", "-c", code], space, env) as (url, printed):
        _check_answers(_visit(url, tmp_path))
    # What the package needs and the Space leaves out is not imported, but for what gradio brings itself.
    imported = set(json.loads(re.findall(r"^IMPORTED (.*)$", printed, re.MULTILINE)[0]))
    brought = {re.split(r"[^\w.-]", line)[0] for line in metadata.requires("gradio") or ()}
    left_out = {re.split(r"[^\w.-]", line)[0] for line in _needed() - set(REQUIREMENTS)} - brought
    assert not left_out & imported


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_files_of_a_space_say_what_the_hub_reads(tmp_path):
    import gradio

    out = write_space(tmp_path / "space", reconstruct="org/mae", classify=None, title='A "title": with marks')
    front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert front == {
        "title": 'A "title": with marks',
        "sdk": "gradio",
        "sdk_version": gradio.__version__,
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": ["org/mae"],
    }
    assert 'build(reconstruct="org/mae", classify=None)' in (out / "app.py").read_text()
    assert (out / "hf_mae" / "demo" / "app.py").is_file()
    assert not [p for p in out.rglob("*") if "__pycache__" in p.parts or p.suffix in (".pyc", ".pyi")]
    assert str(tmp_path) not in "".join(p.read_text() for p in (out / "README.md", out / "app.py"))
    assert (out / "requirements.txt").read_text().splitlines()[1:] == list(REQUIREMENTS)


def _needed() -> set[str]:
    """The dependencies of pyproject.toml."""
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    block = project.split("dependencies = [", 1)[1].split("\n]", 1)[0]
    return set(re.findall(r'^\s+"([^"]+)"', block, re.MULTILINE))


def test_requirements_are_those_of_the_package():
    assert set(REQUIREMENTS) <= _needed()


def test_a_space_is_written_again_only_when_asked_and_over_its_own_files(tmp_path):
    out = tmp_path / "space"
    (out / ".git").mkdir(parents=True)  # the cloned repository of a new Space
    new = "Check out the configuration reference at https://huggingface.co/docs/hub/spaces-config-reference"
    (out / "README.md").write_text(f"---\nsdk: gradio\n---\n\n{new}\n")
    write_space(out, reconstruct=None, classify="org/a")
    with pytest.raises(ValueError, match="holds a Space already"):
        write_space(out, reconstruct=None, classify="org/b")
    (out / "notes.txt").write_text("mine")
    write_space(out, reconstruct=None, classify="org/b", overwrite=True)
    assert "org/b" in (out / "app.py").read_text()
    assert (out / ".git").is_dir()
    assert (out / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["space"]  # nothing half-written
    (out / "app.py").write_text("print('mine')")
    with pytest.raises(ValueError, match="did not write"):
        write_space(out, reconstruct=None, classify="org/b", overwrite=True)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "requirements.txt", "app.py", "hf_mae"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_somebody_else_are_never_replaced(tmp_path, name, overwrite):
    (tmp_path / "README.md").write_text("---\nsdk: gradio\n---\n")  # of a new Space
    (tmp_path / name).write_bytes(b"mine, \xff and not sdk: gradio\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"holds {re.escape(name)} that hf-mae space did not write; .*move it away"):
        write_space(tmp_path, reconstruct=None, classify="org/a", overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / name).read_bytes().startswith(b"mine")


@pytest.mark.parametrize(
    "text",
    [
        "# Mine\n",
        "---\ntitle: x\n---\nsdk: gradio\n",
        "---\nsdk: docker\n---\n",
        "sdk: gradio\n",
        "---\nsdk: gradio\n---\nMy own words.\n",
    ],
)
def test_only_the_readme_of_a_new_space_is_replaced(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ValueError, match=r"holds README\.md that"):
        write_space(tmp_path, reconstruct=None, classify="org/a")
    assert (tmp_path / "README.md").read_text() == text


def test_a_licence_put_in_place_of_ours_stays(tmp_path):
    write_space(tmp_path, reconstruct=None, classify="org/a")
    assert "Apache License" in (tmp_path / "LICENSE").read_text()
    (tmp_path / "LICENSE").write_text("my own")
    write_space(tmp_path, reconstruct=None, classify="org/a", overwrite=True)
    assert (tmp_path / "LICENSE").read_text() == "my own"


def test_a_space_copies_code_and_templates_and_nothing_else_that_lies_there(tmp_path, monkeypatch):
    from hf_mae.demo import space

    package = tmp_path / "hf_mae"
    for name in ("__init__.py", "py.typed", "data/x.py", "model_cards/base.md.jinja", "model_cards/pictures/a.png"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    wanted = sorted(p.relative_to(package) for p in package.rglob("*") if p.is_file())
    for name in ("notes.txt", "data/secret.json", "data/x.pyi", "__pycache__/x.py", ".cache/x.py", "model_cards/.env"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    monkeypatch.setattr(space.hf_mae, "__file__", str(package / "__init__.py"))
    out = write_space(tmp_path / "space", reconstruct=None, classify="org/a")
    assert sorted(p.relative_to(out / "hf_mae") for p in (out / "hf_mae").rglob("*") if p.is_file()) == wanted


def test_how_many_visitors_may_wait_is_written_down(tmp_path):
    out = write_space(tmp_path, reconstruct=None, classify="org/a")
    assert "page.queue(max_size=32, default_concurrency_limit=1)\npage.launch(" in (out / "app.py").read_text()


def test_a_space_takes_published_models_only(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"folder of this machine.*hf-mae publish"):
        write_space(tmp_path / "space", reconstruct=str(tmp_path / "run"), classify=None)
    for name in ("mae", "org/../x", 'org/x"; import os', "hf-hub:org/x", "./absent"):
        with pytest.raises(ValueError, match="is no Hub id"):
            write_space(tmp_path / "space", reconstruct=None, classify=name)
    with pytest.raises(ValueError, match="no model is named"):
        write_space(tmp_path / "space", reconstruct=None, classify=None)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write_space(tmp_path / "file", reconstruct=None, classify="org/x")
    assert not (tmp_path / "space").exists()


def test_what_the_page_cannot_show_is_said_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="no model is named"):
        build(reconstruct=None, classify=None)
    with pytest.raises(ValueError, match=r"examples: .* is not a file"):
        build(reconstruct="absent/absent", classify=None, examples=[tmp_path / "absent.jpg"])


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'pip install "hf_mae\[demo\]"'):
        launch(reconstruct="absent/absent", classify=None)
