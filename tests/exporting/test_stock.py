"""Stock classes of transformers and timm compute what ours compute, whatever the options; and say what they cannot."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, BeitModel, ViTModel

from hf_mae import MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.exporting.checked import _write_transformers
from hf_mae.exporting.stock import as_beit_encoder, as_classifier, as_vit_encoder, as_vit_mae, fold_batch_norm
from hf_mae.exporting.timm_vit import as_timm
from hf_mae.models.configuration_mae import height_width

PROCESSOR = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def pixels(model, n=2):
    shape = (n, model.config.num_channels, *height_width(model.config.image_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def load(stock, folder, auto, **options):
    _write_transformers(stock, folder, PROCESSOR)
    model, info = auto.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True, **options
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def close(ours, theirs):
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize(
    "fields",
    [
        {"pool": "mean"},
        {"pool": "mean", "patch_size": (8, 4)},
        {"pool": "mean", "num_channels": 1, "layer_norm_eps": 1e-3},
        {"pool": "mean", "image_size": (32, 32)},
        {"pool": "cls"},
        {"pool": "cls", "pos_embed": "learned", "layer_norm_eps": 1e-3},
        {"pool": "cls", "image_size": (32, 48), "patch_size": (8, 4), "num_channels": 2},
    ],
)
def test_a_classifier_is_the_stock_class_of_its_pool(make, tmp_path, fields):
    model = make(MAEForImageClassification, drop_path_rate=0.2, **fields)
    stock = load(as_classifier(model), tmp_path, AutoModelForImageClassification)
    expected = "BeitForImageClassification" if fields["pool"] == "mean" else "ViTForImageClassification"
    assert type(stock).__name__ == expected
    close(model.double()(pixels(model)).logits, stock(pixels(model)).logits)
    assert stock.config.id2label == {0: "ant", 1: "bee", 2: "cat"}
    assert stock.config.label2id == {"ant": 0, "bee": 1, "cat": 2}


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_batch_norm_is_folded_into_the_head(make, tmp_path, pool):
    model = make(MAEForImageClassification, pool=pool, head="batchnorm")
    folded = fold_batch_norm(model)
    stock = load(as_classifier(folded), tmp_path, AutoModelForImageClassification)
    x = pixels(model)
    theirs = stock(x).logits
    close(folded.double()(x).logits, theirs)  # the export adds nothing
    rounding = (model.double()(x).logits - theirs).abs().max()  # of the folded weights to float32
    assert 0 < rounding < 2e-6
    assert model.config.head == "batchnorm"


def test_the_folded_bias_makes_up_for_rounded_weights(make):
    """With statistics far from 0, each weight's rounding would be multiplied by the mean of its feature."""
    model = make(MAEForImageClassification, head="batchnorm")
    model.head[0].running_mean.fill_(1000.0)
    model.fc_norm.bias.data.fill_(1000.0)
    x = pixels(model)
    moved = (model.double()(x).logits - fold_batch_norm(model.float()).double()(x).logits).abs().max()
    bias = float(fold_batch_norm(model.float()).head.bias.detach().abs().max())
    assert moved < 2 * bias * torch.finfo(torch.float32).eps


