"""What weights derive from is found while it can be, and kept on record with its licence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hf_mae import MAEConfig, MAEForImageClassification, export
from hf_mae.cards.options import CardOptions
from hf_mae.cards.validate import validate_card
from hf_mae.cards.write import write_card
from hf_mae.exporting.convert import convert
from hf_mae.exporting.lineage import is_official, lineage, with_official_terms
from hf_mae.training import origins
from hf_mae.training.origins import lineage_of
from tests.cards.conftest import change, write_json

COMMIT = "c" * 40
NC = {"license": "cc-by-nc-4.0", "source": "mae_pretrain_vit_base.pth"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the Hub: HUB/ORG/NAME/FILE; what is not there is not there."""

    def download(repo: str, file: str, *, revision: str | None = None) -> str:
        path = tmp_path / "hub" / repo / COMMIT / file
        if not path.is_file() or revision not in (None, COMMIT):
            raise FileNotFoundError(path)
        return str(path)

    class Api:
        def model_info(self, repo: str, *, revision: str | None = None) -> SimpleNamespace:
            folder = tmp_path / "hub" / repo / COMMIT
            if (tmp_path / "hub" / "down").exists() or not folder.is_dir() or revision not in (None, COMMIT):
                raise ConnectionError("no such repository, or nobody answers")
            return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=f.name) for f in folder.iterdir()])

    def cached(repo: str, file: str, *, revision: str | None = None) -> str | None:
        path = tmp_path / "hub" / repo / COMMIT / file
        return str(path) if path.is_file() else None

    monkeypatch.setattr(origins, "HfApi", Api)
    monkeypatch.setattr(origins, "hf_hub_download", download)
    monkeypatch.setattr(origins, "try_to_load_from_cache", cached)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    return tmp_path / "hub"


def _repository(hub: Path, name: str, **files: str) -> None:
    folder = hub / name / COMMIT
    folder.mkdir(parents=True)
    for file, text in ({"config_json": "{}"} | files).items():
        (folder / file.replace("_", ".")).write_text(text)


def _run(folder: Path, init_from: str = "", **start: object) -> Path:
    write_json(folder / "recipe.json", {"name": f"recipe-{folder.name}", "init_from": init_from})
    write_json(folder / "environment.json", {"starts": [{"step": 0, **start}]})
    for place in ("best/model", "checkpoints/step_00000004/model", "checkpoints/step_00000004/model_ema"):
        write_json(folder / place / "config.json", {})
    return folder


@pytest.mark.parametrize(
    "place", ["", "best/model", "checkpoints/step_00000004/model", "checkpoints/step_00000004/model_ema"]
)
def test_every_place_in_a_run_leads_to_what_it_was_trained_from(tmp_path: Path, place: str):
    write_json(tmp_path / "converted" / "conversion.json", NC)
    run = _run(tmp_path / "tuned", str(tmp_path / "converted"))
    links = lineage_of(str(run / place))
    assert (links[0]["name"], links[0]["kind"], links[0]["recipe"]) == ("tuned", "run", "recipe-tuned")
    assert [link["license"] for link in lineage(run / place)] == ["cc-by-nc-4.0", "cc-by-nc-4.0"]


def test_record_of_the_start_outlives_what_it_names(tmp_path: Path):
    write_json(tmp_path / "converted" / "conversion.json", NC)
    known = lineage_of(str(tmp_path / "converted"))
    run = _run(tmp_path / "tuned", str(tmp_path / "converted"), lineage=known)
    shutil.rmtree(tmp_path / "converted")
    assert lineage_of(str(run))[1:] == known
    unrecorded = _run(tmp_path / "old", str(tmp_path / "converted"))
    assert [(link["name"], link["kind"], link["license"]) for link in lineage_of(str(unrecorded))[1:]] == [
        ("converted", "missing", None)
    ]


def test_repository_is_known_by_its_commit_and_the_licence_of_its_card(hub: Path):
    _repository(hub, "ada/encoder", README_md="---\nlicense: cc-by-nc-sa-4.0\n---\n")
    (link,) = lineage_of("ada/encoder")
    assert link["revision"] == COMMIT
    assert (link["kind"], link["license"], link["source"]) == ("hub", "cc-by-nc-sa-4.0", "its card")


