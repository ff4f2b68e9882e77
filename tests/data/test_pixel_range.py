"""Stored values that do not fill 8 or 16 bits: refused with what to type, then mapped exactly, the same everywhere."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hf_mae import MAEConfig, MAEForImageClassification
from hf_mae.data.examples import check_pixels, load_examples
from hf_mae.data.images import ImageError, decode_image
from hf_mae.data.loader import Loader
from hf_mae.data.order import Order
from hf_mae.data.sources import open_source
from hf_mae.data.whole import WholeSplit
from hf_mae.evaluate import load_classifier
from hf_mae.exporting.processor import read_processor
from hf_mae.exporting.timm_vit import as_timm
from hf_mae.models.timm_models import create
from hf_mae.models.timm_spec import TimmSpec, read_source
from hf_mae.recipes.base import Augment, Data, changed_fields, from_dict, to_dict
from hf_mae.recipes.mae import QUICKSTART
from hf_mae.training.monitors import Printer
from hf_mae.training.tasks import Classification, TimmClassification

RNG = np.random.default_rng(0)
GREY12 = RNG.integers(0, 4096, (8, 8)).astype(np.uint16)
RGB16 = RNG.integers(0, 65536, (8, 8, 3)).astype(np.uint16)


def png(values):
    """A 16-bit PNG of 1 (grey), 2 (grey, alpha), 3 or 4 bands, which Pillow does not write."""
    height, width, bands = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, values, **options)
    return out.getvalue()


def mapped(values, low, high):
    """The formula, in Python's own exact numbers where it matters."""
    return np.rint(np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)


def decoded(data, *limits, channels=3):
    return np.asarray(decode_image(data, channels, pixel_range=limits or None))


@pytest.mark.parametrize(
    ("data", "values", "limits"),
    [
        (png(GREY12[..., None]), GREY12, (0, 4095)),
        (tiff(GREY12), GREY12, (0, 4095)),
        (tiff(GREY12, byteorder=">"), GREY12, (0, 4095)),
        (tiff(GREY12.astype(np.int16) - 1024), GREY12.astype(int) - 1024, (-1024, 1023)),
        (tiff(GREY12.astype(np.int32) * 1000), GREY12.astype(int) * 1000, (0, 4e6)),
        (tiff((GREY12 / 4095).astype(np.float32)), (GREY12 / 4095).astype(np.float32), (0, 1)),
        (tiff((GREY12 / 4095).astype(np.float32)), (GREY12 / 4095).astype(np.float32), (0.25, 0.75)),
        (tiff(GREY12.astype(np.uint8)), GREY12.astype(np.uint8), (0, 100)),
    ],
)
def test_values_of_every_type_are_mapped_exactly(data, values, limits):
    wanted = mapped(values, *limits)
    assert np.array_equal(decoded(data, *limits, channels=1), wanted)
    assert np.array_equal(decoded(data, *limits), np.repeat(wanted[..., None], 3, 2))


def test_twelve_bits_are_rounded_as_python_rounds():
    wanted = [[round(int(x) * 255 / 4095) for x in row] for row in GREY12]
    assert decoded(png(GREY12[..., None]), 0, 4095, channels=1).tolist() == wanted


