"""A run goes on elsewhere: from the Hub, in a new folder, with the same bits; nothing but safetensors and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hf_mae.training.checkpoint import RunLock, damage

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

TINY = ["--model.hidden-size", "16", "--model.num-hidden-layers", "1", "--model.num-attention-heads", "2"]
TINY += ["--global-batch", "32", "--log-every", "4", "--eval-every", "0", "--evals.pictures", "0", "--evals.no-rankme"]
TINY += ["--evals.train-examples", "64", "--evals.test-examples", "32", "--num-workers", "0", "--max-steps", "12"]
NAMES = ("model/model.safetensors", "training_state/optimizer.safetensors")

UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(sys.argv[1], exist_ok=True)
api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
"""

# The run goes on while its files are on their way: a row is added, and a newer checkpoint takes the place of the old.
GROWN = """
import sys
from pathlib import Path
import hf_mae.hub.publish as publishing
from hf_mae.cards.options import CardOptions
from hf_mae.hub.widget import Verdict
publishing.run_usage = lambda *_, **__: {"blocks": []}
publishing.check_folder = lambda *_, **__: Verdict((), True, "passed")
run, upload = Path(sys.argv[1]), publishing.HfApi.preupload_lfs_files

def grow(*arguments, **options):
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 13')
    (run / "checkpoints" / "step_00000012" / "model" / "model.safetensors").unlink(missing_ok=True)
    return upload(*arguments, **options)

publishing.HfApi.preupload_lfs_files = grow
card = CardOptions(license="apache-2.0", data_license="digits of scikit-learn")
publishing.publish(run, "org/grown", checkpoint=True, card=card)
"""

PULL = """
import sys
from hf_mae.hub.pull import pull
try:
    pull(sys.argv[1], sys.argv[2], say=print)
except (ValueError, RuntimeError) as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def straight(tmp_path_factory, run_client) -> Path:
    """A run of twelve updates with a checkpoint after the sixth and the twelfth."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "hf_mae.cli", "pretrain", "quickstart", *TINY, "--save-every", "6"]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run_client([*command, "--out", str(folder / "straight")], environment)
    return folder / "straight"


@pytest.fixture
def half(straight, tmp_path) -> Path:
    """What `publish --checkpoint` puts on the Hub of the run as it was after six updates."""
    import shutil

    from hf_mae.hub.stage import collect_checkpoint

    run = tmp_path / "half"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    staged = tmp_path / "staged"
    for path, local in collect_checkpoint(run):
        (staged / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(local, staged / path)
    return staged


@pytest.fixture
def pulled(client_env, run_client, tmp_path):
    def run(repo_id: str, folder: Path, *, upload: Path | None = None) -> str:
        if upload is not None:
            run_client([sys.executable, "-c", UPLOAD, repo_id, str(upload)], client_env)
        return run_client([sys.executable, "-c", PULL, repo_id, str(folder)], client_env)

    return run


def test_a_pulled_run_goes_on_with_the_same_bits(half, pulled, straight, run_client, client_env, tmp_path):
    out = tmp_path / "elsewhere"
    said = pulled("org/run", out, upload=half)
    assert "continues at step_00000006" in said
    assert (out / "last").read_text().strip() == "step_00000006"
    assert damage(out / "checkpoints" / "step_00000006") is None
    assert not list(tmp_path.glob(".pull_*"))
    command = [sys.executable, "-m", "hf_mae.cli", "pretrain", "quickstart", *TINY, "--save-every", "6"]
    run_client([*command, "--out", str(out)], client_env | {"HF_HUB_OFFLINE": "1"})
    for name in NAMES:
        there, here = (run / "checkpoints" / "step_00000012" / name for run in (straight, out))
        assert there.read_bytes() == here.read_bytes(), name
    rows = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k and k != "waiting_share"} for line in lines]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (straight, out))
    ]
    assert rows[0] == rows[1]


def test_a_second_pull_is_refused_and_leaves_the_run(half, pulled, tmp_path):
    out = tmp_path / "there"
    out.mkdir()
    (out / "mine").write_text("x")
    assert "ValueError: out=" in pulled("org/again", out, upload=half)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_repository_without_a_run_says_how_to_publish_one(half, pulled, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}")
    said = pulled("org/plain", tmp_path / "out", upload=tmp_path / "plain")
    assert "holds no run that can be continued" in said
    assert "hf-mae publish RUN ORG/NAME --checkpoint" in said
    assert not (tmp_path / "out").exists()


