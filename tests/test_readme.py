"""What the README shows works as printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hf_mae.cli import parse_recipe
from hf_mae.recipes.base import check
from hf_mae.recipes.mae import PRESETS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
COMMANDS = [
    line.split("#")[0]
    for fence in re.findall(r"```\n(.*?)```", README, re.S)
    for line in fence.splitlines()
    if re.search(r"hf-mae pretrain|scripts/pretrain.py", line) and "--help" not in line and "--list" not in line
]
FLAGS = re.findall(r"`(--(?:model|augment|data|engine|optim)\.[^`]*)`", README)


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["encoder"](scope["torch"].randn(1, 3, 224, 224)).last_hidden_state.shape == (1, 197, 384)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    arguments = shlex.split(re.split(r"hf-mae pretrain|scripts/pretrain\.py", line)[-1])
    check(parse_recipe(PRESETS, arguments, default="quickstart"))


@pytest.mark.parametrize("flags", FLAGS)
def test_every_flag_in_the_text_exists(flags):
    arguments = shlex.split(flags)
    if len(arguments) == 1 and not re.search(r"\.no-|mask-tokens|engine\.(compile|tf32)$", flags):
        arguments.append({"--engine.expect-processes": "8", "--data.max-bad-fraction": "0.1"}.get(flags, "0.9"))
    parse_recipe(PRESETS, ["quickstart", *arguments], default="quickstart")


def test_there_is_something_to_check():
    assert len(COMMANDS) >= 4
    assert len(FLAGS) >= 8
