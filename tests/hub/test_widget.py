"""The verdict on a widget: what the Hub infers, each precondition broken on its own, stock code in a new process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BeitConfig, BeitModel, BitImageProcessor, ViTConfig, ViTForImageClassification

from hf_mae import MAEForPreTraining
from hf_mae.hub.folder_checks import bundled_picture
from hf_mae.hub.widget import Verdict, check_folder, check_remote
from hf_mae.models.timm_models import create, write_timm_folder
from hf_mae.models.timm_spec import TimmSpec

SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CARD = {"library_name": "transformers", "pipeline_tag": "image-classification", "license": "apache-2.0"}


def _write_card(folder: Path, card: dict[str, Any]) -> None:
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in card.items())  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{lines}\n---\n\n# A model\n")


def _write_processor(folder: Path) -> None:
    BitImageProcessor(
        do_convert_rgb=True, size={"shortest_edge": 9}, crop_size={"height": 8, "width": 8}, resample=3
    ).save_pretrained(folder)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A tiny stock classifier with card and processor."""
    torch.manual_seed(0)
    labels = {0: "robin", 1: "wren", 2: "tit"}
    config = ViTConfig(**SIZES, id2label=labels, label2id={v: k for k, v in labels.items()})
    ViTForImageClassification(config).save_pretrained(tmp_path)
    _write_processor(tmp_path)
    _write_card(tmp_path, CARD)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the pipeline out: the other checks are what is tested."""
    from hf_mae.hub import widget

    monkeypatch.setattr(widget, "pipeline_check", lambda folder, task, picture: widget.Check("pipeline", True, ""))


def _edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not ...}))


def _problems(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.problems]


def test_a_stock_classifier_passes_and_answers_in_a_process_without_hf_mae(stock):
    verdict = check_folder(stock)
    assert verdict.problems == []
    assert verdict.works
    pipeline = verdict.checks[-1]
    assert pipeline.found.startswith("flower.jpg: ")
    assert {"robin", "wren", "tit"} == {part.split()[0] for part in pipeline.found.split(": ")[1].split(", ")}
    assert "Hub's decision" in verdict.sentence
    assert "not known" in verdict.sentence


def test_a_timm_folder_passes_and_a_second_num_classes_is_what_breaks_it(tmp_path):
    spec = TimmSpec(
        architecture="test_resnet",
        names=("ant", "bee"),
        image_size=(32, 32),
        test_image_size=(32, 32),
        crop_pct=None,
        channels=3,
        drop_path_rate=0.0,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )
    write_timm_folder(tmp_path, spec, create(spec).state_dict())
    _write_card(tmp_path, CARD | {"library_name": "timm"})
    assert check_folder(tmp_path).problems == []
    args = json.loads((tmp_path / "config.json").read_text())["model_args"]
    _edit(tmp_path / "config.json", model_args=args | {"num_classes": 2})
    verdict = check_folder(tmp_path)
    assert _problems(verdict) == ["model_args", 'pipeline("image-classification")']
    assert not verdict.works
    assert "2 of" in verdict.sentence


CARD_FAULTS = {
    "library": {"library_name": "hf_mae"},
    "task": {"pipeline_tag": "image-segmentation"},
    "no opt-out": {"inference": False},
    "no code": {"tags": ["custom_code"]},
    "samples": {"widget": [{"src": "samples/robin.jpg", "example_title": "Robin"}]},
}


@pytest.mark.parametrize("name", CARD_FAULTS)
@pytest.mark.usefixtures("quick")
def test_a_fault_of_the_card_is_named_with_its_remedy(stock, name):
    _write_card(stock, CARD | CARD_FAULTS[name])
    verdict = check_folder(stock)
    assert name in _problems(verdict)
    assert all(check.remedy for check in verdict.problems)
    assert name in verdict.sentence
    assert not verdict.works


CONFIG_FAULTS: dict[str, dict[str, Any]] = {
    "no code": {"auto_map": {"AutoModel": "modeling.Model"}},
    "labels": {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}},
    "label2id": {"label2id": {"robin": 1, "wren": 0, "tit": 2}},
    "stock class": {"architectures": ["ViTForMaskedImageModeling"]},
}


@pytest.mark.parametrize("name", CONFIG_FAULTS)
@pytest.mark.usefixtures("quick")
def test_a_fault_of_the_config_is_named(stock, name):
    _edit(stock / "config.json", **CONFIG_FAULTS[name])
    assert name in _problems(check_folder(stock))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"resample": ...}, "resample"),
        ({"do_convert_rgb": False}, "do_convert_rgb: true"),
        ({"crop_size": ...}, "crop_size"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_an_incomplete_processor_is_named(stock, change, found):
    _edit(stock / "preprocessor_config.json", **change)
    (problem,) = check_folder(stock).problems
    assert problem.name == "processor"
    assert found in problem.found


@pytest.mark.usefixtures("quick")
def test_pickles_and_missing_files_are_named(stock):
    (stock / "pytorch_model.bin").write_bytes(b"")
    (stock / "model.safetensors").unlink()
    (stock / "preprocessor_config.json").unlink()
    (stock / "README.md").unlink()
    assert _problems(check_folder(stock)) == ["card", "weights", "no pickles", "processor"]


@pytest.mark.usefixtures("quick")
def test_a_name_that_two_classes_share_is_no_fault(stock):
    _edit(
        stock / "config.json",
        id2label={"0": "crane", "1": "crane", "2": "tit"},
        label2id={"crane": 1, "tit": 2},
    )
    assert check_folder(stock).problems == []


@pytest.mark.usefixtures("quick")
def test_samples_are_looked_for_in_the_repository_and_addresses_elsewhere_are_left(stock):
    (stock / "samples").mkdir()
    (stock / "samples" / "a.jpg").write_bytes(bundled_picture().read_bytes())
    own = "https://huggingface.co/org/name/resolve/main/samples/"
    sources = ["samples/a.jpg", f"{own}a.jpg", "https://example.org/b.jpg"]
    _write_card(stock, CARD | {"widget": [{"src": s, "example_title": "A"} for s in sources]})
    assert check_folder(stock).problems == []
    _write_card(stock, CARD | {"widget": [{"src": f"{own}b.jpg"}, {"src": "http://example.org/b.jpg"}]})
    (problem,) = check_folder(stock).problems
    assert problem.found == f"missing: {own}b.jpg, http://example.org/b.jpg"


@pytest.mark.usefixtures("quick")
def test_without_a_tag_the_task_is_inferred_from_the_architecture(stock):
    _write_card(stock, {"license": "mit"})
    assert check_folder(stock).works


@pytest.mark.usefixtures("quick")
def test_front_matter_that_is_not_yaml_is_a_problem_and_not_a_crash(stock):
    (stock / "README.md").write_text("---\na: [1\n---\n")
    assert _problems(check_folder(stock)) == ["card"]
    (stock / "README.md").write_text("---\na: !!python/object/apply:os.getcwd []\n---\n")
    assert _problems(check_folder(stock)) == ["card"]


def test_a_model_that_stock_code_cannot_load_fails_with_its_last_words(stock):
    (stock / "model.safetensors").write_bytes(b"damaged")
    (problem,) = check_folder(stock).problems
    assert problem.name == 'pipeline("image-classification")'
    assert "flower.jpg" in problem.found


def test_pretraining_repositories_have_no_widget_by_design(encoder):
    _write_card(encoder, {"library_name": "hf_mae"})
    verdict = check_folder(encoder)
    assert verdict.problems == []
    assert not verdict.works
    assert "by design" in verdict.sentence
    assert "Space" in verdict.sentence
    _write_card(encoder, {"pipeline_tag": "image-feature-extraction", "library_name": "transformers"})
    assert _problems(check_folder(encoder)) == ["no widget promised"]
    assert MAEForPreTraining.from_pretrained(encoder) is not None


@pytest.mark.usefixtures("quick")
def test_vit_mae_has_no_pipeline_by_design(stock):
    _edit(stock / "config.json", model_type="vit_mae", architectures=["ViTMAEForPreTraining"])
    _write_card(stock, {"library_name": "transformers"})
    verdict = check_folder(stock)
    assert verdict.problems == []
    assert "masks" in verdict.sentence or "mask" in verdict.sentence


def test_an_encoder_answers_but_has_no_input_on_the_page(tmp_path):
    torch.manual_seed(0)
    BeitModel(BeitConfig(**SIZES, use_mean_pooling=True, use_absolute_position_embeddings=True)).save_pretrained(
        tmp_path
    )
    _write_processor(tmp_path)
    _write_card(tmp_path, CARD | {"pipeline_tag": "image-feature-extraction"})
    verdict = check_folder(tmp_path)
    assert verdict.problems == []
    assert not verdict.works
    assert "no input for image-feature-extraction" in verdict.sentence
    assert "[1, 5, 8], the same twice" in verdict.checks[-1].found


def _info(**changes: Any) -> dict[str, Any]:
    info: dict[str, Any] = {
        "id": "org/name",
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["transformers", "vit"],
        "config": {"architectures": ["ViTForImageClassification"], "model_type": "vit"},
        "cardData": CARD | {"widget": [{"src": "samples/a.jpg"}]},
        "siblings": [{"rfilename": n} for n in ("README.md", "config.json", "model.safetensors", "samples/a.jpg")],
        "private": False,
        "gated": False,
    }
    return info | changes


def test_the_hubs_own_answer_is_judged_by_the_same_rules():
    assert check_remote(_info()).works
    assert _problems(check_remote(_info(tags=["custom_code"]))) == ["no code"]
    assert _problems(check_remote(_info(library_name="hf_mae"))) == ["library", "task"]
    assert _problems(check_remote(_info(siblings=[{"rfilename": "README.md"}]))) == ["weights", "samples"]
    assert _problems(check_remote(_info(disabled=True))) == ["visibility"]
    research = check_remote(_info(config={"model_type": "hf_mae"}, cardData={}, pipeline_tag=None))
    assert research.problems == []
    assert "by design" in research.sentence


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, "not known"),
        ({"inference": None}, "not now"),
        ({"inference": "warm", "inferenceProviderMapping": [{"provider": "hf-inference"}]}, "yes, now (hf-inference)"),
        ({"inference": "warm", "inferenceProviderMapping": {"hf-inference": {}}}, "yes, now (hf-inference)"),
    ],
)
def test_whether_a_provider_serves_it_is_the_hubs_word(answer, said):
    assert said in check_remote(_info(**answer)).sentence


def test_a_private_repository_is_said_to_be_hidden():
    verdict = check_remote(_info(private=True))
    assert verdict.works
    assert any("others see no widget" in line for line in verdict.lines())


@pytest.mark.parametrize("kind", [ViTForImageClassification, BeitModel])
def test_a_grey_model_has_no_widget_by_design(tmp_path, kind):
    """No stock pipeline reads grey, whatever the page infers from the architecture."""
    config = ViTConfig if kind is ViTForImageClassification else BeitConfig
    kind(config(**SIZES, num_channels=1)).save_pretrained(tmp_path)
    record = {"task": None, "channels": 1}
    (tmp_path / "export.json").write_text(json.dumps(record))
    _write_card(tmp_path, {"library_name": "transformers"})
    names = [path.name for path in tmp_path.iterdir()]
    info = _info(config={"architectures": [kind.__name__], "model_type": config.model_type},
                 siblings=[{"rfilename": name} for name in names])  # fmt: skip
    for verdict in (check_folder(tmp_path), check_remote(info, record)):
        assert verdict.problems == []
        assert not verdict.works
        assert verdict.sentence.startswith("No widget, by design: the stock pipelines read colour")
        assert "1 channel." in verdict.sentence
    (tmp_path / "model.bin").write_bytes(b"")
    assert _problems(check_folder(tmp_path)) == ["no pickles"]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        check_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"picture=.* is not a file"):
        check_folder(tmp_path, picture=tmp_path / "absent.jpg")
    with pytest.raises(ValueError, match="siblings"):
        check_remote({"error": "Repository not found"})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        check_folder(tmp_path)