def test_lineage_of_a_published_export_goes_on(hub: Path):
    before = [{"name": "encoder", "kind": "run", "license": None, "source": ""}, {"name": "x", "kind": "file"} | NC]
    _repository(hub, "ada/tuned", export_json=json.dumps({"lineage": before}), README_md="---\nlicense: mit\n---\n")
    links = lineage("ada/tuned")
    assert [link["name"] for link in links] == ["ada/tuned", "encoder", "x"]
    assert links[-1]["license"] == "cc-by-nc-4.0"


def test_official_copies_are_non_commercial_whatever_their_card_says(hub: Path):
    _repository(hub, "facebook/vit-mae-base", README_md="---\nlicense: apache-2.0\n---\n")
    assert lineage_of("facebook/vit-mae-base")[0]["license"] == "apache-2.0"
    assert lineage("facebook/vit-mae-base")[0]["license"] == "cc-by-nc-4.0"


@pytest.mark.parametrize("prefix", ["", "timm/", "hf-hub:timm/"])
def test_weights_of_timm_are_under_what_timm_records(hub: Path, prefix: str):
    _repository(hub, "timm/convnextv2_base.fcmae_ft_in1k")
    (link,) = lineage_of(f"{prefix}convnextv2_base.fcmae_ft_in1k")
    assert (link["name"], link["license"]) == ("timm/convnextv2_base.fcmae_ft_in1k", "cc-by-nc-4.0")
    assert link["revision"] == COMMIT


def test_model_in_the_cache_is_described_from_there_when_nobody_answers(hub: Path):
    _repository(hub, "ada/base", README_md="---\nlicense: mit\n---\n")
    (hub / "down").touch()
    assert lineage_of("ada/base") == [
        {"name": "ada/base", "kind": "hub", "license": "mit", "source": "its card", "revision": COMMIT}
    ]


def test_name_that_the_hub_does_not_know_is_a_missing_path(hub: Path):
    assert lineage_of("data/birds_encoder") == [
        {"name": "birds_encoder", "kind": "missing", "license": None, "source": ""}
    ]


def test_relative_path_of_a_run_is_never_asked_of_the_hub(hub: Path, tmp_path: Path):
    _repository(hub, "models/mae_b", README_md="---\nlicense: mit\n---\n")
    run = _run(tmp_path / "tuned", "models/mae_b")  # trained in another folder, before origins were recorded
    assert lineage_of(str(run))[1]["kind"] == "missing"


def test_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "renamed.pth").write_bytes(b"x")
    (link,) = lineage_of(str(tmp_path / "renamed.pth"))
    assert lineage(tmp_path / "renamed.pth") == []
    from hf_mae.exporting import lineage as module

    monkeypatch.setattr(module, "OFFICIAL", (replace(module.OFFICIAL[0], md5=link["md5"][:6]),))
    assert module.lineage(tmp_path / "renamed.pth")[0]["license"] == "cc-by-nc-4.0"


def test_own_runs_are_not_official_by_their_name(tmp_path: Path):
    run = _run(tmp_path / "mae_pretrain_vit_base", "")
    assert lineage(_run(tmp_path / "tuned", str(run)))[0]["license"] is None


@pytest.mark.parametrize(
    ("kind", "name", "bound"),
    [
        ("hub", "facebook/vit-mae-base", True),
        ("hub", "someone/mae_pretrain_vit_base", True),
        ("hub", "someone/mae_pretrain_vit_small_oct", False),
        ("hub", "timm/vit_large_patch16_224.mae", True),
        ("missing", "vit_base_patch16_224.mae", True),
        ("missing", "mae_visualize_vit_large_ganloss.pth", True),
        ("missing", "mae_pretrain_vit_tiny_oct", False),
        ("missing", "vit-mae-base", False),
        ("folder", "mae_pretrain_vit_base", False),
        ("export", "vit-mae-base", False),
        ("conversion", "facebook/vit-mae-huge", True),
        ("conversion", "mae_pretrain_vit_base", False),
        ("file", "mae_pretrain_vit_base.pth", False),  # its hash is known, and another
        ("file", "mae_pretrain_vit_base_full.pth", True),  # no hash of it was ever published
    ],
)
def test_weights_are_official_by_what_is_known_of_them_and_not_by_a_part_of_their_name(kind, name, bound):
    link = {"name": name, "kind": kind, "license": None, "source": "", "md5": "0" * 32}
    assert (with_official_terms([link])[0]["license"] == "cc-by-nc-4.0") == bound


