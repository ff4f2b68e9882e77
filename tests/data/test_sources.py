"""Every format gives the same rows; paths, splits and columns are inferred, and mistakes are named."""

from __future__ import annotations

import io
import resource
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_mae.data import formats
from hf_mae.data.formats import ParquetSource, encoded_images
from hf_mae.data.images import decode_image
from hf_mae.data.rows import ArrowSource, FolderSource
from hf_mae.data.sources import choose_columns, list_splits, open_source
from hf_mae.data.webdataset import TarSource
from hf_mae.patience import HTTP_ERROR
from hf_mae.recipes.base import Data

from .samples import picture, rows_of, write_folder, write_parquet, write_tar

NUMBERS = range(45)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keep Arrow copies out of the user's cache."""
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same 45 pictures in every format, train and test."""
    root = tmp_path_factory.mktemp("made")
    for split, numbers in (("train", NUMBERS), ("test", range(100, 110))):
        write_parquet(root / f"parquet/{split}-0.parquet", numbers[: len(numbers) // 2])
        write_parquet(root / f"parquet/{split}-1.parquet", numbers[len(numbers) // 2 :], groups=7)
        write_folder(root / "folder" / split, numbers)
        write_tar(root / f"tar/{split}-0.tar", numbers[: len(numbers) // 2])
        write_tar(root / f"tar/{split}-1.tar", numbers[len(numbers) // 2 :])
        write_tar(root / f"json/{split}.tar", numbers, label="json")
    return root


def expected(numbers):
    return sorted((decode_image(picture(i)).tobytes(), i % 3) for i in numbers)


# ------------------------------------------------------------------------------------------------ formats


@pytest.mark.parametrize(
    ("name", "kind"), [("parquet", ParquetSource), ("folder", FolderSource), ("tar", TarSource), ("json", TarSource)]
)
def test_every_format_gives_the_same_rows(made, name, kind):
    data = Data(path=str(made / name))
    assert list_splits(data) == ["train", "test"]
    source = open_source(data)
    assert isinstance(source, kind)
    assert source.has_labels
    assert sorted(rows_of(source)) == expected(NUMBERS)
    assert sorted(rows_of(open_source(data, "test"))) == expected(range(100, 110))
    assert sorted(rows_of(open_source(replace(data, split="test")))) == expected(range(100, 110))
    unlabelled = open_source(replace(data, label_column="none"))
    assert not unlabelled.has_labels
    assert {label for _, label in rows_of(unlabelled)} == {-1}
    mean = np.mean([len(picture(i)) for i in NUMBERS])
    # Parquet's own figure includes its dictionary pages.
    assert source.bytes_per_row == pytest.approx(mean, rel=0.4 if name == "parquet" else 0.02)


def test_arrow_copies_give_the_same_rows(made, tmp_path):
    import datasets

    rows = [{"image": {"bytes": picture(i), "path": None}, "label": i % 3} for i in NUMBERS]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    source = open_source(Data(path=str(tmp_path / "saved")))
    assert isinstance(source, ArrowSource)
    assert source.label_names == ["a", "b", "c"]
    assert rows_of(source) == [(decode_image(picture(i)).tobytes(), i % 3) for i in NUMBERS]
    assert source.describe(7, 0) == ("rows", 7)


def test_a_format_without_an_index_needs_a_copy(made, tmp_path):
    folder = tmp_path / "listed"
    folder.mkdir()
    lines = [f'{{"image": "{made}/folder/train/class{i % 3}/{i:04d}.JPG", "label": {i % 3}}}' for i in NUMBERS]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"cannot be read in random order; pass --data\.no-streaming "):
        open_source(Data(path=str(folder)))
    with pytest.raises(
        ValueError, match=r"no column is clearly one of encoded images: image \(string\), label \(int64\)"
    ):
        open_source(Data(path=str(folder), streaming=False))


def test_parquet_takes_plain_bytes_and_nulls(tmp_path):
    table = pa.table(
        {
            "id": [1, 2, 3],
            "jpg": pa.array([picture(0), None, picture(2)], pa.binary()),
            "class": pa.array([5, 6, None], pa.int32()),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(Data(path=str(tmp_path)))
    chunk = source.read(0)
    assert [None if v is None else bytes(v) for v in chunk.images] == [picture(0), None, picture(2)]
    assert chunk.labels.tolist() == [5, 6, -1]
    assert "column jpg" in source.summary()
    assert "labels from class" in source.summary()


def test_encoded_images_keeps_slices_large_types_and_struct_nulls():
    plain = pa.array([b"a", b"bb", None, b"dddd", b""])
    assert [None if v is None else bytes(v) for v in encoded_images(pa.chunked_array([plain.slice(1), plain[:1]]))] == [
        b"bb",
        None,
        b"dddd",
        b"",
        b"a",
    ]
    struct = pa.array([{"bytes": b"x"}, None, {"bytes": None}], pa.struct([("bytes", pa.large_binary())]))
    assert [None if v is None else bytes(v) for v in encoded_images(pa.chunked_array([struct]))] == [b"x", None, None]
    assert encoded_images(pa.chunked_array([], pa.binary())) == []


def test_parquet_reads_only_images_and_labels(tmp_path):
    images = [{"bytes": picture(i), "path": "x"} for i in range(4)]
    table = pa.table({"image": images, "label": [0, 1, 2, 0], "junk": ["y" * 1000] * 4})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(Data(path=str(tmp_path)))
    assert isinstance(source, ParquetSource)
    assert source.columns == ["image.bytes", "label"]
    assert source.describe(0, 3) == ("x.parquet", 3)


def test_digits_are_split_once_and_for_all():
    train, test = open_source(Data(path="digits")), open_source(Data(path="digits"), "test")
    assert (len(train.sizes), len(test.sizes)) == (1437, 360)
    rows = [source.describe(c, 0)[1] for source in (train, test) for c in range(len(source.sizes))]
    assert sorted(rows) == list(range(1797))
    from sklearn.datasets import load_digits

    digits, chunk = load_digits(), test.read(17)
    pixels = np.asarray(decode_image(chunk.images[0], channels=1))
    assert np.array_equal(pixels, np.rint(digits.images[test.describe(17, 0)[1]] * 255 / 16))
    assert chunk.labels[0] == digits.target[test.describe(17, 0)[1]]
    assert list_splits(Data(path="digits")) == ["train", "test"]
    with pytest.raises(ValueError, match=r"data\.split='dev' is not a split of digits; it has train, test"):
        open_source(Data(path="digits", split="dev"))


# ------------------------------------------------------------------------------------------------ folders


def test_flat_folders_and_single_classes_have_no_labels(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i, "PNG"))
    source = open_source(Data(path=str(tmp_path)))
    assert not source.has_labels
    assert [source.describe(c, 0)[0] for c in range(3)] == ["0.png", "1.png", "2.png"]
    write_folder(tmp_path / "one", range(3), classes=1)
    assert not open_source(Data(path=str(tmp_path / "one"))).has_labels
    write_folder(tmp_path, range(3))  # class folders beside loose images
    assert not open_source(Data(path=str(tmp_path))).has_labels


def test_other_files_hidden_files_and_dangling_links_are_left_out_and_counted(tmp_path):
    root = tmp_path / "root"
    write_folder(root, range(6))
    (root / "class0/notes.txt").write_text("x")
    (root / "class0/.hidden.jpg").write_bytes(picture(1))
    (root / "class0/folder.jpg").mkdir()
    (root / "class0/dangling.jpg").symlink_to(tmp_path / "nothing")
    (root / "class0/inside.jpg").symlink_to(root / "class1/0001.JPG")
    source = open_source(Data(path=str(root)))
    assert len(source.sizes) == 7
    assert source.label_names == ["class0", "class1", "class2"]
    assert "other files left out: 1 .txt" in source.summary()
    assert "1 links point to nothing" in source.summary()


def test_links_to_files_and_folders_elsewhere_are_followed_once_and_never_in_circles(tmp_path):
    write_folder(tmp_path / "real", range(6))
    root = tmp_path / "subset"
    (root / "own").mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "real/class0").iterdir())):
        (root / f"own/{i}.jpg").symlink_to(file)
    (root / "linked").symlink_to(tmp_path / "real/class1")
    (root / "again").symlink_to(tmp_path / "real/class1")
    (root / "circle").symlink_to(tmp_path)
    (tmp_path / "real/class1/back").symlink_to(root)
    source = open_source(Data(path=str(root)))
    assert source.label_names == ["again", "own"]
    assert len(source.sizes) == 4
    assert "3 links to folders that are read anyway were not followed" in source.summary()


def test_a_class_has_one_number_in_all_splits(tmp_path):
    for split, classes in (("train", "abc"), ("test", "bc")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.png").write_bytes(picture(1, "PNG"))
    train, test = (open_source(Data(path=str(tmp_path)), split) for split in ("train", "test"))
    assert train.label_names == test.label_names == ["a", "b", "c"]
    assert [label for _, label in rows_of(train)] == [0, 1, 2]
    assert [label for _, label in rows_of(test)] == [1, 2]
    # A split without class folders has no labels; the others keep theirs.
    (tmp_path / "val").mkdir()
    (tmp_path / "val/x.png").write_bytes(picture(1, "PNG"))
    assert not open_source(Data(path=str(tmp_path)), "val").has_labels
    assert open_source(Data(path=str(tmp_path))).label_names == ["a", "b", "c"]


def test_validation_folders_have_many_names(tmp_path):
    write_folder(tmp_path / "train", range(6))
    write_folder(tmp_path / "val", range(6, 9))
    data = Data(path=str(tmp_path))
    assert list_splits(data) == ["train", "validation"]
    for name in ("val", "validation", "dev"):
        assert len(open_source(data, name).sizes) == 3
    with pytest.raises(ValueError, match=r"data\.split='test' is not a split .* it has train, validation"):
        open_source(data, "test")


def test_classes_named_like_splits_stay_classes(tmp_path):
    for name in ("test", "tube", "flask"):
        write_folder(tmp_path / name, range(2), classes=1)
    source = open_source(Data(path=str(tmp_path)))
    assert source.label_names == ["flask", "test", "tube"]
    write_folder(tmp_path / "train", range(2), classes=1)
    source = open_source(Data(path=str(tmp_path)))
    assert len(source.sizes) == 8
    assert source.label_names == ["flask", "test", "train", "tube"]
    assert "folders named like splits (test, train) lie beside images that are in none" in source.summary()
    with pytest.raises(ValueError, match=r"data\.split='train': folders named like splits .* move the others away"):
        open_source(Data(path=str(tmp_path), split="train"))


def test_two_folders_for_one_split_stay_apart(tmp_path):
    for name in ("train", "val", "dev"):
        write_folder(tmp_path / name, range(len(name)))
    data = Data(path=str(tmp_path))
    assert list_splits(data) == ["train", "dev", "val"]
    assert [len(open_source(data, name).sizes) for name in ("train", "val", "dev")] == [5, 3, 3]


@pytest.mark.parametrize("name", ["parquet", "folder", "tar"])
def test_a_file_that_vanishes_ends_the_run_with_its_name(made, tmp_path, name):
    shutil.copytree(made / name, tmp_path / name)
    source = open_source(Data(path=str(tmp_path / name)))
    file = next((tmp_path / name).rglob(Path(source.describe(0, 0)[0]).name))
    file.unlink()
    with pytest.raises(RuntimeError, match=rf"could not read .*{file.name}: FileNotFoundError.* restore it"):
        source.read(0)


@pytest.mark.parametrize("name", ["parquet", "folder", "tar"])
def test_running_out_of_file_descriptors_is_waited_for_and_never_a_bad_row(made, name, monkeypatch):
    source = open_source(Data(path=str(made / name)))
    expected, limit = rows_of(source), resource.getrlimit(resource.RLIMIT_NOFILE)
    pauses = []

    def full(number):
        """Nothing can be opened, until `number` tries have failed."""
        pauses.clear()
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))

        def pause(seconds):
            pauses.append(seconds)
            if len(pauses) == number:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)

        monkeypatch.setattr(formats.time, "sleep", pause)

    try:
        full(2)
        assert rows_of(source) == expected
        assert len(pauses) == 2
        full(99)
        with pytest.raises(RuntimeError, match=r"could not read .*train.*Too many open files"):
            source.read(0)
        assert len(pauses) == 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_page_checksums_find_a_changed_byte(tmp_path):
    table = pa.table({"image": pa.array([picture(0), picture(1)], pa.binary())})
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    pq.write_table(table, tmp_path / "x.parquet", write_page_checksum=True, **options)
    source = open_source(Data(path=str(tmp_path)))
    data = (tmp_path / "x.parquet").read_bytes()
    at = data.index(picture(0)) + 300
    (tmp_path / "x.parquet").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert "CRC" in str(source.read(0).error)


# ------------------------------------------------------------------------------------------------ tars


def test_tars_refuse_links_and_pair_by_stem(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name, data=b"", kind=tarfile.REGTYPE, target=""):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, target, len(data)
            tar.addfile(member, io.BytesIO(data))

        add("a", kind=tarfile.DIRTYPE)
        add("a/1.seg.PNG", picture(1, "PNG"))
        add("a/1.cls", b"2")
        add("a/2.jpg", kind=tarfile.SYMTYPE, target="/etc/passwd")
        add("a/3.cls", b"1")
        add("../4.jpg", picture(4))
        add("../4.cls", b"not a number")
        add("a/._5.jpg", b"resource fork")
    source = open_source(Data(path=str(tmp_path)))
    rows = rows_of(source)
    assert [label for _, label in rows] == [2, -1]
    assert rows[1][0] == decode_image(picture(4)).tobytes()
    assert "1 links or special members" in source.summary()
    assert "1 samples without an image" in source.summary()


def test_tar_labels_of_text_are_named_where_they_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("1.jpg", picture(1)), ("1.cls", b"cat")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert "the .cls members hold no integers" in open_source(Data(path=str(tmp_path))).summary()


def test_damaged_and_empty_tars_are_named(tmp_path):
    write_tar(tmp_path / "x.tar", range(3))
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:700])
    with pytest.raises(ValueError, match=r"x\.tar is not a whole, uncompressed tar file .*; copy, download"):
        open_source(Data(path=str(tmp_path)))
    (tmp_path / "x.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "x.tar") as tar:
        second = tar.getmembers()[2].offset
        end = tar.getmembers()[-1].offset + 1024
    for cut in (second, end):  # between two members: nothing but the mark of the end is missing
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"x\.tar .*ends at byte {cut} without the mark .*; copy, download"):
            open_source(Data(path=str(tmp_path)))
    (tmp_path / "x.tar").write_bytes(whole[:second] + b"x" * 512 + whole[second + 512 :])  # no header
    with pytest.raises(ValueError, match=rf"x\.tar .*ends at byte {second} without the mark"):
        open_source(Data(path=str(tmp_path)))
    (tmp_path / "x.tar").write_bytes(whole[: end + 512])  # one block of zeros is enough
    assert len(rows_of(open_source(Data(path=str(tmp_path))))) == 3
    with tarfile.open(tmp_path / "x.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"x\.tar: the tar files hold no images"):
        open_source(Data(path=str(tmp_path)))


def test_unknown_tar_labels_list_what_there_is(made):
    data = Data(path=str(made / "json"), label_column="other")
    with pytest.raises(ValueError, match=r"data\.label_column='other' .* image, json"):
        open_source(data)
    assert open_source(replace(data, label_column="label")).has_labels


# ------------------------------------------------------------------------------------------------ fingerprints


@pytest.mark.parametrize("name", ["parquet", "folder", "tar"])
def test_fingerprints_survive_moving_and_notice_changes(made, tmp_path, name):
    def mark(path):
        return open_source(Data(path=str(path))).fingerprint

    first = mark(made / name)
    moved = tmp_path / "moved"
    shutil.copytree(made / name, moved)
    assert mark(moved) == first
    files = sorted(p for p in moved.rglob("*") if p.is_file() and "train" in str(p))
    marks = {first}

    renamed = files[0].with_name("train-9" + files[0].suffix)
    files[0].rename(renamed)
    marks.add(mark(moved))
    renamed.rename(files[0])
    shutil.copy(files[0], renamed)
    marks.add(mark(moved))
    renamed.unlink()
    files[0].unlink()
    marks.add(mark(moved))
    assert len(marks) == 4


def test_truncated_files_are_noticed(made, tmp_path):
    shutil.copytree(made / "folder", tmp_path / "folder")
    data = Data(path=str(tmp_path / "folder"))
    before = open_source(data)
    file = tmp_path / "folder/train" / before.describe(0, 0)[0]
    file.write_bytes(file.read_bytes()[:-5])
    assert open_source(data).fingerprint != before.fingerprint
    shutil.copytree(made / "parquet", tmp_path / "parquet")
    shard = tmp_path / "parquet/train-1.parquet"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"train-1\.parquet is not a readable Parquet file .*; download it again"):
        open_source(Data(path=str(tmp_path / "parquet")))


# ------------------------------------------------------------------------------------------------ columns


def schema_of(**columns):
    return pa.schema(list(columns.items()))


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": IMAGE, "label": pa.int64()}, ("image", "label")),
        ({"img": IMAGE, "fine_label": pa.int64(), "coarse_label": pa.int64()}, ("img", "fine_label")),
        ({"mask": IMAGE, "image": IMAGE, "id": pa.int64()}, ("image", None)),
        ({"content": pa.large_binary(), "height": pa.int64()}, ("content", None)),
        ({"hash": pa.binary(), "jpg": pa.binary(), "cls": pa.int16()}, ("jpg", "cls")),
        ({"photo_of_it": IMAGE, "label": pa.string()}, ("photo_of_it", None)),
    ],
)
def test_columns_are_found_by_type_then_name(columns, expected):
    assert choose_columns(schema_of(**columns), Data())[:2] == expected


def test_a_column_of_text_labels_is_named_where_it_is_passed_over(tmp_path):
    pq.write_table(pa.table({"image": [picture(0)], "label": ["cat"]}), tmp_path / "x.parquet")
    data = Data(path=str(tmp_path))
    assert "column label holds text, not integer labels, and was not used" in open_source(data).summary()
    assert "holds text" not in open_source(replace(data, label_column="none")).summary()
    pq.write_table(pa.table({"image": [picture(0)], "label": ["cat"], "class": [1]}), tmp_path / "x.parquet")
    assert "holds text" not in open_source(data).summary()


@pytest.mark.parametrize(
    ("name", "wish"),
    [
        ("folder", {"image_column": "image"}),
        ("folder", {"label_column": "species"}),
        ("tar", {"image_column": "jpg"}),
        ("digits", {"image_column": "image"}),
        ("digits", {"label_column": "digit"}),
        ("parquet", {"revision": "main"}),
        ("tar/train-0.tar", {"revision": "main"}),
        ("digits", {"revision": "main"}),
    ],
)
def test_options_that_mean_nothing_here_are_refused(made, name, wish):
    path = name if name == "digits" else str(made / name)
    ((field, value),) = wish.items()
    with pytest.raises(ValueError, match=rf"data\.{field}='{value}': .*leave it out"):
        open_source(Data(path=path, **wish))


def test_labels_of_the_digits_can_be_ignored():
    source = open_source(Data(path="digits", label_column="none"))
    assert not source.has_labels
    assert source.label_names is None
    assert source.read(0).labels.tolist() == [-1]


def test_class_labels_win_over_names():
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "label": datasets.Value("int64"),
            "species": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    assert choose_columns(features.arrow_schema, Data(), features) == ("picture", "species", ["x", "y"])


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"image_column": "x"}, r"data\.image_column='x' is not a column; the columns are a \(image\), b \(image\)"),
        ({"image_column": "n"}, r"data\.image_column='n' holds int64, not encoded images"),
        ({"label_column": "x", "image_column": "a"}, r"data\.label_column='x' is not a column; .*none ignores labels"),
        ({"label_column": "s", "image_column": "a"}, r"data\.label_column='s' holds string, not integers"),
    ],
)
def test_wrong_columns_are_named_with_those_there_are(wish, message):
    schema = schema_of(a=IMAGE, b=IMAGE, n=pa.int64(), s=pa.string())
    with pytest.raises(ValueError, match=message):
        choose_columns(schema, Data(**wish))


def test_two_unnamed_image_columns_have_to_be_chosen():
    with pytest.raises(ValueError, match=r"no column is clearly .* a \(image\), b \(image\); name it with --data"):
        choose_columns(schema_of(a=IMAGE, b=IMAGE), Data())


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "data.path is empty"),
        ("{tmp}/parqet", "no such folder or file, and not the form of a Hub id; did you mean .*parquet"),
        ("./missing", "no such folder or file"),
        ("org/missing", "is not a folder or file .*, and the Hub cannot be reached .*HF_HUB_OFFLINE"),
        (
            "{tmp}/texts",
            r"holds no images, Parquet or tar files \(other files left out: 2 .txt, 1 .md\); images end in",
        ),
        ("{tmp}/empty", "it is empty"),
        ("{tmp}/texts/a.txt", "is a .txt file; a path is a folder"),
        ("{tmp}/norows", "x.parquet: the Parquet files hold no rows"),
        ("{tmp}/uneven", "b.parquet lacks the column image.bytes that a.parquet has"),
    ],
)
def test_wrong_paths_say_what_was_looked_for_and_found(path, message, tmp_path):
    for name in ("parquet", "texts", "empty", "norows", "uneven"):
        (tmp_path / name).mkdir()
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / "texts" / name).write_text("x")
    write_parquet(tmp_path / "norows/x.parquet", [])
    write_parquet(tmp_path / "uneven/a.parquet", range(2))
    pq.write_table(pa.table({"other": [1]}), tmp_path / "uneven/b.parquet")
    with pytest.raises(ValueError, match=message):
        open_source(Data(path=path.format(tmp=tmp_path)))


@pytest.fixture
def hub_answers(monkeypatch):
    """Let the Hub's client answer as told, and count what it was asked; nothing that tries again may be called."""
    asked = []

    def answer(error):
        def repo_info(self, repo_id, **options):
            asked.append((repo_id, options["timeout"]))
            raise error

        monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *a, **k: pytest.fail("the Hub was tried again"))
        return asked

    return answer


