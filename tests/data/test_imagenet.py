"""Which folder, name or file of the ImageNet test sets means which class."""

from __future__ import annotations

import pytest

from hf_mae.data.imagenet import (
    ALEXNET_ERRORS,
    NUM_CLASSES,
    a_classes,
    class_of,
    classes_of,
    mce,
    r_classes,
    real_key,
    real_labels,
    severities,
)
from hf_mae.data.imagenet import _synsets as synsets
from hf_mae.data.imagenet import _words as words
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import Data
from tests.data.samples import picture


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("n01440764", 0),
        ("N01440764", 0),
        ("n15075141", 999),
        ("0", 0),
        ("999", 999),
        ("10", 10),
        ("tench, Tinca tinca", 0),
        ("tench", 0),
        ("great_white_shark", 2),
        ("Tinca tinca", 0),
        ("maillot", 638),  # the whole entry of 638, and one word of 639
        ("maillot, tank suit", 639),
        ("crane2", 517),
        ("giant panda", 388),
    ],
)
def test_a_name_means_its_class(name, number):
    assert class_of(name) == number


def test_every_class_is_found_by_its_id_and_number_and_all_but_the_cranes_by_their_words():
    assert [class_of(synset) for synset in synsets()] == list(range(NUM_CLASSES))
    assert [class_of(str(i)) for i in range(NUM_CLASSES)] == list(range(NUM_CLASSES))
    open_ones = []
    for i, text in enumerate(words()):
        try:
            assert class_of(text) == i
        except ValueError:
            open_ones.append(i)
    assert open_ones == [134, 517]


