"""The auto classes of transformers answer to our folders, in parts or at a revision, and run none of their code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.training.tasks import Pretraining

AUTO = {
    AutoModel: MAEModel,
    AutoModelForPreTraining: MAEForPreTraining,
    AutoModelForImageClassification: MAEForImageClassification,
}


@pytest.fixture
def model_of(tiny):
    """Make a small model of a class, every weight random."""

    def build(kind, seed=0):
        torch.manual_seed(seed)
        model = kind(tiny(num_labels=3) if kind is MAEForImageClassification else tiny()).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return build


def assert_same(found, kind, model):
    assert type(found) is kind
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40kB"}], ids=["one file", "several"])
@pytest.mark.parametrize("auto", AUTO)
def test_every_auto_class_reads_folders_and_subfolders(model_of, tmp_path, auto, options):
    model = model_of(AUTO[auto])
    for folder in (tmp_path / "whole", tmp_path / "repo" / "below"):
        model.save_pretrained(folder, **options)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
    assert_same(auto.from_pretrained(tmp_path / "whole"), AUTO[auto], model)
    assert_same(auto.from_pretrained(tmp_path / "repo", subfolder="below"), AUTO[auto], model)
    assert type(AutoConfig.from_pretrained(tmp_path / "repo", subfolder="below")) is MAEConfig


def cached(tmp_path: Path, revisions: dict[str, tuple[str, object]]) -> None:
    """Lay repository org/mae into the Hub's cache: revision to (commit, model)."""
    repository = tmp_path / "hub" / "models--org--mae"
    for revision, (commit, model) in revisions.items():
        model.save_pretrained(repository / "snapshots" / commit)
        reference = repository / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


@pytest.mark.parametrize("auto", AUTO)
def test_revisions_of_hub_ids_are_kept_apart(model_of, tmp_path, auto):
    old, new = model_of(AUTO[auto], seed=1), model_of(AUTO[auto], seed=2)
    cached(tmp_path, {"main": ("a" * 40, new), "v1": ("b" * 40, old)})
    options = {"cache_dir": str(tmp_path / "hub")}
    assert_same(auto.from_pretrained("org/mae", **options), AUTO[auto], new)
    assert_same(auto.from_pretrained("org/mae", revision="v1", **options), AUTO[auto], old)
    assert_same(AUTO[auto].from_pretrained("org/mae", revision="b" * 40, **options), AUTO[auto], old)


@pytest.mark.parametrize("auto", AUTO)
def test_code_that_a_repository_names_is_never_run(model_of, tmp_path, auto):
    model = model_of(AUTO[auto])
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    bait = {"AutoConfig": "bait.Config", auto.__name__: "bait.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": bait}))
    (tmp_path / "model" / "bait.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\nclass Model: ...\n"
    )
    assert_same(auto.from_pretrained(tmp_path / "model"), AUTO[auto], model)
    assert_same(AUTO[auto].from_pretrained(tmp_path / "model"), AUTO[auto], model)
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is MAEConfig
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("auto", AUTO)
def test_pickled_weights_are_refused_unread(model_of, tmp_path, auto):
    model = model_of(AUTO[auto])
    model.config.architectures = [AUTO[auto].__name__]
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        auto.from_pretrained(tmp_path / "model")


def test_the_image_processor_of_our_folders_needs_none_of_our_code(model_of, tmp_path):
    model = model_of(MAEForPreTraining)
    Pretraining(model, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)).write_model(tmp_path / "model", model.state_dict())
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model", backend="pil")
    picture = torch.zeros(40, 50, 3, dtype=torch.uint8).numpy()
    pixels = processor(picture, return_tensors="pt")["pixel_values"]
    expected = torch.tensor([-0.1 / 0.4, -0.2 / 0.5, -0.3 / 0.6]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)  # float32 of the mean
    assert type(processor).__module__.startswith("transformers.")
