"""What the page does: one picture masked and predicted, one classified, and each thing a visitor can get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor, ViTConfig, ViTForImageClassification, pipeline

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.data.images import decode_image, eval_image
from hf_mae.demo.models import (
    classify_picture,
    load_classifier,
    load_reconstructor,
    reconstruct_picture,
    shown_name,
)
from hf_mae.models.timm_models import create, write_timm_folder
from hf_mae.models.timm_spec import TimmSpec

CONFIG = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
LABELS = {0: "ant", 1: "bee", 2: "cat"}


def _write_processor(folder: Path) -> None:
    processor = BitImageProcessor(
        do_convert_rgb=True, size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}, resample=3
    )
    processor.image_mean, processor.image_std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    processor.save_pretrained(folder)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    MAEForPreTraining(MAEConfig(**CONFIG)).save_pretrained(tmp_path / "pretrained")
    _write_processor(tmp_path / "pretrained")
    return tmp_path / "pretrained"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Noise of 40 x 24 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def _pixels(picture: Image.Image, side: int = 16) -> np.ndarray:
    """Undo the enlargement of a tile."""
    factor = picture.width // side
    return np.asarray(picture)[::factor, ::factor]


@pytest.mark.parametrize(("strategy", "ratio"), [("random", 0.5), ("random", 0.9), ("block", 0.75), ("grid", 0.5)])
def test_the_share_of_patches_asked_for_is_removed_and_the_others_are_kept(pretrained, photo, strategy, ratio):
    tiles, note = reconstruct_picture(
        load_reconstructor(str(pretrained)), photo, mask_ratio=ratio, strategy=strategy, seed=0
    )
    assert [name for _, name in tiles] == ["original", "masked", "predicted", "pasted"]
    original, masked, predicted, pasted = (_pixels(tile) for tile, _ in tiles)
    np.testing.assert_array_equal(original.transpose(2, 0, 1), eval_image(decode_image(photo.read_bytes()), (16, 16)))
    grey = (masked == 128).all(-1).reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16).all(-1)
    assert grey.sum() == 16 - int(16 * (1 - ratio))
    assert f"{grey.sum()} of 16 patches removed" in note
    hidden = grey.reshape(4, 4).repeat(4, 0).repeat(4, 1)[..., None]
    np.testing.assert_array_equal(pasted, np.where(hidden, predicted, original))


def test_the_seed_chooses_the_mask_and_the_model_keeps_its_settings(pretrained, photo):
    reconstructor = load_reconstructor(str(pretrained))

    def masked(seed: int) -> np.ndarray:
        tiles, _ = reconstruct_picture(reconstructor, photo, mask_ratio=0.5, strategy="random", seed=seed)
        return np.asarray(tiles[1][0])

    np.testing.assert_array_equal(masked(0), masked(0))
    assert (masked(0) != masked(1)).any()
    assert (reconstructor.model.config.mask_ratio, reconstructor.model.config.mask_strategy) == (0.75, "random")


def test_true_statistics_are_told_only_where_they_are_used(pretrained, photo):
    reconstructor = load_reconstructor(str(pretrained))
    for uses in (True, False):
        reconstructor.model.config.norm_pix_loss = uses
        _, note = reconstruct_picture(reconstructor, photo, mask_ratio=0.5, strategy="random", seed=0)
        assert ("true ones were put back" in note) == uses


@pytest.mark.parametrize(
    ("mode", "size"), [("L", (7, 90)), ("P", (300, 20)), ("RGBA", (16, 16)), ("CMYK", (33, 17)), ("I;16", (20, 20))]
)
def test_pictures_of_any_mode_and_size_are_taken(pretrained, tmp_path, mode, size):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new(mode, size, 40).save(path)
    tiles, _ = reconstruct_picture(
        load_reconstructor(str(pretrained)), path, mask_ratio=0.75, strategy="random", seed=0
    )
    assert {tile.size for tile, _ in tiles} == {(224, 224)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mask_ratio": 0}, "removes none of the 16 patches"),
        ({"mask_ratio": 0.95}, "keeps none of the 16 patches"),
        ({"strategy": "grid", "mask_ratio": 0.6}, "use mask_ratio 0.5 or 0.75"),
        ({"strategy": "spiral"}, "use one of random, block, grid"),
        ({"seed": -1}, "seed=-1 is out of range; take 0 to 9007199254740991"),
        ({"seed": 2**53}, "is out of range"),
        ({"seed": 10**30}, r"seed=1e\+30 is out of range"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_remedy(pretrained, photo, change, said):
    settings = {"mask_ratio": 0.75, "strategy": "random", "seed": 0} | change
    with pytest.raises(ValueError, match=said):
        reconstruct_picture(load_reconstructor(str(pretrained)), photo, **settings)


def test_a_file_that_is_no_picture_is_refused(pretrained, tmp_path):
    (tmp_path / "notes.png").write_text("hello")
    with pytest.raises(ValueError, match=r"this picture cannot be used: not a known image format.*take a JPEG"):
        reconstruct_picture(
            load_reconstructor(str(pretrained)), tmp_path / "notes.png", mask_ratio=0.75, strategy="random", seed=0
        )


def test_only_a_pretraining_model_reconstructs(tmp_path):
    config = MAEConfig(**CONFIG)
    MAEModel(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"holds MAEModel, which cannot reconstruct; name a pretraining model"):
        load_reconstructor(str(tmp_path / "encoder"))
    MAEForPreTraining(config).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        load_reconstructor(str(tmp_path / "bare"))


def test_our_classifier_scores_as_its_model_does(tmp_path, photo):
    torch.manual_seed(0)
    config = MAEConfig(**CONFIG, id2label=LABELS, label2id={v: k for k, v in LABELS.items()})
    model = MAEForImageClassification(config)
    torch.nn.init.normal_(model.head.weight)
    model.eval().save_pretrained(tmp_path / "model")
    _write_processor(tmp_path / "model")
    scores = classify_picture(load_classifier(str(tmp_path / "model")), photo)
    pixels = torch.from_numpy(eval_image(decode_image(photo.read_bytes()), (16, 16)).copy()).float() / 255
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    with torch.no_grad():
        expected = model(((pixels - mean) / std)[None]).logits.softmax(-1)[0].tolist()
    assert scores == pytest.approx(dict(zip(LABELS.values(), expected, strict=True)), abs=1e-6)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {k: v for k, v in CONFIG.items() if not k.startswith("decoder")} | {"intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path / "stock")
    _write_processor(tmp_path / "stock")
    return tmp_path / "stock"


def test_a_stock_classifier_answers_as_its_pipeline_does(stock, photo):
    answers = pipeline("image-classification", model=str(stock))(str(photo))
    scores = classify_picture(load_classifier(str(stock)), photo)
    assert scores == pytest.approx({a["label"]: a["score"] for a in answers}, abs=1e-6)


def test_two_classes_of_one_name_both_appear(stock, photo):
    config = json.loads((stock / "config.json").read_text())
    config |= {"id2label": {"0": "crane", "1": "crane", "2": "cat"}, "label2id": {"crane": 0, "cat": 2}}
    (stock / "config.json").write_text(json.dumps(config))
    scores = classify_picture(load_classifier(str(stock)), photo)
    assert len(scores) == 3
    assert sum(scores.values()) == pytest.approx(1)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_a_timm_classifier_is_read_by_what_it_was_trained_for(tmp_path, photo, loss):
    torch.manual_seed(0)
    spec = TimmSpec(
        architecture="test_resnet",
        names=("ant", "bee", "cat"),
        image_size=(32, 32),
        test_image_size=(32, 32),
        crop_pct=0.95,
        channels=3,
        drop_path_rate=0.0,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        loss=loss,
    )
    write_timm_folder(tmp_path / "timm", spec, create(spec).state_dict())
    classifier = load_classifier(str(tmp_path / "timm"))
    assert classifier.each_on_its_own == (loss == "bce")
    total = sum(classify_picture(classifier, photo).values())
    assert (total == pytest.approx(1)) == (loss == "ce")


def test_a_classifier_that_stock_code_cannot_load_is_refused(stock):
    (stock / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"classify=.* cannot be loaded as an image classifier"):
        load_classifier(str(stock))


def test_code_in_a_repository_is_not_run(stock):
    config = json.loads((stock / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForImageClassification": "code.Model"}}
    (stock / "config.json").write_text(json.dumps(config))
    (stock / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="cannot be loaded as an image classifier"):
        load_classifier(str(stock))


def test_a_page_shows_no_paths_of_this_machine(tmp_path):
    assert shown_name(str(tmp_path)) == tmp_path.name
    assert shown_name("org/mae-vit-t") == "org/mae-vit-t"


def test_a_run_is_called_by_its_recipe(tmp_path):
    (tmp_path / "train").mkdir()
    recipe = tmp_path / "train" / "recipe.json"
    for text, name in (('{"name": "mae-vit-t-birds"}', "mae-vit-t-birds"), ("{}", "train"), ("no JSON", "train")):
        recipe.write_text(text)
        assert shown_name(str(tmp_path / "train")) == name


def _drop_a_weight(path: Path) -> None:
    weights = load_file(path)
    del weights["vit.encoder.layer.0.output.dense.weight"]
    save_file(weights, path, metadata={"format": "pt"})


def _spoil_a_weight(path: Path) -> None:
    weights = load_file(path)
    weights["classifier.bias"] = torch.full_like(weights["classifier.bias"], torch.nan)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (lambda path: path.unlink(), "has no model.safetensors"),
        (_drop_a_weight, "lacks the weights"),
        (_spoil_a_weight, "classifier.bias .* is not finite"),
    ],
)
def test_stock_classifiers_with_broken_weights_are_refused(tmp_path, harm, said):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    _write_processor(tmp_path / "vit")
    assert load_classifier(str(tmp_path / "vit")).channels == 3
    harm(tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match=f"(?s)classify=.*{said}.*name a classifier"):
        load_classifier(str(tmp_path / "vit"))
