"""The evaluation transform of the whole package: one resize, then one centre crop. Arithmetic only, no pixels.

    input          resize (bicubic)                                          crop_pct by default
    square         the short side to int(side / crop_pct), aspect kept       224/256 up to 224 pixels, 1 above
    not square     to exactly (int(H / crop_pct), int(W / crop_pct))         1: the whole image

Then the centre of the input's size is cut out. There is no exception, neither for images of exactly the input size nor
for small ones; `crop_pct` 1 shows the whole of an image (of its short side, where the input is square). Both are
transforms that image processors of transformers and timm can state (`crop_mode` of timm: `center`, `squash`), so what
is written beside a model is what it was measured with. A processor of transformers has no resize that keeps the aspect
for an input that is not square; timm has, and timm's models with `crop_mode` `center` are shown images so.

Sources: official `build_transform` (facebookresearch/mae, util/datasets.py); timm's `transforms_imagenet_eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

CropMode: TypeAlias = Literal["center", "squash"]
"""timm's words: resize the short side and keep the aspect, or resize both sides whatever the aspect."""

BICUBIC = 3
"""Of Pillow and of image processors: the filter of every evaluation."""


def official_crop_pct(side: int) -> float:
    """Return the share of a side that the official evaluation shows at an input of `side` pixels."""
    return 224 / 256 if side <= 224 else 1.0


