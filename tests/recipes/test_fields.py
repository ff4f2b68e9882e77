"""Values of a command line become those of a recipe's fields, or a sentence that says what is wrong."""

from __future__ import annotations

import pytest

from hf_mae.recipes.base import flat
from hf_mae.recipes.fields import as_text, parse_values, with_field
from hf_mae.recipes.supervised import SUPERVISE

RECIPE = SUPERVISE["rexnet-birds-published-intended"]


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("augment.label_smoothing", "0,0.02,.06", [0.0, 0.02, 0.06]),
        ("data.repeat_augment", "1, 3", [1, 3]),
        ("augment.flip", "true,false", [True, False]),
        ("optim.name", "adamw,lamb", ["adamw", "lamb"]),
        ("augment.rotate", "15 25,40,", [(15.0, 25.0), (40.0,), ()]),
        ("augment.scale", "0.08 1", [(0.08, 1.0)]),
        ("augment.auto_augment", "original,none", ["original", None]),
        ("augment.rand_augment", "None,rand-m9-mstd0.5", [None, "rand-m9-mstd0.5"]),
        ("model.image_size", "160,160 224", [160, (160, 224)]),
        ("micro_batch", "auto,32,none", ["auto", 32, None]),
        ("optim.agc", "none,0.01", [None, 0.01]),
    ],
)
def test_values_have_the_type_of_their_field(field, text, values):
    parsed = parse_values(RECIPE, field, text)
    assert [(type(v), v) for v in parsed] == [(type(v), v) for v in values]
    assert [parse_values(RECIPE, field, as_text(v))[0] for v in parsed] == values  # text and back
    for value in values:
        assert flat(with_field(RECIPE, field, value)) == flat(RECIPE) | {field: value}


@pytest.mark.parametrize(
    ("field", "text", "said"),
    [
        ("augment.label_smoothing", "0.1,x", "augment.label_smoothing='x' is not a number"),
        ("data.repeat_augment", "1.5", "data.repeat_augment='1.5' is not a whole number"),
        ("augment.flip", "yes", "augment.flip='yes' is not true or false"),
        ("optim.name", "adamw,lam", "optim.name='lam' is not adamw, adam, lamb"),
        ("augment.scale", "0.1", "augment.scale='0.1' is not 2 of float"),
        ("augment.auto_augment", "v1", "augment.auto_augment='v1' is not original, v0 or none"),
        ("label_smoothing", "0.1", "'label_smoothing' is unknown to a SuperviseRecipe; did you mean augment.label_sm"),
        ("optim.base_rl", "0.1", "'optim.base_rl' is unknown to a SuperviseRecipe; did you mean optim.base_lr"),
        ("optim", "0.1", "field 'optim' is a group; name one of its fields: optim.base_lr"),
        ("seed", "1,2", "seed is what a sweep sets by itself"),
    ],
)
def test_mistakes_are_named(field, text, said):
    with pytest.raises(ValueError, match=".*" + said.replace(".", r"\.")):
        parse_values(RECIPE, field, text)
