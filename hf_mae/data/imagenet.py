"""ImageNet's thousand classes and the test sets made for them: which folder, name or file means which class.

The lists come with timm: the WordNet ids in the order of the classes, the words for them, the classes that ImageNet-A
and ImageNet-R have, and the labels of ImageNet ReaL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

NUM_CLASSES = 1000

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""Top-1 error of AlexNet on each corruption of ImageNet-C, the mean over its five severities (Hendrycks and Dietterich
2019, with the digits of their repository)."""

SEVERITIES = ("1", "2", "3", "4", "5")

# The data set on the Hub, ILSVRC/imagenet-1k, has to tell the machine from the bird: ClassLabel repeats no name.
_HUB_NAMES = {"crane2": 517}
_REAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
REAL_IMAGES = 50_000


# ------------------------------------------------------------------------------------------------ classes


def class_of(name: str) -> int:
    """Find the class that a folder or a label name means.

    Args:
        name: a WordNet id (`n01440764`), a number from 0 to 999 (the folders of ImageNet-V2, which sort as text), or
            WordNet's words, all of them ("tench, Tinca tinca") or one ("tench") where that is unique.

    Raises:
        ValueError: no class is called that, or more than one.
    """
    found = sorted(_meanings(name))
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{i} ({_synsets()[i]}, {_words()[i]})" for i in found)
        raise ValueError(f"class name {name!r} may mean {choices}; use the WordNet id")
    raise ValueError(
        f"class name {name!r} is none of ImageNet's; use WordNet ids such as n01440764, numbers from 0 to 999, or "
        "WordNet's words such as tench"
    )


def classes_of(names: Sequence[str]) -> list[int]:
    """Find ImageNet's class for each class of a data set.

    A thousand names in ImageNet's own order settle what one name leaves open (crane, the bird or the machine). Numbers
    are ImageNet's only if all thousand are there: else they may as well be a count of the classes of a part.

    Args:
        names: of the classes, in the order of their numbers.

    Returns:
        ImageNet's number of each.

    Raises:
        ValueError: a name is unknown or open, two names mean one class, or numbers stand for a part of the classes.
    """
    if all(name.isdecimal() for name in names) and len(names) < NUM_CLASSES:
        raise ValueError(
            f"the {len(names)} classes are called {', '.join(names[:3])} ..., which may be ImageNet's numbers or a "
            "count of their own; name them by WordNet id"
        )
    meanings = [_meanings(name) for name in names]
    if len(names) == NUM_CLASSES and all(i in found for i, found in enumerate(meanings)):
        return list(range(NUM_CLASSES))
    classes = [class_of(name) for name in names]
    if len(set(classes)) < len(classes):
        first = next(i for i, number in enumerate(classes) if number in classes[:i])
        before = names[classes.index(classes[first])]
        raise ValueError(
            f"the class names {before!r} and {names[first]!r} both mean class {classes[first]} of ImageNet; use the "
            "WordNet ids"
        )
    return classes


def _meanings(name: str) -> frozenset[int]:
    """Return all classes that a name may mean."""
    text = name.strip()
    if text.isdecimal():
        return frozenset([int(text)]) & frozenset(range(NUM_CLASSES))
    words = text.lower().replace("_", " ")
    whole, single = _by_words()
    return whole.get(words) or single.get(words) or frozenset()


@cache
def _by_words() -> tuple[dict[str, frozenset[int]], dict[str, frozenset[int]]]:
    """Map WordNet ids and whole entries, and single words of entries, to the classes they may mean."""
    whole: dict[str, frozenset[int]] = {}
    single: dict[str, frozenset[int]] = {}
    for i, (synset, words) in enumerate(zip(_synsets(), _words(), strict=True)):
        for key in (synset, words.lower()):
            whole[key] = whole.get(key, frozenset()) | {i}
        for word in map(str.strip, words.lower().split(",")):
            single[word] = single.get(word, frozenset()) | {i}
    for name, i in _HUB_NAMES.items():
        whole[name] = frozenset([i])
    return whole, single


@cache
def _synsets() -> tuple[str, ...]:
    return tuple(_read("imagenet_synsets.txt").split())


