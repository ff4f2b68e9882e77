"""Flat modelling files for a research repository, for readers without this package (`trust_remote_code=True`).

transformers runs files beside `config.json` that import each other as `from .name import ...`. Those written here are
this package's own modules with two changes: their imports of each other, and no registration with the auto classes,
which would be in the way of a later `import hf_mae`. This package never needs them and never runs them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

# Modules of the package outside of hf_mae.models that the models import, and what they are called flat.
OTHERS = {"recipes.base": "sizes", "patience": "patience", "resolve": "resolve"}

# The auto classes that each class of ours answers to, beside AutoConfig.
AUTO_CLASSES = {
    "MAEForPreTraining": {
        "AutoModel": "modeling_mae.MAEModel",
        "AutoModelForPreTraining": "modeling_mae.MAEForPreTraining",
    },
    "MAEModel": {"AutoModel": "modeling_mae.MAEModel"},
    "MAEForImageClassification": {
        "AutoModelForImageClassification": "modeling_classification.MAEForImageClassification"
    },
}
_IMPORT = re.compile(r"^from hf_mae\.([\w.]+) import ", flags=re.MULTILINE)


def write_code(folder: Path) -> None:
    """Write the modelling files of a model folder into it, and name them in its `config.json` (`auto_map`).

    Only the modules that its class needs are written. Where `hf_mae` is imported its own classes are taken, and the
    files are not run; without it transformers refuses to run them unless it is told to trust them.

    Args:
        folder: a folder that a model of this package was saved into.

    Raises:
        ValueError: it is not such a folder.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json; save a model of hf_mae into it first.")
    config = json.loads(path.read_text())
    kind = (config.get("architectures") or [None])[0]
    if config.get("model_type") != "hf_mae" or kind not in AUTO_CLASSES:
        raise ValueError(
            f"{folder} holds {kind} of model_type={config.get('model_type')!r}; modelling files go with this package's "
            f"classes only: {', '.join(AUTO_CLASSES)}. Stock classes need none."
        )
    auto_map = {"AutoConfig": "configuration_mae.MAEConfig"} | AUTO_CLASSES[kind]
    for name, text in modules(entry.partition(".")[0] for entry in auto_map.values()).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    path.write_text(json.dumps(config | {"auto_map": auto_map}, indent=2) + "\n")


def modules(entries: Iterable[str]) -> dict[str, str]:
    """Return the source of modules of `hf_mae.models` and of all that they import, flat, by name.

    Args:
        entries: names of modules.

    Returns:
        Names to texts, see `OTHERS`.
    """
    from hf_mae import __version__

    found: dict[str, str] = {}
    missing = sorted(set(entries))
    while missing:
        name = missing.pop()
        home = {flat: module for module, flat in OTHERS.items()}.get(name, f"models.{name}").replace(".", "/") + ".py"
        source = (files("hf_mae") / home).read_text(encoding="utf-8")
        text = _flatten(_sizes(source) if name == OTHERS["recipes.base"] else source)
        found[name] = f"# From hf_mae {__version__} (Apache-2.0), {home}, made flat.\n{text}"
        wanted = re.findall(r"^from \.(\w+) import ", text, flags=re.MULTILINE)
        missing += sorted(set(wanted) - found.keys() - set(missing))
    return found


def _flatten(source: str) -> str:
    """Rewrite imports of this package's models and drop registrations; line by line, as comments must stay."""
    drop: set[int] = set()
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Expr) and _is_registration(statement.value):
            drop.update(range(statement.lineno, (statement.end_lineno or statement.lineno) + 1))
    lines = source.splitlines(keepends=True)
    text = "".join(line for number, line in enumerate(lines, 1) if number not in drop).rstrip() + "\n"
    text = _IMPORT.sub(lambda m: f"from .{OTHERS.get(m[1], m[1].removeprefix('models.'))} import ", text)
    left = [
        node.module
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("hf_mae")
    ]
    assert not left, f"imports that are not flat: {left}"
    return text


def _is_registration(call: ast.expr) -> bool:
    return (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "register"
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id.startswith("Auto")
    )


def _sizes(source: str) -> str:
    """Return the part of the recipes that the models need: `Size` and `VIT_SIZES`, with their comments."""
    lines = source.splitlines()
    parts = [
        '"""Sizes of pictures and of encoders."""',
        "from __future__ import annotations",
        "from typing import TypeAlias",
    ]
    for statement in ast.parse(source).body:
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and statement.target.id in ("Size", "VIT_SIZES")
        ):
            first = statement.lineno - 1
            while lines[first - 1].startswith("#"):
                first -= 1
            parts.append("\n".join(lines[first : statement.end_lineno]))
    return "\n\n".join(parts) + "\n"
