"""The test sets of ImageNet in miniature: a thousand classes, a few small images, folders as in the archives."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.data.imagenet import ALEXNET_ERRORS, a_classes, class_of
from hf_mae.data.images import crop_center, to_array
from hf_mae.evaluate import CSV_COLUMNS, csv_row, default_out, evaluate
from hf_mae.models.timm_models import TimmSpec, create, load, write_timm_folder
from hf_mae.recipes.base import Data
from hf_mae.recipes.crop import EvalCrop
from hf_mae.recipes.evaluation import EVALUATIONS
from hf_mae.training.tasks import Classification

TENCH, HEN = "n01440764", "n01514859"
NEWT = "n01631663"  # the eft, class 27, is in ImageNet-A


@pytest.fixture
def model(tmp_path):
    """A classifier that sees the mean grey of an image alone: dark is class 0, light is class 8."""
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        id2label={i: str(i) for i in range(1000)},
        head_init_std=1.0,
    )
    made = MAEForImageClassification(config)
    task = Classification(made, (0.5,), (0.5,), crop_pct=1.0)  # the pictures of these tests have its size
    task.write_model(tmp_path / "model", {k: v.contiguous() for k, v in made.state_dict().items()})
    return tmp_path / "model"


def write(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{value}.png")


def pictures(folder, count):
    for value in range(count):
        write(folder, value)
    return folder


def predictions(model, root, keep=None):
    """What the model says of each picture below a folder, by its path."""
    made = MAEForImageClassification.from_pretrained(model).eval()
    said = {}
    for file in sorted(root.rglob("*.png")):
        pixels = torch.from_numpy(np.asarray(Image.open(file)).copy())[None, None].float() / 255
        logits = made((pixels - 0.5) / 0.5).logits[0]
        said[file] = int(logits.argmax()) if keep is None else keep[int(logits[keep].argmax())]
    return said


def ask(preset, model, tmp_path, root, **changes):
    recipe = replace(EVALUATIONS[preset], model=str(model), out=str(tmp_path / "out"), pictures=False, batch=4)
    return evaluate(replace(recipe, data=Data(path=str(root)), **changes))


@pytest.mark.parametrize("name", [lambda c: c, lambda c: str(class_of(c))], ids=["sketch", "v2"])
def test_folders_are_matched_by_wordnet_id_or_by_number(model, tmp_path, name):
    root = tmp_path / "data"
    chosen = [TENCH, HEN]
    if name(TENCH) != TENCH:  # numbers are ImageNet's only if all are there; they sort as text: 0, 1, 10, 100, ...
        for i in range(1000):
            write(root / str(i), i)
        truth = {root / str(i) / f"{i}.png": i for i in range(1000)}
    else:
        for synset in chosen:
            for value in range(5):
                write(root / synset, value)
        truth = {file: class_of(file.parent.name) for file in root.rglob("*.png")}
    found = ask("imagenet-v2" if len(truth) == 1000 else "imagenet-sketch", model, tmp_path, root)
    said = predictions(model, root)
    assert found["examples"] == len(truth)
    assert found["top1"] == sum(said[file] == truth[file] for file in truth) / len(truth)


def test_imagenet_a_lets_two_hundred_classes_compete(model, tmp_path):
    root, keep = tmp_path / "data", a_classes()
    synsets = [NEWT, "n01669191", "n01770081"]
    for synset in synsets:
        for value in range(30):
            write(root / synset, value + 100 * synsets.index(synset))
    found = ask("imagenet-a", model, tmp_path, root, pictures=True)
    said = predictions(model, root, keep)
    truth = {file: class_of(file.parent.name) for file in said}
    assert {found["top1"]} == {sum(said[f] == truth[f] for f in said) / 90}
    assert set(said.values()) <= set(keep)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert len(written["classes"]) == 200
    assert (tmp_path / "out" / "pictures" / "confusion.png").exists()


def test_a_class_that_a_test_set_does_not_have_is_refused(model, tmp_path):
    for synset in (TENCH, NEWT):  # the tench is not one of the two hundred
        write(tmp_path / "data" / synset, 1)
    with pytest.raises(ValueError, match="1 of its classes are not among the 200 of imagenet-a"):
        ask("imagenet-a", model, tmp_path, tmp_path / "data")


def test_imagenet_c_is_the_mean_error_relative_to_alexnet(model, tmp_path):
    root = tmp_path / "data"
    for n, corruption in enumerate(ALEXNET_ERRORS):
        for severity in range(1, 6):
            for synset in (TENCH, HEN):
                write(root / corruption / str(severity) / synset, n + 20 * severity)
    found = ask("imagenet-c", model, tmp_path, root)
    said = predictions(model, root)
    errors = dict.fromkeys(ALEXNET_ERRORS, 0.0)
    for file, answer in said.items():
        errors[file.parts[-4]] += (answer != class_of(file.parent.name)) / 10
    assert found["mce"] == pytest.approx(np.mean([errors[c] / ALEXNET_ERRORS[c] for c in errors]))
    assert found["error_fog"] == pytest.approx(errors["fog"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["numbers"] == found


def test_real_labels_are_found_by_file_name(model, tmp_path, monkeypatch):
    root = tmp_path / "data" / TENCH
    for value in range(4):
        write(root, value)
        (root / f"{value}.png").rename(root / f"ILSVRC2012_val_{value + 1:08d}_{TENCH}.png")
    write(tmp_path / "data" / HEN, 9)
    (tmp_path / "data" / HEN / "9.png").rename(tmp_path / "data" / HEN / "ILSVRC2012_val_00000005.png")
    said = {int(file.stem.split("_")[2]): answer for file, answer in predictions(model, tmp_path / "data").items()}
    sets = {1: [said[1], 3], 2: [said[2]], 3: [(said[3] + 1) % 1000], 4: [], 5: [(said[5] + 1) % 1000]}
    answers = {f"ILSVRC2012_val_{i:08d}": found for i, found in sets.items()}
    monkeypatch.setattr("hf_mae.evaluate.real_labels", lambda: answers)
    found = ask("imagenet-real", model, tmp_path, tmp_path / "data")
    assert found == {"real_top1": 0.5, "real_examples": 4, "bad_images": 0}


def test_real_labels_need_no_others(model, tmp_path, monkeypatch):
    """The validation archive unpacks into one folder."""
    for value in range(3):
        write(tmp_path / "val", value)
        (tmp_path / "val" / f"{value}.png").rename(tmp_path / "val" / f"ILSVRC2012_val_{value + 1:08d}.png")
    said = [answer for _, answer in sorted(predictions(model, tmp_path / "val").items())]
    sets = [[said[0]], [said[1] + 1, said[1]], [(said[2] + 1) % 1000]]
    answers = {f"ILSVRC2012_val_{i:08d}": found for i, found in enumerate(sets, 1)}
    monkeypatch.setattr("hf_mae.evaluate.real_labels", lambda: answers)
    assert ask("imagenet-real", model, tmp_path, tmp_path / "val")["real_top1"] == 2 / 3


def test_a_name_without_real_labels_is_refused_before_the_first_forward(model, tmp_path, monkeypatch):
    for name in ("ILSVRC2012_val_00000001", "cat"):
        write(tmp_path / "val", 1)
        (tmp_path / "val" / "1.png").rename(tmp_path / "val" / f"{name}.png")
    monkeypatch.setattr(Classification, "logits", lambda *_: pytest.fail("a forward pass was made"))
    with pytest.raises(ValueError, match=r"file name 'cat.png' is not of the form"):
        ask("imagenet-real", model, tmp_path, tmp_path / "val")


def test_images_that_cannot_be_decoded_are_left_out_and_counted(model, tmp_path, capsys):
    for value in range(5):
        write(tmp_path / "data" / TENCH, value)
        write(tmp_path / "data" / HEN, value)
    (tmp_path / "data" / HEN / "0.png").write_bytes(b"no picture")
    found = ask("imagenet-sketch", model, tmp_path, tmp_path / "data", pictures=True)
    assert (found["examples"], found["bad_images"]) == (9, 1)
    assert "1 images cannot be decoded" in capsys.readouterr().err


def test_a_model_of_other_classes_is_refused(model, tmp_path):
    small = MAEForImageClassification.from_encoder(model, id2label={0: "cat", 1: "dog"})
    Classification(small, (0.5,), (0.5,)).write_model(tmp_path / "small", dict(small.state_dict()))
    with pytest.raises(ValueError, match="has 2 classes and imagenet-v2 is judged on ImageNet's 1000"):
        ask("imagenet-v2", tmp_path / "small", tmp_path, tmp_path)


def numbered(folder, labels):
    """Parquet whose labels are integers without names."""
    folder.mkdir()
    images = []
    for value in range(len(labels)):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(value).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"image": images, "label": pa.array(labels, pa.int64())}), folder / "train.parquet")
    return folder


def test_labels_without_names_are_the_numbers_of_a_model_that_was_trained_on_such(model, tmp_path):
    said = [made for _, made in sorted(predictions(model, pictures(tmp_path / "pictures", 6)).items())]
    labels = [*said[:4], said[4] + 1, said[5] + 1]
    data = numbered(tmp_path / "data", labels)
    assert ask("own", model, tmp_path, data)["top1"] == 4 / 6
    named = MAEForImageClassification.from_pretrained(model)
    named.config.id2label = {i: f"thing {i}" for i in range(1000)}
    Classification(named, (0.5,), (0.5,), crop_pct=1.0).write_model(tmp_path / "named", dict(named.state_dict()))
    with pytest.raises(ValueError, match="the labels have no names to find the model's classes by"):
        ask("own", tmp_path / "named", tmp_path, data)


@pytest.fixture
def official(tmp_path):
    """A file as the official fine-tuning writes it: two classes, ViT-Ti wide, one block."""
    torch.manual_seed(0)
    config = MAEConfig(
        image_size=8,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=1,
        num_attention_heads=3,
        pos_embed="learned",
        num_labels=2,
        head_init_std=1.0,
    )
    weights = MAEForImageClassification(config).state_dict()
    torch.save({"model": weights, "epoch": 99}, tmp_path / "finetuned.pth")
    torch.save({"model": {k: v for k, v in weights.items() if not k.startswith("head")}}, tmp_path / "encoder.pth")
    return tmp_path / "finetuned.pth"


def test_an_official_file_is_evaluated_with_the_mean_and_std_of_imagenet(official, tmp_path, capsys):
    for name in ("0", "1"):
        for value in range(5):
            write(tmp_path / "data" / name, value + 5 * int(name))
    found = ask("own", official, tmp_path, tmp_path / "data")
    assert "mean and std: ImageNet's" in capsys.readouterr().err
    made, right = MAEForImageClassification.from_official(official).eval(), 0
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for file in (tmp_path / "data").rglob("*.png"):
        picture = Image.open(file).convert("RGB").resize((9, 9), Image.Resampling.BICUBIC).crop((0, 0, 8, 8))
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255
        right += int(made((pixels - mean) / std).logits.argmax()) == int(file.parent.name)
    assert found["top1"] == right / 10


@pytest.mark.parametrize(
    ("size", "stated", "asked", "expected"),
    [
        ((8, 8), {"shortest_edge": 9}, {}, EvalCrop((8, 8))),  # of 341adb0 as of now
        ((8, 8), {"shortest_edge": 8}, {}, EvalCrop((8, 8), 1.0)),
        ((8, 8), {"shortest_edge": 8}, {"image_size": 16}, EvalCrop((16, 16), 1.0)),
        ((8, 8), {"shortest_edge": 9}, {"image_size": 256}, EvalCrop((256, 256))),
        ((8, 8), {"shortest_edge": 8}, {"crop_pct": 0.5}, EvalCrop((8, 8), 0.5)),
        ((8, 8), {"height": 8, "width": 8}, {}, EvalCrop((8, 8), 1.0, "squash")),
        ((8, 16), {"height": 8, "width": 16}, {}, EvalCrop((8, 16))),
        ((8, 16), {"height": 16, "width": 32}, {}, EvalCrop((8, 16), 0.5)),
        ((8, 16), {"shortest_edge": 18}, {}, EvalCrop((8, 16))),  # wrong, of 341adb0
        ((8, 16), {"shortest_edge": 18}, {"crop_pct": 0.5}, EvalCrop((8, 16), 0.5)),
    ],
)
def test_a_folder_is_evaluated_as_it_states(tmp_path, capsys, size, stated, asked, expected):
    made = MAEForImageClassification(MAEConfig(**tiny(size)))
    folder = tmp_path / "model"
    Classification(made, (0.5,), (0.5,)).write_model(folder, {k: v.contiguous() for k, v in made.state_dict().items()})
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": stated}))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8))
    for name in ("0", "1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        picture.save(tmp_path / "data" / name / "0.png")
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "normalize", lambda self, pixels: shown.append(pixels) or pixels.float())
        ask("own", folder, tmp_path, tmp_path / "data", **asked)
    assert np.array_equal(shown[0][0].numpy(), to_array(crop_center(picture, expected)))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["image_size"], summary["crop_pct"]) == (list(expected.size), expected.pct)
    assert summary["crop_mode"] == expected.mode
    wrong = size != (8, 8) and "shortest_edge" in stated
    assert ("export the model again" in capsys.readouterr().err) == wrong


def tiny(size):
    shape = {"image_size": size, "patch_size": 4, "num_channels": 1, "hidden_size": 8}
    return shape | {"num_hidden_layers": 1, "num_attention_heads": 1, "id2label": {0: "0", 1: "1"}}


def test_an_official_file_without_a_head_is_no_classifier(official, tmp_path):
    with pytest.raises(ValueError, match=r"encoder.pth is no classifier .* hf-mae finetune --init-from"):
        ask("own", tmp_path / "encoder.pth", tmp_path, tmp_path)


def test_two_models_are_written_to_two_folders(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, name in enumerate(["0", "8"]):
        write(tmp_path / "data" / name, value)
    (tmp_path / "a" / "best").mkdir(parents=True)
    model.rename(tmp_path / "a" / "best" / "model")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for run in ("a", "b"):
        ask("own", f"{run}/best/model", tmp_path, tmp_path / "data", out="")
    written = {
        folder.name: json.loads((folder / "summary.json").read_text())["model"] for folder in Path("runs").iterdir()
    }
    assert written == {"evaluate-own-a-best": "a/best/model", "evaluate-own-b-best": "b/best/model"}


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("runs/one", "one"),
        ("runs/one/checkpoints/step_00000012/model", "one-step_00000012"),
        ("runs/sweep/0.1/seed_0", "sweep-0.1-seed_0"),
        ("runs/sweep/0.1/seed_0/best/model", "sweep-0.1-seed_0-best"),
        ("files/finetuned.pth", "finetuned"),
        ("org/name", "org-name"),
    ],
)
def test_a_default_folder_is_named_after_preset_and_model(tmp_path, monkeypatch, given, name):
    monkeypatch.chdir(tmp_path)
    if given != "org/name":
        Path(given).mkdir(parents=True)
    assert default_out(replace(EVALUATIONS["own"], model=given)) == Path("runs") / f"evaluate-own-{name}"


def test_another_size_resizes_the_positions(model, tmp_path):
    write(tmp_path / "data" / TENCH, 1)
    write(tmp_path / "data" / HEN, 2)
    assert ask("imagenet-sketch", model, tmp_path, tmp_path / "data", image_size=16)["examples"] == 2


def timm_folder(folder, architecture="test_resnet", **changes):
    """A model of timm for pictures of 32 pixels, tested at 40, whose last layer sees more than its first weights."""
    spec = TimmSpec(
        architecture=architecture,
        names=("0", "1", "2", "3", "4", "5"),
        image_size=(32, 32),
        test_image_size=(40, 40),
        crop_pct=0.9,
        channels=3,
        drop_path_rate=0.0,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
    )
    spec = replace(spec, **changes)
    torch.manual_seed(0)
    made = create(spec)
    for name, parameter in made.named_parameters():
        if name.startswith(("fc.", "head.")):
            torch.nn.init.normal_(parameter)
    write_timm_folder(folder, spec, made.state_dict())
    return folder


@pytest.fixture
def coloured(tmp_path):
    for name in range(6):
        folder = tmp_path / "data" / str(name)
        folder.mkdir(parents=True)
        for value in range(4):
            pixels = np.random.default_rng([name, value]).integers(0, 255, (50, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{value}.png")
    return tmp_path / "data"


def timm_says(folder, data, size, crop_pct):
    """Top-1 of timm's own model, fed by timm's own transform."""
    made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(
        (3, size, size), interpolation="bicubic", crop_pct=crop_pct, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)
    )
    files = sorted(data.rglob("*.png"))
    with torch.no_grad():
        said = made(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])).argmax(1)
    return sum(int(s) == int(file.parent.name) for s, file in zip(said, files, strict=True)) / len(files)


def test_a_timm_folder_is_evaluated_at_its_test_size_and_crop_as_timm_does(tmp_path, coloured):
    folder = timm_folder(tmp_path / "made")
    found = ask("own", folder, tmp_path, coloured, pictures=True)
    assert found["top1"] == timm_says(folder, coloured, 40, 0.9)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["image_size"], summary["train_size"], summary["crop_pct"]) == ([40, 40], [32, 32], 0.9)
    drawn = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert "confusion.png" in drawn
    assert "attention.png" not in drawn
    wide = ask("own", folder, tmp_path, coloured, image_size=32, crop_pct=1.0)
    assert wide["top1"] == timm_says(folder, coloured, 32, 1.0)
    assert wide["eval_loss"] != found["eval_loss"]


def test_a_vit_of_timm_is_tested_at_another_size(tmp_path, coloured):
    folder = timm_folder(tmp_path / "made", "test_vit", test_image_size=(32, 32))
    losses = {size: ask("own", folder, tmp_path, coloured, image_size=size)["eval_loss"] for size in (None, 32, 48)}
    assert losses[None] == losses[32] != losses[48]


def test_the_best_model_of_a_run_may_be_of_timm(tmp_path, coloured):
    folder = timm_folder(tmp_path / "made")
    (tmp_path / "run" / "best").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "run" / "best" / "model")
    found = ask("own", tmp_path / "run" / "best" / "model", tmp_path, coloured)
    assert found == ask("own", folder, tmp_path, coloured) | {"eval_images_per_second": found["eval_images_per_second"]}


def test_timm_models_are_judged_on_imagenet_and_its_reassessed_labels(tmp_path, monkeypatch):
    folder, root = timm_folder(tmp_path / "made", names=tuple(str(i) for i in range(1000))), tmp_path / "data"
    for i, synset in enumerate([TENCH, TENCH, HEN], 1):
        write(root / synset, i)
        (root / synset / f"{i}.png").rename(root / synset / f"ILSVRC2012_val_{i:08d}_{synset}.png")
    every = {f"ILSVRC2012_val_{i:08d}": list(range(1000)) if i < 3 else [] for i in range(1, 4)}
    monkeypatch.setattr("hf_mae.evaluate.real_labels", lambda: every)
    assert ask("imagenet-sketch", folder, tmp_path, root)["examples"] == 3
    assert ask("imagenet-real", folder, tmp_path, root) == {"real_top1": 1.0, "real_examples": 2, "bad_images": 0}


def test_a_name_of_timms_weights_is_loaded_by_timm(monkeypatch, tmp_path, coloured):
    folder = timm_folder(tmp_path / "made")
    asked = []
    monkeypatch.setattr("hf_mae.evaluate.load", lambda name: (asked.append(name), load(folder))[1])
    ask("own", "test_resnet.r160_in1k", tmp_path, coloured)
    assert asked == ["test_resnet.r160_in1k"]
    with pytest.raises(ValueError, match=r"model=my_run does not exist"):
        ask("own", "my_run", tmp_path, coloured)


def test_a_row_in_the_form_of_timms_results_is_appended(tmp_path, coloured):
    folder, file = timm_folder(tmp_path / "made"), tmp_path / "results" / "own.csv"
    found = [ask("own", folder, tmp_path, coloured, image_size=size, csv=str(file)) for size in (None, 32)]
    header, *rows = file.read_text().splitlines()
    assert header == "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation"
    assert len(rows) == 2
    for row, numbers, size in zip(rows, found, ("40", "32"), strict=True):
        model, top1, top1_err, top5, _, parameters, *rest = row.split(",")
        assert (model, rest) == (str(folder), [size, "0.9", "bicubic"])
        assert (top1, top5) == (f"{100 * numbers['top1']:.3f}", f"{100 * numbers['top5']:.3f}")
        assert float(top1) + float(top1_err) == pytest.approx(100)
        assert float(parameters) == pytest.approx(sum(p.numel() for p in load(folder)[0].parameters()) / 1e6, abs=0.005)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"own.csv has the columns a, b; a row needs model, top1"):
        ask("own", folder, tmp_path, coloured, csv=str(file))
    assert file.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="has no column for the errors of corruptions"):
        ask("imagenet-c", folder, tmp_path, coloured, csv=str(file))


def test_the_rows_of_timm_come_out_digit_for_digit():
    """resnet50.a1_in1k at 224 pixels, crop 0.95, in timm's results-imagenet.csv; ReaL has no top-5 here."""
    pictures = {"image_size": [224, 224], "crop_pct": 0.95, "parameters": 25_557_032}
    row = csv_row("resnet50.a1_in1k", {"top1": 0.80382, "top5": 0.94602}, pictures)
    assert ",".join(row[name] for name in CSV_COLUMNS) == (
        "resnet50.a1_in1k,80.382,19.618,94.602,5.398,25.56,224,0.95,bicubic"
    )
    real = csv_row("x", {"real_top1": 0.5, "real_examples": 4}, pictures | {"image_size": [224, 160]})
    assert [real[name] for name in ("top1", "top5", "img_size")] == ["50.000", "", "224x160"]


