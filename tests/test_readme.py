"""What the README shows works as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hf_mae.cli import main, parse_recipe, parse_sweep
from hf_mae.recipes.checks import check
from hf_mae.recipes.classification import check_classifier
from hf_mae.recipes.evaluation import EVALUATIONS, Evaluation
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.supervised import SUPERVISE, TRANSFER, SuperviseRecipe, check_supervise
from hf_mae.recipes.transfer import FINETUNE, PROBE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0]
    for fence in re.findall(
        r"^```\n(.*?)^```$", re.sub(r"^```\w+\n.*?^```$", "", README, flags=re.S | re.M), re.S | re.M
    )
    for line in fence.splitlines()
    if re.search(r"hf-mae (pretrain|finetune|probe|supervise|evaluate|sweep)|scripts/pretrain.py", line)
    and "--help" not in line
    and "--list" not in line
]
OTHERS = re.findall(
    r"^hf-mae (?:convert|export|card|publish|pull|demo|space|plan|birds|split|lr-find|background|reconstruct) .*",
    README,
    re.MULTILINE,
)
DIGITS = README.split("## What is the encoder worth?")[1].split("```")[1]
"""What is run with the encoder of `hf-mae pretrain`."""
FLAGS = re.findall(r"`(--(?:model|augment|data|engine|optim|loss)\.[^`]*)`", README)


def fresh(code: str, folder: Path) -> str:
    """Run code in a process of its own, in an empty folder and without the Hub; return what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_each_python_example_runs_alone_as_printed(number, tmp_path):
    shown = {
        "encoder": "print(tuple(encoder(torch.randn(1, 3, 224, 224)).last_hidden_state.shape), sorted(vars(out)))",
        "cats-and-dogs": "print(MAEForImageClassification.from_pretrained('cats-and-dogs').config.id2label)",
    }
    which = "cats-and-dogs" if "cats-and-dogs" in EXAMPLES[number] else "encoder"
    said = fresh(f"{EXAMPLES[number]}\n{shown[which]}", tmp_path)
    assert ("{0: 'cat', 1: 'dog'}" if which == "cats-and-dogs" else "(1, 197, 384)") in said


def test_both_python_examples_are_found():
    assert len(EXAMPLES) == 2
    assert sum("cats-and-dogs" in example for example in EXAMPLES) == 1


def test_metrics_are_there_after_importing_the_package_alone(tmp_path):
    shown = re.search(r"`(hf_mae\.metrics\.\w+\(.*?\))`", README).group(1)
    said = fresh(
        f"import hf_mae\nmetric = {shown}\n"
        "print(metric.compute(references=[1], predictions=[[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]))\n"
        "print(hf_mae.metrics.PerClassAccuracy.__name__, hasattr(hf_mae, 'no_such_room'))",
        tmp_path,
    )
    assert "1.0" in said
    assert "PerClassAccuracy False" in said


def test_only_what_exists_is_promised():
    """Protocols, targets and data sets that are not there yet are said not to be."""
    words = " ".join(README.split())
    assert "very protocol" not in words
    assert re.search(r"Detection \(COCO\) and segmentation \(ADE20K\) are not there yet", words)
    assert re.search(r"Not there yet: PCA and token targets", words)
    have, lack = ([r.name for r in TRANSFER if bool(r.data.path) is public] for public in (True, False))
    assert (len(have), lack) == (5, ["transfer-inat2018", "transfer-inat2019"])
    row = next(line for line in README.splitlines() if "`transfer-cifar10`" in line)
    assert "runs the five" in row
    assert "one learning rate" in row


def test_the_same_bits_are_promised_where_they_can_be_kept():
    section = README.split("## Stop and continue")[1].split("## ")[0]
    assert re.search(r"\*\*on CPUs to the last bit\*\*.*threads, processes, micro-batch and torch", section)
    assert re.search(r"\*\*on GPUs\*\* .* only with `--engine\.deterministic`", section)
    outside = README.replace(section, "")
    assert "last bit" not in outside
    assert len(re.findall("same bits", outside)) == len(re.findall(r'same bits, under the terms of "Stop', outside))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    command, rest = re.search(r"(?:hf-mae |scripts/)(\w+)(?:\.py)?(.*)", line).groups()
    arguments = shlex.split(rest)
    if command == "pretrain":
        check(parse_recipe(PRESETS, arguments, default="quickstart"))
    elif command == "sweep":
        recipe = parse_sweep(arguments).recipe
        if isinstance(recipe, Evaluation):
            return
        (check_supervise if isinstance(recipe, SuperviseRecipe) else check_classifier)(recipe)
    elif command == "supervise":
        check_supervise(parse_recipe(SUPERVISE, arguments, default="supervise-digits"))
    elif command == "evaluate":
        assert parse_recipe(EVALUATIONS, arguments, default="own").name in EVALUATIONS
    else:
        presets = {"finetune": FINETUNE, "probe": PROBE}[command]
        check_classifier(parse_recipe(presets, arguments, default=next(iter(presets))))


@pytest.mark.parametrize("line", OTHERS)
def test_every_other_command_takes_its_flags(line, capsys):
    command, *words = shlex.split(line.split("#")[0])[1:]
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in text] == []


@pytest.mark.slow
def test_the_commands_on_the_digits_run_one_after_the_other(tmp_path, monkeypatch):
    """As printed, with a few updates in place of half a minute."""
    monkeypatch.chdir(tmp_path)
    few = ["--max-steps", "2", "--num-workers", "0", "--log-every", "1"]
    main(["pretrain", *few, "--evals.pictures", "0", "--evals.no-probe"])
    lines = [line.split("#")[0] for line in DIGITS.splitlines() if line.startswith("hf-mae ")]
    assert len(lines) == 6
    for line in lines:
        command = shlex.split(line)[1:]
        main(command if command[0] == "evaluate" else [*command, *few, "--evals.no-pictures"])
    table = (tmp_path / "runs" / "finetune-digits-partial" / "table.md").read_text()
    assert [row.split("|")[1].split()[0] for row in table.splitlines()[2:]] == ["0", "0.5", "1", "2", "4"]
    assert (tmp_path / "runs" / "finetune-digits-seeds" / "table.md").is_file()


@pytest.mark.parametrize("name", re.findall(r"`hf-mae evaluate (.*?)\|", README)[0].replace("`", "").split(", "))
def test_every_evaluation_named_exists(name):
    name = name.strip()
    assert (name if name.startswith("imagenet") else f"imagenet{name}") in EVALUATIONS


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_in_the_text_exists(flags):
    arguments = shlex.split(flags)
    if len(arguments) == 1 and not re.search(r"\.no-|mask-tokens|engine\.(compile|tf32|deterministic)$", flags):
        arguments.append({"--engine.expect-processes": "8", "--data.max-bad-fraction": "0.1"}.get(flags, "0.9"))
    if flags.startswith("--loss"):
        parse_recipe(SUPERVISE, arguments, default="supervise-digits")
    else:
        parse_recipe(PRESETS, ["quickstart", *arguments], default="quickstart")


def test_there_is_something_to_check():
    assert len(COMMANDS) >= 4
    assert len(OTHERS) >= 15
    assert len(FLAGS) >= 8
