"""From encoded bytes to uint8 pixels: decoding that survives any file, and the transform of evaluation.

Decoding knows ten formats by their first bytes and tries nothing else (no PostScript, no PDF), checks the size in the
header before it decodes, and maps whatever Pillow raises for bad data to `ImageError`. Pillow's own bomb check is not
used: it warns, and a warning filter cannot be set in one thread.

What Pillow's readers warn of (broken EXIF or TIFF directories, mostly) is switched off once, at import, for these
modules alone: filters are global, so changing them around each picture would be a race between the decoding threads.

Training takes the short way, `open_image` and `decode_rows`: plain JPEGs are decoded by simplejpeg, which has the bits
of Pillow as long as both are built on libjpeg-turbo and there is nothing to complain of. Whatever is not plain, and
every complaint, goes to Pillow, so that the bits and the errors are Pillow's always.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

Pixels = npt.NDArray[np.uint8]

MAX_ASPECT = 16
"""Resizing the short side of a longer strip is done on its middle part of this aspect (5000x1 would become 327 MP)."""

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".mpo",
        ".avif",
        ".jp2",
        ".j2k",
    ]
    + [".ppm", ".pgm", ".pbm"]
)
"""File names taken for images, lower case. The content decides the format."""

# A picture that decodes is fine whatever its reader muttered; one that does not is listed with the reason.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.\w+ImagePlugin")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# What Pillow's readers raise for damaged files. A warning is raised only where the user's filters make it an error.
# MemoryError is not among them: a good picture must not be replaced because memory was short.
_PILLOW_RAISES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    EOFError,
    ArithmeticError,
    RuntimeError,  # AVIF frames
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)

# The EXIF orientations 2 to 8, undone.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """The bytes are not a picture that can be used; the message says why."""


# ------------------------------------------------------------------------------------------------ decoding


def decode_image(data: bytes | memoryview | None, channels: int = 3, *, max_pixels: int = 89_478_485) -> Image.Image:
    """Decode one picture to 8 bits.

    The EXIF orientation is applied (garbage in it is ignored), of an animation the first frame is taken, palettes are
    looked up, transparency is dropped (as `convert("RGB")` does in torchvision and datasets), CMYK is converted, 16-bit
    grey is divided by 257 where a bare `convert` would clip it.

    Args:
        data: the encoded file; None is a missing picture.
        channels: 3 gives mode RGB, 1 gives mode L.
        max_pixels: largest accepted width * height, read from the header before anything is decoded.

    Returns:
        A picture in mode RGB or L, upright.

    Raises:
        ImageError: the data is missing, damaged, too large, or of another kind.
    """
    with _only_image_errors():
        return _load(_open(data, max_pixels), channels)


@contextmanager
def _only_image_errors() -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except _PILLOW_RAISES as error:
        raise ImageError(f"{type(error).__name__}: {error}"[:200]) from error


def _open(data: bytes | memoryview | None, max_pixels: int) -> Image.Image:
    """Read the header alone."""
    if data is None:
        raise ImageError("no image (null)")
    if not len(data):
        raise ImageError("empty (0 bytes)")
    image = _reader(bytes(data[:16]))(io.BytesIO(data))
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{width}x{height} is {width * height} pixels, more than max_pixels={max_pixels} (--data.max-pixels)"
        )
    return image


def _load(image: Image.Image, channels: int) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    picture = _to_8_bits(image, channels)
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def _reader(head: bytes) -> Callable[[Any], Image.Image]:
    for magic, opener in _readers():
        if magic(head):
            return opener
    raise ImageError(f"not a known image format (begins with {head[:8]!r})")


@cache
def _readers() -> list[tuple[Callable[[bytes], bool], Callable[[Any], Image.Image]]]:
    """List (does the head match, reader); JPEG includes MPO, whose first frame is a plain JPEG."""

    def starts(*magic: bytes) -> Callable[[bytes], bool]:
        return lambda head: head.startswith(magic)

    readers: list[tuple[Callable[[bytes], bool], Callable[[Any], Image.Image]]] = [
        (starts(b"\xff\xd8\xff"), JpegImagePlugin.JpegImageFile),
        (starts(b"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
        (starts(b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
        (starts(b"BM"), BmpImagePlugin.BmpImageFile),
        (starts(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
        (starts(b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), PpmImagePlugin.PpmImageFile),
    ]
    if features.check("webp"):
        readers.append((lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile))
    if features.check("jpg_2000"):
        readers.append((starts(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  \r\n\x87\n"), Jpeg2KImagePlugin.Jpeg2KImageFile))
    if "avif" in features.modules and features.check("avif"):
        from PIL import AvifImagePlugin  # Pillow 11.3 and later

        readers.append((lambda head: head[4:12] in (b"ftypavif", b"ftypavis"), AvifImagePlugin.AvifImageFile))
    return readers


def _to_8_bits(image: Image.Image, channels: int) -> Image.Image:
    if image.mode == "F":
        raise ImageError("32-bit float pixels have no defined range; store 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageError("32-bit integer pixels beyond 16 bits have no defined range; store 8 or 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    # Without this entry a palette's colours are taken as they are, and Pillow has no reason to warn.
    image.info.pop("transparency", None)
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    # Palette, CMYK and the like go to grey by way of RGB: one rule for the weights.
    return (image if image.mode in ("RGB", "L", "1") else image.convert("RGB")).convert(mode)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none or it makes no sense."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow's TIFF reader has turned it already
    return exif_orientation(image.info.get("exif", b""))


def exif_orientation(exif: bytes) -> int:
    """Read tag 0x0112 of the first directory of an EXIF block; 1 if it is absent or the block is damaged."""
    tiff = exif[6:] if exif.startswith(b"Exif\0\0") else exif
    order = {b"II": "<", b"MM": ">"}.get(bytes(tiff[:2]))
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for i in range(min(entries, 256)):
            tag, kind, count, value = struct.unpack_from(order + "HHIH", tiff, at + 2 + 12 * i)
            if tag == 0x0112 and kind == 3 and count == 1:  # one SHORT
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # a directory that points out of the block: no orientation, as every viewer treats it
    return 1


# ------------------------------------------------------------------------------------------------ plain JPEGs

_ROWS_WERE_LEFT = "extraneous bytes before marker 0xd9"
"""libjpeg's first complaint when a sound picture has more rows than its header says: there is data up to its end."""


