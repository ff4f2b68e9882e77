"""Decoding of good, odd and hostile files; crops against torchvision and the official draws."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mae.data.images import (
    CROP_TRIES,
    FLIP,
    JITTER,
    NUM_UNIFORMS,
    ImageError,
    augment_image,
    decode_image,
    eval_image,
    exif_orientation,
    random_resized_crop_box,
)
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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
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


# ------------------------------------------------------------------------------------------------ crops


def torch_row(height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]) -> np.ndarray:
    """Draw from torch's generator in the order of the official code, as uniforms."""
    u = np.zeros(NUM_UNIFORMS)
    for k in range(CROP_TRIES):
        u[4 * k], u[4 * k + 1] = torch.rand(1).item(), torch.rand(1).item()
        area = height * width * (scale[0] + u[4 * k] * (scale[1] - scale[0]))
        aspect = np.exp(np.log(ratio[0]) + u[4 * k + 1] * (np.log(ratio[1]) - np.log(ratio[0])))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if w <= width and h <= height:
            u[4 * k + 2] = (torch.randint(0, height - h + 1, (1,)).item() + 0.5) / (height - h + 1)
            u[4 * k + 3] = (torch.randint(0, width - w + 1, (1,)).item() + 0.5) / (width - w + 1)
            break
    return u


def test_crop_boxes_equal_the_official_draws(goldens):
    draws = json.loads((goldens / "golden.json").read_text())["random_resized_crop"]["draws"]
    assert len(draws) == 4
    for case in draws:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case["seed"])
            for box in case["pretrain_torchvision_scale_0.2_1"]:
                u = torch_row(case["height"], case["width"], (0.2, 1.0), (3 / 4, 4 / 3))
                assert random_resized_crop_box(u, case["height"], case["width"]) == tuple(box)


def test_strips_fall_back_to_a_central_box():
    u = np.zeros(NUM_UNIFORMS)
    assert random_resized_crop_box(u, 640, 64) == (277, 0, 85, 64)
    assert random_resized_crop_box(u, 64, 640) == (0, 277, 64, 85)


def test_random_resized_crop_is_bit_equal_to_torchvision():
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not a dependency")
    crop = transforms.RandomResizedCrop((24, 16), (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC)
    augment = Augment(flip=False)
    with torch.random.fork_rng(devices=[]):
        for i, (h, w) in enumerate([(40, 60), (61, 33), (20, 20), (8, 90), (130, 111)]):
            image = noise(h, w, seed=i)
            torch.manual_seed(i)
            u = torch_row(h, w, augment.scale, augment.ratio)
            torch.manual_seed(i)
            assert np.array_equal(
                augment_image(image, u, (24, 16), augment), np.asarray(crop(image)).transpose(2, 0, 1)
            )


@pytest.mark.parametrize("side", [32, 224])
def test_centre_crop_is_bit_equal_to_torchvision(side):
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not a dependency")
    official = transforms.Compose(
        [
            transforms.Resize(int(side * 256 / 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
        ]
    )
    for i, (h, w) in enumerate([(48, 64), (67, 41), (300, 270), (33, 90)]):
        image = noise(h, w, seed=i)
        assert np.array_equal(eval_image(image, (side, side)), np.asarray(official(image)).transpose(2, 0, 1))


def test_jitter_equals_torchvision_in_the_documented_order():
    functional = pytest.importorskip("torchvision.transforms.functional", reason="torchvision is not a dependency")
    image, u = noise(10, 10), np.full(NUM_UNIFORMS, 0.9)
    u[JITTER : JITTER + 3] = 0.1, 0.75, 0.5
    ours = augment_image(image, u, (10, 10), Augment(crop="center", flip=False, color_jitter=0.4))
    theirs = functional.adjust_brightness(image, 0.68)
    theirs = functional.adjust_saturation(functional.adjust_contrast(theirs, 1.2), 1.0)
    assert np.array_equal(ours, np.asarray(theirs).transpose(2, 0, 1))


def test_centre_is_the_identity_at_the_target_size():
    for channels, mode in ((3, "RGB"), (1, "L")):
        image = noise(32, 32, channels)
        assert image.mode == mode
        assert np.array_equal(eval_image(image, (32, 32)), np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))


def test_flip_mirrors_below_one_half_only():
    image, u = noise(12, 12), np.zeros(NUM_UNIFORMS)
    augment = Augment(crop="center")
    u[FLIP] = 0.5
    plain = augment_image(image, u, (12, 12), augment)
    u[FLIP] = 0.49
    assert np.array_equal(augment_image(image, u, (12, 12), augment), plain[:, :, ::-1])


def test_fixed_crop_reaches_every_corner():
    image, augment = noise(256, 256), Augment(crop="fixed", flip=False)  # already at 256: no resampling
    pixels, u = np.asarray(image).transpose(2, 0, 1), np.zeros(NUM_UNIFORMS)
    assert np.array_equal(augment_image(image, u, (224, 224), augment), pixels[:, :224, :224])
    u[:2] = 1 - 2**-53
    assert np.array_equal(augment_image(image, u, (224, 224), augment), pixels[:, 32:, 32:])


@pytest.mark.parametrize("crop", ["random-resized", "fixed", "center"])
@pytest.mark.parametrize("shape", [(5000, 1), (1, 5000), (1, 1), (2, 3), (30, 1000)])
@pytest.mark.parametrize("size", [(224, 224), (32, 64)])
def test_extreme_shapes_give_the_asked_size(crop, shape, size, monkeypatch):
    largest, resize = [0], Image.Image.resize

    def counting(self, shape, *args, **kwargs):
        largest.append(shape[0] * shape[1])
        return resize(self, shape, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", counting)
    for value in (0.0, 0.3, 1 - 2**-53):
        out = augment_image(noise(*shape), np.full(NUM_UNIFORMS, value), size, Augment(crop=crop, color_jitter=0.3))
        assert out.shape == (3, *size)
        assert out.dtype == np.uint8
    assert max(largest) <= 256 * 16 * 256


def test_augmentation_touches_no_global_generator():
    import random

    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    augment_image(noise(40, 30), np.full(NUM_UNIFORMS, 0.4), (16, 16), Augment(color_jitter=0.4))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
