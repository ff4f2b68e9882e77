"""Every class keeps its name, and its kind of score, on the way to each library."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from hf_mae import MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.exporting.labels import timm_names
from hf_mae.exporting.parity import Stranger, compare_pipeline
from hf_mae.exporting.questions import logits
from hf_mae.exporting.write import export
from hf_mae.models.timm_models import load

TWELVE = {row: f"class {row}" for row in range(12)}


def read(folder, name):
    return json.loads((folder / name).read_text())


def class_names(folder):
    config = read(folder, "config.json")
    return config.get("label_names") or [config["id2label"][str(row)] for row in range(len(config["id2label"]))]


@pytest.mark.parametrize("target", ["beit", "timm", "onnx", "hf_mae"])
def test_classes_are_in_the_order_of_their_rows_not_of_a_dictionary(make, tmp_path, unchecked, target):
    model = make(MAEForImageClassification)
    model.config.id2label = {2: "cat", 1: "bee", 0: "ant"}
    out = export(model, tmp_path / "out", target)
    assert class_names(out) == ["ant", "bee", "cat"]
    assert list(model.config.id2label) == [2, 1, 0]  # the caller's is left alone


def test_more_than_ten_classes_keep_their_names_through_a_research_folder_with_code(make, tmp_path):
    """As strings, 10 sorts before 2; the pipeline of the last folder is compared with ours."""
    model = make(MAEForImageClassification, id2label=TWELVE)
    research = export(model, tmp_path / "research", "hf_mae", code=True)
    assert list(read(research, "config.json")["id2label"]) == [str(row) for row in range(12)]
    config = read(research, "config.json")
    config["id2label"] = dict(sorted(config["id2label"].items()))  # as files of former versions have it
    (research / "config.json").write_text(json.dumps(config))
    out = export(research, tmp_path / "out", "timm")
    assert class_names(out) == list(TWELVE.values())


def test_what_the_pipeline_shows_is_compared_with_our_model(make):
    model, names = make(MAEForImageClassification), ("ant", "bee", "cat")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = logits(model, {"pixel_values": pixels})["logits"][0].detach().softmax(0)
    right = [{"label": name, "score": float(score)} for name, score in zip(names, scores, strict=True)]
    right.sort(key=lambda one: -one["score"])
    swapped = [one | {"label": other["label"]} for one, other in zip(right, right[::-1], strict=True)]

    def judge(answers, sigmoid=False):
        stranger = Stranger({"pipeline.pixel_values": pixels}, {"answers": answers}, {})
        compare_pipeline(model, logits, names, sigmoid=sigmoid, stranger=stranger)

    judge(right)
    judge(right[:1])
    for wrong, sigmoid in ((swapped, False), (right[1:], False), ([], False), (right, True)):
        with pytest.raises(RuntimeError, match=r"the pipeline shows .* where our model says"):
            judge(wrong, sigmoid)


@pytest.mark.parametrize("target", ["beit", "timm", "onnx"])
@pytest.mark.parametrize("kind", ["instance", "folder"])
def test_binary_cross_entropy_is_recorded_of_instances_and_folders(make, save, tmp_path, unchecked, target, kind):
    model = make(MAEForImageClassification, problem_type="multi_label_classification")
    source = model if kind == "instance" else save(model, tmp_path / "model")
    out = export(source, tmp_path / "out", target)
    assert read(out, "config.json")["problem_type"] == "multi_label_classification"
    assert read(out, "export.json")["problem_type"] == "multi_label_classification"


def test_sigmoid_scores_are_what_the_pipeline_shows(make, tmp_path):
    model = make(MAEForImageClassification, problem_type="multi_label_classification")
    answers = read(export(model, tmp_path / "out", "timm"), "export.json")["pipeline"]["answers"]
    assert sum(one["score"] for one in answers) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("cls", "fields", "target", "expected"),
    [
        (MAEForImageClassification, {}, "beit", (True, 3, "image-classification")),
        (MAEForImageClassification, {"num_channels": 1}, "beit", (True, 1, None)),
        (MAEForImageClassification, {"num_channels": 1}, "timm", (True, 1, None)),
        (MAEForImageClassification, {"num_channels": 1}, "onnx", (True, 1, None)),
        (MAEForPreTraining, {"num_channels": 1}, "vit", (False, 1, None)),
        (MAEModel, {}, "timm", (False, 3, "image-feature-extraction")),
        (MAEForPreTraining, {}, "vit_mae", (False, 3, None)),
        (MAEForImageClassification, {}, "hf_mae", (True, 3, None)),
    ],
)
def test_the_record_says_whether_it_classifies_and_what_can_run(
    make, tmp_path, unchecked, cls, fields, target, expected
):
    channels = fields.get("num_channels", 3)
    given = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    found = read(export(make(cls, **fields), tmp_path / "out", target, processor=given), "export.json")
    assert (found["classifies"], found["channels"], found["task"]) == expected
    assert found["problem_type"] == ("single_label_classification" if found["classifies"] else None)


def test_onnx_takes_shapes_that_beit_cannot(make, tmp_path):
    pytest.importorskip("onnxruntime")
    out = export(make(MAEForImageClassification, image_size=(32, 48)), tmp_path / "out", "onnx")
    config = read(out, "config.json")
    assert (config["model_type"], config["image_size"]) == ("vit", [32, 48])
    assert class_names(out) == ["ant", "bee", "cat"]


@pytest.mark.parametrize("target", ["vit", "beit", "timm", "onnx"])
def test_a_mask_token_that_is_dropped_is_said(make, tmp_path, unchecked, target):
    model = make(MAEForPreTraining, mask_tokens_in_encoder=True)
    changes = read(export(model, tmp_path / "out", target), "export.json")["changes"]
    assert any("mask token of the encoder is left out" in change for change in changes)
    assert any("decoder is left out" in change for change in changes)


def test_names_that_timms_own_list_has_twice_get_a_number():
    names = tuple(timm.data.ImageNetInfo("imagenet-1k").label_descriptions())
    unique = timm_names(names)
    assert len(set(unique)) == len(unique) == 1000
    changed = [(old, new) for old, new in zip(names, unique, strict=True) if old != new]
    assert all(new == f"{old}2" for old, new in changed)
    assert 0 < len(changed) < 5


def test_an_encoder_of_timm_is_written_by_the_writer_of_classifiers(make, tmp_path, unchecked):
    out = export(make(MAEModel), tmp_path / "out", "timm")
    config = read(out, "config.json")
    assert (config["num_classes"], config["num_features"], "label_names" in config) == (0, 32, False)
    assert isinstance(timm.create_model(f"local-dir:{out}", pretrained=True).head, nn.Identity)
    with pytest.raises(ValueError, match="has no classes"):
        load(out)