def not_found():
    from huggingface_hub.errors import RepositoryNotFoundError

    client = sys.modules[HTTP_ERROR.__module__]  # httpx, or what huggingface_hub is built on
    response = client.Response(404, request=client.Request("GET", "https://hub/api/datasets/x"))
    return RepositoryNotFoundError("404", response=response)


@pytest.mark.parametrize("path", ["imagez", "photos/imagez"])
def test_a_slip_that_could_be_a_hub_id_gets_one_quick_look(path, hub_answers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "images").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    meant = path.replace("imagez", "images")
    asked = hub_answers(not_found())
    with pytest.raises(ValueError, match=rf"'{path}' is neither a folder or file .* nor a data set .*mean {meant}\?"):
        open_source(Data(path=path))
    assert [name for name, _ in asked] == [path]
    asked.clear()
    hub_answers(ConnectionRefusedError("refused"))
    with pytest.raises(ValueError, match=rf"'{path}' .* the Hub cannot be reached .*did you mean {meant}\?; correct"):
        open_source(Data(path=path))
    ((_, seconds),) = asked
    assert seconds <= 10


@pytest.mark.parametrize(
    "path",
    ["./imgs", "~/imgs", "/no/imgs", "a/b/c", "my imgs", "a\\b", "data/train.parquet", "x.tar", "a--b/c", "imgs/"],
)
def test_what_cannot_be_a_hub_id_is_not_asked_for(path, hub_answers):
    asked = hub_answers(AssertionError)
    with pytest.raises(ValueError, match="no such folder or file, and not the form of a Hub id"):
        open_source(Data(path=path))
    assert asked == []


