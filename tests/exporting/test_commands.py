"""The remedies that errors of `hf-mae convert` and `hf-mae export` name are options of these commands."""

from __future__ import annotations

import json

import pytest
import torch

from hf_mae import MAEForImageClassification, MAEForPreTraining
from hf_mae.cli.hub import convert_command, export_command
from hf_mae.models.configuration_mae import MAEConfig


def test_what_a_file_does_not_say_can_be_given(make, tmp_path):
    model = make(MAEForPreTraining, image_size=(32, 48), norm_pix_loss=True)
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    command = [str(tmp_path / "tiny.pth"), str(tmp_path / "out"), "--license", "mit"]
    given = {
        "num-attention-heads": ["4"],
        "decoder-num-attention-heads": ["2"],
        "norm-pix-loss": ["True"],
        "image-size": ["32", "48"],
    }
    with pytest.raises(ValueError, match="num_attention_heads is not given"):
        convert_command(command)
    options = [word for name, words in given.items() for word in (f"--{name}", *words)]
    statistics = ["--image-mean", "0.1", "0.2", "0.3", "--image-std", "0.5", "0.5", "0.5"]
    convert_command([*command, *options, *statistics])
    config = MAEConfig.from_pretrained(tmp_path / "out")
    assert (config.num_attention_heads, config.decoder_num_attention_heads) == (4, 2)
    assert tuple(config.image_size) == (32, 48)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.5] * 3)


@pytest.mark.parametrize("text", ['["ant", "bee", "cat"]', '{"2": "cat", "0": "ant", "1": "bee"}'])
def test_names_of_classes_come_from_a_file(make, tmp_path, text):
    model = make(MAEForImageClassification)
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    (tmp_path / "names.json").write_text(text)
    command = [str(tmp_path / "tiny.pth"), str(tmp_path / "out"), "--num-attention-heads", "4", "--license", "mit"]
    convert_command([*command, "--id2label", str(tmp_path / "names.json")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "ant", "1": "bee", "2": "cat"}
    for wrong, message in (
        ("5", "holds no names of classes"),
        ('["ant", "ant", "bee"]', "several classes of the name"),
    ):
        (tmp_path / "names.json").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            convert_command([*command, "--id2label", str(tmp_path / "names.json"), "--overwrite"])


def test_grey_models_are_exported_with_mean_and_std(make, tmp_path, unchecked):
    make(MAEForImageClassification, num_channels=1).save_pretrained(tmp_path / "grey")
    command = [str(tmp_path / "grey"), str(tmp_path / "out")]
    with pytest.raises(ValueError, match="or --image-mean"):
        export_command(command)
    export_command([*command, "--image-mean", "0.4", "--image-std", "0.2"])
    written = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (written["image_mean"], written["image_std"]) == ([0.4], [0.2])
