"""Ready cards: of the official weights of MAE, by what is known without the files, and of example runs.

The numbers of the official ones are those of `hf_mae.exporting.official`, as their authors print them. Nothing was
measured here, and the cards say so. `python -m hf_mae.cards.ready FOLDER` renders them all again, and the example of
each run named behind it as NAME=RUN or NAME=RUN,EVALUATION: see `EXAMPLES`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_mae.cards.options import CardOptions
from hf_mae.cards.records import Records, read_records
from hf_mae.cards.results import measured
from hf_mae.cards.terms import measured_on
from hf_mae.cards.write import card_text
from hf_mae.data.imagenet import NUM_CLASSES
from hf_mae.exporting.official import LICENSE, OFFICIAL, Official
from hf_mae.exporting.stock import NO_KEY_BIAS
from hf_mae.exporting.write import export
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, VIT_SIZES
from hf_mae.recipes.crop import EvalCrop

_SIZES = {768: "b", 1024: "l", 1280: "h"}
"""Letter of a size, by its width."""

READY = tuple(one for one in OFFICIAL if one.result)
"""The official files whose authors report numbers."""


def repository(official: Official) -> str:
    """Return a name for the converted weights of a file."""
    return f"mae-vit-{_SIZES[official.width]}{_suffix(official)}"


def _suffix(official: Official) -> str:
    if official.kind == "pretraining":
        return "-pretrain" if official.norm_pix_loss else "-pretrain-raw-pixels"
    return "-encoder" if official.kind == "encoder" else "-in1k"


def official_card(official: Official, organisation: str = "your-organisation") -> str:
    """Return the card of an official file, converted and exported to the stock class it fits.

    Args:
        official: which.
        organisation: that will own the repository.
    """
    records = _records(official)
    options = CardOptions(
        datasets=("ILSVRC/imagenet-1k",),
        data_license="the terms of ImageNet (non-commercial research), image-net.org",
        title=f"MAE ViT-{_SIZES[official.width].upper()}, {_WHAT[_suffix(official)]}",
    )
    return card_text(records, f"{organisation}/{repository(official)}", options)[0]


_WHAT = {
    "-encoder": "pretrained encoder",
    "-pretrain": "pretrained, with its decoder",
    "-pretrain-raw-pixels": "pretrained on raw pixels, with its decoder",
    "-in1k": "fine-tuned on ImageNet-1k",
}

_EXPORTED: dict[str, tuple[Any, str, str, str | None]] = {
    "encoder": (MAEModel, "vit", "ViTModel", "image-feature-extraction"),
    "pretraining": (MAEForPreTraining, "vit_mae", "ViTMAEForPreTraining", None),
    "classifier": (MAEForImageClassification, "beit", "BeitForImageClassification", "image-classification"),
}
"""By what a file holds: our class, and target, class and task of its export."""


_CHANGES = {
    "encoder": [],
    "pretraining": [],
    "classifier": [NO_KEY_BIAS, "the names of ImageNet's classes are added"],
}
"""What a converted file lacks or has more, by what it holds."""


def _records(official: Official) -> Records:
    sizes: dict[str, Any] = {"patch_size": 16} | VIT_SIZES[_SIZES[official.width]]
    config = MAEConfig(norm_pix_loss=official.norm_pix_loss, pool="mean", num_labels=NUM_CLASSES, **sizes)
    made, target, name, task = _EXPORTED[official.kind]
    with torch.device("meta"):
        parameters = sum(value.numel() for value in made(config).state_dict().values())
    shown = ["num_channels", "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
    if made is MAEForPreTraining:
        shown += ["decoder_hidden_size", "decoder_num_hidden_layers", "mask_ratio", "norm_pix_loss"]
    told: dict[str, Any] = {key: getattr(config, key) for key in shown}
    if task == "image-classification":
        told["id2label"] = config.id2label
    return Records(
        folder=Path(),
        export={
            "target": target,
            "class": name,
            "library": "transformers",
            "task": task,
            "classifies": official.kind == "classifier",
            "channels": config.num_channels,
            "problem_type": "single_label_classification" if official.kind == "classifier" else None,
            "source": {
                "name": official.name,
                "run": None,
                "kind": "conversion",
                "weights": "last",
                "step": None,
                "sha256": None,
            },
            "parity": {},
            "changes": _CHANGES[official.kind],
        },
        config=told,
        preprocessing={
            **EvalCrop((224, 224)).processor(),
            "do_convert_rgb": True,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        },
        parameters=parameters,
        conversion={
            "source": official.name,
            "md5": official.md5,
            "license": LICENSE,
            "known": {"name": official.name, "result": dict(official.result)},
        },
    )


def write_official_cards(folder: Path) -> list[Path]:
    """Write the cards of all official files, one Markdown file each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for official in READY:
        path = folder / f"{repository(official)}.md"
        path.write_text(official_card(official), encoding="utf-8")
        paths.append(path)
    return paths


_CIFAR = CardOptions(
    license="apache-2.0",
    language=("en",),
    data_name="CIFAR-10, 5,000 of its training images",
    test_name="CIFAR-10",
    data_license="not stated by its authors; this copy was re-encoded as JPEG",
)
_BIRDS = CardOptions(
    license="cc-by-nc-4.0",
    language=("en",),
    data_name="72 bird species of CUB-200-2011",
    test_name="72 bird species of CUB-200-2011",
    data_license="subset of CUB-200-2011 (Wah et al. 2011), its terms apply: non-commercial research",
)
EXAMPLES = {
    "mae-vit-n-cifar10": replace(_CIFAR, data_name="CIFAR-10"),
    "mae-vit-n-cifar10-finetuned": _CIFAR,
    "mae-vit-n-cifar10-probe": _CIFAR,
    "rexnet-birds-corrected": _BIRDS,  # its averaged weights
    "mae-vit-n-birds-research": replace(_BIRDS, language=()),
}
"""What the author says of each example card, by its name."""


def example_card(
    name: str, run: Path, evaluations: Sequence[Path] = (), organisation: str = "your-organisation"
) -> str:
    """Return the card of an example run, exported anew, without its pictures, which are not kept beside it.

    Args:
        name: one of `EXAMPLES`.
        run: the run folder.
        evaluations: folders of `hf-mae evaluate --out` of its weights.
        organisation: that will own the repository.

    Raises:
        ValueError: there is no such example, or the run cannot be exported.
    """
    if name not in EXAMPLES:
        raise ValueError(f"name={name!r} is no example; use one of {', '.join(EXAMPLES)}")
    with tempfile.TemporaryDirectory() as temporary:
        target = "hf_mae" if name.endswith("-research") else "auto"
        weights = "average" if name.startswith("rexnet") else "last"
        folder = export(run, Path(temporary) / "export", target, weights=weights)
        records = read_records(folder, run, evaluations)
        results = measured(records, *measured_on(records, EXAMPLES[name]))
        return card_text(records, f"{organisation}/{name}", EXAMPLES[name], results)[0]


def main(arguments: Sequence[str]) -> None:
    """Write the cards of all official files to FOLDER/official, and of the runs named to FOLDER/examples."""
    folder, *runs = arguments
    write_official_cards(Path(folder) / "official")
    for given in runs:
        name, _, paths = given.partition("=")
        run, *evaluations = (Path(path) for path in paths.split(","))
        path = Path(folder) / "examples" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(example_card(name, run, evaluations), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