@cache
def _pillow_is_libjpeg_turbo() -> bool:
    """Say whether Pillow's JPEG decoder is simplejpeg's: other libjpegs upsample chroma differently."""
    if not features.check_feature("libjpeg_turbo"):
        return False
    version = features.version_feature("libjpeg_turbo") or "0"
    return tuple(int(part) for part in version.split(".")[:2]) >= (2, 1)


def open_image(data: bytes | memoryview | None, max_pixels: int) -> Image.Image:
    """Read the header of a picture.

    Raises:
        ImageError: as `decode_image`, as far as the header tells.
    """
    with _only_image_errors():
        return _open(data, max_pixels)


def decode_rows(
    image: Image.Image, data: bytes | memoryview, channels: int, bottom: Callable[[int, int], int]
) -> tuple[Pixels, int, int]:
    """Decode an opened picture, down to the last row that is needed where the rest can be left out.

    Args:
        image: from `open_image`.
        data: its encoded file.
        channels: 3 or 1.
        bottom: (height, width) of the upright picture to the first row that nobody needs.

    Returns:
        Pixels as `decode_image` would have them, [rows, W, 3] or [rows, W], where at least the rows before `bottom` are
        there; height and width of the whole upright picture.

    Raises:
        ImageError: as `decode_image`.
    """
    if channels == 3:
        pixels = _decode_plain_jpeg(image, data, bottom)
        if pixels is not None:
            return pixels, image.height, image.width
    with _only_image_errors():
        upright = _load(image, channels)
        return np.asarray(upright), upright.height, upright.width


