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
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NamedTuple

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

from hf_mae.recipes.crop import EvalCrop

Pixels = npt.NDArray[np.uint8]
Range = tuple[float, float]
"""Stored values that become 0 and 255."""

MAX_ASPECT = 16
"""Longer strips are not resized as a whole: resizing the short side of 5000x1 would make 327 MP of it."""

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


def decode_image(
    data: bytes | memoryview | None,
    channels: int = 3,
    *,
    max_pixels: int = 89_478_485,
    pixel_range: Range | None = None,
) -> Image.Image:
    """Decode one picture to 8 bits.

    The EXIF orientation is applied (garbage in it is ignored), of an animation or of several pages the first is taken,
    palettes are looked up, transparency is dropped (as `convert("RGB")` does in torchvision and datasets), CMYK is
    converted, 16-bit grey is divided by 257 where a bare `convert` would clip it. Of 16-bit colour the high byte is
    taken.

    Args:
        data: the encoded file; None is a missing picture.
        channels: 3 gives mode RGB, 1 gives mode L.
        max_pixels: largest accepted width * height, read from the header before anything is decoded.
        pixel_range: (low, high) of the stored values, with all bits that the file holds, of any type: each becomes
            `clip((value - low) / (high - low), 0, 1)`, in 255 steps, rounded. A value that is not a number becomes 0.
            8-bit images are mapped by the same formula, so that a folder of several types is consistent; `(0, 255)`
            leaves these as they are, `(0, 65535)` 16-bit grey. None is 0 to 255 or to 65535, by the type.

    Returns:
        A picture in mode RGB or L, upright.

    Raises:
        ImageError: the data is missing, damaged, too large, or of another kind.
    """
    with _only_image_errors():
        return _load(_open(data, max_pixels), channels, pixel_range)


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
    try:
        image = _reader(bytes(data[:16]))(io.BytesIO(data))
    except SyntaxError as error:
        raise ImageError(_tiff_layout(data, error) or f"{type(error).__name__}: {error}"[:200]) from error
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(284) == 2:
        _widen_planes(image)
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{width}x{height} is {width * height} pixels, more than max_pixels={max_pixels} (--data.max-pixels)"
        )
    return image


def _load(image: Image.Image, channels: int, pixel_range: Range | None = None) -> Image.Image:
    if pixel_range is None:
        image.load()
        orientation = _orientation(image)
        picture = _to_8_bits(image, channels)
    else:
        values = stored_values(image, channels)
        orientation = _orientation(image)
        picture = Image.fromarray(map_range(values, pixel_range))
        picture = picture if picture.mode == ("L" if channels == 1 else "RGB") else _to_8_bits(picture, channels)
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
        raise ImageError("float pixels have no defined range; say which with --data.pixel-range LOW HIGH")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ImageError(
                f"integer pixels from {values.min()} to {values.max()}, beyond unsigned 16 bits, have no defined "
                "range; say which with --data.pixel-range LOW HIGH"
            )
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    # Without this entry a palette's colours are taken as they are, and Pillow has no reason to warn.
    image.info.pop("transparency", None)
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    # Palette, CMYK and the like go to grey by way of RGB: one rule for the weights.
    return (image if image.mode in ("RGB", "L", "1") else image.convert("RGB")).convert(mode)


# ------------------------------------------------------------------------------------------------ other depths

Values = npt.NDArray[Any]


class Stored(NamedTuple):
    """What an image file holds before it becomes 8 bits."""

    kind: str
    """`8 bits`, `16 bits`, `integers` (signed, or of 32 bits) or `floats`."""
    low: float
    """Smallest of the stored values; 0 where `kind` is `8 bits` and the pixels were not asked for."""
    high: float
    """Largest of them, or 255."""
    pages: int
    """Pages or frames, of which the first is used."""