def test_folder_is_not_under_non_commercial_terms_for_its_name(tmp_path: Path):
    write_json(tmp_path / "mae_pretrain_vit_tiny_oct" / "config.json", {})
    run = _run(tmp_path / "tuned", str(tmp_path / "mae_pretrain_vit_tiny_oct"))
    assert [(link["kind"], link["license"]) for link in lineage(run)] == [("folder", None)]
    assert not is_official("someone/vit-mae-base-octs")


def test_name_of_an_architecture_stands_for_the_weights_that_timm_loads(hub: Path):
    assert origins.timm_license("resnet50") == "apache-2.0"
    assert origins.timm_license("birds") is None
    _repository(hub, "timm/resnet50.a1_in1k")
    assert [(one["name"], one["kind"], one["license"]) for one in lineage_of("resnet50")] == [
        ("timm/resnet50.a1_in1k", "hub", "apache-2.0")
    ]


@pytest.mark.parametrize("lost", ["README.md", "export.json"])
def test_licence_that_did_not_arrive_is_not_known(hub: Path, monkeypatch: pytest.MonkeyPatch, lost: str):
    _repository(hub, "ada/base", README_md="---\nlicense: mit\n---\n", export_json='{"lineage": []}')
    download = origins.hf_hub_download

    def cut(repo: str, file: str, **where: str) -> str:
        if file == lost:
            raise ConnectionError("cut")
        return download(repo, file, **where)

    assert lineage_of("ada/base")[0]["license"] == "mit"
    monkeypatch.setattr(origins, "hf_hub_download", cut)
    assert lineage_of("ada/base") == [
        {"name": "ada/base", "kind": "hub", "license": None, "source": "", "revision": COMMIT}
    ]


def test_name_that_only_looks_like_a_repository_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Api:
        def model_info(self, repo: str, **_: str) -> None:
            raise ConnectionError("nobody answers")

    monkeypatch.setattr(origins, "HfApi", Api)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert lineage_of("ada/two..dots")[0]["kind"] == "missing"  # the cache of the client refuses it


def test_run_without_an_origin_comes_from_nothing(tmp_path: Path):
    assert lineage(_run(tmp_path / "scratch")) == []


