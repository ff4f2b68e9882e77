"""Files of others become folders of this package: recognised, compared with their own library, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from hf_mae.exporting import convert as converting
from hf_mae.exporting import official
from hf_mae.exporting.convert import convert, imagenet_names
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
GIVEN = {"num_attention_heads": 2, "decoder_num_attention_heads": 2}


def shaken(model: nn.Module) -> nn.Module:
    """Give all weights but the fixed positions values of their own, so that a lost bias or norm shows."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "pos_embed" not in name and "position_embeddings" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def pth(tmp_path, model: nn.Module, name: str, **content):
    path = tmp_path / name
    torch.save({"model": model.state_dict(), **content}, path)
    return path


def record(folder):
    return json.loads((folder / "conversion.json").read_text())


def same(folder, model):
    """Return the folder's model, all of whose weights are those of `model`."""
    loaded = type(model).from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    return loaded


# ------------------------------------------------------------------------------------------------ official files


def test_a_file_with_decoder_becomes_a_pretraining_folder(tmp_path):
    model = shaken(MAEForPreTraining(MAEConfig(**TINY)))
    said = []
    path = pth(tmp_path, model, "mine.pth")
    out = convert(path, tmp_path / "out", license="mit", norm_pix_loss=True, say=said.append, **GIVEN)
    loaded = same(out, model)
    assert (loaded.config.norm_pix_loss, loaded.config.pos_embed) == (True, "sincos")
    assert record(out) == {
        "format": 1,
        "source": "mine.pth",
        "layout": "official",
        "revision": None,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "known": None,
        "license": "mit",
        "class": "MAEForPreTraining",
        "head": None,
        "norm_pix_loss": True,
        "parity": None,
    }
    assert str(tmp_path) not in "".join(file.read_text() for file in out.glob("*.json"))
    assert len(said) == 1, "what was written, and nothing to warn of"
    processor = AutoImageProcessor.from_pretrained(out)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


def test_what_the_runs_own_arguments_say_is_taken(tmp_path):
    import argparse

    model = shaken(MAEForPreTraining(MAEConfig(**TINY)))
    path = pth(tmp_path, model, "run.pth", args=argparse.Namespace(norm_pix_loss=True, mask_ratio=0.5))
    loaded = same(convert(path, tmp_path / "out", license="mit", **GIVEN), model)
    assert (loaded.config.norm_pix_loss, loaded.config.mask_ratio) == (True, 0.5)


@pytest.mark.parametrize("head", ["linear", "batchnorm"])
def test_fine_tuned_and_probed_files_become_classifiers(tmp_path, head):
    pool = "mean" if head == "linear" else "cls"
    model = shaken(
        MAEForImageClassification(MAEConfig(**TINY, num_labels=3, head=head, pool=pool, pos_embed="learned"))
    )
    path = pth(tmp_path, model, "mine.pth")
    names = {0: "wren", 1: "robin", 2: "tit"}
    out = convert(path, tmp_path / "out", license="mit", id2label=names, num_attention_heads=2)
    loaded = same(out, model)
    assert (loaded.config.head, loaded.config.pool) == (head, pool)
    assert (loaded.config.id2label, loaded.config.label2id) == (names, {"wren": 0, "robin": 1, "tit": 2})
    assert record(out)["head"] == "3 classes"


