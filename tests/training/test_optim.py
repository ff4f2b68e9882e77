"""Parameter groups and ten AdamW steps equal the official code's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.base import Optim, Recipe, Schedule
from hf_mae.recipes.classification import ClassifierOptim
from hf_mae.training.optim import (
    MovingAverage,
    build_adamw,
    build_optimizer,
    describe_groups,
    layer_decay_groups,
    layer_of,
    weight_decay_groups,
)
from hf_mae.training.schedules import make_plan


@pytest.fixture
def golden(goldens):
    return json.loads((goldens / "golden.json").read_text())


@pytest.fixture
def model(golden, goldens):
    c = golden["mae"]["config"]
    config = MAEConfig(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        hidden_size=c["embed_dim"],
        num_hidden_layers=c["depth"],
        num_attention_heads=c["num_heads"],
        decoder_hidden_size=c["decoder_embed_dim"],
        decoder_num_hidden_layers=c["decoder_depth"],
        decoder_num_attention_heads=c["decoder_num_heads"],
        norm_pix_loss=True,
    )
    model = MAEForPreTraining(config)
    weights = load_file(goldens / "mae_tiny.safetensors")
    model.load_state_dict({k[3:]: v for k, v in weights.items() if k.startswith("sd.")})
    return model


def test_groups_are_the_official_ones_in_their_order(model, golden):
    groups = weight_decay_groups(model.named_parameters(), 0.05)
    for group, expected in zip(groups, golden["pretrain_steps"]["param_groups"], strict=True):
        assert group["weight_decay"] == expected["weight_decay"]
        assert sorted(group["names"]) == sorted(expected["names"])


def test_tokens_can_be_exempted_from_decay(model):
    plain, decayed = weight_decay_groups(model.named_parameters(), 0.05, decay_tokens=False)
    assert {"cls_token", "mask_token"} <= set(plain["names"])
    assert not {"cls_token", "mask_token"} & set(decayed["names"])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ten_adamw_steps_equal_the_official_ones(model, golden, accumulation):
    """Warm-up, cosine, weight decay and accumulation at once; the tolerance is Adam's noise on near-zero gradients."""
    recorded = golden["pretrain_steps"][f"accum_{accumulation}"]
    recipe = Recipe(
        name="t",
        source="",
        expected="",
        epochs=2,
        global_batch=256,
        schedule=Schedule(warmup_epochs=1),
        optim=Optim(base_lr=1e-3),
    )
    plan, optimizer = make_plan(recipe, steps_per_epoch=5), build_adamw(model, recipe.optim)
    generator = torch.Generator().manual_seed(3)
    for row in recorded["log"]:
        x, noise = torch.randn(2, 3, 32, 32, generator=generator), torch.rand(2, 16, generator=generator)
        if row["it"] % accumulation == 0:
            for group in optimizer.param_groups:
                group["lr"] = plan.lr_at(5 * row["epoch"] + row["it"])
        if row["it"] == 0:
            optimizer.zero_grad()  # the official code drops the fifth micro-batch of an epoch here; our loop never does
        assert optimizer.param_groups[0]["lr"] == pytest.approx(row["lr"], rel=1e-12)
        loss = model(x, noise=noise).loss
        assert loss.item() == pytest.approx(row["loss"], abs=5e-6)
        (loss / accumulation).backward()
        if (row["it"] + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    norms = {name: p.double().norm().item() for name, p in model.state_dict().items()}
    # The key third of qkv.bias has a gradient of rounding noise, which Adam turns into steps of size lr.
    expected = {k: v for k, v in recorded["final_param_l2"].items() if not k.endswith("qkv.bias")}
    assert {k: norms[k] for k in expected} == pytest.approx(expected, rel=2e-5)


def test_moving_average_follows_its_recurrence():
    layer = torch.nn.Linear(2, 2)
    average, expected = MovingAverage(layer, 0.9), layer.weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            layer.weight.add_(1.0)
        average.update()
        expected = 0.9 * expected + 0.1 * layer.weight.detach()
    torch.testing.assert_close(average.state()["weight"], expected)


def test_fused_adamw_keeps_the_official_hyperparameters(model):
    optimizer = build_adamw(model, replace(Optim(), weight_decay=0.05))
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.05]
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-8 and g["fused"] for g in optimizer.param_groups)


# ------------------------------------------------------------------------------------------------ classifiers


@pytest.fixture
def classifier(golden):
    """The golden's: two blocks, positions that are trained."""
    c = golden["mae"]["config"]
    config = MAEConfig(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        hidden_size=c["embed_dim"],
        num_hidden_layers=c["depth"],
        num_attention_heads=c["num_heads"],
        num_labels=golden["vit"]["config"]["num_classes"],
        pos_embed="learned",
    )
    return {pool: MAEForImageClassification(replace_pool(config, pool)) for pool in ("mean", "cls")}


def replace_pool(config, pool):
    return MAEConfig.from_dict(config.to_dict() | {"pool": pool})


