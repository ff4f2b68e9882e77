from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest

from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.recipes.base import VIT_SIZES, Model


def test_recipe_model_has_the_fields_and_defaults_of_the_config():
    config = {
        name: parameter.default
        for name, parameter in inspect.signature(MAEConfig.__init__).parameters.items()
        if name not in ("self", "kwargs", "pool", "drop_path_rate", "head", "head_init_std")  # of the classifier
    }
    recipe = {field.name: field.default for field in fields(Model)}
    # A config file that does not say means raw pixels, as transformers' does; a recipe trains the paper's best target.
    assert config.pop("norm_pix_loss") is False
    assert recipe.pop("norm_pix_loss") is True
    assert recipe == config


@pytest.mark.parametrize("changes", [{}, {"image_size": (32, 64), "patch_size": (8, 16), "mask_strategy": "block"}])
def test_config_survives_its_file(tmp_path, changes):
    config = MAEConfig(**changes)
    config.save_pretrained(tmp_path)
    loaded = MAEConfig.from_pretrained(tmp_path)
    names = set(inspect.signature(MAEConfig.__init__).parameters) - {"self", "kwargs"}
    assert {name: getattr(loaded, name) for name in names} == {name: getattr(config, name) for name in names}


def test_grid_counts_patches_of_non_square_images():
    config = MAEConfig(image_size=(32, 96), patch_size=(8, 16), num_channels=4)
    assert (config.grid, config.num_patches, config.patch_dim) == ((4, 6), 24, 8 * 16 * 4)


@pytest.mark.parametrize(
    ("num_patches", "ratio", "kept"), [(100, 0.9, 9), (100, 0.8, 19), (16, 0.3, 11), (196, 0.75, 49), (16, 0.0, 16)]
)
def test_len_keep_truncates_like_the_official_code(num_patches, ratio, kept):
    config = MAEConfig(image_size=(4, 4 * num_patches), patch_size=4, mask_ratio=ratio)
    assert config.len_keep == kept


@pytest.mark.parametrize("size", VIT_SIZES)
def test_named_sizes_build_and_take_overrides(size):
    config = MAEConfig.from_size(size, mask_ratio=0.5)
    assert config.hidden_size == VIT_SIZES[size]["hidden_size"]
    assert config.intermediate_size == 4 * config.hidden_size
    assert config.patch_size == (14 if size == "h" else 16)
    assert config.mask_ratio == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 230}, r"image_size=230 is not a multiple of patch_size=16; use 224 or 240\."),
        ({"image_size": 8}, r"image_size=8 is not a multiple of patch_size=16; use 16\."),
        (
            {"image_size": (224, 230)},
            r"image_size=\(224, 230\) is not a multiple of patch_size=16; use width 224 or 240",
        ),
        ({"image_size": (1, 2, 3)}, r"image_size=\(1, 2, 3\) is not a size in pixels"),
        ({"patch_size": 0}, r"patch_size=0 is not a size in pixels"),
        ({"mask_ratio": 1.0}, r"mask_ratio=1.0 is outside \[0, 1\)"),
        ({"mask_ratio": -0.1}, r"mask_ratio=-0.1 is outside \[0, 1\)"),
        ({"image_size": 32, "mask_ratio": 0.9}, r"mask_ratio=0.9 keeps none of the 4 patches; use at most 0.75"),
        ({"hidden_size": 770}, r"hidden_size=770 is not a multiple of num_attention_heads=12; use 768 or 780"),
        ({"hidden_size": 90, "num_attention_heads": 9}, r"hidden_size=90 is not a multiple of 4, .*use 88 or 92"),
        ({"decoder_hidden_size": 500}, r"decoder_hidden_size=500 is not a multiple of decoder_num_attention_heads=16"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers=0 is not positive"),
        ({"mask_strategy": "stripes"}, r"mask_strategy='stripes' is unknown; use one of random, block, grid"),
        ({"mask_strategy": "grid", "mask_ratio": 0.6}, r"mask_strategy='grid' cannot remove mask_ratio=0.6"),
        ({"mask_strategy": "grid", "image_size": 240}, r"cannot remove mask_ratio=0.75 of 15 x 15 patches"),
        ({"target": "pca"}, r"target='pca' is not available yet; use 'pixel'"),
        ({"target": "colour"}, r"target='colour' is unknown; use 'pixel'"),
        ({"pos_embed": "rope"}, r"pos_embed='rope' is unknown; use 'sincos' or 'learned'"),
        ({"pool": "max"}, r"pool='max' is unknown; use 'mean' or 'cls'"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps=0.0 is not positive"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 is outside \[0, 1\)"),
        ({"head": "mlp"}, r"head='mlp' is unknown; use 'linear' or 'batchnorm'"),
        ({"head_init_std": -1.0}, r"head_init_std=-1.0 is negative or not finite; the official values are 2e-5"),
        ({"head_init_std": float("nan")}, r"head_init_std=nan is negative or not finite"),
    ],
)
def test_contradictions_are_refused_with_value_rule_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        MAEConfig(**changes)


def test_learned_positions_need_no_multiple_of_four():
    assert MAEConfig(hidden_size=90, num_attention_heads=9, pos_embed="learned").hidden_size == 90


def test_unknown_size_lists_the_names():
    with pytest.raises(ValueError, match=r"size='xl' is unknown; use one of ti, s, b, l, h"):
        MAEConfig.from_size("xl")


def write_config(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))


def test_vit_mae_config_keeps_its_own_epsilon_and_target(tmp_path):
    write_config(
        tmp_path, model_type="vit_mae", layer_norm_eps=1e-12, norm_pix_loss=True, hidden_size=384, mask_ratio=0.5
    )
    config = MAEConfig.from_pretrained(tmp_path)
    assert (config.layer_norm_eps, config.norm_pix_loss, config.hidden_size) == (1e-12, True, 384)
    assert (config.mask_ratio, config.model_type) == (0.5, "hf_mae")


def test_vit_mae_config_that_is_silent_means_what_transformers_means(tmp_path):
    write_config(tmp_path, model_type="vit_mae")
    config = MAEConfig.from_pretrained(tmp_path)
    assert (config.layer_norm_eps, config.norm_pix_loss, config.intermediate_size) == (1e-12, False, 3072)


def test_vit_mae_config_with_dropout_is_refused(tmp_path):
    write_config(tmp_path, model_type="vit_mae", hidden_dropout_prob=0.1)
    with pytest.raises(ValueError, match=r"hidden_dropout_prob=0.1 of a vit_mae config has no equivalent"):
        MAEConfig.from_pretrained(tmp_path)


def test_config_of_another_architecture_is_refused(tmp_path):
    write_config(tmp_path, model_type="bert")
    with pytest.raises(ValueError, match=r"has model_type='bert', which is not a masked autoencoder"):
        MAEConfig.from_pretrained(tmp_path)