def published(monkeypatch, path, *, kind, by, width=32):
    """Let the authors have published this file, by its hash or by its name."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()[:6] if by == "md5" else None
    name = path.name if by == "file name" else "mae_official.pth"
    one = replace(official.OFFICIAL[0], name=name, md5=md5, width=width, kind=kind)
    monkeypatch.setattr(official, "OFFICIAL", (one,))


@pytest.mark.parametrize("by", ["md5", "file name"])
def test_published_files_bring_their_licence_objective_and_results(tmp_path, monkeypatch, by):
    model = shaken(MAEForPreTraining(MAEConfig(**TINY)))
    path = pth(tmp_path, model, "some.pth")
    published(monkeypatch, path, kind="pretraining", by=by)
    said = []
    out = convert(path, tmp_path / "out", say=said.append, **GIVEN)
    assert same(out, model).config.norm_pix_loss is True
    found = record(out)
    assert found["license"] == "cc-by-nc-4.0"
    assert found["known"]["by"] == by
    assert found["known"]["result"] == {official.FINE_TUNED: 83.6, official.PROBED: 67.8}
    assert any("no hash of it was ever published" in line for line in said) == (by == "file name")
    for wrong in ({"license": "mit"}, {"norm_pix_loss": False}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            convert(path, tmp_path / "other", **GIVEN, **wrong)


def test_a_published_hash_with_another_width_is_no_published_file(tmp_path, monkeypatch):
    path = pth(tmp_path, shaken(MAEModel(MAEConfig(**TINY))), "some.pth")
    published(monkeypatch, path, kind="encoder", by="md5", width=768)
    said = []
    out = convert(path, tmp_path / "out", num_attention_heads=2, say=said.append)
    assert (record(out)["known"], record(out)["license"], record(out)["class"]) == (None, None, "MAEModel")
    assert any("licence of some.pth is not known" in line for line in said)


def test_the_table_of_published_files_is_that_of_the_authors():
    listed = {one.name: (one.md5, one.width, one.norm_pix_loss) for one in official.OFFICIAL}
    assert len(listed) == 13
    assert listed["mae_pretrain_vit_large.pth"] == ("b8b06e", 1024, True)
    assert listed["mae_finetuned_vit_huge.pth"] == ("2541f2", 1280, True)
    assert listed["mae_visualize_vit_base.pth"] == (None, 768, False)
    assert official.recognise("x.pth", "8cad7c" + "0" * 26, 768, "encoder") == (official.OFFICIAL[0], "md5")
    assert official.recognise("mae_pretrain_vit_base.pth", "0" * 32, 768, "encoder") is None, "its hash is known"


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("facebook/vit-mae-base", True),
        ("timm/vit_large_patch16_224.mae", True),
        ("timm/vit_base_patch16_224.augreg_in1k", False),
        ("someone/vit-mae-base", False),
    ],
)
def test_copies_on_the_hub_are_known_by_their_name(name, copy):
    assert official.is_copy(name) is copy


def test_imagenets_names_are_unique_so_that_every_label_has_one_class():
    names = imagenet_names()
    assert (len(names), len(set(names)), names[134], names[517]) == (1000, 1000, "crane", "crane2")


# ------------------------------------------------------------------------------------------------ timm


def timm_folder(tmp_path, model, **config):
    """Write a folder as timm's own writer does."""
    folder = tmp_path / "timm_model"
    timm.models.save_for_hf(model, folder, safe_serialization=True, **config)
    return folder


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("options", "pool"), [({"global_pool": "avg", "fc_norm": True}, "mean"), ({"global_pool": "token"}, "cls")]
)
def test_timm_classifiers_give_the_same_logits(tmp_path, options, pool):
    model = shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL, **options))
    arguments = SMALL | options
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "crop_pct": 0.8}
    model.pretrained_cfg |= {"license": "cc-by-nc-4.0"}
    folder = timm_folder(tmp_path, model, model_args=arguments, model_config={"label_names": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"license='mit'.*non-commercial terms stay"):
        convert(folder, tmp_path / "out", license="mit")
    out = convert(folder, tmp_path / "out")
    loaded = MAEForImageClassification.from_pretrained(out)
    assert (loaded.config.pool, loaded.config.id2label) == (pool, {0: "a", 1: "b", 2: "c"})
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels), atol=1e-5, rtol=0)  # float order
    found = record(out)
    assert found["parity"]["float64"] <= 1e-12
    assert (found["license"], found["source"], found["layout"]) == ("cc-by-nc-4.0", "timm_model", "timm")
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["size"]) == ([0.5, 0.4, 0.3], {"shortest_edge": 40})


def test_timm_encoders_give_the_same_tokens_and_keep_learned_positions(tmp_path):
    model = shaken(timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL))
    model.pretrained_cfg |= {"input_size": (3, 32, 32)}
    said = []
    out = convert(timm_folder(tmp_path, model, model_args=SMALL), tmp_path / "out", license="mit", say=said.append)
    loaded = MAEModel.from_pretrained(out)
    assert loaded.config.pos_embed == "learned"
    assert any("count as learned" in line for line in said)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.forward_features(pixels)
        torch.testing.assert_close(loaded(pixels).last_hidden_state, expected, atol=1e-5, rtol=0)  # float order


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg", "fc_norm": False}, "logits differs.*cannot express"),
        ({"act_layer": "gelu_tanh"}, "logits differs"),
        ({"init_values": 0.5}, "belong to no masked autoencoder"),
    ],
)
def test_vits_with_other_options_are_refused_and_nothing_is_written(tmp_path, options, message):
    model = shaken(timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL, **options))
    model.pretrained_cfg |= {"input_size": (3, 32, 32)}
    folder = timm_folder(tmp_path, model, model_args=SMALL | options)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out", license="mit")
    assert {path.name for path in tmp_path.iterdir()} == {"timm_model"}


# ------------------------------------------------------------------------------------------------ transformers


