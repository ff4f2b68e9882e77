"""A batch of no images goes through every model as one of some images does: shapes are right, and nothing is nan."""

from __future__ import annotations

import pytest
import torch

from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

NOTHING = torch.zeros(0, 3, 32, 32)
CLASSIFIERS = {
    "mean": {"pool": "mean", "head": "linear", "drop_path_rate": 0.2},
    "probe": {"pool": "cls", "head": "batchnorm"},
    "cls": {"pool": "cls", "head": "linear"},
}
PRETRAINING = {
    "random": {},
    "block": {"mask_strategy": "block"},
    "grid": {"mask_strategy": "grid"},
    "mask tokens in the encoder": {"mask_tokens_in_encoder": True},
    "pixels": {"norm_pix_loss": False},
}

each_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])
each_mode = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


def gradients_are_zero(model):
    return all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


@each_attention
@each_mode
def test_an_encoder_encodes_nothing(tiny, attention, training):
    model = MAEModel(tiny(attn_implementation=attention)).train(training)
    assert model(NOTHING).last_hidden_state.shape == (0, 17, 48)
    masked = model(NOTHING, noise=torch.zeros(0, 16), output_hidden_states=True)
    assert masked.last_hidden_state.shape == (0, 5, 48)
    assert [len(tokens) for tokens in masked.hidden_states] == [0, 0, 0]
    assert model.forward_features(NOTHING, "cls").shape == model.forward_features(NOTHING, "mean").shape == (0, 48)


@each_attention
@each_mode
@pytest.mark.parametrize("kind", PRETRAINING)
def test_the_loss_of_nothing_is_zero_and_so_are_its_gradients(tiny, attention, training, kind):
    model = MAEForPreTraining(tiny(attn_implementation=attention, **PRETRAINING[kind])).train(training)
    out = model(NOTHING, return_pred=True)
    assert (out.loss.item(), out.loss.dtype) == (0.0, torch.float32)
    assert out.pred.shape == (0, 16, 192)
    assert out.mask.shape == (0, 16)
    model(NOTHING).loss.backward()
    assert gradients_are_zero(model)


@each_attention
@each_mode
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_classifies_nothing(tiny, attention, training, kind):
    model = MAEForImageClassification(tiny(attn_implementation=attention, num_labels=7, **CLASSIFIERS[kind]))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.startswith("head.0.running")}
    model.train(training)
    assert model.forward_features(NOTHING).shape == (0, 48)
    for labels in (torch.zeros(0, dtype=torch.int64), torch.zeros(0, 7)):
        model.zero_grad()
        out = model(NOTHING, labels=labels)
        assert out.logits.shape == (0, 7)
        assert out.loss.item() == 0.0
        out.loss.backward()
        assert gradients_are_zero(model)
    assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in before.items())


def test_attention_weights_of_nothing_have_their_shape(tiny):
    for make in (MAEModel, MAEForPreTraining, MAEForImageClassification):
        model = make(tiny(attn_implementation="eager")).eval()
        assert [w.shape[0] for w in model(NOTHING, output_attentions=True).attentions] == [0, 0]


@pytest.mark.parametrize("what", ["gelu", "blocks"])
def test_nothing_is_computed_again_too(tiny, what):
    model = MAEForPreTraining(tiny()).train()
    model.checkpoint_activations(what)
    model(NOTHING).loss.backward()
    assert gradients_are_zero(model)


def test_nothing_in_a_compiled_block_in_bfloat16(tiny):
    model = MAEForImageClassification(tiny()).eval()
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, backend="eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        some = model(torch.ones(2, 3, 32, 32)).logits
        assert model(NOTHING).logits.shape == (0, 2)
        assert torch.equal(model(torch.ones(2, 3, 32, 32)).logits, some)