@pytest.mark.parametrize("decay", [0.75, 0.65])
@pytest.mark.parametrize(("key", "pool"), [("gap", "mean"), ("cls", "cls")])
def test_layer_decay_groups_are_the_official_ones_in_their_order(classifier, golden, key, pool, decay):
    model = classifier[pool]
    groups = layer_decay_groups(model.named_parameters(), num_layers=2, weight_decay=0.05, layer_decay=decay)
    found = [{k: group[k] for k in ("lr_scale", "weight_decay")} for group in groups]
    expected = golden["vit"][key][f"layer_decay_{decay}"]
    assert found == [{k: group[k] for k in ("lr_scale", "weight_decay")} for group in expected]
    for group, official in zip(groups, expected, strict=True):
        assert sorted(group["names"]) == sorted(official["names"])
        assert [id(p) for p in group["params"]] == [id(model.get_parameter(n)) for n in group["names"]]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("cls_token", 0),
        ("pos_embed", 0),
        ("patch_embed.proj.weight", 0),
        ("blocks.0.norm1.bias", 1),
        ("blocks.11.mlp.fc2.weight", 12),
        ("norm.weight", 13),
        ("fc_norm.bias", 13),
        ("head.1.weight", 13),
    ],
)
def test_the_norm_belongs_to_the_head_and_not_to_the_last_block(name, layer):
    assert layer_of(name, 12) == layer


def test_tokens_of_a_classifier_can_be_decayed(classifier):
    groups = layer_decay_groups(
        classifier["cls"].named_parameters(), num_layers=2, weight_decay=0.05, layer_decay=1.0, decay_tokens=True
    )
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert {"cls_token", "pos_embed"} < decayed


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_only_what_is_trained_is_in_the_optimizer(classifier, name):
    model = classifier["cls"]
    model.set_trainable(1)
    optimizer = build_optimizer(model, ClassifierOptim(name=name, layer_decay=0.75), num_layers=2)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {n for n, p in model.named_parameters() if id(p) in held}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(("blocks.1.", "norm.", "head."))}
    assert {g["name"]: g["lr_scale"] for g in optimizer.param_groups} == {
        "layer_2_no_decay": 0.75,
        "layer_2_decay": 0.75,
        "layer_3_no_decay": 1.0,
        "layer_3_decay": 1.0,
    }


def test_nothing_to_train_is_refused(classifier):
    with pytest.raises(ValueError, match=r"every parameter is frozen.*raise --trainable-blocks"):
        build_optimizer(classifier["cls"].requires_grad_(False), ClassifierOptim(), num_layers=2)


class Lone(torch.nn.Module):
    """The golden's matrix, vector and zeros, under names of a head."""

    def __init__(self, w, b, z):
        super().__init__()
        self.head = torch.nn.ParameterDict({"w": w.clone(), "b": b.clone(), "z": z.clone()})


def test_three_lars_steps_equal_the_official_ones(goldens):
    """A matrix, a vector, a matrix of zeros; in the third step a gradient of zeros."""
    golden = load_file(goldens / "lars.safetensors")
    model = Lone(golden["w0"], golden["b0"], golden["z0"])
    optim = ClassifierOptim(name="lars", momentum=0.9, weight_decay=0.01)
    optimizer = build_optimizer(model, optim, num_layers=2)
    adapted = {g["name"]: g["always_adapt"] for g in optimizer.param_groups}
    assert adapted == {"layer_3_decay": True, "layer_3_no_decay": False}
    parameters = [model.head[k] for k in ("w", "b", "z")]
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        for i, parameter in enumerate(parameters):
            parameter.grad = golden[f"grad{step}.{i}"].clone()
        optimizer.step()
        for i, parameter in enumerate(parameters):
            torch.testing.assert_close(parameter.detach(), golden[f"param{step + 1}.{i}"], atol=2e-7, rtol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lars_equals_a_written_out_reference(weight_decay):
    """Also without weight decay, where timm by itself adapts nothing."""
    generator = torch.Generator().manual_seed(0)
    model = Lone(*(torch.randn(*shape, generator=generator) for shape in ((4, 3), (5,), (2, 2))))
    optimizer = build_optimizer(model, ClassifierOptim(name="lars", weight_decay=weight_decay), num_layers=2)
    expected = {k: p.detach().double().clone() for k, p in model.head.items()}
    momentum = {k: torch.zeros_like(p) for k, p in expected.items()}
    for _ in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.3
        for k, parameter in model.head.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            update = parameter.grad.double()
            if parameter.ndim > 1:
                update = update + weight_decay * expected[k]
                update = update * 0.001 * expected[k].norm() / update.norm()
            momentum[k] = 0.9 * momentum[k] + update
            expected[k] = expected[k] - 0.3 * momentum[k]
        optimizer.step()
    for k, parameter in model.head.items():
        torch.testing.assert_close(parameter.detach().double(), expected[k], atol=1e-6, rtol=1e-6)


def test_effective_rates_are_told_for_each_layer(classifier):
    optimizer = build_optimizer(classifier["mean"], ClassifierOptim(layer_decay=0.5), num_layers=2)
    lines = describe_groups(optimizer, 1e-3)
    assert [line.split(";")[0] for line in lines] == [
        "layer 0: lr up to 0.000125 (0.125 of 0.001)",
        "layer 1: lr up to 0.00025 (0.25 of 0.001)",
        "layer 2: lr up to 0.0005 (0.5 of 0.001)",
        "layer 3: lr up to 0.001 (1 of 0.001)",
    ]
    assert "480 values with weight decay 0.05" in lines[-1]  # the head: 10 classes of 48
    assert "106 values with weight decay 0" in lines[-1]  # fc_norm and the bias


def test_weights_are_their_averages_inside_and_what_they_were_outside(classifier):
    model = classifier["mean"]
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    average.update()
    shadow = {name: value.clone() for name, value in average.state().items()}
    with average.swapped():
        assert all(torch.equal(p, shadow[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ZeroDivisionError), average.swapped():
        _ = 1 / 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, shadow[name]) for name, value in average.state().items())
