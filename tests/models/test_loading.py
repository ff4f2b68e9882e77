"""What a name may be, and what is said of files that cannot be used: one sentence that names them, and no library's."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils.hub import cached_file

from hf_mae import resolve
from hf_mae.cli import main
from hf_mae.exporting.stock import as_vit_mae
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.convert import check_finite, convert_state_dict, load_official_checkpoint
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.resolve import locate, sha256
from hf_mae.training.tasks import Pretraining

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FC1 = {"ours": "blocks.1.mlp.fc1.weight", "vit_mae": "vit.encoder.layer.1.intermediate.dense.weight"}


@pytest.fixture(params=["ours", "vit_mae"])
def layout(request) -> str:
    return request.param


@pytest.fixture
def folder(layout, golden_model, tmp_path) -> Path:
    """A pretraining model with its image processor, in our layout or that of facebook/vit-mae-*."""
    model, path = golden_model(), tmp_path / "model"
    Pretraining(model, (0.5,) * 3, (0.5,) * 3).write_model(path, model.state_dict())
    if layout == "vit_mae":
        stock = as_vit_mae(model)
        stock.config.save_pretrained(path)
        save_file({name: tensor.contiguous() for name, tensor in stock.weights.items()}, path / "model.safetensors")
    return path


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change_weights(folder: Path, **changes: torch.Tensor) -> None:
    weights = {name: tensor.clone() for name, tensor in weights_of(folder).items()} | changes
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: values[key] for key in values if key not in drop}))


def change_bytes(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def lie_in_the_header(data: bytes) -> bytes:
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["pos_embed" if "pos_embed" in header else "vit.embeddings.position_embeddings"]["shape"] = [7]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def split(folder: Path, change=lambda index, weights: None, metadata=None) -> None:
    """Replace the one file of weights by two and their index."""
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {name: SHARDS[row >= len(names) // 2] for row, name in enumerate(names)}
    for file in SHARDS:
        save_file({name: weights[name] for name in names if index[name] == file}, folder / file)
    change(index, weights)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    )


def to_pickle(folder: Path) -> None:
    torch.save(weights_of(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


FAULTS = {
    "no config": (lambda f, at: (f / "config.json").unlink(), r"no config\.json"),
    "no weights": (lambda f, at: (f / "model.safetensors").unlink(), r"has no model\.safetensors"),
    "pickled weights": (lambda f, at: to_pickle(f), r"has no model\.safetensors but pytorch_model\.bin.*save it again"),
    "another shape": (lambda f, at: change_weights(f, **{at: torch.zeros(5, 48)}), r"is 5 x 48 and has to be 192 x 48"),
    "truncated": (lambda f, at: change_bytes(f, lambda data: data[:-1000]), r"model\.safetensors is damaged.*again"),
    "half a header": (lambda f, at: change_bytes(f, lambda data: data[:100]), r"model\.safetensors is damaged.*again"),
    "empty": (lambda f, at: change_bytes(f, lambda data: b""), r"is damaged.*0 bytes"),
    "random bytes": (lambda f, at: change_bytes(f, lambda data: b"\x93" * 5000), r"model\.safetensors is damaged"),
    "lying header": (lambda f, at: change_bytes(f, lie_in_the_header), r"model\.safetensors is damaged"),
    "nan": (lambda f, at: change_weights(f, **{at: torch.full((192, 48), torch.nan)}), r"fc1\.weight .* not finite"),
    "one infinity": (
        lambda f, at: change_weights(f, **{at: torch.zeros(192, 48).index_fill(0, torch.tensor(3), torch.inf)}),
        r"fc1\.weight .* is not finite \(48 of 9,216",
    ),
    "quantised": (lambda f, at: change_weights(f, **{at: torch.zeros(192, 48, dtype=torch.int8)}), r"I8, .*quantised"),
    "no JSON": (lambda f, at: (f / "config.json").write_text("{ model"), r"config\.json cannot be read as JSON"),
    "JSON of no object": (lambda f, at: (f / "config.json").write_text("[1]"), r"config\.json holds list"),
    "another model": (
        lambda f, at: change_config(f, model_type="bert", architectures=["BertModel"]),
        r"model_type='bert'|holds BertModel",
    ),
    "a model of timm": (
        lambda f, at: (f / "config.json").write_text('{"architecture": "resnet10t", "pretrained_cfg": {}}'),
        r"hf-mae convert|a model of timm",
    ),
    "a word for a number": (lambda f, at: change_config(f, hidden_size="wide"), r"hidden_size='wide'.*whole number"),
    "nothing for a number": (lambda f, at: change_config(f, hidden_size=None), r"hidden_size=None.*whole number"),
    "index without files": (lambda f, at: (split(f), (f / SHARDS[1]).unlink()), rf"{SHARDS[1]}; copy or download"),
    "index that is none": (
        lambda f, at: (split(f), (f / "model.safetensors.index.json").write_text("{}")),
        r"has no weight_map",
    ),
    "weight in two files": (
        lambda f, at: split(f, lambda index, w: save_file(w, f / SHARDS[1]) if at in w else None),
        rf"is in {SHARDS[0]} and in {SHARDS[1]}",
    ),
    "weight in the other file": (
        lambda f, at: split(f, lambda index, w: index.update({at: SHARDS[index[at] == SHARDS[0]]})),
        r"index\.json and its files differ",
    ),
    "weight in no file": (
        lambda f, at: split(f, lambda index, w: index.update(ghost=SHARDS[0])),
        r"ghost is in .* by the index and in no file in fact",
    ),
} | {
    f"index outside: {name}": (
        lambda f, at, name=name: split(f, lambda index, w: index.update({at: name})),
        r"only safetensors files beside the index are read",
    )
    for name in (
        "../other/model.safetensors",
        "/etc/model.safetensors",
        "a/../../b.safetensors",
        "..\\b.safetensors",
        "x.bin",
    )
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_used_are_told_in_one_sentence(folder, layout, fault, tmp_path, capfd):
    harm, message = FAULTS[fault]
    harm(folder, FC1[layout])
    for load in (
        lambda: MAEForPreTraining.from_pretrained(folder),
        lambda: MAEModel.from_pretrained(folder),
        lambda: MAEForImageClassification.from_encoder(folder, num_labels=2),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load()
        assert "\n" not in str(raised.value)
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["reconstruct", str(folder), str(tmp_path / "image.png"), "--out", str(tmp_path / "out.png")])
    said = capfd.readouterr().err
    assert ended.value.code == 2
    assert said.splitlines()[-1].startswith("hf-mae: error: ")
    assert "Traceback" not in said
    assert "LOAD REPORT" not in said
    assert not (tmp_path / "out.png").exists()


def test_missing_files_are_an_os_error_as_well(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        MAEModel.from_pretrained(folder)
    with pytest.raises(OSError, match="does not exist"):
        MAEModel.from_pretrained(folder / "nothing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(folder, official_weights, dtype):
    change_weights(folder, **{name: tensor.to(dtype) for name, tensor in weights_of(folder).items()})
    model = MAEForPreTraining.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, official_weights[name].to(dtype).float()), name


def test_several_files_give_what_one_gives(folder, official_weights):
    split(folder)
    for name, tensor in MAEForPreTraining.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, official_weights[name]), name
    encoder = MAEForImageClassification.from_encoder(folder, num_labels=2, pool="cls").state_dict()
    assert all(torch.equal(encoder[name], official_weights[name]) for name in encoder if not name.startswith("head."))


def test_the_links_of_the_hubs_cache_are_followed(folder, official_weights, tmp_path):
    split(folder)
    (tmp_path / "blobs").mkdir()
    for file in SHARDS:
        shutil.move(folder / file, tmp_path / "blobs" / file)
        (folder / file).symlink_to(Path("..") / "blobs" / file)
    model = MAEForPreTraining.from_pretrained(folder)
    assert torch.equal(model.state_dict()["pos_embed"], official_weights["pos_embed"])


def test_a_config_that_lost_a_size_is_refused(golden_model, tmp_path):
    golden_model().save_pretrained(tmp_path)
    change_config(tmp_path, drop=("num_attention_heads",))
    for load in (MAEForPreTraining.from_pretrained, MAEConfig.from_pretrained):
        with pytest.raises(ValueError, match="does not say num_attention_heads"):
            load(tmp_path)


# Shapes


def test_no_weight_of_another_shape_is_made_up(golden_classifier, tmp_path, caplog):
    golden_classifier().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head\.bias is 10 and has to be 7.*num_labels=N.*ignore_mismatched_sizes"):
        MAEForImageClassification.from_pretrained(tmp_path, num_labels=7)
    with pytest.raises(
        ValueError, match=r"pos_embed is 1 x 17 x 48 and has to be 1 x 65 x 48; .*interpolate_pos_encod"
    ):
        MAEForImageClassification.from_pretrained(tmp_path, image_size=64)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="other shapes than its config says"):
            MAEForImageClassification.from_pretrained(tmp_path, intermediate_size=96, **options)


def test_a_head_of_other_classes_is_new_where_that_is_asked_for_and_is_said(
    golden_classifier, tmp_path, caplog, monkeypatch
):
    golden_classifier().save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model, info = MAEForImageClassification.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.head.weight.shape == (7, 48)
    assert {name for name, *_ in info["mismatched_keys"]} == {"head.weight", "head.bias"}
    assert "head.weight" in caplog.text
    assert torch.equal(model.fc_norm.weight, golden_classifier().fc_norm.weight)


def test_fixed_positions_are_computed_for_another_size_where_that_is_asked_for(golden_model, tiny, tmp_path):
    golden_model().save_pretrained(tmp_path)
    model = MAEForPreTraining.from_pretrained(tmp_path, image_size=64, ignore_mismatched_sizes=True)
    expected = MAEForPreTraining(tiny(image_size=64))
    assert torch.equal(model.pos_embed, expected.pos_embed)
    assert torch.equal(model.decoder_pos_embed, expected.decoder_pos_embed)


# Finite


def test_large_but_finite_weights_pass_and_one_nan_does_not():
    large = torch.full((4, 4), 3e38)
    check_finite([("large", large), ("half", torch.full((9,), 6e4, dtype=torch.float16))], "here")
    check_finite([("ids", torch.arange(3)), ("later", torch.empty(3, device="meta"))], "here")
    large[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"weight large of here is not finite \(1 of 16 values"):
        check_finite([("large", large)], "here")


# What a name may be


@pytest.fixture
def run(golden_model, tmp_path) -> Path:
    """A run folder with two checkpoints, and a best model."""
    run = tmp_path / "run"
    for place, value in (("checkpoints/step_00000001", 1.0), ("checkpoints/step_00000002", 2.0), ("best", 3.0)):
        model = golden_model()
        torch.nn.init.constant_(model.cls_token, value)
        Pretraining(model, (0.5,) * 3, (0.5,) * 3).write_model(run / place / "model", model.state_dict())
        files = [path for path in (run / place).rglob("*") if path.is_file()]
        manifest = {path.relative_to(run / place).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
        (run / place / "manifest.json").write_text(json.dumps(manifest))
    (run / "recipe.json").write_text('{"name": "test", "model": {}}')
    return run


def cls_token(model) -> float:
    return float(model.cls_token.detach()[0, 0, 0])


@pytest.mark.parametrize(
    ("inside", "value"),
    [("", 2.0), ("checkpoints/step_00000001", 1.0), ("checkpoints/step_00000001/model", 1.0), ("best", 3.0)],
)
def test_python_reads_what_the_command_line_reads_of_a_run(run, inside, value):
    for name in (run / inside, str(run / inside)):
        assert cls_token(MAEForPreTraining.from_pretrained(name)) == value
        assert cls_token(MAEModel.from_pretrained(name)) == value
        assert cls_token(MAEForImageClassification.from_encoder(name, num_labels=3)) == value
        assert MAEConfig.from_pretrained(name).hidden_size == 48


def test_a_damaged_checkpoint_is_passed_over(run):
    path = run / "checkpoints" / "step_00000002" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert cls_token(MAEForPreTraining.from_pretrained(run)) == 1.0
    shutil.rmtree(run / "checkpoints" / "step_00000001")
    with pytest.raises(ValueError, match=r"holds no whole checkpoint\. skipping damaged checkpoint"):
        MAEForPreTraining.from_pretrained(run)


@pytest.mark.parametrize("text", ["[]", '{"model/config.json": 7}', "7", ""])
def test_a_manifest_that_says_nothing_is_damage(run, text):
    (run / "checkpoints" / "step_00000002" / "manifest.json").write_text(text)
    assert cls_token(MAEForPreTraining.from_pretrained(run)) == 1.0


def test_where_a_model_was_found_is_recorded(run):
    model = MAEModel.from_pretrained(run)
    assert model.config.name_or_path == str(run / "checkpoints" / "step_00000002" / "model")


def test_official_files_load_by_their_name(official_weights, golden, tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": official_weights}, path)
    fields = {"num_attention_heads": 3, "decoder_num_attention_heads": 2, "norm_pix_loss": True, "layer_norm_eps": 1e-5}
    model = MAEForPreTraining.from_pretrained(path, dtype=torch.bfloat16, **fields)
    assert (model.dtype, model.config.norm_pix_loss, model.config.layer_norm_eps) == (torch.bfloat16, True, 1e-5)
    model = MAEForPreTraining.from_pretrained(path, **fields)
    assert all(torch.equal(tensor, official_weights[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="num_attention_heads is not given"):
        MAEForPreTraining.from_pretrained(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing/here/at/all", "does not exist"),
        ("./nothing", "does not exist"),
        ("~/no-such-folder-of-models", "does not exist"),
        ("runs/nothing", "does not exist"),
        ("~no-such-user/model", "neither a path nor a Hub id|does not exist"),
        ("x" * 5000, "neither a path nor a Hub id"),
    ],
)
def test_names_of_nothing_are_told(name, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for load in (MAEModel.from_pretrained, MAEConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(name)
    with pytest.raises(ValueError, match=message):
        MAEForImageClassification.from_encoder(name, num_labels=2)


def test_a_run_without_a_checkpoint_and_parts_of_folders_are_told(run, golden_model, tmp_path):
    golden_model().save_pretrained(tmp_path / "model")
    for part in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match="is a file; pass its folder"):
            locate(tmp_path / "model" / part)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"run folder without a checkpoint"):
        locate(run)


def test_names_of_the_hub_are_not_looked_up():
    assert locate("org/mae") == locate("hf-hub:org/mae") == "org/mae"


def in_the_cache(folder: Path, cache: Path) -> dict[str, object]:
    """Lay a folder into the Hub's cache as org/mae, files as links to blobs, and return how to read it there."""
    commit, repository = "c" * 40, cache / "models--org--mae"
    snapshot = repository / "snapshots" / commit
    for path in (repository / "refs", repository / "blobs", snapshot):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in folder.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    return {"cache_dir": cache, "local_files_only": True}


