"""Every export target beside the model it was made of: largest difference in float64 and float32, and the time it took.

usage: export.py [--sizes ti b] [--timm resnet18 ...] [--runs RUN ...] --out DIR

Each line is one `hf_mae.export`: the stock class is loaded in a process without hf_mae, and both compute in float64 and
float32 on the same images. Weights are random in every tensor (norms, biases and running statistics too), as weights at
their initial values would hide what is left out; runs are real ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

import hf_mae
from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_mae.models.timm_models import TimmSpec, create, write_timm_folder

CASES = (
    ("pretraining", "vit_mae"),
    ("pretraining", "hf_mae"),
    ("encoder", "vit"),
    ("encoder", "beit"),
    ("encoder", "timm"),
    ("encoder, cls token", "timm"),
    ("encoder", "onnx"),
    ("classifier, mean pooling", "beit"),
    ("classifier, mean pooling", "timm"),
    ("classifier, cls token", "vit"),
    ("classifier, cls token", "timm"),
    ("probe (batch norm folded)", "vit"),
    ("classifier, mean pooling", "onnx"),
)
CLASSES = tuple(f"class {i}" for i in range(10))
TIMM = ("resnet18", "rexnet_100")
"""Architectures of timm; both have running statistics, one attention to channels as well."""


@torch.no_grad()
def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model with every weight and statistic moved away from where it starts."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in ("pos_embed", "decoder_pos_embed") or not tensor.is_floating_point():
            continue
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        else:
            tensor.add_(torch.randn_like(tensor) * 0.02)
    return model.eval()


def build(what: str, size: str) -> torch.nn.Module:
    config = MAEConfig.from_size(size, id2label=dict(enumerate(CLASSES)))
    if what == "pretraining":
        return MAEForPreTraining(config)
    config.pool = "cls" if "cls" in what or "probe" in what else "mean"
    if what.startswith("encoder"):
        return MAEModel(config)
    config.head = "batchnorm" if "probe" in what else "linear"
    config.pos_embed = "learned"
    return MAEForImageClassification(config)


def timm_folder(architecture: str, folder: Path) -> Path:
    """Write a model of timm with random weights, as training does."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    spec = TimmSpec(architecture, CLASSES, (160, 160), (224, 224), 0.95, 3, 0.0, mean, std)
    write_timm_folder(folder, spec, shaken(create(spec)).state_dict())
    return folder


def row(what: str, target: str, model: object, out: Path) -> dict[str, object]:
    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    hf_mae.export(model, out, target)  # pyright: ignore[reportArgumentType]
    seconds = time.perf_counter() - started
    record = json.loads((out / "export.json").read_text())
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    shutil.rmtree(out)
    return {
        "what": what,
        "target": record["target"],
        "class": record["class"],
        **{name: record["parity"].get(name) for name in ("what", "float64", "float32") if name != "what"},
        "compared": record["parity"]["what"],
        "processor": record.get("processor"),
        "megabytes": round(size / 1e6, 1),
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| model | target | class | compared | float64 | float32 | MB | s |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        numbers = [f"{r[name]:.1e}" if r[name] is not None else "-" for name in ("float64", "float32")]
        lines.append(
            f"| {r['what']} | {r['target']} | `{r['class']}` | {r['compared']} | {' | '.join(numbers)} | "
            f"{r['megabytes']} | {r['seconds']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["ti", "b"])
    parser.add_argument("--timm", nargs="*", default=list(TIMM))
    parser.add_argument("--runs", nargs="*", default=[], type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for size in given.sizes:
        for what, target in CASES:
            rows.append(row(f"ViT-{size.upper()} {what}", target, shaken(build(what, size)), given.out / "export"))
            print(table(rows).splitlines()[-1], flush=True)
    for architecture in given.timm:
        model = timm_folder(architecture, given.out / "model")
        for target in ("timm", "onnx"):
            rows.append(row(architecture, target, model, given.out / "export"))
            print(table(rows).splitlines()[-1], flush=True)
        shutil.rmtree(model)
    for run in given.runs:
        name = json.loads((run / "recipe.json").read_text())["name"]
        for target in ("auto", "onnx"):
            rows.append(row(f"run of {name}", target, run, given.out / "export"))
            print(table(rows).splitlines()[-1], flush=True)
    (given.out / "export.json").write_text(json.dumps(rows, indent=2) + "\n")
    (given.out / "export.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
