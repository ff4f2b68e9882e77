"""What a model of timm is, and reading that from the folders, Hub repositories and names timm knows.

A folder in timm's format holds `config.json` and `model.safetensors`. Weights are read from safetensors only: a pickle
can carry code.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_mae.models.convert import check_finite
from hf_mae.patience import patient
from hf_mae.recipes.crop import EvalCrop
from hf_mae.resolve import read_config, read_json


@dataclass(frozen=True)
class TimmSpec:
    """What a model of timm is, and the pictures it takes.

    Attributes:
        architecture: name in timm, without weights.
        names: the classes, in order.
        image_size: height and width in pixels of training pictures.
        test_image_size: of test pictures.
        crop_pct: share of a resized test picture that the centre crop keeps; None is the default of `EvalCrop`.
        channels: colour channels.
        drop_path_rate: stochastic depth of the last block. A matter of training: no folder keeps it.
        mean: per-channel mean of the input scaled to [0, 1].
        std: per-channel standard deviation of the same.
        loss: what the scores were trained for: with `bce` each class is read by its sigmoid.
        pixel_range: stored values that become black and white, see `hf_mae.recipes.base.Data`.
        model_args: what `timm.create_model` needs besides classes, channels and the image size of ViTs.
        crop_mode: how test pictures are resized; None is the default of `EvalCrop`.
    """

    architecture: str
    names: tuple[str, ...]
    image_size: tuple[int, int]
    test_image_size: tuple[int, int]
    crop_pct: float | None
    channels: int
    drop_path_rate: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    loss: Literal["ce", "bce"] = "ce"
    pixel_range: tuple[float, float] | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    crop_mode: str | None = None

    @property
    def crop(self) -> EvalCrop:
        """How test pictures are prepared.

        Raises:
            ValueError: `crop_mode` is `border`, which pads.
        """
        return EvalCrop(self.test_image_size, self.crop_pct, cast("Any", self.crop_mode))

    @property
    def test_crop_pct(self) -> float:
        """`crop_pct`, or its default."""
        return self.crop.pct


def is_timm_folder(folder: Path) -> bool:
    """Return whether a folder is in timm's format: its `config.json` names an architecture and preprocessing."""
    return (folder / "config.json").is_file() and {"architecture", "pretrained_cfg"} <= read_config(folder).keys()


@dataclass(frozen=True)
class TimmSource:
    """A model in timm's format, read: where from, what it is, and its weights by name."""

    name: str
    spec: TimmSpec
    weights: dict[str, Tensor]


def read_source(name: str | Path) -> TimmSource:
    """Read a folder, a Hub repository (`ORG/NAME`, `hf-hub:ORG/NAME`, `ORG/NAME@REVISION`) or a name of timm's weights.

    Raises:
        ValueError: there is no such model, it is not in timm's format, or its weights are not safetensors.
    """
    config_path, weights_path = _files(str(name))
    config = read_json(config_path)
    if not {"architecture", "pretrained_cfg"} <= config.keys():
        raise ValueError(f"{name} is not a model in timm's format: its config.json names no architecture of timm")
    try:
        weights = load_file(weights_path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights_path} cannot be read ({error}); copy or download it again") from error
    check_finite(weights.items(), name)
    try:
        return TimmSource(str(name), _spec(config, str(name)), weights)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"the config.json of {name} lacks or misspells a field of timm ({type(error).__name__}: {error}); copy or "
            "download it again"
        ) from error


def _files(name: str) -> tuple[Path, Path]:
    folder = Path(name).expanduser()
    if folder.is_dir():
        config, weights = folder / "config.json", folder / "model.safetensors"
        if not config.is_file():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
        if not weights.is_file():
            raise ValueError(f"{name} has no model.safetensors; pickled weights are not read, as they can carry code")
        return config, weights
    hub_id = _hub_id(name)
    repo, _, revision = hub_id.partition("@")
    paths: list[Path] = []
    for file in ("config.json", "model.safetensors"):
        try:
            what = f"loading {file} of {repo} from the Hub"
            path = patient(what, partial(hf_hub_download, repo, file, revision=revision or None))
            paths.append(Path(path))
        except (HfHubHTTPError, OSError) as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise ValueError(
                f"{name} cannot be opened: {file} of {repo} on the Hub: {why}; check the spelling and the network. "
                "Pickled weights are not read, as they can carry code"
            ) from error
    return paths[0], paths[1]


