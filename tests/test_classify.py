"""Classification as a user starts it: every protocol, resume, evaluation and errors, on the bundled digits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hf_mae import MAEForImageClassification
from hf_mae.classify import classify
from hf_mae.cli import main
from hf_mae.data.cached import FeatureBatches, Features
from hf_mae.data.loader import Loader
from hf_mae.data.order import DROP_PATH, Order
from hf_mae.data.sources import open_source
from hf_mae.evaluate import evaluate
from hf_mae.evaluation import features
from hf_mae.labelled import Noise
from hf_mae.recipes.base import Augment, Data, Recipe, from_dict, to_dict
from hf_mae.recipes.classification import ClassifierEvals, ClassifierRecipe, check_classifier
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.recipes.transfer import FINETUNE, PROBE
from hf_mae.training.run_folder import _check_recipe

CLOCK = {"images_per_second", "eval_images_per_second", "seconds_waiting_for_data", "waiting_share"}


SHORT = {"max_steps": 12, "global_batch": 64, "log_every": 5, "save_every": 6, "eval_every": 8, "num_workers": 0}


@pytest.fixture
def recipe(tmp_path, encoder):
    return replace(
        FINETUNE["finetune-digits"],
        out=str(tmp_path / "run"),
        init_from=str(encoder),
        evals=ClassifierEvals(split="test", pictures=False),
        **SHORT,
    )


@pytest.fixture
def probe(tmp_path, encoder):
    return replace(
        PROBE["probe-digits"],
        out=str(tmp_path / "probe"),
        init_from=str(encoder),
        augment=replace(PROBE["probe-digits"].augment, crop="center"),
        evals=ClassifierEvals(split="test", pictures=False, knn=True, crop_pct=1.0),
        **SHORT,
    )


def rows(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in found]


def last(out):
    return out / "checkpoints" / "step_00000012"


def test_a_run_leaves_model_best_model_numbers_and_pictures(recipe):
    out = classify(replace(recipe, evals=ClassifierEvals(split="test")))
    assert [(row["step"], "top1" in row) for row in rows(out)] == [
        (5, False),
        (8, True),
        (10, False),
        (12, False),
        (12, True),
    ]
    model = MAEForImageClassification.from_pretrained(last(out) / "model")
    assert model.config.id2label[9] == "9"
    (start,) = json.loads((out / "environment.json").read_text())["starts"]
    assert start["init_from"] == recipe.init_from
    assert len(start["encoder_digest"]) == 16
    assert start["lineage"][0]["name"] == Path(recipe.init_from).name  # with its licence, should it be known
    assert start["tested_on"] == "test"
    best = json.loads((out / "best" / "best.json").read_text())
    assert best["value"] == max(row["top1"] for row in rows(out) if "top1" in row)
    assert MAEForImageClassification.from_pretrained(out / "best" / "model").num_parameters() == model.num_parameters()
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert sum(evaluation["weights"]["class_examples"]) == 360
    names = {"attention.png", "confusion.png", "learning.png", "per_class.png", "reliability.png", "worst.png"}
    assert {p.name for p in (out / "pictures").iterdir()} == names


def protocols(recipe, probe):
    mixed = replace(
        recipe,
        optim=replace(recipe.optim, ema_decay=0.9),
        model=replace(recipe.model, drop_path_rate=0.3),
        augment=replace(recipe.augment, mixup=0.8, cutmix=1.0, erase_prob=0.5, rand_augment="rand-m9-mstd0.5-inc1"),
    )
    lars = replace(probe, optim=replace(probe.optim, name="lars", base_lr=10.0), cached_features=False)
    return {
        "fine-tuning with mixing, averages and drop path": mixed,
        "mixing in pairs": replace(mixed, augment=replace(mixed.augment, mix_mode="pair")),
        "LARS and batch normalisation": lars,
        "cached features": probe,
        "half a block": replace(recipe, trainable_blocks=0.5),
        "scratch": replace(
            recipe,
            init_from="",
            optim=replace(recipe.optim, layer_decay=1.0),
            model=replace(
                recipe.model,
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "fine-tuning with mixing, averages and drop path",
        "mixing in pairs",
        "LARS and batch normalisation",
        "cached features",
        "half a block",
        "scratch",
    ],
)
def test_resuming_from_the_middle_equals_never_stopping(recipe, probe, tmp_path, name):
    one = protocols(recipe, probe)[name]
    out = classify(one)
    other = tmp_path / "resumed"
    shutil.copytree(out, other)
    shutil.rmtree(last(other))
    shutil.rmtree(other / "best")
    classify(replace(one, out=str(other), num_workers=2))
    assert rows(other) == rows(out)
    files = sorted(p.relative_to(out) for p in [*last(out).rglob("*"), *(out / "best").rglob("*")] if p.is_file())
    for file in files:
        if file.name not in {"recipe.json", "manifest.json"}:  # they name the folder, and hash the file that does
            assert (out / file).read_bytes() == (other / file).read_bytes(), file
    assert any("model.safetensors" in file.name for file in files)


@pytest.mark.multiprocess
def test_two_processes_resume_to_the_same_bits(recipe, probe, tmp_path):
    flags = ["--max-steps", "8", "--save-every", "4", "--eval-every", "4", "--num-workers", "1", "--evals.no-pictures"]
    mixed = [
        "--optim.ema-decay",
        "0.9",
        "--model.drop-path-rate",
        "0.3",
        "--global-batch",
        "64",
    ]  # mixup is the preset's
    lars = ["--optim.name", "lars", "--optim.base-lr", "5", "--global-batch", "128", "--no-cached-features"]
    for script, own in (("finetune", mixed), ("probe", lars)):
        out, other = tmp_path / script, tmp_path / f"{script}-resumed"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        start += [str(Path(__file__).parents[1] / "scripts" / f"{script}.py"), f"{script}-digits", *flags, *own]
        start += ["--init-from", recipe.init_from]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([*start, "--out", str(out)], check=True, env=environment, capture_output=True)
        shutil.copytree(out, other)
        shutil.rmtree(other / "checkpoints" / "step_00000008")
        subprocess.run([*start, "--out", str(other)], check=True, env=environment, capture_output=True)
        assert rows(other) == rows(out)
        files = ("model/model.safetensors", "training_state/optimizer.safetensors", "data_state/rank_1.json")
        for file in files:
            a, b = (folder / "checkpoints" / "step_00000008" / file for folder in (out, other))
            assert a.read_bytes() == b.read_bytes(), (script, file)


def test_a_cached_probe_equals_one_that_encodes_anew(probe, tmp_path):
    cached = classify(probe)
    anew = classify(
        replace(probe, out=str(tmp_path / "anew"), cached_features=False, augment=replace(probe.augment, flip=False))
    )
    a, b = (load_file(last(out) / "model" / "model.safetensors") for out in (cached, anew))
    for name in ("head.1.weight", "head.1.bias", "head.0.running_mean", "head.0.running_var"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5)
    for left, right in zip(rows(cached), rows(anew), strict=True):
        assert left.keys() == right.keys()
        assert left == pytest.approx(right, abs=1e-5)
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 2


def test_features_are_encoded_once_for_all_probes_of_an_encoder(probe, tmp_path, capsys):
    classify(probe)
    assert "encoding 1,437 images once" in capsys.readouterr().err
    classify(replace(probe, out=str(tmp_path / "second"), seed=1))
    assert "encoding" not in (said := capsys.readouterr().err)
    assert "were encoded before" in said


def test_logistic_regression_is_left_out_where_it_would_take_hours(probe, capsys, monkeypatch):
    """One process would fit it while the others wait for longer than a collective allows."""
    evals = replace(probe.evals, logistic=True)
    (first, *_) = rows(classify(replace(probe, evals=evals, max_steps=1)))
    assert {"knn_top1", "knn_plain_top1", "logistic_top1"} <= first.keys()
    capsys.readouterr()
    monkeypatch.setattr(features, "MAX_LOGISTIC", 1437 * 16 * 10 - 1)
    (first, *_) = rows(classify(replace(probe, evals=evals, max_steps=1, out=f"{probe.out}-large")))
    assert {"knn_top1", "knn_plain_top1"} <= first.keys()
    assert "logistic_top1" not in first
    assert "logistic regression is left out: 1,437 training images are more than the 1,436" in capsys.readouterr().err


def test_a_frozen_encoder_keeps_its_weights(probe, encoder):
    before, after = (
        load_file(encoder / "model.safetensors"),
        load_file(last(classify(probe)) / "model/model.safetensors"),
    )
    kept = [name for name in after if not name.startswith("head")]
    assert len(kept) > 20
    assert all(torch.equal(before[name], after[name]) for name in kept)


def test_half_a_block_trains_the_mlp_of_the_last_block_only(recipe, encoder):
    out = classify(replace(recipe, trainable_blocks=0.5))
    before, after = load_file(encoder / "model.safetensors"), load_file(last(out) / "model/model.safetensors")
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    mlp = {f"blocks.1.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
    assert {name for name in changed if name.startswith("blocks")} == mlp | {
        "blocks.1.norm2.weight",
        "blocks.1.norm2.bias",
    }
    assert changed - mlp >= {"head.weight", "head.bias", "fc_norm.weight"}
    assert not changed & {"pos_embed", "cls_token"}


def test_patience_ends_a_run_that_gets_no_better_and_a_restart_knows(recipe, capsys):
    stuck = replace(
        recipe,
        max_steps=40,
        eval_every=2,
        optim=replace(recipe.optim, base_lr=1e-9),
        schedule=replace(recipe.schedule, min_lr=0.0),
        evals=replace(recipe.evals, patience=2),
    )
    out = classify(stuck)
    assert [row["step"] for row in rows(out) if "top1" in row] == [2, 4, 6]
    assert json.loads((out / "best" / "best.json").read_text())["step"] == 2
    capsys.readouterr()
    classify(stuck)
    assert "finished (early, as it got no better, after 6 updates)" in capsys.readouterr().err


def test_other_classes_are_refused_when_a_run_goes_on(recipe, tmp_path):
    folder = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(40):
                Image.fromarray(np.full((8, 8), i + 100 * (name == "dog"), np.uint8)).save(
                    folder / split / name / f"{i}.png"
                )
    own = replace(recipe, data=Data(path=str(folder)))
    classify(own)
    for split in ("train", "test"):
        (folder / split / "dog").rename(folder / split / "ant")
    with pytest.raises(ValueError, match=r"classes of the data have changed .*'cat', 'dog'.*'ant', 'cat'"):
        classify(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_blocks": 3.0}, r"trainable_blocks=3 is more than the 2 blocks"),
        ({"trainable_blocks": 1.5}, "must be 0, 0.5"),
        ({"init_from": "", "trainable_blocks": 1.0}, "has learned nothing"),
        ({"init_from": "runs/nothing"}, "does not exist"),
        ({"init_from": ""}, "train from scratch with a scratch-. preset"),
        ({"cached_features": True}, "add --trainable-blocks 0"),
        ({"cached_features": True, "trainable_blocks": 0.0}, "add --model.head batchnorm"),
        ({"global_batch": 63}, "odd, and mixup"),
        ({"data": Data(path="digits", repeats=2)}, "mix each image with itself"),
        ({"micro_batch": 1}, "micro_batch=1 does not divide .* into even parts, which mixup"),
    ],
)
def test_what_makes_no_sense_is_refused_before_training(recipe, change, message):
    mixing = replace(recipe.augment, mixup=0.8 if "mix" in message else 0.0, cutmix=0.0)
    with pytest.raises(ValueError, match=message):
        classify(replace(recipe, augment=mixing, **change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "finetune-vit-b", "--init-from", "{encoder}", "--data.path", "digits"], "is not that of"),
        (["finetune", "finetune-small", "--init-from", "{encoder}", "--data.path", "digits"], "--augment.mean 0.5"),
        (["probe", "probe-small", "--data.path", "digits"], "init_from is empty"),
        (["finetune", "finetune-small"], "data.path is empty"),
        (["finetune", "finetune-big"], "did you mean"),
        (["finetune", "finetune-digits"], "hf-mae pretrain"),
        (["evaluate", "own", "--data.path", "digits"], "model is empty"),
        (["evaluate", "imagenet", "--model", "{encoder}"], "is no classifier"),
        (["sweep", "blocks"], "sweep 'blocks' is unknown"),
        (["sweep", "seeds", "--n", "1"], "use at least 2"),
        (["finetune", "finetune-digits", "--augment.rand-augment", "m9"], "rand_augment"),
        (["probe", "--init-from", "{encoder}", "--global-batch", "521"], "use 520 or 522"),
    ],
)
def test_mistakes_end_with_one_sentence_and_no_traceback(arguments, message, encoder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([argument.format(encoder=encoder) for argument in arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


def test_every_preset_is_sound():
    for recipe in [*FINETUNE.values(), *PROBE.values()]:
        check_classifier(
            replace(recipe, init_from=recipe.init_from or ("" if "scratch" in recipe.name else "org/name"))
        )
        assert recipe.source
        assert recipe.expected


def test_tables_9_to_12_are_as_the_paper_has_them():
    assert [FINETUNE[f"finetune-vit-{s}-table9"].epochs for s in "blh"] == [100, 50, 50]
    b = FINETUNE["finetune-vit-b"]
    assert (b.optim.base_lr, b.optim.layer_decay, b.model.drop_path_rate, b.augment.erase_prob) == (
        5e-4,
        0.65,
        0.1,
        0.25,
    )
    # main_finetune.py: `trunc_normal_(head.weight, std=2e-5)` where it loads an encoder; else timm's initialisation.
    for name, one in FINETUNE.items():
        assert one.model.head_init_std == (0.02 if name.startswith("scratch-") else 2e-5), name
    scratch = FINETUNE["scratch-vit-l"]
    assert (scratch.optim.weight_decay, scratch.optim.betas, scratch.optim.ema_decay) == (0.3, (0.9, 0.95), 0.9999)
    assert scratch.optim.base_lr * scratch.global_batch / 256 == pytest.approx(1.6e-3)
    probe = PROBE["probe-vit-b"]
    assert probe.optim.base_lr * probe.global_batch / 256 == pytest.approx(6.4)
    assert (probe.augment.crop, probe.model.head, probe.trainable_blocks, probe.epochs) == (
        "clamped",
        "batchnorm",
        0,
        90,
    )
    assert "86.8" in FINETUNE["finetune-vit-h-448-inat2018"].expected


def test_the_head_from_scratch_starts_as_timms_and_an_older_run_goes_on(recipe, probe, tmp_path, capsys):
    short = {"max_steps": 2, "save_every": 1, "optim": replace(recipe.optim, base_lr=1e-9, layer_decay=1.0)}
    short["schedule"] = replace(recipe.schedule, min_lr=0.0)
    one = replace(protocols(recipe, probe)["scratch"], **short)
    small = classify(one)
    assert "--model.head-init-std 0.02" in capsys.readouterr().err
    as_now = replace(one, model=replace(one.model, head_init_std=FINETUNE["scratch-small"].model.head_init_std))
    fresh = classify(replace(as_now, out=str(tmp_path / "fresh")))
    assert "note: model.head_init_std" not in capsys.readouterr().err
    for out, std in ((small, 2e-5), (fresh, 0.02)):
        head = load_file(out / "checkpoints" / "step_00000002" / "model" / "model.safetensors")["head.weight"]
        assert head.std().item() == pytest.approx(std, rel=0.15)
    before = (small / "checkpoints" / "step_00000002" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(small / "checkpoints" / "step_00000002")
    # A run that was begun with the smaller head has its weights: the command of today continues it.
    classify(replace(as_now, out=str(small)))
    assert "resuming at step 1 of 2" in capsys.readouterr().err
    assert (small / "checkpoints" / "step_00000002" / "model" / "model.safetensors").read_bytes() == before


def test_evaluate_finds_the_numbers_of_training(recipe, tmp_path, capsys):
    out = classify(recipe)
    trained = [row for row in rows(out) if "top1" in row][-1]
    found = evaluate(
        replace(
            EVALUATIONS["own"], model=str(out), out=str(tmp_path / "evaluation"), data=Data(path="digits", split="test")
        )
    )
    assert found["examples"] == 360
    assert {k: found[k] for k in ("top1", "top5", "eval_loss", "ece")} == {
        k: trained[k] for k in ("top1", "top5", "eval_loss", "ece")
    }
    assert (tmp_path / "evaluation" / "pictures" / "confusion.png").exists()
    assert "expected: depends on the data" in capsys.readouterr().err


def test_drop_path_depends_on_the_place_in_the_stream_alone():
    draw = Noise("drop_path_noise", 4, 3, DROP_PATH)
    whole = draw(np.array([0, 0, 1]), np.array([5, 6, 5]))["drop_path_noise"]
    assert torch.equal(whole[1:], draw(np.array([0, 1]), np.array([6, 5]))["drop_path_noise"])
    assert not torch.equal(whole[0], whole[2])


def test_feature_batches_have_the_order_of_images_and_their_stand_ins(tmp_path):
    """Beside the loader, on a data set of which some images cannot be decoded."""
    for i in range(12):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    pictures = [(tmp_path / f"{i:02}.png").read_bytes() if i not in (2, 4, 11) else b"junk" for i in range(12)]
    (tmp_path / "data").mkdir()
    table = pa.table({"image": pictures, "label": list(range(12))})
    pq.write_table(table.slice(0, 7), tmp_path / "data" / "train-0.parquet", row_group_size=4)  # chunks of 4, 3 and 5
    pq.write_table(table.slice(7), tmp_path / "data" / "train-1.parquet")
    source = open_source(Data(path=str(tmp_path / "data")))
    assert source.sizes.tolist() == [4, 3, 5]
    good = torch.tensor([r for r in range(12) if r not in (2, 4, 11)])
    features = Features(good[:, None].float(), good, good)

    def take(rank, world):
        order = Order(source.sizes, seed=1, lanes=2, window=1)
        shared = {"global_batch": 6, "rank": rank, "world": world, "cursor": 0}
        batches = FeatureBatches(features, order, images_per_epoch=12, **shared)
        with Loader(
            source,
            order,
            augment=Augment(crop="center", mean=(0.5,), std=(0.5,)),
            image_size=(8, 8),
            channels=1,
            max_bad_fraction=1.0,
            stop=4,
            **shared,
        ) as loader:
            images = [batch.labels for batch in loader]
        cached = [batch.labels for _, batch in zip(range(4), batches, strict=False)]
        assert all(torch.equal(a, b) for a, b in zip(images, cached, strict=True))
        return cached

    whole = take(0, 1)
    halves = [torch.stack(pair, 1).flatten() for pair in zip(take(0, 2), take(1, 2), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))
    assert not torch.equal(torch.cat(whole[:2]), torch.cat(whole[2:]))


def test_every_rank_gets_as_many_batches_of_features():
    n = torch.arange(10)
    parts = [Features(n[:, None].float(), n, n).batches(1, rank=rank, world=8) for rank in range(8)]
    assert {len(batches) for batches in parts} == {2}
    assert torch.cat([batch["rows"] for batches in parts for batch in batches]).tolist() == n.tolist()


def write_classes(root, names, *, count=40, bad=()):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            path = root / name / f"{k:02}.png"
            Image.fromarray(np.full((8, 8), 100 * i + k, np.uint8)).save(path)
            if k in bad:
                path.write_bytes(b"junk")


def test_cached_features_know_the_numbers_of_the_classes(probe, tmp_path, capsys):
    for split in ("train", "test"):
        write_classes(tmp_path / "data" / split, ["cat", "dog"])
    own = replace(probe, data=Data(path=str(tmp_path / "data")), evals=ClassifierEvals(pictures=False, knn=True))
    first = rows(classify(own))[0]["knn_top1"]
    write_classes(tmp_path / "data" / "test", ["ant"], count=1)  # now cat is 1 and dog is 2
    second = rows(classify(replace(own, out=str(tmp_path / "second"))))[0]["knn_top1"]
    assert first == 1.0
    assert second == pytest.approx(80 / 81)


def test_bad_images_in_cached_features_are_said_and_limited(probe, tmp_path, capsys):
    write_classes(tmp_path / "data" / "train", ["cat", "dog"], bad=(3,))
    write_classes(tmp_path / "data" / "test", ["cat", "dog"])
    own = replace(
        probe, data=Data(path=str(tmp_path / "data"), max_bad_fraction=0.1), evals=ClassifierEvals(pictures=False)
    )
    classify(own)
    assert "warning: 2 of 80 images cannot be decoded" in capsys.readouterr().err
    strict = replace(own, out=str(tmp_path / "strict"), data=replace(own.data, max_bad_fraction=0.01))
    with pytest.raises(RuntimeError, match="2 of 80 training images cannot be decoded"):
        classify(strict)
    assert "were encoded before" in capsys.readouterr().err


@pytest.mark.parametrize(("crop_pct", "edge"), [(1.0, 8), (None, 9)])
def test_what_is_measured_is_what_the_folder_states(probe, tmp_path, capsys, crop_pct, edge):
    """Digits have the input's size: 341adb0 measured whole images and stated a crop."""
    classify(replace(probe, out=str(tmp_path / "other"), evals=replace(probe.evals, crop_pct=0.5)))
    capsys.readouterr()
    out = classify(replace(probe, evals=replace(probe.evals, crop_pct=crop_pct)))
    assert "were encoded before" not in capsys.readouterr().err  # of another crop
    stated = json.loads((last(out) / "model" / "preprocessor_config.json").read_text())
    assert stated["size"] == {"shortest_edge": edge}
    own = replace(EVALUATIONS["own"], model=str(out), data=Data(path="digits", split="test"), pictures=False)
    found = evaluate(replace(own, out=str(tmp_path / "evaluated")))
    assert found["top1"] == [row["top1"] for row in rows(out) if "top1" in row][-1]
    summary = json.loads((tmp_path / "evaluated" / "summary.json").read_text())
    assert int(8 / summary["crop_pct"]) == edge