def test_a_slip_in_a_folder_on_the_way_is_found(tmp_path):
    (tmp_path / "photos" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"did you mean .*/photos/train"):
        open_source(Data(path=str(tmp_path / "photo" / "train")))


def test_a_run_that_goes_on_waits_for_a_hub_out_of_reach(hub_answers, monkeypatch):
    hub_answers(ConnectionRefusedError("refused"))
    called = []

    def builder(*arguments, **options):
        called.append(options["revision"])
        raise ValueError("was asked")

    monkeypatch.setattr("datasets.load_dataset_builder", builder)
    with pytest.raises(ValueError, match="was asked"):
        open_source(Data(path="org/name", revision="0" * 40))
    assert called == ["0" * 40]


def test_a_bare_name_is_told_the_form_of_names_on_the_hub(hub_answers):
    hub_answers(not_found())
    with pytest.raises(ValueError, match="data sets on the Hub are named ORG/NAME"):
        open_source(Data(path="cifar10"))


def test_presets_name_data_sets_by_their_whole_name():
    from hf_mae.recipes.evaluation import EVALUATIONS
    from hf_mae.recipes.mae import PRESETS
    from hf_mae.recipes.supervised import SUPERVISE
    from hf_mae.recipes.transfer import FINETUNE, PROBE

    paths = {r.data.path for presets in (PRESETS, FINETUNE, PROBE, SUPERVISE, EVALUATIONS) for r in presets.values()}
    assert all(path.count("/") == 1 for path in paths - {"", "digits"})


