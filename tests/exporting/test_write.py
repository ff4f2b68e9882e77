"""`export` from every kind of source to every target: what it writes, records and refuses; whole or not at all."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_mae import MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.exporting import checked
from hf_mae.exporting.convert import convert
from hf_mae.exporting.folders import FILES
from hf_mae.exporting.write import export
from hf_mae.models.timm_models import TimmSpec, create, load, write_timm_folder

FINETUNE = {"name": "finetune-small", "model": {"head": "linear", "pool": "mean"}, "trainable_blocks": None}
PRETRAIN = {"name": "mae-vit-n", "model": {"mask_ratio": 0.75}}


def record(folder):
    return json.loads((folder / "export.json").read_text())


# ------------------------------------------------------------------------------------------------ whole exports


def test_a_run_becomes_a_classifier_that_a_stranger_runs(make, make_run, tmp_path, picture):
    run = make_run(
        tmp_path / "runs" / "bugs",
        last=make(MAEForImageClassification, seed=1),
        best=make(MAEForImageClassification, seed=2),
        average=None,
        recipe=FINETUNE,
    )
    lines = []
    out = export(run, weights="best", picture=picture, say=lines.append)
    assert out == run / "export" / "beit"
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        FILES,
        "export.json",
    }
    found = record(out)
    assert found["format"] == 1
    assert (found["target"], found["class"], found["library"]) == ("beit", "BeitForImageClassification", "transformers")
    assert found["task"] == "image-classification"
    source = found["source"]
    assert source.pop("sha256") is not None
    assert source == {"name": "bugs", "run": "finetune-small", "kind": "finetune", "weights": "best", "step": 3}
    parity = found["parity"]
    assert 0 < parity["float32"] <= 1e-5
    assert 0 < parity["float64"] <= 1e-12
    assert parity["images"] == 2
    assert found["processor"]["pil"] <= 1e-6
    assert found["processor"]["default"] <= 1 / 255 + 1e-6
    assert found["processor"]["shift"] == [0, 0] or 1 in found["processor"]["shift"]
    shown = found["pipeline"]
    assert (shown["task"], shown["picture"]) == ("image-classification", "photo.png")
    assert {one["label"] for one in shown["answers"]} == {"ant", "bee", "cat"}
    assert sum(one["score"] for one in shown["answers"]) == pytest.approx(1)
    assert str(tmp_path) not in (out / "export.json").read_text()
    assert any("key bias" in change for change in found["changes"])
    assert "differ from ours by at most" in lines[-1]
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == pytest.approx([0.5, 0.4, 0.3])
    assert processor["resample"] == 3
    assert processor["do_convert_rgb"] is True
    weights = load_file(out / "model.safetensors")
    expected = make(MAEForImageClassification, seed=2).head.weight
    assert torch.equal(weights["classifier.weight"], expected)


def test_a_probe_is_checked_with_its_folded_head(make, save, tmp_path, picture):
    model = save(make(MAEForImageClassification, pool="cls", head="batchnorm"), tmp_path / "probe")
    out = export(model, tmp_path / "out", picture=picture)
    found = record(out)
    assert found["class"] == "ViTForImageClassification"
    assert 0 < found["parity"]["folding"] <= 1e-5
    assert found["parity"]["float64"] <= 1e-12
    assert any("batch normalisation" in change for change in found["changes"])
    assert found["source"]["kind"] == "model"


def test_pretraining_becomes_vit_mae_without_a_pipeline(make, save, tmp_path, picture):
    model = save(make(MAEForPreTraining, norm_pix_loss=True), tmp_path / "mae")
    found = record(export(model, tmp_path / "out", picture=picture))
    assert (found["target"], found["class"], found["task"]) == ("vit_mae", "ViTMAEForPreTraining", None)
    assert found["pipeline"] is None
    assert found["parity"]["float64"] <= 1e-12
    assert "noise" in found["parity"]["what"]


@pytest.mark.parametrize(("target", "name"), [("vit", "ViTModel"), ("beit", "BeitModel"), ("timm", "vit_base_patch16")])
def test_an_encoder_has_a_feature_pipeline(make, save, tmp_path, picture, target, name):
    model = save(make(MAEForPreTraining), tmp_path / "mae")
    found = record(export(model, tmp_path / "out", target, picture=picture))
    assert found["class"].startswith(name)
    assert found["task"] == found["pipeline"]["task"] == "image-feature-extraction"
    assert found["pipeline"]["shape"] == [1, 17, 32]
    assert found["parity"]["float64"] <= 1e-12
    assert found["parity"]["float32"] <= 1e-4


def test_a_model_of_timm_passes_through(tmp_path, picture):
    spec = TimmSpec("test_resnet", ("ant", "bee", "cat"), (32, 32), (48, 48), 0.95, 3, 0.0, (0.5,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    weights = create(spec).state_dict()
    write_timm_folder(tmp_path / "model", spec, weights)
    out = export(tmp_path / "model", tmp_path / "out", picture=picture)
    found = record(out)
    assert (found["target"], found["class"], found["library"]) == ("timm", "test_resnet", "timm")
    assert found["parity"]["float64"] <= 1e-12
    assert found["processor"] == {
        "pil": None,
        **dict.fromkeys(("default", "timm"), pytest.approx(0, abs=1e-6)),
        "shift": [0, 0],
        "images": 9,
        "transparency": None,
        "agrees": True,
    }
    again, read = load(out)
    assert read == spec
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    assert "num_classes" not in json.loads((out / "config.json").read_text())["model_args"]


@pytest.mark.parametrize("cls", [MAEForPreTraining, MAEForImageClassification, MAEModel])
def test_the_research_folder_is_our_class_bit_for_bit(make, tmp_path, picture, cls):
    model = make(cls, **({"mask_strategy": "grid"} if cls is MAEForPreTraining else {}))
    out = export(model, tmp_path / "out", "hf_mae", picture=picture)
    again = cls.from_pretrained(out)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    found = record(out)
    assert (found["class"], found["library"], found["task"]) == (cls.__name__, "hf_mae", None)
    assert found["parity"]["float64"] == found["parity"]["float32"] == 0


# ------------------------------------------------------------------------------------------------ sources


def test_auto_takes_the_class_that_fits(make, tmp_path, unchecked):
    for index, (model, target) in enumerate(
        [
            (make(MAEForImageClassification, pool="cls"), "vit"),
            (make(MAEForImageClassification, pool="mean"), "beit"),
            (make(MAEForPreTraining), "vit_mae"),
            (make(MAEForPreTraining, mask_strategy="grid"), "hf_mae"),
            (make(MAEForPreTraining, image_size=(32, 48)), "hf_mae"),
            (make(MAEModel), "vit"),
        ]
    ):
        assert record(export(model, tmp_path / str(index)))["target"] == target


def test_the_weights_of_a_run_are_chosen(make, make_run, tmp_path, unchecked):
    models = [make(MAEForImageClassification, seed=seed) for seed in (1, 2, 3)]
    run = make_run(tmp_path / "run", last=models[0], best=models[1], average=models[2], recipe=FINETUNE)
    for weights, model, step in (("last", models[0], 7), ("best", models[1], 3), ("average", models[2], 7)):
        out = export(run, tmp_path / weights, weights=weights)
        assert torch.equal(load_file(out / "model.safetensors")["classifier.bias"], model.head.bias)
        assert record(out)["source"]["weights"] == weights
        assert record(out)["source"]["step"] == step
    inside = record(export(run / "best" / "model", tmp_path / "inside"))["source"]
    assert (inside["weights"], inside["step"], inside["run"]) == ("best", 3, "finetune-small")


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (FINETUNE, "finetune"),
        (FINETUNE | {"trainable_blocks": 0}, "probe"),
        (FINETUNE | {"model": {"mask_ratio": 0.5}}, "pretrain"),
    ],
)
def test_the_kind_of_a_run_is_recorded(make, make_run, tmp_path, unchecked, recipe, kind):
    run = make_run(tmp_path / "run", last=make(MAEForImageClassification), best=None, average=None, recipe=recipe)
    assert record(export(run))["source"]["kind"] == kind


def test_weights_of_less_precision_are_written_in_float32(make, save, tmp_path, unchecked):
    model = make(MAEForImageClassification).to(torch.bfloat16)
    lines = []
    out = export(save(model, tmp_path / "model"), tmp_path / "out", say=lines.append)
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["classifier.weight"], model.head.weight.float())
    note = "weights in bfloat16 are written in float32"
    assert note in lines
    assert note in record(out)["changes"]
    assert model.dtype == torch.bfloat16  # the caller's is left alone
    assert note in record(export(model, tmp_path / "object"))["changes"]


def test_a_model_object_is_left_as_it_is(make, tmp_path, unchecked):
    model = make(MAEForImageClassification, head="batchnorm").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export(model, tmp_path / "out")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.head == "batchnorm"


def test_a_stock_vit_mae_folder_is_read(make, save, tmp_path, unchecked):
    first = export(make(MAEForPreTraining), tmp_path / "vit_mae")
    second = export(first, tmp_path / "again", "vit")
    assert record(second)["class"] == "ViTModel"


def test_an_official_file_is_converted_first(make, tmp_path, unchecked):
    model = make(MAEForPreTraining, decoder_hidden_size=512, decoder_num_attention_heads=16)
    path = tmp_path / "official.pth"
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75)
    torch.save({"model": model.state_dict(), "args": args}, path)
    with pytest.raises(ValueError, match=r"num_attention_heads is not given.*`hf-mae convert` takes"):
        export(path, tmp_path / "out")
    folder = convert(path, tmp_path / "model", num_attention_heads=4, license="mit")
    found = record(export(folder, tmp_path / "out"))
    assert found["source"]["kind"] == "conversion"
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["license"] == "mit"


@pytest.mark.parametrize(
    ("cls", "task"),
    [(MAEForImageClassification, "image-classification"), (MAEForPreTraining, "image-feature-extraction")],
)
def test_onnx_has_the_config_of_the_stock_class_beside_it(make, save, tmp_path, cls, task):
    pytest.importorskip("onnxruntime")
    out = export(save(make(cls), tmp_path / "model"), tmp_path / "out", "onnx")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {"onnx/model.onnx", "config.json", "preprocessor_config.json", "export.json", FILES}
    found = record(out)
    assert (found["library"], found["task"]) == ("onnx", task)
    assert "id2label" in json.loads((out / "config.json").read_text()) or cls is MAEForPreTraining


def test_code_is_added_to_the_research_folder_only_when_asked(make, tmp_path):
    plain = export(make(MAEForPreTraining), tmp_path / "plain", "hf_mae")
    assert not list(plain.glob("*.py"))
    assert "auto_map" not in (plain / "config.json").read_text()
    coded = export(make(MAEForPreTraining), tmp_path / "coded", "hf_mae", code=True)
    assert list(coded.glob("*.py"))
    assert "auto_map" in (coded / "config.json").read_text()


# ------------------------------------------------------------------------------------------------ whole or absent


def test_only_an_export_is_replaced(make, tmp_path, unchecked):
    out = export(make(MAEForImageClassification, seed=1), tmp_path / "out")
    first = (out / "model.safetensors").read_bytes()
    export(make(MAEForImageClassification, seed=2), out)
    assert (out / "model.safetensors").read_bytes() != first
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds something else \(it has no export.json\)"):
        export(make(MAEForImageClassification), mine)
    assert (mine / "thesis.txt").read_text() == "years of work"
    export(make(MAEForImageClassification), mine, overwrite=True)
    assert record(mine)["target"] == "beit"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        export(make(MAEForImageClassification), tmp_path / "file")


@pytest.mark.parametrize("name", ["README.md", "config.json", "deep/notes.txt"])
def test_an_export_that_was_edited_is_replaced_only_when_asked(make, tmp_path, unchecked, name):
    out = export(make(MAEForImageClassification, seed=1), tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("by hand")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"{re.escape(name)} was edited or added.*--overwrite"):
        export(make(MAEForImageClassification, seed=2), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    export(make(MAEForImageClassification, seed=2), out, overwrite=True)
    assert not (out / name).is_file() or (out / name).read_text() != "by hand"


def test_an_export_without_a_list_of_its_files_may_have_been_edited(make, tmp_path, unchecked):
    """Those of version 0.1 have none."""
    out = export(make(MAEForImageClassification, seed=1), tmp_path / "out")
    (out / FILES).unlink()
    with pytest.raises(ValueError, match=r"nobody can tell.*--overwrite"):
        export(make(MAEForImageClassification, seed=2), out)
    export(make(MAEForImageClassification, seed=2), out, overwrite=True)
    export(make(MAEForImageClassification, seed=3), out)


def test_nothing_is_written_into_the_model_that_is_read(make, save, tmp_path):
    model = save(make(MAEForPreTraining), tmp_path / "model")
    with pytest.raises(ValueError, match="lies in the folder that is read"):
        export(model, model / "inside", overwrite=True)
    assert not (model / "inside").exists()


def test_the_model_that_is_exported_is_not_replaced(make, save, tmp_path):
    model = save(make(MAEForPreTraining), tmp_path / "deep" / "model")
    for out in (model, tmp_path / "deep"):
        with pytest.raises(ValueError, match="holds the model that is exported"):
            export(model, out, overwrite=True)
    assert (model / "model.safetensors").is_file()


def test_an_export_that_computes_something_else_is_not_kept(make, tmp_path, monkeypatch):
    """One wrong weight of 21 thousand: a LayerNorm left at its initial value."""
    real = checked._write_transformers

    def forgetful(stock, folder, processor):
        stock.weights["beit.encoder.layer.1.layernorm_after.bias"] = torch.zeros(32)
        real(stock, folder, processor)

    first = export(make(MAEForImageClassification, seed=1), tmp_path / "out")
    before = (first / "model.safetensors").read_bytes()
    monkeypatch.setattr(checked, "_write_transformers", forgetful)
    with pytest.raises(RuntimeError, match=r"logits of the exported folder.* differs from ours by .* not kept"):
        export(make(MAEForImageClassification, seed=2), tmp_path / "out")
    assert (first / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_export_that_cannot_be_loaded_is_not_kept(make, tmp_path, monkeypatch):
    real = checked._write_transformers

    def forgetful(stock, folder, processor):
        real(stock, folder, processor)
        weights = load_file(folder / "model.safetensors")
        del weights["classifier.bias"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(checked, "_write_transformers", forgetful)
    with pytest.raises(RuntimeError, match=r"cannot be used by transformers without hf_mae.*classifier.bias"):
        export(make(MAEForImageClassification), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_export_leaves_the_former_one(make, save, tmp_path):
    model = save(make(MAEForImageClassification), tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text("{}")
    script = f"from hf_mae.exporting.write import export; export({str(model)!r}, {str(out)!r})"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (begun := list(tmp_path.glob(".tmp_*_out/model.safetensors"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert begun
    assert [p.name for p in out.iterdir()] == ["export.json"]
    assert (out / "export.json").read_text() == "{}"
    assert record(export(model, out))["target"] == "beit"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize(
    ("target", "said"), [("vit_mae", "AutoModel masks .*--target vit"), ("vit", "pooler_output is random")]
)
def test_an_export_says_what_automodel_does_to_it(make, tmp_path, unchecked, target, said):
    lines = []
    export(make(MAEForPreTraining), tmp_path / "out", target, say=lines.append)
    assert re.search(f"note: .*{said}", "\n".join(lines))
