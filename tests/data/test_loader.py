"""Batches are a function of (recipe, data, position): not of workers, ranks, prefetch, restarts or bad luck."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_mae.data import decoding
from hf_mae.data import loader as loader_module
from hf_mae.data.augment import NUM_UNIFORMS, augment_image, sample_pixels
from hf_mae.data.examples import load_examples
from hf_mae.data.formats import ParquetSource
from hf_mae.data.images import decode_image, eval_image
from hf_mae.data.loader import (
    Loader,
    Stream,
    bad_allowed,
    check_state,
    loader_state,
    steps_per_epoch,
)
from hf_mae.data.order import Order, uniforms
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import Augment, Data

from .samples import SIDE, FakeSource, write_parquet

SIZES = [40, 7, 1, 23, 60, 12, 30, 30, 19, 2]  # 224 rows; 224 % 24 and 224 % 8 differ
N = sum(SIZES)
FIXED = {"augment": Augment(), "image_size": (8, 8), "channels": 3}


def order_of(source, lanes=8, window=2, seed=5):
    return Order(source.sizes, seed, lanes, window)


def digest(batch, slot=None):
    rows = range(len(batch.positions)) if slot is None else [slot]
    return [hashlib.md5(batch.pixel_values[i].numpy().tobytes()).hexdigest() for i in rows]


def run(source, world=1, lanes=8, batch=24, count=None, **options):
    """Global batches of all ranks: {index: sorted [(epoch, position, label, pixels)]}."""
    out: dict[int, list] = {}
    steps = options.pop("stop", 2 * N // batch)
    for rank in range(world):
        with Loader(
            source, order_of(source, lanes), global_batch=batch, rank=rank, world=world, stop=steps, **(FIXED | options)
        ) as loader:
            for taken, b in enumerate(loader, 1):
                rows = zip(b.epochs.tolist(), b.positions.tolist(), b.labels.tolist(), digest(b), strict=True)
                out.setdefault(b.cursor - 1, []).extend(rows)
                if taken == count:
                    break
    return {k: sorted(v) for k, v in out.items()}


@pytest.fixture(scope="module")
def expected():
    return run(FakeSource(SIZES), num_workers=0)


# ------------------------------------------------------------------------------------------------ workers and ranks


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 1},
        {"num_workers": 4, "depth": 1},
        {"num_workers": 2, "depth": 5, "ahead": 0.25},
        {"num_workers": 3, "ahead": 1.0, "readers": 1},
        {"num_workers": 0, "ahead": 0.0},
    ],
    ids=str,
)
def test_workers_prefetch_and_delays_change_nothing(expected, options, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(random.SystemRandom().uniform(0, 0.002))
        return sample_pixels(*args, **kwargs)

    monkeypatch.setattr(decoding, "sample_pixels", slow)
    assert run(FakeSource(SIZES, delay=0.003), **options) == expected


@pytest.fixture(scope="module")
def real(shared, tmp_path_factory):
    """5,000 CIFAR-10 pictures in 50 row groups, and their global batches without workers on one rank."""
    folder = tmp_path_factory.mktemp("cifar")
    (folder / "train.parquet").symlink_to(shared / "data" / "cifar10" / "test-00000-of-00002.parquet")
    source = open_source(Data(path=str(folder)))
    return source, run(source, batch=128, stop=40, num_workers=0)


@pytest.mark.parametrize(("workers", "world"), [(1, 1), (4, 1), (0, 2), (1, 2), (4, 2)])
def test_real_images_come_in_one_order_and_once_an_epoch(real, workers, world):
    source, expected = real
    assert run(source, batch=128, stop=40, num_workers=workers, world=world) == expected
    first = [row[1] for batch in expected.values() for row in batch if row[0] == 0]
    assert sorted(first) == list(range(5000))
    chunks, rows = order_of(source).locate([0] * 5000, range(5000))[:2]
    assert len(set(zip(chunks.tolist(), rows.tolist(), strict=True))) == 5000


@pytest.mark.parametrize("depth", [1, 8])  # three slots of shared memory, or thirty
def test_processes_give_the_same_pixels(expected, monkeypatch, depth):
    monkeypatch.setattr(loader_module, "PROCESS_GROUP", 10)  # 24 images in three uneven parts
    assert run(FakeSource(SIZES), num_workers=2, worker_kind="process", depth=depth) == expected


@pytest.mark.parametrize("size", [20, None])  # hardly an image fits; the source does not know
def test_images_beyond_the_shared_room_reach_the_processes(expected, size):
    source = FakeSource(SIZES)
    source.bytes_per_row = size
    assert run(source, num_workers=1, worker_kind="process", depth=1) == expected


def test_batches_stay_as_they_were_while_the_processes_go_on():
    options = FIXED | {"num_workers": 2, "worker_kind": "process", "depth": 1, "stop": 12}
    with Loader(FakeSource(SIZES), order_of(FakeSource(SIZES)), global_batch=24, **options) as loader:
        held = [(batch, digest(batch)) for batch in loader]
    assert all(digest(batch) == before for batch, before in held)


@pytest.mark.parametrize("world", [2, 3, 4])  # 3 does not divide the 8 lanes
def test_ranks_together_see_the_same_global_batches(expected, world):
    assert run(FakeSource(SIZES), world, num_workers=1) == expected


@pytest.mark.parametrize("batch", [20, 36, 100, 300])  # not multiples of the lanes; more than the data
@pytest.mark.parametrize("lanes", [1, 3, 8, 64])
def test_every_row_comes_once_an_epoch(batch, lanes):
    source = FakeSource(SIZES)
    stop = -(-2 * N // batch)
    batches = [run_positions(source, world, batch, lanes, stop) for world in (1, 4)]
    assert batches[0] == batches[1]
    flat = [row for k in sorted(batches[0]) for row in batches[0][k]]
    for epoch in (0, 1):
        labels = sorted(label for e, _, label in flat if e == epoch)
        assert labels == list(range(N))


def run_positions(source, world, batch, lanes, stop, cursor=0, remainder="carry", ahead=0.5):
    """As `run`, without decoding: {index: sorted [(epoch, position, label)]}."""
    out: dict[int, list] = {}
    for rank in range(world):
        stream = Stream(
            source,
            order_of(source, lanes),
            global_batch=batch,
            rank=rank,
            world=world,
            cursor=cursor,
            stop=stop,
            remainder=remainder,
            ahead=ahead,
        )
        for piece in stream:
            labels = [int(f.result().labels[r]) for f, r in zip(piece.futures, piece.rows.tolist(), strict=True)]
            rows = zip(piece.epochs.tolist(), piece.positions.tolist(), labels, strict=True)
            out.setdefault(piece.index, []).extend(rows)
        stream.close()
    return {k: sorted(v) for k, v in out.items()}


def test_drop_leaves_out_another_remainder_each_epoch():
    stop = 3 * (N // 36)
    batches = run_positions(FakeSource(SIZES), 1, 36, 8, stop, remainder="drop")
    assert run_positions(FakeSource(SIZES), 3, 36, 8, stop, remainder="drop") == batches
    kept = [{row[2] for k in batches for row in batches[k] if row[0] == epoch} for epoch in range(3)]
    assert [len(k) for k in kept] == [N - N % 36] * 3
    assert len({frozenset(set(range(N)) - k) for k in kept}) == 3


def test_two_rows_fill_a_batch_of_many_epochs():
    batches = run_positions(FakeSource([2]), 2, 100, 2, 2)
    assert all(len(rows) == 100 for rows in batches.values())
    assert {row[0] for row in batches[1]} == set(range(50, 100))


# ------------------------------------------------------------------------------------------------ repeated sampling


@pytest.mark.parametrize("repeats", [1, 3])
def test_samples_are_views_of_their_image_drawn_at_their_own_place(repeats):
    source = FakeSource(SIZES)
    pictures = [data for chunk in range(len(SIZES)) for data in source.read(chunk).images]
    with Loader(source, order_of(source), global_batch=24, stop=4, repeats=repeats, **FIXED) as loader:
        for b in loader:
            n = 24 // repeats
            assert b.labels.tolist() == b.labels[:n].tolist() * repeats
            assert b.positions[:n].tolist() == list(range((b.cursor - 1) * 24, b.cursor * 24, repeats))
            assert np.array_equal(b.positions, np.concatenate([b.positions[:n] + v for v in range(repeats)]))
            draws = uniforms(NUM_UNIFORMS, 5, b.epochs, b.positions)
            for pixels, label, u in zip(b.pixel_values, b.labels.tolist(), draws, strict=True):
                image = decode_image(pictures[label])
                assert np.array_equal(pixels.numpy(), augment_image(image, u, (8, 8), Augment()))


@pytest.fixture(scope="module")
def doubled():
    return run(FakeSource(SIZES), num_workers=0, repeats=2, stop=28)


@pytest.mark.parametrize(
    "options",
    [
        {"num_workers": 3, "depth": 2},
        {"num_workers": 2, "worker_kind": "process", "depth": 1},
        {"num_workers": 1, "world": 3},
        {"num_workers": 1, "world": 2, "worker_kind": "process"},
    ],
    ids=str,
)
def test_repeats_come_the_same_from_all_workers_and_ranks(doubled, options, monkeypatch):
    monkeypatch.setattr(loader_module, "PROCESS_GROUP", 10)  # 12 images in three uneven parts
    assert run(FakeSource(SIZES), repeats=2, stop=28, **options) == doubled


@pytest.mark.parametrize("cursor", [1, 18, 19, 27])  # a pass over the data is 18.67 batches
def test_repeats_go_on_at_the_cursor(doubled, cursor):
    seen = run(FakeSource(SIZES), 2, count=cursor, repeats=2, stop=28, num_workers=2)
    rest = run(FakeSource(SIZES), 3, cursor=cursor, repeats=2, stop=28, num_workers=1)
    assert seen | rest == doubled


def test_a_pass_over_the_data_shows_each_image_repeats_times(doubled):
    rows = [row for k in sorted(doubled) for row in doubled[k] if row[0] == 0]
    assert sorted(row[1] for row in rows) == list(range(2 * N))
    assert sorted(row[2] for row in rows) == sorted([*range(N), *range(N)])
    assert len({row[3] for row in rows}) > 1.9 * N  # other crops


def test_micro_batches_of_one_process_are_the_batches_of_two():
    def first(rank, world):
        source = FakeSource(SIZES)
        with Loader(
            source, order_of(source), global_batch=24, rank=rank, world=world, repeats=3, num_workers=0, **FIXED
        ) as loader:
            return next(loader)

    whole = first(0, 1)
    for index in range(2):
        part = first(index, 2)
        assert torch.equal(whole.pixel_values[index::2], part.pixel_values)
        assert torch.equal(whole.labels[index::2], part.labels)
        assert np.array_equal(whole.positions[index::2], part.positions)


def test_extras_get_the_places_of_the_samples():
    seen = []

    def extras(epochs, positions):
        seen.append((epochs, positions))
        return {"noise": torch.from_numpy(positions)}

    source = FakeSource(SIZES)
    for options in ({"num_workers": 2}, {"num_workers": 1, "worker_kind": "process"}):
        with Loader(
            source, order_of(source), global_batch=24, repeats=2, stop=3, extras=extras, **(FIXED | options)
        ) as loader:
            for b in loader:
                assert np.array_equal(b.extras["noise"].numpy(), b.positions)
                assert len(b.epochs) == len(b.positions) == len(b.pixel_values) == 24


@pytest.mark.parametrize("options", [{"num_workers": 2}, {"num_workers": 1, "worker_kind": "process"}], ids=str)
def test_the_fast_decoder_gives_the_same_batches_from_all_workers(options):
    expected = run(FakeSource(SIZES), num_workers=0, decoder="fast", stop=9)
    assert run(FakeSource(SIZES), decoder="fast", stop=9, **options) == expected


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("cursor", [1, 5, 8, 9, 10, 17])  # an epoch is 9.33 batches
@pytest.mark.parametrize("world", [1, 2])
def test_a_new_loader_goes_on_at_the_cursor_of_the_last_batch(expected, cursor, world):
    seen = run(FakeSource(SIZES), world, count=cursor, num_workers=2, depth=5)
    assert sorted(seen) == list(range(cursor))
    rest = run(FakeSource(SIZES), 3 - world, cursor=cursor, num_workers=1)
    assert seen | rest == expected


def test_four_ranks_stopped_at_half_go_on_as_two():
    source, half = FakeSource(SIZES), 9
    whole = run_positions(source, 1, 24, 8, 18)
    assert run_positions(source, 4, 24, 8, half) | run_positions(source, 2, 24, 8, 18, cursor=half) == whole


def test_resume_late_in_imagenet_reads_only_the_open_windows():
    class Counting(FakeSource):
        def read(self, chunk):
            self.reads.append(chunk)
            return None

    sizes, lanes, window = [99] * 12_936, 64, 1
    for world in (1, 4):
        source = Counting(sizes)
        began = time.perf_counter()
        stream = Stream(
            source,
            Order(sizes, 0, lanes, window),
            global_batch=4096,
            world=world,
            cursor=int(0.9 * 99 * 12_936 / 4096),
        )
        next(iter(stream))
        seconds = time.perf_counter() - began
        stream.close()
        assert len(source.reads) <= 3 * lanes * window / world
        assert seconds < 1


def test_reading_ahead_holds_few_chunks_and_reads_each_once():
    sizes, lanes, window = [20] * 299 + [13], 8, 4  # 5,993 rows: the lanes change places from epoch to epoch
    for world in (1, 2):
        reads = 0
        for rank in range(world):
            source = FakeSource(sizes)
            source.read = lambda chunk: None  # type: ignore[method-assign]
            stream = Stream(source, Order(sizes, 1, lanes, window), global_batch=16, rank=rank, world=world, stop=749)
            for _ in stream:
                pass
            stream.close()
            assert stream.most_live <= 1.75 * lanes * window / world + lanes
            reads += stream.num_reads
        # 11,984 samples are two epochs of 300 chunks; a chunk cut by a lane's end may be read for each part.
        assert 600 <= reads <= 600 + 2 * lanes


def test_state_names_what_has_changed():
    source = FakeSource(SIZES)
    state = loader_state(source, order_of(source), 24, "carry")
    assert check_state(state, dict(state), 7) == 7
    for field in ("seed", "lanes", "window", "remainder", "fingerprint", "rows"):
        with pytest.raises(ValueError, match=rf"^{field} was .* in the checkpoint and is 'other' now"):
            check_state(state, state | {field: "other"}, 7)


def test_repeats_may_not_change_and_were_one_before_they_existed():
    source = FakeSource(SIZES)
    state = loader_state(source, order_of(source), 24, "carry", 2)
    assert check_state(state, dict(state), 7) == 7
    old = loader_state(source, order_of(source), 24, "carry")
    del old["repeats"]
    assert check_state(old, loader_state(source, order_of(source), 24, "carry"), 7) == 7
    with pytest.raises(ValueError, match="repeats was 1 in the checkpoint and is 2 now: the order of the samples"):
        check_state(old, state, 7)


def test_global_batch_may_change_where_no_sample_moves():
    source = FakeSource(SIZES)
    state = loader_state(source, order_of(source), 24, "carry")
    assert check_state(state, state | {"global_batch": 36}, 6) == 4
    with pytest.raises(ValueError, match=r"global_batch was 24 .* is 36 now"):
        check_state(state, state | {"global_batch": 36}, 7)
    dropped = state | {"remainder": "drop"}
    with pytest.raises(ValueError, match="global_batch was 24"):
        check_state(dropped, dropped | {"global_batch": 48}, 6)
    # Regrouped, the samples come in the same order.
    before, after = run_positions(source, 1, 24, 8, 6), run_positions(source, 1, 36, 8, 8, cursor=4)
    places = [row[:2] for part in (before, after) for k in sorted(part) for row in part[k]]
    assert places == [(g // N, g % N) for g in range(8 * 36)]


def test_steps_per_epoch_counts_what_is_used():
    assert steps_per_epoch(100, 32, "carry") == 3.125
    assert steps_per_epoch(100, 32, "drop") == 3
    assert steps_per_epoch(10, 32, "carry") == 10 / 32
    with pytest.raises(ValueError, match=r"global_batch=32 is larger .*10 rows.*--data\.remainder carry"):
        steps_per_epoch(10, 32, "drop")


# ------------------------------------------------------------------------------------------------ bad samples


BAD = [3, 60, 61, 62, 63, 64, 65, 66, 100, 47]  # chunk 2 is the single row 47; 60..66 are neighbours


def bad_run(world=1, repeats=1, **options):
    out, listed = {}, []
    for rank in range(world):
        source = FakeSource(SIZES, bad=BAD, broken=[5])
        with Loader(
            source,
            order_of(source),
            global_batch=28 * repeats,
            repeats=repeats,
            rank=rank,
            world=world,
            stop=2 * N // 28,
            max_bad_fraction=0.1,
            **(FIXED | options),
        ) as loader:
            for b in loader:
                rows = zip(b.epochs.tolist(), b.positions.tolist(), b.labels.tolist(), digest(b), strict=True)
                out.setdefault(b.cursor, []).extend(rows)
                listed += b.bad
    return {k: sorted(v) for k, v in out.items()}, sorted(listed, key=lambda s: (s["batch"], s["position"]))


def test_stand_ins_and_their_list_are_the_same_everywhere():
    expected, listed = bad_run(num_workers=0)
    for options in ({"num_workers": 3}, {"num_workers": 1, "world": 2}, {"num_workers": 2, "world": 4}):
        assert bad_run(**options) == (expected, listed)
    assert bad_run(num_workers=2, worker_kind="process") == (expected, listed)

    # Each of two epochs lists every bad row once: ten bad pictures and the 12 rows of the damaged chunk.
    starts = np.cumsum(SIZES) - np.array(SIZES)
    for epoch in (0, 1):
        rows = sorted(starts[int(s["shard"][5:])] + s["row"] for s in listed if s["epoch"] == epoch)
        assert rows == sorted([*BAD, *range(starts[5], starts[5] + 12)])
    reasons = {s["reason"] for s in listed}
    assert "damaged chunk" in reasons
    assert any("not a known image format" in r for r in reasons)


def test_a_bad_image_is_listed_once_however_often_it_is_sampled():
    once = bad_run(num_workers=0)[1]
    batches, listed = bad_run(num_workers=0, repeats=2)
    assert listed == once  # the images' own positions
    for options in ({"num_workers": 2, "world": 2}, {"num_workers": 2, "worker_kind": "process"}):
        assert bad_run(repeats=2, **options) == (batches, listed)
    labels = {(epoch, position): label for rows in batches.values() for epoch, position, label, _ in rows}
    pixels = {(epoch, position): md5 for rows in batches.values() for epoch, position, _, md5 in rows}
    for s in listed:
        first, second = (s["epoch"], 2 * s["position"]), (s["epoch"], 2 * s["position"] + 1)
        assert labels[first] == labels[second]
        assert pixels[first] != pixels[second]


def test_the_stand_in_is_the_next_good_row_with_the_failed_places_own_crop():
    source = FakeSource(SIZES, bad=BAD, broken=[5])
    good = FakeSource(SIZES)
    starts = np.cumsum(source.sizes) - source.sizes
    # Row 3 of chunk 0; 60..66 in chunk 3 (rows 12..18); 47 alone in chunk 2 takes row 0 of chunk 3; chunk 5 that of 6.
    wanted = {3: 4, 47: 48, 100: 101} | dict.fromkeys(range(60, 67), 67)
    wanted |= {int(starts[5]) + r: int(starts[6]) + r for r in range(12)}
    order = order_of(source)
    with Loader(source, order, global_batch=28, stop=8, max_bad_fraction=0.1, num_workers=0, **FIXED) as loader:
        checked = 0
        for b in loader:
            places = order_of(source).locate(b.epochs, b.positions)
            for i, number in enumerate((starts[places.chunks] + places.rows).tolist()):
                if number not in wanted:
                    assert b.labels[i] == number
                    continue
                assert b.labels[i] == wanted[number]
                chunk = int(np.searchsorted(starts, wanted[number], side="right")) - 1
                data = good.read(chunk).images[wanted[number] - starts[chunk]]
                out = np.empty((1, 1, 3, 8, 8), np.uint8)
                at = slice(i, i + 1)
                assert not loader._decoder([data], b.epochs[at], b.positions[at], out)
                assert np.array_equal(out[0, 0], b.pixel_values[i].numpy())
                checked += 1
    assert checked == len(wanted)


@pytest.mark.parametrize("options", [{"num_workers": 0}, {"num_workers": 2}, {"worker_kind": "process"}], ids=str)
def test_a_label_outside_the_classes_ends_the_run_with_its_row(options):
    """The label of a row of FakeSource is its number: all are known to N classes, the last row is not to N - 1."""
    everything = run(FakeSource(SIZES, bad=BAD, broken=[5]), num_classes=N, max_bad_fraction=0.1, **options)
    assert everything == run(FakeSource(SIZES, bad=BAD, broken=[5]), max_bad_fraction=0.1, **options)
    with pytest.raises(
        RuntimeError, match=rf"shard9 row 1 has the label {N - 1}, and the classes are 0 to {N - 2}; mend"
    ):
        run(FakeSource(SIZES), num_classes=N - 1, **options)


def test_a_missing_label_of_a_good_image_is_refused_and_that_of_a_replaced_one_is_not():
    class Unlabelled(FakeSource):
        def read(self, chunk):
            data = super().read(chunk)
            return replace(data, labels=np.where(data.labels == 3, -1, data.labels))

    assert run(Unlabelled(SIZES, bad=[3]), num_classes=N, max_bad_fraction=0.1, num_workers=0)
    with pytest.raises(RuntimeError, match=r"shard0 row 3 has no label, and the classes are"):
        run(Unlabelled(SIZES), num_classes=N, num_workers=0)
    with pytest.raises(RuntimeError, match=r"shard0 row 3 has no label"):  # as the stand-in of row 2
        run(Unlabelled(SIZES, bad=[2]), num_classes=N, num_workers=0)


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_all_augmentation_is_a_function_of_the_position(workers):
    augment = Augment(crop="clamped", scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5-inc1", erase_prob=0.5)
    alone = run(FakeSource(SIZES), num_workers=0, augment=augment)
    assert run(FakeSource(SIZES), world=2, num_workers=2, worker_kind=workers, augment=augment) == alone


def test_augmentation_that_cannot_be_is_refused_when_the_loader_is_made():
    source = FakeSource(SIZES)
    with pytest.raises(ValueError, match="does not begin with rand"):
        Loader(source, order_of(source), global_batch=8, **(FIXED | {"augment": Augment(rand_augment="v0")}))


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_bad_images_are_found_by_counting_and_by_nothing_else(world):
    source = FakeSource(SIZES, bad=range(0, N, 10))  # 23 rows
    loaders = [
        Loader(
            source, order_of(source), global_batch=24, rank=rank, world=world, max_bad_fraction=0.05, stop=28, **FIXED
        )
        for rank in range(world)
    ]
    gathered = [s for loader in loaders for batch in loader for s in batch.bad]  # three epochs, and no error
    gathered.sort(key=lambda s: (s["batch"], s["position"]))
    assert len(gathered) >= 3 * 23
    distinct = list({(s["shard"], s["row"]): s for s in gathered}.values())
    for loader in loaders:  # 0.05 * 224 = 11.2
        loader.count_bad(distinct[:11])
        loader.count_bad(distinct[:11])
        with pytest.raises(
            RuntimeError,
            match=r"12 of 224 images .*max_bad_fraction=0.05.*shard\d+ row \d+: not a known.*--data\.max-bad-fraction",
        ):
            loader.count_bad(distinct[11:12])
        loader.close()


def test_what_was_counted_changes_no_stand_in():
    def batches(counted):
        source = FakeSource(SIZES, bad=BAD, broken=[5])
        with Loader(source, order_of(source), global_batch=28, stop=8, max_bad_fraction=1.0, **FIXED) as loader:
            loader.count_bad(counted)
            return [(b.labels.tolist(), digest(b), b.bad) for b in loader]

    # Good rows that an earlier run listed, such as those that would be the stand-ins.
    listed = [{"shard": f"shard{c}", "row": r, "reason": "x"} for c, n in enumerate(SIZES) for r in range(n)]
    assert batches(listed) == batches([])


@pytest.mark.parametrize(
    ("fraction", "rows", "allowed"),
    [(0.01, 36, 1), (0.01, 999, 9), (0.01, 1000, 10), (0.0001, 999, 1), (0.0001, 1000, 0), (0.0, 36, 0), (1.0, 3, 3)],
)
def test_one_damaged_image_in_a_small_data_set_is_allowed(fraction, rows, allowed):
    assert int(bad_allowed(fraction, rows)) == allowed
    source = FakeSource([rows // 3, rows - rows // 3])
    with Loader(source, order_of(source, 1), global_batch=2, max_bad_fraction=fraction, **FIXED) as loader:
        bad = [{"shard": "shard0", "row": row, "reason": "damaged"} for row in range(allowed + 1)]
        loader.count_bad(bad[:allowed])
        if allowed < rows:
            with pytest.raises(RuntimeError, match="max-bad-fraction"):
                loader.count_bad(bad)


def test_nothing_but_bad_images_ends_at_once():
    source = FakeSource(SIZES, bad=range(N))
    with (
        Loader(source, order_of(source), global_batch=24, max_bad_fraction=1.0, num_workers=2, **FIXED) as loader,
        pytest.raises(RuntimeError, match="none of the 224 images"),
    ):
        next(loader)


def test_real_bad_rows_are_listed_by_shard_row_and_reason(shared):
    path = shared / "data/bad_images/mixed-00000-of-00001.parquet"
    source = open_source(Data(path=str(path)))
    runs = []
    for options in ({"num_workers": 0}, {"num_workers": 2}, {"num_workers": 1, "worker_kind": "process"}):
        with Loader(
            source, order_of(source, 4), global_batch=10, stop=8, max_bad_fraction=0.2, **(FIXED | options)
        ) as loader:
            batches = list(loader)
        runs.append(([digest(b) for b in batches], [s for b in batches for s in b.bad]))
    assert runs[0] == runs[1] == runs[2]
    for epoch in (0, 1):
        rows = {s["row"]: s["reason"] for s in runs[0][1] if s["epoch"] == epoch}
        assert sorted(rows) == [5, 13, 14, 22, 27, 35]
        assert "null" in rows[14]
        assert "0 bytes" in rows[22]
        assert "max_pixels" in rows[35]


def test_a_corrupt_row_group_is_a_group_of_bad_rows(tmp_path):
    path = tmp_path / "data.parquet"
    write_parquet(path, range(60))
    source = open_source(Data(path=str(path)))
    assert isinstance(source, ParquetSource)
    column = source.footers[0].row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    with Loader(source, order_of(source), global_batch=20, stop=3, max_bad_fraction=0.2, **FIXED) as loader:
        bad = [s for b in loader for s in b.bad]
    assert sorted(s["row"] for s in bad) == list(range(20, 30))
    with (
        Loader(source, order_of(source), global_batch=20, max_bad_fraction=0.1, **FIXED) as loader,
        pytest.raises(RuntimeError, match="10 of 60 images"),
    ):
        loader.count_bad(bad)  # ten of sixty are more than a tenth


# ------------------------------------------------------------------------------------------------ the batch itself


def test_a_batch_carries_places_labels_extras_and_waiting_time():
    source = FakeSource(SIZES, delay=0.002)

    def extras(epochs, positions):
        return {"noise": torch.from_numpy(uniforms(5, 0, epochs, positions, 8))}

    for workers, kind in ((0, "thread"), (2, "thread"), (1, "process")):
        with Loader(
            source,
            order_of(source),
            global_batch=24,
            rank=1,
            world=2,
            extras=extras,
            num_workers=workers,
            worker_kind=kind,
            **FIXED,
        ) as loader:
            batch = next(loader)
            assert loader.seconds_waiting > 0
        assert batch.cursor == 1
        assert batch.positions.tolist() == list(range(1, 24, 2))
        assert batch.epochs.tolist() == [0] * 12
        tensors = batch.tensors()
        assert tensors["pixel_values"].shape == (12, 3, 8, 8)
        assert tensors["pixel_values"].dtype == torch.uint8
        assert tensors["labels"].dtype == torch.int64
        expected = uniforms(5, 0, batch.epochs, batch.positions, 8)
        assert np.array_equal(tensors["noise"].numpy(), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_pinning_changes_nothing_without_a_gpu(expected, workers):
    assert run(FakeSource(SIZES), num_workers=workers, pin_memory=not torch.cuda.is_available()) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (1, "process")])
def test_batches_are_pinned_when_asked(workers, kind):
    source = FakeSource(SIZES)
    options = FIXED | {"num_workers": workers, "worker_kind": kind, "pin_memory": True, "stop": 2}
    options["extras"] = lambda epochs, positions: {"noise": torch.zeros(len(positions))}
    with Loader(source, order_of(source), global_batch=24, **options) as loader:
        assert all(tensor.is_pinned() for batch in loader for tensor in batch.tensors().values())


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (2, "thread"), (1, "process")])
def test_loading_touches_no_global_generator(workers, kind):
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    source = FakeSource(SIZES)
    with Loader(
        source, order_of(source), global_batch=24, stop=3, num_workers=workers, worker_kind=kind, **FIXED
    ) as loader:
        list(loader)
    load_examples(source, 20, seed=0, image_size=(8, 8), channels=3)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_uneven_processes_and_ranks_are_refused():
    source = FakeSource(SIZES)
    with pytest.raises(ValueError, match="global_batch=25 is not a multiple of the 2 processes"):
        Loader(source, order_of(source), global_batch=25, world=2, **FIXED)
    with pytest.raises(ValueError, match="global_batch=24 is not a multiple of the 2 processes times repeats=5"):
        Loader(source, order_of(source), global_batch=24, world=2, repeats=5, **FIXED)
    with pytest.raises(ValueError, match="repeats=0 must be at least 1"):
        Loader(source, order_of(source), global_batch=24, repeats=0, **FIXED)
    with pytest.raises(ValueError, match="num_workers=-1"):
        Loader(source, order_of(source), global_batch=24, num_workers=-1, **FIXED)


def test_description_gives_memory_classes_and_warnings(tmp_path):
    write_parquet(tmp_path / "data.parquet", range(60))
    source = open_source(Data(path=str(tmp_path)))
    lines = Loader(source, order_of(source), global_batch=24, **FIXED).describe()
    assert lines[0].startswith("order: 8 lanes, 2 chunks a window: 60 rows mixed, about 0 MB")
    assert "classes: 3 of 3" in lines[1]
    assert len(lines) == 2
    lines = Loader(source, order_of(source), global_batch=24, repeats=4, **FIXED).describe()
    assert lines[1].startswith("repeats: 4 samples of each image, 6 different images a batch")
    source.bytes_per_row = 1e9
    lines = Loader(source, order_of(source), global_batch=24, world=3, **FIXED).describe()
    assert "8 lanes over 3 processes" in lines[2]
    assert "row group" in lines[3]


# ------------------------------------------------------------------------------------------------ ending


def extra_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith(("reader", "decode", "examples"))]


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (3, "thread"), (2, "process")])
def test_closing_mid_epoch_leaves_nothing_behind(workers, kind):
    import multiprocessing

    source = FakeSource(SIZES, delay=0.01)
    options = dict(FIXED, num_workers=workers, worker_kind=kind)
    first = Loader(source, order_of(source), global_batch=24, **options)
    second = Loader(source, order_of(source), global_batch=24, **options)  # two at once
    next(first), next(second), next(first)
    began = time.perf_counter()
    first.close()
    second.close()
    first.close()  # twice is fine
    assert time.perf_counter() - began < 5
    assert extra_threads() == []
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="closed"):
        next(first)
    Loader(source, order_of(source), global_batch=24, **options).close()  # never begun
    assert extra_threads() == []


@pytest.mark.parametrize(("workers", "kind"), [(0, "thread"), (3, "thread"), (2, "process")])
def test_an_error_while_reading_surfaces_and_ends_everything(workers, kind):
    source = FakeSource(SIZES, fails=4)
    loader = Loader(source, order_of(source), global_batch=24, num_workers=workers, worker_kind=kind, **FIXED)
    with pytest.raises(RuntimeError, match="shard 4 is gone"):
        for _ in loader:
            pass
    assert extra_threads() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_programming_error_is_not_taken_for_a_bad_image(workers, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a bug of ours")

    monkeypatch.setattr(decoding, "sample_pixels", broken)
    source = FakeSource(SIZES)
    with (
        Loader(source, order_of(source), global_batch=24, num_workers=workers, **FIXED) as loader,
        pytest.raises(TypeError, match="a bug of ours"),
    ):
        next(loader)


@pytest.mark.multiprocess
def test_worker_processes_outlive_a_group_sigterm_and_end_with_their_parent(tmp_path):
    code = f"""
