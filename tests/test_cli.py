"""The command line: what it answers without torch, how its words are read, and the commands that prepare data."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from transformers import AutoConfig

import hf_mae
from hf_mae.cli import main, parse_plan, sweeps
from hf_mae.data.sources import open_source
from hf_mae.recipes.base import Data
from hf_mae.recipes.mae import PRESETS
from tests.data.samples import picture, write_parquet


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_plan_reads_hardware_and_recipe_from_one_line():
    line = (
        "mae-vit-l --gpu h100 --gpus 64 --mfu 0.4 --model.image-size 448 --global-batch 2048 --model.no-norm-pix-loss"
    )
    given = parse_plan(PRESETS, line.split(), default="mae-vit-b")
    assert (given.hardware.gpu, given.hardware.gpus, given.hardware.mfu) == ("h100", 64, 0.4)
    assert (given.recipe.name, given.recipe.model.image_size, given.recipe.global_batch) == ("mae-vit-l", 448, 2048)
    assert given.recipe.model.norm_pix_loss is False


def test_plan_prints_a_report_for_vit_b_unless_told_otherwise(capsys):
    main(["plan"])
    text = capsys.readouterr().out
    assert text.startswith("mae-vit-b on 8 x a100: 312 TFLOP/s, 40 GB each")
    for heading in ("Computation", "Memory", "Time, ", "Input and network", "Disk", "Assumptions"):
        assert f"\n{heading}" in text


def test_plan_prints_json(capsys):
    main(["plan", "mae-vit-l-800ep", "--gpu", "v100", "--gpus", "64", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert (plan["gpus"], plan["micro_batch"], plan["parameters"]["trained"]) == (64, 64, 329_239_296)
    assert len(plan["memory"]) == 6


def test_plan_check_prints_published_runs_only(capsys):
    main(["plan", "--check"])
    text = capsys.readouterr().out
    assert "42 h" in text
    assert "Assumptions" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "mae-vit-x"], "preset 'mae-vit-x' is unknown; did you mean mae-vit-"),
        (["plan", "--gpu", "a10000"], "--gpu a10000 is unknown; use one of t4"),
        (["plan", "--gpus", "3"], "global_batch=1024 is not divisible by 3 processes; use 1023 or 1026"),
        (["plam"], "command 'plam' is unknown; did you mean plan, "),
    ],
)
def test_mistakes_end_with_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["evaluate", "own", "--model", "no-such/model"], "model"),
        (["finetune", "finetune-digits", "--init-from", "no-such/model"], "init_from"),
        (["sweep", "partial", "finetune-digits", "--init-from", "no-such/model"], "init_from"),
    ],
)
def test_a_misspelt_hub_id_ends_with_one_sentence(arguments, field, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--data.path", "digits", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{field}=no-such/model is no path on this machine and cannot be opened as a Hub id" in said


def test_a_name_that_the_hub_forbids_ends_with_the_same_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "finetune-digits", "--init-from", "my dir/encoder", "--data.path", "digits"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "init_from=my dir/encoder is no path on this machine and cannot be opened as a Hub id" in said


@pytest.mark.parametrize("command", ["finetune", "probe", "supervise"])
def test_a_slip_in_the_path_of_the_weights_is_said_before_the_data_are_opened(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mae.run.open_source", lambda *a, **k: pytest.fail("the data were opened"))
    with pytest.raises(SystemExit):
        main([command, "--init-from", "./no/encoder", "--data.path", "digits", "--out", str(tmp_path / "run")])
    assert "init_from=./no/encoder does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


HELP = {
    "pretrain": ["--data.path", "--model.mask-ratio", "--optim.base-lr", "--engine.precision"],
    "finetune": ["--init-from", "--trainable-blocks", "--augment.mixup", "--evals.split"],
    "probe": ["--init-from", "--evals.knn", "--data.label-column"],
    "supervise": ["--model.architecture", "--loss.", "--data.splits", "--data.repeat-augment"],
    "birds": ["--finetune, --no-finetune", "--find-lr", "--data.path"],
    "lr-find": ["--low", "--high", "--steps", "--descending", "--model.architecture"],
    "split": ["[DATA] [RULE]", "--out", "--of", "--overwrite", "--data.label-column", "--data.no-streaming"],
    "background": ["SOURCE", "OUT", "--inset", "--iterations"],
    "evaluate": ["--model", "--data.path"],
    "doctor": ["--train", "--out"],
    "plan": ["--gpu", "--gpus", "--check", "--json", "--model.mask-ratio"],
    "reconstruct": ["MODEL", "--out", "--seed"],
    "convert": ["SOURCE", "OUT", "--license", "--norm-pix-loss", "--num-attention-heads", "--id2label"],
    "export": ["MODEL", "[OUT]", "--target", "--weights", "--picture", "--code", "--image-mean"],
    "card": ["EXPORT", "ORG/NAME", "--run", "--evaluations", "--license"],
    "publish": ["ORG/NAME", "--dry-run", "--private", "--create-pr", "--revision", "--checkpoint", "--sample"],
    "pull": ["ORG/NAME", "OUT", "--revision"],
    "demo": ["--reconstruct", "--classify", "--port"],
    "space": ["OUT", "--reconstruct", "--classify", "--title"],
}
SWEEP_HELP = {
    "partial": ["--blocks", "--seeds", "--init-from"],
    "seeds": ["--n", "--num-seeds", "--init-from"],
    "over": ["--vary", "--seeds", "--init-from"],
    "augment": ["--pipelines", "--seeds", "--model.architecture"],
    "transfer": ["--init-from", "--data-sets", "--base-lr", "--global-batch"],
    "resolution": ["--models", "--sizes", "--data.path"],
}


@pytest.mark.parametrize("words", [[c] for c in HELP] + [["sweep", kind] for kind in SWEEP_HELP], ids=" ".join)
def test_every_command_says_what_it_takes(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    missing = [flag for flag in (SWEEP_HELP if len(words) > 1 else HELP)[words[-1]] if flag not in text]
    assert not missing
    assert f"usage: hf-mae {' '.join(words)}" in text


def test_no_command_is_left_out_of_the_help(capsys):
    main(["--help"])
    usage = capsys.readouterr().out
    assert set(re.findall(r"^  hf-mae ([a-z-]+)", usage, re.MULTILINE)) == HELP.keys() | {"sweep"}
    main(["sweep", "--help"])
    kinds = re.findall(r"^hf-mae sweep ([a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    assert kinds == list(SWEEP_HELP)
    assert set(kinds) == sweeps._KINDS.keys()


# ------------------------------------------------------------------------------------------------ split, background


def stops(arguments, capsys) -> str:
    """Run a command that ends with one sentence; return it."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_file_of_a_named_split_can_be_used(tmp_path, capsys):
    file = tmp_path / "splits.json"
    main(["split", "digits", "stratified:50/50@1", "--of", "test", "--out", str(file)])
    assert "split test: train 180, validation 180; written to" in capsys.readouterr().out
    assert json.loads(file.read_text())["of"]["split"] == "test"
    parts = [open_source(Data(path="digits", splits=str(file)), name) for name in ("train", "validation")]
    assert [int(part.sizes.sum()) for part in parts] == [180, 180]
    assert all("split test" in part.where for part in parts)