def test_splits_that_are_not_there_are_listed(made):
    with pytest.raises(ValueError, match=r"data\.split='dev' is not a split of .*; it has train, test"):
        open_source(Data(path=str(made / "parquet"), split="dev"))
    remedy = (
        r"it has train, test; name one of these with --evals\.split, or make .* --data\.splits stratified:80/10/10$"
    )
    with pytest.raises(ValueError, match=remedy):
        open_source(Data(path="digits"), "validation", field="evals.split")
    assert list_splits(Data(path=str(made / "nothing"))) == []
    for path in (str(made / "parquet"), str(made / "folder"), str(made / "tar/test-0.tar"), "digits"):
        with pytest.raises(ValueError, match=r"^evals\.split='nonsense' is not a split of .*; it has t"):
            open_source(Data(path=path), "nonsense", field="evals.split")


def test_an_unreachable_hub_is_not_a_data_set_without_splits():
    with pytest.raises(RuntimeError, match=r"splits cannot be listed: .*the Hub cannot be reached"):
        list_splits(Data(path="org/missing"))


def test_splits_of_a_saved_data_set_are_listed(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"image": [picture(0)]})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")
    assert list_splits(Data(path=str(tmp_path / "saved"))) == ["train", "test"]


def test_single_files_open(made):
    source = open_source(Data(path=str(made / "parquet/test-0.parquet")))
    assert sorted(rows_of(source)) == expected(range(100, 105))
    source = open_source(Data(path=str(made / "tar/test-0.tar")))
    assert sorted(rows_of(source)) == expected(range(100, 105))
    assert source.describe(0, 2) == ("test-0.tar", 2)