def _hub_id(name: str) -> str:
    hub_id = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if hub_id.count("/") == 1 and not name.startswith((".", "/", "~")):
        return hub_id
    base = name.partition(".")[0]
    if "/" in name or not timm_library().is_model(base):
        near = difflib.get_close_matches(name, timm_library().list_pretrained(), n=5)
        raise ValueError(
            f"{name} is no folder, no Hub id (ORG/NAME) and no name of timm's weights"
            f"{'; nearest: ' + ', '.join(near) if near else ''}"
        )
    available = timm_library().list_pretrained(f"{base}.*")
    config = timm_library().models.get_pretrained_cfg(name) if name in available else None
    if config is None or not config.hf_hub_id:
        raise ValueError(
            f"{name} names no weights of timm on the Hub; of {base} there are {', '.join(available) or 'none'}"
        )
    # timm keeps them as timm/NAME.TAG, written as the organisation alone.
    return f"{config.hf_hub_id}{name}" if config.hf_hub_id.endswith("/") else config.hf_hub_id


def _spec(config: Mapping[str, Any], name: str) -> TimmSpec:
    cfg, model_args = config["pretrained_cfg"], dict(config.get("model_args") or {})
    num_classes = config.get("num_classes", cfg.get("num_classes", model_args.get("num_classes")))
    for key in ("num_classes", "in_chans", "drop_rate", "drop_path_rate"):  # ours to say, or matters of training
        model_args.pop(key, None)
    if not num_classes:
        raise ValueError(f"{name} has no classes (num_classes={num_classes}): it is a network without a head")
    size = tuple(config.get("train_input_size") or cfg["input_size"])  # ours, see `write_timm_folder`
    test = tuple(cfg.get("test_input_size") or cfg["input_size"])
    crop_mode = cfg.get("crop_mode") or "center"  # timm's default
    if crop_mode == EvalCrop((test[1], test[2])).mode:
        crop_mode = None
    return TimmSpec(
        architecture=config["architecture"],
        names=_names(config.get("label_names") or cfg.get("label_names"), int(num_classes), name),
        image_size=(size[1], size[2]),
        test_image_size=(test[1], test[2]),
        crop_pct=cfg.get("test_crop_pct") or cfg.get("crop_pct"),
        channels=size[0],
        drop_path_rate=0.0,
        mean=tuple(cfg.get("mean", (0.485, 0.456, 0.406))),
        std=tuple(cfg.get("std", (0.229, 0.224, 0.225))),
        loss="bce" if config.get("problem_type") == "multi_label_classification" else "ce",
        pixel_range=tuple(config["pixel_range"]) if config.get("pixel_range") else None,
        model_args=model_args,
        crop_mode=crop_mode,
    )


def _names(given: Sequence[str] | Mapping[str, str] | None, num_classes: int, name: str) -> tuple[str, ...]:
    """Return the classes: as written, or those of ImageNet where their number tells, or numbers."""
    if isinstance(given, Mapping):  # ids with gaps
        return tuple(given.get(str(row), str(row)) for row in range(num_classes))
    if given is not None:
        if len(given) != num_classes:
            raise ValueError(f"{name} has {num_classes} classes and {len(given)} label_names; correct its config.json")
        return tuple(given)
    subset = timm_library().data.infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return tuple(str(row) for row in range(num_classes))
    return tuple(cast("list[str]", timm_library().data.ImageNetInfo(subset).label_descriptions()))


def timm_library() -> Any:
    """Return timm, which takes a second and a half to import and is of no use to pretraining."""
    import timm

    return timm
