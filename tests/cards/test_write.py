"""Cards say what is on record of the exported weights, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.cards import pictures
from hf_mae.cards.options import CardOptions
from hf_mae.cards.validate import validate_card
from hf_mae.cards.write import write_card
from hf_mae.evaluation.reconstruction import GREY, draw_grid
from hf_mae.models.masking import mask_from_noise, mask_noise, num_uniforms
from tests.cards.conftest import change, derive, write_json

OPTIONS = CardOptions(license="apache-2.0", language=("en",))


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _card(export: Path, run: Path | None, options: CardOptions = OPTIONS, **more) -> str:
    return write_card(export, "org/animals", options, run=run, **more).read_text()


def test_card_is_valid_and_its_front_matter_is_plain(export: Path, run: Path):
    text = _card(export, run)
    assert validate_card(text, files=_files(export)) == []
    data = ModelCard.load(export / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-classification",
        "apache-2.0",
    )
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("accuracy", 0.7654)]


def test_numbers_of_the_last_weights_are_those_of_their_step(export: Path, run: Path):
    text = _card(export, run)
    assert "| top-1 accuracy | 76.54 % | animals, validation | 12 |" in text
    assert "last, after 30 updates" in text
    assert "81.23" not in text
    assert "best of" not in text


def test_the_split_on_record_is_the_one_that_is_named(export: Path, run: Path):
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", {"starts": [s | {"tested_on": "test"} for s in environment["starts"]]})
    assert "| top-1 accuracy | 76.54 % | animals, test | 12 |" in _card(export, run)


def test_the_run_is_found_where_the_export_lies_in_it(export: Path, run: Path):
    inside = run / "export" / "beit"
    inside.parent.mkdir()
    export.rename(inside)
    assert "| top-1 accuracy | 76.54 % |" in _card(inside, None)


def test_numbers_of_the_best_weights_come_with_how_they_were_chosen(export: Path, run: Path):
    change(export / "export.json", source__weights="best", source__step=20)
    text = _card(export, run)
    assert "| top-1 accuracy | 81.23 % | animals, validation | 12 |" in text
    assert "best of 2 evaluations by `top1`" in text
    assert "76.54" not in text
    assert not (export / "pictures" / "confusion.png").exists()  # the counts on record are of other weights


def test_weights_without_a_measurement_say_so(export: Path, run: Path):
    change(export / "export.json", source__step=10)
    (run / "evaluation.json").unlink()
    text = _card(export, run)
    assert "top-1" not in text.split("## Pictures")[0].split("## Results")[1]
    assert "model-index" not in text
    assert "81.23" not in text
    assert "76.54" not in text


def test_export_alone_makes_a_card_without_claims(export: Path):
    text = _card(export, None)
    assert "Accuracy of these weights: not measured" in text
    assert "Not recorded" in text
    assert validate_card(text, files=_files(export)) == []


def test_every_number_of_the_tables_stands_in_the_list_of_facts(export: Path, run: Path):
    text = _card(export, run)
    facts = json.loads((export / "records" / "facts.json").read_text())
    told = {entry["value"] for entry in facts}
    assert all(entry["source"] for entry in facts)
    body = text.split("---\n", 2)[2].split("## Citation")[0]
    cells = [cell.strip() for line in body.splitlines() if line.startswith("| ") for cell in line.split("|")[2:-1]]
    numbers = [cell for cell in cells if re.fullmatch(r"[-\d.,e%x ]*\d[-\d.,e%x ]*", cell)]
    assert len(numbers) > 20
    assert [cell for cell in numbers if cell not in told] == []


def test_machine_and_rates_come_from_the_records(export: Path, run: Path):
    text = _card(export, run)
    for line in (
        "| highest learning rate used | 0.0005 |",
        "| starts | 2 |",
        "| images per second | 48 |",
        "| time of the updates (without evaluations) | 40 s |",
        "| precision | bfloat16 autocast |",
        "| seed | 7 |",
        "| images | 1,234 |",
        "| parameters, fixed tables and statistics included | 22 |",
        "| largest difference, float64 | 3.5e-15 |",
        "| owl | 0.625 |",
    ):
        assert line in text


def test_nothing_of_the_machine_is_published(export: Path, run: Path):
    derive(export, run, "/home/ada/secret/encoder")
    _card(export, run, CardOptions(license="mit", base_license="mit"))
    for name in _files(export):
        if not name.endswith((".png", ".safetensors")):
            text = (export / name).read_text()
            for private in ("/home", "/ada", "ada-", "secret", "4711", "laptop"):
                assert private not in text, (name, private)
    assert "`encoder`" in (export / "README.md").read_text()


def _recorded(run: Path, **data) -> None:
    starts = json.loads((run / "environment.json").read_text())["starts"]
    write_json(run / "environment.json", {"starts": [s | {"data": s["data"] | data} for s in starts]})


def test_relative_path_is_not_taken_for_a_repository(export: Path, run: Path):
    change(run / "recipe.json", data={"path": "data/birds", "splits": None})
    text = _card(export, run)
    assert "datasets:" not in text
    assert "huggingface.co/datasets" not in text
    assert "| data set | birds |" in text
    assert not (export / ".eval_results").exists()


def test_data_measured_on_has_a_name_of_its_own(export: Path, run: Path):
    text = _card(export, run, CardOptions(license="mit", data_name="Animals, half of them", test_name="Animals"))
    assert "| data set | Animals, half of them |" in text
    assert "| top-1 accuracy | 76.54 % | Animals, validation | 12 |" in text
    assert [r.dataset_name for r in ModelCard.load(export / "README.md").data.eval_results] == ["Animals"]


def test_binary_cross_entropy_is_read_by_a_sigmoid(export: Path, run: Path):
    assert "sigmoid" not in _card(export, run)
    change(export / "export.json", problem_type="multi_label_classification")
    text = _card(export, run)
    assert ".logits.sigmoid()[0]" in text
    assert "softmax" not in text.split("## Exactness")[0]
    assert "each class is a question of its own" in text
    change(export / "export.json", library="timm", target="timm")
    timm = _card(export, run)
    assert "logits.sigmoid()[best]" in timm
    assert "softmax" not in timm.split("## Exactness")[0]


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_grey_classifier_is_one_and_promises_no_pipeline(export: Path, run: Path, library: str):
    change(export / "export.json", library=library, task=None, pipeline=None, classifies=True, channels=1)
    text = _card(export, run)
    assert "An image classifier with 3 classes" in text
    assert "pipeline(" not in text
    assert '.convert("L")' in text
    assert "pipeline_tag" not in text
    assert validate_card(text, files=_files(export)) == []


def test_processor_is_described_as_it_was_compared(export: Path, run: Path):
    assert "crop offset" not in _card(export, run)  # nothing says so
    change(export / "export.json", processor={"pil": 0.0, "default": 0.004, "shift": [0, 1], "agrees": True})
    text = _card(export, run)
    assert "up to one pixel of crop offset" in text
    assert "after laying the crops over each other" in text
    change(export / "export.json", processor={"pil": 0.4, "default": 0.4, "shift": [0, 0], "agrees": False})
    assert "does not prepare pictures as our evaluation did" in _card(export, run)


def test_card_of_an_export_alone_claims_no_measurement_and_no_seed(export: Path):
    text = _card(export, None)
    assert "were measured with the transform" not in text
    assert "One run with one seed" not in text


def test_names_cannot_break_the_markdown(export: Path, run: Path):
    evil = "a|b\n## Usage\n<script>x</script>"
    answers = {"answers": [{"label": evil, "score": 0.5}], "picture": "p"}
    change(export / "export.json", pipeline=answers)
    options = CardOptions(license="mit", author="<script>", title="A | *b*", data_name="x | y")
    text = _card(export, run, options)
    assert "| a\\|b ## Usage &lt;script&gt;x&lt;/script&gt; | 0.5 |" in text
    assert "# A \\| \\*b\\*\n" in text
    assert "<script" not in text
    assert text.count("\n## Usage") == 1
    assert validate_card(text, files=_files(export)) == []


@pytest.mark.parametrize("name", ["title", "author", "data_license", "data_name", "tags"])
def test_options_of_one_line_have_one(export: Path, name: str):
    value = "a\n---\n# b"
    with pytest.raises(ValueError, match=f"{name}=.*more than one line"):
        _card(export, None, replace(OPTIONS, **{name: (value,) if name == "tags" else value}))


def test_lineage_names_the_run_not_its_folder_model(export: Path, run: Path, tmp_path: Path):
    write_json(tmp_path / "pre" / "recipe.json", {"name": "mae-small"})
    (tmp_path / "pre" / "best" / "model").mkdir(parents=True)
    derive(export, run, str(tmp_path / "pre" / "best" / "model"))
    assert "trained from `pre`, a run of the author (recipe `mae-small`)." in _card(export, run)


def test_repository_needs_an_owner(export: Path):
    with pytest.raises(ValueError, match="ORG/NAME"):
        write_card(export, "animals", OPTIONS)


def test_data_set_of_the_hub_is_linked_and_gets_an_eval_result(export: Path, run: Path):
    change(run / "recipe.json", data={"path": "ada/animals", "splits": None})
    _recorded(run, revision="a" * 40)
    text = _card(export, run)
    assert "[ada/animals](https://huggingface.co/datasets/ada/animals)" in text
    entries = yaml.safe_load((export / ".eval_results" / "ada--animals.yaml").read_text())
    assert entries[0]["dataset"]["id"] == "ada/animals"
    assert entries[0]["value"] == 0.7654
    assert ModelCard.load(export / "README.md").data.datasets == ["ada/animals"]


def test_samples_lose_their_metadata_and_feed_the_widget(export: Path, run: Path, tmp_path: Path):
    picture = Image.new("RGB", (2000, 10), "red")
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    picture.save(tmp_path / "my owl.jpg", exif=exif)
    text = _card(export, run, CardOptions(license="mit", sample=(tmp_path / "my owl.jpg",)))
    written = export / "samples" / "my_owl.jpg"
    assert b"taken at home" not in written.read_bytes()
    with Image.open(written) as opened:
        assert opened.width == 1024
    assert "src: https://huggingface.co/org/animals/resolve/main/samples/my_owl.jpg" in text
    assert validate_card(text, files=_files(export)) == []
    assert any("not among the files" in problem for problem in validate_card(text, files=[]))


def test_pictures_of_the_run_are_only_shown_when_asked_for(export: Path, run: Path):
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "pictures" / "worst.png")
    assert "worst" not in _card(export, run)
    assert "pictures/run_worst.png" in _card(export, run, CardOptions(license="mit", run_pictures=True))


def test_card_is_written_again_without_leftovers(export: Path, run: Path):
    _card(export, run)
    before = {name: (export / name).read_bytes() for name in _files(export)}
    evaluation = (run / "evaluation.json").read_text()
    (run / "evaluation.json").unlink()
    (export / "pictures" / "mine.png").write_bytes(b"x")
    _card(export, run)
    assert sorted(p.name for p in (export / "pictures").iterdir()) == ["learning.png", "mine.png"]
    (run / "evaluation.json").write_text(evaluation)
    (export / "pictures" / "mine.png").unlink()
    _card(export, run)
    assert {name: (export / name).read_bytes() for name in _files(export)} == before


@pytest.mark.parametrize("name", ["README.md", "pictures/learning.png"])
def test_an_edited_card_is_refused_or_kept_and_written_anew_only_when_asked(export: Path, run: Path, name: str):
    _card(export, run)
    text = (export / name).read_bytes()
    (export / name).write_bytes(text + b"mine")
    before = {file: (export / file).read_bytes() for file in _files(export)}
    with pytest.raises(ValueError, match=rf"{name} was edited or added.*--overwrite"):
        _card(export, run, replace(OPTIONS, title="Other"))
    assert {file: (export / file).read_bytes() for file in _files(export)} == before
    said: list[str] = []
    _card(export, run, replace(OPTIONS, title="Other"), keep_edits=True, say=said.append)
    assert (export / name).read_bytes() == text + b"mine"
    assert name in said[0]
    _card(export, run, overwrite=True)
    assert (export / name).read_bytes() == text
    _card(export, run)


def test_an_edited_card_keeps_what_it_shows(export: Path, run: Path, tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "owl.png")
    _card(export, run, replace(OPTIONS, sample=(tmp_path / "owl.png",)))
    with (export / "README.md").open("a") as file:
        file.write("\nMy own words.\n")
    text = _card(export, run, keep_edits=True)
    assert "My own words." in text
    assert (export / "samples" / "owl.jpg").is_file()
    assert validate_card(text, files=_files(export)) == []


def test_an_edited_card_states_its_licence(export: Path, run: Path):
    _card(export, run)
    card = export / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit"))
    assert "license: mit" in _card(export, run, CardOptions(), keep_edits=True)  # no licence has to be named again
    with pytest.raises(ValueError, match=r"license=apache-2.0.*states license: mit"):
        _card(export, run, keep_edits=True)
    derive(export, run, "facebook/vit-mae-base")
    with pytest.raises(ValueError, match="non-commercial terms stay"):
        _card(export, run, CardOptions(), keep_edits=True)


def test_a_card_of_which_nobody_knows_who_wrote_it_is_the_users(export: Path, run: Path):
    (export / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    with pytest.raises(ValueError, match=r"README.md was edited or added.*--overwrite"):
        _card(export, run)
    assert "# Mine" in (export / "README.md").read_text()
    assert not (export / "pictures").exists()


def test_reconstruction_of_a_sample_is_drawn_from_the_export(tmp_path: Path, encoder: Path, export: Path):
    change(export / "export.json", **{"class": "MAEForPreTraining"}, target="hf_mae", library="hf_mae", task=None)
    change(export / "export.json", classifies=False, problem_type=None)
    change(export / "preprocessor_config.json", image_mean=[0.5], image_std=[0.5])
    for name in ("config.json", "model.safetensors"):
        (export / name).write_bytes((encoder / name).read_bytes())
    Image.new("L", (20, 20), 90).save(tmp_path / "grey.png")
    text = write_card(
        export, "org/mae", CardOptions(license="mit", sample=(tmp_path / "grey.png",)), run=None
    ).read_text()
    assert "![Reconstruction" in text
    assert (export / "pictures" / "reconstruction.png").stat().st_size > 500
    assert "pipeline_tag" not in text  # features of a masking model are none
    assert "no widget here by design" in text


@pytest.mark.parametrize(
    "fields", [{"mask_strategy": "grid", "mask_ratio": 0.75}, {"mask_strategy": "grid", "mask_ratio": 0.5},
               {"mask_strategy": "block"}, {"mask_strategy": "random"}],
)  # fmt: skip
def test_the_reconstruction_of_a_card_shows_the_masks_of_the_model(tmp_path: Path, export: Path, monkeypatch, fields):
    config = MAEConfig(
        image_size=32, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, **fields,
    )  # fmt: skip
    for name in ("config.json", "model.safetensors"):
        (export / name).unlink()
    MAEForPreTraining(config).save_pretrained(export)
    change(export / "export.json", **{"class": "MAEForPreTraining"}, target="hf_mae", library="hf_mae", task=None)
    change(export / "export.json", classifies=False, problem_type=None)
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    drawn = []
    monkeypatch.setattr(pictures, "draw_grid", lambda shown, path: drawn.append(shown) or draw_grid(shown, path))
    write_card(export, "org/mae", CardOptions(license="mit", sample=(tmp_path / "a.png", tmp_path / "b.png")))
    hidden = (drawn[0].masked == GREY).all(dim=1)  # [N, H, W]; neither sample is grey
    patches = hidden.reshape(2, 8, 4, 8, 4)
    assert torch.equal(patches.all(dim=(2, 4)), patches.any(dim=(2, 4)))
    uniforms = torch.rand(2, num_uniforms(config.mask_strategy, (8, 8)), generator=torch.Generator().manual_seed(0))
    noise = mask_noise(config.mask_strategy, uniforms, (8, 8), config.mask_ratio)
    expected = mask_from_noise(noise, config.len_keep).mask.bool().reshape(2, 8, 8)
    assert torch.equal(patches.all(dim=(2, 4)), expected)
    if config.mask_strategy == "grid":
        assert expected[0].tolist() == expected[1].tolist()
        assert not expected[0, 0, 0]


@pytest.mark.parametrize(
    ("cls", "target", "usage", "said"),
    [
        ("ViTMAEForPreTraining", "vit_mae", "# AutoModel masks", "AutoModel masks patches at random.*--target vit"),
        ("ViTModel", "vit", "add_pooling_layer=False", "pooler_output is random"),
    ],
)
def test_a_card_says_what_automodel_does_to_the_weights(export: Path, cls: str, target: str, usage: str, said: str):
    change(export / "export.json", **{"class": cls}, target=target, task=None, classifies=False, problem_type=None)
    text = _card(export, None)
    assert usage in text.split("## Usage")[1].split("## Results")[0]
    assert re.search(said, text)
    change(export / "export.json", **{"class": "BeitModel"}, target="beit")
    assert not re.search(said, _card(export, None))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_number_of_the_split_that_chose_the_weights_is_called_optimistic(export: Path, run: Path, split: str):
    environment = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", {"starts": [s | {"tested_on": split} for s in environment["starts"]]})
    assert "optimistic" not in _card(export, run)
    change(export / "export.json", source__weights="best", source__step=20)
    text = _card(export, run)
    assert re.search(rf"best of 2 evaluations by `top1` on {split}\b.*optimistic", text)
    assert ("test split" in text) == (split == "test")
