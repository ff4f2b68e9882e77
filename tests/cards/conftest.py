"""A run and its export, written by hand: what is on record is known to the last digit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_mae.exporting.lineage import lineage

CLASSES = ["cat", "dog", "owl"]
EVALUATION = {
    "step": 30,
    "classes": CLASSES,
    "weights": {
        "examples": 12,
        "top1": 0.7654,
        "top5": None,
        "loss": 0.6217,
        "ece": 0.0421,
        "mean_per_class_accuracy": 0.7432,
        "per_class_accuracy": [0.75, 0.5, None],
        "class_examples": [8, 4, 0],
        "confusion": [[0, 0, 6], [0, 1, 2], [1, 1, 2], [1, 0, 2]],
        "bins": [{"lower": 0.0, "upper": 1.0, "count": 12, "confidence": 0.7, "accuracy": 0.66}],
        "worst": [],
    },
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def recipe(**changed: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "name": "finetune-small",
        "source": "ours: Table 9",
        "out": "/home/ada/secret/run",
        "seed": 7,
        "global_batch": 64,
        "init_from": "",
        "data": {"path": "/home/ada/secret/animals", "splits": None},
        "model": {"pool": "mean", "drop_path_rate": 0.1},
        "augment": {"crop": "random-resized", "scale": [0.2, 1.0], "flip": True, "label_smoothing": 0.1},
        "optim": {"name": "adamw", "base_lr": 0.002, "weight_decay": 0.05, "betas": [0.9, 0.999]},
        "schedule": {"name": "cosine", "warmup_epochs": 5, "min_lr": 1e-6},
        "evals": {"split": "validation", "best": "top1"},
        "engine": {"precision": "bf16"},
    }
    return made | changed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A classification run of 30 updates, started twice."""
    folder = tmp_path / "runs" / "animals"
    write_json(folder / "recipe.json", recipe())
    start = {
        "time": "2026-11-01T08:00:00Z",
        "step": 0,
        "processes": 2,
        "micro_batch": 32,
        "pids": [4711, 4712],
        "device": "cuda:0",
        "cpus": 8,
        "python": "3.11.7",
        "packages": {"torch": "2.14.1", "hf_mae": "0.1.0"},
        "data": {"rows": 1234, "classes": CLASSES, "revision": None},
        "hostname": "ada-laptop",
    }
    write_json(folder / "environment.json", {"starts": [start, start | {"step": 20}]})
    rows = [
        {"step": 10, "epoch": 1.0, "examples_seen": 640, "loss": 1.1, "lr": 0.0004, "images_per_second": 64.0},
        {"step": 20, "epoch": 2.0, "examples_seen": 1280, "loss": 0.9, "lr": 0.0005, "images_per_second": 32.0},
        {"step": 20, "epoch": 2.0, "examples_seen": 1280, "top1": 0.8123, "eval_loss": 0.5},
        {"step": 30, "epoch": 3.0, "examples_seen": 1920, "loss": 0.8, "lr": 0.0001, "images_per_second": 64.0},
        {"step": 30, "epoch": 3.0, "examples_seen": 1920, "top1": 0.7654, "eval_loss": 0.6217},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "evaluation.json", EVALUATION)
    best = {"metric": "top1", "value": 0.8123, "step": 20, "numbers": {"top1": 0.8123, "eval_loss": 0.5, "ece": 0.03}}
    write_json(folder / "best" / "best.json", best)
    return folder


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of the last weights of that run."""
    folder = tmp_path / "export"
    write_json(
        folder / "config.json",
        {
            "architectures": ["BeitForImageClassification"],
            "image_size": 32,
            "hidden_size": 16,
            "num_channels": 3,
            "id2label": {str(i): name for i, name in enumerate(CLASSES)},
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"shortest_edge": 36},
            "do_center_crop": True,
            "crop_size": {"height": 32, "width": 32},
            "resample": 3,
            "do_convert_rgb": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    )
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, folder / "model.safetensors")
    write_json(
        folder / "export.json",
        {
            "format": 1,
            "target": "beit",
            "class": "BeitForImageClassification",
            "library": "transformers",
            "task": "image-classification",
            "classifies": True,
            "channels": 3,
            "problem_type": "single_label_classification",
            "lineage": [],
            "source": {
                "name": "animals",
                "run": "finetune-small",
                "kind": "finetune",
                "weights": "last",
                "step": 30,
                "sha256": "00",
            },
            "parity": {"float64": 3.5e-15, "float32": 2.5e-7, "images": 2, "what": "logits", "tolerance": {}},
            "processor": {"pil": 0.0, "default": 0.0039},
            "pipeline": {"task": "image-classification", "picture": "p", "answers": [{"label": "owl", "score": 0.625}]},
            "changes": ["the key bias is left out: it cancels in the softmax"],
            "versions": {},
            "time": "2026-11-02T00:00:00Z",
        },
    )
    return folder


def derive(export: Path, run: Path, init_from: str) -> None:
    """Let the run have started from a model, and the export been made since."""
    change(run / "recipe.json", init_from=init_from)
    change(export / "export.json", lineage=lineage(run))


def change(path: Path, **changed: Any) -> None:
    """Replace fields of a JSON file; dots reach into groups."""
    value = json.loads(path.read_text())
    for name, new in changed.items():
        inner, *last = name.split("__")
        if last:
            value[inner][last[0]] = new
        else:
            value[inner] = new
    path.write_text(json.dumps(value))
