"""The task of timm's models: all of its randomness comes with the batch, and training equals timm's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

from hf_mae.models.timm_models import TimmSpec, checkpoint_blocks, compile_features, create, drop_paths, load
from hf_mae.recipes.classification import ClassifierAugment, Loss
from hf_mae.training.losses import trivial_loss
from hf_mae.training.tasks import TimmClassification

SPEC = TimmSpec(
    architecture="test_resnet",
    names=("ant", "bee", "cat"),
    image_size=(32, 32),
    test_image_size=(32, 32),
    crop_pct=0.95,
    channels=3,
    drop_path_rate=0.3,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.4),
)
# Channels last and depthwise convolutions; attention.
KINDS = {"resnet": SPEC} | {
    name: replace(SPEC, architecture=f"test_{name}") for name in ("efficientnet", "convnext", "vit")
}


def make(spec=SPEC, **options):
    torch.manual_seed(0)
    return TimmClassification(create(spec), spec, **options)


def batch_of(task, n=8):
    g = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randint(0, 256, (n, 3, 32, 32), generator=g, dtype=torch.uint8),
        "labels": torch.randint(0, 3, (n,), generator=g),
        "drop_path_noise": torch.rand(n, len(drop_paths(task.model)), generator=g),
        "dropout_noise": torch.rand(n, task.num_features, generator=g),
        "mix_lam": torch.full((n,), 0.7),
        "mix_box": torch.zeros(n, 4, dtype=torch.int64),
    }


def plain(batch):
    return {name: batch[name] for name in ("pixel_values", "labels")}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_timms_own_forward(kind):
    task = make(KINDS[kind]).eval()
    theirs = timm.create_model(KINDS[kind].architecture, num_classes=3, **image_size_of(kind))
    theirs.load_state_dict(task.model.state_dict())
    batch = plain(batch_of(task))
    pixels = (batch["pixel_values"] / 255 - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(
        3, 1, 1
    )
    with torch.no_grad():
        torch.testing.assert_close(task.logits(batch), theirs.eval()(pixels), atol=1e-5, rtol=1e-5)
        features = task.features(batch["pixel_values"])
    assert features.shape == (8, task.num_features)
    torch.testing.assert_close(task.model.get_classifier()(features), task.logits(batch))


def image_size_of(kind):
    return {"img_size": 32} if kind == "vit" else {}


@pytest.mark.parametrize("kind", ["resnet", "convnext", "vit"])  # timm's test_efficientnet has no residual branch
def test_training_draws_nothing_and_depends_on_the_draws_of_the_batch(kind):
    task = make(KINDS[kind], drop_rate=0.5).train()
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # timm starts the last one of a block at 0, which hides the block
            torch.nn.init.ones_(module.weight)
    batch, state = batch_of(task), torch.get_rng_state()
    first = task.logits(batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(task.logits(batch), first)
    for name in ("drop_path_noise", "dropout_noise"):
        assert not torch.equal(task.logits(batch | {name: batch[name].flip(0)}), first)
    task.eval()
    assert torch.equal(task.logits(batch), task.logits({k: v for k, v in batch.items() if "noise" not in k}))


def test_stochastic_depth_concerns_its_own_sample_only():
    """A network without batch statistics: only the sample whose draws change gets other scores."""
    task = make(KINDS["vit"]).train()
    batch = batch_of(task) | {"mix_lam": torch.ones(8)}
    other = batch["drop_path_noise"].clone()
    other[3] = 1 - other[3]
    changed = (task.logits(batch) != task.logits(batch | {"drop_path_noise": other})).any(1)
    assert changed.tolist() == [i == 3 for i in range(8)]


def test_dropout_removes_features_by_their_draws_and_scales_the_rest():
    task = make(replace(SPEC, drop_path_rate=0.0), drop_rate=0.25).train()
    batch = batch_of(task)
    del batch["mix_lam"], batch["mix_box"]
    features = task.features(batch["pixel_values"])
    kept = features * (batch["dropout_noise"] >= 0.25) / 0.75
    assert 0.2 < (batch["dropout_noise"] < 0.25).float().mean() < 0.3
    torch.testing.assert_close(task.logits(batch), task.model.fc(kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_noise": torch.rand(8, 3)}, r"dropout_noise of shape \(8, 3\) does not fit; dropout 0.5 needs \[8, "),
        ({"drop_path_noise": torch.rand(8, 1)}, r"drop_path_noise of shape \(8, 1\) does not fit; pass \[n, "),
    ],
)
def test_draws_that_do_not_fit_are_refused(change, message):
    task = make(drop_rate=0.5).train()
    with pytest.raises(ValueError, match=message):
        task(batch_of(task) | change)


def test_missing_draws_are_refused():
    task = make(drop_rate=0.5).train()
    batch = batch_of(task)
    with pytest.raises(ValueError, match=r"dropout_noise of shape None"):
        task({k: v for k, v in batch.items() if k != "dropout_noise"})
    with pytest.raises(RuntimeError, match=r"one draw for each of 8 samples and was given none"):
        task({k: v for k, v in batch.items() if k != "drop_path_noise"})


@pytest.mark.parametrize("loss", [Loss(), Loss(name="bce")])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_do_not_depend_on_micro_batches(kind, loss):
    """Statistics of batch normalisation are fixed here: those of a micro-batch are its own."""
    task = make(KINDS[kind], loss=loss, drop_rate=0.5, label_smoothing=0.1).train()
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    batch = batch_of(task)
    task(batch)["loss"].backward()
    whole = {name: p.grad.clone() for name, p in task.named_parameters()}
    task.zero_grad()
    for part in range(2):
        (task({name: tensor[part::2] for name, tensor in batch.items()})["loss"] / 2).backward()
    for name, parameter in task.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_have_the_strides_of_their_weights(kind):
    """DDP warns where they have not, and fused optimizers read raw memory."""
    task = make(KINDS[kind]).train()
    task.has_depthwise = True  # channels last, whatever the network
    task(batch_of(task))["loss"].backward()
    assert all(p.is_contiguous() and p.grad.stride() == p.stride() for p in task.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_bf16_trains(kind):
    task = make(KINDS[kind], loss=Loss(name="bce"), drop_rate=0.2).train()
    batch = batch_of(task)
    full = task(batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(batch)["loss"]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full.item(), rel=0.05)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in task.parameters())


def test_recomputed_blocks_give_the_same_gradients():
    """The draws of stochastic depth are read again in the backward pass."""
    task, again = make(KINDS["vit"]).train(), make(KINDS["vit"]).train()
    checkpoint_blocks(again.model)
    batch = batch_of(task)
    for each in (task, again):
        each(batch)["loss"].backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(task.parameters(), again.parameters(), strict=True))


def test_a_compiled_network_takes_new_draws_without_being_compiled_again(monkeypatch):
    """Captured as for inductor, whose code takes twenty seconds to make."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    task, compiled = make(KINDS["vit"]).train(), make(KINDS["vit"]).train()
    compile_features(compiled.model)
    batch = batch_of(task)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(3):
            new = batch | {"drop_path_noise": batch["drop_path_noise"].roll(shift, 0)}
            torch.testing.assert_close(compiled.logits(new), task.logits(new), atol=1e-5, rtol=1e-4)
    assert compiled.state_dict().keys() == task.state_dict().keys()


