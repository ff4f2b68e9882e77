"""Odd and hostile inputs through pretraining, fine-tuning and evaluation: what each of them is supposed to do."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining
from hf_mae.classify import classify
from hf_mae.evaluate import evaluate
from hf_mae.pretrain import pretrain
from hf_mae.recipes.base import Data, Evals, Model
from hf_mae.recipes.classification import ClassifierEvals
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.recipes.mae import QUICKSTART
from hf_mae.recipes.transfer import FINETUNE
from hf_mae.training.tasks import Classification

SIZES = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
SHORT = {"max_steps": 2, "global_batch": 8, "num_workers": 0, "log_every": 1, "save_every": 100, "eval_every": 100}
GREY = (0.5, 0.5, 0.5)
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUMBERS = tuple(str(i) for i in range(10))


@dataclass(frozen=True)
class Expected:
    """What a folder does: `refused` by everything; else pretrained on, and `unlabelled` or of these `classes`."""

    refused: str = ""
    unlabelled: str = ""
    classes: tuple[str, ...] = ()
    said: str = ""
    pixel_range: tuple[float, float] | None = None
    """With which a folder that is refused without it is pretrained on."""
    images: int = 64


NO_FOLDERS = r"has no labels; put each image .* folder"
ODD = {
    "cls": Expected(classes=NAMES, images=100),
    "flat": Expected(unlabelled=NO_FOLDERS),
    "patients": Expected(classes=("ill", "well"), said="labels from column label of train/metadata.csv"),
    "csv_flat": Expected(classes=NAMES, said="labels from column label of metadata.csv"),
    "csv_split": Expected(unlabelled=r"train\.csv, val\.csv .*metadata\.csv", said="train.csv, val.csv"),
    "multilabel": Expected(unlabelled=r"labels of metadata\.jsonl .*one label an image", said="metadata.jsonl"),
    "g16_12bit": Expected(refused=r"--data\.pixel-range 0 4095", pixel_range=(0, 4095)),
    "g16_full": Expected(unlabelled=NO_FOLDERS),
    "i16": Expected(refused=r"--data\.pixel-range -1024 1016", pixel_range=(-1024, 1016)),
    "f32": Expected(refused=r"--data\.pixel-range 0 1\b", pixel_range=(0, 1)),
    "tif3_u16": Expected(refused=r"--data\.pixel-range 0 16383", pixel_range=(0, 9945)),
    "stack13_u16": Expected(
        refused=r"--data\.pixel-range 0 16383", pixel_range=(0, 9945), said="several pages or frames (up to 13); page 1"
    ),
    "tif4_u8": Expected(refused=r"TIFF with 4 bands of 8 bits; 1 or 3 are read"),
    "tif6_u8": Expected(refused=r"TIFF with 6 bands of 8 bits; 1 or 3 are read"),
    "tif13_u16": Expected(refused=r"TIFF with 13 bands of 16 bits; 1 or 3 are read"),
    "npy6_u8": Expected(refused=r"\.npy arrays are not read yet, save them as PNG or TIFF"),
    "npy13_u16": Expected(refused=r"\.npy arrays are not read yet, save them as PNG or TIFF"),
    "spec": Expected(unlabelled=NO_FOLDERS),
    "twelve": Expected(unlabelled=NO_FOLDERS),
    "brackets[1]": Expected(classes=NUMBERS),
}


@pytest.fixture(scope="module")
def odd(shared, tmp_path_factory):
    out = tmp_path_factory.mktemp("odd")
    subprocess.run([sys.executable, str(shared / "tools/odd_inputs.py"), str(out)], check=True, capture_output=True)
    assert {path.name for path in out.iterdir()} == set(ODD)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder, and a classifier of the ten classes."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    MAEForPreTraining(MAEConfig(**SIZES, **DECODER)).save_pretrained(root / "encoder")
    made = MAEForImageClassification(MAEConfig(**SIZES, id2label=dict(enumerate(NAMES))))
    weights = {k: v.contiguous() for k, v in made.state_dict().items()}
    Classification(made, GREY, GREY).write_model(root / "classifier", weights)
    return root


@pytest.fixture
def runs(models, tmp_path):
    """The three commands on some data, each in a new folder."""

    def start(command, data, model=models / "classifier", **changes):
        out = {"out": str(tmp_path / f"{command}{len(list(tmp_path.iterdir()))}")}
        if command == "evaluate":
            recipe = replace(EVALUATIONS["own"], **out, model=str(model), data=data, num_workers=0, pictures=False)
            return evaluate(recipe)
        if command == "pretrain":
            evals = Evals(pictures=0, knn=False, rankme=False)
            augment = replace(QUICKSTART.augment, mean=GREY, std=GREY)
            recipe = replace(QUICKSTART, **out, **SHORT, data=data, evals=evals, augment=augment)
            return pretrain(replace(recipe, model=Model(**SIZES, **DECODER), **changes))
        preset = FINETUNE["finetune-digits"]
        augment = replace(preset.augment, mean=GREY, std=GREY)
        evals = ClassifierEvals(pictures=False)
        recipe = replace(preset, **out, **SHORT, data=data, evals=evals, augment=augment)
        return classify(replace(recipe, init_from=str(models / "encoder"), **changes))

    return start


def bad_samples(out):
    return [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]


def last_model(out):
    return sorted((out / "checkpoints").glob("step_*"))[-1] / "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_every_odd_folder_does_what_is_written(odd, runs, name, capsys):
    expected, data = ODD[name], Data(path=str(odd / name))
    if expected.refused:
        for command in ("pretrain", "finetune", "evaluate"):
            with pytest.raises(ValueError, match=expected.refused):
                runs(command, data)
        if expected.pixel_range is None:
            return
        data = replace(data, pixel_range=tuple(map(float, expected.pixel_range)))
    out = runs("pretrain", data)
    printed = capsys.readouterr()
    assert expected.said in printed.out + printed.err
    assert not (out / "bad_samples.jsonl").exists() or not (out / "bad_samples.jsonl").read_text()
    stated = json.loads((last_model(out) / "preprocessor_config.json").read_text()).get("pixel_range")
    assert stated == (None if data.pixel_range is None else list(data.pixel_range))
    if not expected.classes:
        with pytest.raises(ValueError, match=expected.unlabelled or "has no labels"):
            runs("finetune", data)
        with pytest.raises(ValueError, match="has no labels"):
            runs("evaluate", data)
        return
    tuned = runs("finetune", data)
    names = MAEForImageClassification.from_pretrained(last_model(tuned)).config.id2label
    assert tuple(names[i] for i in sorted(names)) == expected.classes
    found = runs("evaluate", data, model=tuned)
    assert (found["examples"], found["bad_images"]) == (expected.images, 0)


OURS = {"float32.tiff": "reject"}
"""Files that may be decoded or not, and what we do; the others depend on how Pillow was built."""


@pytest.fixture
def hostile(shared, tmp_path):
    """The 73 files in two classes of both splits, but the one without an extension, and what is expected of each."""
    folder = shared / "data/bad_images"
    entries = json.loads((folder / "manifest.json").read_text())["files"]
    assert len(entries) == 73
    expected = {}
    for i, entry in enumerate(entries):
        source = folder / entry["file"]
        if source.name != "no_extension":
            expected[f"{'ab'[i % 2]}/{source.name}"] = OURS.get(source.name, entry["expected"])
        for split in ("train", "test"):
            target = tmp_path / "hostile" / split / "ab"[i % 2] / source.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    return Data(path=str(tmp_path / "hostile"), max_bad_fraction=1.0), expected


@pytest.mark.slow
def test_every_hostile_file_is_trained_on_or_listed(hostile, runs):
    data, expected = hostile
    rejected = {name for name, what in expected.items() if what == "reject"}
    decoded = {name for name, what in expected.items() if what == "decode"}
    for command in ("pretrain", "finetune"):
        out = runs(command, data, max_steps=len(expected) // 8)
        listed = {
            r["shard"]: r["reason"] for r in map(json.loads, (out / "bad_samples.jsonl").read_text().splitlines())
        }
        assert rejected <= set(listed), rejected - set(listed)
        assert not decoded & set(listed)
        assert all(listed.values())
        assert "--data.pixel-range" in listed["b/float32.tiff" if "b/float32.tiff" in listed else "a/float32.tiff"]
    found = runs("evaluate", data, model=out)
    assert len(rejected) <= found["bad_images"] <= len(expected) - len(decoded)
    assert found["examples"] + found["bad_images"] == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_one_damaged_file_among_36_does_not_stop_a_run(odd, runs, tmp_path, command):
    files = [path for name in NAMES[:2] for path in sorted((odd / "cls/train" / name).glob("*.png"))[:18]]
    for i, file in enumerate(files):
        target = tmp_path / "few" / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes()[: 60 if i == 7 else None])
    out = runs(command, Data(path=str(tmp_path / "few")), max_steps=9)
    assert {row["shard"].split("/")[-1] for row in bad_samples(out)} == {files[7].name}
    for file in list((tmp_path / "few").rglob("*.png"))[:9]:
        file.write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(RuntimeError, match="max-bad-fraction"):
        runs(command, Data(path=str(tmp_path / "few")), max_steps=9)