@cache
def _words() -> tuple[str, ...]:
    words: dict[str, str] = {}
    for line in _read("imagenet_synset_to_lemma.txt").splitlines():
        synset, _, text = line.partition("\t")
        words[synset] = text
    return tuple(words[synset] for synset in _synsets())


def _read(name: str) -> str:
    return (files("timm") / "data" / "_info" / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ test sets


def a_classes() -> list[int]:
    """List the 200 classes of ImageNet-A (Hendrycks et al. 2021b), to which predictions are restricted."""
    return [int(i) for i in _read("imagenet_a_indices.txt").split()]


def r_classes() -> list[int]:
    """List the 200 classes of ImageNet-R (Hendrycks et al. 2021a), to which predictions are restricted."""
    return [int(i) for i in _read("imagenet_r_indices.txt").split()]


def real_labels() -> dict[str, list[int]]:
    """Return the sets of labels of ImageNet ReaL (Beyer et al. 2020) by file name without extension; some are empty.

    The names are those of the validation archive, `ILSVRC2012_val_00000001` and so on; see `real_key` for others.
    """
    labels: list[list[int]] = json.loads(_read("imagenet_real_labels.json"))
    return {f"ILSVRC2012_val_{i:08d}": found for i, found in enumerate(labels, 1)}


def real_key(file_name: str) -> str:
    """Find the key of `real_labels` in a file name.

    Folders before it, an extension, and the WordNet id that the files on the Hub carry behind the number
    (`ILSVRC2012_val_00000293_n01440764.JPEG`) are passed over.

    Raises:
        ValueError: it is not the name of a validation image.
    """
    match = _REAL_NAME.search(file_name)
    if match is None or not 1 <= int(match[1]) <= REAL_IMAGES:
        raise ValueError(
            f"file name {file_name!r} is not of the form ILSVRC2012_val_00000001.JPEG, by which ReaL labels are found; "
            "use the validation images under their own names"
        )
    return match[0]


def severities(root: Path) -> dict[str, list[Path]]:
    """Find the folders of ImageNet-C below a root: those of severity 1 to 5 of each of the fifteen corruptions.

    Args:
        root: holds CORRUPTION/SEVERITY/, or GROUP/CORRUPTION/SEVERITY/ with the groups of the archives (noise, blur,
            weather, digital). The extra corruptions are passed over.

    Raises:
        ValueError: there is no such folder, or corruptions or severities are missing; lists them.
    """
    if not root.is_dir():
        raise ValueError(f"data.path={str(root)!r} is not a folder; ImageNet-C is one of CORRUPTION/SEVERITY/ folders")
    found: dict[str, list[Path]] = {}
    missing: list[str] = []
    for corruption in ALEXNET_ERRORS:
        places = [root / corruption, *sorted(root.glob(f"*/{corruption}"))]
        place = next((place for place in places if place.is_dir()), root / corruption)
        found[corruption] = [place / severity for severity in SEVERITIES]
        missing += [str(folder.relative_to(root)) for folder in found[corruption] if not folder.is_dir()]
    if missing:
        raise ValueError(
            f"data.path={str(root)!r} lacks {len(missing)} of the {len(ALEXNET_ERRORS) * len(SEVERITIES)} folders of "
            f"ImageNet-C: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}; unpack all archives there"
        )
    return found


def mce(errors: Mapping[str, float]) -> float:
    """Return the mean corruption error: the mean over corruptions of the error as a multiple of AlexNet's.

    Args:
        errors: top-1 error of each of the fifteen corruptions as a fraction, the mean over the severities.

    Returns:
        1 is as bad as AlexNet; papers print it times 100.

    Raises:
        ValueError: a corruption is missing or unknown, or an error is no fraction.
    """
    if differing := sorted(set(errors) ^ set(ALEXNET_ERRORS)):
        raise ValueError(
            f"the mean corruption error is that of {', '.join(ALEXNET_ERRORS)}; missing or unknown: "
            f"{', '.join(differing)}"
        )
    for name, error in errors.items():
        if not 0 <= error <= 1:
            raise ValueError(f"errors[{name!r}]={error} must lie in [0, 1]; divide per cent by 100")
    return sum(errors[name] / alexnet for name, alexnet in ALEXNET_ERRORS.items()) / len(ALEXNET_ERRORS)
