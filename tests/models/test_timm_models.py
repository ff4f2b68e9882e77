"""Models of timm: counts, planned randomness, other weights, and folders that timm and transformers load."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_mae.models import timm_spec
from hf_mae.models.timm_models import (
    PlannedDropPath,
    TimmSpec,
    checkpoint_blocks,
    classifier,
    create,
    drop_paths,
    from_weights,
    has_batch_norm,
    is_timm_folder,
    load,
    write_timm_folder,
)

RESNET = TimmSpec(
    architecture="test_resnet",
    names=("ant", "bee", "cat"),
    image_size=(32, 32),
    test_image_size=(48, 48),
    crop_pct=0.95,
    channels=3,
    drop_path_rate=0.0,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)
VIT = replace(RESNET, architecture="test_vit", test_image_size=(32, 32))


def written(folder, spec, seed=0):
    """A model with statistics and a head that are not those of any other, and its folder."""
    torch.manual_seed(seed)
    model = create(spec)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
        classifier(model).weight.normal_()
        classifier(model).bias.normal_()
    write_timm_folder(folder, spec, model.state_dict())
    return model.eval()


def pixels(spec=RESNET, n=2):
    return torch.randn(n, spec.channels, *spec.image_size, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ making


@pytest.mark.parametrize("architecture", ["rexnet_100", "rexnetr_100", "efficientnet_b0", "resnet50"])
def test_parameters_are_as_many_as_published(goldens, architecture):
    counts = json.loads((goldens / "rsb_loss.json").read_text())["parameters"]
    classes = 1000 if architecture == "resnet50" else 400
    names = tuple(str(i) for i in range(classes))
    model = create(replace(RESNET, architecture=architecture, names=names, image_size=(64, 64)))
    expected = counts[f'{architecture}|{{"num_classes": {classes}}}']
    assert sum(p.numel() for p in model.parameters()) == expected
    assert architecture != "rexnet_100" or expected == 4_028_273 < 5_000_000


def test_all_stochastic_depth_is_planned_with_timms_rates():
    theirs = timm.create_model("test_vit", drop_path_rate=0.2, img_size=32)
    rates = [m.drop_prob for m in theirs.modules() if isinstance(m, timm.layers.DropPath) and m.drop_prob > 0]
    model = create(replace(VIT, drop_path_rate=0.2))
    assert [layer.rate for layer in drop_paths(model)] == rates
    assert max(rates) == pytest.approx(0.2)
    assert not any(isinstance(m, timm.layers.DropPath) and m.drop_prob > 0 for m in model.modules())
    assert drop_paths(create(VIT)) == []


def test_a_branch_is_kept_by_its_samples_draw_alone():
    layer, branch = PlannedDropPath(0.25), torch.randn(4, 3, 2, 2)
    layer.draws = torch.tensor([0.0, 0.2499, 0.25, 0.9])
    scale = torch.tensor([0.0, 0.0, 4 / 3, 4 / 3])
    torch.testing.assert_close(layer(branch), branch * scale.view(4, 1, 1, 1))
    torch.testing.assert_close(layer(branch[:, :, 0]), (branch * scale.view(4, 1, 1, 1))[:, :, 0])
    assert layer.eval()(branch) is branch


def test_training_without_draws_is_refused_rather_than_drawn_globally():
    model = create(replace(RESNET, drop_path_rate=0.2))
    with pytest.raises(RuntimeError, match=r"one draw for each of 2 samples and was given none; train through"):
        model(pixels())
    for layer in drop_paths(model):
        layer.draws = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"was given draws of shape \(3,\)"):
        model(pixels())


def test_making_a_model_leaves_no_trace_of_trying_it():
    """Its running statistics are new, and the random numbers that follow are those after timm's own."""
    torch.manual_seed(3)
    model = create(RESNET)
    after = torch.rand(3)
    torch.manual_seed(3)
    theirs = timm.create_model("test_resnet", num_classes=3)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in model.state_dict().items())
    assert model.training
    assert has_batch_norm(model)
    assert not has_batch_norm(create(VIT))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet5O"}, r"model.architecture=resnet5O is unknown to timm .*nearest: .*resnet50"),
        ({"architecture": "resnet18.a1_in1k"}, r"names weights; use --model.architecture resnet18, and .*--init-from"),
        ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, r"names weights, not an architecture; .*--init-from"),
        ({"architecture": "densenet121", "drop_path_rate": 0.1}, r"densenet121 does not take one of drop_path_rate"),
        ({"architecture": "ghostnet_100", "drop_path_rate": 0.1}, r"drop_path_rate"),
        (
            {"architecture": "deit_tiny_distilled_patch16_224", "test_image_size": (32, 32)},
            r"does not end in one linear layer \(tuple\)",
        ),
        ({"architecture": "test_vit"}, r"test_image_size=\(48, 48\) is not model.image_size=\(32, 32\).*one size only"),
        (
            {"architecture": "test_vit", "image_size": (30, 30), "test_image_size": (30, 30)},
            r"test_vit does not take pictures of 30 x 30 pixels and 3 channel.*choose another image size",
        ),
        (
            {"architecture": "test_vit", "test_image_size": (32, 32), "model_args": {"proj_drop_rate": 0.1}},
            r"test_vit draws random numbers of its own in training",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        create(replace(RESNET, **changes))


def test_dropout_that_an_architecture_has_by_default_is_off():
    """ReXNet's is 0.2 in timm; it belongs to the task."""
    assert create(replace(RESNET, architecture="rexnet_100", image_size=(64, 64))).drop_rate == 0


def test_blocks_are_recomputed_where_statistics_allow_it():
    checkpoint_blocks(vit := create(VIT))
    assert vit.grad_checkpointing
    with pytest.raises(ValueError, match=r"blocks would move the running statistics .* twice"):
        checkpoint_blocks(create(RESNET))


# ------------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("changes", [{}, {"channels": 1, "mean": (0.5,), "std": (0.5,)}, {"crop_pct": None}])
@pytest.mark.parametrize("spec", [RESNET, VIT])
def test_a_folder_gives_back_the_model_and_what_it_is(tmp_path, spec, changes):
    spec = replace(spec, **changes)
    model = written(tmp_path / "model", replace(spec, drop_path_rate=0.1))
    again, found = load(tmp_path / "model")
    assert is_timm_folder(tmp_path / "model")
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(pixels(spec)), model(pixels(spec)))
    size = {"model_args": {"img_size": [32, 32]}} if spec.architecture == "test_vit" else {}
    assert found == replace(spec, crop_pct=spec.test_crop_pct, **size)
    written(tmp_path / "again", found)
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "model/config.json").read_text()


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("spec", [RESNET, VIT])
def test_transformers_loads_a_folder_with_equal_scores(tmp_path, spec, channels):
    spec = replace(spec, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    model = written(tmp_path, spec)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path)
    # transformers may leave the weights where the file is mapped, and oneDNN sums in another order where memory is
    # aligned otherwise (4e-7, seen with 5.24): the weights are the same, and a copy of them gives the same bits.
    wrapped.timm_model = deepcopy(wrapped.timm_model)
    with torch.no_grad():
        assert torch.equal(wrapped(pixels(spec)).logits, model(pixels(spec)))
    assert wrapped.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert "num_classes" not in json.loads((tmp_path / "config.json").read_text())["model_args"]


