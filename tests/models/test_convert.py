from __future__ import annotations

import argparse
import fractions
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, ViTMAEConfig, ViTMAEForPreTraining

from hf_mae.models.convert import config_from_state_dict, convert_state_dict, load_official_checkpoint
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

DECODER = ("decoder_", "mask_token")
COMMIT = "0" * 40


def same_weights(model, expected):
    state_dict = model.state_dict()
    return state_dict.keys() == expected.keys() and all(
        torch.equal(state_dict[name], expected[name]) for name in expected
    )


def without_decoder(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith(DECODER)}


# Our own folders


def test_save_and_load_are_bit_equal(golden_model, tmp_path):
    model = golden_model(norm_pix_loss=True)
    model.save_pretrained(tmp_path)
    loaded = MAEForPreTraining.from_pretrained(tmp_path)
    assert same_weights(loaded, model.state_dict())
    assert loaded.config.norm_pix_loss is True
    assert not loaded.training
    assert not loaded.pos_embed.requires_grad  # the loader makes parameters of parameters only


def test_auto_classes_load_our_folder(golden_model, tmp_path, official_weights):
    golden_model().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "hf_mae"
    assert isinstance(AutoModel.from_pretrained(tmp_path), MAEModel)
    model = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert isinstance(model, MAEForPreTraining)
    assert same_weights(model, official_weights)


def test_encoder_reads_a_pretraining_folder_without_its_decoder(golden_model, tmp_path, official_weights):
    golden_model().save_pretrained(tmp_path)
    assert same_weights(MAEModel.from_pretrained(tmp_path), without_decoder(official_weights))


@pytest.mark.parametrize("changes", [{"pos_embed": "learned"}, {"mask_tokens_in_encoder": True}])
def test_optional_weights_survive_saving(tiny, tmp_path, changes):
    model = MAEForPreTraining(tiny(**changes))
    model.save_pretrained(tmp_path)
    loaded = MAEForPreTraining.from_pretrained(tmp_path)
    assert same_weights(loaded, model.state_dict())
    assert loaded.pos_embed.requires_grad is (changes.get("pos_embed") == "learned")


def test_config_fields_and_precision_can_be_changed_while_loading(golden_model, tmp_path):
    golden_model().save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(
        tmp_path, mask_ratio=0.5, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert (model.config.mask_ratio, model.dtype) == (0.5, torch.bfloat16)
    assert model.config._attn_implementation == "eager"


def test_large_models_come_back_from_several_files(golden_model, tmp_path, official_weights):
    golden_model().save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_weights(MAEForPreTraining.from_pretrained(tmp_path), official_weights)


def test_decoder_is_not_made_up_for_an_encoder(golden_model, tmp_path):
    golden_model().save_pretrained(tmp_path / "full")
    MAEModel.from_pretrained(tmp_path / "full").save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"has no decoder \(20 weights\).*load it with MAEModel.*\*_full.pth"):
        MAEForPreTraining.from_pretrained(tmp_path / "encoder")


def test_missing_and_unexpected_weights_are_listed(golden_model, tmp_path):
    golden_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["blocks.0.attn.gate"] = weights.pop("pos_embed")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for cls in (MAEForPreTraining, MAEModel):
        with pytest.raises(ValueError, match=r"missing: pos_embed; unexpected: blocks.0.attn.gate"):
            cls.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match=r"has model_type='vit', which is not a masked autoencoder"):
        MAEModel.from_pretrained(tmp_path)