def test_only_safetensors_and_json_are_taken(half, pulled, tmp_path):
    for name in ("run/checkpoints/step_00000006/training_state/optimizer.pt", "run/evil.py", "run/run.sh"):
        (half / name).write_text("import os")
    out = tmp_path / "out"
    said = pulled("org/evil", out, upload=half)
    assert "left there, neither safetensors nor JSON of a run: run/" in said
    assert {p.suffix for p in out.rglob("*") if p.is_file()} == {".json", ".jsonl", ".safetensors", ""}
    assert [p.name for p in out.rglob("*") if p.is_file() and not p.suffix] == ["last"]


def test_names_that_lead_out_of_the_folder_take_nothing(half, pulled, hub, tmp_path):
    pulled("org/out", tmp_path / "first", upload=half)
    repo = hub.repos["model", "org/out"]
    head = repo.refs["refs/heads/main"]
    tree = dict(repo.commits[head].tree)
    tree["run/../../escaped.json"] = tree["run/recipe.json"]
    hub.add_commit(repo, "refs/heads/main", tree, "evil", "", "mallory", head)
    said = pulled("org/out", tmp_path / "second")
    assert "leads out of the folder; nothing of it is taken" in said
    assert not (tmp_path / "second").exists()
    assert not list(tmp_path.rglob("escaped.json"))


def test_a_checkpoint_that_is_not_what_its_manifest_says_is_refused(half, pulled, tmp_path):
    recipe = half / "run/checkpoints/step_00000006/recipe.json"
    recipe.write_text(recipe.read_text().replace("32", "64", 1))
    said = pulled("org/damaged", tmp_path / "out", upload=half)
    assert "holds a damaged checkpoint, step_00000006: recipe.json" in said
    assert not (tmp_path / "out").exists()


def test_a_pull_that_broke_off_keeps_what_had_arrived(half, pulled, hub, tmp_path):
    out = tmp_path / "out"
    broken = hub.fault("GET", r"/_store/get/", status=404, times=99, skip=1)
    said = pulled("org/broken", out, upload=half)
    assert "Error: pulling org/broken" in said
    assert not out.exists()
    arrived = list((tmp_path / ".pull_out" / "run").rglob("*.safetensors"))
    assert len(arrived) == 1
    broken["times"] = 0
    start = len(hub.log)
    said = pulled("org/broken", out)
    assert "continues at step_00000006" in said
    assert sum(r["m"] == "GET" and r["port"] == "store" for r in hub.log[start:]) == 1


def test_a_run_that_goes_on_while_it_is_published_arrives_as_it_was(straight, pulled, run_client, client_env, tmp_path):
    import shutil

    run = tmp_path / "grown"
    shutil.copytree(straight, run)
    run_client([sys.executable, "-c", GROWN, str(run)], client_env)
    assert "continues at step_00000012" in pulled("org/grown", tmp_path / "out")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert damage(tmp_path / "out" / "checkpoints" / "step_00000012") is None


@pytest.mark.parametrize("name", ["step_x", "step_00000001", "step_00000002.old"])
def test_a_repository_with_a_folder_that_is_no_checkpoint_is_no_run(pulled, tmp_path, name):
    staged = tmp_path / "staged" / "run"
    (staged / "checkpoints" / name).mkdir(parents=True)
    (staged / "checkpoints" / name / "manifest.json").write_text("{}")
    (staged / "recipe.json").write_text("{}")
    said = pulled(f"org/none-{name}", tmp_path / "out", upload=tmp_path / "staged")
    if name == "step_00000001":
        assert "manifest.json names no recipe.json, model/, training_state/, data_state/" in said
    else:
        assert "holds no run that can be continued" in said
    assert not (tmp_path / "out").exists()


def test_a_best_model_that_is_not_what_its_manifest_says_is_refused(half, pulled, tmp_path):
    best = half / "run" / "best"
    (best / "model").mkdir(parents=True)
    (best / "model" / "config.json").write_text("{}")
    (best / "manifest.json").write_text(json.dumps({"model/config.json": [2, "0" * 64]}))
    said = pulled("org/best", tmp_path / "out", upload=half)
    assert "holds a damaged best model: model/config.json does not match" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_no_pull_left_is_not_emptied_and_two_pulls_do_not_fill_one(half, pulled, tmp_path):
    foreign = tmp_path / ".pull_out"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("x")
    assert "was not left by a pull" in pulled("org/twice", tmp_path / "out", upload=half)
    assert (foreign / "mine.txt").read_text() == "x"
    busy = tmp_path / ".pull_busy"
    busy.mkdir()
    lock = RunLock(busy)
    lock.acquire()
    try:
        assert "is pulling into the same OUT" in pulled("org/twice", tmp_path / "busy")
    finally:
        lock.release()
    assert "continues at" in pulled("org/twice", tmp_path / "busy")