def test_a_run_without_the_crop_in_its_recipe_goes_on_and_says_so(recipe, tmp_path):
    """Its checkpoints are of 341adb0; a crop that was chosen may not change."""
    values = to_dict(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"evals.crop_pct was None, is 1.0"):
        _check_recipe(replace(recipe, evals=replace(recipe.evals, crop_pct=1.0)), tmp_path)
    del values["evals"]["crop_pct"]
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    for crop_pct in (None, 1.0):
        notes = _check_recipe(replace(recipe, evals=replace(recipe.evals, crop_pct=crop_pct)), tmp_path)
        assert [f"evals.crop_pct={crop_pct}" in note for note in notes] == [True]


def test_a_damaged_cache_is_encoded_again(probe, tmp_path, capsys):
    classify(probe)
    for file in (tmp_path / "features").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    classify(replace(probe, out=str(tmp_path / "second")))
    assert capsys.readouterr().err.count("images once, without augmentation") == 4


@pytest.mark.parametrize("evals", [{}, {"split": "test"}])
def test_what_is_trained_on_is_not_tested_on(recipe, tmp_path, capsys, evals):
    write_classes(tmp_path / "data" / "testing", ["cat", "dog"])
    own = replace(
        recipe, data=Data(path=str(tmp_path / "data"), split="test"), evals=ClassifierEvals(pictures=False, **evals)
    )
    if evals:
        with pytest.raises(ValueError, match=r"is (what is trained on|the training split)"):
            classify(own)
        return
    classify(own)
    assert "nothing is measured but the loss" in capsys.readouterr().err


def test_another_normalisation_than_in_pretraining_is_said(recipe, encoder, capsys):
    processor = {"image_processor_type": "BitImageProcessor", "image_mean": [0.3], "image_std": [0.2]}
    (encoder / "preprocessor_config.json").write_text(json.dumps(processor))
    classify(recipe)
    assert "--augment.mean 0.3 --augment.std 0.2" in capsys.readouterr().err


def test_recipes_of_other_kinds_are_told_apart(recipe, tmp_path):
    out = classify(recipe)
    values = json.loads((out / "recipe.json").read_text())
    assert values["trainable_blocks"] is None
    assert ClassifierRecipe.deciding
    with pytest.raises(ValueError, match="unknown to a Recipe"):
        from_dict(values, Recipe)
