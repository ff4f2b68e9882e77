"""Classifiers from what others left: encoders, pretraining folders, classifiers, official files."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, BitImageProcessor, pipeline

from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

LABELS = {0: "cat", 1: "dog", 2: "owl"}
HEADS = ("fc_norm.", "head.")


def same(model, weights):
    """The trunk of the model is that of `weights`, and so is its norm, where it has one."""
    names = [name for name in model.state_dict() if not name.startswith(HEADS)]
    return all(torch.equal(model.state_dict()[name], weights[name]) for name in names)


@pytest.fixture
def pretrained(golden_model, tmp_path):
    """A folder of the golden encoder with its decoder."""
    golden_model().save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def edit(folder, change):
    """Change the weights of a folder in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# from_encoder


@pytest.mark.parametrize(("pool", "key"), [("mean", "gap"), ("cls", "cls")])
def test_exactly_the_official_weights_are_new_and_left(
    golden_numbers, golden_model, pretrained, official_weights, pool, key
):
    model = MAEForImageClassification.from_encoder(pretrained, id2label=LABELS, pool=pool)
    expected = golden_numbers["vit"][key]
    assert sorted(model.state_dict().keys() - official_weights.keys()) == expected["missing_keys_from_mae"]
    assert sorted(official_weights.keys() - model.state_dict().keys()) == expected["unexpected_keys_from_mae"]
    assert same(model, official_weights)
    assert (model.config.id2label, model.config.label2id) == (LABELS, {"cat": 0, "dog": 1, "owl": 2})


def test_features_of_the_encoder_are_those_before_training(golden_model, pretrained, images):
    model = MAEForImageClassification.from_encoder(pretrained, id2label=LABELS, pool="cls").eval()
    assert torch.equal(model.forward_features(images), golden_model().forward_features(images, pool="cls"))


def test_encoder_folders_and_official_files_give_the_same_classifier(pretrained, tmp_path, official_weights):
    MAEModel.from_pretrained(pretrained).save_pretrained(tmp_path / "encoder")
    torch.save({"model": official_weights}, tmp_path / "mae_pretrain_vit_tiny_full.pth")
    encoder = {name: tensor for name, tensor in official_weights.items() if not name.startswith("decoder_")}
    torch.save({"model": encoder}, tmp_path / "mae_pretrain_vit_tiny.pth")
    configs = []
    for name in ("pretrained", "encoder", "mae_pretrain_vit_tiny_full.pth", "mae_pretrain_vit_tiny.pth"):
        heads = {"num_attention_heads": 3, "layer_norm_eps": 1e-6} if name.endswith(".pth") else {}
        model = MAEForImageClassification.from_encoder(tmp_path / name, id2label=LABELS, pool="cls", **heads)
        assert same(model, official_weights)
        assert model.name_or_path == str(tmp_path / name)
        encoder_fields = (
            "image_size",
            "patch_size",
            "hidden_size",
            "num_attention_heads",
            "layer_norm_eps",
            "id2label",
        )
        configs.append({field: getattr(model.config, field) for field in encoder_fields})
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("train", [True, False])
def test_positions_are_the_encoders_and_trained_or_not(tiny, tmp_path, pos_embed, train):
    encoder = MAEForPreTraining(tiny(pos_embed=pos_embed))
    encoder.save_pretrained(tmp_path)
    model = MAEForImageClassification.from_encoder(tmp_path, id2label=LABELS, train_pos_embed=train)
    assert torch.equal(model.pos_embed, encoder.pos_embed)
    assert model.pos_embed.requires_grad is train
    assert model.config.pos_embed == ("learned" if train else pos_embed)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(MAEForImageClassification.from_pretrained(tmp_path / "again").pos_embed, encoder.pos_embed)


@pytest.mark.parametrize(("image_size", "key"), [(48, "interp.to_6"), (24, "interp.to_3")])
@pytest.mark.parametrize("train", [True, False])
def test_another_image_size_resizes_positions_as_the_official_code(goldens, pretrained, image_size, key, train):
    golden = load_file(goldens / "pos_embed.safetensors")
    edit(pretrained, lambda weights: weights.update(pos_embed=golden["interp.source"]))
    model = MAEForImageClassification.from_encoder(
        pretrained, id2label=LABELS, image_size=image_size, train_pos_embed=train
    )
    assert_close(model.pos_embed.detach(), golden[key], atol=1e-6, rtol=0)
    assert model(torch.rand(1, 3, image_size, image_size)).logits.shape == (1, 3)
    assert model.config.image_size == image_size


