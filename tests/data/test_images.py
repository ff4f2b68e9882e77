"""Decoding of good, odd and hostile files; samples by the short way have the bits of the long one."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image, features

from hf_mae.data import augment as augment_module
from hf_mae.data import images as images_module
from hf_mae.data.augment import NUM_UNIFORMS, augment_image, random_resized_crop_box, sample_pixels
from hf_mae.data.images import ImageError, decode_image, exif_orientation
from hf_mae.recipes.base import Augment


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def as_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ------------------------------------------------------------------------------------------------ decoding


@pytest.fixture(scope="module")
def manifest(shared: Path) -> tuple[Path, list[dict]]:
    folder = shared / "data/bad_images"
    return folder, json.loads((folder / "manifest.json").read_text())["files"]


def test_every_hostile_file_behaves_as_listed(manifest):
    folder, entries = manifest
    assert len(entries) == 73
    reference = decode_image((folder / "files/ok_baseline.jpg").read_bytes())
    wrong = []
    for entry in entries:
        try:
            picture = decode_image((folder / entry["file"]).read_bytes())
        except ImageError as error:
            if entry["expected"] == "decode" or not str(error):
                wrong.append((entry["file"], repr(error)))
            continue
        if entry["expected"] == "reject":
            wrong.append((entry["file"], "decoded"))
        assert picture.mode == "RGB"
        same = entry.get("same_picture_as", entry.get("after_exif_transpose_same_as"))
        grey = entry.get("same_picture_as_grey")
        if same or grey:
            wanted = reference if same else reference.convert("L").convert("RGB")
            if picture.size != wanted.size or np.abs(as_array(picture) - as_array(wanted)).mean() > 5:
                wrong.append((entry["file"], "another picture"))
    assert not wrong


def test_hostile_files_raise_no_warning_and_give_grey_too(manifest):
    folder, entries = manifest
    for entry in entries:
        if entry["expected"] != "decode":
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert decode_image((folder / entry["file"]).read_bytes(), channels=1).mode == "L", entry["file"]


def test_what_pillow_warns_of_stays_off_the_console(tmp_path):
    exif = b"Exif\0\0II*\0" + (8).to_bytes(4, "little") + b"\x05\0" + b"\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    (tmp_path / "x.jpg").write_bytes(encode(noise(9, 7), "JPEG", exif=exif))
    code = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from PIL import JpegImagePlugin
data = Path(sys.argv[1]).read_bytes()
if sys.argv[2] == "ours":
    from hf_mae.data.images import decode_image as read
else:
    import io
    def read(data): JpegImagePlugin.JpegImageFile(io.BytesIO(data)).load()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(read, [data] * 20))
"""

    def console(which: str) -> str:
        command = [sys.executable, "-W", "always", "-c", code, str(tmp_path / "x.jpg"), which]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stderr

    assert "UserWarning" in console("pillow")
    assert console("ours") == ""


