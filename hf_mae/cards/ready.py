"""Ready cards of the official weights of MAE, for whoever converts and publishes them: what is known without the files.

Source of names, hashes and numbers: facebookresearch/mae (README, FINETUNE.md, issue 8), licence CC-BY-NC 4.0, and
He et al. 2022. Nothing here was measured by this project, and the cards say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hf_mae.cards.options import CardOptions
from hf_mae.cards.records import OFFICIAL_LICENSE, Records
from hf_mae.cards.write import card_text
from hf_mae.data.imagenet import NUM_CLASSES
from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel
from hf_mae.recipes.base import IMAGENET_MEAN, IMAGENET_STD, VIT_SIZES

Kind = Literal["encoder", "full", "visualize", "finetuned"]

_SIZES = {"base": "b", "large": "l", "huge": "h"}
_TABLE_3 = {"base": "83.6", "large": "85.9", "huge": "86.9"}
_TABLE_12 = {"base": "68.0", "large": "75.8", "huge": "76.6"}
_TABLE_7_PIXEL = {"base": "83.3", "large": "85.1", "huge": "86.2"}
_FINETUNE_MD = {"base": ("83.664", "96.530"), "large": ("85.952", "97.570"), "huge": ("86.928", "98.088")}
_MD5 = {
    ("encoder", "base"): "8cad7c",
    ("encoder", "large"): "b8b06e",
    ("encoder", "huge"): "9bdbb0",
    ("finetuned", "base"): "1b25e9",
    ("finetuned", "large"): "51f550",
    ("finetuned", "huge"): "2541f2",
}
"""First digits, as the authors' README gives them; of the others none is published."""


@dataclass(frozen=True)
class Official:
    """One of the official files: its size and what it is."""

    size: Literal["base", "large", "huge"]
    kind: Kind

    @property
    def file(self) -> str:
        """Its name at dl.fbaipublicfiles.com/mae."""
        stem = {"encoder": "pretrain", "full": "pretrain"}.get(self.kind, self.kind)
        return f"mae_{stem}_vit_{self.size}{'_full' if self.kind == 'full' else ''}.pth"

    @property
    def repository(self) -> str:
        """A name for the converted weights."""
        kind = {"encoder": "encoder", "full": "pretrain", "visualize": "pretrain-raw-pixels", "finetuned": "in1k"}
        return f"mae-vit-{_SIZES[self.size]}-{kind[self.kind]}"

    def published(self) -> Mapping[str, str]:
        """Return what their authors report, with the place; percent."""
        if self.kind == "finetuned":
            top1, top5 = _FINETUNE_MD[self.size]
            where = "of these weights (facebookresearch/mae, FINETUNE.md)"
            return {
                f"ImageNet-1k validation, top-1 accuracy {where}": f"{top1} %",
                f"ImageNet-1k validation, top-5 accuracy {where}": f"{top5} %",
            }
        if self.kind == "visualize":
            return {
                "ImageNet-1k validation, top-1 accuracy after fine-tuning a model with this target (paper, Table 7, "
                "row pixel; that it was this file is not said)": f"{_TABLE_7_PIXEL[self.size]} %",
            }
        return {
            "ImageNet-1k validation, top-1 accuracy after fine-tuning (paper, Table 3)": f"{_TABLE_3[self.size]} %",
            "ImageNet-1k validation, top-1 accuracy of a linear probe (paper, Table 12)": f"{_TABLE_12[self.size]} %",
        }


OFFICIAL = tuple(
    Official(size, kind) for size in ("base", "large", "huge") for kind in ("encoder", "full", "visualize", "finetuned")
)


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
        title=f"MAE ViT-{_SIZES[official.size].upper()}, {_WHAT[official.kind]}",
    )
    return card_text(records, f"{organisation}/{official.repository}", options)[0]


_WHAT: dict[Kind, str] = {
    "encoder": "pretrained encoder",
    "full": "pretrained, with its decoder",
    "visualize": "pretrained on raw pixels, with its decoder",
    "finetuned": "fine-tuned on ImageNet-1k",
}


def _records(official: Official) -> Records:
    sizes: dict[str, Any] = {"patch_size": 16} | VIT_SIZES[_SIZES[official.size]]
    config = MAEConfig(norm_pix_loss=official.kind != "visualize", pool="mean", num_labels=NUM_CLASSES, **sizes)
    kinds: dict[Kind, tuple[Any, str, str, str | None]] = {
        "encoder": (MAEModel, "vit", "ViTModel", "image-feature-extraction"),
        "full": (MAEForPreTraining, "vit_mae", "ViTMAEForPreTraining", None),
        "visualize": (MAEForPreTraining, "vit_mae", "ViTMAEForPreTraining", None),
        "finetuned": (MAEForImageClassification, "beit", "BeitForImageClassification", "image-classification"),
    }
    made, target, name, task = kinds[official.kind]
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
            "source": {"name": official.file, "run": None, "kind": "conversion", "weights": "last", "step": None},
            "parity": {},
        },
        config=told,
        preprocessing={
            "size": {"shortest_edge": 256},
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "resample": 3,
            "do_convert_rgb": True,
            "image_mean": list(IMAGENET_MEAN),
            "image_std": list(IMAGENET_STD),
        },
        parameters=parameters,
        conversion={
            "source": official.file,
            "md5": _MD5.get((official.kind, official.size)),
            "license": OFFICIAL_LICENSE,
            "known": {"name": "He et al. 2022, facebookresearch/mae", "result": official.published()},
        },
    )


def write_official_cards(folder: Path) -> list[Path]:
    """Write the cards of all official files, one Markdown file each."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for official in OFFICIAL:
        path = folder / f"{official.repository}.md"
        path.write_text(official_card(official), encoding="utf-8")
        paths.append(path)
    return paths
