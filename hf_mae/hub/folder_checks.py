"""Looking into a model folder for what stock classes need, and asking them in a process of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_mae.recipes.crop import BICUBIC, read_crop
from hf_mae.recipes.fields import unknown

PROCESSOR_FIELDS = (
    "image_processor_type",
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""What `preprocessor_config.json` must say: the stock classes have defaults that models were not trained on."""

TASKS = ("image-classification", "image-feature-extraction")
"""Tasks whose answers are understood here."""

TIMM_FIELDS = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "num_classes", "classifier")
"""What timm's `pretrained_cfg` must say."""


@dataclass(frozen=True)
class Check:
    """One precondition.

    Attributes:
        name: what is looked at.
        ok: whether it holds.
        found: what is there.
        remedy: what to do where it does not hold.
    """

    name: str
    ok: bool
    found: str
    remedy: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        ValueError: it is not JSON, or no object.
    """
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); export again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not an object; export again")
    return values


def labels_checks(config: Mapping[str, Any], task: str | None) -> list[Check]:
    """Look at the class names of a transformers config; a model of features has none."""
    if task == "image-feature-extraction":
        return []
    labels, inverse = config.get("id2label") or {}, config.get("label2id") or {}
    names = [str(name) for name in labels.values()]
    # A name may occur twice (ImageNet has two cranes); its number is then one of the two.
    wrong = [name for name in names if str(labels.get(str(inverse.get(name)))) != name]
    wrong += sorted(set(inverse) - set(names))
    found = f"differs at {', '.join(wrong[:5])}" if wrong else "the inverse of id2label"
    return [
        _names_check("id2label", names),
        Check("label2id", not wrong, found, "write label2id as the inverse of id2label"),
    ]


def processor_check(folder: Path, config: Mapping[str, Any]) -> Check:
    """Look at `preprocessor_config.json`."""
    remedy = "write every field (hf-mae export does): the stock classes' defaults differ"
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return Check("processor", False, "no preprocessor_config.json", remedy)
    processor = read_json(path)
    missing = [name for name in PROCESSOR_FIELDS if processor.get(name) is None]
    if processor.get("do_center_crop") and not processor.get("crop_size"):
        missing.append("crop_size")
    if config.get("num_channels", 3) == 3 and processor.get("do_convert_rgb") is False:
        missing.append("do_convert_rgb: true (grey and transparent pictures would fail)")
    if missing:
        return Check("processor", False, f"without {', '.join(missing)}", remedy)
    side = config.get("image_size")
    if side is None:
        return Check("processor", True, f"{processor['image_processor_type']}, every field")
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    try:  # another filter is for the author to choose
        crop = read_crop({**processor, "resample": BICUBIC}, size)
    except ValueError as error:
        return Check("processor", False, str(error), "state what the model was measured with: export it again")
    return Check("processor", True, f"{processor['image_processor_type']}, every field: {crop.words()}")


def timm_checks(config: Mapping[str, Any], task: str | None) -> list[Check]:
    """Look at a config in timm's format."""
    cfg, args = config.get("pretrained_cfg") or {}, config.get("model_args") or {}
    names = [str(name) for name in config.get("label_names") or cfg.get("label_names") or ()]
    missing = [name for name in TIMM_FIELDS if cfg.get(name) is None]
    twice = "num_classes" in args
    return [
        *([] if task == "image-feature-extraction" else [_names_check("label_names", names)]),
        Check(
            "model_args",
            not twice,
            "num_classes, which transformers then gets twice" if twice else "no num_classes",
            "delete model_args.num_classes from config.json",
        ),
        Check(
            "pretrained_cfg",
            not missing,
            f"without {', '.join(missing)}" if missing else "every field",
            "write every field (hf-mae export does)",
        ),
    ]


def _names_check(field: str, names: Sequence[str]) -> Check:
    numbered = [name for name in names if re.fullmatch(r"LABEL_\d+", name)]
    found = "none" if not names else f"{len(numbered)} are LABEL_n" if numbered else f"{len(names)} names"
    remedy = f"write the names of the classes into {field} of config.json"
    return Check("labels", bool(names) and not numbered, found, remedy)


# Run in a new interpreter (-I: no current folder, no PYTHONPATH), offline, so that nothing but the folder and the stock
# libraries can answer. hf_mae would register its classes when imported.
_ASK = """
import json, sys
folder, task, picture = sys.argv[1:]
from PIL import Image
from transformers import pipeline
pipe = pipeline(task, model=folder)
image = Image.open(picture).convert("RGB")
if task == "image-classification":
    answer = [{"label": a["label"], "score": a["score"]} for a in pipe(image, top_k=5)]
else:
    import numpy as np
    one, two = (np.asarray(pipe(image)) for _ in range(2))
    answer = {"shape": list(one.shape), "same": bool(np.array_equal(one, two) and np.isfinite(one).all())}
assert "hf_mae" not in sys.modules, "hf_mae was imported"
print(json.dumps(answer))
"""


def pipeline_check(folder: Path, task: str, picture: Path | None) -> Check:
    """Run `pipeline(task, folder)` on a picture in a process without hf_mae; None takes `bundled_picture()`."""
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if picture is None:
        picture = bundled_picture()
    name, remedy = f'pipeline("{task}")', "load it with stock transformers to see the whole error"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-I", "-c", _ASK, str(folder.absolute()), task, str(picture.absolute())]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check(name, False, f"fails on {picture.name}: {last[:300]}", remedy)
    answer = json.loads(done.stdout.splitlines()[-1])
    if task == "image-classification":
        said = ", ".join(f"{a['label']} {a['score']:.3f}" for a in answer)
        return Check(name, True, f"{picture.name}: {said}")
    found = f"{picture.name}: features {answer['shape']}, {'the same' if answer['same'] else 'different'} twice"
    return Check(name, answer["same"], found, "its answers are random; export another class")


def bundled_picture() -> Path:
    """Return the photograph of a flower that comes with scikit-learn."""
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images" / "flower.jpg"
