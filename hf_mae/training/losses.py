"""Losses of a classifier: cross-entropy of one distribution, or binary cross-entropy of each class by itself.

Labels of mixed images come as each image's own label and its share; the partner is half a micro-batch away, see
`mixing`. Everything is computed in float32.
Source: Wightman, Touvron, Jegou 2021, section 3, for binary cross-entropy with mixed images; its targets as timm makes
them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mae.recipes.classification import ClassifierAugment, Loss
from hf_mae.recipes.fields import unknown
from hf_mae.training.mixing import draw_mix, mix_targets

LOSSES = ("ce", "bce")
TARGETS = ("soft", "threshold", "binarize")
PAIRS = 20_000
"""Mixtures drawn for `trivial_loss`: the share of positive partners is then within .004 (one standard deviation)."""


def binary_targets(
    labels: Tensor,
    lam: Tensor,
    num_classes: int,
    *,
    smoothing: float,
    target: Literal["soft", "threshold", "binarize"],
    threshold: float,
) -> Tensor:
    """Return one target in [0, 1] for each class of each image.

    Args:
        labels: int64 [n].
        lam: float32 [n], the image's own share; the rest is the label half the batch away.
        num_classes: width of the targets.
        smoothing: eps below.
        target: `soft`: the smoothed shares of both labels, as for cross-entropy. `threshold`: 1 where that is above
            `threshold`, which takes smoothing away (timm). `binarize`: 1 - eps for each label with a share above 0, as
            the paper says; it does not say what the other classes get: here eps / K, as smoothing gives them
            elsewhere.
        threshold: of `threshold`; the comparison is strict.

    Returns:
        float32 [n, num_classes].
    """
    if target == "binarize":
        shares = mix_targets(labels, lam, num_classes, 0.0)
        return torch.where(shares > 0, 1 - smoothing, smoothing / num_classes)
    if target not in ("soft", "threshold"):
        raise unknown("loss.target", target, TARGETS)
    soft = mix_targets(labels, lam, num_classes, smoothing)
    return soft if target == "soft" else (soft > threshold).to(soft.dtype)


def classification_loss(logits: Tensor, labels: Tensor, lam: Tensor, loss: Loss, smoothing: float) -> Tensor:
    """Return the mean loss of a micro-batch, a float32 scalar; 0 of an empty one.

    Args:
        logits: [n, classes].
        labels: int64 [n].
        lam: float32 [n], the image's own share; all 1 where nothing was mixed.
        loss: which.
        smoothing: share of each label that is spread evenly over all classes.
    """
    logits, num_classes = logits.float(), logits.shape[1]
    if not len(logits):
        return logits.sum()  # the mean of nothing would be nan
    if loss.name == "ce":
        targets = mix_targets(labels, lam, num_classes, smoothing)  # [n, classes]
        return -(targets * F.log_softmax(logits, dim=-1)).sum(-1).mean()
    if loss.name != "bce":
        raise unknown("loss.name", loss.name, LOSSES)
    targets = binary_targets(
        labels, lam, num_classes, smoothing=smoothing, target=loss.target, threshold=loss.threshold
    )
    mean = F.binary_cross_entropy_with_logits(logits, targets)
    return mean * num_classes if loss.sum_classes else mean


def check_loss(loss: Loss, smoothing: float, num_classes: int) -> list[str]:
    """Refuse targets that say nothing; return sentences about settings that do not do what they seem to.

    Raises:
        ValueError: a threshold that every class reaches, or none; or an unknown loss or target.
    """
    if loss.name not in LOSSES:
        raise unknown("loss.name", loss.name, LOSSES)
    if loss.target not in TARGETS:
        raise unknown("loss.target", loss.target, TARGETS)
    if loss.name != "bce" or loss.target != "threshold" or smoothing == 0:
        return []
    off = smoothing / num_classes
    if loss.threshold <= off:
        raise ValueError(
            f"loss.threshold={loss.threshold} is not above augment.label_smoothing={smoothing} over {num_classes} "
            f"classes ({off:g}), which makes every class of every image positive; use --loss.threshold 0.2, "
            "--loss.target binarize, or --augment.label-smoothing 0"
        )
    if loss.threshold >= 1 - smoothing + off:
        raise ValueError(
            f"loss.threshold={loss.threshold} is not below what augment.label_smoothing={smoothing} leaves of a label "
            f"({1 - smoothing + off:g}), which makes no class of any image positive; use --loss.threshold 0.2"
        )
    cut = (loss.threshold - off) / (1 - smoothing)
    return [
        f"loss.target=threshold makes targets 0 or 1, so augment.label_smoothing={smoothing} does not smooth; all it "
        f"does is to drop labels with a share up to {cut:.3f} instead of {loss.threshold:g}. Use --loss.target "
        "binarize to smooth"
    ]


def trivial_loss(
    labels: Tensor,
    loss: Loss,
    smoothing: float,
    num_classes: int,
    augment: ClassifierAugment | None = None,
    size: tuple[int, int] = (224, 224),
) -> float:
    """Return the training loss of guessing every image by the mean target, without looking at it.

    With cross-entropy and soft targets mixing changes no mean. With 0-or-1 targets it does: a mixed image has two
    labels, each where its share suffices. How often that is comes from mixtures drawn with a fixed seed.

    Args:
        labels: int64 [n], of the training images.
        loss: which.
        smoothing: share of each label that is spread evenly over all classes.
        num_classes: how many there are.
        augment: what mixes the images; None mixes nothing.
        size: height and width of the images in pixels, which round the boxes of cutmix.
    """
    counts = torch.bincount(labels.cpu(), minlength=num_classes).double()
    share = counts / len(labels)  # [classes]
    off = smoothing / num_classes
    if loss.name == "ce":
        return float(torch.special.entr(share * (1 - smoothing) + off).sum())
    if loss.name != "bce":
        raise unknown("loss.name", loss.name, LOSSES)
    if loss.target not in TARGETS:
        raise unknown("loss.target", loss.target, TARGETS)
    if loss.target == "soft":
        mean = share * (1 - smoothing) + off
    else:
        own, partner = _positive(loss, smoothing, off, augment, size)
        # Two images of one class are one label, whose share is whole.
        positive = share * (1 - share) * (own + partner) + share.square()
        mean = positive if loss.target == "threshold" else positive * (1 - smoothing) + (1 - positive) * off
    entropy = torch.special.entr(mean) + torch.special.entr(1 - mean)
    return float(entropy.sum() if loss.sum_classes else entropy.mean())


def _positive(
    loss: Loss, smoothing: float, off: float, augment: ClassifierAugment | None, size: tuple[int, int]
) -> tuple[float, float]:
    """Return how often an image's own label, and its partner's, makes a positive target."""
    if augment is None or not (augment.mixup > 0 or augment.cutmix > 0):
        return 1.0, 0.0
    rng = np.random.RandomState(0)
    options = {"mixup": augment.mixup, "cutmix": augment.cutmix, "prob": augment.mix_prob}
    lam = np.array([draw_mix(rng, size, **options)[0] for _ in range(PAIRS)], dtype=np.float32)
    cut = (loss.threshold - off) / (1 - smoothing) if loss.target == "threshold" else 0.0
    return float((lam > cut).mean()), float((1 - lam > cut).mean())