def test_vit_mae_folders_give_the_same_loss_and_carry_their_epsilon(tmp_path):
    torch.manual_seed(0)
    stock = shaken(ViTMAEForPreTraining(ViTMAEConfig(**TINY, intermediate_size=64, decoder_intermediate_size=32)))
    stock.save_pretrained(tmp_path / "stock")
    (tmp_path / "stock" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "size": 224}')
    out = convert(tmp_path / "stock", tmp_path / "out", license="mit", mask_ratio=0.5)
    loaded = MAEForPreTraining.from_pretrained(out)
    assert (loaded.config.layer_norm_eps, loaded.config.mask_ratio) == (1e-12, 0.5)
    assert record(out)["parity"]["what"] == "loss and pred of transformers"
    assert record(out)["parity"]["float64"] <= 1e-11
    processor = json.loads((out / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225])
    assert processor["size"] == {"shortest_edge": 36}


def test_vit_mae_encoders_become_encoders(tmp_path):
    torch.manual_seed(0)
    shaken(ViTMAEModel(ViTMAEConfig(**TINY, intermediate_size=64))).save_pretrained(tmp_path / "stock")
    out = convert(tmp_path / "stock", tmp_path / "out", license="mit")
    assert (record(out)["class"], record(out)["parity"]["what"]) == ("MAEModel", "last_hidden_state of transformers")


# ------------------------------------------------------------------------------------------------ refusals


def test_a_failed_conversion_leaves_what_was_there_and_a_good_one_replaces_its_own_kind_only(tmp_path):
    path = pth(tmp_path, shaken(MAEModel(MAEConfig(**TINY))), "one.pth")
    out = tmp_path / "out"
    out.mkdir()
    (out / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(ValueError, match=r"holds something else.*--overwrite"):
        convert(path, out, num_attention_heads=2)
    assert (out / "holiday.jpg").read_bytes() == b"picture"
    mine = convert(path, tmp_path / "mine", license="mit", num_attention_heads=2)
    before = record(mine)
    with pytest.raises(ValueError, match="num_attention_heads is not given"):
        convert(path, mine)
    assert record(mine) == before
    convert(path, mine, license="bsd", num_attention_heads=2)
    assert record(mine)["license"] == "bsd"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "one.pth", "out"]


def broken(tmp_path):
    model = shaken(MAEModel(MAEConfig(**TINY)))
    model.norm.weight.data[0] = float("nan")
    return pth(tmp_path, model, "nan.pth")


def ours(tmp_path):
    MAEModel(MAEConfig(**TINY)).save_pretrained(tmp_path / "ours")
    return tmp_path / "ours"


def of_another_kind(tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    return tmp_path / "bert"


def headless(tmp_path):
    return pth(tmp_path, shaken(MAEModel(MAEConfig(**TINY))), "encoder.pth")


def three_classes(tmp_path):
    return pth(tmp_path, MAEForImageClassification(MAEConfig(**TINY, num_labels=3)), "three.pth")


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (broken, {}, "norm.weight of nan.pth is not finite"),
        (ours, {}, "is a model of this package already"),
        (of_another_kind, {}, "neither an official .pth file.*'bert'"),
        (headless, {"id2label": {0: "a"}}, "has no head"),
        (three_classes, {"id2label": {0: "a", 1: "b"}}, "names 2 classes and three.pth has 3"),
        (lambda tmp_path: "nonsense", {}, "nonsense is no file, no folder and no Hub id"),
    ],
)
def test_sources_that_cannot_be_converted_are_refused(tmp_path, source, options, message):
    heads = {} if source in (ours, of_another_kind) else {"num_attention_heads": 2}
    with pytest.raises(ValueError, match=message):
        convert(source(tmp_path), tmp_path / "out", license="mit", **options, **heads)
    assert not (tmp_path / "out").exists()


def test_hub_ids_are_read_at_their_commit_and_copies_keep_the_authors_licence(tmp_path, monkeypatch):
    torch.manual_seed(0)
    commit = "c" * 40
    snapshot = tmp_path / "snapshots" / commit
    shaken(ViTMAEForPreTraining(ViTMAEConfig(**TINY, intermediate_size=64))).save_pretrained(snapshot)
    asked = {}

    def download(name, **options):
        asked[name] = options["revision"]
        return str(snapshot)

    monkeypatch.setattr(converting, "snapshot_download", download)
    out = convert("hf-hub:facebook/vit-mae-base@main", tmp_path / "out")
    assert asked == {"facebook/vit-mae-base": "main"}
    found = record(out)
    assert (found["source"], found["revision"]) == ("facebook/vit-mae-base", commit)
    assert found["license"] == "cc-by-nc-4.0", "its card says apache-2.0, its authors do not"
    weights = snapshot / "model.safetensors"
    assert found["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_half_precision_becomes_float32(tmp_path):
    model = shaken(MAEModel(MAEConfig(**TINY))).to(torch.float16)
    out = convert(pth(tmp_path, model, "half.pth"), tmp_path / "out", license="mit", num_attention_heads=2)
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["norm.weight"], model.norm.weight.float())