@pytest.mark.skipif(Version(timm.__version__) < Version("1.0.16"), reason="timm reads folders from 1.0.16 on")
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("spec", [RESNET, VIT])
def test_timm_loads_a_folder_with_equal_scores(tmp_path, spec, channels):
    spec = replace(spec, channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)
    model = written(tmp_path, spec)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(pixels(spec)), model(pixels(spec)))
    for use_test_size in (False, True):
        config = timm.data.resolve_model_data_config(theirs, use_test_size=use_test_size)
        assert (tuple(config["input_size"][1:]), config["crop_pct"]) == (spec.test_image_size, 0.95)
    assert (tuple(config["mean"]), tuple(config["std"])) == (spec.mean, spec.std)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_the_pipeline_shows_sigmoid_scores_of_a_binary_model(tmp_path, loss):
    """With the preprocessing of testing: short side 48 / .95 = 50, centre crop, the spec's mean and deviation."""
    model = written(tmp_path, replace(RESNET, loss=loss))
    noise = np.random.default_rng(0).integers(0, 256, (70, 84, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    resized = picture.resize((60, 50), Image.Resampling.BICUBIC)
    crop = np.asarray(resized.crop((6, 1, 54, 49)), dtype=np.float32) / 255
    x = torch.from_numpy((crop - np.float32(RESNET.mean)) / np.float32(RESNET.std)).permute(2, 0, 1)[None]
    processed = AutoImageProcessor.from_pretrained(tmp_path)(picture)["pixel_values"]
    torch.testing.assert_close(processed, x, atol=1e-5, rtol=0)
    with torch.no_grad():
        scores = model(x)[0]
    shown = {row["label"]: row["score"] for row in pipeline("image-classification", str(tmp_path))(picture)}
    expected = scores.sigmoid() if loss == "bce" else scores.softmax(0)
    assert shown == pytest.approx(dict(zip(RESNET.names, expected.tolist(), strict=True)), abs=1e-4)
    assert (abs(sum(shown.values()) - 1) < 1e-5) == (loss == "ce")


def test_what_transformers_saves_is_loaded_again(tmp_path):
    spec = replace(RESNET, loss="bce")
    model = written(tmp_path / "ours", spec)
    AutoModelForImageClassification.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again, found = load(tmp_path / "theirs")
    assert found == spec
    with torch.no_grad():
        assert torch.equal(again(pixels()), model(pixels()))


def test_what_timm_saves_is_loaded_though_it_names_the_classes_twice(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=7, drop_rate=0.1).eval()
    save_for_hf(theirs, tmp_path, model_config={"label_names": list("abcdefg")}, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config.setdefault("model_args", {})["num_classes"] = 7  # timm 1.0.31 writes it of its own accord, 1.0.21 does not
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, spec = load(tmp_path)
    assert (spec.names, spec.image_size, spec.loss) == (tuple("abcdefg"), (160, 160), "ce")
    with torch.no_grad():
        assert torch.equal(model(pixels()), theirs(pixels()))


def test_classes_without_names_are_imagenets_or_numbers(tmp_path):
    for classes, first in ((1000, "tench, Tinca tinca"), (5, "0")):
        folder = tmp_path / str(classes)
        save_for_hf(timm.create_model("test_vit", num_classes=classes), folder, safe_serialization=True)
        assert load(folder)[1].names[0] == first


def test_weights_of_other_classes_are_not_written(tmp_path):
    weights = create(RESNET).state_dict()
    with pytest.raises(ValueError, match=r"test_resnet with 2 classes: fc.weight is of 3 classes"):
        write_timm_folder(tmp_path, replace(RESNET, names=("ant", "bee")), weights)
    weights.pop("fc.weight")
    with pytest.raises(ValueError, match=r"test_resnet with 3 classes: fc.weight is missing"):
        write_timm_folder(tmp_path, RESNET, weights)


def test_names_of_weights_are_found_on_the_hub_as_safetensors_only(tmp_path, monkeypatch):
    written(tmp_path / "model", RESNET)
    asked = []

    def download(repo, file, revision=None):
        asked.append((repo, file, revision))
        return str(tmp_path / "model" / file)

    monkeypatch.setattr(timm_spec, "hf_hub_download", download)
    for name, repo, revision in (
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k", None),
        ("hf-hub:org/name", "org/name", None),
        ("org/name@v2", "org/name", "v2"),
    ):
        load(name)
        assert asked == [(repo, file, revision) for file in ("config.json", "model.safetensors")]
        asked.clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50.a1_in2k", r"names no weights of timm on the Hub; of resnet50 there are .*resnet50.a1_in1k"),
        ("rexnetr_100", r"rexnetr_100 names no weights of timm on the Hub; of rexnetr_100 there are none"),
        ("./nowhere", r"./nowhere is no folder, no Hub id \(ORG/NAME\) and no name of timm's weights"),
        ("resnet5O.a1_in1k", r"no name of timm's weights; nearest: .*resnet50.a1_in1k"),
        ("org/missing", r"org/missing cannot be opened: config.json of org/missing on the Hub"),
    ],
)
def test_models_that_do_not_exist_are_named(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)


def test_folders_that_are_no_models_of_timm_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not a model folder: it has no config.json"):
        load(tmp_path)
    assert not is_timm_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert not is_timm_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no model.safetensors; pickled weights are not read"):
        load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"is not a model in timm's format"):
        load(tmp_path)
    written(tmp_path, RESNET)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"cannot be read"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------------ other weights