import os, signal, sys, time
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]
signal.signal(signal.SIGTERM, lambda *a: None)
from samples import FakeSource
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order
from hf_mae.recipes.base import Augment
if __name__ == "__main__":
    source = FakeSource([30] * 10)
    loader = Loader(source, Order(source.sizes, 0, 4, 1), augment=Augment(), image_size=(8, 8), channels=3,
                    global_batch=30, num_workers=1, worker_kind="process")
    next(loader)
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.2)
    for _ in range(12):
        next(loader)
    print("alive", flush=True)
    # not closed: the exit has to cope
"""
    script = tmp_path / "run.py"
    script.write_text(code)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "alive", done.stderr
    assert done.returncode in (0, -signal.SIGTERM)
    assert time.perf_counter() - began < 50


@pytest.mark.multiprocess
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch ends the workers after up to five seconds")
def test_no_worker_outlives_a_killed_parent(tmp_path):
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(Path(__file__).parent)!r}]
from samples import FakeSource
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order
from hf_mae.recipes.base import Augment
if __name__ == "__main__":
    import multiprocessing
    source = FakeSource([30] * 10)
    loader = Loader(source, Order(source.sizes, 0, 4, 1), augment=Augment(), image_size=(8, 8), channels=3,
                    global_batch=30, num_workers=2, worker_kind="process")
    next(loader)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "run.py").write_text(code)
    with open(tmp_path / "out", "w+") as out:  # a pipe would be held open by the workers
        done = subprocess.run(
            [sys.executable, str(tmp_path / "run.py")],
            stdout=out,
            timeout=60,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == -signal.SIGKILL
    workers = (tmp_path / "out").read_text().split()
    assert len(workers) == 2

    def is_alive(worker: str) -> bool:
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + 3
    while (left := [worker for worker in workers if is_alive(worker)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


# ------------------------------------------------------------------------------------------------ fixed subsets


def test_examples_are_fixed_central_distinct_and_spread():
    source = FakeSource([50] * 200)
    pixels, labels = load_examples(source, 130, seed=1, image_size=(8, 8), channels=3)
    again = load_examples(FakeSource([50] * 200), 130, seed=1, image_size=(8, 8), channels=3)
    assert torch.equal(pixels, again[0])
    assert torch.equal(labels, again[1])
    assert len(set(labels.tolist())) == 130
    assert len(set(source.reads)) == len(source.reads) == 64  # not all 200 chunks, and each once
    assert np.bincount(labels.numpy() // 50).max() == 3
    other = load_examples(source, 130, seed=2, image_size=(8, 8), channels=3)[1]
    assert not torch.equal(labels, other)
    number = int(labels[7])
    data = source.read(number // 50).images[number % 50]
    assert np.array_equal(pixels[7].numpy(), eval_image(decode_image(data), (8, 8)))


def test_examples_pass_over_bad_images_and_stop_at_the_end():
    source = FakeSource(SIZES, bad=range(0, N, 2), broken=[1])
    pixels, labels = load_examples(source, 1000, seed=0, image_size=(SIDE, SIDE), channels=1)
    good = [i for i in range(N) if i % 2 and not 40 <= i < 47]
    assert sorted(labels.tolist()) == good
    assert pixels.shape == (len(good), 1, SIDE, SIDE)
    assert len(load_examples(source, 90, seed=0, image_size=(8, 8), channels=3)[1]) == 90


def test_examples_look_further_where_many_are_bad_but_not_at_everything():
    sizes = [50] * 400
    source = FakeSource(sizes, bad=[i for i in range(20_000) if i % 10], broken=range(1, 400, 2))
    pixels, labels = load_examples(source, 300, seed=1, image_size=(8, 8), channels=3)
    assert len(pixels) == len(set(labels.tolist())) == 300
    assert 64 < len(set(source.reads)) == len(source.reads) < 200
    # Five good rows a chunk, and all chunks together hold enough only when each gives all.
    source = FakeSource([50] * 60, bad=[i for i in range(3000) if i % 10])
    labels = load_examples(source, 299, seed=1, image_size=(8, 8), channels=3)[1]
    assert len(set(labels.tolist())) == 299
    assert len(source.reads) <= 4 * 60


def test_examples_of_nothing_but_bad_images_give_the_first_reasons_soon():
    source = FakeSource([50] * 400, bad=range(20_000))
    source.where = "some folder"
    with pytest.raises(
        ValueError,
        match=r"some folder: none of the 3,200 images looked at .*; first shard\d+ row \d+: not a",
    ):
        load_examples(source, 300, seed=1, image_size=(8, 8), channels=3)
    assert len(source.reads) == 64
    source = FakeSource([5] * 4, broken=range(4))
    with pytest.raises(ValueError, match=r"none of the 20 images .* row 0: damaged chunk"):
        load_examples(source, 3, seed=1, image_size=(8, 8), channels=3)