def _classifier(folder: Path) -> Path:
    MAEForImageClassification(
        MAEConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=2, id2label={0: "a", 1: "b"},
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _tuned(folder: Path, init_from: Path | str = "") -> Path:
    """Return a classification run whose best model is whole."""
    run = _run(folder, str(init_from))
    write_json(run / "recipe.json", {"name": "r", "init_from": str(init_from), "model": {"head": "linear"}})
    write_json(run / "best" / "best.json", {"step": 4, "metric": "top1", "numbers": {}})
    _classifier(run / "best" / "model")
    return run


def test_export_of_a_non_commercial_run_binds_its_card_wherever_it_lies(tmp_path: Path):
    write_json(tmp_path / "converted" / "conversion.json", NC)
    run = _tuned(tmp_path / "tuned", tmp_path / "converted")
    export(run / "best" / "model", tmp_path / "out", "hf_mae")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert [link["license"] for link in record["lineage"]] == ["cc-by-nc-4.0", "cc-by-nc-4.0"]
    assert str(tmp_path) not in json.dumps(record)
    with pytest.raises(ValueError, match="non-commercial terms stay"):
        write_card(tmp_path / "out", "ada/x", CardOptions(license="apache-2.0"))


def test_card_of_converted_weights_does_not_say_they_were_trained(tmp_path: Path):
    model = MAEForImageClassification.from_pretrained(_classifier(tmp_path / "model"))
    torch.save({"model": model.state_dict()}, tmp_path / "finetuned.pth")
    names = {0: "a", 1: "b"}
    folder = convert(
        tmp_path / "finetuned.pth", tmp_path / "mae-in1k", license="mit", id2label=names, num_attention_heads=1
    )
    text = write_card(export(folder, tmp_path / "out", "hf_mae"), "ada/x", CardOptions()).read_text()
    assert "They were not trained any further." in text
    assert "These weights are those of `mae-in1k`, weights of others that were converted" in text
    assert "which came from `finetuned.pth`" in text
    assert "trained from" not in text
    assert "encoder comes from another model" not in text


def test_card_of_an_object_says_where_it_was_loaded_from_and_no_more(tmp_path: Path):
    run = _tuned(tmp_path / "tuned", _classifier(tmp_path / "other"))
    model = MAEForImageClassification.from_pretrained(run / "best" / "model")
    options = CardOptions(license="mit", base_license="mit")
    text = write_card(export(model, tmp_path / "out", "hf_mae"), "ada/x", options).read_text()
    assert "These weights come from `tuned`, a run of the author (recipe `r`).\n- which came from `other`" in text


def test_repository_that_is_exported_again_is_not_said_to_be_trained(tmp_path: Path):
    out = export(_classifier(tmp_path / "model"), tmp_path / "out", "hf_mae")
    link = {"name": "ada/x", "kind": "hub", "license": "mit", "source": "its card", "revision": COMMIT}
    change(out / "export.json", lineage=[link])
    text = write_card(out, "ada/x", CardOptions()).read_text()
    assert "These weights are those of [ada/x](https://huggingface.co/ada/x), this repository as it was before" in text
    assert "base_model" not in text
    assert "encoder comes from another model" not in text
    assert validate_card(text, files=[path.name for path in out.iterdir()]) == []


def test_own_export_can_be_trained_from_and_plain_folder_has_to_be_spoken_for(tmp_path: Path):
    write_json(tmp_path / "start" / "conversion.json", {"license": "mit", "source": "mine.pth"})
    first = export(_tuned(tmp_path / "a", tmp_path / "start") / "best" / "model", tmp_path / "hf_mae", "hf_mae")
    links = lineage_of(str(first))
    assert [(link["kind"], link["name"]) for link in links] == [
        ("run", "a"),
        ("conversion", "start"),
        ("conversion", "mine.pth"),
    ]
    assert links[0]["recipe"] == "r"
    started = export(_tuned(tmp_path / "b", first) / "best" / "model", tmp_path / "from_export", "hf_mae")
    text = write_card(started, "ada/x", CardOptions(license="apache-2.0")).read_text()
    assert "trained from `a`, a run of the author (recipe `r`)" in text
    again = write_card(export(first, tmp_path / "again", "hf_mae"), "ada/x", CardOptions(license="apache-2.0"))
    assert "These weights are those of `a`, a run of the author" in again.read_text()
    plain = export(
        _tuned(tmp_path / "c", _classifier(tmp_path / "plain")) / "best" / "model", tmp_path / "c_out", "hf_mae"
    )
    with pytest.raises(ValueError, match="derive from plain, whose terms are on no record"):
        write_card(plain, "ada/x", CardOptions(license="apache-2.0"))


def test_base_model_of_the_author_is_told_beside_a_local_ancestor(tmp_path: Path):
    out = export(_tuned(tmp_path / "tuned", _run(tmp_path / "pre")) / "best" / "model", tmp_path / "out", "hf_mae")
    text = write_card(out, "ada/x", CardOptions(license="mit", base_model="ada/encoder")).read_text()
    assert "base_model: ada/encoder" in text
    assert "Base model, as stated by the author: [ada/encoder](https://huggingface.co/ada/encoder)." in text
    assert "trained from `pre`" in text
