"""A split read once: every row counted once over ranks, whatever the batch, the threads and the format."""

from __future__ import annotations

import os
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mae.data.formats import ParquetSource
from hf_mae.data.images import ImageError, decode_image, eval_image
from hf_mae.data.sources import open_source
from hf_mae.data.whole import WholeSplit
from hf_mae.recipes.base import Data
from tests.data.samples import FakeSource, write_folder, write_parquet, write_tar

SIZE = (8, 8)


def whole(source, **options) -> WholeSplit:
    return WholeSplit(source, **{"image_size": SIZE, "channels": 3, "batch": 4, **options})


def gather(parts) -> dict[int, tuple[bytes, int]]:
    """{row: (pixels, label)} of several splits; a row seen twice is an error."""
    found = {}
    for part in parts:
        for batch in part:
            for pixels, label, row in zip(*batch.values(), strict=True):
                assert int(row) not in found
                found[int(row)] = (pixels.numpy().tobytes(), int(label))
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_every_row_is_read_once_over_all_ranks_in_equally_many_batches(world, batch):
    source = FakeSource([5, 1, 7, 10])
    expected = gather([whole(source)])
    assert sorted(expected) == list(range(23))
    assert [label for _, label in expected.values()] == list(range(23))  # a row's label is its number
    splits = [whole(FakeSource([5, 1, 7, 10]), rank=r, world=world, batch=batch) for r in range(world)]
    assert gather(splits) == expected
    assert {len(list(split)) for split in splits} == {len(splits[0])}


def test_a_split_is_checked_up_to_its_first_good_image():
    source = FakeSource([5, 1, 7, 10], bad=range(7), broken=[1])
    whole(source).check()
    assert source.reads == [0, 1, 2]
    with pytest.raises(ValueError, match=r"none of the 6 images can be decoded; first shard0 row 0: .*; name another"):
        whole(FakeSource([5, 1], bad=range(5), broken=[1])).check()


