"""ONNX files give the model's numbers at any batch, carry nothing of this machine, and are not kept when wrong."""

from __future__ import annotations

import sys

import onnxruntime
import pytest
import timm
import torch
from torch import nn

from hf_mae.exporting import onnx as exporting
from hf_mae.exporting.onnx import export_onnx
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.models.timm_models import PlannedDropPath

SIZE = (24, 16)
TINY = {"image_size": SIZE, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def shaken(model: nn.Module) -> nn.Module:
    """Give every weight and statistic a value of its own, so that a lost bias or norm shows."""
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data += 0.3 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def mean_classifier():
    return MAEForImageClassification(MAEConfig(**TINY, num_labels=5, head_init_std=0.1))


def probe():
    return MAEForImageClassification(MAEConfig(**TINY, num_labels=5, pool="cls", head="batchnorm", head_init_std=0.1))


def eager_encoder_of_grey_pictures():
    return MAEModel(MAEConfig(**TINY, num_channels=1, attn_implementation="eager"))


def timm_cnn():
    return timm.create_model("test_efficientnet", num_classes=5)


def timm_vit_with_our_drop_path():
    model = timm.create_model("test_vit", num_classes=5, img_size=SIZE, patch_size=8)
    model.blocks[0].drop_path1 = PlannedDropPath(0.5)
    return model


def timm_encoder():
    return timm.create_model("test_vit", num_classes=0, img_size=SIZE, patch_size=8)


@pytest.mark.parametrize(
    ("build", "kind", "shape"),
    [
        (mean_classifier, "classifier", (5,)),
        (probe, "classifier", (5,)),
        (eager_encoder_of_grey_pictures, "encoder", (7, 32)),
        (timm_cnn, "classifier", (5,)),
        (timm_vit_with_our_drop_path, "classifier", (5,)),
        (timm_encoder, "encoder", (7, 64)),
    ],
)
def test_files_give_the_models_numbers_for_any_batch(tmp_path, build, kind, shape):
    torch.manual_seed(0)
    model = shaken(build())
    channels = 1 if "grey" in build.__name__ else 3
    record = export_onnx(model, tmp_path, kind=kind, image_size=SIZE, channels=channels)
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.shape for i in session.get_inputs()] == [["batch", channels, *SIZE]]
    assert [o.shape for o in session.get_outputs()] == [["batch", *shape]]
    pixels = torch.randn(7, channels, *SIZE)
    with torch.no_grad():
        expected = model.forward_features(pixels) if isinstance(build(), timm.models.VisionTransformer) else None
        expected = expected if kind == "encoder" and expected is not None else model(pixels)
    expected = expected if isinstance(expected, torch.Tensor) else expected[0]
    name = {"classifier": "logits", "encoder": "last_hidden_state"}[kind]
    found = torch.from_numpy(session.run([name], {"pixel_values": pixels.numpy()})[0])
    limit = record["tolerance"]["float32"]
    torch.testing.assert_close(found, expected, atol=limit, rtol=0)  # float order, as the record says
    assert 0 <= record["float32"] <= limit


def test_the_file_names_no_path_of_this_machine_and_no_layer_of_python(tmp_path):
    export_onnx(mean_classifier(), tmp_path, kind="classifier", image_size=SIZE, channels=3)
    content = (tmp_path / "onnx" / "model.onnx").read_bytes()
    for trace in (b".py", b"site-packages", b"stack_trace", str(tmp_path).encode(), b"hf_mae"):
        assert trace not in content, trace


def test_other_precisions_are_written_in_float32_and_the_model_is_left_alone(tmp_path):
    model = shaken(mean_classifier()).to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path, kind="classifier", image_size=SIZE, channels=3)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in model.parameters())


def test_large_weights_lie_beside_the_graph(tmp_path):
    model = mean_classifier()
    record = export_onnx(model, tmp_path, kind="classifier", image_size=SIZE, channels=3, external_bytes=1000)
    files = {path.name: path.stat().st_size for path in (tmp_path / "onnx").iterdir()}
    assert files.keys() == {"model.onnx", "model.onnx_data"}
    assert files["model.onnx_data"] > sum(p.numel() for p in model.blocks.parameters()) * 4
    assert record["float32"] <= record["tolerance"]["float32"]  # read back with its data


def test_wrong_numbers_are_an_error_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"gives other logits .* nothing was kept"):
        export_onnx(mean_classifier(), tmp_path, kind="classifier", image_size=SIZE, channels=3)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_are_an_error(tmp_path):
    model = mean_classifier()
    model.head.bias.data[0] = float("nan")
    with pytest.raises(RuntimeError, match="gives other logits"):
        export_onnx(model, tmp_path, kind="classifier", image_size=SIZE, channels=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (mean_classifier, "encoder", "is a MAEForImageClassification.*MAEModel.from_pretrained"),
        (lambda: MAEForPreTraining(MAEConfig(**TINY)), "encoder", "is a MAEForPreTraining"),
        (mean_classifier, "decoder", "kind='decoder' is unknown"),
    ],
)
def test_models_of_another_kind_are_refused(tmp_path, build, kind, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(build(), tmp_path, kind=kind, image_size=SIZE, channels=3)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r'hf_mae\[onnx\]"'):
        export_onnx(mean_classifier(), tmp_path, kind="classifier", image_size=SIZE, channels=3)


class Branching(nn.Module):
    """Cannot be one graph: what it computes depends on the numbers."""

    def forward(self, pixel_values):
        return pixel_values.flatten(1) if pixel_values.sum() > 0 else -pixel_values.flatten(1)


def test_models_that_are_no_graph_are_an_error_that_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"PyTorch cannot write this model as ONNX: .*branching"):
        export_onnx(Branching(), tmp_path, kind="classifier", image_size=SIZE, channels=3)
    assert not list(tmp_path.iterdir())