def test_a_resized_model_gives_what_it_gave_with_interpolation(golden_classifier, images, tmp_path):
    for pos_embed in ("sincos", "learned"):
        model, pixel_values = golden_classifier(pos_embed=pos_embed), torch.rand(2, 3, 48, 16)
        before, expected = model(images).logits, model(pixel_values, interpolate_pos_encoding="bicubic").logits
        model.resize_positions(32)
        assert torch.equal(model(images).logits, before)
        names = list(model.state_dict())
        model.resize_positions((48, 16))
        assert torch.equal(model(pixel_values).logits, expected)
        assert (list(model.state_dict()), model.pos_embed.requires_grad) == (names, pos_embed == "learned")
        model.save_pretrained(tmp_path / pos_embed)
        loaded = MAEForImageClassification.from_pretrained(tmp_path / pos_embed)
        assert torch.equal(loaded(pixel_values).logits, expected)
    with pytest.raises(ValueError, match=r"image_size=50 is not a multiple of patch_size=8; use 48 or 56"):
        model.resize_positions(50)
    assert model.config.image_size == (48, 16)


def test_grids_that_did_not_suit_pretraining_are_fine(tiny, tmp_path):
    fields = {"mask_strategy": "grid", "mask_tokens_in_encoder": True}
    MAEForPreTraining(tiny(**fields)).save_pretrained(tmp_path)
    model = MAEForImageClassification.from_encoder(tmp_path, id2label=LABELS, image_size=(24, 40))
    assert model(torch.rand(1, 3, 24, 40)).logits.shape == (1, 3)
    assert "encoder_mask_token" not in model.state_dict()


def test_weights_in_half_precision_become_float32(golden_model, tmp_path):
    golden_model().to(torch.bfloat16).save_pretrained(tmp_path)
    model = MAEForImageClassification.from_encoder(tmp_path, id2label=LABELS)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.dtype in (None, torch.float32)


def test_what_the_recipe_says_reaches_the_config(pretrained):
    model = MAEForImageClassification.from_encoder(
        pretrained, id2label=LABELS, pool="cls", head="batchnorm", head_init_std=0.01, drop_path_rate=0.2
    )
    config = model.config
    assert (config.pool, config.head, config.head_init_std, config.drop_path_rate) == ("cls", "batchnorm", 0.01, 0.2)
    assert model.drop_path_rates == pytest.approx([0, 0, 0.2, 0.2])


# From a classifier


@pytest.fixture
def fine_tuned(golden_classifier, tmp_path):
    """A folder of the golden classifier, of ten named classes."""
    names = {row: f"bird {row}" for row in range(10)}
    model = golden_classifier(id2label=names, label2id={name: row for row, name in names.items()})
    model.save_pretrained(tmp_path / "fine-tuned")
    return tmp_path / "fine-tuned"


def test_a_classifier_keeps_its_norm_and_the_rows_of_known_classes(fine_tuned, golden_classifier):
    source = golden_classifier()
    labels = {0: "bird 7", 1: "fish", 2: "bird 0"}
    model = MAEForImageClassification.from_encoder(fine_tuned, id2label=labels, head_init_std=0.0)
    assert torch.equal(model.fc_norm.weight, source.fc_norm.weight)
    assert torch.equal(model.head.weight[[0, 2]], source.head.weight[[7, 0]])
    assert not model.head.weight[1].any()
    assert model.config.id2label == labels


def test_a_head_of_another_kind_is_new(fine_tuned, golden_classifier):
    names = {row: f"bird {row}" for row in range(10)}
    model = MAEForImageClassification.from_encoder(fine_tuned, id2label=names, head="batchnorm", head_init_std=0.0)
    assert not model.head[1].weight.any()
    assert torch.equal(model.fc_norm.weight, golden_classifier().fc_norm.weight)


def test_a_mean_classifier_has_no_norm_for_the_cls_token(fine_tuned):
    with pytest.raises(ValueError, match=r"do not fit MAEForImageClassification; missing: norm.bias, norm.weight"):
        MAEForImageClassification.from_encoder(fine_tuned, id2label=LABELS, pool="cls")


def test_a_cls_classifier_becomes_a_mean_classifier_with_a_new_head(golden_classifier, tmp_path):
    source = golden_classifier("cls")
    source.save_pretrained(tmp_path)
    model = MAEForImageClassification.from_encoder(tmp_path, id2label=LABELS, head_init_std=0.0)
    assert not model.head.weight.any()
    assert bool((model.fc_norm.weight == 1).all())


# Refusals


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"hidden_size": 64}, r"hidden_size=64 is not that of .*pretrained, 48; leave it out, or name another encoder"),
        ({"patch_size": 4}, r"patch_size=4 is not that of .*pretrained, 8"),
        ({"patch_size": (8, 4)}, r"patch_size=\(8, 4\) is not that of .*pretrained, 8"),
        ({"num_channels": 1}, r"num_channels=1 is not that of .*pretrained, 3"),
        ({"layer_norm_eps": 1e-12}, r"layer_norm_eps=1e-12 is not that of .*pretrained, 1e-06"),
        ({"width": 3}, r"width=3 is no field of MAEConfig; leave it out"),
    ],
)
def test_fields_that_are_not_the_encoders_are_refused(pretrained, wanted, message):
    with pytest.raises(ValueError, match=message):
        MAEForImageClassification.from_encoder(pretrained, id2label=LABELS, **wanted)