def test_a_lack_of_memory_is_not_a_bad_picture(monkeypatch):
    def short(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", short)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", short)
    with pytest.raises(MemoryError):
        decode_image(encode(noise(9, 7), "PPM"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_memoryview_and_bytes_decode_alike(kind):
    data = encode(noise(9, 7), kind)
    assert decode_image(memoryview(data)).tobytes() == decode_image(data).tobytes()


def test_missing_and_empty_are_errors_with_a_reason():
    with pytest.raises(ImageError, match="null"):
        decode_image(None)
    with pytest.raises(ImageError, match="0 bytes"):
        decode_image(b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_every_prefix_of_a_file_is_an_image_or_an_image_error(kind):
    data = encode(noise(16, 16), kind)
    for end in range(0, len(data), max(1, len(data) // 40)):
        with contextlib.suppress(ImageError):
            decode_image(data[:end])


AVIF = pytest.param(
    "AVIF",
    marks=pytest.mark.skipif(
        "avif" not in features.modules or not features.check("avif"), reason="this Pillow has no AVIF"
    ),
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", AVIF])
def test_flipped_bytes_are_an_image_or_an_image_error(kind):
    data = encode(noise(12, 12), kind)
    rng = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 3):
            broken[at] = rng.integers(256)
        with contextlib.suppress(ImageError):
            decode_image(bytes(broken), max_pixels=10_000)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    picture = np.asarray(decode_image(encode(Image.fromarray(values), "PNG"), channels=1))
    assert np.array_equal(picture, np.rint(values / 257).astype(np.uint8))


def test_transparency_is_dropped():
    pixels = np.dstack([np.asarray(noise(6, 5)), np.zeros((6, 5), np.uint8)])
    picture = decode_image(encode(Image.fromarray(pixels), "PNG"))
    assert np.array_equal(np.asarray(picture), pixels[..., :3])


def test_pixel_limit_is_checked_before_decoding_and_named():
    data = encode(Image.new("1", (3000, 3000)), "PNG")
    with pytest.raises(ImageError, match=r"3000x3000.*max_pixels=8999999.*--data\.max-pixels"):
        decode_image(data, max_pixels=8_999_999)
    assert decode_image(data, max_pixels=9_000_000).size == (3000, 3000)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_pillow(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(6, 10), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\0\x05\x01\x12", b"xx" * 40]
)
def test_damaged_exif_means_upright(exif):
    assert exif_orientation(exif) == 1


# ------------------------------------------------------------------------------------------------ samples


def draws(k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((k, NUM_UNIFORMS))


def samples(data, u: np.ndarray, size=(24, 32), augment=Augment(), channels: int = 3, **options) -> np.ndarray:  # noqa: B008
    out = np.zeros((len(u), channels, *size), np.uint8)
    sample_pixels(data, u, out, augment, **options)
    return out


def reference(data, u: np.ndarray, size=(24, 32), augment=Augment(), channels: int = 3) -> np.ndarray:  # noqa: B008
    return np.stack([augment_image(decode_image(data, channels), row, size, augment) for row in u])


def outcome(function, data, u: np.ndarray):
    """Pixels as bytes, or the words of the error."""
    try:
        return function(data, u).tobytes()
    except ImageError as error:
        return str(error)


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    return noise(height // 8, width // 8, seed=seed).resize((width, height), Image.Resampling.BICUBIC)


PHOTO = smooth(96, 112)
TURNED = Image.Exif()
TURNED[0x0112] = 6
JPEGS = {
    "4:4:4": encode(PHOTO, "JPEG", subsampling=0),
    "4:2:2": encode(PHOTO, "JPEG", subsampling=1),
    "4:2:0": encode(PHOTO, "JPEG", subsampling=2),
    "4:4:0": simplejpeg.encode_jpeg(np.array(PHOTO), colorsubsampling="440"),
    "4:1:1": simplejpeg.encode_jpeg(np.array(PHOTO), colorsubsampling="411"),
    "odd size": encode(smooth(96, 112).crop((0, 0, 109, 91)), "JPEG"),
    "RGB inside": encode(PHOTO, "JPEG", keep_rgb=True),
    "progressive": encode(PHOTO, "JPEG", progressive=True),
    "restarts": encode(PHOTO, "JPEG", restart_marker_blocks=5),
    "grey": encode(PHOTO.convert("L"), "JPEG"),
    "CMYK": encode(PHOTO.convert("CMYK"), "JPEG"),
    "turned": encode(PHOTO, "JPEG", exif=TURNED),
    "with a preview": encode(PHOTO, "JPEG", comment=encode(PHOTO, "JPEG", quality=1)),
    "two in one": encode(PHOTO, "JPEG") + encode(PHOTO, "JPEG"),
}


@pytest.mark.parametrize("crop", ["random-resized", "fixed", "center"])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", [*JPEGS, "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_samples_are_bit_equal_to_decoding_then_augmenting(kind, channels, crop):
    data = JPEGS.get(kind) or encode(PHOTO, kind)
    for jitter in (0.0, 0.4):
        augment, u = Augment(crop=crop, color_jitter=jitter), draws(6)
        expected = reference(data, u, augment=augment, channels=channels)
        assert np.array_equal(samples(data, u, augment=augment, channels=channels), expected)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_k_samples_equal_k_calls(decoder):
    u = draws(5)
    together = samples(JPEGS["4:2:0"], u, decoder=decoder)
    assert np.array_equal(together, np.concatenate([samples(JPEGS["4:2:0"], row[None], decoder=decoder) for row in u]))


def test_samples_take_any_buffer():
    data, u = JPEGS["4:2:0"], draws(2)
    for other in (memoryview(data), memoryview(bytearray(data)), pa.py_buffer(data)):
        assert np.array_equal(samples(other, u), samples(data, u))


@cache
def real_jpegs(shared: Path) -> list[bytes]:
    """A few of each collection, small ones first: 4:4:4, 4:2:0, grey, photographs and re-encoded."""
    paths = sorted((shared / "data/coco_mini/images/val").glob("*.jpg"))[:6]
    found = [path.read_bytes() for path in paths]
    for name in ("imagenet1000/train-00000-of-00005", "birds/test-00000-of-00002", "cifar10/test-00000-of-00002"):
        column = pq.ParquetFile(shared / f"data/{name}.parquet").read_row_group(0, columns=["image"]).column("image")
        rows = sorted((row["bytes"] for row in column.to_pylist()[:60]), key=len)
        found += rows[:20] + rows[-2:]
    assert all(data.startswith(b"\xff\xd8\xff") for data in found)
    return found


def test_real_jpegs_are_bit_equal_to_pillow(shared):
    for i, data in enumerate(real_jpegs(shared)):
        u = draws(2, seed=i)
        assert np.array_equal(samples(data, u), reference(data, u)), i


def test_most_real_jpegs_take_the_short_way_and_leave_rows(shared, monkeypatch):
    data, rows = real_jpegs(shared), []
    decode = simplejpeg.decode_jpeg

    def counting(encoded, *args, **options):
        rows.append(len(options["buffer"]))
        return decode(encoded, *args, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counting)
    monkeypatch.setattr(images_module, "_load", lambda image, channels: pytest.fail("Pillow decoded a plain JPEG"))
    for i, one in enumerate(data):
        samples(one, draws(1, seed=i))
    heights = [simplejpeg.decode_jpeg_header(one)[0] for one in data]
    assert len(rows) == len(data)
    assert sum(rows) < 0.95 * sum(heights)


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "4:4:0", "4:1:1", "odd size", "RGB inside", "grey"])
def test_rows_that_are_left_out_change_none_before_them(kind):
    data = JPEGS[kind]
    header, full = images_module._open(data, 10**6), np.asarray(decode_image(data))
    for bottom in range(1, len(full) + 1):
        pixels = images_module._decode_plain_jpeg(header, data, lambda height, width, bottom=bottom: bottom)
        assert bottom <= len(pixels) <= min(bottom + 16, len(full))
        assert np.array_equal(pixels[:bottom], full[:bottom])


@pytest.mark.parametrize("kind", ["progressive", "restarts", "with a preview", "two in one"])
def test_plain_jpegs_of_all_kinds_are_decoded_once(kind, monkeypatch):
    monkeypatch.setattr(images_module, "_load", lambda image, channels: pytest.fail("Pillow decoded it too"))
    samples(JPEGS[kind], np.zeros((1, NUM_UNIFORMS)))  # the smallest crop, at the top


def test_errors_over_hostile_files_are_those_of_pillow(manifest):
    folder, entries = manifest
    for entry in entries:
        data, u = (folder / entry["file"]).read_bytes(), draws(2)
        assert outcome(samples, data, u) == outcome(reference, data, u), entry["file"]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "grey", "progressive", "restarts", "with a preview"])
def test_damaged_jpegs_have_the_bits_or_the_error_of_pillow(kind):
    data, rng, errors = JPEGS[kind], np.random.default_rng(2), 0
    header = data.rindex(b"\xff\xda")
    for i in range(160):
        broken, at = bytearray(data), int(rng.integers(header, len(data)))
        damage = i % 5
        if damage == 0:  # a bit anywhere
            broken[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        elif damage == 1:  # cut
            del broken[at:]
        elif damage == 2:  # cut, but with an end
            broken[at:] = b"\xff\xd9"
        elif damage == 3:  # a marker in the middle
            broken[at : at + 2] = bytes([255, int(rng.integers(256))])
        else:  # a hole
            del broken[at : at + int(rng.integers(1, 40))]
        u = draws(1, seed=i)
        expected = outcome(reference, bytes(broken), u)
        assert outcome(samples, bytes(broken), u) == expected, i
        errors += isinstance(expected, str)
    assert 16 < errors < 160


def test_what_only_pillow_refuses_is_refused():
    # A Photoshop block that ends within itself: metadata, which libjpeg skips.
    block = b"Photoshop 3.0\0" + b"8BIM" + b"\x04\x04"
    data = b"\xff\xd8\xff\xed" + (2 + len(block)).to_bytes(2, "big") + block + JPEGS["4:2:0"][2:]
    assert simplejpeg.decode_jpeg(data).shape == (96, 112, 3)
    expected = outcome(reference, data, draws(1))
    assert isinstance(expected, str)
    assert outcome(samples, data, draws(1)) == expected


def test_nothing_is_written_for_a_bad_picture_nor_decoded_for_a_large_one(monkeypatch):
    out = np.full((1, 3, 8, 8), 7, np.uint8)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: pytest.fail("decoded before the check"))
    for data, why in ((JPEGS["4:2:0"], "max_pixels=10751"), (None, "null"), (b"", "0 bytes"), (b"GIF", "known")):
        with pytest.raises(ImageError, match=why):
            sample_pixels(data, draws(1), out, Augment(), max_pixels=96 * 112 - 1)
    assert (out == 7).all()


@pytest.mark.parametrize("message", ["Premature end of JPEG file", "9 extraneous bytes before marker 0xda", "memory"])
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_pillow_decodes_what_simplejpeg_complains_of(message, decoder, monkeypatch):
    data, u = JPEGS["4:2:0"], draws(3)
    expected = samples(data, u, decoder=decoder)

    def complain(*args, **options):
        options["buffer"][:] = 0
        raise ValueError(message)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", complain)
    assert np.array_equal(samples(data, u, decoder=decoder), expected)


def test_pillow_decodes_where_it_is_not_built_on_libjpeg_turbo(monkeypatch):
    monkeypatch.setattr(images_module, "_pillow_is_libjpeg_turbo", lambda: False)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: pytest.fail("another libjpeg"))
    u = draws(2)
    assert np.array_equal(samples(JPEGS["4:2:0"], u), reference(JPEGS["4:2:0"], u))


@pytest.mark.parametrize("kind", ["4:2:0", "turned", "PNG"])
def test_both_decoders_take_the_boxes_of_augment_image(kind, monkeypatch):
    data, u, boxes = JPEGS.get(kind) or encode(PHOTO, kind), draws(4), []

    def recording(*args):
        boxes.append((args[1:3], random_resized_crop_box(*args)))
        return boxes[-1][1]

    monkeypatch.setattr(augment_module, "random_resized_crop_box", recording)
    found = []
    for function in (reference, samples, lambda *args: samples(*args, decoder="fast")):
        boxes.clear()
        function(data, u)
        found.append(boxes[-len(u) :])
    assert found[0] == found[1] == found[2]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def test_the_fast_decoder_is_within_rounding_of_the_exact_one(shared):
    found = []
    for i, data in enumerate(real_jpegs(shared)):
        u = draws(2, seed=i)
        exact, fast = (samples(data, u, (224, 224), decoder=decoder) for decoder in ("exact", "fast"))
        found += [psnr(a, b) for a, b in zip(fast, exact, strict=True)]
    assert len(found) > 100
    assert np.percentile(found, 5) >= 50
    assert min(found) >= 45  # no crop is another crop


@pytest.mark.parametrize("augment", [Augment(crop="fixed"), Augment(crop="center"), Augment(color_jitter=0.4)])
def test_the_fast_decoder_keeps_the_other_choices(augment):
    u = draws(4)
    fast, exact = (samples(JPEGS["4:4:4"], u, augment=augment, decoder=d) for d in ("fast", "exact"))
    assert psnr(fast, exact) > 45
    assert augment.color_jitter or np.array_equal(fast, exact)


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_threads_change_no_bit(decoder):
    work = [(data, draws(2, seed=i)) for i, data in enumerate(list(JPEGS.values()) * 4)]
    expected = [samples(data, u, decoder=decoder) for data, u in work]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda item: samples(*item, decoder=decoder), work))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
