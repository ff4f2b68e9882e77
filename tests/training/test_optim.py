"""Parameter groups and ten AdamW steps equal the official code's."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.recipes.base import Optim, Recipe, Schedule
from hf_mae.training.optim import MovingAverage, build_adamw, weight_decay_groups
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