def test_sidecar_files_do_not_hide_parquet(made, tmp_path):
    shutil.copytree(made / "parquet", tmp_path / "data")
    for i in range(9):
        (tmp_path / f"data/{i}.json").write_text("{}")
    assert len(rows_of(open_source(Data(path=str(tmp_path / "data"))))) == 45


def test_pictures_beside_shards_are_previews(made, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(made / "parquet", root)
    shutil.copy(made / "tar/train-0.tar", root)
    write_folder(root / "previews", range(10))
    source = open_source(Data(path=str(root)))
    assert sorted(rows_of(source)) == expected(NUMBERS)
    assert "other files left out: 10 images, 1 tar files" in source.summary()
    for file in root.glob("*.parquet"):
        file.unlink()
    assert isinstance(open_source(Data(path=str(root))), TarSource)


def test_a_table_beside_pictures_does_not_hide_them(tmp_path):
    write_folder(tmp_path, range(6))
    pq.write_table(pa.table({"file_name": ["x"], "text": ["y"]}), tmp_path / "metadata.parquet")
    assert len(rows_of(open_source(Data(path=str(tmp_path))))) == 6


def test_readme_configurations_choose_the_files(made, tmp_path):
    shutil.copytree(made / "parquet", tmp_path / "data")
    text = "---\nconfigs:\n- config_name: small\n  data_files: data/train-0.parquet\n- config_name: big\n"
    text += "  data_files: data/*.parquet\n---\n"
    (tmp_path / "README.md").write_text(text)
    data = Data(path=str(tmp_path), name="small")
    assert sorted(rows_of(open_source(data))) == expected(range(22))
    with pytest.raises(ValueError, match=r"data\.name='huge': .*small.*big"):
        open_source(replace(data, name="huge"))


def test_real_data_sets_are_recognised(shared):
    source = open_source(Data(path=str(shared / "data/cifar10")))
    assert (int(source.sizes.sum()), len(source.sizes)) == (50_000, 504)
    assert source.label_names is not None
    assert source.label_names[:2] == ["airplane", "automobile"]
    assert Image.open(io.BytesIO(source.read(3).images[5])).size == (32, 32)
    birds = Data(path=str(shared / "data/birds"))
    assert list_splits(birds) == ["train", "validation", "test"]
    assert int(open_source(birds, "val").sizes.sum()) == 360


# ------------------------------------------------------------------------------------------------ odd paths

ODD_NAMES = ["brackets[1]", "a*b?", "{x,y}", "two words", "a::b", "~home", "[!abc]", "ü 鳥"]


@pytest.mark.parametrize("odd", ODD_NAMES)
@pytest.mark.parametrize("name", ["parquet", "tar", "folder"])
def test_a_path_is_never_a_pattern(made, tmp_path, monkeypatch, name, odd):
    root = tmp_path / odd
    shutil.copytree(made / name, root)
    monkeypatch.chdir(tmp_path)
    for path in (str(root), f"{root}/", f"./{odd}/"):
        data = Data(path=path)
        assert list_splits(data) == ["train", "test"]
        assert sorted(rows_of(open_source(data))) == expected(NUMBERS)
        assert sorted(rows_of(open_source(data, "test"))) == expected(range(100, 110))
    if name != "folder":
        (first,) = root.glob("train-0.*")
        assert len(rows_of(open_source(Data(path=str(first))))) == len(NUMBERS) // 2


def test_the_same_fingerprint_whatever_the_folder_is_called(made, tmp_path):
    shutil.copytree(made / "parquet", tmp_path / "brackets[1]/sub[2]")
    shutil.copytree(made / "parquet", tmp_path / "plain/sub[2]")
    prints = {open_source(Data(path=str(tmp_path / name))).fingerprint for name in ("brackets[1]", "plain")}
    assert len(prints) == 1


def test_a_home_folder_is_expanded_and_saved_data_sets_take_brackets(made, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(made / "parquet", tmp_path / "data[0]")
    assert len(rows_of(open_source(Data(path="~/data[0]")))) == len(NUMBERS)
    rows = datasets.Dataset.from_dict({"image": [{"bytes": picture(3), "path": None}]})
    rows.save_to_disk(str(tmp_path / "saved[1]"))
    assert len(rows_of(open_source(Data(path=str(tmp_path / "saved[1]"))))) == 1


def test_a_readme_counts_below_a_folder_with_brackets(made, tmp_path):
    root = tmp_path / "data[1]"
    shutil.copytree(made / "parquet", root)
    text = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: all\n    path: '*.parquet'\n---\n"
    (root / "README.md").write_text(text)
    assert list_splits(Data(path=str(root))) == ["all"]
    assert len(rows_of(open_source(Data(path=str(root))))) == 55


# ------------------------------------------------------------------------------------------------ rows of paths


def paths_only(file, names, *, column="image", struct=True, untyped=False):
    values = [{"bytes": None, "path": name} for name in names] if struct else list(names)
    kind = pa.struct({"bytes": pa.null() if untyped else pa.binary(), "path": pa.string()}) if struct else pa.string()
    table = pa.table({column: pa.array(values, kind), "label": [i % 3 for i in range(len(names))]})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=4)


@pytest.mark.parametrize(("column", "struct"), [("image", True), ("image", False), ("file_name", False)])
@pytest.mark.parametrize("where", ["beside", "below the root", "absolute"])
def test_rows_of_paths_are_read_from_the_folder_of_the_data(tmp_path, column, struct, where):
    root = tmp_path / "data"
    for i in range(10):
        file = root / ("shards/images" if where == "beside" else "images") / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    names = [f"images/{i}.jpg" for i in range(10)]
    if where == "absolute":
        names = [str(root / name) for name in names]
    paths_only(root / "shards/train.parquet", names, column=column, struct=struct)
    source = open_source(Data(path=str(root)))
    assert sorted(rows_of(source)) == expected(range(10))
    assert source.names(0) == names[:4]
    assert 0.5 < source.bytes_per_row / len(picture(0)) < 2
    assert sorted(rows_of(open_source(Data(path=str(root), image_column=column)))) == expected(range(10))
    if struct:
        paths_only(root / "shards/train.parquet", names, untyped=True)
        assert sorted(rows_of(open_source(Data(path=str(root))))) == expected(range(10))


def test_rows_of_bytes_and_rows_of_paths_may_lie_in_one_file(tmp_path):
    (tmp_path / "1.jpg").write_bytes(picture(1))
    rows = [{"bytes": picture(0), "path": "0.jpg"}, {"bytes": None, "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}]
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 2]}), tmp_path / "train.parquet")
    images = open_source(Data(path=str(tmp_path))).read(0).images
    assert [None if i is None else bytes(i) for i in images] == [picture(0), picture(1), None]