def test_split_takes_the_fields_of_the_data(tmp_path, capsys):
    write_parquet(tmp_path / "data/test.parquet", range(30), label="kind_of_bird")
    folder, out = str(tmp_path / "data"), ["--out", str(tmp_path / "splits.json")]
    column = ["--data.label-column", "kind_of_bird", "--data.no-streaming"]
    main(["split", folder, "stratified:80/20", *out, *column])
    first = (tmp_path / "splits.json").read_bytes()
    assert json.loads(first)["of"]["split"] == "test"  # the only one
    main(["split", "--data.path", folder, "stratified:80/20", *column, *out])
    assert (tmp_path / "splits.json").read_bytes() == first
    other = ["split", folder, "stratified:80/20@1", *out, *column]
    assert "exists and holds something else" in stops(other, capsys)
    assert (tmp_path / "splits.json").read_bytes() == first
    main([*other, "--overwrite"])
    assert (tmp_path / "splits.json").read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "data.path is empty; name a folder"),
        (["digits", "half"], "rule='half' is no rule; use such as stratified"),
        (["digits", "random:50/50", "random:1/99"], "one data set and one rule are taken, and the data set is digits"),
        (
            ["digits", "--of", "dev"],
            "of='dev' is not a split of digits; it has train, test; name one of these with --of",
        ),
        (["digits", "--of", "test", "--data.split", "train"], "of='test' and data.split='train' name two splits"),
        (["digits", "--data.splits", "random:50/50"], "this command makes such a file; give the rule as RULE"),
    ],
)
def test_what_cannot_be_divided_is_said(arguments, message, capsys, tmp_path):
    assert message in stops(["split", *arguments, "--out", tmp_path / "splits.json"], capsys)
    assert not (tmp_path / "splits.json").exists()


