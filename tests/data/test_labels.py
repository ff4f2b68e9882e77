"""Labels: everything that is wrong with them is said before training, with a remedy that works."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_mae.data.formats import UNREADABLE, Chunk, Source
from hf_mae.data.labels import Classes, align, check_labels
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import Data
from tests.data.samples import picture, write_folder, write_parquet, write_tar


def write_table(path: Path, labels, *, column: str = "label", kind=None) -> None:
    """Parquet of five pictures in turn, with a plain label column."""
    images = [{"bytes": picture(i % 5), "path": f"{i}.jpg"} for i in range(len(labels))]
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    table = pa.table({"image": images}, schema=schema).append_column(column, pa.array(labels, type=kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)


def check(path: Path, test: str | None = None, **options) -> Classes:
    data = Data(path=str(path), **options)
    return check_labels(open_source(data), open_source(data, test) if test else None, data)


class Labelled(Source):
    """Labels in memory, without pictures; `hidden` ones cost more than the label column."""

    kind, notes, has_labels = "lists", [], True

    def __init__(self, labels, names=None, *, where: str = "somewhere", hidden: bool = False) -> None:
        self.sizes = np.ones(len(labels), dtype=np.int64)
        self._labels, self._hidden = np.asarray(labels, dtype=np.int64), hidden
        self.label_names, self.where = names, where

    def read(self, chunk: int) -> Chunk:
        raise AssertionError("a label check reads no image")

    def labels(self, chunk: int):
        return None if self._hidden else self._labels[chunk : chunk + 1]

    def describe(self, chunk: int, row: int) -> tuple[str, int]:
        return "list", chunk + row


# ------------------------------------------------------------------------------------------------ good labels


def test_names_come_from_folders_and_from_class_labels(tmp_path):
    write_folder(tmp_path / "a/train", range(6))
    write_folder(tmp_path / "a/test", range(6))
    assert check(tmp_path / "a", "test") == Classes(("class0", "class1", "class2"))
    write_parquet(tmp_path / "b/train.parquet", range(6))
    assert check(tmp_path / "b") == Classes(("a", "b", "c"))


def test_numbers_without_names_are_named_by_themselves(tmp_path):
    write_table(tmp_path / "train.parquet", [0, 3, 1, 2])
    assert check(tmp_path) == Classes(("0", "1", "2", "3"))
    write_tar(tmp_path / "t/train.tar", range(6))
    assert check(tmp_path / "t") == Classes(("0", "1", "2"))
    assert check_labels(open_source(Data(path="digits")), None, Data()).names == tuple("0123456789")


def test_absent_classes_are_notes_and_tested_ones_among_them_warnings():
    train, test = Labelled([0, 2], ["a", "b", "c", "d"]), Labelled([0, 1, 1], ["a", "b", "c", "d"])
    notes = check_labels(train, test, Data()).notes
    assert notes == (
        "2 of 4 classes never occur in training: b, d",
        "warning: 2 of 3 test images are of 1 class(es) that training never sees, and will be answered wrongly: b",
    )


def test_a_test_split_of_other_classes_alone_is_refused(tmp_path):
    write_folder(tmp_path / "train", [0, 1, 3, 4])
    write_folder(tmp_path / "test", [1, 2, 5])  # class1 once, class2 twice
    assert check(tmp_path, "test").notes[1].startswith("warning: 2 of 3 test images are of 1 class(es) that training")
    shutil.rmtree(tmp_path / "test/class1")
    message = (
        r"test.*: none of its 1 classes \(class2\) has an image in .*train.* --evals\.split, or .* --data\.splits str"
    )
    with pytest.raises(ValueError, match=message):
        check(tmp_path, "test")


def test_labels_that_are_dear_to_read_are_left_to_the_loader_if_named():
    classes = check_labels(Labelled([0, 9], ["a", "b"], hidden=True), None, Data())
    assert classes.names == ("a", "b")
    assert "each batch is checked" in classes.notes[0]
    with pytest.raises(ValueError, match=r"no names, and counting .* add --data.no-streaming"):
        check_labels(Labelled([0, 1], hidden=True), None, Data())


def test_unreadable_rows_are_no_missing_labels():
    source = Labelled([0, 1, 1])
    source.labels = lambda chunk: None if chunk == 1 else np.array([chunk])  # type: ignore[method-assign]
    assert source.all_labels().tolist() == [0, UNREADABLE, 2]
    assert check_labels(source, None, Data()).names == ("0", "1", "2")


@pytest.mark.parametrize("kind", ["parquet", "tar", "json", "folder", "arrow", "digits"])
def test_all_labels_are_those_that_reading_the_rows_gives(tmp_path, kind):
    if kind == "parquet":
        write_parquet(tmp_path / "train.parquet", range(25), groups=7)
    elif kind in ("tar", "json"):
        write_tar(tmp_path / "train.tar", range(40), label="cls" if kind == "tar" else "json")
    elif kind == "folder":
        write_folder(tmp_path, range(7))
    elif kind == "arrow":
        write_parquet(tmp_path / "in/train.parquet", range(7))
        loaded = datasets.load_dataset("parquet", data_dir=str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"))
        loaded["train"].save_to_disk(str(tmp_path / "saved"))
    path = {"arrow": str(tmp_path / "saved"), "digits": "digits"}.get(kind, str(tmp_path))
    source = open_source(Data(path=path))
    read = np.concatenate([source.read(chunk).labels for chunk in range(len(source.sizes))])
    assert source.all_labels().tolist() == read.tolist()
    assert len(set(read.tolist())) >= 3


# ------------------------------------------------------------------------------------------------ no labels


def test_a_missing_label_column_lists_the_columns(tmp_path):
    write_table(tmp_path / "train.parquet", [0, 1, 0], column="kind_of_bird")
    with pytest.raises(ValueError, match=r"no labels; .*image \(image\), kind_of_bird \(int64\); .* --data.label-col"):
        check(tmp_path)
    assert check(tmp_path, label_column="kind_of_bird").names == ("0", "1")


def test_ignored_labels_are_refused(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(6))
    with pytest.raises(ValueError, match=r"data\.label_column='none' ignores the labels of .*; leave it out"):
        check(tmp_path, label_column="none")


def test_flat_folders_and_bare_tars_say_how_labels_are_given(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.jpg").write_bytes(picture(i))
    with pytest.raises(ValueError, match="put each image of every split into a folder named after its class"):
        check(flat)
    write_tar(tmp_path / "tar/train.tar", range(3), label="txt")
    with pytest.raises(ValueError, match=r"each sample needs a member NAME\.cls with an integer"):
        check(tmp_path / "tar")


@pytest.mark.parametrize("wish", [None, "label"])
@pytest.mark.parametrize(
    ("labels", "names"), [(["owl", "wren", "owl"], ("owl", "wren")), ([0.0, 1.0, 1.0], ("0", "1"))]
)
@pytest.mark.parametrize("form", ["folder", "file", "saved"])
def test_the_remedy_for_text_and_floats_works_as_it_is_printed(tmp_path, monkeypatch, wish, labels, names, form):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_table(tmp_path / "in/train.parquet", labels)
    write_table(tmp_path / "in/test.parquet", labels[:1])
    path = {"folder": tmp_path / "in", "file": tmp_path / "in/train.parquet", "saved": tmp_path / "copy"}[form]
    if form == "saved":
        datasets.load_dataset("parquet", data_dir=str(tmp_path / "in")).save_to_disk(str(path))
    with pytest.raises(ValueError, match=r"holds (string|double), not integers; convert it with") as caught:
        check(path, label_column=wish)
    snippet = re.search("`(.*)`", str(caught.value))[1]
    exec(snippet, {})
    classes = check(tmp_path / "labelled", None if form == "file" else "test", label_column=wish)
    assert classes.names == names


def test_a_test_split_without_labels_is_named():
    test = Labelled([0], where="the test split")
    test.has_labels = False
    with pytest.raises(
        ValueError, match=r"the test split: has no labels, .* name a labelled split with --evals\.split"
    ):
        check_labels(Labelled([0, 1]), test, Data())


# ------------------------------------------------------------------------------------------------ wrong numbers


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ([0, 1, 5, 7], ["a", "b"], r"2 of 4 labels are outside 0 to 1, the 2 classes it names, first 5 in list row 2"),
        ([0, -3, 1], ["a", "b"], r"1 of 3 labels are outside 0 to 1, .* first -3 in list row 1"),
        ([0, -3, 1], None, r"1 of 3 labels are negative, first -3 in list row 1; number the classes from 0"),
        ([0, 1, -1], None, r"1 of 3 rows have no label \(-1 or null\), first list row 2; leave them out: ds\.filter"),
        ([-1, -1], ["a", "b"], r"no row has a label .* name another split with --data\.split"),
        ([1, 1, 1], ["a", "b"], r"only one class \(b\); classification needs two or more"),
        ([0, 0], None, r"only one class \(0\)"),
        ([0, 0], ["a"], r"only one class \(a\)"),
        ([14_000_001, 14_000_777], None, r"2 different labels reach up to 14,000,777, so they are codes"),
    ],
)
def test_wrong_numbers_are_refused_with_the_first_place(labels, names, message):
    with pytest.raises(ValueError, match=message):
        check_labels(Labelled(labels, names), None, Data())


def test_the_place_of_a_wrong_label_is_the_file_and_the_row_in_it(tmp_path):
    write_table(tmp_path / "train-0.parquet", [0, 1, 0, 1])
    write_table(tmp_path / "train-1.parquet", [0, 1, 0, 1, None])
    with pytest.raises(ValueError, match=r"1 of 9 rows have no label \(-1 or null\), first train-1\.parquet row 4"):
        check(tmp_path)


def test_the_test_split_is_looked_through_as_well():
    train = Labelled([0, 1])
    with pytest.raises(ValueError, match=r"the test: 1 of 2 labels are outside 0 to 1, .* first 2"):
        check_labels(train, Labelled([0, 2], where="the test"), Data())
    with pytest.raises(ValueError, match=r"the test: no row has a label .* with --evals\.split"):
        check_labels(train, Labelled([-1, -1], where="the test"), Data())


# ------------------------------------------------------------------------------------------------ two splits


def test_names_in_another_order_are_refused_at_the_first_difference():
    train, test = Labelled([0, 1, 2], ["a", "b", "c"]), Labelled([0], ["a", "c", "b"], where="the test")
    with pytest.raises(
        ValueError, match=r"another order: class 1 is 'b' in the first and 'c' in the second; give both"
    ):
        check_labels(train, test, Data())


def test_names_that_differ_are_refused_with_those_that_are_in_one_split_only():
    train, test = Labelled([0, 1, 2], ["a", "b", "c"]), Labelled([0], ["a", "b"])
    message = r"class 2 is 'c' in the first and no class in the second \(only in the first: c\)"
    with pytest.raises(ValueError, match=message):
        check_labels(train, test, Data())
    with pytest.raises(ValueError, match=r"class 1 is 'b' .* 'x' .*\(only in the second: x; only in the first: b, c\)"):
        check_labels(train, Labelled([0], ["a", "x"]), Data())


def test_files_encoded_split_by_split_are_caught(tmp_path):
    """What `DatasetDict.class_encode_column` makes of a test split that lacks a class."""
    write_parquet(tmp_path / "train.parquet", range(6), names=("owl", "tit", "wren"))
    write_parquet(tmp_path / "test.parquet", range(6), names=("owl", "wren"))
    data = Data(path=str(tmp_path), label_column="label")
    train, test = (open_source(replace(data, path=str(tmp_path / f"{s}.parquet"))) for s in ("train", "test"))
    with pytest.raises(ValueError, match=r"differ: class 1 is 'tit' in the first and 'wren' in the second"):
        check_labels(train, test, data)


# ------------------------------------------------------------------------------------------------ align


def test_align_finds_classes_by_name():
    assert align(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert align(["crane", "crane"], ["crane", "crane"]) == [0, 1]


def test_align_lists_the_names_that_the_model_does_not_know():
    with pytest.raises(ValueError, match=r"does not know 2 of the 3 classes of the data: x, y; it knows a, b;"):
        align(["a", "b"], ["x", "a", "y"])
    with pytest.raises(ValueError, match=r"more than one class named a"):
        align(["a", "a", "b"], ["b", "a"])
