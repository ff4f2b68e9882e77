"""The modelling files of a research repository: they work without this package, and are not run with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from hf_mae.exporting.code import modules, write_code
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

TINY = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
AUTO = {
    MAEForPreTraining: AutoModelForPreTraining,
    MAEModel: AutoModel,
    MAEForImageClassification: AutoModelForImageClassification,
}

# A reader who has transformers and not this package, wherever it is installed.
READER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_mae":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, auto, trust, inputs, answers = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True if trust == "yes" else None).eval()
assert "hf_mae" not in sys.modules
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    outputs = model(**load_file(inputs))
save_file({k: v.contiguous() for k, v in outputs.items() if isinstance(v, torch.Tensor)}, answers)
"""


def saved(kind, folder: Path, **changes):
    torch.manual_seed(0)
    model = kind(MAEConfig(**(TINY | changes))).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def read_elsewhere(tmp_path: Path, folder: Path, auto: str, *, trust: bool) -> subprocess.CompletedProcess:
    """Load the folder in a process of its own, outside of this checkout, with caches of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [folder, auto, "yes" if trust else "no", tmp_path / "in.safetensors", tmp_path / "out.safetensors"]
    return subprocess.run(
        [sys.executable, "-I", "-c", READER, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (MAEForPreTraining, {"mask_strategy": "block", "mask_ratio": 0.5, "norm_pix_loss": True}),
        (MAEModel, {"pos_embed": "learned", "num_channels": 1}),
        (MAEForImageClassification, {"num_labels": 3, "head": "batchnorm", "head_init_std": 0.1}),
    ],
)
def test_readers_without_this_package_get_equal_numbers(tmp_path, kind, changes):
    model = saved(kind, tmp_path / "model", **changes)
    write_code(tmp_path / "model")
    inputs = {"pixel_values": torch.randn(2, model.config.num_channels, 16, 16)}
    if kind is MAEForPreTraining:
        inputs["noise"] = torch.rand(2, 4)
    save_file(inputs, tmp_path / "in.safetensors")
    done = read_elsewhere(tmp_path, tmp_path / "model", AUTO[kind].__name__, trust=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = {k: v for k, v in model(**inputs).items() if isinstance(v, torch.Tensor)}
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=0, rtol=0)  # the same code on the same machine


def test_readers_who_do_not_trust_it_run_no_code(tmp_path):
    saved(MAEModel, tmp_path / "model")
    write_code(tmp_path / "model")
    poison(tmp_path / "model", tmp_path / "ran")
    done = read_elsewhere(tmp_path, tmp_path / "model", "AutoModel", trust=False)
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr
    assert not (tmp_path / "ran").exists()


def poison(folder: Path, trace: Path) -> None:
    """Make every file of code leave a trace if it is run."""
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(trace)!r}, 'w')\nraise SystemExit('the code of the repository ran')\n")


@pytest.mark.parametrize("trust", [None, False])
@pytest.mark.parametrize("kind", AUTO)
def test_with_this_package_its_own_classes_are_taken(tmp_path, kind, trust):
    model = saved(kind, tmp_path / "model")
    write_code(tmp_path / "model")
    poison(tmp_path / "model", tmp_path / "ran")
    asked = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(tmp_path / "model", **asked)) is MAEConfig
    found = AUTO[kind].from_pretrained(tmp_path / "model", **asked)
    assert type(found) is kind
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    kind.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_only_what_a_class_needs_is_written_beside_unchanged_weights(tmp_path):
    saved(MAEModel, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_code(tmp_path / "model")
    names = {path.stem for path in (tmp_path / "model").glob("*.py")} - {"patience", "resolve"}
    assert names == {
        "configuration_mae",
        "convert",
        "layers",
        "masking",
        "modeling_mae",
        "pos_embed",
        "sizes",
        "targets",
    }
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    auto_map = {"AutoConfig": "configuration_mae.MAEConfig", "AutoModel": "modeling_mae.MAEModel"}
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == config | {"auto_map": auto_map}


def test_files_import_libraries_and_each_other_only(tmp_path):
    for name, text in modules(["modeling_classification"]).items():
        compile(text, name, "exec")
        assert "import hf_mae" not in text
        assert "from hf_mae" not in text
        assert ".register(" not in text, "a registration would be in the way of a later import of hf_mae"
        assert "Apache-2.0" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has no config.json"),
        ({"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"]}, "ViTMAEForPreTraining.*need none"),
        ({"model_type": "hf_mae"}, "holds None"),
    ],
)
def test_folders_of_other_classes_are_refused(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        write_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))
