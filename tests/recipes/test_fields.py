"""Values of a command line become those of a recipe's fields, or a sentence that says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from hf_mae import MAEConfig, MAEModel, birds, evaluate, sweep
from hf_mae.cards.facts import Fact
from hf_mae.cards.tables import precision
from hf_mae.data.augment import CHOICES, augment_image, check_augment, erase, num_uniforms
from hf_mae.data.decoding import Decoder
from hf_mae.data.rows import DigitsSource
from hf_mae.data.splits import Rule, make_splits
from hf_mae.data.stream import steps_per_epoch
from hf_mae.exporting.checked import _stock
from hf_mae.exporting.questions import question
from hf_mae.exporting.source import _weights_folder
from hf_mae.hub.folder_checks import pipeline_check
from hf_mae.models import masking
from hf_mae.models.masking import mask_noise
from hf_mae.models.masking import num_uniforms as num_uniforms_of_masks
from hf_mae.models.targets import make_target
from hf_mae.planning.counts import activation_bytes, item_size
from hf_mae.planning.hardware import GPUS, Hardware
from hf_mae.planning.plan import make_run_plan
from hf_mae.recipes.base import Augment, Model, Schedule, flat
from hf_mae.recipes.classification import ClassifierAugment, ClassifierOptim, LabelledRecipe, Loss
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.recipes.fields import as_text, parse_values, with_field
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.supervised import SUPERVISE
from hf_mae.training.losses import LOSSES, TARGETS, check_loss, classification_loss, trivial_loss
from hf_mae.training.mixing import MixDraws
from hf_mae.training.monitors import open_tracker
from hf_mae.training.optim import build_optimizer
from hf_mae.training.schedules import SCHEDULES, make_plan

RECIPE = SUPERVISE["rexnet-birds-published-intended"]
_RECIPE = PRESETS["mae-vit-b"]
_PLAN = make_plan(_RECIPE, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("augment.label_smoothing", "0,0.02,.06", [0.0, 0.02, 0.06]),
        ("data.repeat_augment", "1, 3", [1, 3]),
        ("augment.flip", "true,false", [True, False]),
        ("optim.name", "adamw,lamb", ["adamw", "lamb"]),
        ("augment.rotate", "15 25,40,", [(15.0, 25.0), (40.0,), ()]),
        ("augment.scale", "0.08 1", [(0.08, 1.0)]),
        ("augment.auto_augment", "original,none", ["original", None]),
        ("augment.rand_augment", "None,rand-m9-mstd0.5", [None, "rand-m9-mstd0.5"]),
        ("model.image_size", "160,160 224", [160, (160, 224)]),
        ("micro_batch", "auto,32,none", ["auto", 32, None]),
        ("optim.agc", "none,0.01", [None, 0.01]),
    ],
)
def test_values_have_the_type_of_their_field(field, text, values):
    parsed = parse_values(RECIPE, field, text)
    assert [(type(v), v) for v in parsed] == [(type(v), v) for v in values]
    assert [parse_values(RECIPE, field, as_text(v))[0] for v in parsed] == values  # text and back
    for value in values:
        assert flat(with_field(RECIPE, field, value)) == flat(RECIPE) | {field: value}


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("augment.label_smoothing", "0.1,x", "augment.label_smoothing='x' is not a number"),
        ("data.repeat_augment", "1.5", "data.repeat_augment='1.5' is not a whole number"),
        ("augment.flip", "yes", "augment.flip='yes' is not true or false"),
        ("optim.name", "adamw,lam", "optim.name='lam' is not adamw, adam, lamb"),
        ("augment.scale", "0.1", "augment.scale='0.1' is not 2 of float"),
        ("augment.auto_augment", "v1", "augment.auto_augment='v1' is not original, v0 or none"),
        ("label_smoothing", "0.1", "'label_smoothing' is unknown to a SuperviseRecipe; did you mean augment.label_sm"),
        ("optim.base_rl", "0.1", "'optim.base_rl' is unknown to a SuperviseRecipe; did you mean optim.base_lr"),
        ("optim", "0.1", "field 'optim' is a group; name one of its fields: optim.base_lr"),
        ("seed", "1,2", "seed is what a sweep sets by itself"),
    ],
)
def test_mistakes_are_named(field, text, said):
    with pytest.raises(ValueError, match=".*" + said.replace(".", r"\.")):
        parse_values(RECIPE, field, text)


# ------------------------------------------------------------------------------------------------ names


def _augment(**fields):
    return replace(Augment(), **fields)


def _crop(augment):
    return augment_image(Image.new("RGB", (40, 40)), [0.5] * num_uniforms(augment), (16, 16), augment)


def _erase(augment):
    erase(np.zeros((3, 16, 16), np.uint8), [0.0] + [0.0] * num_uniforms(augment), augment)


def _loss(loss):
    return classification_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(2), loss, 0.1)


def _unhandled_strategy(call):
    """A strategy that is on the list, as one that somebody begins to add, and nowhere else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking, "STRATEGIES", (*masking.STRATEGIES, "ring"))
        return call()


