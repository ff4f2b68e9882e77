"""How pictures are prepared: what is taken from where, what is said, and how it compares with our evaluation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_mae import MAEForImageClassification, MAEForPreTraining
from hf_mae.data.images import eval_image
from hf_mae.exporting.parity import decoded, flower, prepare, prepare_rounding_down, trial_images
from hf_mae.exporting.write import export
from hf_mae.models.timm_models import TimmSpec, create, load, write_timm_folder
from hf_mae.recipes.crop import EvalCrop


def record(folder):
    return json.loads((folder / "export.json").read_text())


def test_what_is_not_known_is_said(make, tmp_path, unchecked):
    lines = []
    model = make(MAEForImageClassification, id2label={0: "LABEL_0", 1: "LABEL_1"})
    out = export(model, tmp_path / "out", say=lines.append)
    assert any("have no names" in line for line in lines)
    assert any("ImageNet's mean and std" in line for line in lines)
    assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.485, 0.456, 0.406]


def test_a_processor_is_completed_and_wins(make, save, tmp_path, unchecked):
    model = save(make(MAEForImageClassification), tmp_path / "model")
    out = export(model, tmp_path / "out", processor={"image_mean": [0.1, 0.2, 0.3], "size": {"shortest_edge": 40}})
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3]
    assert written["size"] == {"shortest_edge": 40}
    assert written["image_std"] == pytest.approx([0.2, 0.3, 0.25])
    assert written["crop_size"] == {"height": 32, "width": 32}


def test_a_processor_of_another_kind_gives_mean_and_std_only(make, save, tmp_path, unchecked):
    folder = save(make(MAEForPreTraining), tmp_path / "model")
    other = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "size": 7}
    (folder / "preprocessor_config.json").write_text(json.dumps(other))
    lines = []
    out = export(folder, tmp_path / "out", say=lines.append)
    written = json.loads((out / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1] * 3
    assert written["size"] == {"shortest_edge": 36}
    assert any("only mean and std are taken" in line for line in lines)


def test_grey_models_have_no_pipeline(make, tmp_path):
    lines = []
    model = make(MAEForImageClassification, num_channels=1)
    given = {"image_mean": [0.5], "image_std": [0.2]}
    found = record(export(model, tmp_path / "out", processor=given, say=lines.append))
    assert found["pipeline"] is None
    assert found["task"] is None
    assert found["processor"]["pil"] <= 1e-6
    assert any("read pictures in colour" in line for line in lines)


@pytest.mark.parametrize(
    ("target", "fields"),
    [
        ("vit", {"image_size": (64, 256)}),
        ("timm", {"image_size": (64, 256)}),
        ("onnx", {"image_size": (48, 32)}),
        ("hf_mae", {"image_size": (48, 32)}),
        ("hf_mae", {}),
    ],
)
def test_every_target_is_compared_on_many_images(make, tmp_path, target, fields):
    found = record(export(make(MAEForImageClassification, pool="cls", **fields), tmp_path / "out", target))["processor"]
    assert found["agrees"] is True
    assert found["images"] >= 9
    exact, default = (found["timm"], found["default"]) if target == "timm" else (found["pil"], found["default"] * 1e-7)
    assert max(exact, default) <= 1e-6


def test_an_export_whose_processor_prepares_otherwise_is_refused(make, tmp_path, monkeypatch):
    """What 341adb0 wrote for inputs that are not square, and what it measured on images of exactly the input size."""
    monkeypatch.setattr(EvalCrop, "processor", lambda self: WRONG)
    for target in ("vit", "hf_mae", "onnx"):
        model = make(MAEForImageClassification, pool="cls", image_size=(64, 256))
        with pytest.raises(RuntimeError, match="differ from those of our evaluation"):
            export(model, tmp_path / target, target)
        assert not (tmp_path / target).exists()


WRONG = {
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 256},
}


def test_an_old_folder_that_is_not_square_is_exported_right(make, save, tmp_path):
    """Its processor shows a sixteenth of an image; the weights are fine."""
    folder = save(make(MAEForImageClassification, pool="cls", image_size=(64, 256)), tmp_path / "model")
    written = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(written | WRONG))
    lines = []
    out = export(folder, tmp_path / "out", say=lines.append)
    assert json.loads((out / "preprocessor_config.json").read_text())["size"] == {"height": 64, "width": 256}
    assert any("shortest_edge" in line and "export the model again" in line for line in lines)
    assert record(out)["processor"]["agrees"] is True


def test_what_a_folder_states_is_what_is_exported(make, save, tmp_path, unchecked):
    """A model measured on whole images, such as CIFAR's."""
    folder = save(make(MAEForImageClassification), tmp_path / "model")
    written = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(written | {"size": {"shortest_edge": 32}}))
    stated = json.loads((export(folder, tmp_path / "out") / "preprocessor_config.json").read_text())
    assert stated["size"] == {"shortest_edge": 32}
    assert load(export(folder, tmp_path / "timm", "timm"))[1].crop == EvalCrop((32, 32), 1.0)


