"""Micro-batches of a model that takes statistics of them: one image has none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from hf_mae.recipes.base import Data, Recipe
from hf_mae.recipes.checks import choose_micro_batch


@dataclass(frozen=True, kw_only=True)
class WithStatistics(Recipe):
    """A recipe whose model normalises by the statistics of a micro-batch."""

    max_micro_batch = 512
    min_micro_batch = 2


RECIPE = WithStatistics(name="", source="", expected="")


@pytest.mark.parametrize(
    ("batch", "processes", "repeats", "remedies"),
    [
        (521, 1, 1, (520, 522)),  # a prime above the largest micro-batch
        (521 * 3, 3, 1, (1560, 1566)),
        (1, 1, 1, (2,)),
        (2, 2, 1, (4,)),
    ],
)
def test_a_batch_that_leaves_single_images_is_refused_with_one_that_does_not(batch, processes, repeats, remedies):
    recipe = replace(RECIPE, global_batch=batch, data=Data(repeats=repeats))
    with pytest.raises(ValueError, match=rf"takes statistics of at least 2; use {' or '.join(map(str, remedies))}$"):
        choose_micro_batch(recipe, processes)
    for remedy in remedies:
        assert choose_micro_batch(replace(recipe, global_batch=remedy), processes) >= 2


def test_memory_for_one_image_is_taken_for_two():
    assert choose_micro_batch(replace(RECIPE, global_batch=512, micro_batch="auto"), 1, measured=1) == 2
