"""The command line: what it answers without torch, and how recipe and hardware are read together."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoConfig

import hf_mae
from hf_mae.cli import main, parse_plan
from hf_mae.recipes.mae import PRESETS


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
    assert set(hf_mae.__all__) <= vars(hf_mae).keys()
    assert type(AutoConfig.for_model("hf_mae")) is hf_mae.MAEConfig
