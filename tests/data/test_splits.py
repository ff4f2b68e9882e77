"""Parts of one split: made by rules and files, without a row lost, shared or moved."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_mae.data.formats import UNREADABLE
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order
from hf_mae.data.sources import list_splits, open_source
from hf_mae.data.splits import (
    Rule,
    Splits,
    Subset,
    check_splits,
    make_splits,
    parse_rule,
    read_splits,
    split_source,
    write_splits,
)
from hf_mae.data.whole import WholeSplit
from hf_mae.recipes.base import Augment, Data

from .samples import FakeSource, rows_of, write_folder, write_parquet, write_tar

# ------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("stratified:80/10/10@3334", Rule("stratified", (80, 10, 10), 3334)),
        ("random:95/5", Rule("random", (95, 5))),
        ("random:99.5/0.5@7", Rule("random", (99.5, 0.5), 7)),
        ("splits.json", None),
        ("runs/birds/splits.json", None),
    ],
)
def test_rules_are_read_and_other_texts_name_files(text, rule):
    assert parse_rule(text) == rule
    if rule is not None:
        assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stratifed:80/20", "stratifed is neither stratified nor random; rules are such as stratified:80/10/10@3334"),
        ("random:80/10", "the parts must be above 0 and sum to 100, not 90"),
        ("random:100/0", "must be above 0"),
        ("random:100", r"has 1 part\(s\), and two or three"),
        ("random:70/10/10/10", r"has 4 part\(s\)"),
        ("random:80//20", "80//20 are not numbers"),
        ("random:80/20@", "neither a rule nor a file"),
        ("Random:80/20", "neither a rule nor a file"),
        ("random:80/20@4294967296", "the seed must lie in 0"),
    ],
)
def test_texts_that_are_nearly_rules_are_refused_with_examples(text, message):
    with pytest.raises(ValueError, match=r"^data\.splits=.*" + message):
        parse_rule(text)


def test_the_bird_split_is_the_golden_one(goldens):
    golden = json.loads((goldens / "bird_split.json").read_text())
    splits = make_splits(Rule("random", (95, 5), golden["seed"]), None, golden["n"])
    validation = splits.parts["validation"].tolist()
    assert [len(splits.parts["train"]), len(validation)] == [golden["train"], golden["val"]]
    assert validation[:10] == golden["val_first10"]
    assert hashlib.sha256(",".join(map(str, validation)).encode()).hexdigest() == golden["val_sha256"]


@pytest.mark.parametrize("percent", [(95, 5), (80, 10, 10), (50, 30, 20)])
def test_random_parts_are_those_of_random_split(percent):
    n = 237
    splits = make_splits(Rule("random", percent, 5), None, n)
    sizes = [len(rows) for rows in splits.parts.values()]
    assert sizes[:-1] == [n * p // 100 for p in percent[:-1]]
    theirs = torch.utils.data.random_split(range(n), sizes, torch.Generator().manual_seed(5))
    assert [rows.tolist() for rows in splits.parts.values()] == [list(part.indices) for part in theirs]


def test_no_global_generator_is_touched():
    before = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    for kind in ("random", "stratified"):
        make_splits(Rule(kind, (80, 20), 5), np.arange(60) % 3, 60)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tobytes() == before[1]


@pytest.mark.parametrize("percent", [(80, 20), (80, 10, 10), (50, 30, 20)])
def test_stratified_parts_have_their_share_of_every_class(percent):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [100, 60, 40, 20, 30]))
    rule = Rule("stratified", percent, 3334)
    splits = make_splits(rule, labels, 250)
    assert sorted(np.concatenate(list(splits.parts.values()))) == list(range(250))
    for rows, share in zip(splits.parts.values(), percent, strict=True):
        assert len(rows) == 250 * share / 100
        counts = np.bincount(labels[rows], minlength=5)
        assert np.abs(counts - np.array([100, 60, 40, 20, 30]) * share / 100).max() <= 1
    again, other = make_splits(rule, labels, 250), make_splits(replace(rule, seed=1), labels, 250)
    assert all(np.array_equal(again.parts[name], splits.parts[name]) for name in splits.parts)
    assert not np.array_equal(other.parts["train"], splits.parts["train"])


def test_rows_that_cannot_be_read_go_to_train():
    labels = np.arange(60) % 3
    labels[10:16] = UNREADABLE
    splits = make_splits(Rule("stratified", (80, 10, 10)), labels, 60)
    assert set(range(10, 16)) <= set(splits.parts["train"].tolist())
    assert [len(rows) for rows in splits.parts.values()] == [48, 6, 6]


@pytest.mark.parametrize(
    ("percent", "labels", "message"),
    [
        ((80, 10, 10), [0] * 50 + [1] * 48 + [2] * 2, r"1 of 3 classes have fewer than 3 images.*: 'c' \(2\)"),
        ((95, 5), [0, 1, 2] * 10, "validation would have 2 of 30 rows, and 3 classes need one each"),
        ((80, 20), [-1, *[0, 1] * 20], "1 of the 41 rows of birds have no label"),
        ((10, 10, 80), [0] * 47 + [1] * 3, "class 'b' has a single row left for the parts before validation"),
    ],
)
def test_too_few_rows_of_a_class_are_named(percent, labels, message):
    with pytest.raises(ValueError, match=message):
        make_splits(Rule("stratified", percent), np.array(labels), len(labels), names=["a", "b", "c"], where="birds")


def test_empty_parts_are_refused():
    with pytest.raises(ValueError, match=r"data\.splits='random:5/95@0' leaves train none of the 10 rows; give it"):
        make_splits(Rule("random", (5, 95)), None, 10)


# ------------------------------------------------------------------------------------------------ a part


SIZES = [40, 7, 1, 23, 60]


def test_a_subset_is_its_rows_of_the_source_in_order():
    rows = np.random.default_rng(1).permutation(131)[:50]
    rows = rows[(rows < 40) | (rows > 47)]  # no row of two chunks
    base = FakeSource(SIZES)
    part = Subset(base, rows)
    expected, wanted = rows_of(base), sorted(rows.tolist())
    assert rows_of(part) == [expected[row] for row in wanted]
    assert len(part.sizes) == 3
    assert part.sizes.min() > 0
    chunks = np.repeat(np.arange(len(part.sizes)), part.sizes)
    inside = np.concatenate([np.arange(n) for n in part.sizes])
    starts = np.cumsum(SIZES) - SIZES
    found = [part.describe(int(c), int(r)) for c, r in zip(chunks, inside, strict=True)]
    assert [starts[int(shard[5:])] + row for shard, row in found] == wanted


def test_what_a_subset_promises_of_its_source(tmp_path):
    write_folder(tmp_path / "folder", range(30))
    write_parquet(tmp_path / "parquet/train-0.parquet", range(30), groups=7)
    write_tar(tmp_path / "tar/train-0.tar", range(40))
    for kind in ("folder", "parquet", "tar"):
        base = open_source(Data(path=str(tmp_path / kind)))
        rows = np.array([3, 5, 6, 20, 29])
        part, other = Subset(base, rows), Subset(base, rows[:4])
        assert np.array_equal(part.all_labels(), base.all_labels()[rows])
        read = [part.read(c).labels for c in range(len(part.sizes))]
        assert np.array_equal(np.concatenate(read), base.all_labels()[rows])
        for c in range(len(part.sizes)):
            assert np.array_equal(part.labels(c), read[c])
        names = [name for c in range(len(base.sizes)) for name in base.names(c) or ["?"] * base.sizes[c]]
        found = [name for c in range(len(part.sizes)) for name in part.names(c) or ["?"] * part.sizes[c]]
        assert found == [names[row] for row in rows]
        assert (part.has_labels, part.label_names, part.schema) == (base.has_labels, base.label_names, base.schema)
        assert len({part.fingerprint, other.fingerprint, base.fingerprint}) == 3
        assert Subset(base, rows[::-1]).fingerprint == part.fingerprint
        assert "5 of " in part.summary()


def test_damaged_chunks_stay_bad_rows_with_their_reason():
    part = Subset(FakeSource(SIZES, broken=[0]), np.array([2, 39, 41]))
    data = part.read(0)
    assert (data.images, data.error) == ([None, None], "damaged chunk")
    assert part.describe(0, 1) == ("shard0", 39)


def test_training_on_one_part_and_testing_on_another_sees_each_row_once(tmp_path):
    write_folder(tmp_path, range(60))
    data = Data(path=str(tmp_path), splits="stratified:80/10/10@3")
    train = open_source(data)
    order = Order(train.sizes, 0, 4, 2)
    with Loader(
        train, order, augment=Augment(), image_size=(8, 8), channels=3, global_batch=12, stop=4, num_workers=1
    ) as loader:
        seen = [int(p) for batch in loader for p in batch.positions]
    assert sorted(seen) == list(range(48))
    for name in ("validation", "test"):
        whole = WholeSplit(open_source(data, name), image_size=(8, 8), channels=3, batch=4, names=True)
        first, second = ([b["pixel_values"] for b in whole] for _ in range(2))
        assert sum(len(x) for x in first) == 6
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # nothing random reaches it


# ------------------------------------------------------------------------------------------------ opening


def numbers(source) -> list[int]:
    """Rows of a folder of `write_folder`, by the names of its files."""
    return [int(re.findall(r"(\d+)\.", source.names(c)[0])[0]) for c in range(len(source.sizes))]


def test_parts_of_a_folder_share_nothing_and_lose_nothing(tmp_path):
    write_folder(tmp_path, range(60))
    data = Data(path=str(tmp_path), splits="stratified:80/10/10@3334")
    assert list_splits(data) == ["train", "validation", "test"]
    parts = {name: open_source(data, name) for name in list_splits(data)}
    assert sorted(n for source in parts.values() for n in numbers(source)) == list(range(60))
    assert numbers(open_source(data)) == numbers(parts["train"])
    assert numbers(open_source(data, "val")) == numbers(parts["validation"])
    assert numbers(open_source(replace(data, split="test"))) == numbers(parts["test"])
    assert len({source.where for source in parts.values()}) == 3
    assert all(np.bincount(source.all_labels()).tolist() == [2, 2, 2] for source in list(parts.values())[1:])


def test_other_splits_of_the_data_keep_their_names(tmp_path):
    for name, rows in (("train", range(60)), ("val", range(60, 70)), ("test", range(70, 75))):
        write_folder(tmp_path / name, rows)
    data = Data(path=str(tmp_path), splits="random:90/10@1")
    assert list_splits(data) == ["train", "validation", "test"]
    train, validation, test = (open_source(data, name) for name in list_splits(data))
    assert sorted(numbers(train) + numbers(validation)) == list(range(60))
    assert sorted(numbers(test)) == list(range(70, 75))
    assert "its own split(s) validation are not used" in train.summary()
    with pytest.raises(ValueError, match=r"evals\.split='dev2' is not a split of .* makes train, validation of .*test"):
        open_source(data, "dev2", field="evals.split")


def test_what_was_divided_is_no_split_to_test_on(tmp_path):
    for name in ("one", "two"):
        write_folder(tmp_path / name / ("" if name == "one" else "test"), range(30))
        data = Data(path=str(tmp_path / name), splits="random:90/10")
        assert list_splits(data) == ["train", "validation"]
        with pytest.raises(ValueError, match=r"evals\.split='test' is not a split of .*three parts"):
            open_source(data, "test", field="evals.split")


def test_labels_are_needed_for_strata_only(tmp_path):
    write_folder(tmp_path, range(30))
    data = Data(path=str(tmp_path), label_column="none")
    with pytest.raises(ValueError, match=r"'stratified:80/20@0' needs labels, and .*--data\.splits random:80/20@0"):
        open_source(replace(data, splits="stratified:80/20"))
    assert len(open_source(replace(data, splits="random:80/20")).sizes) == 24

    source = FakeSource(SIZES)  # which cannot tell its labels without reading the images
    with pytest.raises(ValueError, match=r"asking the server for each; add --data\.no-streaming"):
        split_source(source, Rule("stratified", (80, 20)))


def test_labels_are_looked_through_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", range(45))
    data, counted = Data(path=str(tmp_path), splits="stratified:80/20@77"), []
    source = open_source(replace(data, splits=None))
    all_labels = type(source).all_labels
    monkeypatch.setattr(type(source), "all_labels", lambda self: counted.append(1) or all_labels(self))
    for name in (None, "train", "validation"):
        open_source(data, name)
    assert len(counted) == 1


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "data", range(60))
    return tmp_path


def test_a_file_gives_the_parts_that_its_rule_gave(folder):
    data = Data(path=str(folder / "data"))
    splits = split_source(open_source(data), Rule("stratified", (80, 10, 10), 9))
    write_splits(folder / "deep/splits.json", splits)
    read = read_splits(folder / "deep/splits.json")
    assert (read.rule, read.of) == ("stratified:80/10/10@9", splits.of)
    assert list(read.parts) == ["train", "validation", "test"]
    for name in read.parts:
        assert np.array_equal(read.parts[name], splits.parts[name])
        by_file = open_source(replace(data, splits=str(folder / "deep/splits.json")), name)
        by_rule = open_source(replace(data, splits="stratified:80/10/10@9"), name)
        assert (by_file.fingerprint, numbers(by_file)) == (by_rule.fingerprint, numbers(by_rule))
    assert [path.name for path in (folder / "deep").iterdir()] == ["splits.json"]


def test_lists_for_other_data_are_refused(folder):
    data = Data(path=str(folder / "data"), splits=str(folder / "splits.json"))
    source = open_source(replace(data, splits=None))
    write_splits(folder / "splits.json", split_source(source, Rule("random", (80, 20))))
    open_source(data)
    write_folder(folder / "data", range(60, 61))
    now = open_source(replace(data, splits=None)).fingerprint
    why = "divides the rows as they are now: by their number and order and"
    with pytest.raises(ValueError, match=f"with fingerprint '{source.fingerprint}', and .* has '{now}'.*{why}"):
        open_source(data)
    with pytest.raises(ValueError, match=r"with rows 5, and .* has 131"):
        check_splits(
            Splits({}, "", {"rows": 5, "fingerprint": FakeSource(SIZES).fingerprint}), FakeSource(SIZES), "splits.json"
        )


def test_a_file_divides_the_split_that_it_names(tmp_path):
    for name, rows in (("train", range(30)), ("test", range(30, 60))):
        write_folder(tmp_path / "data" / name, rows)
    data, file = Data(path=str(tmp_path / "data")), tmp_path / "splits.json"
    splits = split_source(open_source(data, "test"), Rule("random", (50, 50), 1), split="test")
    write_splits(file, splits)
    divided = replace(data, splits=str(file))
    assert list_splits(divided) == ["train", "validation"]
    train, validation = (open_source(divided, name) for name in list_splits(divided))
    assert sorted(numbers(train) + numbers(validation)) == list(range(30, 60))
    assert "its own split(s) train are not used" in train.summary()
    with pytest.raises(ValueError, match=r"evals\.split='test' is not a split of .* makes train, validation of .*test"):
        open_source(divided, "test", field="evals.split")
    write_splits(file, replace(splits, of=splits.of | {"split": "holdout"}), overwrite=True)
    with pytest.raises(ValueError, match=r"divides the split 'holdout', and .* has train, test; write it anew"):
        open_source(divided)


def test_a_file_is_replaced_only_if_wished(folder):
    source, file = open_source(Data(path=str(folder / "data"))), folder / "splits.json"
    first, second = (split_source(source, Rule("random", (80, 20), seed)) for seed in (1, 2))
    write_splits(file, first)
    before = file.read_bytes()
    write_splits(file, first)
    with pytest.raises(ValueError, match=r"splits\.json' exists and holds something else, .*--overwrite"):
        write_splits(file, second)
    assert file.read_bytes() == before
    write_splits(file, second, overwrite=True)
    assert file.read_bytes() != before
    with pytest.raises(ValueError, match="is a folder; name a file"):
        write_splits(folder, second)


def test_the_other_parts_are_in_the_fingerprint_of_a_part(folder):
    """Else a run could go on with the same training rows and be judged on others."""
    data = Data(path=str(folder / "data"))
    base = open_source(data)

    def fingerprints(*parts) -> str:
        named = {name: np.array(rows) for name, rows in zip(("train", "validation", "test"), parts, strict=False)}
        write_splits(folder / "s.json", Splits(named, "by hand", {"split": "train", **facts}), overwrite=True)
        return open_source(replace(data, splits=str(folder / "s.json"))).fingerprint

    facts = {"fingerprint": base.fingerprint, "rows": 60}
    train, a, b = range(40), range(40, 50), range(50, 60)
    assert len({fingerprints(train, a, b), fingerprints(train, b, a), fingerprints(train, a), fingerprints(train)}) == 4
    assert fingerprints(train, [*a, *b]) == Subset(base, np.arange(40)).fingerprint  # all the rest: known from the rows


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": [0, 1, 2], "validation": [5, 2]}, r"names row 2 twice \(in train and validation\)"),
        ({"train": [0, 1, 1]}, r"names row 1 twice \(in train\)"),
        ({"train": [0, 10]}, "names row 10, and the data has rows 0 to 9"),
        ({"train": [0, -1]}, "names row -1"),
        ({"train": [0], "holdout": [1]}, r"has the part\(s\) holdout; parts are called train, validation, test"),
        ({"train": [0], "test": []}, "the part test has no rows"),
        ({"test": [0]}, "the part train has no rows"),
        ({"train": [0.5]}, "is not of the form"),
        ([0, 1], "is not of the form"),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path, parts, message):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"rule": "x", "of": {"split": "train", "fingerprint": "y", "rows": 10}, "parts": parts}))
    with pytest.raises(ValueError, match=r"^data\.splits=.*" + message):
        read_splits(path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json' is neither a rule nor a file"):
        open_source(Data(path="digits", splits=str(tmp_path / "none.json")))
    (tmp_path / "half.json").write_text('{"rule": "x"')
    with pytest.raises(ValueError, match=r"half\.json' cannot be read as JSON"):
        read_splits(tmp_path / "half.json")


def test_real_birds_divide_by_class(shared):
    data = Data(path=str(shared / "data/birds"), splits="stratified:80/10/10@3334")
    parts = [open_source(data, name) for name in ("train", "validation", "test")]
    counts = [np.bincount(part.all_labels(), minlength=72) for part in parts]
    whole = np.bincount(open_source(replace(data, splits=None)).all_labels(), minlength=72)
    assert np.array_equal(sum(counts), whole)
    for part, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert np.abs(part - share * whole).max() <= 2
