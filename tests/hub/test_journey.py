"""From pictures to the Hub and back: push data, train on the stream, publish, load in every way, train again.

Every step is a process of its own that knows the Hub only by its address; every load starts from an empty cache.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hub.conftest import clean_environment
from tests.hub.server import HubServer

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

# Crops of the two photographs that scikit-learn brings: real pictures, two classes, no download.
PUSH = """
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from sklearn.datasets import load_sample_images
from PIL import Image as Pictures

def crops(start, count):
    rows = {"image": [], "label": []}
    draw = np.random.default_rng(start)
    for _ in range(count):
        for label, photograph in enumerate(load_sample_images().images):
            y, x = draw.integers(0, 300), draw.integers(0, 500)
            rows["image"].append(Pictures.fromarray(photograph[y : y + 100, x : x + 100]).resize((32, 32)))
            rows["label"].append(label)
    return Dataset.from_dict(rows, features=Features(image=Image(), label=ClassLabel(names=["pagoda", "flower"])))

DatasetDict(train=crops(0, 48), test=crops(1, 12)).push_to_hub("org/pictures", num_shards={"train": 3, "test": 1})
"""

SMALL = ["--max-steps", "12", "--global-batch", "16", "--log-every", "4", "--save-every", "6", "--num-workers", "0"]
TINY = ["--model.hidden-size", "32", "--model.num-hidden-layers", "2", "--model.num-attention-heads", "2"]
TINY_DECODER = ["--model.decoder-hidden-size", "16", "--model.decoder-num-attention-heads", "2"]
PRETRAIN = ["pretrain", "mae-vit-n-cifar10", "--data.path", "org/pictures", *SMALL, *TINY, *TINY_DECODER]
PRETRAIN += ["--eval-every", "6", "--evals.train-examples", "48", "--evals.test-examples", "24"]
TERMS = ["--license", "apache-2.0", "--data-license", "BSD-3-Clause (photographs of scikit-learn)", "--language", "en"]


@dataclass
class Story:
    """What the steps leave behind for the tests: the Hub, the folder of the runs, and what was printed."""

    hub: HubServer
    folder: Path
    printed: dict[str, str]

    def environment(self, home: str) -> dict[str, str]:
        return clean_environment(self.hub, self.folder / home)

    def command(self, *arguments: str, home: str = "home") -> str:
        return self._run([sys.executable, "-m", "hf_mae.cli", *arguments], self.environment(home))

    def fresh(self, code: str) -> str:
        """Run code that knows installed packages only, with an empty cache."""
        home = f"fresh_{len(list(self.folder.glob('fresh_*')))}"
        return self._run([sys.executable, "-I", "-c", code], self.environment(home))

    def _run(self, argv: list[str], environment: Mapping[str, str]) -> str:
        done = subprocess.run(
            argv,
            env=dict(environment),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{argv[-6:]}\n{done.stdout[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def story(hub, tmp_path_factory, picture) -> Story:
    story = Story(hub, tmp_path_factory.mktemp("journey"), {})
    story.fresh(PUSH)
    story.printed["pretrain"] = story.command(*PRETRAIN, "--out", "runs/mae")

    def publish(run: str, name: str) -> None:
        story.printed[name] = story.command(
            "publish", f"runs/{run}", f"org/{name}", *TERMS, "--sample", str(picture), "--checkpoint"
        )

    publish("mae", "mae-vit-t")
    story.command(  # starts from what was published
        "finetune", "finetune-small", "--init-from", "org/mae-vit-t", "--data.path", "org/pictures", "--out",
        "runs/tuned", *SMALL, "--eval-every", "6", home="elsewhere",
    )  # fmt: skip
    story.command(
        "supervise", "supervise-small", "--model.architecture", "test_resnet", "--model.image-size", "32",
        "--data.path", "org/pictures", "--out", "runs/timm", *SMALL, "--eval-every", "6",
    )  # fmt: skip
    publish("tuned", "pagodas-and-flowers")
    publish("timm", "pagodas-and-flowers-timm")
    return story


def test_publish_ends_with_a_verdict(story):
    assert "works" in story.printed["pagodas-and-flowers"]
    assert "works" in story.printed["pagodas-and-flowers-timm"]
    assert "no widget" in story.printed["mae-vit-t"]


def test_our_class_reads_the_published_pretraining_model(story):
    story.fresh(
        "import torch, hf_mae\n"
        "model = hf_mae.MAEForPreTraining.from_pretrained('org/mae-vit-t').eval()\n"
        "assert model.config.decoder_hidden_size == 16 and model.config.norm_pix_loss\n"
        "out = model(torch.zeros(1, 3, 32, 32), noise=torch.arange(64.)[None])\n"
        "assert out.pred.shape == (1, 64, 48)\n"
        "encoder = hf_mae.MAEModel.from_pretrained('org/mae-vit-t')\n"
        "assert encoder.config.hidden_size == 32\n"
    )


def test_stock_transformers_reads_the_published_pretraining_model(story):
    story.fresh(
        "import sys, torch\n"
        "from transformers import AutoModelForPreTraining\n"
        "model, info = AutoModelForPreTraining.from_pretrained('org/mae-vit-t', output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "assert 'hf_mae' not in sys.modules and type(model).__name__ == 'ViTMAEForPreTraining'\n"
    )


@pytest.mark.parametrize("name", ["pagodas-and-flowers", "pagodas-and-flowers-timm"])
def test_stock_transformers_classifies_with_what_was_published(story, name, picture):
    story.fresh(
        "import sys\n"
        "from PIL import Image\n"
        "from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline\n"
        f"model = AutoModelForImageClassification.from_pretrained('org/{name}')\n"
        "assert sorted(model.config.id2label.values()) == ['flower', 'pagoda']\n"
        f"AutoImageProcessor.from_pretrained('org/{name}')\n"
        f"answers = pipeline('image-classification', 'org/{name}')(Image.open({str(picture)!r}))\n"
        "assert {a['label'] for a in answers} == {'flower', 'pagoda'}, answers\n"
        "assert 'hf_mae' not in sys.modules\n"
    )


def test_timm_reads_what_was_published(story):
    story.fresh(
        "import sys, timm\n"
        "model = timm.create_model('hf-hub:org/pagodas-and-flowers-timm', pretrained=True)\n"
        "assert model.num_classes == 2 and model.pretrained_cfg['label_names'] == ['pagoda', 'flower']\n"
        "assert 'hf_mae' not in sys.modules\n"
    )


def test_the_published_classifier_gives_the_logits_of_the_run(story):
    printed = story.fresh(
        "import json, sys, torch\n"
        "from transformers import AutoModelForImageClassification\n"
        "pixels = torch.linspace(-2, 2, 3 * 32 * 32, dtype=torch.float64).view(1, 3, 32, 32)\n"
        "stock = AutoModelForImageClassification.from_pretrained('org/pagodas-and-flowers').double().eval()\n"
        "logits = [stock(pixels).logits[0].tolist()]\n"
        "assert 'hf_mae' not in sys.modules\n"
        "import hf_mae\n"
        f"ours = hf_mae.MAEForImageClassification.from_pretrained({str(_model(story, 'tuned'))!r}).double().eval()\n"
        "print('logits', json.dumps([*logits, ours(pixels).logits[0].tolist()]))\n"
    )
    logits, ours = json.loads(printed.split("logits ")[1])
    assert logits == pytest.approx(ours, abs=1e-12)


def test_a_run_that_started_from_what_was_published_recorded_its_data(story):
    start = json.loads((story.folder / "runs/tuned/environment.json").read_text())["starts"][0]
    assert re.fullmatch(r"[0-9a-f]{40}", start["data"]["revision"])


def test_pretraining_again_from_the_stream_with_an_empty_cache_gives_the_same_bits(story):
    story.command(*PRETRAIN, "--out", "runs/again", home="empty")
    for name in ("model/model.safetensors", "training_state/optimizer.safetensors"):
        again, first = (_model(story, run).parent / name for run in ("again", "mae"))
        assert again.read_bytes() == first.read_bytes(), name
    revisions = {
        json.loads((story.folder / "runs" / run / "environment.json").read_text())["starts"][0]["data"]["revision"]
        for run in ("again", "mae")
    }
    assert len(revisions) == 1


def test_a_published_checkpoint_is_pulled_elsewhere_and_taken_up(story):
    """That it goes on with the same bits from the middle is tests/hub/test_pull.py's."""
    story.command("pull", "org/mae-vit-t", "runs/pulled", home="elsewhere")
    finished = story.command(*PRETRAIN, "--out", "runs/pulled", home="elsewhere")
    assert "finished" in finished
    pulled, original = (_model(story, run) / "model.safetensors" for run in ("pulled", "mae"))
    assert pulled.read_bytes() == original.read_bytes()