def test_repositories_of_several_files_are_read_and_say_where_they_are_from(folder, official_weights, tmp_path):
    split(folder)
    hub = in_the_cache(folder, tmp_path / "hub")
    model = MAEForPreTraining.from_pretrained("org/mae", **hub)
    assert model.config.name_or_path == "org/mae"
    assert all(torch.equal(tensor, official_weights[name]) for name, tensor in model.state_dict().items())


def test_an_index_of_a_repository_may_not_leave_it(folder, layout, tmp_path, monkeypatch):
    split(folder, lambda index, weights: index.update({FC1[layout]: "../../../../other/model.safetensors"}))
    hub = in_the_cache(folder, tmp_path / "hub")
    asked = []
    monkeypatch.setattr(
        resolve, "cached_file", lambda name, file, **more: asked.append(file) or cached_file(name, file, **more)
    )
    with pytest.raises(ValueError, match="only safetensors files beside the index are read"):
        MAEForPreTraining.from_pretrained("org/mae", **hub)
    assert not any("other" in file for file in asked)


def test_a_repository_with_pickled_weights_only_is_refused(folder, tmp_path):
    to_pickle(folder)
    hub = in_the_cache(folder, tmp_path / "hub")
    with pytest.raises(ValueError, match=r"has no model\.safetensors but pytorch_model\.bin"):
        MAEModel.from_pretrained("org/mae", **hub)
    with pytest.raises(OSError, match="org/none"):
        MAEModel.from_pretrained("org/none", **hub)