def test_a_run_goes_on_when_its_file_of_splits_has_moved(tmp_path, capsys):
    rule = ["split", "digits", "stratified:50/25/25@1", "--out"]
    main([*rule, str(tmp_path / "a.json")])
    line = ["supervise", "supervise-digits", "--model.architecture", "test_resnet", "--max-steps", "1"]
    line += ["--global-batch", "16", "--num-workers", "0", "--eval-every", "0", "--evals.no-pictures"]
    line += ["--evals.split", "validation", "--out", str(tmp_path / "run")]
    main([*line, "--data.splits", str(tmp_path / "a.json")])
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "deep/b.json")
    capsys.readouterr()
    for same in (str(tmp_path / "deep/b.json"), "stratified:50/25/25@1"):
        main([*line, "--data.splits", same])
        assert "this run is finished (after 1 updates)" in capsys.readouterr().err

    lists = json.loads((tmp_path / "deep/b.json").read_text())
    lists["parts"] |= {"validation": lists["parts"]["test"], "test": lists["parts"]["validation"]}
    (tmp_path / "c.json").write_text(json.dumps(lists))
    for other in (tmp_path / "c.json", "stratified:50/25/25@2", "stratified:75/25@1"):  # judged or trained on others
        said = stops([*line, "--data.splits", other], capsys)
        assert re.search(r"changed.*data\.splits\).*start a new run", said), said


def test_background_says_what_it_did_and_where(tmp_path, capsys):
    pytest.importorskip("cv2", reason="OpenCV is an extra: hf_mae[birds]")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/tiny.png").write_bytes(picture(0, "PNG", side=2))
    (tmp_path / "in/bad.jpg").write_bytes(b"no picture")
    main(["background", str(tmp_path / "in"), str(tmp_path / "out")])
    record = tmp_path / "out/background.json"
    assert capsys.readouterr().out == (
        f"0 backgrounds removed, 1 pictures kept whole, 1 undecodable; which and why is in {record}\n"
    )
    assert json.loads(record.read_text())["counts"] == {"removed": 0, "kept": 1, "undecodable": 1}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["pretrain", "--list"], ["plan", "--list"], ["plan"], ["plan", "--check"]]
)
def test_the_command_answers_without_torch(arguments):
    code = f"""
import sys
sys.argv = ["/somewhere/bin/hf-mae", *{arguments!r}]
from hf_mae.cli import main
main()
heavy = {{"torch", "transformers", "numpy", "datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_command_can_still_use_every_public_name():
    result = python("""
import sys
sys.argv = ["hf-mae"]
import hf_mae
assert "torch" not in sys.modules
for name in hf_mae.__all__:
    getattr(hf_mae, name)
from hf_mae import MAEConfig
from transformers import AutoModelForPreTraining
from transformers import AutoConfig
assert type(AutoConfig.for_model("hf_mae")) is MAEConfig
try:
    hf_mae.nothing
except AttributeError as error:
    assert "'hf_mae' has no attribute 'nothing'" in str(error)
else:
    raise SystemExit("no error")
""")
    assert result.returncode == 0, result.stderr


def test_elsewhere_importing_the_package_imports_and_registers_its_classes():
    lazy = {"export"}  # no class to register, and a room of its own to import
    assert set(hf_mae.__all__) - lazy <= vars(hf_mae).keys()
    assert hf_mae.export.__name__ == "export"
    assert type(AutoConfig.for_model("hf_mae")) is hf_mae.MAEConfig


def test_sweep_transfer_fine_tunes_one_model_on_every_data_set(monkeypatch):
    asked = {}
    monkeypatch.setattr("hf_mae.sweep.sweep_variants", lambda recipes, **given: asked.update(recipes=recipes, **given))
    main(["sweep", "transfer", "--init-from", "resnet50.a1_in1k", "--epochs", "3", "--seeds", "2", "--out", "t"])
    assert list(asked["recipes"]) == ["cifar10", "cifar100", "flowers", "cars", "aircraft"]
    for recipe in asked["recipes"].values():
        assert (recipe.init_from, recipe.epochs, recipe.data.path.count("/")) == ("resnet50.a1_in1k", 3, 1)
        assert recipe.data.label_column is not None
    assert (asked["seeds"], asked["out"]) == (2, "t")


def test_sweep_transfer_says_which_data_have_to_be_brought(capsys):
    line = ["sweep", "transfer", "--init-from", "resnet50.a1_in1k", "--data-sets"]
    assert "hf-mae supervise transfer-inat2018 --data.path DATA" in stops([*line, "inat2018"], capsys)
    assert "did you mean flowers" in stops([*line, "flower"], capsys)


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    command = [sys.executable, "-m", "hf_mae.cli", "supervise", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        _, said = process.communicate()
    assert (process.returncode, said) == (141, b"")
