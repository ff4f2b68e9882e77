"""A Hugging Face Space: the page of `hf-mae demo` for published models, as a folder to upload.

hf_mae is not on PyPI, so the folder brings a copy of the package; what that needs is in `requirements.txt`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import hf_mae
from hf_mae.demo.app import MAX_AT_ONCE, MAX_WAITING

MARK = '"""A Space written by `hf-mae space`: '
NAMES = ("README.md", "LICENSE", "requirements.txt", "app.py", "hf_mae")
"""What a Space consists of."""

REFERENCE = "Check out the configuration reference at "
"""What the Hub writes into the README.md of a new Space, before an address."""

CPU_WHEELS = "https://download.pytorch.org/whl/cpu"

REQUIREMENTS = (
    "torch>=2.6",
    "transformers>=5.0",
    "accelerate>=1.10",
    "datasets>=4.0",
    "huggingface_hub>=1.0",
    "safetensors>=0.6",
    "numpy>=2.0",
    "pyarrow>=17",
    "pillow>=11.0",
    "simplejpeg>=1.8",
    "tqdm>=4.66",
    "timm>=1.0.21",
    "matplotlib>=3.9",
    "psutil>=5.9",
    "scikit-learn>=1.5",
)
"""What the page imports, with the lower bounds of pyproject.toml; gradio comes with the Space. They are not read from
what is installed, because that record is as old as the installation while a checkout moves on."""


def write_space(
    out: Path, *, reconstruct: str | None, classify: str | None, title: str | None = None, overwrite: bool = False
) -> Path:
    """Write the folder of a Space.

    Args:
        out: the folder; made if need be.
        reconstruct: Hub id of a pretraining model with its decoder, of ours or a vit_mae.
        classify: Hub id of a classifier; of ours, of stock transformers, or in timm's format.
        title: of the page; None makes one of the models' names.
        overwrite: write again what an earlier call wrote into `out`; other files there stay, also a LICENSE that
            differs from ours.

    Returns:
        The folder: `README.md` (what the Hub reads), `requirements.txt`, `app.py` and `hf_mae/`.

    Raises:
        ValueError: no model is named, one is not a Hub id, `out` holds files of the same names that are not ours, or
            gradio is not installed. Nothing is written then. The README.md of a new Space may be there.
    """
    models = {"reconstruct": reconstruct, "classify": classify}
    named = {field: model for field, model in models.items() if model is not None}
    if not named:
        raise ValueError("no model is named; give reconstruct=ORG/NAME, classify=ORG/NAME or both")
    for field, model in named.items():
        _check_hub_id(field, model)
    _check_out(out, overwrite)
    try:
        version = metadata.version("gradio")
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            "gradio is not installed, and a Space names the version that its page was seen with; "
            'pip install "hf_mae[demo]" and look at the page with hf-mae demo'
        ) from error
    title = title or f"{' and '.join(model.partition('/')[2] for model in named.values())}: try it"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as made:
        new = Path(made)
        (new / "README.md").write_text(_readme(title, list(named.values()), version), encoding="utf-8")
        (new / "requirements.txt").write_text(_requirements(), encoding="utf-8")
        (new / "app.py").write_text(_app(models), encoding="utf-8")
        package = Path(hf_mae.__file__).parent
        _copy_package(package, new / "hf_mae")
        # A LICENSE that is there is ours, or was put in place of ours: never replaced.
        if (licence := _licence(package)) and not (out / "LICENSE").exists():
            (new / "LICENSE").write_text(licence, encoding="utf-8")
        out.mkdir(exist_ok=True)
        for path in sorted(new.iterdir()):
            old = out / path.name
            if old.is_dir():
                old.replace(new / f"former_{path.name}")  # removed with the temporary folder, when all is in place
            path.replace(old)
    return out


def _check_hub_id(field: str, model: str) -> None:
    if Path(model).expanduser().exists():
        raise ValueError(
            f"{field}={model} is a folder of this machine, which a Space cannot see; publish it first "
            f"(hf-mae publish {shlex.quote(model)} ORG/NAME) and name ORG/NAME"
        )
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model, re.ASCII):
        raise ValueError(f"{field}={model} is no Hub id; a Space takes published models: name ORG/NAME")


def _copy_package(package: Path, out: Path) -> None:
    """Copy the code, the mark of its types and the templates of cards; what else lies there is not for others."""
    for path in sorted(package.rglob("*")):
        part = path.relative_to(package)
        wanted = path.suffix == ".py" or path.name == "py.typed" or part.parts[0] == "model_cards"
        if path.is_file() and wanted and not any(name.startswith((".", "__pycache__")) for name in part.parts):
            (out / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / part)


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a folder")
    if _text(out / "app.py").startswith(MARK):
        if not overwrite:
            raise ValueError(f"out={out} holds a Space already; choose another folder, or write again with --overwrite")
        return
    taken = [name for name in NAMES if (out / name).exists()]
    # The copy of a new Space's repository has a README.md and .git only, and is what one uploads from.
    front = re.fullmatch(r"---[ \t]*\n(.*?)\n---(.*)", _text(out / "README.md"), re.DOTALL)
    words = front[2].strip() if front else ""
    of_the_hub = len(words.removeprefix(REFERENCE).split()) <= (1 if words.startswith(REFERENCE) else 0)
    if front and of_the_hub and re.search(r"^sdk:\s*[\"']?gradio\b", front[1], re.MULTILINE):
        taken.remove("README.md")
    if taken:
        raise ValueError(
            f"out={out} holds {', '.join(taken)} that hf-mae space did not write; choose another folder, or move "
            f"{'it' if len(taken) == 1 else 'them'} away"
        )


def _text(path: Path) -> str:
    """Return the text of a file, none where there is no such file or it is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _readme(title: str, models: list[str], version: str) -> str:
    # JSON strings are YAML strings, whatever is in them.
    listed = "\n".join(f"- {json.dumps(model)}" for model in models)
    links = "\n".join(f"- [{model}](https://huggingface.co/{model})" for model in models)
    return f"""---
title: {json.dumps(title)}
sdk: gradio
sdk_version: {json.dumps(version)}
app_file: app.py
license: apache-2.0
models:
{listed}
---

# {title}

Your own picture, reconstructed or classified by:

{links}

The licence above is that of the code. The models have their own; their cards say which.
To run it on your machine: `pip install "gradio=={version}" -r requirements.txt`, then `python app.py`.
"""


def _app(models: dict[str, str | None]) -> str:
    arguments = ", ".join(f"{field}={json.dumps(model) if model else None}" for field, model in models.items())
    return "\n".join(
        [
            f'{MARK}a page for published models."""',
            "",
            "from hf_mae.demo.app import build",
            "",
            f"page = build({arguments})",
            f"page.queue(max_size={MAX_WAITING}, default_concurrency_limit={MAX_AT_ONCE})",
            'page.launch(max_file_size="50mb")',
            "",
        ]
    )


def _requirements() -> str:
    return "\n".join([f"--extra-index-url {CPU_WHEELS}", *REQUIREMENTS]) + "\n"


def _licence(package: Path) -> str | None:
    """Return the text of the licence, from the checkout or from what was installed."""
    if (beside := package.parent / "LICENSE").is_file():
        return beside.read_text(encoding="utf-8")
    installed = [path for path in metadata.files("hf_mae") or () if path.name == "LICENSE"]
    return installed[0].read_text(encoding="utf-8") if installed else None
