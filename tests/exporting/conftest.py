"""Models with no weight at its initial value: an export that forgets a norm or a bias must not pass."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from hf_mae import MAEConfig
from hf_mae.exporting import checked
from hf_mae.exporting.parity import Stranger, flower

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}
NAMES = {0: "ant", 1: "bee", 2: "cat"}


@pytest.fixture(scope="session")
def make():
    """Return a function that builds a class of ours with random weights in every tensor."""

    def build(cls, seed=0, **fields):
        generator = torch.Generator().manual_seed(seed)
        model = cls(MAEConfig(**(TINY | {"id2label": NAMES} | fields)))
        fixed = {"decoder_pos_embed"} | ({"pos_embed"} if model.config.pos_embed == "sincos" else set())
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in fixed or not tensor.is_floating_point():
                    continue
                values = torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    values = 0.1 + values.abs()
                elif "norm" in name and name.endswith("weight"):
                    values = 1 + 0.3 * values
                elif tensor.ndim > 1:
                    values = values * tensor.shape[-1] ** -0.5
                tensor.copy_(values)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def save():
    """Return a function that writes a model folder as training does, with its image processor."""

    def write(model, folder, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25)):
        from hf_mae.training.tasks import EncoderTask

        model.save_pretrained(folder)
        processor = EncoderTask(model, mean, std).processor()
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    return write


@pytest.fixture(scope="session")
def make_run(save):
    """Return a function that writes a run folder with one checkpoint, averaged weights and a best model."""

    def write(folder, last, best, average, recipe, step=7):
        from hf_mae.training.checkpoint import commit

        checkpoint = folder / "checkpoints" / ".tmp"
        save(last, checkpoint / "model")
        if average is not None:
            save(average, checkpoint / "model_ema")
        commit(checkpoint, folder / "checkpoints" / f"step_{step:08d}")
        if best is not None:
            save(best, folder / "best" / "model")
            (folder / "best" / "best.json").write_text(json.dumps({"metric": "top1", "value": 0.5, "step": 3}))
        (folder / "recipe.json").write_text(json.dumps(recipe))
        return folder

    return write


@pytest.fixture
def picture(tmp_path):
    """A small photograph: odd borders, so that the crop of the image processors is not ours."""
    Image.open(flower()).crop((0, 0, 301, 427)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def unchecked(monkeypatch):
    """Keep `export` from starting a process that loads the folder: for tests of everything else."""
    monkeypatch.setattr(checked, "run_stock", lambda *_: Stranger({}, None, {}))
