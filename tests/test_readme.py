"""What the README shows works as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hf_mae.cli import main, parse_recipe, parse_sweep
from hf_mae.recipes.checks import check
from hf_mae.recipes.classification import check_classifier
from hf_mae.recipes.evaluation import EVALUATIONS, Evaluation
from hf_mae.recipes.mae import PRESETS
from hf_mae.recipes.supervised import SUPERVISE, SuperviseRecipe, check_supervise
from hf_mae.recipes.transfer import FINETUNE, PROBE

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
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
TO_THE_HUB = re.findall(r"^hf-mae (?:convert|export|card|publish|pull|demo|space) .*", README, re.MULTILINE)
FLAGS = re.findall(r"`(--(?:model|augment|data|engine|optim|loss)\.[^`]*)`", README)


def test_the_python_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    first, second = re.findall(r"```python\n(.*?)```", README, re.S)
    # The model that one example saves is what the other begins with.
    for example in (second, first) if 'save_pretrained("mae-vit-s")' in second else (first, second):
        exec(compile(example, "README.md", "exec"), scope)
    assert scope["encoder"](scope["torch"].randn(1, 3, 224, 224)).last_hidden_state.shape == (1, 197, 384)
    assert scope["model"].config.id2label == {0: "cat", 1: "dog"}


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


@pytest.mark.parametrize("line", TO_THE_HUB)
def test_every_command_to_the_hub_takes_its_flags(line, capsys):
    command, *words = shlex.split(line.split("#")[0])[1:]
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and word not in text] == []


@pytest.mark.parametrize("name", re.findall(r"`hf-mae evaluate (.*?)\|", README)[0].replace("`", "").split(", "))
def test_every_evaluation_named_exists(name):
    name = name.strip()
    assert (name if name.startswith("imagenet") else f"imagenet{name}") in EVALUATIONS


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_in_the_text_exists(flags):
    arguments = shlex.split(flags)
    if len(arguments) == 1 and not re.search(r"\.no-|mask-tokens|engine\.(compile|tf32)$", flags):
        arguments.append({"--engine.expect-processes": "8", "--data.max-bad-fraction": "0.1"}.get(flags, "0.9"))
    if flags.startswith("--loss"):
        parse_recipe(SUPERVISE, arguments, default="supervise-digits")
    else:
        parse_recipe(PRESETS, ["quickstart", *arguments], default="quickstart")


def test_there_is_something_to_check():
    assert len(COMMANDS) >= 4
    assert len(TO_THE_HUB) >= 9
    assert len(FLAGS) >= 8