# Official files


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), r"mae\.pth is damaged, or not a file of PyTorch"),
        (lambda path: path.write_bytes(b"\x93" * 999), r"mae\.pth is damaged, or not a file of PyTorch"),
        (lambda path: path.write_text("404: Not Found"), r"mae\.pth is damaged, or not a file of PyTorch"),
        (
            lambda path: (torch.save({"a": torch.zeros(999)}, path), path.write_bytes(path.read_bytes()[:-99])),
            "is damaged",
        ),
        (lambda path: torch.save({"model": Bomb()}, path), r"is refused: it holds Python objects"),
        (lambda path: torch.save([1, 2], path), r"holds no weights"),
        (lambda path: torch.save({7: torch.zeros(1)}, path), r"the name 7, which is not text"),
        (lambda path: torch.save({"head.weight": torch.zeros(2, 2)}, path), r"patch_embed\.proj\.weight is missing"),
    ],
)
def test_official_files_that_cannot_be_used_are_told_and_run_nothing(write, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mae.pth")
    for load in (MAEForPreTraining.from_pretrained, MAEForPreTraining.from_official):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "mae.pth")
    assert not (tmp_path / "exploded").exists()


def test_official_files_that_do_not_exist_are_told(tmp_path):
    for name in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(OSError, match=r"is not a file; name a \.pth file"):
            MAEForPreTraining.from_official(name)


