"""From decoded pictures to samples of one size: crops, flips, rotations, colours and erasing without a generator.

Every random choice comes from a row of uniforms that the caller draws (`hf_mae.data.order.uniforms`), so a sample is a
function of its place in the stream. The random resized crop is torchvision's, try for try. Of RandAugment and
AutoAugment the pictures are made by timm's operations; which ones, and how strong, is drawn here: timm draws from the
global generators, which threads share and nobody can resume.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance

from hf_mae.data.images import MAX_ASPECT, Pixels, Range, decode_rows, open_image, resize, to_array
from hf_mae.data.order import mix
from hf_mae.data.rand_augment import (
    AUTO_AUGMENT_DRAWS,
    DRAWS,
    MAX_LAYERS,
    auto_augment,
    fill_colour,
    parse_rand_augment,
)
from hf_mae.recipes.base import Augment
from hf_mae.recipes.crop import official_crop_pct
from hf_mae.recipes.fields import choose, unknown

Uniforms = Sequence[float] | npt.NDArray[np.float64]

# Four uniforms for each try of a random resized crop (area, aspect, top, left), then flip and the three jitters; then
# whether to erase, four for each try of a rectangle, and the key of its noise; then RandAugment, which has room for its
# most layers; vertical flip, AutoAugment, and the rotations.
CROP_TRIES = 10
FLIP = 4 * CROP_TRIES
JITTER = FLIP + 1
NUM_UNIFORMS = JITTER + 3
"""How many uniforms a recipe with nothing but a crop, a flip and jitter may use: the numbers of one choice never depend
on another choice."""
ERASE = NUM_UNIFORMS
ERASE_TRIES = 10
ERASE_NOISE = ERASE + 1 + 4 * ERASE_TRIES
RAND_AUGMENT = ERASE_NOISE + 1
VERTICAL_FLIP = RAND_AUGMENT + DRAWS * MAX_LAYERS
AUTO_AUGMENT = VERTICAL_FLIP + 1
ROTATE = AUTO_AUGMENT + AUTO_AUGMENT_DRAWS

# timm's RandomErasing (Zhong et al. 2020), with its defaults.
ERASE_AREA = (0.02, 1 / 3)
ERASE_ASPECT = (0.3, 1 / 0.3)


CROPS = ("random-resized", "clamped", "fixed", "center", "resize")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "crop": CROPS,
    "rotate_resample": ("bilinear", "nearest"),
    "rotate_fill": ("mean", "black"),
    "auto_augment": (None, "original", "v0"),
    "erase_fill": ("noise", "mean", "black"),
}
"""The names that are handled here, by field."""
_RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "nearest": Image.Resampling.NEAREST}


def _fills(augment: Augment) -> dict[str, Sequence[float]]:
    return {"mean": augment.mean, "black": [0.0] * len(augment.mean)}


def check_augment(augment: Augment) -> None:
    """Refuse what cannot be carried out, before the first step.

    Raises:
        ValueError: a name is unknown, `rand_augment` is not in timm's syntax, `erase_prob` is no share, or a deviation
            to erase with is not positive.
    """
    for name, known in CHOICES.items():
        if (value := getattr(augment, name)) not in known:
            raise unknown(f"augment.{name}", value, known)
    if augment.rand_augment is not None:
        parse_rand_augment(augment.rand_augment)
    if not 0 <= augment.erase_prob <= 1:
        raise ValueError(f"augment.erase_prob={augment.erase_prob} must lie in [0, 1]; the official code uses 0.25")
    if augment.erase_prob and augment.erase_fill == "noise" and min(augment.std) <= 0:
        raise ValueError(f"augment.std={augment.std} must be above 0: erasing fills with noise of this deviation")


def num_uniforms(augment: Augment) -> int:
    """Count the uniforms that a sample of this recipe may use."""
    if augment.rotate:
        return ROTATE + len(augment.rotate)
    if augment.auto_augment is not None:
        return ROTATE
    if augment.vertical_flip:
        return AUTO_AUGMENT
    if augment.rand_augment is not None:
        return RAND_AUGMENT + parse_rand_augment(augment.rand_augment).num_uniforms
    return RAND_AUGMENT if augment.erase_prob else NUM_UNIFORMS


# ------------------------------------------------------------------------------------------------ a whole sample


def augment_image(image: Image.Image, u: Uniforms, size: tuple[int, int], augment: Augment) -> Pixels:
    """Make a sample of a decoded picture: a pure function of the picture, the uniforms and the recipe.

    In this order: crop and resize, flips, AutoAugment, RandAugment, rotations, jitter, erasing; it is timm's, which has
    no rotations of their own. The jitter is in the fixed order brightness,
    contrast, saturation (torchvision draws the order too), each factor uniform in [1 - color_jitter, 1 + color_jitter],
    not below 0.

    Args:
        image: from `decode_image`.
        u: `num_uniforms(augment)` uniforms in [0, 1).
        size: (height, width) of the result, in pixels.
        augment: which crop, whether to flip, and what else.

    Returns:
        uint8 [C, H, W].
    """
    if is_boxed(augment):
        top, left, h, w = crop_box(u, image.height, image.width, augment)
        image = resize(image.crop((left, top, left + w, top + h)), size)
    else:
        image = _crop_resized(image, u, size, augment)
    if augment.flip and u[FLIP] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.vertical_flip and u[VERTICAL_FLIP] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    pixels = to_array(_transform(image, u, augment))
    if augment.erase_prob:
        pixels = pixels.copy()
        erase(pixels, u, augment)
    return pixels


def sample_pixels(
    data: bytes | memoryview | None,
    draws: npt.NDArray[np.float64],
    out: Pixels,
    augment: Augment,
    *,
    max_pixels: int = 89_478_485,
    decoder: Literal["exact", "fast"] = "exact",
    pixel_range: Range | None = None,
) -> None:
    """Decode one picture once and write k augmented samples of it.

    Args:
        data: the encoded file, in any object with the buffer protocol; None is a missing picture.
        draws: [k, num_uniforms(augment)] uniforms in [0, 1), one row for each sample.
        out: uint8 [k, C, H, W], written in place; gives the channels (3 or 1) and the size of the samples.
        augment: which crop, whether to flip, and what else.
        max_pixels: as in `decode_image`.
        decoder: "exact" gives the bits of `augment_image(decode_image(data), u)`; "fast" the same crops, resized by
            other code.
        pixel_range: as in `decode_image`.

    Raises:
        ImageError: as `decode_image`; nothing has been written then.
    """
    channels, height, width = out.shape[1:]
    image = open_image(data, max_pixels)
    assert data is not None, "refused before"
    pixels, full_height, full_width = decode_rows(image, data, channels, _bottom(draws, augment), pixel_range)
    for u, sample in zip(draws, out, strict=True):
        if is_boxed(augment):
            top, left, h, w = crop_box(u, full_height, full_width, augment)
            part = pixels[top : top + h, left : left + w]
            shrink = _resize_fast if decoder == "fast" and channels == 3 else _resize_exact
            part = shrink(part, (height, width))
        else:
            part = np.asarray(_crop_resized(Image.fromarray(pixels), u, (height, width), augment))
        if augment.flip and u[FLIP] < 0.5:
            part = part[:, ::-1]
        if augment.vertical_flip and u[VERTICAL_FLIP] < 0.5:
            part = part[::-1]
        if augment.rand_augment or augment.auto_augment or augment.rotate or augment.color_jitter:
            part = np.asarray(_transform(Image.fromarray(np.ascontiguousarray(part)), u, augment))
        sample[:] = part if channels == 1 else part.transpose(2, 0, 1)
        if augment.erase_prob:
            erase(sample, u, augment)


def _bottom(draws: npt.NDArray[np.float64], augment: Augment) -> Callable[[int, int], int]:
    """Return what tells the first row of an upright picture (height, width) that no sample needs."""

    def bottom(height: int, width: int) -> int:
        if not is_boxed(augment):
            return height
        boxes = (crop_box(u, height, width, augment) for u in draws)
        return max((top + h for top, _, h, _ in boxes), default=0)

    return bottom


# ------------------------------------------------------------------------------------------------ crops


def is_boxed(augment: Augment) -> bool:
    """Say whether the crop is a box of the picture, resized; otherwise the picture is resized, then cropped."""
    return augment.crop in ("random-resized", "clamped", "resize")


def crop_box(u: Uniforms, height: int, width: int, augment: Augment) -> tuple[int, int, int, int]:
    """Choose the box of the picture that is resized: (top, left, height, width) in pixels."""
    if augment.crop == "random-resized":
        return random_resized_crop_box(u, height, width, augment.scale, augment.ratio)
    if augment.crop == "clamped":
        return clamped_crop_box(u, height, width, augment.scale, augment.ratio)
    if augment.crop == "resize":
        return 0, 0, height, width
    raise unknown("augment.crop", augment.crop, CROPS)


def random_resized_crop_box(
    u: Uniforms,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Choose a box of random area and aspect: torchvision's `RandomResizedCrop.get_params`.

    Args:
        u: uniforms in [0, 1): area, log-aspect, top and left of each of ten tries.
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: range of the area, as a fraction of the image's.
        ratio: range of width / height.

    Returns:
        (top, left, height, width) in pixels. After ten boxes that do not fit: the largest central box whose aspect is
        within `ratio`.
    """
    for k in range(CROP_TRIES):
        w, h = _draw_sides(u[4 * k], u[4 * k + 1], height * width, scale, ratio)
        if 0 < w <= width and 0 < h <= height:
            return int(u[4 * k + 2] * (height - h + 1)), int(u[4 * k + 3] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def clamped_crop_box(
    u: Uniforms,
    height: int,
    width: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Choose a box of random area and aspect in one try, its sides cut to those of the image.

    Where a side is cut, the aspect may leave `ratio`. The official linear probe crops so (util/crop.py).

    Args:
        u: uniforms in [0, 1): area, log-aspect, top and left.
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: range of the area before it is cut, as a fraction of the image's.
        ratio: range of width / height before it is cut.

    Returns:
        (top, left, height, width) in pixels.
    """
    w, h = _draw_sides(u[0], u[1], height * width, scale, ratio)
    w, h = min(max(w, 1), width), min(max(h, 1), height)
    return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w


def _draw_sides(
    u_area: float, u_aspect: float, area: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int]:
    """Return (width, height) of a share of `area`, with an aspect that is uniform in the logarithm."""
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    share = area * (scale[0] + float(u_area) * (scale[1] - scale[0]))
    aspect = math.exp(log_low + float(u_aspect) * (log_high - log_low))
    return round(math.sqrt(share * aspect)), round(math.sqrt(share / aspect))


def _crop_resized(image: Image.Image, u: Uniforms, size: tuple[int, int], augment: Augment) -> Image.Image:
    """Resize, then crop anywhere or at the centre.

    Not the transform of evaluation: the aspect is kept whatever the input's, an image of exactly its size stays whole
    under `center`, and of a strip above `MAX_ASPECT` the middle is taken.
    """
    height, width = size
    if augment.crop == "center" and (image.height, image.width) == size:
        return image
    image = _resize_to_cover(image, size)
    if augment.crop == "center":
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    elif augment.crop == "fixed":
        top, left = int(u[0] * (image.height - height + 1)), int(u[1] * (image.width - width + 1))
    else:
        raise unknown("augment.crop", augment.crop, CROPS)
    return image.crop((left, top, left + width, top + height))


def _resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize, keeping the aspect, to the smallest image that covers `size` and the official border of each side."""
    image = _cut_strip(image)
    target_h, target_w = (int(side / official_crop_pct(side)) for side in size)
    # Compared as products, so that a square target means exactly "the short side".
    if image.width * target_h <= image.height * target_w:
        shape = max(target_h, int(target_w * image.height / image.width)), target_w
    else:
        shape = target_h, max(target_w, int(target_h * image.width / image.height))
    return resize(image, shape)


def _cut_strip(image: Image.Image) -> Image.Image:
    limit = MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    w, h = min(image.width, limit), min(image.height, limit)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def _resize_exact(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    return np.asarray(resize(Image.fromarray(pixels), size))


def _resize_fast(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Resize [H, W, 3] as Pillow does, but for the rounding: torch's weights have fewer bits.

    On x86 the channels-last uint8 code of torch runs in the calling thread alone (2.14), so the decoders cannot crowd
    each other out. Other processors take other code: their pixels may differ by one.
    """
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None]  # a copy: dense rows are faster, and writable
    return F.interpolate(image, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------ colours and noise


def _transform(image: Image.Image, u: Uniforms, augment: Augment) -> Image.Image:
    """Do all that comes between the flips and erasing; the size stays."""
    if augment.auto_augment is not None:
        kinds = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BICUBIC}  # timm's own
        resample = choose("augment.rotate_resample", augment.rotate_resample, kinds)
        image = auto_augment(image, augment.auto_augment, u[AUTO_AUGMENT:ROTATE], _rotate_fill(augment), resample)
    if augment.rand_augment is not None:
        image = parse_rand_augment(augment.rand_augment)(image, u[RAND_AUGMENT:VERTICAL_FLIP], augment.mean)
    return _jitter(_rotate(image, u, augment), u, augment)


def _rotate(image: Image.Image, u: Uniforms, augment: Augment) -> Image.Image:
    """Rotate about the middle by each of `augment.rotate` in turn, or once by their sum."""
    if not augment.rotate:
        return image
    resample = choose("augment.rotate_resample", augment.rotate_resample, _RESAMPLE)
    fill = fill_colour(_rotate_fill(augment))
    angles = [limit * (2 * float(u[ROTATE + i]) - 1) for i, limit in enumerate(augment.rotate)]
    for angle in [math.fsum(angles)] if augment.rotate_once else angles:
        image = image.rotate(angle, resample, fillcolor=fill)
    return image


def _rotate_fill(augment: Augment) -> Sequence[float]:
    return choose("augment.rotate_fill", augment.rotate_fill, _fills(augment))


def _jitter(image: Image.Image, u: Uniforms, augment: Augment) -> Image.Image:
    if augment.color_jitter:
        for i, enhance in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
            factor = 1 + augment.color_jitter * (2 * float(u[JITTER + i]) - 1)
            image = enhance(image).enhance(max(0.0, factor))
    return image


def erase(pixels: Pixels, u: Uniforms, augment: Augment) -> None:
    """Fill a rectangle, in place, in a share `erase_prob` of the samples: timm's `RandomErasing`.

    The noise is that of its mode `pixel`. Differs from timm: there the noise, N(0, 1) for each pixel and channel, is
    written after normalisation; here, where samples are bytes, noise * std + mean is, rounded to 1/255 and cut to
    [0, 1]. With ImageNet's numbers 1.7% to 3.8% of the values are cut at each end.

    Args:
        pixels: uint8 [C, H, W].
        u: `num_uniforms(augment)` uniforms in [0, 1).
        augment: gives `erase_prob`, `erase_fill`, and `mean` and `std` of the channels.
    """
    if u[ERASE] >= augment.erase_prob:
        return
    channels, height, width = pixels.shape
    box = erase_box(u, height, width)
    if box is None:
        return
    top, left, h, w = box
    if augment.erase_fill != "noise":
        colour = choose("augment.erase_fill", augment.erase_fill, _fills(augment))[:channels]
        pixels[:, top : top + h, left : left + w] = np.reshape(fill_colour(colour), (-1, 1, 1))
        return
    key = int(float(u[ERASE_NOISE]) * 2**53)
    words = mix(key, np.arange(-(-channels * h * w // 4), dtype=np.uint64))
    bits = words.astype("<u8").view("<u2")[: channels * h * w].reshape(channels, h, w)
    for c, (mean, std) in enumerate(zip(augment.mean, augment.std, strict=True)):
        pixels[c, top : top + h, left : left + w] = _noise_bytes(mean, std)[bits[c]]


def erase_box(u: Uniforms, height: int, width: int) -> tuple[int, int, int, int] | None:
    """Choose the rectangle: (top, left, height, width) in pixels, smaller than the sample; None if ten tries fail."""
    for k in range(ERASE_TRIES):
        u_area, u_aspect, u_top, u_left = (float(x) for x in u[ERASE + 1 + 4 * k : ERASE + 5 + 4 * k])
        h, w = _draw_sides(u_area, u_aspect, height * width, ERASE_AREA, ERASE_ASPECT)  # timm: h / w is the aspect
        if h < height and w < width:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    return None


@cache
def _noise_bytes(mean: float, std: float) -> Pixels:
    """Tabulate the normal distribution as bytes, by its 65,536 quantiles: a pixel costs 16 random bits and a look."""
    normal = NormalDist(mean, std)
    values = np.array([normal.inv_cdf((i + 0.5) / 65536) for i in range(65536)])
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)
