"""GrabCut over a folder: what it keeps, what it leaves alone, and how it goes on."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from hf_mae.data import background
from hf_mae.data.background import GrabCut, foreground_mask, remove_backgrounds
from hf_mae.data.sources import open_source
from hf_mae.data.splits import Rule, split_source
from hf_mae.recipes.base import Data

pytest.importorskip("cv2", reason="OpenCV is an extra: hf_mae[birds]")


def scene(side: int = 48, seed: int = 0, colour=(200, 60, 40)) -> np.ndarray:
    """A disc of one colour on a ground of another, with a little noise."""
    y, x = np.mgrid[:side, :side]
    disc = (y - side / 2) ** 2 + (x - side / 2) ** 2 < (side / 4) ** 2
    pixels = np.where(disc[..., None], colour, (40, 90, 160))
    return (pixels + np.random.default_rng(seed).integers(-9, 10, pixels.shape)).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four discs, a picture of noise alone, one of three pixels, and one that is no picture."""
    files = {f"a/{i}.png": encoded(scene(seed=i)) for i in range(3)}
    files["b/3.jpg"] = encoded(scene(seed=3), "JPEG")
    files["b/flat.png"] = encoded(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    files["b/tiny.png"] = encoded(np.zeros((2, 2, 3), np.uint8))
    files["b/bad.jpg"] = b"no picture"
    for name, data in files.items():
        path = tmp_path / "birds" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "birds/notes.txt").write_text("left out")
    return tmp_path / "birds"


def contents(root) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def run(folder, out="out", **options):
    return remove_backgrounds(folder, folder.parent / out, progress=False, **options)


def test_a_disc_is_cut_out_of_its_ground():
    pixels = scene()
    mask, problem = foreground_mask(pixels, GrabCut(), seed=1)
    y, x = np.mgrid[:48, :48]
    disc = (y - 24) ** 2 + (x - 24) ** 2 < 12**2
    assert problem is None
    assert (mask == disc).mean() > 0.99


@pytest.mark.parametrize(("fill", "colour"), [("mean", (124, 116, 104)), ("black", (0, 0, 0))])
def test_the_ground_becomes_one_colour_and_the_foreground_stays(folder, fill, colour):
    record = run(folder, fill=fill)
    before, after = (np.asarray(Image.open(root / "a/0.png")) for root in (folder, folder.parent / "out"))
    changed = (before != after).any(axis=2)
    assert np.unique(after[changed], axis=0).tolist() == [list(colour)]
    assert 1 - changed.mean() == pytest.approx(record["foreground"]["a/0.png"], abs=1e-3)
    assert np.array_equal(after[24, 24], before[24, 24])


def test_what_fails_is_the_original_and_is_listed(folder):
    record = run(folder)
    out = contents(folder.parent / "out")
    assert json.loads(out.pop("background.json")) == record
    original = contents(folder)
    assert sorted(out) == sorted(name for name in original if name != "notes.txt")
    assert list(record["undecodable"]) == ["b/bad.jpg"]
    assert "not a known image format" in record["undecodable"]["b/bad.jpg"]
    assert "b/tiny.png" in record["kept"]
    assert record["kept"]["b/tiny.png"] == "2x2 pixels are too few for a rectangle inside"
    for name in (*record["kept"], *record["undecodable"]):
        assert out[name] == original[name]
    removed = [name for name in out if name not in {**record["kept"], **record["undecodable"]}]
    assert {"a/0.png", "a/1.png", "a/2.png", "b/3.jpg"} <= set(removed)
    assert all(out[name] != original[name] for name in removed)
    counts = record["counts"]
    assert (counts["removed"], counts["kept"], counts["undecodable"]) == (len(removed), len(record["kept"]), 1)
    assert sum(counts.values()) == 7


def test_links_are_followed_as_the_reader_of_folders_does(folder):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "9.png").write_bytes(encoded(scene(seed=9)))
    for name, target in (("c", elsewhere), ("d", folder / "a"), ("a/up", folder)):
        (folder / name).symlink_to(target, target_is_directory=True)
    (folder / ".hidden.png").write_bytes(encoded(scene()))
    names = background._list_images(folder, folder.parent / "out")
    source = open_source(Data(path=str(folder)))
    assert names == [source.names(c)[0] for c in range(len(source.sizes))]
    assert "c/9.png" in names
    assert len(names) == 8


def test_limits_send_a_picture_back(folder):
    record = run(folder, min_foreground=0.3)
    share = record["foreground"]["a/0.png"]
    assert record["kept"]["a/0.png"] == f"foreground {share:.3f} is outside 0.3 to 0.9"
    assert (folder.parent / "out/a/0.png").read_bytes() == (folder / "a/0.png").read_bytes()


def test_threads_and_restarts_change_no_byte(folder, monkeypatch):
    run(folder, "whole", num_workers=1)
    run(folder, "threads", num_workers=3)
    made, process = [], background._process

    def dies(source, out, name, settings):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(name)
        return process(source, out, name, settings)

    monkeypatch.setattr(background, "_process", dies)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "killed", num_workers=1)
    again = []
    monkeypatch.setattr(background, "_process", lambda s, o, name, g: again.append(name) or process(s, o, name, g))
    (folder.parent / "killed" / made[0]).unlink()
    run(folder, "killed", num_workers=1)
    assert 1 <= len(again) < 7
    assert made[0] in again
    whole = contents(folder.parent / "whole")
    assert contents(folder.parent / "threads") == whole
    assert contents(folder.parent / "killed") == whole
    again.clear()
    run(folder, "killed")
    assert again == []


def test_the_new_folder_divides_as_the_old_one(folder):
    run(folder)
    for name in ("birds", "out"):
        (folder.parent / name / "b/bad.jpg").unlink()
    old, new = (open_source(Data(path=str(folder.parent / name))) for name in ("birds", "out"))
    assert [old.names(c) for c in range(6)] == [new.names(c) for c in range(6)]
    before, after = (split_source(source, Rule("stratified", (50, 50), 1)) for source in (old, new))
    assert all(np.array_equal(before.parts[name], after.parts[name]) for name in before.parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inset": 0.5}, r"inset=0\.5 must lie between 0 and 0\.5"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"min_foreground": 0.9, "max_foreground": 0.1}, "the first below the second"),
        ({"fill": "white"}, "fill='white' is unknown; use mean or black"),
        ({"num_workers": 0}, "num_workers=0 must be at least 1"),
        ({"out": "birds/out"}, "must lie beside source_dir"),
        ({"out": "birds"}, "must lie beside source_dir"),
        ({"out": "."}, "must lie beside source_dir"),
    ],
)
def test_settings_and_folders_that_make_no_sense_are_refused(folder, options, message):
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        run(folder, **options)
    assert contents(folder) == before


def test_a_folder_of_other_files_or_settings_is_left_alone(folder):
    other = folder.parent / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and holds no background\.json"):
        run(folder, "other")
    run(folder)
    with pytest.raises(ValueError, match=r"begun with other settings \(iterations was 5 and is 3 now\); name a new"):
        run(folder, iterations=3)
    with pytest.raises(ValueError, match="holds no images"):
        remove_backgrounds(other, folder.parent / "new")
    with pytest.raises(ValueError, match="is not a folder of images"):
        remove_backgrounds(folder / "a/0.png", folder.parent / "new")


def test_without_opencv_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match=r'pip install "hf_mae\[birds\]"'):
        run(folder)