# ------------------------------------------------------------------------------------------------ trained on parts


def run_with(folder, data, **trained):
    """A run folder as training leaves it: a best model, a checkpoint, and the recipe that names what was trained on."""
    for place in ("best", "checkpoints/step_00000001"):
        timm_folder(folder / place / "model")
    (folder / "recipe.json").write_text(
        json.dumps({"data": {"path": str(data), "name": None, "split": None} | trained})
    )
    return folder


@pytest.mark.parametrize("place", ["best/model", "checkpoints/step_00000001/model"])
def test_a_model_of_a_divided_data_set_is_tested_on_the_part_it_has_not_seen(tmp_path, coloured, capsys, place):
    run = run_with(tmp_path / "run", coloured, splits="stratified:50/25/25@1")
    found = ask("own", run / place, tmp_path, coloured)
    said = capsys.readouterr().err
    assert found["examples"] == 6
    assert "using --data.splits stratified:50/25/25@1" in said
    assert "part test of stratified:50/25/25@1" in said
    assert "warning" not in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["split"], summary["splits"]) == ("test", "stratified:50/25/25@1")
    asked = replace(EVALUATIONS["own"], model=str(run / place), out=str(tmp_path / "out"), pictures=False)
    assert evaluate(replace(asked, data=Data(path=str(coloured), split="validation")))["examples"] == 6
    assert "part validation of" in capsys.readouterr().err


