"""Records are those of the exported weights, or are refused; a card tells them as they are."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_mae.cards.facts import Fact, fact, maybe
from hf_mae.cards.options import CardOptions
from hf_mae.cards.records import count_parameters, read_records
from hf_mae.cards.tables import augmentation, training_time
from hf_mae.cards.write import write_card
from hf_mae.exporting.files import hash_weights
from hf_mae.recipes.supervised import SUPERVISE
from tests.cards.conftest import change, recipe, write_json

OPTIONS = CardOptions(license="apache-2.0", language=("en",))


def _card(export: Path, run: Path | None, options: CardOptions = OPTIONS, **more) -> str:
    return write_card(export, "org/animals", options, run=run, **more).read_text()


def test_time_counts_every_start_and_no_evaluation(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert training_time(rows) == (640 / 64 + 640 / 32 + 640 / 64, 1920)


def test_records_of_another_run_are_refused(export: Path, run: Path, tmp_path: Path):
    change(run / "recipe.json", name="finetune-large")
    with pytest.raises(ValueError, match="has recipe 'finetune-large'"):
        _card(export, run)
    change(run / "recipe.json", name="finetune-small")
    run.rename(tmp_path / "cousin")
    with pytest.raises(ValueError, match="is not the run that the export names"):
        _card(export, tmp_path / "cousin")


def test_records_of_other_weights_of_the_same_place_are_refused(export: Path, run: Path):
    model = run / "checkpoints" / "step_00000030" / "model"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes((export / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds other weights"):
        _card(export, run)
    change(export / "export.json", source__sha256=hash_weights(model))
    assert "76.54 %" in _card(export, run)


def test_export_of_an_earlier_training_in_the_same_folder_is_refused(export: Path, run: Path):
    inside = run / "export" / "beit"
    inside.parent.mkdir()
    export.rename(inside)
    change(inside / "export.json", time="2026-10-01T00:00:00Z")  # before the first start on record
    with pytest.raises(ValueError, match="is not the run that the export names"):
        _card(inside, None)


def test_evaluation_with_other_pictures_is_told_but_is_no_result_of_the_hub(export: Path, run: Path, tmp_path: Path):
    place = str(run / "checkpoints/step_00000030/model")
    summary = {"model": place, "data": "/x/more", "split": "test", "image_size": [48, 48], "crop_pct": 0.5}
    write_json(tmp_path / "my eval" / "summary.json", summary | {"numbers": {"top1": 0.3111}})
    same = summary | {"image_size": [32, 32], "crop_pct": 0.875, "numbers": {"top1": 0.4222}}
    for name in ("first", "second"):  # the same measurement twice
        write_json(tmp_path / name / "summary.json", same)
    text = _card(export, run, evaluations=[tmp_path / n for n in ("my eval", "first", "second")])
    assert "| 31.11 % | more, test at 48x48, crop 0.5 |" in text
    values = [r.metric_value for r in ModelCard.load(export / "README.md").data.eval_results]
    assert values == [0.7654, 0.4222]
    assert (export / "records" / "evaluation_my_eval.json").is_file()
    write_json(tmp_path / "first" / "summary.json", same | {"split": None})
    text = _card(export, run, evaluations=[tmp_path / "first"])
    assert "| 42.22 % | more, split not recorded" in text
    assert [r.metric_value for r in ModelCard.load(export / "README.md").data.eval_results] == [0.7654]


def test_rankme_is_of_training_images(export: Path, run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["rankme"] = 17.5
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "evaluation.json").unlink()
    assert "| RankMe (effective rank of the features) | 17.5 | animals, training images | - |" in _card(export, run)


def test_rotations_at_once_are_told_from_one_after_the_other():
    told = {
        name: str(augmentation({"augment": asdict(SUPERVISE[f"rexnet-birds-{name}"].augment)}).value)
        for name in ("corrected", "published-intended")
    }
    assert "15 + 25 degrees" in told["corrected"]
    assert "15, then 25 degrees" in told["published-intended"]


def test_machines_of_all_starts_are_told(export: Path, run: Path):
    starts = json.loads((run / "environment.json").read_text())["starts"]
    starts[1] |= {"device": "cpu", "cpus": 2}
    write_json(run / "environment.json", {"starts": starts})
    text = _card(export, run)
    assert "| device | cuda, then cpu |" in text
    assert "| CPU cores | 8, then 2 |" in text
    assert "| processes | 2 |" in text


def test_length_of_the_run_is_not_that_of_the_best_weights(export: Path, run: Path):
    change(export / "export.json", source__weights="best", source__step=20)
    text = _card(export, run)
    assert "| updates until these weights | 20 |" in text
    assert "| updates of the run | 30 |" in text
    assert "updates until" not in _last(export, run)


def _last(export: Path, run: Path) -> str:
    change(export / "export.json", source__weights="last", source__step=30)
    return _card(export, run)


def test_records_without_a_number_refuse_to_give_one():
    with pytest.raises(ValueError, match="weight_decay is not in recipe"):
        fact({"optim": {}}, "optim.weight_decay", "recipe.json")
    assert maybe({"optim": {"weight_decay": None}}, "optim.weight_decay", "recipe.json") is None
    with pytest.raises(ValueError, match="not finite"):
        Fact(float("nan"), "metrics.jsonl: last row, loss")


def test_folder_that_is_no_export_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="hf-mae export"):
        read_records(tmp_path)


def test_evaluation_of_other_weights_is_refused(export: Path, run: Path, tmp_path: Path):
    summary = {"model": str(run / "checkpoints/step_00000020/model"), "data": "x", "numbers": {"top1": 0.5}}
    write_json(tmp_path / "other" / "summary.json", summary)
    with pytest.raises(ValueError, match="other weights"):
        _card(export, run, evaluations=[tmp_path / "other"])


def test_evaluation_of_the_exported_weights_is_told(export: Path, run: Path, tmp_path: Path):
    numbers = {"top1": 0.5432, "top5": None, "examples": 99}
    summary = {"model": str(run / "checkpoints/step_00000030/model"), "data": "/home/ada/more", "numbers": numbers}
    write_json(tmp_path / "test" / "summary.json", summary | {"image_size": [32, 32], "splits": None})
    text = _card(export, run, evaluations=[tmp_path / "test"])
    assert "| top-1 accuracy | 54.32 % | more, split not recorded at 32x32, crop not recorded | 99 |" in text


def test_parameters_are_counted_in_headers(tmp_path: Path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert count_parameters(tmp_path) == 6
    assert count_parameters(tmp_path / "none") is None


def test_recipe_of_the_fixture_is_the_shape_of_a_real_one():
    from hf_mae.recipes.base import from_dict
    from hf_mae.recipes.classification import ClassifierRecipe

    from_dict(recipe(expected="x"), ClassifierRecipe)
