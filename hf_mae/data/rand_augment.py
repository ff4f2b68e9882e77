"""RandAugment (Cubuk et al. 2020) and AutoAugment (Cubuk et al. 2019) as timm has them, with draws of our own.

timm gives the operations, the policies of AutoAugment and the syntax of RandAugment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from hf_mae.recipes.fields import unknown

LEVELS = 10
"""The scale of magnitudes: at 10 every operation reaches its nominal strength."""

# The draws of one layer: which operation, whether to apply it, how strong, in which direction.
DRAWS = 4
MAX_LAYERS = 16

AUTO_AUGMENT_DRAWS = 5
"""Of AutoAugment: which pair of operations, then of each whether to apply it and in which direction."""

_COMMON = ("AutoContrast", "Equalize", "Invert", "Rotate")
_GEOMETRIC = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OPS = (*_COMMON, "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness", *_GEOMETRIC)
"""timm's operations, in its order."""
INCREASING_OPS = tuple(
    f"{name}Increasing" if name in ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness") else name
    for name in OPS
)
"""The same with those whose effect grows with the magnitude (`inc1`)."""

_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(\d+(?:\.\d+)?)")
_EXAMPLE = "timm's syntax is such as rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class RandAugment:
    """Some operations in a row, each chosen from fifteen with replacement."""

    magnitude: int = LEVELS
    """`m`: the mean strength."""
    layers: int = 2
    """`n`: operations for each picture."""
    prob: float = 0.5
    """`p`: how likely each is applied; timm's default is 0.5, the paper applies all."""
    magnitude_std: float = 0.0
    """`mstd`: deviation of the strength, drawn for each operation; infinite is uniform in [0, magnitude]."""
    magnitude_max: int = LEVELS
    """`mmax`: where the strength is cut."""
    increasing: bool = False
    """`inc`."""

    @property
    def num_uniforms(self) -> int:
        """How many uniforms `__call__` needs."""
        return DRAWS * self.layers

    def __call__(
        self, image: Image.Image, u: Sequence[float] | npt.NDArray[np.float64], mean: Sequence[float]
    ) -> Image.Image:
        """Apply the operations that the uniforms choose.

        Args:
            image: in mode RGB or L.
            u: uniforms in [0, 1): choice, application, magnitude and sign of each layer.
            mean: colour of what comes into view at the border, one number in [0, 1] for each channel.

        Returns:
            A picture of the same mode and size.
        """
        for layer in range(self.layers):
            u_op, u_apply, u_level, u_sign = (float(x) for x in u[DRAWS * layer : DRAWS * (layer + 1)])
            if u_apply < self.prob:
                name = (INCREASING_OPS if self.increasing else OPS)[int(u_op * len(OPS))]
                image = apply_op(image, name, self.level(u_level), negative=u_sign >= 0.5, mean=mean)
        return image

    def level(self, u: float) -> float:
        """Draw the strength of an operation by its quantile."""
        if math.isinf(self.magnitude_std):
            level = u * self.magnitude
        elif self.magnitude_std:
            # The least uniform above 0 stands for 0, whose quantile is infinite.
            level = NormalDist(self.magnitude, self.magnitude_std).inv_cdf(max(u, 2.0**-53))
        else:
            level = float(self.magnitude)
        return max(0.0, min(level, float(self.magnitude_max)))


@cache
def parse_rand_augment(text: str) -> RandAugment:
    """Read `rand-m9-mstd0.5-inc1`: sections m, n, p, mstd, mmax and inc in any order, as timm does.

    Differs from timm: what it passes over or takes for something else is refused, and so are its other sets of
    operations (`t`).

    Raises:
        ValueError: the text is not of this form; names the section.
    """
    named = f"augment.rand_augment={text!r}"
    first, *sections = text.split("-")
    if first != "rand":
        raise ValueError(f"{named} does not begin with rand; {_EXAMPLE}")
    values: dict[str, str] = {}
    for section in sections:
        match = _SECTION.fullmatch(section)
        if match is None:
            raise ValueError(
                f"{named}: {section!r} is none of m, n, p, mstd, mmax and inc with a number after it; {_EXAMPLE}"
            )
        key, value = match.groups()
        if key in values:
            raise ValueError(f"{named}: {key} is given twice; leave one out")
        if key not in ("p", "mstd") and "." in value:
            raise ValueError(f"{named}: {key} must be a whole number, not {value}")
        values[key] = value
    std = float(values.get("mstd", 0))
    chosen = RandAugment(
        magnitude=int(values.get("m", LEVELS)),
        layers=int(values.get("n", 2)),
        prob=float(values.get("p", 0.5)),
        magnitude_std=math.inf if std > 100 else std,
        magnitude_max=int(values.get("mmax", LEVELS)) or LEVELS,
        increasing=int(values.get("inc", 0)) == 1,
    )
    if values.get("inc", "0") not in ("0", "1"):
        raise ValueError(f"{named}: inc must be 0 or 1, not {values['inc']}")
    if chosen.prob > 1:
        raise ValueError(f"{named}: p={chosen.prob} is above 1, and it is a probability")
    if not 1 <= chosen.layers <= MAX_LAYERS:
        raise ValueError(f"{named}: n={chosen.layers} must lie in 1 to {MAX_LAYERS}; 2 is usual")
    if chosen.magnitude > chosen.magnitude_max:
        raise ValueError(
            f"{named}: m={chosen.magnitude} is above mmax={chosen.magnitude_max}, which cuts it; use "
            f"m{chosen.magnitude_max}, or add mmax{chosen.magnitude}"
        )
    return chosen


