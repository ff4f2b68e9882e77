from __future__ import annotations

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification, ViTMAEForPreTraining, ViTModel

from hf_mae.exporting.stock import as_classifier, as_vit_encoder, as_vit_mae
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.models.pos_embed import positions_for, resize_pos_embed, sincos_pos_embed


@pytest.mark.parametrize(("dim", "side"), [(48, 4), (64, 7), (32, 4)])
def test_table_is_the_official_one_bit_for_bit(goldens, dim, side):
    expected = load_file(goldens / "pos_embed.safetensors")[f"sincos_{dim}_{side}"]
    assert torch.equal(sincos_pos_embed(dim, (side, side)), expected)


def test_table_of_vit_b_has_the_official_hash(golden_numbers):
    table = sincos_pos_embed(768, (14, 14))
    digest = hashlib.sha256(table.numpy().tobytes()).hexdigest()
    assert digest == golden_numbers["pos_embed"]["vit_base_14x14_768_float32_sha256"]


@pytest.mark.parametrize(("row", "col"), [(0, 1), (1, 0), (1, 2)])
def test_cells_computed_by_hand(row, col):
    table = sincos_pos_embed(8, (2, 3))
    expected = []
    for position in (col, row):  # the column comes first
        angles = [position * 1.0, position * 0.01]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    torch.testing.assert_close(table[1 + 3 * row + col], torch.tensor(expected), atol=1e-7, rtol=0)  # float32 rounding


def test_cls_row_is_zero():
    assert sincos_pos_embed(8, (2, 3))[0].tolist() == [0] * 8


@pytest.mark.parametrize("side", [3, 6])
def test_bicubic_resize_is_the_official_one(goldens, side):
    tables = load_file(goldens / "pos_embed.safetensors")
    resized = resize_pos_embed(tables["interp.source"], (4, 4), (side, side))
    torch.testing.assert_close(resized, tables[f"interp.to_{side}"], atol=1e-6, rtol=0)  # float32 sums


def test_resize_keeps_rows_and_columns_apart():
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)  # varies with the row only
    resized = resize_pos_embed(rows, (4, 4), (8, 2), num_prefix=0).view(8, 2)
    torch.testing.assert_close(resized[:, 0], resized[:, 1], atol=1e-6, rtol=0)
    assert bool((resized[1:, 0] > resized[:-1, 0]).all())


def test_sincos_at_another_size_is_the_table_of_that_size():
    table = sincos_pos_embed(8, (2, 2))[None]
    other = positions_for(table, (2, 2), (3, 5), "sincos", fixed=True)
    assert torch.equal(other[0], sincos_pos_embed(8, (3, 5)))


@pytest.mark.parametrize(
    ("how", "fixed", "message"),
    [
        (None, True, r"pixel_values make 3 x 5 patches, but the model was built for 2 x 2; .*'sincos' or 'bicubic'"),
        ("sincos", False, r"would replace learned positions; use 'bicubic'"),
        ("linear", True, r"interpolate_pos_encoding='linear' is unknown; use 'bicubic', 'sincos' or None"),
    ],
)
def test_another_size_needs_a_decision(how, fixed, message):
    with pytest.raises(ValueError, match=message):
        positions_for(torch.zeros(1, 5, 8), (2, 2), (3, 5), how, fixed=fixed)


# As stock transformers


def as_stock(stock, kind):
    options = {"add_pooling_layer": False} if kind is ViTModel else {}
    return kind.from_pretrained(None, config=stock.config, state_dict=dict(stock.weights), **options).eval()


@pytest.mark.parametrize("pos_embed", ["sincos", "learned"])
@pytest.mark.parametrize("size", [(48, 48), (32, 32), (24, 56), (16, 64)])
def test_true_does_what_stock_models_do_at_another_size(tiny, size, pos_embed):
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, *size)
    model = MAEForPreTraining(tiny(pos_embed="sincos")).eval()
    model.config.pos_embed = pos_embed
    encoder = MAEModel(model.config).eval()
    encoder.load_state_dict({name: model.state_dict()[name] for name in encoder.state_dict()})
    stock = as_stock(as_vit_encoder(encoder), ViTModel)
    with torch.no_grad():
        ours = encoder(pixels, interpolate_pos_encoding=True).last_hidden_state
        theirs = stock(pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    if pos_embed == "learned":
        return
    stock = as_stock(as_vit_mae(model), ViTMAEForPreTraining).vit
    noise = torch.rand(2, size[0] // 8 * (size[1] // 8))
    with torch.no_grad():
        ours = encoder(pixels, noise, interpolate_pos_encoding=True).last_hidden_state
        theirs = stock(pixels, noise, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_classifiers_take_true_as_stock_ones_do(tiny):
    torch.manual_seed(0)
    model = MAEForImageClassification(tiny(pool="cls", num_labels=5, head_init_std=0.5)).eval()
    stock = as_stock(as_classifier(model), ViTForImageClassification)
    pixels = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        ours = model(pixels, interpolate_pos_encoding=True).logits
        theirs = stock(pixels, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_both_tables_of_a_pretraining_model_are_resized_in_two_dimensions(tiny):
    torch.manual_seed(0)
    model = MAEForPreTraining(tiny()).eval()
    larger = MAEForPreTraining(tiny(image_size=(48, 40))).eval()
    weights = model.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        weights[name] = resize_pos_embed(weights[name], (4, 4), (6, 5))
    larger.load_state_dict(weights)
    pixels, noise = torch.randn(2, 3, 48, 40), torch.rand(2, 30)
    ours, theirs = model(pixels, noise, interpolate_pos_encoding=True), larger(pixels, noise)
    assert torch.equal(ours.pred, theirs.pred)
    assert torch.equal(ours.loss, theirs.loss)


@pytest.mark.parametrize("flag", [None, False])
@pytest.mark.parametrize("kind", [MAEModel, MAEForPreTraining, MAEForImageClassification])
def test_without_the_flag_another_size_is_refused(tiny, kind, flag):
    model = kind(tiny())
    with pytest.raises(ValueError, match="pass interpolate_pos_encoding=True"):
        model(torch.zeros(1, 3, 48, 48), interpolate_pos_encoding=flag)
    assert model(torch.zeros(1, 3, 32, 32), interpolate_pos_encoding=flag)
