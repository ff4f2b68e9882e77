"""Labels from metadata tables: what `datasets`' imagefolder takes, for every way to write it down, or a refusal."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_mae.data.labels import check_labels
from hf_mae.data.order import Order
from hf_mae.data.sources import open_source
from hf_mae.data.splits import parse_rule, split_source
from hf_mae.data.stream import check_state, loader_state
from hf_mae.recipes.base import Data

from .samples import picture

ILL = ["well", "ill", "ill", "well", "ill", "well"]


def images(folder, names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, "PNG"))


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def labelled(source):
    """{file: label in words} of a source."""
    names, numbers = source.label_names, source.all_labels().tolist()
    words = [names[n] if names else n for n in numbers]
    return dict(zip((source.names(c)[0] for c in range(len(source.sizes))), words, strict=True))


@pytest.fixture
def patients(tmp_path):
    """Folders are patients; the table says what they have."""
    names = [f"patient{i % 3}/{i}.png" for i in range(6)]
    images(tmp_path / "train", names)
    return tmp_path, [{"file_name": n, "age": str(30 + i), "label": ILL[i]} for i, n in enumerate(names)]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_wins_over_the_names_of_folders(patients, ending):
    root, rows = patients
    table(root / f"train/metadata.{ending}", rows)
    source = open_source(Data(path=str(root)))
    assert labelled(source) == {row["file_name"]: row["label"] for row in rows}
    assert source.label_names == ["ill", "well"]
    assert f"train/metadata.{ending}" in source.summary()
    if ending != "csv":  # of which it leaves the file open
        theirs = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(root / ".cache"))
        assert sorted(theirs["label"]) == sorted(labelled(source).values())
    assert check_labels(source, None, Data()).names == ("ill", "well")


def test_a_table_may_lie_in_the_root_or_in_any_folder_below(patients):
    root, rows = patients
    table(root / "metadata.csv", [{**row, "file_name": f"train/{row['file_name']}"} for row in rows])
    wanted = {row["file_name"]: row["label"] for row in rows}
    assert labelled(open_source(Data(path=str(root)))) == wanted
    (root / "metadata.csv").unlink()
    for patient in range(3):
        own = [row for row in rows if row["file_name"].startswith(f"patient{patient}/")]
        short = [{**row, "file_name": "./" + row["file_name"].split("/")[1]} for row in own]
        table(root / f"train/patient{patient}/metadata.csv", short)
    assert labelled(open_source(Data(path=str(root)))) == wanted


def test_all_splits_share_one_list_of_classes(patients):
    root, rows = patients
    table(root / "train/metadata.csv", rows)
    images(root / "test", ["x.png", "y.png"])
    table(root / "test/metadata.csv", [{"file_name": "x.png", "label": "well"}, {"file_name": "y.png", "label": "a"}])
    data = Data(path=str(root))
    train, test = open_source(data), open_source(data, "test")
    assert train.label_names == test.label_names == ["a", "ill", "well"]
    assert labelled(test) == {"x.png": "well", "y.png": "a"}


def test_integers_are_class_numbers_and_other_text_is_a_class(tmp_path):
    images(tmp_path, ["007.png", "8.png", "9.png"])
    rows = [{"file_name": n, "label": v} for n, v in (("007.png", "2"), ("8.png", "0"), ("9.png", "10"))]
    table(tmp_path / "metadata.csv", rows)
    source = open_source(Data(path=str(tmp_path)))
    assert source.label_names is None
    assert labelled(source) == {"007.png": 2, "8.png": 0, "9.png": 10}
    rows[0]["label"] = "NA"  # a class, not a missing value
    table(tmp_path / "metadata.csv", rows)
    assert labelled(open_source(Data(path=str(tmp_path)))) == {"007.png": "NA", "8.png": "0", "9.png": "10"}


def test_names_of_a_class_label_in_parquet_are_kept(tmp_path):
    images(tmp_path, ["0.png", "1.png"])
    features = datasets.Features(
        {"file_name": datasets.Value("string"), "label": datasets.ClassLabel(names=["z", "a"])}
    )
    written = pa.table({"file_name": ["0.png", "1.png"], "label": [1, 0]}, schema=features.arrow_schema)
    pq.write_table(written, tmp_path / "metadata.parquet")
    assert labelled(open_source(Data(path=str(tmp_path)))) == {"0.png": "a", "1.png": "z"}


def test_the_column_that_is_asked_for_is_taken_or_refused(patients):
    root, rows = patients
    table(root / "train/metadata.csv", rows)
    by_age = open_source(Data(path=str(root), label_column="age"))
    assert labelled(by_age) == {row["file_name"]: int(row["age"]) for row in rows}
    with pytest.raises(ValueError, match=r"label_column='grade'.*age"):
        open_source(Data(path=str(root), label_column="grade"))
    ignored = open_source(Data(path=str(root), label_column="none"))
    assert not ignored.has_labels
    assert len(ignored.sizes) == 6


def test_a_table_without_a_label_does_not_bring_the_folders_back(patients):
    root, rows = patients
    table(root / "train/metadata.csv", [{"file_name": r["file_name"], "diagnosis": r["label"]} for r in rows])
    source = open_source(Data(path=str(root)))
    assert not source.has_labels
    assert len(source.sizes) == 6
    with pytest.raises(ValueError, match=r"diagnosis.*--data\.label-column"):
        check_labels(source, None, Data(path=str(root)))
    wished = open_source(Data(path=str(root), label_column="diagnosis"))
    assert wished.label_names == ["ill", "well"]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([["cat", "pet"], ["dog"]], "one label an image"),
        ([0.5, 1.5], "fractions"),
        ([{"x": 1}, {"x": 2}], "one label an image"),
        ([None, None], "empty"),
    ],
)
def test_what_is_no_class_is_for_pretraining_only(tmp_path, values, said):
    images(tmp_path, ["0.png", "1.png"])
    table(tmp_path / "metadata.jsonl", [{"file_name": f"{i}.png", "labels": v} for i, v in enumerate(values)])
    data = Data(path=str(tmp_path))
    source = open_source(data)
    assert not source.has_labels
    assert len(source.sizes) == 2
    assert said in source.summary()
    with pytest.raises(ValueError, match=said):
        check_labels(source, None, data)
    with pytest.raises(ValueError, match=r"label_column='labels'"):
        open_source(replace(data, label_column="labels"))


def test_images_without_a_row_are_left_out_and_named(tmp_path):
    images(tmp_path, [f"{i}.png" for i in range(5)])
    table(tmp_path / "metadata.csv", [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(3)])
    source = open_source(Data(path=str(tmp_path)))
    assert list(labelled(source)) == ["0.png", "1.png", "2.png"]
    assert "2 of 5 images have no row" in source.summary()
    assert "3.png" in source.summary()


def test_rows_of_missing_files_are_refused(tmp_path):
    images(tmp_path, ["0.png"])
    table(tmp_path / "metadata.csv", [{"file_name": n, "label": "a"} for n in ("0.png", "gone.png")])
    with pytest.raises(ValueError, match=r"1 of its 2 files.*gone\.png"):
        open_source(Data(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "file:///etc/x.png", "a/../../x.png", ""])
def test_a_row_does_not_lead_out_of_the_folder(tmp_path, name):
    images(tmp_path, ["data/0.png", "secret.png"])
    table(tmp_path / "data/metadata.csv", [{"file_name": n, "label": "a"} for n in ("0.png", name)])
    with pytest.raises(ValueError, match=r"row 2 of metadata\.csv"):
        open_source(Data(path=str(tmp_path / "data")))


@pytest.mark.parametrize("content", ["", "file_name\n0.png,a\n", "file_name,label,label\n0.png,a,b\n", "\xff\xfe\x00"])
def test_what_is_no_table_is_refused_by_name(tmp_path, content):
    images(tmp_path, ["0.png"])
    (tmp_path / "metadata.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.csv"):
        open_source(Data(path=str(tmp_path)))


def test_a_table_without_file_names_is_said_and_gives_no_labels(patients):
    root, rows = patients
    table(root / "train/metadata.csv", [{"image_id": r["file_name"], "label": r["label"]} for r in rows])
    source = open_source(Data(path=str(root)))
    assert not source.has_labels
    assert "file_name" in source.summary()
    with pytest.raises(ValueError, match=r"image_id.*file_name"):
        check_labels(source, None, Data(path=str(root)))


def test_two_columns_of_files_are_told_apart(tmp_path):
    images(tmp_path, ["0.png", "1.png", "0_mask.png", "1_mask.png"])
    rows = [{"photo_file_name": f"{i}.png", "mask_file_name": f"{i}_mask.png", "label": "ab"[i]} for i in range(2)]
    table(tmp_path / "metadata.csv", rows)
    assert labelled(open_source(Data(path=str(tmp_path)))) == {"0.png": "a", "1.png": "b"}
    masks = open_source(Data(path=str(tmp_path), image_column="mask"))
    assert labelled(masks) == {"0_mask.png": "a", "1_mask.png": "b"}
    with pytest.raises(ValueError, match=r"image_column='depth'"):
        open_source(Data(path=str(tmp_path), image_column="depth"))


def test_an_image_with_two_labels_is_no_class_and_one_that_is_repeated_counts_once(tmp_path):
    images(tmp_path, ["0.png", "1.png"])
    rows = [{"file_name": f"{i}.png", "label": "ab"[i]} for i in (0, 1, 1)]
    table(tmp_path / "metadata.csv", rows)
    assert labelled(open_source(Data(path=str(tmp_path)))) == {"0.png": "a", "1.png": "b"}
    table(tmp_path / "metadata.csv", [*rows, {"file_name": "1.png", "label": "a"}])
    source = open_source(Data(path=str(tmp_path)))
    assert not source.has_labels
    with pytest.raises(ValueError, match=r"1\.png has several rows"):
        check_labels(source, None, Data(path=str(tmp_path)))


def test_images_without_a_label_are_refused_for_classification(tmp_path):
    images(tmp_path, ["0.png", "1.png", "2.png"])
    table(tmp_path / "metadata.csv", [{"file_name": f"{i}.png", "label": ["a", "b", ""][i]} for i in range(3)])
    source = open_source(Data(path=str(tmp_path)))
    assert source.all_labels().tolist() == [0, 1, -1]
    with pytest.raises(ValueError, match=r"1 of 3 .*2\.png"):
        check_labels(source, None, Data(path=str(tmp_path)))


def test_a_split_without_a_row_is_without_labels(patients):
    root, rows = patients
    table(root / "train/metadata.csv", rows)
    images(root / "test", ["patient7/x.png", "patient8/y.png"])
    data = Data(path=str(root))
    test = open_source(data, "test")
    assert (test.has_labels, len(test.sizes)) == (False, 2)
    with pytest.raises(ValueError, match="no metadata table has a row"):
        check_labels(open_source(data), test, data)


def test_a_changed_label_changes_the_fingerprint_and_rules_divide_by_it(patients):
    root, rows = patients
    table(root / "train/metadata.csv", rows)
    before = open_source(Data(path=str(root)))
    parts = split_source(before, parse_rule("stratified:50/50")).parts
    assert [sorted(before.all_labels()[rows].tolist()) for rows in parts.values()] == [[0, 0, 1], [0, 1, 1]] or all(
        len(set(before.all_labels()[rows].tolist())) == 2 for rows in parts.values()
    )
    table(root / "train/metadata.csv", [*rows[:5], {**rows[5], "label": "ill"}])
    assert open_source(Data(path=str(root))).fingerprint != before.fingerprint


def test_a_run_from_before_tables_were_read_goes_on(patients):
    root, rows = patients

    def state():
        source = open_source(Data(path=str(root)))
        return loader_state(source, Order(source.sizes, 0, 1, 4), 2, "carry")

    old = state()  # as a version without tables has it
    table(root / "train/metadata.csv", rows)
    new = state()
    assert old["fingerprint"] != new["fingerprint"]
    assert check_state(old, new, 3) == 3
    table(root / "train/metadata.csv", rows[:4])
    with pytest.raises(ValueError, match="rows"):
        check_state(old, state(), 3)


def test_the_rows_of_a_table_are_read_in_the_order_of_names(patients):
    root, rows = patients
    plain = [open_source(Data(path=str(root))).describe(c, 0) for c in range(6)]
    table(root / "train/metadata.csv", rows[::-1])
    assert [open_source(Data(path=str(root))).describe(c, 0) for c in range(6)] == plain


def test_other_tables_beside_images_are_named_with_the_way_out(tmp_path):
    images(tmp_path, ["0.png", "1.png"])
    for name in ("train.csv", "val.csv"):
        table(tmp_path / name, [{"path": "0.png", "class": "a"}])
    data = Data(path=str(tmp_path))
    source = open_source(data)
    assert "train.csv, val.csv" in source.summary()
    with pytest.raises(ValueError, match=r"train\.csv.*metadata\.csv.*file_name"):
        check_labels(source, None, data)


@pytest.mark.parametrize("wish", ["label", "class"])
def test_a_label_column_without_labels_is_refused(tmp_path, wish):
    images(tmp_path, ["0.png", "1.png"])
    with pytest.raises(ValueError, match=f"label_column='{wish}'"):
        open_source(Data(path=str(tmp_path), label_column=wish))


def test_class_folders_without_images_are_named(tmp_path):
    images(tmp_path, ["train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/dog/3.png"])
    (tmp_path / "train/owl").mkdir()
    (tmp_path / "train/fox").mkdir()
    (tmp_path / "train/fox/notes.txt").write_text("later")
    data = Data(path=str(tmp_path))
    source = open_source(data)
    assert source.label_names == ["cat", "dog"]
    assert "fox, owl" in source.summary()
    assert "owl" not in open_source(data, "test").summary()


def test_a_single_class_that_is_left_says_which_folders_are_empty(tmp_path):
    images(tmp_path, ["cat/0.png", "cat/1.png"])
    (tmp_path / "dog").mkdir()
    source = open_source(Data(path=str(tmp_path)))
    with pytest.raises(ValueError, match="dog"):
        check_labels(source, None, Data(path=str(tmp_path)))


def test_labels_reach_the_batches(patients):
    root, rows = patients
    table(root / "train/metadata.csv", rows)
    source = open_source(Data(path=str(root)))
    read = np.concatenate([source.read(c).labels for c in range(6)])
    assert read.tolist() == source.all_labels().tolist() == [1, 1, 0, 0, 0, 1]
