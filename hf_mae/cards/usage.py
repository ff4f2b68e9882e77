"""The usage lines of a card are run before they are published, and again as published.

A card promises that its lines work, so each block under "## Usage" is executed as it stands, in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from PIL import Image

SECONDS_PER_BLOCK = 900
"""A block that takes longer is stuck, or waits for a network that is not there."""
KEPT = 2000
"""Characters of output that are recorded."""
PICTURE = "picture.jpg"
"""What the usage lines open."""
PACKAGES = ("torch", "transformers", "timm", "onnxruntime", "huggingface_hub", "hf_mae", "pillow")

# Loads by what the block itself imports; a card of stock classes must not need our package.
_RUNNER = """
import runpy, sys
path, may_import = sys.argv[1], sys.argv[2] == "1"
runpy.run_path(path, run_name="__main__")
if "hf_mae" in sys.modules and not may_import:
    sys.exit("this block imported hf_mae without saying so")
"""


def usage_blocks(text: str) -> list[str]:
    """Return the Python blocks under the heading "## Usage" of a card, in order."""
    found = re.search(r"^## Usage[^\n]*\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return []
    return re.findall(r"^```python\n(.*?)^```", found.group(1), re.MULTILINE | re.DOTALL)


def run_usage(text: str, folder: Path | None, repo_id: str, *, picture: Path | None = None) -> dict[str, Any]:
    """Run the usage blocks of a card.

    Args:
        text: the card.
        folder: the files that will be published: `repo_id` is made to lead there and nothing is asked of the network.
            The lines of `transformers` run as they stand; where a client knows no folders (timm's `hf-hub:`,
            `hf_hub_download`) the name of the folder takes the place of the id, which is recorded. None runs every line
            as it stands against the Hub of `HF_ENDPOINT`, with an empty cache.
        repo_id: ORG/NAME, as the blocks write it.
        picture: what they open as picture.jpg; None is the flower that comes with scikit-learn.

    Returns:
        `blocks` (sha256, seconds and the end of the output of each; `substituted` where lines were changed),
        `versions`, `date` and `mode` ("folder" or "hub"). No token and no path of this machine is in it.

    Raises:
        ValueError: there is no block to run.
        RuntimeError: a block fails, with the end of what it wrote.
    """
    blocks = usage_blocks(text)
    if not blocks:
        raise ValueError(
            'the card has no ```python block under "## Usage"; a card without usage lines is not published'
        )
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hf_mae_usage_") as name:
        cwd = Path(name)
        _put_picture(cwd / PICTURE, picture)
        if folder is not None:
            link = cwd / repo_id
            link.parent.mkdir(parents=True, exist_ok=True)
            _stand_in(link, folder.resolve())
        environment = _environment(cwd, offline=folder is not None)
        for number, block in enumerate(blocks, 1):
            code = block if folder is None else _local(block, repo_id)
            script = cwd / f"block_{number}.py"
            script.write_text(code)
            done.append(_run_block(script, block, code, number, environment, folder))
    return {
        "blocks": done,
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "mode": "hub" if folder is None else "folder",
    }


def _run_block(
    script: Path, block: str, code: str, number: int, environment: dict[str, str], folder: Path | None
) -> dict[str, Any]:
    may_import = bool(re.search(r"^\s*(?:import|from) hf_mae\b", block, re.MULTILINE))
    started = time.monotonic()
    try:
        finished = subprocess.run(
            [sys.executable, "-c", _RUNNER, script.name, "1" if may_import else "0"],
            cwd=script.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=SECONDS_PER_BLOCK,
            check=False,
        )
        output, code_of_exit = finished.stdout, finished.returncode
    except subprocess.TimeoutExpired as caught:
        written = caught.stdout or b""
        output = written.decode(errors="replace") if isinstance(written, bytes) else written
        output, code_of_exit = f"{output}\nno end after {SECONDS_PER_BLOCK} seconds", 1
    hidden = [(str(script.parent), "."), (environment.get("HF_TOKEN", ""), "(token)")]
    hidden += [] if folder is None else [(str(folder.resolve()), "(folder)")]
    for secret, shown in hidden:
        output = output.replace(secret, shown) if secret else output
    tail = output.strip()[-KEPT:]
    if code_of_exit != 0:
        raise RuntimeError(
            f"usage block {number} of the card does not run, so the card would promise what is not so. It ended with:\n"
            f"{tail}"
        )
    record: dict[str, Any] = {
        "sha256": hashlib.sha256(block.encode()).hexdigest(),
        "seconds": round(time.monotonic() - started, 1),
        "output": tail,
    }
    if code != block:
        changed = zip(block.splitlines(), code.splitlines(), strict=True)
        record["substituted"] = [f"{before.strip()} -> {after.strip()}" for before, after in changed if before != after]
    return record


def _local(block: str, repo_id: str) -> str:
    """Return the block with the folder in place of the id where a client only knows ids."""
    block = block.replace(f"hf-hub:{repo_id}", f"local-dir:{repo_id}")
    return re.sub(rf'hf_hub_download\("{re.escape(repo_id)}", "([^"]+)"\)', rf'"{repo_id}/\1"', block)


def _stand_in(link: Path, folder: Path) -> None:
    """Let a name lead to a folder; where links are not allowed (Windows) the files are copied."""
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, link)


def _put_picture(path: Path, picture: Path | None) -> None:
    """Write an RGB JPEG, whatever the picture is."""
    if picture is None:
        from sklearn.datasets import load_sample_image  # takes a second

        made = Image.fromarray(load_sample_image("flower.jpg"))
    else:
        with Image.open(picture) as opened:
            made = opened.convert("RGB")
    made.save(path, quality=95)


def _environment(cwd: Path, *, offline: bool) -> dict[str, str]:
    """Return the environment with an empty cache and, where it is needed, the user's token."""
    elsewhere = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE", "HF_ASSETS_CACHE"}
    kept = {k: v for k, v in os.environ.items() if k not in elsewhere}
    kept |= {"HF_HOME": str(cwd / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if offline:
        kept["HF_HUB_OFFLINE"] = "1"
        kept.pop("HF_TOKEN", None)
    else:
        kept.pop("HF_HUB_OFFLINE", None)
        if token := get_token():  # HF_HOME, where it may lie, is another one there
            kept["HF_TOKEN"] = token
    return kept


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # an optional one
    return found