def test_the_head_keeps_the_classes_whose_names_stay(tmp_path):
    old = written(tmp_path, replace(RESNET, names=("crane", "bee", "crane", "dog")))
    spec = replace(RESNET, names=("cat", "crane", "crane", "crane", "dog"), drop_path_rate=0.1, image_size=(64, 64))
    torch.manual_seed(5)
    fresh = create(spec)
    torch.manual_seed(5)
    model, kept = from_weights(tmp_path, spec)
    assert kept == ["crane", "crane", "dog"]
    for name, tensor in model.fc.named_parameters():
        before, new = old.fc.state_dict()[name], fresh.fc.state_dict()[name]
        assert torch.equal(tensor, torch.stack([new[0], before[0], before[2], new[3], before[3]]))
    body = {k: v for k, v in old.state_dict().items() if not k.startswith("fc.")}
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in body.items())
    assert model.training
    assert len(drop_paths(model)) > 0


def test_positions_of_a_vit_are_resized_as_timm_does(tmp_path):
    old = written(tmp_path, VIT)
    model, kept = from_weights(tmp_path, replace(VIT, image_size=(64, 48), test_image_size=(64, 48)))
    assert kept == list(VIT.names)
    expected = timm.layers.resample_abs_pos_embed(old.pos_embed, new_size=[4, 3], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected)
    assert torch.equal(model.blocks[0].attn.qkv.weight, old.blocks[0].attn.qkv.weight)