def test_batches_past_the_end_of_a_block_are_empty_and_have_all_keys():
    splits = [whole(FakeSource([1]), rank=r, world=3, batch=2) for r in range(3)]
    sizes = [[len(batch["rows"]) for batch in split] for split in splits]
    assert sorted(sizes) == [[0], [0], [1]]
    empty = next(batch for split in splits for batch in split if not len(batch["rows"]))
    assert empty["pixel_values"].shape == (0, 3, 8, 8)
    assert empty["labels"].dtype == empty["rows"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_threads_change_nothing_and_a_second_pass_is_the_first(workers):
    split = whole(FakeSource([5, 1, 7, 10], delay=0.002), num_workers=workers)
    assert gather([split]) == gather([split]) == gather([whole(FakeSource([5, 1, 7, 10]))])


def test_a_chunk_is_read_once_in_a_pass():
    source = FakeSource([30, 3, 50, 1])
    for batch in whole(source, batch=4):
        assert len(batch["rows"])
    assert sorted(source.reads) == [0, 1, 2, 3]


def test_bad_rows_are_left_out_and_listed_once():
    source = FakeSource([4, 3, 2], bad=[1, 5], broken=[2])
    split = whole(source)
    for _ in range(2):
        assert sorted(gather([split])) == [0, 2, 3, 4, 6]
    assert [(bad.shard, bad.row) for bad in split.bad] == [("shard0", 1), ("shard1", 1), ("shard2", 0), ("shard2", 1)]
    assert split.bad[0].reason.startswith("not a known image format")
    assert split.bad[2].reason == "damaged chunk"


def test_the_transform_is_that_of_evaluation_and_crop_pct_overrides_it(shared):
    names = sorted((shared / "data/imagenet1000").rglob("*.parquet"))
    assert names, "no parquet of ImageNet pictures"
    source = open_source(Data(path=str(names[0])))
    image = decode_image(source.read(0).images[0])
    for pct, side in ((None, 36), (1.0, 32), (0.5, 64)):  # int(32 * 256 / 224) = 36
        split = whole(source, image_size=(32, 32), batch=1, crop_pct=pct)
        short = min(image.size)
        w, h = (side if s == short else int(side * s / short) for s in image.size)
        resized = np.asarray(image.resize((w, h), Image.Resampling.BICUBIC))
        top, left = round((h - 32) / 2), round((w - 32) / 2)
        expected = resized[top : top + 32, left : left + 32].transpose(2, 0, 1)
        first = next(iter(split))["pixel_values"][0]
        assert np.array_equal(first.numpy(), expected)
        assert torch.equal(split.picture(0), first)


def test_images_of_exactly_the_input_size_are_no_exception():
    """341adb0 left them as they are, where the official transform crops them; crop_pct 1 is the whole image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    assert np.array_equal(eval_image(image, SIZE, 1.0).transpose(1, 2, 0), np.asarray(image))
    official = image.resize((9, 9), Image.Resampling.BICUBIC).crop((0, 0, 8, 8))
    assert np.array_equal(eval_image(image, SIZE).transpose(1, 2, 0), np.asarray(official))


def test_picture_finds_a_row_of_any_chunk_and_refuses_a_bad_one():
    split = whole(FakeSource([4, 3, 2], bad=[5]), rank=1, world=2)
    rows = gather([whole(FakeSource([4, 3, 2]))])
    for row in (0, 3, 4, 8):
        assert split.picture(row).numpy().tobytes() == rows[row][0]
    with pytest.raises(ImageError, match="not a known image format"):
        split.picture(5)


def test_leaving_the_loop_early_ends_the_threads():
    before = threading.active_count()
    batches = iter(whole(FakeSource([50, 50, 50], delay=0.01)))
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_a_file_that_is_gone_ends_the_pass_with_its_reason():
    with pytest.raises(RuntimeError, match="shard 1 is gone"):
        list(whole(FakeSource([4, 3, 2], fails=1)))


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"batch=0 must be at least 1"):
        whole(FakeSource([3]), batch=0)
    with pytest.raises(ValueError, match=r"crop_pct=1\.5 must lie in \(0, 1\]"):
        whole(FakeSource([3]), crop_pct=1.5)
    with pytest.raises(ValueError, match="carry no file names, which this evaluation needs; use a folder"):
        whole(FakeSource([3]), names=True)


# ------------------------------------------------------------------------------------------------ file names


def test_file_names_come_from_the_folder(tmp_path):
    write_folder(tmp_path, range(6))
    split = whole(open_source(Data(path=str(tmp_path))), names=True)
    assert split.file_names([0, 5]) == ["class0/0000.JPG", "class2/0005.JPG"]


def test_file_names_come_from_the_path_field_of_parquet_and_null_is_empty(tmp_path):
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "train.parquet", range(25))
    split = whole(open_source(Data(path=str(tmp_path))), names=True)
    assert split.file_names([0, 24, 11]) == ["0.jpg", "24.jpg", "11.jpg"]
    table = pq.read_table(tmp_path / "train.parquet")
    images = table["image"].to_pylist()
    images[1]["path"] = None
    import pyarrow as pa

    column = pa.array(images, type=table.schema.field("image").type)
    pq.write_table(table.set_column(0, table.schema.field("image"), column), tmp_path / "train.parquet")
    assert whole(open_source(Data(path=str(tmp_path)))).file_names([0, 1]) == ["0.jpg", ""]


def test_parquet_of_bare_bytes_has_no_file_names(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.data.samples import picture

    pq.write_table(pa.table({"image": [picture(i) for i in range(3)]}), tmp_path / "train.parquet")
    source = open_source(Data(path=str(tmp_path)))
    assert isinstance(source, ParquetSource)
    assert source.names(0) is None


def test_file_names_of_a_tar_are_whole_even_when_long(tmp_path):
    write_tar(tmp_path / "train-0.tar", range(40))
    long = "part/" + "n" * 150 + ".jpg"
    with tarfile.open(tmp_path / "train-1.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for ending, data in ((".jpg", (tmp_path / "x.jpg")), (".cls", tmp_path / "x.cls")):
            from tests.data.samples import picture

            data.write_bytes(picture(1) if ending == ".jpg" else b"1")
            tar.add(data, long.replace(".jpg", ending))
            os.remove(data)
    split = whole(open_source(Data(path=str(tmp_path))), names=True)
    assert split.file_names([0, 39, 40]) == ["part/0000.jpg", "part/0039.jpg", long]


def test_file_names_of_an_arrow_copy(tmp_path):
    import datasets

    write_parquet(tmp_path / "in/train.parquet", range(4))
    saved = datasets.load_dataset("parquet", data_dir=str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"))
    saved.save_to_disk(str(tmp_path / "saved"))
    assert whole(open_source(Data(path=str(tmp_path / "saved")))).file_names([0, 3]) == ["0.jpg", "3.jpg"]


def test_reading_goes_on_while_a_batch_is_used():
    source = FakeSource([4, 4, 4, 4])
    batches = iter(whole(source, batch=4))
    next(batches)
    deadline = time.monotonic() + 10
    while len(source.reads) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(source.reads) >= 3
    batches.close()


def test_a_real_folder_of_two_splits(tmp_path: Path):
    write_folder(tmp_path / "train", range(9))
    write_folder(tmp_path / "test", range(20, 26))
    split = whole(open_source(Data(path=str(tmp_path)), "test"))
    assert sorted(label for _, label in gather([split]).values()) == [0, 0, 1, 1, 2, 2]