def test_weights_under_two_names_and_unequal_parts_of_attention_are_refused(official_weights):
    with pytest.raises(ValueError, match=r"two weights are norm\.bias, one .* vit\.layernorm\.bias"):
        convert_state_dict(official_weights | {"vit.layernorm.bias": torch.zeros(48)})
    query, key, value = (f"vit.layers.0.attention.{part}_proj.weight" for part in "qkv")
    parts = {query: torch.zeros(4, 4), key: torch.zeros(4, 4), value: torch.zeros(4)}
    with pytest.raises(ValueError, match=r"attn\.value\.weight is 4; queries, keys and values need one shape"):
        convert_state_dict(parts)


def test_official_files_with_nan_are_refused(official_weights, tmp_path):
    torch.save(official_weights | {"norm.bias": torch.full((48,), torch.nan)}, tmp_path / "mae.pth")
    fields = {"num_attention_heads": 3}
    with pytest.raises(ValueError, match=r"norm\.bias of .*mae\.pth is not finite"):
        MAEForPreTraining.from_official(
            tmp_path / "mae.pth", **fields, decoder_num_attention_heads=2, norm_pix_loss=False
        )
    with pytest.raises(ValueError, match=r"norm\.bias of .*mae\.pth is not finite"):
        MAEForImageClassification.from_encoder(tmp_path / "mae.pth", num_labels=2, pool="cls", **fields)
    assert load_official_checkpoint(tmp_path / "mae.pth").has_decoder