def test_a_grey_model_starts_from_the_sum_over_colours(tmp_path):
    old = written(tmp_path, RESNET)
    model, _ = from_weights(tmp_path, replace(RESNET, channels=1, mean=(0.5,), std=(0.5,)))
    (first,) = [name for name, p in model.named_parameters() if p.ndim == 4][:1]
    torch.testing.assert_close(model.state_dict()[first], old.state_dict()[first].sum(1, keepdim=True))


def test_weights_of_another_architecture_or_incomplete_ones_are_refused(tmp_path):
    written(tmp_path, RESNET)
    with pytest.raises(ValueError, match=r"is a test_resnet and model.architecture=test_vit; use --model.architecture"):
        from_weights(tmp_path, VIT)
    path = Path(tmp_path / "model.safetensors")
    weights = load_file(path)
    weights["layer9.weight"] = weights.pop("layer1.0.conv1.weight")
    save_file(weights, path)
    for function in (load, lambda name: from_weights(name, RESNET)):
        with pytest.raises(ValueError, match=r"(?s)do not fit timm's test_resnet: .*layer1.0.conv1.weight.*layer9"):
            function(tmp_path)


def test_rexnet_has_the_published_channels():
    """Goldens of timm 1.0.31 and of the original class: stem 32, blocks 16 to 185, then 1280."""
    network = create(replace(RESNET, architecture="rexnet_100", names=tuple(map(str, range(400)))))
    blocks = [block.conv_pwl.conv.out_channels for block in network.features if hasattr(block, "conv_pwl")]
    published = [16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185]
    assert (network.stem.conv.out_channels, blocks, classifier(network).in_features) == (32, published, 1280)