def test_scores_trained_with_binary_cross_entropy_are_marked(make):
    stock = as_classifier(make(MAEForImageClassification), problem_type="multi_label_classification")
    assert stock.config_json()["problem_type"] == "multi_label_classification"


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_pix_loss": True},
        {"norm_pix_loss": False, "mask_ratio": 0.9, "layer_norm_eps": 1e-3, "num_channels": 1},
        {"image_size": (40, 40), "mask_ratio": 0.4},
    ],
)
def test_vanilla_pretraining_is_vit_mae_under_the_same_noise(make, tmp_path, fields):
    model = make(MAEForPreTraining, **fields)
    stock = load(as_vit_mae(model), tmp_path, AutoModelForPreTraining)
    x = pixels(model)
    noise = torch.rand(2, model.config.num_patches, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    ours, theirs = model.double()(x, noise=noise), stock(x, noise=noise)
    close(ours.loss, theirs.loss)
    close(ours.pred, theirs.logits)
    close(ours.mask.double(), theirs.mask.double())


def test_vit_mae_has_the_names_of_the_published_weights(make, tmp_path):
    """transformers 5.23 would write `decoder.decoder_encoder.layer`, which version 4 does not read."""
    _write_transformers(as_vit_mae(make(MAEForPreTraining)), tmp_path, PROCESSOR)
    names = set(load_file(tmp_path / "model.safetensors"))
    for published in (
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
        "vit.encoder.layer.1.attention.attention.query.bias",
        "vit.encoder.layer.1.attention.output.dense.weight",
        "vit.encoder.layer.1.layernorm_before.weight",
        "vit.layernorm.bias",
        "decoder.mask_token",
        "decoder.decoder_pos_embed",
        "decoder.decoder_embed.weight",
        "decoder.decoder_layers.1.attention.attention.query.weight",
        "decoder.decoder_layers.1.intermediate.dense.bias",
        "decoder.decoder_norm.weight",
        "decoder.decoder_pred.bias",
    ):
        assert published in names
    assert not any("decoder_encoder" in name for name in names)
    back = MAEForPreTraining.from_pretrained(tmp_path)
    for name, tensor in make(MAEForPreTraining).state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (MAEModel, {}),
        (MAEModel, {"image_size": (32, 48), "patch_size": (8, 4), "num_channels": 1, "pos_embed": "learned"}),
        (MAEForPreTraining, {"mask_strategy": "grid"}),
        (MAEForPreTraining, {"mask_tokens_in_encoder": True}),
    ],
)
def test_the_tokens_of_an_encoder_are_those_of_vit(make, tmp_path, cls, fields):
    model = make(cls, **fields)
    stock = load(as_vit_encoder(model), tmp_path, AutoModel, add_pooling_layer=False)
    assert isinstance(stock, ViTModel)
    x = pixels(model).float()
    encoder = MAEModel(model.config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    close(encoder.double()(x.double()).last_hidden_state, stock(x.double()).last_hidden_state)


def test_the_pooled_encoder_of_beit_is_the_norm_of_the_mean(make, tmp_path):
    """And not the mean of the normed tokens, which is our `forward_features`: BEiT has no norm before its mean."""
    model = make(MAEForPreTraining)
    stock = load(as_beit_encoder(model), tmp_path, AutoModel)
    assert isinstance(stock, BeitModel)
    x = pixels(model)
    encoder = MAEModel(model.config).double().eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    before = encoder(x, output_hidden_states=True).hidden_states[-1]
    theirs = stock(x)
    close(before, theirs.last_hidden_state)
    close(encoder.norm(before[:, 1:].mean(1)), theirs.pooler_output)
    assert (encoder.forward_features(x, "mean") - theirs.pooler_output).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------ timm


@pytest.mark.parametrize(
    "fields",
    [
        {"pool": "mean"},
        {"pool": "cls"},
        {"pool": "mean", "image_size": (32, 48), "patch_size": (8, 4)},
        {"pool": "cls", "num_channels": 1, "hidden_size": 44, "intermediate_size": 49},
    ],
)
def test_a_classifier_is_a_vit_of_timm(make, tmp_path, fields):
    model = make(MAEForImageClassification, **fields)
    channels = model.config.num_channels
    as_timm(model, tmp_path, {"image_mean": [0.5] * channels, "image_std": [0.25] * channels})
    x = pixels(model)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval().double()
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    expected = model.double()(x).logits
    close(expected, network(x))
    close(expected, wrapped(x).logits)
    assert wrapped.config.id2label == {0: "ant", 1: "bee", 2: "cat"}


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("image_size", [32, (32, 48)])
def test_an_encoder_of_timm_gives_tokens_and_our_features(make, tmp_path, pool, image_size):
    model = make(MAEForPreTraining, pool=pool, image_size=image_size)
    assert as_timm(model, tmp_path, PROCESSOR) == ["the decoder is left out"]
    x = pixels(model)
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval().double()
    wrapped = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    model = model.double()
    close(model.forward_features(x), network(x))
    close(model.forward_features(x), wrapped(x).pooler_output)
    encoder = MAEModel(model.config).double().eval()
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k in encoder.state_dict()})
    close(encoder(x).last_hidden_state, network.forward_features(x))
    close(encoder(x).last_hidden_state, wrapped(x).last_hidden_state)


def test_a_known_size_has_its_own_name_in_timm(make, tmp_path):
    model = make(MAEModel, hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768)
    as_timm(model, tmp_path, PROCESSOR)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "vit_tiny_patch16_224"


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_strategy": "block"}, "mask_strategy='block' cannot be told to ViTMAE"),
        ({"mask_strategy": "grid"}, "mask_strategy='grid' cannot be told to ViTMAE"),
        ({"mask_tokens_in_encoder": True}, "mask_tokens_in_encoder=True cannot be told"),
        ({"pos_embed": "learned"}, "pos_embed='learned' cannot be told"),
        ({"image_size": (32, 48)}, "image_size=(32, 48) is not square"),
        ({"patch_size": (8, 4)}, "patch_size=(8, 4) is not square"),
    ],
)
def test_vit_mae_refuses_what_it_would_ignore(make, fields, message):
    with pytest.raises(ValueError, match=r"target 'hf_mae'") as error:
        as_vit_mae(make(MAEForPreTraining, **fields))
    assert message in str(error.value)


@pytest.mark.parametrize("form", [as_classifier, as_beit_encoder])
def test_beit_refuses_images_that_are_not_square(make, form):
    model = make(MAEForImageClassification if form is as_classifier else MAEModel, image_size=(32, 48))
    with pytest.raises(ValueError, match=r"image_size=\(32, 48\) is not square.*target 'timm'"):
        form(model)


def test_beit_refuses_an_encoder_of_the_cls_token(make):
    with pytest.raises(ValueError, match=r"pool='cls' cannot be told to BeitModel.*'timm'"):
        as_beit_encoder(make(MAEModel, pool="cls"))


def test_timm_refuses_another_epsilon(make, tmp_path):
    with pytest.raises(ValueError, match=r"layer_norm_eps=1e-12 cannot be told to timm, .* 1e-06; use target 'vit'"):
        as_timm(make(MAEModel, layer_norm_eps=1e-12), tmp_path, PROCESSOR)


def test_nothing_of_ours_is_left_in_a_config(make):
    stocks = [
        as_vit_mae(make(MAEForPreTraining)),
        as_classifier(make(MAEForImageClassification)),
        as_vit_encoder(make(MAEModel)),
        as_beit_encoder(make(MAEModel)),
    ]
    for stock in stocks:
        config = stock.config_json()
        assert not {"auto_map", "mask_strategy", "pos_embed", "head_init_std", "pool", "_name_or_path"} & config.keys()
        assert config["architectures"] == [stock.architecture]
        assert config["dtype"] == "float32"
        assert config["layer_norm_eps"] == 1e-6
        assert ("id2label" in config) == ("Classification" in stock.architecture)
