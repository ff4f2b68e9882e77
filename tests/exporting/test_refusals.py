"""What `export` refuses, before it writes anything, and what it says to do."""

from __future__ import annotations

import json

import pytest
import torch

from hf_mae import MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.exporting.write import export
from hf_mae.models.timm_models import TimmSpec, create, write_timm_folder

PRETRAIN = {"name": "mae-vit-n", "model": {"mask_ratio": 0.75}}


@pytest.mark.parametrize(
    ("cls", "fields", "target", "message"),
    [
        (MAEForImageClassification, {}, "vit_mae", "this is a classifier; use 'beit'"),
        (MAEForImageClassification, {"pool": "mean"}, "vit", "pool='mean' is not how 'vit' pools"),
        (MAEForImageClassification, {"pool": "cls"}, "beit", "pool='cls' is not how 'beit' pools"),
        (MAEModel, {}, "vit_mae", "an encoder without one; use 'vit'"),
        (MAEModel, {"pool": "cls"}, "beit", "pool='cls' cannot be told to BeitModel"),
        (MAEForPreTraining, {"mask_strategy": "grid"}, "vit_mae", "mask_strategy='grid'"),
        (MAEForPreTraining, {}, "jax", "target='jax' is unknown; use one of auto, vit_mae"),
    ],
)
def test_a_target_that_cannot_express_the_model_is_refused(make, tmp_path, cls, fields, target, message):
    with pytest.raises(ValueError, match="use ") as error:
        export(make(cls, **fields), tmp_path / "out", target)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_models_of_timm_have_no_class_of_transformers(tmp_path):
    spec = TimmSpec("test_resnet", ("ant", "bee"), (32, 32), (32, 32), None, 3, 0.0, (0.5,) * 3, (0.2,) * 3)
    write_timm_folder(tmp_path / "model", spec, create(spec).state_dict())
    with pytest.raises(ValueError, match=r"target='vit' is for models of hf_mae.*use 'timm'"):
        export(tmp_path / "model", tmp_path / "out", "vit")