@dataclass(frozen=True)
class EvalCrop:
    """How an image becomes an input of `size`. All sizes are (height, width) in pixels.

    Args:
        size: of the input.
        crop_pct: share of the resized side that the crop keeps, in (0, 1]; None is the default, see the module.
        crop_mode: how the aspect is treated; None is `center` for square inputs, and `squash` for others.

    Raises:
        ValueError: a number or a word that is none of these.
    """

    size: tuple[int, int]
    crop_pct: float | None = None
    crop_mode: CropMode | None = None

    def __post_init__(self) -> None:
        """Refuse what is no crop."""
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct={self.crop_pct} must lie in (0, 1]; 0.875 is the usual one up to 224 pixels")
        if self.crop_mode not in (None, "center", "squash"):
            raise ValueError(f"crop_mode={self.crop_mode!r} is not one that evaluation knows; use center or squash")

    @property
    def mode(self) -> CropMode:
        """`crop_mode`, or its default."""
        return self.crop_mode or ("center" if self._is_square else "squash")

    @property
    def pct(self) -> float:
        """`crop_pct`, or its default."""
        if self.crop_pct is not None:
            return self.crop_pct
        return official_crop_pct(self.size[0]) if self._is_square else 1.0

    @property
    def target(self) -> tuple[int, int]:
        """What is resized to: exactly (`squash`), or the smallest image of its aspect that covers this (`center`)."""
        return int(self.size[0] / self.pct), int(self.size[1] / self.pct)

    @property
    def _is_square(self) -> bool:
        return self.size[0] == self.size[1]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of an image of `height` x `width` after the resize."""
        target_h, target_w = self.target
        if self.mode == "squash":
            return target_h, target_w
        if self._is_square:  # torchvision's Resize of one number, to the pixel
            if width <= height:
                return int(target_w * height / width), target_w
            return target_h, int(target_h * width / height)
        ratio = min(height / target_h, width / target_w)  # timm's ResizeKeepRatio, to the pixel
        return round(height / ratio), round(width / ratio)

    def corner(self, height: int, width: int) -> tuple[int, int]:
        """Return (top, left) of the crop in the resized image of `height` x `width`, rounded as torchvision does."""
        return round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)

    def words(self) -> str:
        """Return what is done, for people."""
        (height, width), (target_h, target_w) = self.size, self.target
        if self.mode == "squash":
            resize = f"resized to {target_h} x {target_w}"
        elif self._is_square:
            resize = f"short side resized to {target_h}"
        else:
            resize = f"resized to cover {target_h} x {target_w}"
        return f"{resize} (bicubic), centre {height} x {width}"

    # -------------------------------------------------------------------------------------------- in others' words

    def processor(self) -> dict[str, Any]:
        """Return the fields by which image processors of transformers state this.

        Raises:
            ValueError: `center` for an input that is not square, which they cannot state.
        """
        (height, width), (target_h, target_w) = self.size, self.target
        if self.mode == "squash":
            size = {"height": target_h, "width": target_w}
        elif self._is_square:
            size = {"shortest_edge": target_h}
        else:
            raise ValueError(
                f"crop_mode=center at {height} x {width} pixels, which are not square, cannot be told to an image "
                "processor of transformers; use crop_mode squash"
            )
        return {
            "do_resize": True,
            "size": size,
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
        }


def read_crop(processor: Mapping[str, Any], size: tuple[int, int]) -> EvalCrop:
    """Return what the image processor of a model states.

    Args:
        processor: the fields of preprocessor_config.json.
        size: (height, width) of the model's input in pixels.

    Raises:
        ValueError: it states none of our evaluations; says why and what to do.
    """
    height, width = size
    edges = processor.get("size")
    stated = f"the image processor states size={edges}"
    if not isinstance(edges, Mapping):
        raise ValueError(f"{stated}, which is not one of shortest_edge, or of height and width")
    edges = cast("Mapping[str, Any]", edges)
    edge, target = edges.get("shortest_edge"), (edges.get("height") or 0, edges.get("width") or 0)
    told: dict[str, Any] = {"do_resize": True, "resample": BICUBIC}
    if processor.get("do_center_crop", True):
        told["crop_size"] = {"height": height, "width": width}
    for name, value in told.items():
        has = processor.get(name, value)
        if {**has} != value if isinstance(has, Mapping) else has != value:
            raise ValueError(f"the image processor states {name}={has}, and this evaluation has {value}")
    if "crop_size" not in told and target != size:
        raise ValueError(f"{stated} and no crop, which does not give the {height} x {width} pixels of the model")
    if edge is not None:
        if height != width:
            raise ValueError(
                f"{stated} for an input of {height} x {width} pixels, which is not square: of most images that shows a "
                "small part, or a black border. Versions of hf_mae before this one wrote it so; export the model again"
            )
        if edge < height:
            raise ValueError(f"{stated}, less than the {height} pixels of the crop; use at least {height}")
        pct = _crop_pct(size, (edge, edge), EvalCrop(size))
        return EvalCrop(size, pct)
    if target[0] < height or target[1] < width:
        raise ValueError(f"{stated}, which does not cover the {height} x {width} pixels of the crop")
    pct = _crop_pct(size, target, EvalCrop(size, crop_mode="squash"))
    return EvalCrop(size, pct, None if height != width else "squash")


def stated_crop(processor: Mapping[str, Any], size: tuple[int, int], say: Callable[[str], object]) -> EvalCrop:
    """Return what the image processor of a model states, or the default and a warning where that is none of ours.

    Args:
        processor: see `read_crop`.
        size: likewise.
        say: takes the warning.
    """
    try:
        return read_crop(processor, size)
    except ValueError as error:
        crop = EvalCrop(size)
        say(f"warning: {error}. Images are prepared by the default instead: {crop.words()}")
        return crop


def _crop_pct(size: tuple[int, int], target: tuple[int, int], default: EvalCrop) -> float | None:
    """Return the share that resizes to `target`; None if the default does."""
    if default.target == target:
        return None
    # The share is divided by and cut down to a whole number, so that the quotient may end one too low.
    shares = [s / (t + more) for s, t in zip(size, target, strict=True) for more in (0, 0.5)]
    for share in shares:
        if EvalCrop(size, share, "squash").target == target:
            return share
    raise ValueError(
        f"the image processor resizes to {target[0]} x {target[1]} pixels and crops {size[0]} x {size[1]}, which is "
        "not the same share of both sides"
    )