@pytest.mark.parametrize("name", ["1000", "-1", "n00000001", "no such thing", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"class name '.*' is none of ImageNet's; use WordNet ids"):
        class_of(name)


def test_open_names_list_what_they_may_mean():
    with pytest.raises(ValueError, match=r"'crane' may mean 134 \(n02012849, crane\) or 517 \(n03126707, crane\); use"):
        class_of("crane")
    with pytest.raises(ValueError, match=r"'panda' may mean 387 .* or 388"):
        class_of("panda")


def test_folders_of_v2_sort_as_text_and_are_numbers_all_the_same(tmp_path):
    for i in (0, 2, 10, 100):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.jpeg").write_bytes(picture(1))
    names = open_source(Data(path=str(tmp_path))).label_names
    assert names == ["0", "10", "100", "2"]
    assert [class_of(name) for name in names] == [0, 10, 100, 2]
    everything = sorted(map(str, range(NUM_CLASSES)))
    assert classes_of(everything) == [int(name) for name in everything]
    assert classes_of(everything)[:4] == [0, 1, 10, 100]


def test_numbers_for_a_part_of_the_classes_are_refused():
    with pytest.raises(
        ValueError, match=r"the 200 classes are called 0, 1, 2 \.\.\., which may be ImageNet's numbers or"
    ):
        classes_of([str(i) for i in range(200)])


def test_a_thousand_names_in_order_settle_the_cranes():
    assert classes_of(words()) == list(range(NUM_CLASSES))
    hub = list(words())
    hub[517] = "crane2"  # as the data set on the Hub has it
    assert classes_of(hub) == list(range(NUM_CLASSES))
    hub[0], hub[1] = hub[1], hub[0]
    with pytest.raises(ValueError, match="'crane' may mean"):
        classes_of(hub)


def test_the_classes_of_a_part_are_found_and_must_differ():
    assert classes_of(["n01443537", "tench"]) == [1, 0]
    with pytest.raises(ValueError, match=r"'tench' and 'n01440764' both mean class 0 of ImageNet"):
        classes_of(["goldfish", "tench", "n01440764"])


def test_a_and_r_have_two_hundred_classes_each_and_their_folders_are_these():
    from importlib.resources import files

    info = files("timm") / "data" / "_info"
    for found, name in ((a_classes(), "a"), (r_classes(), "r")):
        assert len(set(found)) == 200
        assert found == classes_of((info / f"imagenet_{name}_synsets.txt").read_text().split())
    assert a_classes()[:3] == [6, 11, 13]
    assert r_classes()[:3] == [1, 2, 4]


def test_real_labels_are_sets_by_file_name():
    labels = real_labels()
    assert len(labels) == 50_000
    assert labels["ILSVRC2012_val_00000001"] == []
    assert labels["ILSVRC2012_val_00000002"] == [970, 795]
    assert sum(not found for found in labels.values()) == 3163  # 46,837 images are left to judge by, as in the paper
    assert {i for found in labels.values() for i in found} <= set(range(NUM_CLASSES))


@pytest.mark.parametrize(
    "name",
    [
        "ILSVRC2012_val_00000002.JPEG",
        "val/n02/ILSVRC2012_val_00000002.jpg",
        "ILSVRC2012_val_00000002_n09193705.JPEG",
        "ILSVRC2012_val_00000002",
    ],
)
def test_the_key_is_found_in_file_names_of_all_archives(name):
    assert real_labels()[real_key(name)] == [970, 795]


@pytest.mark.parametrize("name", ["", "2.jpg", "ILSVRC2012_val_00050001.JPEG", "ILSVRC2012_test_00000002.JPEG"])
def test_other_file_names_have_no_real_labels(name):
    with pytest.raises(ValueError, match="is not of the form ILSVRC2012_val_00000001"):
        real_key(name)


# ------------------------------------------------------------------------------------------------ corruptions


def make(root, corruptions, levels=range(1, 6)):
    for corruption in corruptions:
        for level in levels:
            (root / corruption / str(level)).mkdir(parents=True)


def test_severities_are_found_with_and_without_groups(tmp_path):
    make(tmp_path / "flat", ALEXNET_ERRORS)
    flat = severities(tmp_path / "flat")
    assert list(flat) == list(ALEXNET_ERRORS)
    assert flat["fog"] == [tmp_path / "flat/fog" / str(i) for i in range(1, 6)]
    make(tmp_path / "grouped", [f"group{i % 4}/{name}" for i, name in enumerate(ALEXNET_ERRORS)])
    make(tmp_path / "grouped", ["extra/saturate"])
    grouped = severities(tmp_path / "grouped")
    assert set(grouped) == set(ALEXNET_ERRORS)
    assert grouped["shot_noise"][4] == tmp_path / "grouped/group1/shot_noise/5"


def test_missing_folders_are_listed(tmp_path):
    make(tmp_path, [name for name in ALEXNET_ERRORS if name != "fog"])
    (tmp_path / "snow/3").rmdir()
    with pytest.raises(
        ValueError, match=r"lacks 6 of the 75 folders of ImageNet-C: snow/3, fog/1, fog/2, .* unpack all"
    ):
        severities(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        severities(tmp_path / "nowhere")


def test_alexnet_itself_has_an_mce_of_one_and_halving_every_error_halves_it():
    assert mce(ALEXNET_ERRORS) == pytest.approx(1.0, abs=1e-12)
    assert mce({name: error / 2 for name, error in ALEXNET_ERRORS.items()}) == pytest.approx(0.5, abs=1e-12)
    assert len(ALEXNET_ERRORS) == 15
    # The multiples are averaged, not the errors: one perfect corruption takes a fifteenth, however hard it was.
    for name in ("brightness", "impulse_noise"):
        assert mce({**ALEXNET_ERRORS, name: 0.0}) == pytest.approx(14 / 15)


def test_mce_needs_all_corruptions_and_fractions():
    with pytest.raises(ValueError, match="missing or unknown: fog, fogg"):
        mce({("fogg" if name == "fog" else name): error for name, error in ALEXNET_ERRORS.items()})
    with pytest.raises(ValueError, match=r"errors\['fog'\]=81\.9 must lie in \[0, 1\]; divide per cent"):
        mce({**ALEXNET_ERRORS, "fog": 81.9})
