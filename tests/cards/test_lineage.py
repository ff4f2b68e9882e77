"""What weights derive from is found while it can be, and kept on record with its licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_mae import MAEConfig, MAEForImageClassification, export
from hf_mae.cards.options import CardOptions
from hf_mae.cards.write import write_card
from hf_mae.exporting.lineage import is_official, lineage, lineage_of_run
from hf_mae.training import origins
from hf_mae.training.origins import lineage_of, parents_of_run
from tests.cards.conftest import write_json

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
    assert parents_of_run(run) == known
    unrecorded = _run(tmp_path / "old", str(tmp_path / "converted"))
    assert [(link["name"], link["kind"], link["license"]) for link in parents_of_run(unrecorded)] == [
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
    assert lineage_of_run(run)[0]["kind"] == "missing"


def test_file_is_known_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "renamed.pth").write_bytes(b"x")
    (link,) = lineage_of(str(tmp_path / "renamed.pth"))
    assert lineage(tmp_path / "renamed.pth") == []
    from hf_mae.exporting import lineage as module

    monkeypatch.setattr(module, "_is_official_file", lambda md5: md5 == link["md5"])
    assert module.lineage(tmp_path / "renamed.pth")[0]["license"] == "cc-by-nc-4.0"


def test_own_runs_are_not_official_by_their_name(tmp_path: Path):
    run = _run(tmp_path / "mae_pretrain_vit_base", "")
    assert lineage(_run(tmp_path / "tuned", str(run)))[0]["license"] is None
    assert not is_official("vit-mae-tiny")


def test_run_without_an_origin_comes_from_nothing(tmp_path: Path):
    assert lineage(_run(tmp_path / "scratch")) == []


def test_export_of_a_non_commercial_run_binds_its_card_wherever_it_lies(tmp_path: Path):
    model = MAEForImageClassification(
        MAEConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, num_labels=2, id2label={0: "a", 1: "b"},
        )
    )  # fmt: skip
    write_json(tmp_path / "converted" / "conversion.json", NC)
    run = _run(tmp_path / "tuned", str(tmp_path / "converted"))
    write_json(
        run / "recipe.json", {"name": "r", "init_from": str(tmp_path / "converted"), "model": {"head": "linear"}}
    )
    write_json(run / "best" / "best.json", {"step": 4, "metric": "top1", "numbers": {}})
    model.save_pretrained(run / "best" / "model")
    export(run / "best" / "model", tmp_path / "out", "hf_mae")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert [link["license"] for link in record["lineage"]] == ["cc-by-nc-4.0", "cc-by-nc-4.0"]
    assert str(tmp_path) not in json.dumps(record)
    with pytest.raises(ValueError, match="non-commercial terms stay"):
        write_card(tmp_path / "out", "ada/x", CardOptions(license="apache-2.0"))