def test_losses_see_both_labels_of_a_mixed_image():
    task = make(loss=Loss(name="bce", target="binarize"), label_smoothing=0.0).eval()
    batch = {k: v for k, v in batch_of(task).items() if "noise" not in k}
    targets = torch.zeros(8, 3).scatter_(1, batch["labels"][:, None], 1)
    targets = torch.maximum(targets, targets.roll(4, 0))
    expected = F.binary_cross_entropy_with_logits(task.logits(batch), targets)
    assert task(batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_trivial_loss_knows_how_images_are_mixed():
    augment, labels = ClassifierAugment(mixup=0.2, cutmix=1.0), torch.tensor([0, 0, 1, 2])
    task = make(loss=Loss(name="bce"), augment=augment)
    assert task.trivial_loss(labels) == trivial_loss(labels, Loss(name="bce"), 0.0, 3, augment, (32, 32))
    assert task.trivial_loss(labels) > make(loss=Loss(name="bce")).trivial_loss(labels)


def test_the_model_folder_is_timms(tmp_path):
    task = make(replace(SPEC, architecture="test_efficientnet"), loss=Loss(name="bce")).eval()
    task.write_model(tmp_path / "model", task.model.state_dict())
    model, spec = load(tmp_path / "model")
    assert spec.names == SPEC.names
    batch = plain(batch_of(task))
    with torch.no_grad():
        assert torch.equal(TimmClassification(model, spec).eval().logits(batch), task.logits(batch))
    assert not task.can_attend


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [Loss(), Loss(name="bce")], ids=["ce", "bce"])
def test_an_empty_batch_has_no_scores_no_loss_and_leaves_no_trace(kind, training, loss):
    """Some of timm's models cannot reshape nothing: the rank whose share is empty would take all others down."""
    task = make(KINDS[kind], loss=loss, drop_rate=0.5).train(training)
    modes = [module.training for module in task.modules()]
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    empty = {name: tensor[:0] for name, tensor in batch_of(task).items()}
    assert task.logits(empty).shape == (0, 3)
    assert task.features(empty["pixel_values"]).shape == (0, task.num_features)
    out = task(empty)["loss"]
    assert out.item() == 0.0
    out.backward()
    assert all(p.grad is not None and not p.grad.any() for p in task.parameters())
    assert [module.training for module in task.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