def _decode_plain_jpeg(
    image: Image.Image, data: bytes | memoryview, bottom: Callable[[int, int], int]
) -> Pixels | None:
    """Decode what Pillow would, to the bit, in less time; None is for Pillow to judge.

    Args:
        image: the opened header of `data`; untouched.
        data: the encoded file.
        bottom: as in `decode_rows`.

    Returns:
        [rows, W, 3], where at least the rows before `bottom` are there.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or not _pillow_is_libjpeg_turbo():
        return None
    if image.mode not in ("RGB", "L") or _orientation(image) != 1 or image.fp is None:
        return None
    (width, height), layers = image.size, image.layers
    encoded: memoryview | bytearray = memoryview(data).cast("B")
    header = bytes(encoded[: image.fp.tell()])  # to the end of the first scan's header, where Pillow's reader stopped
    frame = struct.pack(">HBHHB", 8 + 3 * layers, 8, height, width, layers)
    at = header.rfind(frame)  # the last: a preview in the metadata may have the same
    if at < 2 or header[at - 2 : at] not in (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2"):
        return None
    # Where all the picture is in one scan without restart markers, a header of fewer rows makes libjpeg stop early. It
    # then looks for the next marker and finds it at once to be the end of the picture, or we ask Pillow: a full decoder
    # would have come to the same marker, so it has nothing else to complain of either. One more block of rows is
    # decoded, because the last rows of a block take chroma from the next.
    rows = min(height, (bottom(height, width) // 16 + 1) * 16)
    if header[at - 1] == 0xC2 or b"\xff\xdd" in header:  # progressive, restarts: here it would find other markers
        rows = height
    if rows < height:
        encoded = bytearray(encoded)
        encoded[at + 3 : at + 5] = rows.to_bytes(2, "big")
    pixels = np.empty((rows, width, 3), np.uint8)
    try:
        # Strict: what libjpeg only warns of is an error. So is a buffer too small for a header that we misread.
        decoded = simplejpeg.decode_jpeg(encoded, "RGB", buffer=pixels, strict=True)
    except ValueError as error:
        return pixels if rows < height and _ROWS_WERE_LEFT in str(error) else None
    return pixels if decoded.shape == pixels.shape else None


# ------------------------------------------------------------------------------------------------ evaluation


def eval_image(image: Image.Image, size: tuple[int, int], crop_pct: float | None = None) -> Pixels:
    """Resize and crop the centre, as for evaluation: uint8 [C, H, W].

    A picture of exactly `size` is returned as it is (32x32 data sets would otherwise lose their border). Any other is
    resized so that the crop covers 224/256 of its short side up to 224 pixels, all of it beyond (official evaluation).

    Args:
        image: from `decode_image`.
        size: (height, width) of the result, in pixels.
        crop_pct: share of the short side that the crop covers, in (0, 1]; given, it holds for pictures of exactly
            `size` too.
    """
    return to_array(center(image, size, crop_pct))


def center(image: Image.Image, size: tuple[int, int], crop_pct: float | None = None) -> Image.Image:
    """Resize and crop the centre; see `eval_image`."""
    height, width = size
    if crop_pct is None and (image.height, image.width) == size:
        return image
    image = resize_to_cover(image, size, crop_pct)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def resize_to_cover(image: Image.Image, size: tuple[int, int], crop_pct: float | None = None) -> Image.Image:
    """Resize, keeping the aspect, to the smallest picture that covers `size` and its border."""
    image = _cut_strip(image)
    if crop_pct is not None:
        target_h, target_w = (int(side / crop_pct) for side in size)
    else:
        target_h, target_w = (int(side * 256 / 224) if side <= 224 else side for side in size)
    # Compared as products, so that a square target means exactly "the short side".
    if image.width * target_h <= image.height * target_w:
        shape = target_w, max(target_h, int(target_w * image.height / image.width))
    else:
        shape = max(target_w, int(target_h * image.width / image.height)), target_h
    return resize(image, (shape[1], shape[0]))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) with the bicubic filter of Pillow, as all pictures here are."""
    height, width = size
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _cut_strip(image: Image.Image) -> Image.Image:
    limit = MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    w, h = min(image.width, limit), min(image.height, limit)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def to_array(image: Image.Image) -> Pixels:
    """Return a picture as [C, H, W]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