def auto_augment(
    image: Image.Image,
    policy: Literal["original", "v0"],
    u: Sequence[float] | npt.NDArray[np.float64],
    fill: Sequence[float],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Apply one of a policy's pairs of operations, each with its own probability and strength.

    Args:
        image: in mode RGB or L.
        policy: as timm names it: of the paper, or of TensorFlow's EfficientNet.
        u: `AUTO_AUGMENT_DRAWS` uniforms in [0, 1): which pair, then application and sign of each operation.
        fill: colour of what comes into view at the border, one number in [0, 1] for each channel.
        resample: how rotations, shears and shifts read a pixel; timm's is bicubic, torchvision's nearest.

    Returns:
        A picture of the same mode and size.
    """
    pairs = _policy(policy)
    for i, (name, prob, level) in enumerate(pairs[int(float(u[0]) * len(pairs))]):
        if u[1 + 2 * i] < prob:
            image = apply_op(image, name, level, negative=bool(u[2 + 2 * i] >= 0.5), mean=fill, resample=resample)
    return image


@cache
def _policy(name: str) -> tuple[tuple[tuple[str, float, float], ...], ...]:
    """Read timm's table: (operation, probability, strength) of each of 25 pairs."""
    from timm.data.auto_augment import auto_augment_policy

    if name not in ("original", "v0"):
        raise unknown("augment.auto_augment", name, ("original", "v0"))
    return tuple(tuple((op.name, op.prob, float(op.magnitude)) for op in pair) for pair in auto_augment_policy(name))


def fill_colour(mean: Sequence[float]) -> int | tuple[int, ...]:
    """Return a colour in [0, 1] as Pillow takes it for pictures of so many channels."""
    fill = [min(255, round(255 * x)) for x in mean]
    return tuple(fill) if len(fill) > 1 else fill[0]


def apply_op(
    image: Image.Image,
    name: str,
    level: float,
    *,
    negative: bool,
    mean: Sequence[float],
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Apply one of timm's operations at a strength.

    Args:
        image: in mode RGB or L.
        name: from `OPS` or `INCREASING_OPS`, or `PosterizeOriginal`.
        level: strength on the scale of `LEVELS`.
        negative: turn, shear, shift or fade the other way.
        mean: as in `RandAugment`.
        resample: as in `auto_augment`.
    """
    return operations()[name](
        image,
        *op_arguments(name, level, negative=negative),
        # One number, not a choice of two: timm would draw it.
        resample=resample,
        fillcolor=fill_colour(mean),
    )


@cache
def operations() -> Mapping[str, Callable[..., Image.Image]]:
    """Import timm's operations by name; slow, and most recipes do without."""
    from timm.data.auto_augment import NAME_TO_OP

    return NAME_TO_OP


def op_arguments(name: str, level: float, *, negative: bool) -> tuple[float, ...]:
    """Turn a strength into what an operation takes, as timm's table does: degrees, a factor, a threshold, bits."""
    part, sign = level / LEVELS, -1 if negative else 1
    if name == "PosterizeOriginal":
        return (int(part * 4) + 4,)  # bits kept, 4 to 8: of AutoAugment's paper
    base, increasing = name.removesuffix("Increasing"), name.endswith("Increasing")
    if base in ("AutoContrast", "Equalize", "Invert"):
        return ()
    if base == "Rotate":
        return (sign * part * 30.0,)  # degrees
    if base in ("ShearX", "ShearY"):
        return (sign * part * 0.3,)
    if base in ("TranslateXRel", "TranslateYRel"):
        return (sign * part * 0.45,)  # share of the side
    if base == "Posterize":
        bits = int(part * 4)  # kept
        return (4 - bits if increasing else bits,)
    if base == "Solarize":
        threshold = min(256, int(part * 256))  # brighter values are inverted
        return (256 - threshold if increasing else threshold,)
    if base == "SolarizeAdd":
        return (min(128, int(part * 110)),)
    assert base in ("Color", "Contrast", "Brightness", "Sharpness"), name
    return (max(0.1, 1.0 + sign * part * 0.9) if increasing else part * 1.8 + 0.1,)  # 1 changes nothing
