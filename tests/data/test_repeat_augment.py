"""Repeated augmentation: timm's sampler index for index, from any ranks, workers and cursors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from hf_mae.data import order as order_module
from hf_mae.data.augment import NUM_UNIFORMS, augment_image
from hf_mae.data.images import decode_image
from hf_mae.data.loader import Loader, Stream, check_state, loader_state, repeat_note
from hf_mae.data.order import CHUNKS, Order, uniforms
from hf_mae.recipes.base import Augment

from .samples import FakeSource
from .test_loader import FIXED, SIZES, N, digest, order_of, run

# ------------------------------------------------------------------------------------------------ timm's sampler


@pytest.fixture
def shuffled_as_timm(monkeypatch):
    """Lay the chunks of an epoch as timm's sampler lays its indices; with one lane and single rows, nothing else is."""

    def use(shuffle: bool) -> None:
        def permutation(n, seed, purpose, epoch, *rest):
            if purpose == CHUNKS and shuffle:
                return torch.randperm(n, generator=torch.Generator().manual_seed(epoch)).numpy()
            return np.arange(n)

        monkeypatch.setattr(order_module, "permutation", permutation)

    return use


class Numbers(FakeSource):
    """Single rows without pictures."""

    def read(self, chunk: int):
        return chunk


def indices(n: int, repeats: int, world: int, batch: int, epochs: int) -> list[list[list[int]]]:
    """Chunks read by each rank in each epoch: [epoch][rank]."""
    found = [[[] for _ in range(world)] for _ in range(epochs)]
    source = Numbers(np.ones(n))
    for rank in range(world):
        stream = Stream(
            source,
            Order(source.sizes, 0, 1, 1),
            global_batch=batch,
            rank=rank,
            world=world,
            stop=n // batch * epochs,
            remainder="drop",
            repeat_augment=repeats,
        )
        for piece in stream:
            for epoch, chunk in zip(piece.epochs.tolist(), piece.chunks.tolist(), strict=True):
                found[epoch][rank].append(chunk)
        stream.close()
    return found


def test_indices_of_every_rank_are_the_golden_ones(goldens, shuffled_as_timm):
    checked = 0
    for case in json.loads((goldens / "repeat_aug.json").read_text()):
        repeats, n, world = case["num_repeats"], case["dataset_len"], case["num_replicas"]
        if repeats != int(repeats) or case["selected_ratio"]:
            continue  # fractions of a copy, and longer epochs, are not offered
        shuffled_as_timm(case["shuffle"])
        batch = 256 if n >= 256 and case["selected_round"] else n
        found = indices(n, repeats, world, batch, case["epoch"] + 1)[case["epoch"]]
        assert [len(part) for part in found] == [case["len_per_rank"]] * world
        kept = len(case["indices"][0])
        assert case["truncated"] or kept == case["len_per_rank"]
        assert [part[:kept] for part in found] == case["indices"]
        checked += 1
    assert checked == 6


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("n", "repeats", "world", "batch"),
    [(64, 3, 4, 16), (64, 3, 2, 16), (64, 2, 8, 32), (50, 4, 2, 12), (50, 3, 3, 12), (300, 3, 8, 256), (41, 5, 1, 7)],
)
def test_every_rank_and_epoch_reads_what_timms_sampler_says(n, repeats, world, batch, shuffle, shuffled_as_timm):
    shuffled_as_timm(shuffle)
    found = indices(n, repeats, world, batch, 3)
    for rank in range(world):
        # timm cuts an epoch to whole rounds; ours to whole global batches.
        sampler = RepeatAugSampler(range(n), world, rank, shuffle, repeats, selected_round=batch)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            assert found[epoch][rank] == list(sampler)


# ------------------------------------------------------------------------------------------------ our stream