def test_pickled_weights_and_single_files_are_refused(golden_model, tmp_path, official_weights):
    golden_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(official_weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model.safetensors"):
        MAEForPreTraining.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use_safetensors=False would read pickled weights"):
        MAEForPreTraining.from_pretrained(tmp_path, use_safetensors=False)
    with pytest.raises(ValueError, match=r"is a file; pass its folder, or call from_official"):
        MAEForPreTraining.from_pretrained(tmp_path / "pytorch_model.bin")


# transformers' ViTMAE


@pytest.fixture
def stock(goldens, official_weights) -> ViTMAEForPreTraining:
    """The golden weights in transformers' own class, through the key table recorded beside the golden numbers."""
    config = ViTMAEConfig(
        image_size=32,
        patch_size=8,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=192,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-5,  # neither library's default, so that it must have been carried
        norm_pix_loss=True,
        attn_implementation="eager",
    )
    weights = {}
    for ours, theirs in json.loads((goldens / "hf_parity.json").read_text())["key_mapping"].items():
        if isinstance(theirs, list):
            weights |= dict(zip(theirs, official_weights[ours].chunk(3), strict=True))
        else:
            weights[theirs] = official_weights[ours]
    model = ViTMAEForPreTraining(config).eval()
    if model.state_dict().keys() != weights.keys():
        pytest.skip("this transformers has other module names in ViTMAE than 5.23, for which the table is")
    model.load_state_dict(weights)
    return model


def save_mangled(stock, folder):
    stock.save_pretrained(folder)
    names = load_file(folder / "model.safetensors")
    assert "decoder.decoder_encoder.layer.0.layernorm_before.bias" in names


def save_clean_5x(stock, folder):
    stock.save_pretrained(folder, save_original_format=False)
    assert "vit.layers.0.attention.q_proj.weight" in load_file(folder / "model.safetensors")


def save_4x(stock, folder):
    stock.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace("decoder_encoder.layer", "decoder_layers"): tensor for name, tensor in weights.items()}
    assert "vit.encoder.layer.0.attention.attention.query.weight" in weights
    assert "decoder.decoder_layers.0.attention.attention.query.weight" in weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_sharded(stock, folder):
    stock.save_pretrained(folder, max_shard_size="100KB")
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("save", [save_mangled, save_clean_5x, save_4x, save_sharded])
def test_every_spelling_of_transformers_loads_with_the_same_loss(stock, tmp_path, golden, official_weights, save):
    save(stock, tmp_path)
    model, info = MAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert same_weights(model, official_weights)
    assert (model.config.layer_norm_eps, model.config.norm_pix_loss) == (1e-5, True)
    assert model.config.name_or_path == str(tmp_path)
    ours, theirs = (m(golden["imgs"], noise=golden["noise"]) for m in (model, stock))
    assert_close(ours.loss, theirs.loss, atol=1e-6, rtol=0)
    assert_close(ours.pred, theirs.logits, atol=5e-6, rtol=0)
    encoder = MAEModel.from_pretrained(tmp_path)
    assert same_weights(encoder, without_decoder(official_weights))


def test_classifiers_are_built_on_every_layout_of_transformers(stock, tmp_path, official_weights):
    save_4x(stock, tmp_path)
    built = MAEForImageClassification.from_encoder(tmp_path, id2label={0: "cat", 1: "dog", 2: "owl"}, pool="cls")
    read = MAEForImageClassification.from_pretrained(tmp_path, num_labels=3, pool="cls")
    for model in (built, read):
        assert (model.config.layer_norm_eps, model.config.num_labels) == (1e-5, 3)
        weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
        assert weights.keys() == without_decoder(official_weights).keys()
        assert all(torch.equal(tensor, official_weights[name]) for name, tensor in weights.items())


def test_gradient_of_every_parameter_is_that_of_transformers(stock, tmp_path, golden):
    stock.save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(tmp_path)
    for m in (model, stock):
        m(golden["imgs"], noise=golden["noise"]).loss.backward()
    theirs = convert_state_dict({name: p.grad for name, p in stock.named_parameters() if p.grad is not None})
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, theirs[name], atol=1e-7, rtol=0)  # the norm of all gradients is about 1


def test_encoder_folder_of_transformers_loads_in_the_encoder_only(stock, tmp_path, official_weights):
    stock.vit.save_pretrained(tmp_path)
    assert same_weights(MAEModel.from_pretrained(tmp_path), without_decoder(official_weights))
    with pytest.raises(ValueError, match=r"has no decoder"):
        MAEForPreTraining.from_pretrained(tmp_path)


def test_config_fields_can_be_changed_while_loading_transformers_weights(stock, tmp_path):
    stock.save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(
        tmp_path, norm_pix_loss=False, mask_ratio=0.5, attn_implementation="eager", dtype=torch.bfloat16
    )
    assert (model.config.norm_pix_loss, model.config.mask_ratio, model.dtype) == (False, 0.5, torch.bfloat16)
    assert model.config._attn_implementation == "eager"


def test_automatic_precision_and_an_explicit_config_work_for_transformers_weights(stock, tmp_path, tiny):
    stock.save_pretrained(tmp_path)
    assert MAEForPreTraining.from_pretrained(tmp_path, dtype="auto").dtype is torch.float32
    model = MAEForPreTraining.from_pretrained(tmp_path, config=tiny(mask_strategy="block"))
    assert (model.config.mask_strategy, model.config.layer_norm_eps) == ("block", 1e-6)


@pytest.mark.parametrize("layout", ["ours", "vit_mae"])
def test_hub_ids_of_both_layouts_load_from_the_cache(golden_model, stock, tmp_path, official_weights, layout):
    repository = tmp_path / "models--org--mae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    {"ours": golden_model(), "vit_mae": stock}[layout].save_pretrained(repository / "snapshots" / COMMIT)
    model = MAEForPreTraining.from_pretrained("org/mae", cache_dir=tmp_path, local_files_only=True)
    assert same_weights(model, official_weights)
    assert model.config.name_or_path == "org/mae"


def test_vit_mae_folder_without_safetensors_is_refused(stock, tmp_path):
    stock.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors; pickled weights are not read"):
        MAEForPreTraining.from_pretrained(tmp_path)