@pytest.mark.parametrize("shift", [0, 4, 8])
@pytest.mark.parametrize(
    "encode",
    [
        png,
        lambda v: png(np.concatenate([v, v[..., :1]], 2)),  # alpha is dropped
        lambda v: tiff(v, photometric="rgb"),
        lambda v: tiff(v, photometric="rgb", byteorder=">"),
        lambda v: tiff(v, photometric="rgb", compression="zlib"),
        lambda v: tiff(v, photometric="rgb", compression="zlib", predictor=True, byteorder=">"),
        lambda v: tiff(v.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"),
        lambda v: tiff(v, photometric="rgb", tile=(16, 16)),
        lambda v: tiff(np.concatenate([v, v[..., :1]], 2), photometric="rgb", extrasamples=["unassalpha"]),
        lambda v: tiff(np.concatenate([v, v[..., :1]], 2), photometric="rgb", extrasamples=["assocalpha"]),
    ],
)
def test_all_sixteen_bits_of_colour_are_read(encode, shift):
    values = RGB16 >> shift
    high = 65535 >> shift
    assert np.array_equal(decoded(encode(values), 0, high), mapped(values, 0, high))


def test_sixteen_bit_grey_with_alpha():
    values = np.stack([GREY12, RGB16[..., 0]], 2)
    assert np.array_equal(decoded(png(values), 0, 4095, channels=1), mapped(GREY12, 0, 4095))


def test_what_is_not_a_number_is_black_and_the_rest_is_clipped():
    values = np.array([[np.nan, np.inf, -np.inf, 0.5, 3.0, -2.0]], dtype=np.float32)
    assert decoded(tiff(values), 0, 1, channels=1).tolist() == [[0, 255, 0, 128, 255, 0]]


@pytest.mark.parametrize("name", ["ok_baseline.jpg", "cmyk.jpg", "palette_transparency.png", "exif_orientation_6.jpg"])
def test_the_full_range_of_eight_bits_changes_nothing(shared, name):
    data = (shared / "data/bad_images/files" / name).read_bytes()
    for channels in (1, 3):
        assert np.array_equal(decoded(data, 0, 255, channels=channels), decoded(data, channels=channels))


@pytest.mark.parametrize("name", ["grey16.png", "rgb16.png"])
def test_the_full_range_of_sixteen_bits_changes_nothing(shared, name):
    data = (shared / "data/bad_images/files" / name).read_bytes()
    assert np.array_equal(decoded(data, 0, 65535), decoded(data))


@pytest.mark.parametrize(("bands", "kind"), [(2, np.uint8), (4, np.uint8), (6, np.uint8), (13, np.uint16)])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_other_numbers_of_bands_are_named(bands, kind, planar):
    values = np.zeros((8, 8, bands), kind)
    values = values if planar == "contig" else values.transpose(2, 0, 1)
    data = tiff(values, photometric="minisblack", planarconfig=planar)
    with pytest.raises(ImageError, match=f"TIFF with {bands} bands of {8 * np.dtype(kind).itemsize} bits; 1 or 3"):
        decode_image(data)


def test_planes_of_sixteen_bits_are_not_taken_for_eight():
    planes = tiff(RGB16.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    assert np.array_equal(decoded(planes), RGB16 >> 8)


def test_a_depth_that_is_not_read_is_named():
    with pytest.raises(ImageError, match=r"TIFF with 1 .* of 64 bits"):
        decode_image(tiff(np.zeros((8, 8))))


# ------------------------------------------------------------------------------------------------ the look


def folder(root, files):
    root.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(files):
        (root / f"{i:03d}.img.png").write_bytes(data)
    return Data(path=str(root))


def look(data):
    source = open_source(data)
    check_pixels(source, data)
    return source.notes


def plain(value=7):
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


DARK = {
    "12-bit grey": (tiff(GREY12), "0 4095"),
    "12-bit colour": (png(RGB16 >> 4), "0 4095"),
    "14 bits": (tiff(RGB16[..., 0] >> 2), "0 16383"),
    "15 bits": (tiff(RGB16[..., 0] >> 1), "0 32767"),
    "signed": (tiff(np.int16([[-1024, 1016]] * 8)), "-1024 1016"),
    "signed without a negative": (tiff(np.int16(GREY12)), "0 4095"),
    "32 bits": (tiff(np.int32(GREY12) * 100), "0 524287"),
    "floats": (tiff(np.float32(GREY12 / 4095)), "0 1"),
    "floats beyond 1": (tiff(np.float32([[-2.5, 7.25]] * 8)), "-2.5 7.25"),
}


@pytest.mark.parametrize("case", DARK)
def test_an_unknown_range_is_refused_with_what_to_type(tmp_path, case):
    encoded, flag = DARK[case]
    data = folder(tmp_path, [encoded] * 4)
    with pytest.raises(ValueError, match=rf"--data\.pixel-range {flag}"):
        look(data)
    low, high = flag.split()
    notes = look(replace(data, pixel_range=(float(low), float(high))))
    assert not any("warning" in note for note in notes)


def test_a_run_that_began_before_is_warned(tmp_path):
    data = folder(tmp_path, [tiff(GREY12)] * 4)
    source = open_source(data)
    check_pixels(source, data, refuse=False)
    assert any("warning" in n and "--data.pixel-range 0 4095" in n for n in source.notes)


@pytest.mark.parametrize("encoded", [plain(), tiff(RGB16[..., 0]), png(RGB16)])
def test_what_fills_its_bits_passes_without_a_word(tmp_path, encoded):
    assert look(folder(tmp_path, [encoded] * 4)) == []


def test_a_few_odd_images_are_only_said(tmp_path):
    notes = look(folder(tmp_path, [plain()] * 12 + [tiff(GREY12)] * 4))
    assert any(n.startswith("warning: 4 of 16") for n in notes)


def test_a_range_beside_all_values_is_refused_and_a_narrow_one_warned_of(tmp_path):
    data = folder(tmp_path, [tiff(GREY12 + np.uint16(1))] * 4)
    with pytest.raises(ValueError, match=r"data\.pixel_range=0 1 .* from"):
        look(replace(data, pixel_range=(0, 1)))
    assert any("warning: 17 of 256" in n for n in look(replace(data, pixel_range=(0, 65535))))
    mixed = folder(tmp_path / "mixed", [plain()] * 2 + [tiff(GREY12)] * 2)
    assert any("2 of 4 images looked at hold 8 bits" in n for n in look(replace(mixed, pixel_range=(0, 4095))))


@pytest.mark.parametrize("limits", [(1.0, 1.0), (2.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_a_range_that_is_none_is_refused(tmp_path, limits):
    with pytest.raises(ValueError, match=r"data\.pixel_range"):
        open_source(replace(folder(tmp_path, [plain()]), pixel_range=limits))


def test_several_pages_are_counted(tmp_path):
    pages = tiff(np.stack([np.full((8, 8), 9, np.uint8)] * 3), photometric="minisblack")
    out = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (1, 200)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    notes = look(folder(tmp_path, [plain()] * 6 + [pages, out.getvalue()]))
    assert any(n.startswith("2 of 8 images") and "up to 3" in n and "page 1" in n for n in notes)


def test_when_none_can_be_read_the_run_does_not_start(tmp_path):
    data = folder(tmp_path, [b"<html>"] * 20)
    with pytest.raises(ValueError, match=r"none of the 16 .*000\.img\.png.*not a known image format"):
        look(data)
    look(replace(data, max_bad_fraction=1.0))
    look(folder(tmp_path / "one", [b"<html>", plain()]))


# ------------------------------------------------------------------------------------------------ everywhere


@pytest.fixture
def xrays(tmp_path):
    """12-bit grey, of which image i has the value 100 * i everywhere."""
    flat = [np.full((8, 8), 100 * i, np.uint16) for i in range(8)]
    return replace(folder(tmp_path / "xrays", [tiff(v) for v in flat]), pixel_range=(0.0, 4095.0))


WANTED = [round(100 * i * 255 / 4095) for i in range(8)]


@pytest.mark.parametrize("workers", [(0, "thread"), (2, "thread"), (2, "process")])
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_training_sees_mapped_values(xrays, workers, decoder):
    source = open_source(xrays)
    order = Order(source.sizes, 0, 1, 8)
    count, kind = workers
    with Loader(
        source, order, augment=Augment(crop="resize", flip=False), image_size=(8, 8), channels=3,
        global_batch=8, stop=1, num_workers=count, worker_kind=kind, decoder=decoder,
    ) as loader:  # fmt: skip
        (batch,) = loader
    assert sorted(batch.pixel_values[:, 0, 0, 0].tolist()) == WANTED
    assert not batch.bad


def test_evaluation_and_examples_see_mapped_values(xrays):
    source = open_source(xrays)
    whole = WholeSplit(source, image_size=(8, 8), channels=1, batch=8)
    assert torch.cat([b["pixel_values"] for b in whole])[:, 0, 0, 0].tolist() == WANTED
    assert whole.picture(3)[0, 0, 0] == WANTED[3]
    shown, _ = load_examples(source, 8, seed=0, image_size=(8, 8), channels=3)
    assert sorted(shown[:, 0, 0, 0].tolist()) == WANTED
    part = open_source(replace(xrays, splits="random:75/25"), "validation")
    assert part.pixel_range == (0.0, 4095.0)


def test_a_recipe_keeps_the_range_and_an_old_one_has_none(xrays):
    recipe = replace(QUICKSTART, data=xrays)
    written = json.loads(json.dumps(to_dict(recipe)))
    assert from_dict(written, type(recipe)) == recipe
    del written["data"]["pixel_range"]
    assert from_dict(written, type(recipe)).data.pixel_range is None
    assert open_source(xrays).fingerprint == open_source(replace(xrays, pixel_range=None)).fingerprint


def test_a_model_folder_says_its_range_and_evaluation_takes_it(tmp_path):
    config = MAEConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_channels=1,
        id2label={0: "a", 1: "b"},
    )  # fmt: skip
    made = MAEForImageClassification(config)
    task = Classification(made, (0.5,), (0.5,))
    weights = {k: v.contiguous() for k, v in made.state_dict().items()}
    assert "pixel_range" not in task.processor()
    task.write_model(tmp_path / "without", weights)
    task.pixel_range = (0.0, 4095.0)
    task.write_model(tmp_path / "with", weights)
    for name, limits in (("without", None), ("with", (0.0, 4095.0))):
        assert load_classifier(str(tmp_path / name), None, Printer(False)).task.pixel_range == limits


def test_an_export_says_it_too(tmp_path):
    made = MAEForImageClassification(
        MAEConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_channels=1)
    )
    task, said = Classification(made, (0.5,), (0.5,)), []
    written = task.processor() | {"pixel_range": [0.0, 4095.0]}
    found, _ = read_processor(made, written, None, said.append)
    assert found["pixel_range"] == [0.0, 4095.0]
    assert any("--data.pixel-range 0 4095" in line for line in said)
    assert "pixel_range" not in read_processor(made, task.processor(), None, said.append)[0]
    as_timm(made, tmp_path / "timm", found)
    assert read_source(tmp_path / "timm").spec.pixel_range == (0.0, 4095.0)


def test_a_run_does_not_go_on_with_another_range(xrays):
    recipe = replace(QUICKSTART, data=xrays)
    other = replace(recipe, data=replace(xrays, pixel_range=(0.0, 1023.0)))
    assert changed_fields(recipe, other) == {"data.pixel_range": ((0.0, 4095.0), (0.0, 1023.0))}
    assert changed_fields(recipe, recipe) == {}


def test_so_does_a_folder_of_timm(tmp_path):
    spec = TimmSpec(
        architecture="test_vit", names=("a", "b"), image_size=(32, 32), test_image_size=(32, 32), crop_pct=None,
        channels=3, drop_path_rate=0.0, mean=(0.5,) * 3, std=(0.5,) * 3, model_args={"img_size": 32},
    )  # fmt: skip
    model = create(spec)
    task = TimmClassification(model, spec)
    task.pixel_range = (-1024.0, 1023.0)
    task.write_model(tmp_path / "model", {k: v.contiguous() for k, v in model.state_dict().items()})
    assert read_source(tmp_path / "model").spec.pixel_range == (-1024.0, 1023.0)
    assert load_classifier(str(tmp_path / "model"), None, Printer(False)).task.pixel_range == (-1024.0, 1023.0)