def look_inside(data: bytes | memoryview | None, *, max_pixels: int = 89_478_485, decode: bool = False) -> Stored:
    """Say what an image file holds.

    Args:
        data: the encoded file.
        max_pixels: as in `decode_image`.
        decode: find out the range of 8-bit images too, rather than read the header alone.

    Raises:
        ImageError: as `decode_image`, as far as it was decoded.
    """
    with _only_image_errors():
        image = _open(data, max_pixels)
        pages = 2 if "mp" in image.info else 1  # multi-picture JPEG: two or more
        with suppress(*_PILLOW_RAISES):  # a later page may be damaged
            pages = max(pages, getattr(image, "n_frames", 1))
        image = _open(data, max_pixels)  # counting pages moves some readers
        kind = _kind(image)
        if kind == "8 bits" and not decode:
            return Stored(kind, 0, 255, pages)
        values = stored_values(image, 3)
        values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if not values.size:
            raise ImageError("holds no finite value")
        return Stored(kind, float(values.min()), float(values.max()), pages)


def _kind(image: Image.Image) -> str:
    if image.mode == "F":
        return "floats"
    if image.mode == "I":
        return "integers"
    return "16 bits" if image.mode.startswith("I;16") or _is_deep_colour(image) else "8 bits"


def stored_values(image: Image.Image, channels: int) -> Values:
    """Return the values that an opened, not yet decoded file holds, with all their bits: [H, W] or [H, W, 3].

    Those of 8 bits come as `decode_image` has them. Pillow keeps the high bytes of 16-bit colour; the low ones are got
    by decoding once more with the bytes of each value swapped.

    Raises:
        ImageError: 16-bit colour in an arrangement of bands that is not known here.
    """
    if _is_deep_colour(image):
        return _deep_colour(image)
    image.load()
    if _kind(image) == "8 bits":
        return np.asarray(_to_8_bits(image, channels))
    return np.asarray(image)


def map_range(values: Values, pixel_range: Range) -> Pixels:
    """Map stored values to uint8 as `decode_image` says."""
    low, high = pixel_range
    if values.dtype == np.uint8:
        return map_range(np.arange(256.0), pixel_range)[values]
    scaled = (values.astype(np.float64) - low) * 255 / (high - low)
    return np.rint(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0), 0, 255)).astype(np.uint8)


def stated_range(processor: Any) -> Range | None:
    """Return the `pixel_range` that a model folder's image processor states, None where it states none."""
    stated = getattr(processor, "pixel_range", None)
    return None if stated is None else (float(stated[0]), float(stated[1]))


def _raw_mode(tile: Any) -> str:
    """Return how the bytes of a tile lie, where its decoder is told."""
    arguments = tile[3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _is_deep_colour(image: Image.Image) -> bool:
    return not image.mode.startswith("I") and any(";16" in _raw_mode(tile) for tile in getattr(image, "tile", []))


def _deep_colour(image: Image.Image) -> Values:
    """Decode 16-bit colour, or grey with alpha, to [H, W, 3]; alpha is dropped."""
    assert isinstance(image, (PngImagePlugin.PngImageFile, TiffImagePlugin.TiffImageFile))
    if image.mode not in ("RGB", "RGBA", "RGBX", "L"):
        raise ImageError(f"16-bit {image.mode} cannot be read with data.pixel_range; store RGB or grey")
    assert isinstance(image.fp, io.BytesIO)
    other = _open(image.fp.getvalue(), sys.maxsize)
    grey_alpha = _raw_mode(image.tile[0]).startswith("LA;16")
    opposite = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}

    def use(picture: Any, change: Callable[[str], str]) -> Values:
        picture.tile = [
            tile._replace(args=(change(raw), *tile.args[1:]) if isinstance(tile.args, tuple) else change(raw))
            for tile, raw in ((tile, _raw_mode(tile)) for tile in picture.tile)
        ]
        picture.load()
        pixels = np.asarray(picture).astype(np.uint16)
        return pixels if pixels.ndim == 3 else pixels[..., None]

    if grey_alpha:  # its four bytes: grey high, grey low, alpha high, alpha low
        pixels = use(image, lambda raw: "RGBA")
        return np.repeat(pixels[..., :1] * 256 + pixels[..., 1:2], 3, axis=2)
    # Multiplied by alpha or not, what is stored is taken.
    high = use(image, lambda raw: raw.replace("RGBa", "RGBA"))
    low = use(other, lambda raw: raw[:-1].replace("RGBa", "RGBA") + opposite[raw[-1]])
    values = high * 256 + low
    return values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)


