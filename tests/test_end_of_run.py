"""How a run ends: early, with a last evaluation that fails, or in another folder than it began."""

from __future__ import annotations

import ast
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hf_mae.classify import classify
from hf_mae.evaluate import _check_out, evaluate
from hf_mae.evaluation.classification import ClassificationQuality
from hf_mae.lr_find import lr_find
from hf_mae.recipes.classification import Classifier, ClassifierEvals
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.recipes.transfer import FINETUNE
from hf_mae.run import last_model
from hf_mae.sweep import sweep_seeds


@pytest.fixture
def recipe(tmp_path):
    recipe = FINETUNE["finetune-digits"]
    return replace(
        recipe,
        out=str(tmp_path / "run"),
        init_from="",
        model=Classifier(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        optim=replace(recipe.optim, layer_decay=1.0, base_lr=1e-12),  # learns nothing: no number gets better
        schedule=replace(recipe.schedule, min_lr=0.0),
        max_steps=6,
        global_batch=32,
        log_every=0,
        save_every=0,
        eval_every=1,
        num_workers=0,
        evals=ClassifierEvals(split="test", pictures=False),
    )


def rows(out, name):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines() if f'"{name}"' in line]


def test_a_run_that_ends_early_leaves_what_a_whole_one_leaves(recipe, capfd):
    out = classify(replace(recipe, evals=replace(recipe.evals, patience=2, pictures=True)))
    assert json.loads((out / "evaluation.json").read_text())["step"] == 3
    names = {"attention.png", "confusion.png", "learning.png", "per_class.png", "reliability.png", "worst.png"}
    assert {p.name for p in (out / "pictures").iterdir()} == names
    assert "learning: loss" in capfd.readouterr().err
    assert [row["step"] for row in rows(out, "loss")] == [3]


def test_a_last_evaluation_that_fails_takes_no_training_with_it(recipe, monkeypatch, capfd):
    real = ClassificationQuality.__call__

    def fail(self, task, step):
        if step == 6:
            raise RuntimeError("out of memory")
        return real(self, task, step)

    with monkeypatch.context() as patched:
        patched.setattr(ClassificationQuality, "__call__", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            classify(recipe)
    out = classify(recipe)
    assert "resuming at step 6 of 6" in capfd.readouterr().err
    assert [row["step"] for row in rows(out, "top1")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((out / "evaluation.json").read_text())["step"] == 6
    classify(recipe)
    assert "this run is finished" in capfd.readouterr().err


def test_a_run_that_continues_in_another_folder_has_its_best_model_there(recipe, tmp_path):
    short = classify(replace(recipe, save_every=3))
    other = classify(replace(recipe, out=str(tmp_path / "other"), resume=str(short / "checkpoints/step_00000003")))
    best = json.loads((other / "best" / "best.json").read_text())
    assert best == json.loads((short / "best" / "best.json").read_text())
    assert best["step"] == 1


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_number_of_the_split_that_chose_the_best_weights_is_called_optimistic(recipe, tmp_path, capfd, split):
    evals = ClassifierEvals(split=split, pictures=False)
    data = replace(recipe.data, splits=None if split == "test" else "stratified:80/20@1")
    out = classify(replace(recipe, out=str(tmp_path / "my run's"), data=data, max_steps=3, evals=evals))
    said = capfd.readouterr().err
    assert f"the best of 3 on {split}: optimistic" in said
    assert ("no images are left that chose nothing" in said) == (split == "test")
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert evaluation["split"] == split
    assert re.search(rf"chosen by top1 on this split \({split}\).*optimistic", evaluation["note"])
    # What is printed can be pasted.
    line = next(line for line in said.splitlines() if "hf-mae publish" in line)
    assert shlex.split(line.partition("on the Hub: ")[2])[:3] == ["hf-mae", "publish", str(out)]
    load = next(line for line in said.splitlines() if "from_pretrained" in line).partition("from_pretrained")[2]
    assert ast.literal_eval(load) == str(last_model(out))


def test_an_evaluation_of_the_best_weights_by_the_split_that_chose_them_says_so(recipe, tmp_path, capfd):
    out = classify(replace(recipe, max_steps=2))
    for model, optimistic in ((out / "best" / "model", True), (out, False)):
        asked = replace(EVALUATIONS["own"], model=str(model), out=str(tmp_path / "evaluation"), pictures=False)
        capfd.readouterr()
        evaluate(replace(asked, data=replace(recipe.data, split="test")))
        assert ("warning: the best weights were chosen by top1" in capfd.readouterr().err) == optimistic
        for name in ("summary.json", "evaluation.json"):
            content = json.loads((tmp_path / "evaluation" / name).read_text())
            assert ("optimistic" in content.get("note", "")) == optimistic


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.json", "evaluation.json"])
def test_a_run_does_not_write_over_files_of_a_folder_that_is_not_a_run(recipe, name):
    folder = Path(recipe.out)
    folder.mkdir()
    (folder / name).write_text("mine")
    (folder / "log.txt").write_text("mine")  # has a name of its own, and may lie there
    with pytest.raises(ValueError, match=rf"holds {name} that would be overwritten"):
        classify(recipe)
    assert (folder / name).read_text() == "mine"
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("recipe.json", "is a run folder"),
        ("summary.json", "holds a summary.json that is not of an evaluation"),
        ("evaluation.json", "holds an evaluation.json that is not ours"),
    ],
)
def test_an_evaluation_does_not_write_over_what_is_not_one(tmp_path, name, said):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=said):
        _check_out(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=said):
        _check_out(tmp_path)


def test_an_evaluation_is_measured_again_into_its_own_folder(tmp_path):
    (tmp_path / "summary.json").write_text('{"recipe": "own", "model": "m", "data": "d", "numbers": {}}')
    _check_out(tmp_path)


def test_a_sweep_and_a_search_do_not_write_over_files_of_others(recipe, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "table.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds table.md that would be overwritten"):
        sweep_seeds(replace(recipe, out=str(tmp_path / "sweep")), n=2)
    (tmp_path / "find" / "lr-find-run").mkdir(parents=True)
    (tmp_path / "find" / "lr-find-run" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds thesis.txt that would be overwritten"):
        lr_find(replace(recipe, out=str(tmp_path / "find")))
    assert (tmp_path / "find" / "lr-find-run" / "thesis.txt").read_text() == "mine"
