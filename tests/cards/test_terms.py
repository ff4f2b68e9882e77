"""Licences follow the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_mae.cards.options import CardOptions
from hf_mae.cards.records import read_records
from hf_mae.cards.terms import base_model, metadata, pipeline_tag, terms
from hf_mae.exporting.lineage import lineage
from tests.cards.conftest import change, derive, write_json


def test_unknown_licence_is_asked_for(export: Path, run: Path):
    with pytest.raises(ValueError, match="--license NAME"):
        terms(read_records(export, run), CardOptions())


def test_licence_has_to_be_one_of_the_hub(export: Path):
    with pytest.raises(ValueError, match="'Apache 2'"):
        terms(read_records(export), CardOptions(license="Apache 2"))


def test_other_needs_a_name_and_a_text(export: Path):
    with pytest.raises(ValueError, match="--license-name"):
        terms(read_records(export), CardOptions(license="other"))
    told = CardOptions(license="other", license_name="mine", license_link="https://example.org/l")
    assert terms(read_records(export), told).license == "other"
    with pytest.raises(ValueError, match="license_name='My Licence' is not of lower-case"):
        terms(read_records(export), replace(told, license_name="My Licence"))


@pytest.mark.parametrize(
    "init_from",
    [
        "facebook/vit-mae-base",
        "hf-hub:timm/vit_base_patch16_224.mae",
        "vit_large_patch16_224.mae",
        "weights/mae_pretrain_vit_huge.pth",
    ],
)
def test_weights_that_derive_from_the_official_ones_stay_non_commercial(export: Path, run: Path, init_from: str):
    derive(export, run, init_from)
    records = read_records(export, run)
    assert terms(records, CardOptions()).license == "cc-by-nc-4.0"
    assert terms(records, CardOptions(license="cc-by-nc-sa-4.0")).license == "cc-by-nc-sa-4.0"
    with pytest.raises(ValueError, match="non-commercial terms stay"):
        terms(records, CardOptions(license="apache-2.0"))


def test_non_commercial_terms_pass_through_a_run_in_between(export: Path, run: Path, tmp_path: Path):
    first = tmp_path / "first"
    write_json(first / "recipe.json", {"name": "pre", "init_from": str(tmp_path / "converted")})
    write_json(tmp_path / "converted" / "conversion.json", {"license": "cc-by-nc-4.0"})
    derive(export, run, str(first))
    records = read_records(export, run)
    assert [a.name for a in records.ancestors] == ["first", "converted"]
    with pytest.raises(ValueError, match="non-commercial"):
        terms(records, CardOptions(license="mit"))


def test_converted_weights_keep_their_licence(export: Path):
    write_json(export / "conversion.json", {"source": "x.pth", "license": "cc-by-nc-4.0"})
    assert terms(read_records(export), CardOptions()).license == "cc-by-nc-4.0"


def test_base_model_named_by_the_author_binds_as_well(export: Path):
    with pytest.raises(ValueError, match="non-commercial"):
        terms(read_records(export), CardOptions(license="mit", base_model="facebook/vit-mae-large"))


def test_derivatives_of_unknown_terms_are_refused(export: Path, run: Path):
    derive(export, run, "someone/encoder")
    records = read_records(export, run)
    for said in (None, "apache-2.0"):  # the licence of the new weights says nothing of the old ones
        with pytest.raises(
            ValueError, match=r"encoder, which is not there, or could not be asked, .*--base-license NAME"
        ):
            terms(records, CardOptions(license=said))
    assert terms(records, CardOptions(license="mit", base_license="apache-2.0")).license == "mit"
    with pytest.raises(ValueError, match="non-commercial terms stay"):
        terms(records, CardOptions(license="mit", base_license="cc-by-nc-4.0"))


def test_base_model_is_what_came_from_the_hub_on_record(export: Path, run: Path):
    derive(export, run, "models/mae_b")  # a path of another folder, or a repository: nobody knows
    assert base_model(read_records(export, run), "org/animals", CardOptions()) is None
    link = {"name": "someone/encoder", "kind": "hub", "license": "mit", "source": "its card", "revision": "b" * 40}
    _record_start(export, run, [link])
    assert base_model(read_records(export, run), "org/animals", CardOptions()) == "someone/encoder"
    _record_start(export, run, [link | {"kind": "missing"}])
    assert base_model(read_records(export, run), "org/animals", CardOptions()) is None


def test_repository_is_not_its_own_base(export: Path, run: Path):
    link = {"name": "org/animals", "kind": "hub", "license": "mit", "source": "its card", "revision": "b" * 40}
    _record_start(export, run, [link])
    records = read_records(export, run)
    again = metadata(records, "org/animals", CardOptions(), [], []).to_dict()
    assert "base_model" not in again
    assert "base_model_relation" not in again
    assert metadata(records, "org/others", CardOptions(), [], []).to_dict()["base_model"] == "org/animals"


def test_licence_on_record_outlives_the_folder(export: Path, run: Path):
    derive(export, run, "/gone/encoder")
    link = {"name": "encoder", "kind": "conversion", "license": "cc-by-nc-4.0", "source": "its conversion.json"}
    _record_start(export, run, [link])
    with pytest.raises(ValueError, match="non-commercial"):
        terms(read_records(export, run), CardOptions(license="mit", base_license="mit"))


def test_lineage_of_the_export_binds_without_its_run(export: Path):
    link = {"name": "moved", "kind": "conversion", "license": "cc-by-nc-4.0", "source": "its conversion.json"}
    change(export / "export.json", lineage=[{"name": "pre", "kind": "run", "license": None, "source": ""}, link])
    records = read_records(export)
    assert terms(records, CardOptions()).license == "cc-by-nc-4.0"
    with pytest.raises(ValueError, match=r"moved: its conversion\.json"):
        terms(records, CardOptions(license="apache-2.0"))


@pytest.mark.parametrize(
    "name",
    [
        "convnextv2_base.fcmae_ft_in1k",
        "timm/convnextv2_base.fcmae_ft_in1k",
        "hf-hub:timm/convnextv2_base.fcmae_ft_in1k",
    ],
)
def test_record_of_timm_binds_under_every_spelling(export: Path, run: Path, name: str):
    derive(export, run, name)
    with pytest.raises(ValueError, match="timm's record"):
        terms(read_records(export, run), CardOptions(license="apache-2.0"))


def _record_start(export: Path, run: Path, links: list[dict]) -> None:
    starts = json.loads((run / "environment.json").read_text())["starts"]
    write_json(run / "environment.json", {"starts": [s | {"lineage": links} for s in starts]})
    change(export / "export.json", lineage=lineage(run))


@pytest.mark.parametrize(("name", "tag"), [("ViTMAEForPreTraining", None), ("ViTModel", "image-feature-extraction")])
def test_masking_models_have_no_task(export: Path, name: str, tag: str | None):
    change(export / "export.json", **{"class": name}, task="image-feature-extraction")
    assert pipeline_tag(read_records(export)) == tag
