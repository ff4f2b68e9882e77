"""Mixup and cutmix: pairs of images of a global batch, and their labels, become mixtures.

The draws are those of timm's `Mixup` in its order, but from generators that are functions of (seed, step), so that
neither workers nor ranks nor a restart change them. Source: Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix).

# Differs from timm: the partner of place p of a global batch of B is p + B/2 (mod B), not B - 1 - p. Ranks and
# micro-batches take every M-th place, so both lie in the same micro-batch, half of it apart, however it is split.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_mae.data.order import MIX, Ints, mix
from hf_mae.recipes.classification import ClassifierAugment
from hf_mae.recipes.fields import unknown

Box = tuple[int, int, int, int]
"""Top, bottom, left, right in pixels; bottom and right are outside. Empty where images are blended as a whole."""

SWITCH_PROB = 0.5
"""Chance of cutmix where both are on."""


def draw_mix(
    rng: np.random.RandomState, size: tuple[int, int], *, mixup: float, cutmix: float, prob: float = 1.0
) -> tuple[float, Box]:
    """Draw one mixture as timm does in batch mode, with a switch of one half.

    Args:
        rng: RandomState, whose streams never change (NEP 19).
        size: height and width of the images in pixels.
        mixup: alpha of mixup; 0 is off.
        cutmix: alpha of cutmix; 0 is off.
        prob: chance that anything is mixed; else the share is 1 and the box empty.

    Returns:
        The share of the image itself, corrected to the area that a box at the border really leaves; and the box that
        is taken from the partner, empty for mixup.
    """
    if rng.rand() >= prob:
        return 1.0, (0, 0, 0, 0)
    use_cutmix = cutmix > 0 and (mixup <= 0 or rng.rand() < SWITCH_PROB)
    alpha = cutmix if use_cutmix else mixup
    lam = float(rng.beta(alpha, alpha))
    if not use_cutmix:
        return lam, (0, 0, 0, 0)
    (height, width), ratio = size, np.sqrt(1 - lam)
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    y, x = int(rng.randint(height)), int(rng.randint(width))  # the middle of the box
    top, bottom = max(y - cut_height // 2, 0), min(y + (cut_height + 1) // 2, height)
    left, right = max(x - cut_width // 2, 0), min(x + (cut_width + 1) // 2, width)
    return 1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right)


class MixDraws:
    """Draws the mixtures of a batch's samples from (seed, step): {"mix_lam": float32 [n], "mix_box": int64 [n, 4]}.

    Args:
        augment: alphas of mixup and cutmix, at least one above 0, and the chance of mixing at all; `mix_mode` batch
            draws once for a global batch, pair once for each pair in it.
        seed: the run's.
        size: height and width of the images in pixels.
        images: different images in a global batch.
        length: images in an epoch of the stream (`images_per_epoch`).
        repeats: samples made of each image, all in one global batch.

    Raises:
        ValueError: the global batch is odd, the partner of a sample would be made of the same image, or `mix_mode` is
            unknown.
    """

    def __init__(
        self,
        augment: ClassifierAugment,
        seed: int,
        *,
        size: tuple[int, int],
        images: int,
        length: int,
        repeats: int = 1,
    ):
        assert repeats % 2 == 1, "partners are half a batch apart: each image would be mixed with itself"
        assert images * repeats % 2 == 0, "pairs need an even global batch"
        if augment.mix_mode not in ("batch", "pair"):
            raise unknown("augment.mix_mode", augment.mix_mode, ("batch", "pair"))
        self.augment, self.seed, self.size = augment, seed, size
        self.images, self.length, self.repeats = images, length, repeats

    def __call__(self, epochs: Ints, positions: Ints) -> dict[str, Tensor]:
        """Return the mixtures of the samples at these places of the stream, both int64 [n]."""
        image, repeat = np.divmod(positions, self.repeats)
        step, place = np.divmod(epochs * self.length + image, self.images)
        if self.augment.mix_mode == "pair":
            # A global batch holds the first sample of each image, then the second of each, and so on.
            pair = (repeat * self.images + place) % (self.images * self.repeats // 2) + 1
        else:
            pair = np.zeros_like(place)
        keys, inverse = np.unique(np.stack([step, pair], axis=1), axis=0, return_inverse=True)
        rng = np.random.RandomState(0)  # seeded anew for each mixture: making one takes eight times as long
        drawn = [self._draw(rng, word) for word in mix(self.seed, MIX, keys[:, 0], keys[:, 1]).tolist()]
        inverse = torch.from_numpy(inverse.reshape(-1))
        lams = torch.tensor([lam for lam, _ in drawn], dtype=torch.float32)
        boxes = torch.tensor([box for _, box in drawn], dtype=torch.int64)
        return {"mix_lam": lams[inverse], "mix_box": boxes[inverse]}

    def _draw(self, rng: np.random.RandomState, word: int) -> tuple[float, Box]:
        rng.seed([word & 0xFFFFFFFF, word >> 32])
        augment = self.augment
        return draw_mix(rng, self.size, mixup=augment.mixup, cutmix=augment.cutmix, prob=augment.mix_prob)


def mix_images(pixels: Tensor, lam: Tensor, box: Tensor) -> Tensor:
    """Mix each image of a micro-batch with the one half the batch away.

    Args:
        pixels: float [n, C, H, W], already normalised.
        lam: float32 [n], the image's own share.
        box: int64 [n, 4] (top, bottom, left, right): what is taken from the partner; where it is empty, the whole
            images are blended.

    Returns:
        [n, C, H, W].

    Raises:
        ValueError: n is odd.
    """
    partner = pixels.roll(_half(len(pixels)), dims=0)
    top, bottom, left, right = (edge[:, None] for edge in box.unbind(1))  # each [n, 1]
    rows, columns = (torch.arange(side, device=pixels.device)[None] for side in pixels.shape[2:])
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = (inside_rows[:, :, None] & inside_columns[:, None])[:, None]  # [n, 1, H, W]
    is_cut = ((bottom > top) & (right > left))[:, :, None, None]  # [n, 1, 1, 1]
    share = torch.where(is_cut, (~inside).to(pixels.dtype), lam.to(pixels.dtype)[:, None, None, None])
    return pixels * share + partner * (1 - share)


def mix_targets(labels: Tensor, lam: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return the soft targets of a micro-batch whose images were mixed with those half the batch away.

    Args:
        labels: int64 [n].
        lam: float32 [n], the image's own share; where all are 1 nothing was mixed, and n may be odd.
        num_classes: width of the targets.
        smoothing: share of each label that is spread evenly over all classes, before mixing.

    Returns:
        float32 [n, num_classes]; each row sums to 1.
    """
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + off)
    lam = lam[:, None]
    return targets * lam + targets.roll(len(labels) // 2, dims=0) * (1 - lam)


def _half(n: int) -> int:
    if n % 2:
        raise ValueError(
            f"a micro-batch of {n} images is odd, and mixup and cutmix mix pairs; choose an even --micro-batch"
        )
    return n // 2