def test_a_row_names_no_file_outside_of_the_data(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(picture(0))
    root = tmp_path / "data"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), f"file://{tmp_path}/secret.jpg", "a/../../secret.jpg"):
        paths_only(root / "train.parquet", [name])
        with pytest.raises(ValueError, match=r"train\.parquet: .*column image.*secret\.jpg.*to_parquet"):
            open_source(Data(path=str(root)))


def test_paths_of_files_that_are_gone_are_counted_and_refused_where_all_are(tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    paths_only(tmp_path / "train.parquet", ["0.jpg", "gone.jpg"])
    assert "1 of 2 are not there, first 'gone.jpg'" in open_source(Data(path=str(tmp_path))).summary()
    paths_only(tmp_path / "train.parquet", ["x.jpg", "gone.jpg"], struct=False)
    with pytest.raises(ValueError, match=r"none is there \(first 'x\.jpg'\)"):
        open_source(Data(path=str(tmp_path)))


def test_paths_that_came_from_the_hub_are_not_followed(tmp_path):
    (tmp_path / "0.jpg").write_bytes(picture(0))
    paths_only(tmp_path / "train.parquet", ["0.jpg"])
    with pytest.raises(ValueError, match="downloaded rows name are not read"):
        ParquetSource(
            ["train.parquet"], [str(tmp_path / "train.parquet")], choose=lambda schema: ("image", "label", None)
        )