def test_fields_that_are_the_encoders_or_not_given_pass(pretrained):
    MAEForImageClassification.from_encoder(
        pretrained, id2label=LABELS, hidden_size=48, patch_size=(8, 8), num_channels=3, num_hidden_layers=None
    )


def test_missing_and_unexpected_weights_of_an_encoder_are_listed(pretrained):
    edit(pretrained, lambda weights: weights.update({"fc_norm.bias": weights.pop("cls_token").flatten()}))
    with pytest.raises(ValueError, match=r"missing: cls_token, fc_norm.weight; unexpected: none"):
        MAEForImageClassification.from_encoder(pretrained, id2label=LABELS)


def test_official_files_of_unknown_width_need_their_heads(tmp_path, official_weights):
    torch.save({"model": official_weights}, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match=r"num_attention_heads is not given and cannot be inferred .*width 48"):
        MAEForImageClassification.from_encoder(tmp_path / "mae.pth", id2label=LABELS)


# from_pretrained and from_official


@pytest.mark.parametrize("changes", [{}, {"pool": "cls"}])
def test_a_classifier_comes_back_bit_for_bit(golden_classifier, images, tmp_path, changes):
    model = golden_classifier(**changes, drop_path_rate=0.2, id2label={row: str(row) for row in range(10)})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["MAEForImageClassification"]
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, MAEForImageClassification)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert loaded.drop_path_rates == model.drop_path_rates
    assert loaded.config.id2label == model.config.id2label


def test_statistics_of_a_probe_come_back(tiny, images, tmp_path):
    model = MAEForImageClassification(tiny(head="batchnorm", pool="cls", head_init_std=1.0, num_labels=3))
    model.train()(images)
    model.eval().save_pretrained(tmp_path)
    loaded = MAEForImageClassification.from_pretrained(tmp_path)
    assert int(loaded.head[0].num_batches_tracked) == 1
    assert torch.equal(loaded(images).logits, model(images).logits)
    again = MAEForImageClassification.from_encoder(
        tmp_path, id2label=model.config.id2label, pool="cls", head="batchnorm"
    )
    assert torch.equal(again.eval()(images).logits, model(images).logits)


@pytest.mark.parametrize("lost", ["head.weight", "fc_norm.bias", "cls_token"])
def test_no_weight_of_a_classifier_may_be_missing(fine_tuned, lost):
    edit(fine_tuned, lambda weights: weights.pop(lost))
    with pytest.raises(ValueError, match=rf"do not fit MAEForImageClassification; missing: {lost}; unexpected: none"):
        MAEForImageClassification.from_pretrained(fine_tuned)


def test_another_pool_than_the_classifiers_is_refused(fine_tuned):
    with pytest.raises(ValueError, match=r"missing: norm.bias, norm.weight; unexpected: fc_norm.bias, fc_norm.weight"):
        MAEForImageClassification.from_pretrained(fine_tuned, pool="cls")


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_an_encoder_is_read_with_a_new_head_and_that_is_said(pretrained, official_weights, pool, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = MAEForImageClassification.from_pretrained(pretrained, pool=pool, num_labels=7)
    assert same(model, official_weights)
    assert model.head.weight.shape == (7, 48)
    assert "MISSING" in caplog.text


def test_an_official_classifier_loads_whole(golden, golden_vit, golden_classifier, tmp_path):
    for pool, key in (("mean", "gap"), ("cls", "cls")):
        path = tmp_path / f"mae_finetuned_{pool}.pth"
        torch.save({"model": golden_classifier(pool).state_dict()}, path)
        model = MAEForImageClassification.from_official(path, num_attention_heads=3)
        assert (model.config.pool, model.config.num_labels, model.pos_embed.requires_grad) == (pool, 10, True)
        assert_close(model(golden["imgs"]).logits, golden_vit[f"{key}.logits"], atol=5e-6, rtol=1e-6)


def test_the_pipeline_of_transformers_classifies(golden_classifier, tmp_path):
    labels = {row: f"bird {row}" for row in range(10)}
    model = golden_classifier(id2label=labels)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    classify = pipeline("image-classification", model=model, image_processor=processor)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8))
    scores = model(processor(picture, return_tensors="pt")["pixel_values"]).logits.softmax(-1)[0]
    best = classify(picture, top_k=1)[0]
    assert best["label"] == labels[int(scores.argmax())]
    assert best["score"] == pytest.approx(scores.max().item(), abs=1e-6)


def test_an_official_probe_loads_whole(tiny, tmp_path):
    model = MAEForImageClassification(tiny(head="batchnorm", pool="cls", num_labels=4))
    torch.save({"model": model.state_dict()}, tmp_path / "probe.pth")
    loaded = MAEForImageClassification.from_official(
        tmp_path / "probe.pth", num_attention_heads=3, id2label={0: "a", 1: "b", 2: "c", 3: "d"}
    )
    assert (loaded.config.head, loaded.config.pool, loaded.config.id2label[3]) == ("batchnorm", "cls", "d")
