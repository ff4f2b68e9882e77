"""Removing the background of photographs as a step before training: GrabCut over a folder of images.

GrabCut (Rother et al. 2004, OpenCV's) is started from a rectangle a little inside the picture and knows nothing of the
subject, so it fails on some pictures; where it keeps too little or too much, the picture stays as it is. Rectangle,
iterations and limits are ours: the source of the idea (the slides of the bird classifier) does not give them.

The result is a second folder with the same names, so that rules that divide it into splits give the same rows.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from hf_mae.data.images import EXTENSIONS, ImageError, Pixels, decode_image
from hf_mae.data.rand_augment import fill_colour
from hf_mae.recipes.base import IMAGENET_MEAN
from hf_mae.recipes.fields import choose

RECORD = "background.json"
"""What was done with each picture, in the new folder."""

SAVE_SECONDS = 10.0
"""How often the record is written while it goes: what a kill may cost."""

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
_FORMATS |= {".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM"}


@dataclass(frozen=True, kw_only=True)
class GrabCut:
    """The numbers of the step."""

    inset: float = 0.05
    """Share of each side outside the rectangle, at each end: surely background."""
    iterations: int = 5
    """Of GrabCut."""
    min_foreground: float = 0.1
    """A picture of which less than this share is kept stays as it is."""
    max_foreground: float = 0.9
    """So does one of which more is kept."""
    fill: Literal["mean", "black"] = "mean"
    """What the background becomes: ImageNet's mean colour (0 after normalising), or black."""

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ValueError: the first that is out of its range.
        """
        if not 0 < self.inset < 0.5:
            raise ValueError(f"inset={self.inset} must lie between 0 and 0.5; 0.05 leaves 5 % at each side")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1; 5 is usual")
        if not 0 <= self.min_foreground < self.max_foreground <= 1:
            raise ValueError(
                f"min_foreground={self.min_foreground} and max_foreground={self.max_foreground} must be shares, the "
                "first below the second; 0.1 and 0.9 are the defaults"
            )
        if self.fill not in ("mean", "black"):
            raise ValueError(f"fill={self.fill!r} is unknown; use mean or black")


def remove_backgrounds(
    source_dir: Path | str,
    out_dir: Path | str,
    *,
    inset: float = 0.05,
    iterations: int = 5,
    min_foreground: float = 0.1,
    max_foreground: float = 0.9,
    fill: Literal["mean", "black"] = "mean",
    num_workers: int = 2,
    progress: bool = True,
) -> dict[str, Any]:
    """Copy a folder tree of images with their backgrounds removed.

    Every picture keeps its name. One whose foreground is outside the limits, or that GrabCut cannot work on, is copied
    byte for byte, and so is one that cannot be decoded; both are listed. A picture is a function of its bytes, its name
    and the settings: not of threads or restarts. Other files are left out. Run again, it goes on with what is missing.

    Args:
        source_dir: folder of images, with or without class folders.
        out_dir: new folder, or one that this step has begun.
        inset: see `GrabCut`.
        iterations: see `GrabCut`.
        min_foreground: see `GrabCut`.
        max_foreground: see `GrabCut`.
        fill: see `GrabCut`.
        num_workers: threads.
        progress: show a progress bar.

    Returns:
        What `background.json` in the new folder holds: `settings`, `counts` (removed, kept, undecodable), `kept` and
        `undecodable` ({name: reason}), and `foreground` ({name: share}) of the pictures that GrabCut went through.

    Raises:
        ValueError: a setting or folder makes no sense, or OpenCV is missing; says what to do.
    """
    settings = GrabCut(
        inset=inset, iterations=iterations, min_foreground=min_foreground, max_foreground=max_foreground, fill=fill
    )
    settings.check()
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers} must be at least 1")
    cv2 = _opencv()
    source, out = Path(source_dir).expanduser().resolve(), Path(out_dir).expanduser().resolve()
    names = _list_images(source, out)
    stated = {**asdict(settings), "opencv": cv2.__version__}
    record = _read_record(out, stated)
    done = {name for group in ("kept", "undecodable", "foreground") for name in record[group]}
    todo = [name for name in names if name not in done or not (out / name).is_file()]
    out.mkdir(parents=True, exist_ok=True)

    saved = time.monotonic()
    bar = tqdm(total=len(names), initial=len(names) - len(todo), desc="background", disable=not progress)
    try:
        with bar:
            for outcome in _in_threads(source, out, todo, settings, num_workers):
                _enter(record, outcome)
                bar.update()
                if time.monotonic() - saved > SAVE_SECONDS:
                    _write_record(out, record)
                    saved = time.monotonic()
    finally:
        _write_record(out, record)
    return record


@dataclass(frozen=True)
class _Outcome:
    name: str
    foreground: float | None = None
    kept: str | None = None
    undecodable: str | None = None


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            'removing backgrounds needs OpenCV, which is not installed; pip install "hf_mae[birds]"'
        ) from error
    return cv2


def _list_images(source: Path, out: Path) -> list[str]:
    if not source.is_dir():
        raise ValueError(f"source_dir={str(source)!r} is not a folder of images")
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise ValueError(f"out_dir={str(out)!r} must lie beside source_dir={str(source)!r}, not in or around it")
    names, linked = [], set[Path]()

    def is_read(folder: Path) -> bool:
        """Say whether the reader of folders takes it: links are followed, but not to what is read anyway."""
        target = folder.resolve()
        if folder.is_symlink():
            if target in linked or target.is_relative_to(source) or source.is_relative_to(target):
                return False
            linked.add(target)
        return not folder.name.startswith(".")

    for folder, inner, files in os.walk(source, followlinks=True):
        here = Path(folder)
        inner[:] = sorted(name for name in inner if is_read(here / name))
        wanted = [name for name in files if Path(name).suffix.lower() in EXTENSIONS and not name.startswith(".")]
        names += [(here / name).relative_to(source).as_posix() for name in wanted if (here / name).is_file()]
    names.sort()
    if not names:
        raise ValueError(f"source_dir={str(source)!r} holds no images; they end in {', '.join(sorted(EXTENSIONS))}")
    return names


# ------------------------------------------------------------------------------------------------ one picture


def _in_threads(source: Path, out: Path, names: list[str], settings: GrabCut, num_workers: int) -> Iterator[_Outcome]:
    """Yield outcomes as they come, with few pictures ahead; stops cleanly when the consumer does."""
    waiting, left = set[Future[_Outcome]](), iter(names)
    with ThreadPoolExecutor(num_workers, thread_name_prefix="grabcut") as pool:
        try:
            while True:
                for name in islice(left, 2 * num_workers - len(waiting)):
                    waiting.add(pool.submit(_process, source, out, name, settings))
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _process(source: Path, out: Path, name: str, settings: GrabCut) -> _Outcome:
    data = (source / name).read_bytes()
    try:
        pixels = np.asarray(decode_image(data))
    except ImageError as error:
        _write(out / name, data)
        return _Outcome(name, undecodable=str(error))
    mask, problem = foreground_mask(pixels, settings, seed=zlib.crc32(name.encode()))
    if mask is None:
        _write(out / name, data)
        return _Outcome(name, kept=problem)
    share = float(mask.mean())
    if not settings.min_foreground <= share <= settings.max_foreground:
        _write(out / name, data)
        limits = f"{settings.min_foreground:g} to {settings.max_foreground:g}"
        return _Outcome(name, share, kept=f"foreground {share:.3f} is outside {limits}")
    colour = fill_colour(choose("fill", settings.fill, {"mean": IMAGENET_MEAN, "black": (0.0, 0.0, 0.0)}))
    cut = np.where(mask[..., None], pixels, np.array(colour, np.uint8))
    _write(out / name, _encode(cut, Path(name).suffix.lower()))
    return _Outcome(name, share)


def foreground_mask(pixels: Pixels, settings: GrabCut, *, seed: int) -> tuple[npt.NDArray[np.bool_] | None, str | None]:
    """Find the foreground of a picture.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        settings: rectangle and iterations.
        seed: of OpenCV's generator, which is one for each thread.

    Returns:
        bool [H, W], True is foreground, and None; or None and the reason why there is no mask.
    """
    cv2 = _opencv()
    height, width = pixels.shape[:2]
    top, left = max(1, round(settings.inset * height)), max(1, round(settings.inset * width))
    if height <= 2 * top or width <= 2 * left:
        return None, f"{width}x{height} pixels are too few for a rectangle inside"
    rect = (left, top, width - 2 * left, height - 2 * top)
    mask = np.zeros((height, width), np.uint8)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))  # the two colour models
    cv2.setRNGSeed(seed % 2**31)
    try:
        # In OpenCV's order of channels.
        bgr = np.ascontiguousarray(pixels[..., ::-1])
        cv2.grabCut(bgr, mask, rect, background, foreground, settings.iterations, cv2.GC_INIT_WITH_RECT)
    except cv2.error as error:
        return None, " ".join(f"GrabCut: {error}".split())[:200]
    return (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD), None


def _encode(pixels: Pixels, ending: str) -> bytes:
    """Write a picture in the format of its name; a name of a format that cannot hold it holds a PNG.

    Readers go by the content, ours and others'. JPEG is lossy again, with full colour resolution at quality 95: the
    edge of a cut is sharp.
    """
    from io import BytesIO

    out, kind = BytesIO(), _FORMATS.get(ending, "PNG")
    options: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


# ------------------------------------------------------------------------------------------------ files


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _read_record(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return what was done before, or an empty record.

    Raises:
        ValueError: the folder holds other files, or was made with other settings.
    """
    new: dict[str, Any] = {"settings": settings, "counts": {}, "kept": {}, "undecodable": {}, "foreground": {}}
    if not out.exists() or not any(out.iterdir()):
        return new
    path = out / RECORD
    if not path.is_file():
        raise ValueError(f"out_dir={str(out)!r} is not empty and holds no {RECORD}; name a new folder, or empty it")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder and start again") from error
    if record["settings"] != settings:
        differ = ", ".join(
            f"{name} was {record['settings'].get(name)!r} and is {value!r} now"
            for name, value in settings.items()
            if record["settings"].get(name) != value
        )
        raise ValueError(f"out_dir={str(out)!r} was begun with other settings ({differ}); name a new folder")
    return new | record


def _enter(record: dict[str, Any], outcome: _Outcome) -> None:
    for group in ("kept", "undecodable", "foreground"):
        record[group].pop(outcome.name, None)
        if (value := getattr(outcome, group)) is not None:
            record[group][outcome.name] = round(value, 4) if group == "foreground" else value


def _write_record(out: Path, record: dict[str, Any]) -> None:
    counts = Counter({"removed": 0, "kept": len(record["kept"]), "undecodable": len(record["undecodable"])})
    counts["removed"] = sum(name not in record["kept"] for name in record["foreground"])
    record["counts"] = dict(counts)
    for group in ("kept", "undecodable", "foreground"):
        record[group] = dict(sorted(record[group].items()))
    _write(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