def _tiff_layout(data: bytes | memoryview, error: SyntaxError) -> str | None:
    """Say which bands a TIFF has that Pillow cannot read; None for other files. More bands are read from here one day.

    Returns:
        A sentence, or None if the directory cannot be read either.
    """
    try:
        with io.BytesIO(data) as file:
            directory = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
            file.seek(directory.next)
            directory.load(file)
            bands, bits = directory.get(277, 1), directory.get(258, (1,))
    except _PILLOW_RAISES:
        return None
    depth = "/".join(str(bit) for bit in sorted(set(bits))) if isinstance(bits, tuple) else str(bits)
    if bands in (1, 3) and "pixel mode" not in str(error):
        return None  # damaged
    if bands in (1, 3):
        return f"TIFF with {bands} band(s) of {depth} bits of this kind is not read; 8, 16 and float of 32 bits are"
    return f"TIFF with {bands} bands of {depth} bits; 1 or 3 are read"


def _widen_planes(image: TiffImagePlugin.TiffImageFile) -> None:
    """Correct how Pillow reads 16-bit colour whose bands follow each other: it takes their bytes for 8-bit pixels."""
    bits = image.tag_v2.get(258)
    order = "B" if image.tag_v2.prefix == b"MM" else "L"
    if isinstance(bits, tuple) and set(bits) == {16}:
        image.tile = [
            tile._replace(args=(f"{_raw_mode(tile)};16{order}", *tile.args[1:]))
            if tile.codec_name == "raw" and isinstance(tile.args, tuple) and len(_raw_mode(tile)) == 1
            else tile
            for tile in image.tile
        ]


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
    image: Image.Image,
    data: bytes | memoryview,
    channels: int,
    bottom: Callable[[int, int], int],
    pixel_range: Range | None = None,
) -> tuple[Pixels, int, int]:
    """Decode an opened picture, down to the last row that is needed where the rest can be left out.

    Args:
        image: from `open_image`.
        data: its encoded file.
        channels: 3 or 1.
        bottom: (height, width) of the upright picture to the first row that nobody needs.
        pixel_range: as in `decode_image`.

    Returns:
        Pixels as `decode_image` would have them, [rows, W, 3] or [rows, W], where at least the rows before `bottom` are
        there; height and width of the whole upright picture.

    Raises:
        ImageError: as `decode_image`.
    """
    if channels == 3 and pixel_range is None:
        pixels = _decode_plain_jpeg(image, data, bottom)
        if pixels is not None:
            return pixels, image.height, image.width
    with _only_image_errors():
        upright = _load(image, channels, pixel_range)
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

    Args:
        image: from `decode_image`.
        size: (height, width) of the result, in pixels.
        crop_pct: see `EvalCrop`; None is the default of this size.
    """
    return to_array(crop_center(image, EvalCrop(size, crop_pct)))


def crop_center(image: Image.Image, crop: EvalCrop) -> Image.Image:
    """Resize and crop the centre by the rule of evaluation, with the bits of torchvision on Pillow.

    Of strips above `MAX_ASPECT` only the part that is shown is resized, whose pixels may differ from the official ones
    by rounding (1 of 255): the whole of 5000x1 would become 327 MP.
    """
    (height, width), (resized_h, resized_w) = crop.size, crop.resized(image.height, image.width)
    top, left = crop.corner(resized_h, resized_w)
    if max(resized_h, resized_w) > MAX_ASPECT * max(crop.target):
        scale_h, scale_w = image.height / resized_h, image.width / resized_w
        right, bottom = min((left + width) * scale_w, image.width), min((top + height) * scale_h, image.height)
        bicubic = Image.Resampling.BICUBIC  # rows first, then columns, as Pillow does for the whole
        image = image.resize((width, image.height), bicubic, (left * scale_w, 0, right, image.height))
        return image.resize((width, height), bicubic, (0, top * scale_h, width, bottom))
    return resize(image, (resized_h, resized_w)).crop((left, top, left + width, top + height))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize to (height, width) with the bicubic filter of Pillow, as all images here are."""
    height, width = size
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_array(image: Image.Image) -> Pixels:
    """Return a picture as [C, H, W]."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