def rows_of(world=1, *, repeats=3, lanes=8, batch=24, stop=28, cursor=0, remainder="carry", ahead=0.5):
    """{batch: sorted [(epoch, place, label)]} of all ranks, and how many chunks were read."""
    out: dict[int, list] = {}
    reads = []
    for rank in range(world):
        source = FakeSource(SIZES)
        stream = Stream(
            source,
            order_of(source, lanes),
            global_batch=batch,
            rank=rank,
            world=world,
            cursor=cursor,
            stop=stop,
            remainder=remainder,
            repeat_augment=repeats,
            ahead=ahead,
        )
        for piece in stream:
            labels = [int(f.result().labels[r]) for f, r in zip(piece.futures, piece.rows.tolist(), strict=True)]
            rows = zip(piece.epochs.tolist(), piece.positions.tolist(), labels, strict=True)
            out.setdefault(piece.index, []).extend(rows)
        stream.close()
        reads.append(stream.num_reads)
    return {k: sorted(v) for k, v in out.items()}, reads


@pytest.mark.parametrize("remainder", ["carry", "drop"])
@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_an_epoch_is_as_long_as_ever_and_shows_the_first_images_of_the_order(repeats, remainder):
    once, _ = rows_of(repeats=1, remainder=remainder)
    several, _ = rows_of(repeats=repeats, remainder=remainder)
    label = {(epoch, place): label for rows in once.values() for epoch, place, label in rows}
    for k, rows in several.items():
        assert [row[:2] for row in rows] == [row[:2] for row in once[k]]
        assert [row[2] for row in rows] == [label[epoch, place // repeats] for epoch, place, _ in rows]
    length = N if remainder == "carry" else N - N % 24
    first = [{row[2] for rows in several.values() for row in rows if row[0] == epoch} for epoch in (0, 1)]
    assert [len(images) for images in first] == [-(-length // repeats)] * 2
    assert first[0] != first[1]


@pytest.mark.parametrize("world", [2, 3, 4, 8, 12])
@pytest.mark.parametrize("lanes", [1, 3, 8, 64])
@pytest.mark.parametrize("remainder", ["carry", "drop"])
def test_ranks_together_see_the_same_batches(world, lanes, remainder):
    alone, _ = rows_of(lanes=lanes, remainder=remainder)
    for ahead in (0.0, 1.0):
        assert rows_of(world, lanes=lanes, remainder=remainder, ahead=ahead)[0] == alone


@pytest.mark.parametrize("world", [3, 4])
def test_copies_of_an_image_lie_on_different_ranks(world):
    for rank in range(world):
        source = FakeSource(SIZES)
        stream = Stream(
            source, order_of(source), global_batch=24, rank=rank, world=world, stop=28, repeat_augment=3, readers=1
        )
        for piece in stream:
            images = list(zip(piece.epochs.tolist(), (piece.positions // 3).tolist(), strict=True))
            assert len(set(images)) == len(images)
        stream.close()


@pytest.mark.parametrize("cursor", [1, 8, 9, 10, 17])  # an epoch is 9.33 batches
def test_a_stream_goes_on_at_any_cursor_with_any_ranks(cursor):
    whole, _ = rows_of()
    assert rows_of(4, stop=cursor)[0] | rows_of(2, cursor=cursor)[0] == whole


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_chunk_is_read_once_an_epoch_by_each_rank_that_needs_it(world):
    sizes, lanes, window = [20] * 300, 8, 2
    needed = [[set() for _ in range(2)] for _ in range(world)]
    for rank in range(world):
        source = Numbers(sizes)
        order = Order(sizes, 1, lanes, window)
        stream = Stream(source, order, global_batch=48, rank=rank, world=world, stop=250, repeat_augment=3, readers=1)
        for piece in stream:
            for epoch, chunk in zip(piece.epochs.tolist(), piece.chunks.tolist(), strict=True):
                needed[rank][epoch].add(chunk)
        stream.close()
        # A third of an epoch's chunks; one that is cut by the end of a lane may be read for each part.
        wanted = sum(len(chunks) for chunks in needed[rank])
        assert wanted <= stream.num_reads <= wanted + lanes
        assert stream.most_live <= 1.75 * lanes * window + lanes


# ------------------------------------------------------------------------------------------------ the loader


@pytest.fixture(scope="module")
def tripled():
    return run(FakeSource(SIZES), num_workers=0, repeat_augment=3)


def test_one_copy_is_the_stream_as_it_was():
    assert run(FakeSource(SIZES), num_workers=0, repeat_augment=1, stop=5) == run(
        FakeSource(SIZES), num_workers=0, stop=5
    )


def test_copies_are_drawn_at_their_own_places():
    source = FakeSource(SIZES)
    pictures = [data for chunk in range(len(SIZES)) for data in source.read(chunk).images]
    with Loader(source, order_of(source), global_batch=24, stop=3, repeat_augment=3, **FIXED) as loader:
        for b in loader:
            assert b.positions.tolist() == list(range((b.cursor - 1) * 24, b.cursor * 24))
            assert torch.equal(b.labels, b.labels[::3].repeat_interleave(3))
            draws = uniforms(NUM_UNIFORMS, 5, b.epochs, b.positions)
            for pixels, label, u in zip(b.pixel_values, b.labels.tolist(), draws, strict=True):
                assert np.array_equal(
                    pixels.numpy(), augment_image(decode_image(pictures[label]), u, (8, 8), Augment())
                )
            assert len(set(digest(b))) == 24


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 3, "depth": 2},
        {"num_workers": 2, "worker_kind": "process", "depth": 1},
        {"num_workers": 1, "world": 2},
        {"num_workers": 1, "world": 4},
    ],
    ids=str,
)
def test_copies_come_the_same_from_all_workers_and_ranks(tripled, options):
    assert run(FakeSource(SIZES), repeat_augment=3, **options) == tripled


@pytest.mark.parametrize("cursor", [1, 9, 17])
def test_a_loader_goes_on_at_the_cursor(tripled, cursor):
    seen = run(FakeSource(SIZES), 2, count=cursor, repeat_augment=3, num_workers=2)
    rest = run(FakeSource(SIZES), 4, cursor=cursor, repeat_augment=3, num_workers=1)
    assert seen | rest == tripled


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("options", [{"num_workers": 5}, {"num_workers": 2, "world": 4}], ids=str)
def test_more_workers_or_ranks_than_lanes_change_nothing(repeats, options):
    expected = run(FakeSource(SIZES), lanes=2, num_workers=0, repeat_augment=repeats)
    assert run(FakeSource(SIZES), lanes=2, repeat_augment=repeats, **options) == expected


def test_a_bad_image_is_listed_by_its_place_among_the_images():
    bad = [3, 60]
    source = FakeSource(SIZES, bad=bad)
    order = order_of(source)
    with Loader(
        source, order, global_batch=24, stop=28, repeat_augment=3, max_bad_fraction=1.0, num_workers=1, **FIXED
    ) as loader:
        listed = [sample for batch in loader for sample in batch.bad]
    assert listed
    for sample in listed:
        places = order_of(source).locate([sample["epoch"]], [sample["position"]])
        row = int(source.starts[places.chunks[0]] + places.rows[0])
        assert row in bad
        assert (sample["shard"], sample["row"]) == source.describe(int(places.chunks[0]), int(places.rows[0]))


def test_the_number_of_copies_may_not_change_and_was_one_before_it_existed():
    source = FakeSource(SIZES)
    state = loader_state(source, order_of(source), 24, "carry", repeat_augment=3)
    plain = loader_state(source, order_of(source), 24, "carry")
    assert check_state(state, dict(state), 7) == 7
    old = {name: value for name, value in plain.items() if name != "repeat_augment"}
    assert check_state(old, plain, 7) == 7
    with pytest.raises(ValueError, match="repeat_augment was 1 in the checkpoint and is 3 now: the order of the"):
        check_state(old, state, 7)


def test_copies_on_one_device_are_spoken_of():
    assert repeat_note(1, 1) is None
    assert repeat_note(3, 4) is None
    assert repeat_note(3, 3) is None
    assert "data.repeat_augment=3 over 2 process(es): copies of an image share a process" in repeat_note(3, 2)
    source = FakeSource(SIZES)
    with Loader(source, order_of(source), global_batch=24, repeat_augment=3, **FIXED) as loader:
        lines = loader.describe()
    assert (
        "repeated augmentation: 3 copies of each image, about 8 different images a batch, 75 of 224 an epoch" in lines
    )
    assert repeat_note(3, 1) in lines
    with pytest.raises(ValueError, match="repeat_augment=0 must be at least 1; 1 is off"):
        Loader(source, order_of(source), global_batch=24, repeat_augment=0, **FIXED)