def test_a_split_that_training_did_not_divide_stays_itself(tmp_path, coloured, capsys):
    data = tmp_path / "both"
    for split in ("train", "test"):
        shutil.copytree(coloured, data / split)
    run = run_with(tmp_path / "run", data, splits="stratified:50/25/25@1")
    whole = replace(EVALUATIONS["own"], model=str(run / "best" / "model"), out=str(tmp_path / "out"), pictures=False)
    assert evaluate(replace(whole, data=Data(path=str(data), split="test")))["examples"] == 24
    assert "data.splits" not in capsys.readouterr().err
    assert evaluate(replace(whole, data=Data(path=str(data))))["examples"] == 6


def test_images_that_were_trained_on_are_warned_of(tmp_path, coloured, capsys):
    def said_of(model, **data):
        recipe = replace(EVALUATIONS["own"], model=str(model), out=str(tmp_path / "out"), pictures=False)
        evaluate(replace(recipe, data=Data(path=str(coloured), **data)))
        return capsys.readouterr().err

    rule = "stratified:50/25/25@1"
    run = run_with(tmp_path / "run", coloured, splits=rule)
    assert "is what the model was trained on" in said_of(run / "best" / "model", split="train")
    assert f"trained with data.splits={rule}, not random:50/50" in said_of(run / "best/model", splits="random:50/50")
    assert "warning" not in said_of(run / "best" / "model", splits=rule)
    plain = run_with(tmp_path / "plain", coloured, splits=None)
    assert "is what the model was trained on" in said_of(plain / "best" / "model")
    assert "has no test or validation split" in said_of(timm_folder(tmp_path / "made"))
    elsewhere = run_with(tmp_path / "elsewhere", tmp_path, splits=rule)
    assert "has no test or validation split" in said_of(elsewhere / "best" / "model")