def test_no_secret_is_on_the_hub_or_in_what_was_printed(story):
    token = re.compile(r"hf_(alice|bob)_\w+")
    assert not any(token.search(text) for text in story.printed.values())
    for path in story.folder.rglob("runs/**/*"):
        if path.is_file() and path.suffix in {".json", ".jsonl", ".md", ".yaml", ".txt"}:
            assert not token.search(path.read_text()), path
    listing = story.fresh(
        "import huggingface_hub as hub\n"
        "for name in ('mae-vit-t', 'pagodas-and-flowers', 'pagodas-and-flowers-timm'):\n"
        "    folder = hub.snapshot_download(f'org/{name}')\n"
        "    from pathlib import Path\n"
        "    for p in Path(folder).rglob('*'):\n"
        "        if p.is_file() and p.suffix != '.safetensors':\n"
        "            body = p.read_bytes()\n"
        f"            assert b'hf_alice' not in body and {str(story.folder).encode()!r} not in body, p\n"
        "        assert p.suffix not in ('.bin', '.pkl', '.pt', '.pth'), p\n"
        "print('clean')\n"
    )
    assert "clean" in listing


def _model(story: Story, run: str) -> Path:
    return sorted((story.folder / "runs" / run / "checkpoints").iterdir())[-1] / "model"
