"""The order: exactly once, the same in any batch, well mixed, cheap."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_mae.data.order import Order, choose_lanes_and_window, mix, permutation, uniforms
from hf_mae.recipes.base import Data

SIZES = {
    "one chunk": [997],
    "three chunks": [5, 300, 61],
    "single rows": [1] * 150,
    "two rows": [2],
    "mixed": np.random.default_rng(0).integers(1, 90, 97).tolist(),
}


def reference(sizes, seed, lanes, window, epoch):
    """The order written out with lists, position by position."""
    chunks = permutation(len(sizes), seed, 1, epoch).tolist()
    line = [(c, r) for c in chunks for r in range(sizes[c])]
    ends = np.cumsum([sizes[c] for c in chunks]).tolist()
    share, longer = divmod(len(line), lanes)
    places, start = {}, 0
    for l in range(lanes):
        stop = start + share + (l < longer)
        inside = [e for e in ends if start < e < stop]
        cuts = [start, *inside[l * window // lanes :: window], stop]
        for w, (a, b) in enumerate(itertools.pairwise(cuts)):
            for t, i in enumerate(permutation(b - a, seed, 2, epoch, l, w).tolist()):
                places[(a - start + t) * lanes + l] = line[a + i]
        start = stop
    return [places[p] for p in range(len(line))]


def test_permutation_is_the_golden_one():
    assert permutation(8, 1, 2, 3).tolist() == [3, 6, 5, 1, 4, 0, 2, 7]


def test_mix_is_splitmix64_in_plain_integers():
    def plain(*words):
        mask, h = 2**64 - 1, 0x9E3779B97F4A7C15
        for word in words:
            h = ((word & mask ^ h) + 0x9E3779B97F4A7C15) & mask
            h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & mask
            h = (h ^ h >> 27) * 0x94D049BB133111EB & mask
            h ^= h >> 31
        return h

    for words in ((0,), (1, 2, 3), (2**63, 5), (7, 0, 2**40)):
        assert int(mix(*(np.uint64(w) for w in words))) == plain(*words)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("lanes", "window"), [(8, 2), (8, 1), (64, 4), (1, 3), (3, 1)])
def test_order_equals_the_written_out_reference_and_is_exactly_once(sizes, lanes, window):
    n = sum(sizes)
    for epoch in (0, 1):
        places = Order(sizes, 3, lanes, window).locate(np.full(n, epoch), np.arange(n))
        found = list(zip(places.chunks.tolist(), places.rows.tolist(), strict=True))
        assert found == reference(sizes, 3, lanes, window, epoch)
        assert sorted(found) == [(c, r) for c, size in enumerate(sizes) for r in range(size)]


def test_batches_of_any_size_and_start_see_the_same_order():
    sizes = SIZES["mixed"]
    n = sum(sizes)
    whole = Order(sizes, 5, 8, 2).locate(np.repeat([0, 1], n), np.tile(np.arange(n), 2))
    for batch, start in ((7, 0), (100, n - 150), (1, n - 3), (n, n // 2)):
        order = Order(sizes, 5, 8, 2)
        for g in range(start, min(start + 5 * batch, 2 * n - batch), batch):
            at = np.arange(g, g + batch)
            places = order.locate(at // n, at % n)
            assert np.array_equal(places.chunks, whole.chunks[at])
            assert np.array_equal(places.rows, whole.rows[at])


def test_epochs_and_seeds_are_unrelated():
    sizes, n = [20] * 100, 2000
    start = np.arange(100) * 20

    def numbers(seed, epoch):
        places = Order(sizes, seed, 8, 4).locate(np.full(n, epoch), np.arange(n))
        return start[places.chunks] + places.rows

    base = numbers(0, 0)
    for other in (numbers(0, 1), numbers(1, 0), np.arange(n)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1  # 4.5 standard deviations of 2,000 independent pairs


def test_sorted_classes_are_mixed_as_measured():
    # 128,000 rows in class order, 128 a class, row groups of 100: 64 lanes of 4 groups see 25,600 rows at a time.
    n, classes = 128_000, 1000
    order = Order([100] * (n // 100), 0, 64, 4)
    places = order.locate(np.zeros(n, int), np.arange(n))
    label = (places.chunks * 100 + places.rows) * classes // n
    per_batch = [len(set(label[a : a + 4096].tolist())) for a in range(0, n - 4096, 4096)]
    assert np.mean(per_batch) > 250
    same = (label[1:] == label[:-1]).mean() * classes
    assert same < 1.2
    assert abs(np.corrcoef(np.arange(n), label)[0, 1]) < 0.1


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(4, 3, np.zeros(250_000, np.int64), np.arange(250_000))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 1e-3
    assert abs(u.var() * 12 - 1) < 4e-3
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(u[:-lag, 0], u[lag:, 0])[0, 1]) < 6e-3  # 3 standard deviations of 250,000 pairs
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 6e-3


def test_uniforms_depend_on_each_input_and_not_on_the_batch():
    epochs, positions = np.array([0, 0, 1]), np.array([4, 5, 4])
    u = uniforms(3, 7, epochs, positions)
    assert (
        len({row.tobytes() for row in (*u, *uniforms(3, 8, epochs, positions), *uniforms(3, 7, epochs, positions, 8))})
        == 9
    )
    assert np.array_equal(u[1:2], uniforms(3, 7, epochs[1:2], positions[1:2]))


def test_no_global_generator_is_touched():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    Order([5, 6], 0, 2, 1).locate([0, 0], [0, 1])
    uniforms(4, 0, np.zeros(3, np.int64), np.arange(3))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(
    ("sizes", "bytes_per_row", "expected"),
    [
        ([100] * 12_936, 900.0, (64, 2)),  # 8,192 rows in chunks of 100
        ([100] * 12_936, 110_000.0, (64, 1)),  # two windows of 11 MB a lane would exceed 1 GiB
        ([100] * 12_936, 400_000.0, (16, 1)),  # so would one
        ([1] * 5000, 1e5, (64, 16)),  # single rows are shuffled already
        ([10], 100.0, (8, 103)),  # ten rows fill no 64 lanes
    ],
)
def test_lanes_and_window_follow_rows_and_bytes(sizes, bytes_per_row, expected):
    assert choose_lanes_and_window(sizes, bytes_per_row, Data()) == expected


def test_fixed_lanes_are_kept_and_nonsense_is_refused():
    assert choose_lanes_and_window([100] * 100, 1e6, Data(lanes=48))[0] == 48
    for field in ("lanes", "window_rows", "window_bytes"):
        with pytest.raises(ValueError, match=rf"data\.{field}=0"):
            choose_lanes_and_window([10], None, replace(Data(), **{field: 0}))
    with pytest.raises(ValueError, match="at least 1"):
        Order([3, 0], 0, 1, 1)


def test_imagenet_sized_index_is_cheap():
    # 1.28 M rows in 12,936 row groups: 4 ms measured for a table, 0.5 s allows for a loaded machine.
    order = Order([99] * 12_936, 0, 64, 1)
    began = time.perf_counter()
    order.locate(np.zeros(4096, np.int64), np.arange(4096))
    assert time.perf_counter() - began < 0.5
