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
from hf_mae.exporting.parity import decoded, flower, odd_pictures, prepare, prepare_rounding_down
from hf_mae.exporting.write import export
from hf_mae.models.timm_models import TimmSpec, create, load, write_timm_folder


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


def test_a_processor_that_crops_otherwise_is_reported(make, tmp_path):
    lines = []
    wide = make(MAEForImageClassification, pool="cls", image_size=(32, 48))
    found = record(export(wide, tmp_path / "out", say=lines.append))
    assert found["processor"]["pil"] > 0.1
    assert any("not square" in change for change in found["changes"])
    assert any(line.startswith("warning: pictures prepared") for line in lines)


@pytest.mark.parametrize("shape", [(40, 43), (47, 90), (53, 67), (61, 58), (75, 40), (83, 111)])
def test_the_pil_backend_is_our_evaluation_but_for_a_pixel_of_the_crop(make, tmp_path, unchecked, shape):
    """Sizes of which some move the crop; a shift that was not foreseen would be a difference of a whole edge."""
    out = export(make(MAEForImageClassification), tmp_path / "out")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    stock = AutoImageProcessor.from_pretrained(out, backend="pil")
    mean, std = (np.array(getattr(stock, f"image_{name}")).reshape(3, 1, 1) for name in ("mean", "std"))
    found = stock(picture, return_tensors="np")["pixel_values"][0] * std + mean
    expected, shift = prepare_rounding_down(picture, (32, 32))
    assert abs(found - expected.numpy()).max() < 1e-6
    ours = eval_image(picture, (32, 32)) / 255
    assert (abs(found - ours).max() < 1e-6) == (shift == [0, 0])


@pytest.mark.parametrize("target", ["beit", "timm"])
def test_shifts_of_the_crop_are_recorded_whatever_the_picture(make, tmp_path, target):
    """The bundled picture itself is not shifted at this size."""
    image = decoded(flower(), 3)
    assert prepare_rounding_down(image, (32, 32))[1] == [0, 0]
    assert len(odd_pictures(image, (32, 32))) == 3
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
    assert torch.equal(prepare(decoded(flower(), 3), (32, 32)).mul_(0), torch.zeros(3, 32, 32))
