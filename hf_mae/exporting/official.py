"""The files that the authors published: by which hash or name they are known, what they hold and what was reported.

Source: README and FINETUNE.md of facebookresearch/mae, its issues 3 (`mae_visualize_*`), 8 (`*_full`) and 9 (the GAN
loss), and He et al. 2022. All are under CC-BY-NC 4.0, as the code is, whatever the cards of copies say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

LICENSE = "cc-by-nc-4.0"
FINE_TUNED = "ImageNet-1k top-1 after fine-tuning, % (the paper, Table 3)"
PROBED = "ImageNet-1k top-1 of a linear probe, % (FINETUNE.md of the authors)"
FINE_TUNED_PIXEL = "ImageNet-1k top-1 after fine-tuning on raw-pixel pretraining, % (the paper, Table 7)"


@dataclass(frozen=True)
class Official:
    """One published file.

    Attributes:
        name: of the file.
        md5: the first digits of its MD5, None if the authors never listed it.
        width: of the encoder, which has to fit.
        kind: `encoder`, `pretraining` (with decoder) or `classifier`.
        norm_pix_loss: whether the decoder was trained on normalised patches; also said of encoders.
        result: what its authors report: the measure and where it is printed, to the number.
    """

    name: str
    md5: str | None
    width: int
    kind: str
    norm_pix_loss: bool
    result: Mapping[str, float]


def _of_size(
    name: str, width: int, md5: tuple[str, str], ft: float, pixel: float, probe: float, top: tuple[float, ...]
) -> list[Official]:
    reported = {FINE_TUNED: ft, PROBED: probe}
    labels = ("ImageNet-1k top-1, %", "ImageNet-1k top-5, %", "ImageNet-1k loss")
    measured = {f"{label} (FINETUNE.md of the authors)": value for label, value in zip(labels, top, strict=True)}
    raw = {FINE_TUNED_PIXEL: pixel}
    return [
        Official(f"mae_pretrain_vit_{name}.pth", md5[0], width, "encoder", True, reported),
        Official(f"mae_pretrain_vit_{name}_full.pth", None, width, "pretraining", True, reported),
        Official(f"mae_visualize_vit_{name}.pth", None, width, "pretraining", False, raw),
        Official(f"mae_finetuned_vit_{name}.pth", md5[1], width, "classifier", True, measured),
    ]


OFFICIAL: tuple[Official, ...] = (
    *_of_size("base", 768, ("8cad7c", "1b25e9"), 83.6, 83.3, 67.8, (83.664, 96.530, 0.731)),
    *_of_size("large", 1024, ("b8b06e", "51f550"), 85.9, 85.1, 76.0, (85.952, 97.570, 0.646)),
    *_of_size("huge", 1280, ("9bdbb0", "2541f2"), 86.9, 86.2, 77.2, (86.928, 98.088, 0.584)),
    Official("mae_visualize_vit_large_ganloss.pth", None, 1024, "pretraining", False, {}),
)


def recognise(name: str, md5: str, width: int, kind: str) -> tuple[Official, str] | None:
    """Return which published file this is and by what it is known, `md5` or `file name`; None if it is none.

    A name counts only for the files without a published hash.

    Args:
        name: of the file.
        md5: of its bytes, hexadecimal.
        width: of its encoder.
        kind: what it holds, see `Official`.
    """
    for one in OFFICIAL:
        if (one.width, one.kind) != (width, kind):
            continue
        if one.md5 is not None and md5.startswith(one.md5):
            return one, "md5"
        if one.md5 is None and one.name == name:
            return one, "file name"
    return None


def is_copy(hub_id: str) -> bool:
    """Return whether a Hub repository is known to hold the official weights in another format."""
    return re.match(r"facebook/vit-mae-|timm/vit_(base|large|huge)_patch1[46](_gap)?_\d+\.mae", hub_id) is not None