# Names


def test_converting_our_names_changes_nothing(official_weights):
    converted = convert_state_dict(official_weights)
    assert list(converted) == list(official_weights)
    assert all(converted[name] is tensor for name, tensor in official_weights.items())


def test_classifier_weights_pass_under_their_official_names():
    weights = {"fc_norm.weight": torch.ones(2), "head.bias": torch.ones(2)}
    assert list(convert_state_dict(weights)) == ["fc_norm.weight", "head.bias"]
    assert list(convert_state_dict({"classifier.bias": torch.ones(2)})) == ["head.bias"]


def test_left_over_names_are_listed(official_weights):
    with pytest.raises(
        ValueError, match=r"2 of 52 weights belong to no .* known here: blocks.0.ls1.gamma, fc.weight\."
    ):
        convert_state_dict(official_weights | {"fc.weight": torch.ones(1), "blocks.0.ls1.gamma": torch.ones(1)})


def test_attention_without_its_keys_is_left_over():
    weights = {f"vit.layers.0.attention.{part}_proj.weight": torch.ones(2, 2) for part in "qv"}
    with pytest.raises(ValueError, match=r"blocks.0.attn.query.weight, blocks.0.attn.value.weight"):
        convert_state_dict(weights)


# Official .pth files


def test_official_checkpoint_with_arguments_loads(tmp_path, golden, golden_numbers, official_weights):
    path = tmp_path / "checkpoint-799.pth"
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.75, model="mae_vit_tiny")
    torch.save({"model": official_weights, "args": args, "epoch": 799, "optimizer": {"state": {}}}, path)
    model = MAEForPreTraining.from_official(path, num_attention_heads=3, decoder_num_attention_heads=2)
    assert same_weights(model, official_weights)
    loss = model(golden["imgs"], noise=golden["noise"]).loss
    assert_close(loss.item(), golden_numbers["mae"]["loss_norm"], atol=1e-6, rtol=0)


def test_encoder_only_file_loads_in_the_encoder_and_names_the_files_with_decoder(tmp_path, official_weights):
    path = tmp_path / "mae_pretrain_vit_tiny.pth"
    torch.save({"model": without_decoder(official_weights)}, path)
    assert load_official_checkpoint(path).has_decoder is False
    encoder = MAEModel.from_official(path, num_attention_heads=3)
    assert same_weights(encoder, without_decoder(official_weights))
    with pytest.raises(ValueError, match=r"has no decoder .* \*_full.pth and mae_visualize_\*.pth"):
        MAEForPreTraining.from_official(path, num_attention_heads=3)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_files_with_other_pickled_objects_are_refused_unread(tmp_path, official_weights):
    witness = tmp_path / "ran"
    for content in (Payload(str(witness)), fractions.Fraction(1, 2)):
        path = tmp_path / "weights.pth"
        torch.save({"model": official_weights, "args": content}, path)
        with pytest.raises(ValueError, match=r"is refused: it holds Python objects other than tensors"):
            load_official_checkpoint(path)
    assert not witness.exists()


def test_file_without_weights_is_refused(tmp_path):
    path = tmp_path / "log.pth"
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match=r"log.pth holds no weights"):
        load_official_checkpoint(path)


def test_known_sizes_need_no_heads():
    config = MAEForPreTraining.config_class.from_size("ti", num_hidden_layers=1, decoder_num_hidden_layers=1)
    weights = MAEForPreTraining(config).state_dict()
    inferred = config_from_state_dict(weights, norm_pix_loss=True)
    assert (inferred.num_attention_heads, inferred.decoder_num_attention_heads) == (3, 16)
    assert (inferred.image_size, inferred.patch_size) == (224, 16)
    assert (inferred.num_hidden_layers, inferred.decoder_num_hidden_layers) == (1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decoder_num_attention_heads": 2, "norm_pix_loss": True}, r"num_attention_heads is not given .*width 48"),
        ({"num_attention_heads": 3, "norm_pix_loss": True}, r"decoder_num_attention_heads is not given .*width 32"),
        ({"num_attention_heads": 3, "decoder_num_attention_heads": 2}, r"norm_pix_loss is not given .*mae_visualize_"),
    ],
)
def test_what_weights_do_not_show_must_be_given(official_weights, given, message):
    with pytest.raises(ValueError, match=message):
        config_from_state_dict(official_weights, **given)


def test_grid_that_is_no_square_must_be_given(tiny):
    weights = MAEModel(tiny(image_size=(16, 48))).state_dict()
    with pytest.raises(ValueError, match=r"12 patches make no square; pass image_size=\(H, W\)"):
        config_from_state_dict(weights, num_attention_heads=3)
    assert config_from_state_dict(weights, num_attention_heads=3, image_size=(16, 48)).grid == (2, 6)