def test_broken_weights_are_refused(make, tmp_path):
    model = make(MAEForImageClassification)
    model.blocks[1].mlp.fc1.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"weight blocks.1.mlp.fc1.bias is not finite.*earlier checkpoint"):
        export(model, tmp_path / "out")
    model = make(MAEForImageClassification)
    model.head.weight = torch.nn.Parameter(torch.zeros(3, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"head.weight is torch.int8.*quantised"):
        export(model, tmp_path / "out")


def test_other_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model is a Linear, which cannot be exported"):
        export(torch.nn.Linear(2, 2), tmp_path / "out")


def test_folders_of_others_are_refused(make, save, tmp_path, unchecked):
    stock = export(make(MAEForImageClassification), tmp_path / "stock")
    with pytest.raises(ValueError, match="is a BeitForImageClassification, which is no model of hf_mae or timm"):
        export(stock, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a model folder"):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="does not exist"):
        export(str(tmp_path / "nothing"), tmp_path / "out")


def test_weights_that_a_run_has_not_are_refused(make, save, make_run, tmp_path):
    run = make_run(tmp_path / "run", last=make(MAEForPreTraining), best=None, average=None, recipe=PRETRAIN)
    with pytest.raises(ValueError, match=r"weights='best' of .* do not exist .* use 'last'"):
        export(run, weights="best")
    with pytest.raises(ValueError, match=r"weights='average' of .* do not exist .*optim.ema_decay"):
        export(run, weights="average")
    with pytest.raises(ValueError, match="weights='best' is for run folders"):
        export(save(make(MAEModel), tmp_path / "model"), tmp_path / "out", weights="best")
    with pytest.raises(ValueError, match="weights='best' is for run folders, and model is an object"):
        export(make(MAEModel), tmp_path / "out", weights="best")


def test_arguments_that_do_not_fit_are_refused(make, tmp_path):
    model = make(MAEForImageClassification)
    with pytest.raises(ValueError, match="out_dir is not given; name the folder"):
        export(model)
    with pytest.raises(ValueError, match="code=True is for target 'hf_mae', and target is 'beit'"):
        export(model, tmp_path / "out", code=True)
    with pytest.raises(ValueError, match="processor has the field do_flip, which BitImageProcessor has not"):
        export(model, tmp_path / "out", processor={"do_flip": True})
    with pytest.raises(ValueError, match=r"image_mean=.* does not fit num_channels=1"):
        export(make(MAEForImageClassification, num_channels=1), tmp_path / "out")
    with pytest.raises(ValueError, match="is no file; name a picture"):
        export(model, tmp_path / "out", picture=tmp_path / "nothing.jpg")


@pytest.mark.parametrize("target", ["auto", "timm", "onnx", "hf_mae"])
def test_channels_that_no_picture_has_are_refused(make, tmp_path, target):
    given = {"image_mean": [0.5] * 2, "image_std": [0.5] * 2}
    with pytest.raises(ValueError, match=r"num_channels=2 cannot be exported.*grey \(1 channel\) or in colour \(3\)"):
        export(make(MAEForImageClassification, num_channels=2), tmp_path / "out", target, processor=given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            {0: "ant", 5: "bee", 7: "cat"},
            r"id2label has the ids 0, 5, 7 and the head has 3 rows; name the classes 0 to 2",
        ),
        ({0: "ant", 1: "bee"}, r"id2label has the ids 0, 1 and the head has 3 rows"),
        ({0: "ant", 1: "ant", 2: "bee"}, r"id2label has several classes of the name 'ant'.*a name of its own"),
    ],
)
@pytest.mark.parametrize("target", ["beit", "timm", "onnx", "hf_mae"])
def test_labels_that_do_not_name_the_rows_are_refused(make, tmp_path, target, labels, message):
    model = make(MAEForImageClassification)
    model.config.id2label = labels
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "out", target)
    assert not list(tmp_path.iterdir())


def test_folders_whose_labels_do_not_name_the_rows_are_refused(make, save, tmp_path):
    folder = save(make(MAEForImageClassification), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "ant", "5": "bee", "7": "cat"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"id2label has the ids 0, 5, 7 and the head has 3 rows"):
        export(folder, tmp_path / "out", "timm")


def test_timm_folders_whose_classes_share_a_name_are_refused(tmp_path):
    spec = TimmSpec("test_resnet", ("ant", "ant"), (32, 32), (32, 32), None, 3, 0.0, (0.5,) * 3, (0.2,) * 3)
    write_timm_folder(tmp_path / "model", spec, create(spec).state_dict())
    with pytest.raises(ValueError, match=r"label_names in config.json has several classes of the name 'ant'"):
        export(tmp_path / "model", tmp_path / "out")


def test_a_processor_that_timm_cannot_be_told_is_refused(make, tmp_path):
    spec = TimmSpec("test_resnet", ("ant", "bee"), (32, 32), (32, 32), None, 3, 0.0, (0.5,) * 3, (0.2,) * 3)
    write_timm_folder(tmp_path / "model", spec, create(spec).state_dict())
    for given in ({"nonsense": 1}, {"size": {"shortest_edge": 40}}):
        with pytest.raises(ValueError, match=f"processor has the field {next(iter(given))}, .*only image_mean and"):
            export(tmp_path / "model", tmp_path / "out", processor=given)
    with pytest.raises(ValueError, match=r"image_mean=\[0.5\] does not fit num_channels=3; pass 3 values"):
        export(tmp_path / "model", tmp_path / "out", processor={"image_mean": [0.5]})
    ours = make(MAEForImageClassification)
    for given in ({"resample": 2}, {"do_center_crop": False}, {"size": {"height": 40, "width": 50}}):
        with pytest.raises(ValueError, match="cannot be told to timm; leave it out, or use target 'vit'"):
            export(ours, tmp_path / "out", "timm", processor=given)