def _config(**fields):
    config = MAEConfig(image_size=16, patch_size=8, hidden_size=8, num_attention_heads=2)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def _labelled():
    return LabelledRecipe(name="x", source="", expected="")


UNHANDLED = {
    "masks": lambda: _unhandled_strategy(lambda: num_uniforms_of_masks("ring", (4, 4))),
    "noise": lambda: _unhandled_strategy(lambda: mask_noise("ring", torch.zeros(1, 16), (4, 4), 0.75)),
    "target": lambda: make_target(_config(target="token"), torch.zeros(1, 4, 192)),
    "optimizer": lambda: build_optimizer(timm.create_model("test_vit"), ClassifierOptim(name="lion"), num_layers=None),
    "schedule": lambda: replace(_PLAN, schedule=Schedule(name="wsd")).lr_at(5000),
    "plan": lambda: make_plan(replace(_RECIPE, schedule=Schedule(name="wsd")), steps_per_epoch=10),
    "loss": lambda: _loss(Loss(name="focal")),
    "loss target": lambda: _loss(Loss(name="bce", target="hard")),
    "checked loss": lambda: check_loss(Loss(name="focal"), 0.1, 3),
    "trivial loss": lambda: trivial_loss(torch.zeros(2, dtype=torch.int64), Loss(name="focal"), 0.1, 3),
    "mixing": lambda: MixDraws(ClassifierAugment(mixup=0.8, mix_mode="elem"), 0, size=(8, 8), images=4, length=8),
    "tracker": lambda: open_tracker("wandb", Path(), "x", 0),
    "crop": lambda: _crop(_augment(crop="five")),
    "checked crop": lambda: check_augment(_augment(crop="five")),
    "rotation": lambda: _crop(_augment(rotate=(5.0,), rotate_fill="white")),
    "resampling": lambda: _crop(_augment(rotate=(5.0,), rotate_resample="lanczos")),
    "erasing": lambda: _erase(_augment(erase_prob=1.0, erase_fill="white")),
    "AutoAugment": lambda: _crop(_augment(auto_augment="3a")),
    "decoder": lambda: Decoder(0, Augment(), (8, 8), 3, 10_000, "gpu"),
    "remainder": lambda: steps_per_epoch(100, 30, "pad"),
    "division": lambda: make_splits(Rule("grouped", (90.0, 10.0)), np.zeros(100, np.int64), 100),
    "digits": lambda: DigitsSource("validation"),
    "precision": lambda: item_size("fp8"),
    "peak": lambda: GPUS["a100"].peak("fp8"),
    "attention": lambda: activation_bytes(Model(), "no", "flash"),
    "checkpointing": lambda: activation_bytes(Model(), "no", checkpoint="attention"),
    "planned precision": lambda: make_run_plan(_RECIPE, Hardware(precision="fp8")),
    "classes": lambda: evaluate._subset("imagenet-9"),
    "evaluation": lambda: evaluate.evaluate(replace(EVALUATIONS["own"], model="x", classes="imagenet-9")),
    "stock class": lambda: question(MAEModel(_config()), "clip", 3),
    "export": lambda: _stock(MAEModel(_config()), "clip", False),
    "weights": lambda: _weights_folder(Path(), "swa"),
    "style": lambda: str(Fact(0.5, "x", "permille")),
    "number format of a card": lambda: precision({"engine": {"precision": "fp8"}}),
    "task": lambda: pipeline_check(Path(), "depth-estimation", None),
    "stage": lambda: birds._model(Path(), "first"),
    "kind of recipe": lambda: sweep.trainer_of(_labelled()),
}


@pytest.mark.parametrize("name", UNHANDLED)
def test_a_name_that_is_not_handled_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=r"is unknown.*use (one of )?'?\w+") as caught:
        UNHANDLED[name]()
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("group", "field", "handled"),
    [
        (Model, "mask_strategy", masking.STRATEGIES),
        (Schedule, "name", SCHEDULES),
        (Loss, "name", LOSSES),
        (Loss, "target", TARGETS),
        *((Augment, field, choices) for field, choices in CHOICES.items()),
    ],
)
def test_what_a_recipe_names_is_what_is_handled(group, field, handled):
    hint = get_type_hints(group)[field]
    options = [hint] if get_origin(hint) is Literal else get_args(hint)
    named = {choice for option in options for choice in (get_args(option) or (None,))}
    assert named == set(handled)


@pytest.mark.parametrize("name", get_args(get_type_hints(ClassifierOptim)["name"]))
def test_every_optimizer_that_a_recipe_names_is_built(name):
    optimizer = build_optimizer(timm.create_model("test_vit"), ClassifierOptim(name=name), num_layers=None)
    assert name in type(optimizer).__name__.lower()
