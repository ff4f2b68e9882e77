"""Parameter groups, optimizers and averages equal those of the official code and of timm."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from timm.utils.agc import adaptive_clip_grad
from timm.utils.model_ema import ModelEmaV3

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
    for step in range(1, 4):
        with torch.no_grad():
            layer.weight.add_(1.0)
        average.update(step)
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
    average.update(1)
    shadow = {name: value.clone() for name, value in average.state().items()}
    with average.swapped():
        assert all(torch.equal(p, shadow[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ZeroDivisionError), average.swapped():
        _ = 1 / 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(value, shadow[name]) for name, value in average.state().items())


# ------------------------------------------------------------------------------------------------ models of timm


@pytest.fixture
def rsb(goldens):
    return json.loads((goldens / "rsb_optim.json").read_text())


@pytest.fixture(scope="module")
def rexnet():
    return timm.create_model("rexnet_100", num_classes=400)


def test_rexnets_groups_are_those_of_timm(rexnet, rsb):
    groups = build_optimizer(rexnet, ClassifierOptim(weight_decay=0.015), num_layers=None).param_groups
    found = [
        {"weight_decay": g["weight_decay"], "tensors": len(g["params"]), "numel": sum(p.numel() for p in g["params"])}
        for g in groups
    ]
    assert found == rsb["param_groups"]["rexnet_100_wd0.015"]
    assert [(g["name"], g["lr_scale"]) for g in groups] == [("layer_0_no_decay", 1.0), ("layer_0_decay", 1.0)]


@pytest.mark.parametrize("weight_decay", [0.015, 0.0])
def test_decayed_vectors_leave_one_group_as_torch_has_it(rexnet, weight_decay):
    optim = ClassifierOptim(weight_decay=weight_decay, decay_vectors=True)
    (group,) = build_optimizer(rexnet, optim, num_layers=None).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (227, weight_decay)


def test_resnets_layers_are_those_of_timm(rsb):
    optim = ClassifierOptim(name="lamb", weight_decay=0.02, layer_decay=0.75)
    optimizer = build_optimizer(timm.create_model("resnet50"), optim, num_layers=None)
    found = [
        {"lr_scale": g["lr_scale"], "weight_decay": g["weight_decay"], "tensors": len(g["params"])}
        for g in optimizer.param_groups
    ]
    assert found == rsb["param_groups"]["resnet50_layer_decay0.75"]
    lines = describe_groups(optimizer, 1.0)
    assert [line.split(":")[0] for line in lines] == [f"layer {i}" for i in range(18)]
    assert lines[-1].startswith("layer 17: lr up to 1 (1 of 1); 2,048,000 values with weight decay 0.02")


@pytest.mark.parametrize(("decay_tokens", "tensors"), [(False, 0), (True, 2)])
def test_tokens_and_positions_of_timms_transformers_are_exempt_unless_asked_for(decay_tokens, tensors):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    optimizer = build_optimizer(model, ClassifierOptim(decay_tokens=decay_tokens), num_layers=None)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert sum(id(p) in decayed for p in (model.cls_token, model.pos_embed)) == tensors
    assert id(model.head.weight) in decayed


def test_vectors_of_an_encoder_of_ours_can_be_decayed(classifier):
    optimizer = build_optimizer(classifier["cls"], ClassifierOptim(decay_vectors=True), num_layers=2)
    assert all(g["weight_decay"] == 0.05 and not g["name"].endswith("no_decay") for g in optimizer.param_groups)


@pytest.mark.parametrize("case", ["a1", "a2", "a3", "clipped_grad", "noclip", "always_adapt"])
def test_three_lamb_steps_equal_timms(goldens, rsb, case):
    """`clip_grad` of the loop stands for LAMB's own clipping. `always_adapt` is not offered, but how it differs shows
    that vectors are not adapted otherwise."""
    tensors, numbers = load_file(goldens / "lamb.safetensors"), rsb["lamb"][case]
    model = Lone(tensors["lamb/w0"], tensors["lamb/b0"], torch.zeros(0, 1))
    optim = ClassifierOptim(name="lamb", weight_decay=numbers["weight_decay_w"], eps=numbers["eps"])
    optimizer = build_optimizer(model, optim, num_layers=2)
    assert {g["name"]: (g["max_grad_norm"], g["always_adapt"]) for g in optimizer.param_groups} == {
        "layer_3_decay": (None, False),
        "layer_3_no_decay": (None, False),
    }
    for group in optimizer.param_groups:
        group["lr"], group["always_adapt"] = numbers["lr"], numbers["always_adapt"]
    factor = float(numbers["loss"].rsplit("*", 1)[1])
    for step in range(1, 4):
        scores = tensors["lamb/x"] @ model.head["w"].T + model.head["b"]
        loss = (scores - tensors["lamb/y"]).square().mean() * factor
        assert loss.item() == pytest.approx(numbers["losses"][step - 1], rel=1e-6)
        loss.backward()
        if numbers["max_grad_norm"] is not None:
            norm = torch.nn.utils.clip_grad_norm_([model.head["w"], model.head["b"]], numbers["max_grad_norm"])
            clipped = torch.cat([model.head[k].grad.flatten() for k in ("w", "b")]).norm()
            assert float(clipped) == pytest.approx(min(float(norm), 1.0), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        for key in ("w", "b"):
            expected = tensors[f"lamb/{case}/{key}{step}"]
            torch.testing.assert_close(model.head[key].detach(), expected, atol=1e-7, rtol=2e-6)


def conv_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, 5)
    )


def steps(model, optimizer, count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        loss = model(torch.randn(6, 3, 4, 4, generator=generator)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("optim", "timms"),
    [
        (ClassifierOptim(name="rmsprop", eps=1e-3), {"opt": "rmsproptf", "momentum": 0.9, "eps": 1e-3}),
        (ClassifierOptim(name="sgd", nesterov=True), {"opt": "sgd", "momentum": 0.9}),
        (ClassifierOptim(name="sgd"), {"opt": "momentum", "momentum": 0.9}),
        (ClassifierOptim(name="adam"), {"opt": "adam"}),
        (ClassifierOptim(), {"opt": "adamw"}),
    ],
    ids=lambda value: value["opt"] if isinstance(value, dict) else "",
)
def test_steps_equal_those_of_timms_optimizer_of_that_name(optim, timms):
    ours, theirs = conv_net(), conv_net()
    reference = create_optimizer_v2(theirs, lr=0.05, weight_decay=0.05, **timms)
    pairs = zip(steps(ours, build_optimizer(ours, optim, num_layers=None)), steps(theirs, reference), strict=True)
    for mine, expected in pairs:
        torch.testing.assert_close(mine, expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_gradients_are_clipped_by_the_weights_they_belong_to_but_for_the_last_layer(name):
    optimizer = build_optimizer(model := conv_net(), ClassifierOptim(name=name, agc=0.01), num_layers=None)
    expected = conv_net()
    for one in (model, expected):
        one(torch.ones(2, 3, 4, 4) + torch.arange(2).view(2, 1, 1, 1)).square().sum().backward()
    adaptive_clip_grad(list(expected.parameters())[:-2], clip_factor=0.01)
    optimizer.step()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model[0].weight.grad.norm() <= 0.011 * conv_net()[0].weight.norm() < model[3].weight.grad.norm()


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (ClassifierOptim(name="lars", decay_vectors=True), "LARS adapts what is decayed.*leave decay_vectors out"),
        (ClassifierOptim(nesterov=True), "nesterov=True needs optim.name=sgd .*not name=adamw.*add --optim.name sgd"),
        (ClassifierOptim(name="sgd", momentum=0.0, nesterov=True), "and a momentum above 0, not .*momentum=0.0"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(optim, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(conv_net(), optim, num_layers=None)


# ------------------------------------------------------------------------------------------------ averages


def test_the_average_may_warm_up_as_timms_does(rsb):
    """The golden starts its count at 0, where nothing has been trained yet."""
    layer = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(layer.weight, 2.0)
    average = MovingAverage(layer, 0.9999, warmup=True)
    for row in rsb["ema_v3"][1:]:
        torch.nn.init.constant_(layer.weight, row["step"] + 2.0)
        average.update(row["step"])
        assert average.decay_at(row["step"]) == pytest.approx(row["decay"], rel=1e-12)
        assert average.state()["weight"].item() == pytest.approx(row["w"], rel=1e-6)
    assert average.decay_at(10**7) == 0.9999


def test_running_statistics_are_averaged_as_timm_averages_them():
    model = conv_net()
    average, reference = MovingAverage(model, 0.9), ModelEmaV3(model, decay=0.9)
    optimizer = build_optimizer(model, ClassifierOptim(), num_layers=None)
    for step in range(1, 4):
        steps(model, optimizer, 1)
        average.update(step)
        reference.update(model)
    expected = {k: v for k, v in reference.module.state_dict().items() if v.is_floating_point()}
    assert average.state().keys() == expected.keys()
    for name, value in average.state().items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6)
    before, pixels = model[1].running_mean.clone(), torch.rand(4, 3, 4, 4)
    assert not torch.allclose(before, average.state()["1.running_mean"], rtol=1e-2)
    with average.swapped():
        torch.testing.assert_close(model.eval()(pixels), reference.module.eval()(pixels))
    assert torch.equal(model[1].running_mean, before)