def test_the_images_compared_are_of_all_kinds():
    for crop in (EvalCrop((32, 32)), EvalCrop((64, 96)), EvalCrop((48, 32), 0.9), EvalCrop((224, 224), 0.95)):
        images = trial_images(decoded(flower(), 3), crop, converts=True)
        sizes = {(image.height, image.width) for image in images}
        assert crop.size in sizes
        assert any(h < crop.size[0] and w < crop.size[1] for h, w in sizes)
        assert any(h > crop.target[0] and w > crop.target[1] for h, w in sizes)
        assert {(h > w) - (h < w) for h, w in sizes} == {-1, 0, 1}
        assert {"RGB", "RGBA", "L"} == {image.mode for image in images}
        shifts = [prepare_rounding_down(image, crop)[1] for image in images]
        assert [max(one) for one in zip(*shifts, strict=True)] == [1, 1] or crop.mode == "squash"


@pytest.mark.parametrize("shape", [(40, 43), (47, 90), (53, 67), (61, 58), (75, 40), (83, 111)])
def test_the_pil_backend_is_our_evaluation_but_for_a_pixel_of_the_crop(make, tmp_path, unchecked, shape):
    """Sizes of which some move the crop; a shift that was not foreseen would be a difference of a whole edge."""
    out = export(make(MAEForImageClassification), tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    stock = AutoImageProcessor.from_pretrained(out, backend="pil")
    mean, std = (np.array(getattr(stock, f"image_{name}")).reshape(3, 1, 1) for name in ("mean", "std"))
    found = stock(picture, return_tensors="np")["pixel_values"][0] * std + mean
    expected, shift = prepare_rounding_down(picture, EvalCrop((32, 32)))
    assert abs(found - expected.numpy()).max() < 1e-6
    ours = eval_image(picture, (32, 32)) / 255
    assert (abs(found - ours).max() < 1e-6) == (shift == [0, 0])


@pytest.mark.parametrize("target", ["beit", "timm"])
def test_shifts_of_the_crop_are_recorded_whatever_the_picture(make, tmp_path, target):
    """The bundled picture itself is not shifted at this size."""
    assert prepare_rounding_down(decoded(flower(), 3), EvalCrop((32, 32)))[1] == [0, 0]
    found = record(export(make(MAEForImageClassification), tmp_path / "out", target))["processor"]
    assert found["agrees"] is True
    assert found["shift"] == ([1, 1] if target == "beit" else [0, 0])


def test_a_processor_of_the_user_is_not_said_to_agree(make, tmp_path):
    found = record(export(make(MAEForImageClassification), tmp_path / "out", processor={"size": {"shortest_edge": 50}}))
    assert found["processor"]["agrees"] is False
    assert any("it was given" in change for change in found["changes"])


def test_mean_and_std_of_a_model_of_timm_can_be_given(tmp_path, unchecked):
    spec = TimmSpec("test_resnet", ("ant", "bee"), (32, 32), (32, 32), None, 3, 0.0, (0.5,) * 3, (0.2,) * 3)
    write_timm_folder(tmp_path / "model", spec, create(spec).state_dict())
    out = export(tmp_path / "model", tmp_path / "out", processor={"image_mean": [0.1, 0.2, 0.3]})
    _, found = load(out)
    assert found.mean == (0.1, 0.2, 0.3)
    assert found.std == (0.2,) * 3


@pytest.mark.parametrize("edge", [32, 35, 37, 40, 45, 63])
def test_the_short_side_of_a_processor_becomes_timms_crop(make, tmp_path, unchecked, edge):
    given = {"size": {"shortest_edge": edge}}
    out = export(make(MAEForImageClassification), tmp_path / "out", "timm", processor=given)
    _, spec = load(out)
    assert int(32 / spec.test_crop_pct) == edge


def test_pixels_of_a_picture_are_ours_to_write():
    """Else PyTorch warns the user of an array that cannot be written to."""
    assert torch.equal(prepare(decoded(flower(), 3), EvalCrop((32, 32))).mul_(0), torch.zeros(3, 32, 32))
