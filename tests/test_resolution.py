"""Curves of accuracy by test resolution: one evaluation for each point, each made once."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mae import resolution
from hf_mae.evaluate import evaluate
from hf_mae.models.timm_models import TimmSpec, create, load, write_timm_folder
from hf_mae.recipes.base import Data
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.resolution import sweep_resolution


@pytest.fixture
def recipe(tmp_path):
    for name in range(3):
        folder = tmp_path / "data" / str(name)
        folder.mkdir(parents=True)
        for value in range(3):
            pixels = np.random.default_rng([name, value]).integers(0, 255, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{value}.png")
    return replace(EVALUATIONS["own"], data=Data(path=str(tmp_path / "data")), num_workers=0)


@pytest.fixture
def models(tmp_path):
    """Two models, trained at 32 and at 48 pixels."""
    folders = []
    for size in (32, 48):
        torch.manual_seed(size)
        folders.append(str(tmp_path / f"at-{size}"))
        spec = TimmSpec(
            architecture="test_resnet",
            names=("0", "1", "2"),
            image_size=(size, size),
            test_image_size=(size, size),
            crop_pct=1.0,
            channels=3,
            drop_path_rate=0.0,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
        )
        made = create(spec)
        torch.nn.init.normal_(made.get_classifier().weight)
        write_timm_folder(tmp_path / f"at-{size}", spec, made.state_dict())
    return folders


def test_each_point_is_an_evaluation_at_that_size(recipe, models, tmp_path):
    out = tmp_path / "out"
    found = sweep_resolution(models, recipe, sizes=(48, 32), out=out)
    assert list(found["models"]) == ["at-32", "at-48"]
    assert found["models"]["at-48"]["train_size"] == [48, 48]
    for model, entry in zip(models, found["models"].values(), strict=True):
        assert list(entry["points"]) == ["32", "48"]
        for size, value in entry["points"].items():
            one = replace(recipe, model=model, image_size=int(size), out=str(tmp_path / "one"), pictures=False)
            assert evaluate(one)["top1"] == value
    assert json.loads((out / "resolution.json").read_text()) == found
    first, second = (100 * found["models"]["at-32"]["points"][size] for size in ("32", "48"))
    assert f"| at-32 | 32 | **{first:.2f}** | {second:.2f} |" in (out / "table.md").read_text()
    assert (out / "resolution.png").stat().st_size > 5000


def test_a_finished_point_is_kept_and_another_evaluation_is_refused(recipe, models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    before = sweep_resolution(models[:1], recipe, sizes=(32,), out=out)
    made = []
    monkeypatch.setattr(resolution, "evaluate", lambda one: (made.append(one.image_size), evaluate(one))[1])
    after = sweep_resolution(models[:1], recipe, sizes=(32, 40), out=out)
    assert made == [40]
    assert after["models"]["at-32"]["points"]["32"] == before["models"]["at-32"]["points"]["32"]
    with pytest.raises(ValueError, match=r"holds curves of another evaluation \(crop_pct changed\)"):
        sweep_resolution(models, replace(recipe, crop_pct=0.9), sizes=(32,), out=out)
    assert made == [40]


def test_a_size_that_a_model_does_not_take_is_refused_before_the_first_evaluation(
    recipe, models, tmp_path, monkeypatch
):
    spec = load(models[0])[1]
    vit = replace(spec, architecture="test_vit")
    write_timm_folder(tmp_path / "vit", vit, create(vit).state_dict())
    monkeypatch.setattr(resolution, "evaluate", lambda one: pytest.fail(f"{one.model} was evaluated"))
    with pytest.raises(ValueError, match=r"vit at 30 pixels .--models, --sizes.: .*test_vit does not take .* 30 x 30"):
        sweep_resolution([models[0], str(tmp_path / "vit")], recipe, sizes=(16, 30), out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"gone at 16 pixels .*does not exist"):
        sweep_resolution([models[0], "runs/gone"], recipe, sizes=(16,), out=tmp_path / "out")


def test_what_cannot_be_drawn_is_refused(recipe, models, tmp_path):
    with pytest.raises(ValueError, match="name at least one of each, none twice"):
        sweep_resolution([], recipe, sizes=(32,), out=tmp_path)
    with pytest.raises(ValueError, match="name at least one of each, none twice"):
        sweep_resolution(models, recipe, sizes=(32, 32), out=tmp_path)
    with pytest.raises(ValueError, match=r"sizes=\(32, 0\) must be numbers of pixels, at least 1; leave 0 out"):
        sweep_resolution(models, recipe, sizes=(32, 0), out=tmp_path)
    with pytest.raises(ValueError, match="imagenet-c has no top-1 to draw"):
        sweep_resolution(models, EVALUATIONS["imagenet-c"], sizes=(32,), out=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "at-32").symlink_to(models[0])
    with pytest.raises(ValueError, match=r"have one name \(at-32\)"):
        sweep_resolution([models[0], str(tmp_path / "other" / "at-32")], recipe, sizes=(32,), out=tmp_path)