# How many classes


def test_classes_without_names_are_counted(golden_model, golden_classifier, tmp_path):
    golden_model().save_pretrained(tmp_path / "encoder")
    model = MAEForImageClassification.from_encoder(tmp_path / "encoder", num_labels=7)
    assert model.head.weight.shape == (7, 48)
    assert model.config.num_labels == 7
    assert model.config.id2label[6] == "LABEL_6"
    named = {0: "ant", 1: "bee"}
    both = MAEForImageClassification.from_encoder(tmp_path / "encoder", num_labels=2, id2label=named)
    assert both.config.id2label == named
    golden_classifier().save_pretrained(tmp_path / "classifier")  # LABEL_0 to LABEL_9: no names that could stay
    fresh = MAEForImageClassification.from_encoder(tmp_path / "classifier", num_labels=10)
    assert not torch.equal(fresh.head.weight, golden_classifier().head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 3, "id2label": {0: "ant", 1: "bee"}}, "num_labels=3 contradicts id2label, which names 2"),
        ({}, "id2label is not given and num_labels=None"),
        ({"num_labels": 0}, "num_labels=0"),
        ({"num_labels": "7"}, "num_labels='7'"),
    ],
)
def test_classes_that_contradict_each_other_are_refused(golden_model, tmp_path, options, message):
    golden_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        MAEForImageClassification.from_encoder(tmp_path, **options)
