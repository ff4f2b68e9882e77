"""Classification on the one loop: the official losses and probe, exact resume, the same statistics for any split."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hf_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.classification import ClassifierOptim
from hf_mae.recipes.crop import EvalCrop
from hf_mae.training import memory
from hf_mae.training.memory import Alive, largest_micro_batch
from hf_mae.training.optim import build_optimizer
from hf_mae.training.statistics import RunningStatistics
from hf_mae.training.tasks import Classification

MEAN, STD = (0.5,) * 3, (0.5,) * 3
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_labels": 10,
}


@pytest.fixture
def golden(goldens):
    return json.loads((goldens / "golden.json").read_text())["vit"]


@pytest.fixture
def tensors(goldens):
    return load_file(goldens / "vit_tiny.safetensors")


def official_task(goldens, pool, **options):
    """The golden classifier; the images are normalised already, so the task is to leave them alone."""
    trunk = {k[3:]: v for k, v in load_file(goldens / "mae_tiny.safetensors").items() if k.startswith("sd.")}
    head = {k[4:]: v for k, v in load_file(goldens / "vit_tiny.safetensors").items() if k.startswith(f"{pool}.")}
    model = MAEForImageClassification(MAEConfig(**TINY, pool="mean" if pool == "gap" else "cls"))
    own = model.state_dict().keys()
    model.load_state_dict({k: v for k, v in (trunk | head).items() if k in own})
    return Classification(model, MEAN, STD, **options)


@pytest.fixture
def batch(goldens):
    """`normalize` undone: floats in place of bytes."""
    images = load_file(goldens / "mae_tiny.safetensors")["imgs"]
    return {"pixel_values": (images * 0.5 + 0.5) * 255}


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_the_loss_of_soft_targets_is_the_official_one(goldens, golden, tensors, batch, pool):
    """Targets of two classes are made by mixing two labels; the golden soft targets are any, so they are put in."""
    task = official_task(goldens, pool).eval()
    with torch.no_grad():
        logits = task.logits(batch)
    torch.testing.assert_close(logits, tensors[f"{pool}.logits"], atol=5e-6, rtol=0)
    soft = -(tensors["soft_targets"] * logits.log_softmax(-1)).sum(-1).mean()
    assert soft.item() == pytest.approx(golden[pool]["loss_soft_target"], abs=5e-6)


@pytest.mark.parametrize("pool", ["gap", "cls"])
def test_hard_and_smoothed_losses_are_the_official_ones(goldens, golden, tensors, batch, pool):
    """The labels of the golden are found among all pairs: no other pair gives its loss."""
    labels = golden_labels(tensors[f"{pool}.logits"], golden[pool]["loss_ce"])
    for name, smoothing in (("loss_ce", 0.0), ("loss_label_smoothing_0.1", 0.1)):
        task = official_task(goldens, pool, label_smoothing=smoothing).eval()
        loss = task(batch | {"labels": labels})["loss"]
        assert loss.item() == pytest.approx(golden[pool][name], abs=1e-5)


def golden_labels(logits, loss):
    losses = {(a, b): -(p[a] + q[b]) / 2 for p, q in [logits.log_softmax(-1)] for a in range(10) for b in range(10)}
    (pair,) = [pair for pair, value in losses.items() if abs(value - loss) < 1e-5]
    return torch.tensor(pair)


def test_three_steps_of_the_official_probe(golden, tensors):
    """LARS at lr 6.4 on batch normalisation and a linear layer, features in place of images."""
    model = MAEForImageClassification(MAEConfig(**TINY, pool="cls", head="batchnorm"))
    model.set_trainable(0)
    linear = model.head[1]
    with torch.no_grad():
        linear.weight.copy_(tensors["gap.head.weight"])
        linear.bias.copy_(tensors["gap.head.bias"])
    task = Classification(model, MEAN, STD)
    optimizer = build_optimizer(task, ClassifierOptim(name="lars", weight_decay=0.0), num_layers=2)
    for features, labels, expected in zip(
        tensors["probe.features"], tensors["probe.labels"], golden["linear_probe"]["losses"], strict=True
    ):
        for group in optimizer.param_groups:
            group["lr"] = golden["linear_probe"]["lr"] * group["lr_scale"]
        loss = task({"features": features, "labels": labels})["loss"]
        assert loss.item() == pytest.approx(expected, abs=2e-5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in (("weight", linear.weight), ("bias", linear.bias)):
        torch.testing.assert_close(value.detach(), tensors[f"probe.{name}"], atol=2e-5, rtol=2e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model.head[0], name), tensors[f"probe.{name}"], atol=1e-6, rtol=1e-6)
    task.eval()
    logits = task.logits({"features": tensors["probe.features"][0]})
    torch.testing.assert_close(logits.detach(), tensors["probe.eval_logits"], atol=5e-5, rtol=2e-5)


def test_features_and_images_give_the_same_scores(goldens, batch):
    task = official_task(goldens, "gap").eval()
    features = task.features(batch["pixel_values"])
    assert torch.equal(task.logits({"features": features}), task.logits(batch))


def test_mixing_is_seen_by_the_images_and_by_the_labels(goldens, batch):
    task = official_task(goldens, "gap").eval()
    plain = batch | {"labels": torch.tensor([3, 7])}
    swapped = plain | {"mix_lam": torch.zeros(2), "mix_box": torch.zeros(2, 4, dtype=torch.int64)}
    half = plain | {"mix_lam": torch.full((2,), 0.5), "mix_box": torch.tensor([[0, 16, 0, 32]] * 2)}
    assert task(swapped)["loss"].item() == pytest.approx(task(plain)["loss"].item(), abs=1e-6)
    assert abs(task(half)["loss"].item() - task(plain)["loss"].item()) > 1e-2


def test_drop_path_noise_reaches_the_model(goldens, batch):
    task = official_task(goldens, "gap").train()
    task.model.drop_path_rates = [0.0, 0.0, 0.5, 0.5]
    kept = task.logits(batch | {"drop_path_noise": torch.ones(2, 4) * 0.9})
    dropped = task.logits(batch | {"drop_path_noise": torch.tensor([[0.9] * 4, [0.1] * 4])})
    assert torch.equal(kept[0], dropped[0])
    assert not torch.equal(kept[1], dropped[1])


def test_attention_is_that_of_the_cls_token_and_leaves_no_trace(goldens, batch):
    task = official_task(goldens, "cls").eval()
    before = task.config._attn_implementation
    weights = task.attention(batch["pixel_values"])
    assert weights.shape == (2, 3, 16)
    assert task.config._attn_implementation == before
    # All of a softmax but what the cls token keeps for itself.
    assert ((weights.sum(-1) < 1) & (weights.sum(-1) > 0)).all()
    assert weights.min() >= 0


def test_the_trivial_loss_is_that_of_guessing_by_frequency(goldens):
    labels = torch.tensor([0, 0, 0, 1])
    assert official_task(goldens, "gap").trivial_loss(labels) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )
    even = official_task(goldens, "gap", label_smoothing=0.1)
    assert even.trivial_loss(torch.arange(10)) == pytest.approx(math.log(10), abs=1e-6)


def test_the_trivial_loss_of_many_images_and_classes_needs_little_memory(goldens):
    """A row of targets per image would be 20 GB on ImageNet."""
    task = official_task(goldens, "gap", label_smoothing=0.1)
    task.num_classes, labels = 1000, torch.arange(20_000) % 10
    with Alive() as alive:
        loss = task.trivial_loss(labels)
    often, seldom = 0.9 / 10 + 0.1 / 1000, 0.1 / 1000
    assert loss == pytest.approx(-10 * often * math.log(often) - 990 * seldom * math.log(seldom))
    assert alive.most < 1e6


@pytest.mark.parametrize(("side", "resized"), [(32, 36), (224, 256), (288, 288), (384, 384)])
def test_the_processor_states_the_rule_that_evaluation_follows(goldens, side, resized):
    """Above 224 pixels the crop is the whole short side (official crop_pct 1.0)."""
    task = official_task(goldens, "gap")
    task.config.image_size = side
    stated = task.processor()
    assert stated["size"] == {"shortest_edge": resized}
    assert min(EvalCrop((side, side)).resized(600, 500)) == resized


@pytest.mark.parametrize(("size", "pct", "resized"), [((64, 256), None, (64, 256)), ((48, 32), 0.9, (53, 35))])
def test_the_processor_of_an_input_that_is_not_square_resizes_both_sides(goldens, size, pct, resized):
    """341adb0 took the larger side for the shortest edge, so that stock code saw a sixteenth of an image."""
    task = official_task(goldens, "gap", crop_pct=pct)
    task.config.image_size = size
    stated = task.processor()
    assert stated["size"] == dict(zip(("height", "width"), resized, strict=True))
    assert stated["crop_size"] == dict(zip(("height", "width"), size, strict=True))


def test_the_processor_states_the_share_that_was_asked_for(goldens):
    task = official_task(goldens, "gap", crop_pct=1.0)
    task.config.image_size = 32
    assert task.processor()["size"] == {"shortest_edge": 32}


def test_the_model_folder_is_a_hugging_face_folder(classifier):
    classifier.train()
    folder = classifier.checkpoints()[-1] / "model"
    model = MAEForImageClassification.from_pretrained(folder)
    assert all(torch.equal(v, classifier.weights()[f"model.{k}"]) for k, v in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["MAEForImageClassification"]
    assert json.loads((folder / "preprocessor_config.json").read_text())["crop_size"] == {"height": 16, "width": 16}


# ------------------------------------------------------------------------------------------------ on the loop


def clockless(run):
    rows = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    times = {"images_per_second", "seconds_waiting_for_data", "waiting_share"}
    return [{k: v for k, v in row.items() if k not in times} for row in rows]


def test_resuming_gives_the_same_bits_as_never_stopping(classifier):
    """Mixup, cutmix, drop path, layer-wise rates and averages; then LARS and running statistics."""
    straight = classifier
    straight.train()
    resumed = replace(classifier, out=classifier.out.with_name("resumed"))
    resumed.train(resume=straight.checkpoints()[0])
    assert straight.checkpoints()[0].name == "step_00000016"
    assert all(torch.equal(v, straight.weights()[k]) for k, v in resumed.weights().items())
    assert clockless(resumed) == [row for row in clockless(straight) if row["step"] > 16]
    moments, expected = resumed.optimizer.state_dict()["state"], straight.optimizer.state_dict()["state"]
    assert moments.keys() == expected.keys()
    assert all(torch.equal(v, expected[i][k]) for i, s in moments.items() for k, v in s.items())
    if straight.average is not None:
        assert all(torch.equal(v, straight.average.state()[k]) for k, v in resumed.average.state().items())
    groups, others = (
        [{k: tuple(v) if k == "betas" else v for k, v in group.items() if k != "params"} for group in groups]
        for groups in (resumed.optimizer.param_groups, straight.optimizer.param_groups)
    )
    assert groups == others
    assert all({"name", "lr_scale"} <= group.keys() for group in groups)


def test_sgd_resumes_exactly(fine_tuning):
    run = replace(fine_tuning, ema=False).change(optim=ClassifierOptim(name="sgd", base_lr=1.0))
    run.train()
    resumed = replace(run, out=run.out.with_name("resumed"))
    resumed.train(resume=run.checkpoints()[0])
    assert all(torch.equal(v, run.weights()[k]) for k, v in resumed.weights().items())


def test_a_run_learns_what_there_is_to_learn(fine_tuning):
    fine_tuning.change(augment=replace(fine_tuning.recipe.augment, mixup=0, cutmix=0), epochs=12).train()
    top1 = [row["top1"] for row in clockless(fine_tuning) if "top1" in row]
    assert top1[-1] > 0.9 > 0.7 > top1[0]


def test_a_frozen_encoder_keeps_its_bits_and_the_head_moves(probe):
    probe.train()
    torch.manual_seed(0)
    fresh = probe.build()[0].state_dict()
    moved = {k for k, v in probe.weights().items() if not torch.equal(v, fresh[k])}
    heads = {"0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias"}
    assert moved == {f"model.head.{name}" for name in heads}


@pytest.mark.parametrize("micro_batch", [2, 4, 8])
def test_running_statistics_move_once_per_update(probe, micro_batch):
    """Their mean is that of all images, whatever the micro-batch."""
    run = replace(probe, micro_batch=micro_batch).change(max_steps=3)
    run.train()
    task, batches = run.build()[0].eval(), iter(run.read(0, 0, 1))
    mean = torch.zeros(32)
    with torch.no_grad():
        task.load_state_dict(run.task.state_dict())
        for _ in range(3):
            mean = 0.9 * mean + 0.1 * task.features(next(batches).tensors()["pixel_values"]).mean(0)
    assert run.task.model.head[0].num_batches_tracked == 3
    torch.testing.assert_close(run.task.model.head[0].running_mean, mean, atol=1e-6, rtol=1e-5)


def test_statistics_of_two_micro_batches_are_averaged():
    layer = torch.nn.BatchNorm1d(2)
    statistics = RunningStatistics(layer)
    one, two = torch.tensor([[0.0, 2.0], [2.0, 2.0]]), torch.tensor([[4.0, 0.0], [8.0, 2.0]])
    for part in (one, two):
        layer(part)
        statistics.collect()
    statistics.update(type("Alone", (), {"num_processes": 1})())
    assert layer.running_mean.tolist() == pytest.approx([0.1 * (1 + 6) / 2, 0.1 * (2 + 1) / 2])
    assert layer.running_var.tolist() == pytest.approx([0.9 + 0.1 * (2 + 8) / 2, 0.9 + 0.1 * (0 + 2) / 2])


def test_measuring_memory_leaves_running_statistics_alone(probe):
    """And works with one image, of which batch normalisation cannot make statistics."""
    task, _ = probe.build()
    before = {k: v.clone() for k, v in task.state_dict().items()}

    def sample(n):
        return {"pixel_values": torch.zeros(n, 3, 16, 16, dtype=torch.uint8), "labels": torch.zeros(n).long()}

    assert largest_micro_batch(task, sample, 8, probe.make_accelerator()) == 8
    assert all(torch.equal(v, before[k]) for k, v in task.state_dict().items())
    assert all(module.training for module in task.modules())


def measured(run, share, monkeypatch, budget):
    monkeypatch.setattr(memory, "_budget", lambda device: budget)
    task, _ = run.build()

    def sample(n):
        return {"pixel_values": torch.zeros(n, 3, 16, 16, dtype=torch.uint8), "labels": torch.zeros(n).long()}

    return largest_micro_batch(task, sample, share, run.make_accelerator())


def test_a_frozen_encoder_needs_memory_though_it_saves_nothing(probe, monkeypatch):
    """What is alive at once in a block is 17 tokens of 4 x 32 floats, twice, at the least: 17 kB an image."""
    assert measured(probe, 2**14, monkeypatch, 17e6) <= 1024


def test_measuring_memory_draws_no_random_numbers_that_are_missed(fine_tuning, monkeypatch):
    """Drop path without draws in the batch takes them from torch."""
    torch.manual_seed(7)
    fine_tuning.build()
    before = torch.get_rng_state()
    torch.manual_seed(7)
    assert measured(fine_tuning, 8, monkeypatch, 1e9) == 8
    assert torch.equal(torch.get_rng_state(), before)
