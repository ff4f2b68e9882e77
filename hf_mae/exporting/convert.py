"""Weights of others become a model folder of this package: official `.pth` files, ViTs of timm, ViTMAE of transformers.

Official files are recognised (see `official`), so that licence, what the decoder predicts and the authors' numbers
follow. What timm or transformers can run is run by both sides and compared before anything is kept: an option that was
overlooked shows as another number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from transformers import ViTMAEForPreTraining, ViTMAEModel

from hf_mae.exporting.files import hash_files, weight_files, write_json
from hf_mae.exporting.folders import check_out, new_folder
from hf_mae.exporting.labels import check_unique
from hf_mae.exporting.official import LICENSE, is_copy, recognise
from hf_mae.exporting.parity import TOLERANCE, largest_difference
from hf_mae.exporting.processor import check_statistics, evaluation_processor
from hf_mae.exporting.telling import no_bars_in_logs, silent
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.convert import config_from_state_dict, load_folder, load_official_checkpoint
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel, MAEPreTrainedModel
from hf_mae.models.pos_embed import sincos_pos_embed
from hf_mae.models.timm_spec import timm_library
from hf_mae.patience import explain, patient
from hf_mae.recipes.base import IMAGENET_MEAN
from hf_mae.recipes.crop import EvalCrop
from hf_mae.resolve import locate, read_config, read_json

RECORD = "conversion.json"
KINDS: Mapping[str, type[MAEPreTrainedModel]] = {
    "encoder": MAEModel,
    "pretraining": MAEForPreTraining,
    "classifier": MAEForImageClassification,
}
IMAGENET_CLASSES = 1000
STATISTICS = ("image_mean", "image_std")

Reference = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Maps images and mask noise to what the other library computes, by our names of outputs."""


@dataclass(frozen=True)
class _Foreign:
    """Weights that were read, under our names, and what their source says of them."""

    name: str
    weights: dict[str, Tensor]
    config: MAEConfig
    sha256: str
    layout: str
    license: str | None = None
    known: dict[str, Any] | None = None
    revision: str | None = None
    names: tuple[str, ...] | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    reference: Callable[[MAEConfig], Reference] | None = None


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    id2label: Mapping[int, str] | None = None,
    license: str | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
    **overrides: Any,
) -> Path:
    """Write a model folder of this package from weights of others: whole, or not at all.

    The folder holds `config.json`, safetensors, `preprocessor_config.json` in full, and `conversion.json`: where the
    weights come from (names and hashes, no paths), which published file they are, their licence, and how exactly the
    other library gives the same numbers. Files with a decoder become `MAEForPreTraining`, those with a head
    `MAEForImageClassification`, others `MAEModel`.

    Args:
        source: an official `.pth` file (pretrained, fine-tuned or probed); or a folder or Hub id (`ORG/NAME`, also
            `hf-hub:ORG/NAME` and `ORG/NAME@REVISION`) of a plain ViT of timm or of transformers' ViTMAE.
        out: the folder to write.
        id2label: names of the classes 0 to n - 1; else the source's, ImageNet's for the official classifiers.
        license: of the weights, as the Hub names it. That of the official weights and their known copies is known, and
            non-commercial terms cannot be changed; None is the source's own (a timm folder may name one), and where it
            has none that is recorded, and a card asks for it.
        image_mean: per channel, of pictures in [0, 1]; else the source's, or ImageNet's.
        image_std: likewise.
        overwrite: replace a folder that this function did not write, or in which something was edited or added since.
        say: takes lines for the user.
        overrides: fields of `MAEConfig` that the weights do not show, such as `norm_pix_loss`.

    Returns:
        `out`.

    Raises:
        ValueError: the source is none of these or is refused, a field cannot be inferred or contradicts what is known,
            or timm or transformers compute something else with the same weights.
    """
    say = say or silent
    check_out(Path(out), mark=RECORD, source=Path(source), overwrite=overwrite)  # before anything is downloaded
    with no_bars_in_logs():
        foreign = _read(str(source), overrides, say)
        model = _build(foreign, id2label, say)
        parity = None if foreign.reference is None else _compare(foreign, model)
    terms = _license(foreign, license, say)
    given = {"image_mean": image_mean, "image_std": image_std}
    given = {name: list(values) for name, values in given.items() if values is not None}
    processor = _processor(model, foreign.processor, given, say)
    known = foreign.known
    record = {
        "format": 1,
        "source": foreign.name,
        "layout": foreign.layout,
        "revision": foreign.revision,
        "sha256": foreign.sha256,
        "known": known,
        "license": terms,
        "class": type(model).__name__,
        "head": f"{model.config.num_labels} classes" if isinstance(model, MAEForImageClassification) else None,
        "norm_pix_loss": model.config.norm_pix_loss if isinstance(model, MAEForPreTraining) else None,
        "parity": parity,
    }
    with new_folder(Path(out), mark=RECORD, source=Path(source), overwrite=overwrite) as folder:
        with no_bars_in_logs():
            model.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", processor)
        write_json(folder / RECORD, record)
    say(f"wrote {type(model).__name__} of {foreign.name} to {out}" + (f", known as {known['name']}" if known else ""))
    return Path(out)


# ------------------------------------------------------------------------------------------------ reading


def _read(source: str, overrides: dict[str, Any], say: Callable[[str], None]) -> _Foreign:
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(cast(Path, locate(path, field="source")), overrides, say)
    folder, name, revision = (path, path.resolve().name, None) if path.is_dir() else _download(source)
    values = read_config(folder) if (folder / "config.json").is_file() else {}
    if values.get("model_type") == "vit_mae":
        foreign = _read_vit_mae(folder, name, overrides)
    elif {"architecture", "pretrained_cfg"} <= values.keys():
        foreign = _read_timm(folder, name, values, overrides, say)
    elif values.get("model_type") == "hf_mae":
        raise ValueError(f"{source} is a model of this package already; nothing is left to convert.")
    else:
        raise ValueError(
            f"{source} is neither an official .pth file nor a folder or Hub id of timm's ViT or transformers' ViTMAE "
            f"(model_type={values.get('model_type')!r}); name one of these."
        )
    terms = LICENSE if revision is not None and is_copy(name) else foreign.license
    return replace(foreign, revision=revision, license=terms)


def _download(source: str) -> tuple[Path, str, str]:
    name, _, revision = source.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{source} is no file, no folder and no Hub id (ORG/NAME); check the spelling.")
    what = f"reading {name} from the Hub"
    patterns = ["config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"]
    try:
        folder = patient(what, lambda: snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise explain(error, repo_id=name, what=what) from error
    return Path(folder), name, Path(folder).name  # the folder is named after the commit


def _read_file(path: Path, overrides: dict[str, Any], say: Callable[[str], None]) -> _Foreign:
    checkpoint = load_official_checkpoint(path)
    weights = checkpoint.state_dict
    md5, sha256 = hash_files([path])
    found = recognise(path.name, md5, weights["patch_embed.proj.weight"].shape[0], _kind(weights))
    known, fields = None, dict(overrides)
    if found is not None:
        official, how = found
        known = {"name": official.name, "by": how} | {
            name: value for name, value in asdict(official).items() if name in ("norm_pix_loss", "result")
        }
        if fields.setdefault("norm_pix_loss", official.norm_pix_loss) != official.norm_pix_loss:
            raise ValueError(
                f"norm_pix_loss={fields['norm_pix_loss']} contradicts {official.name}, which was trained with "
                f"{official.norm_pix_loss}; leave it out."
            )
    if known is not None and known["by"] == "file name":
        say(f"{path.name} is taken for the authors' file of that name: no hash of it was ever published")
    config = config_from_state_dict(weights, args=checkpoint.args, **fields)
    return _Foreign(path.name, weights, config, sha256, "official", LICENSE if known else None, known)


def _read_vit_mae(folder: Path, name: str, overrides: dict[str, Any]) -> _Foreign:
    weights = load_folder(folder)
    config = cast(MAEConfig, MAEConfig.from_pretrained(folder, **overrides))
    written = folder / "preprocessor_config.json"
    values = read_json(written) if written.is_file() else {}
    processor = {key: values[key] for key in ("image_mean", "image_std") if key in values}
    stock = ViTMAEForPreTraining if _kind(weights) == "pretraining" else ViTMAEModel

    def reference(config: MAEConfig) -> Reference:
        options = {"mask_ratio": config.mask_ratio, "norm_pix_loss": config.norm_pix_loss}
        model = stock.from_pretrained(folder, use_safetensors=True, dtype=torch.float64, **options).eval()

        def run(pixels: Tensor, noise: Tensor) -> dict[str, Tensor]:
            outputs = model(pixels, noise=noise)
            if stock is ViTMAEModel:
                return {"last_hidden_state": outputs.last_hidden_state}
            return {"loss": outputs.loss, "pred": outputs.logits}

        return run

    sha256 = hash_files(weight_files(folder))[1]
    return _Foreign(name, weights, config, sha256, "vit_mae", processor=processor, reference=reference)


def _read_timm(
    folder: Path, name: str, values: dict[str, Any], overrides: dict[str, Any], say: Callable[[str], None]
) -> _Foreign:
    cfg, arguments = values["pretrained_cfg"], values.get("model_args") or {}
    weights = load_folder(folder)
    fields: dict[str, Any] = {"num_attention_heads": arguments["num_heads"]} if "num_heads" in arguments else {}
    height, width = cfg["input_size"][1:]
    fields |= {"image_size": height if height == width else (height, width)}
    config = config_from_state_dict(weights, **(fields | overrides))
    labels = values.get("label_names") or cfg.get("label_names")
    names = None
    if labels and not isinstance(labels, Mapping):
        names = tuple(labels)
    elif _kind(weights) == "classifier" and config.num_labels == IMAGENET_CLASSES:
        names = imagenet_names()  # as timm itself reads a thousand classes without names
    processor: dict[str, Any] = {"image_mean": list(cfg["mean"]), "image_std": list(cfg["std"])}
    if cfg.get("crop_pct"):
        try:
            processor |= EvalCrop((height, width), cfg["crop_pct"], cfg.get("crop_mode") or "center").processor()
        except ValueError as error:
            say(f"warning: {error}. Images will be prepared otherwise: {EvalCrop((height, width)).words()}")

    def reference(config: MAEConfig) -> Reference:
        del config
        network = timm_library().create_model(f"local-dir:{folder}", pretrained=True).double().eval()
        if _kind(weights) == "classifier":
            return lambda pixels, _: {"logits": network(pixels)}
        return lambda pixels, _: {"last_hidden_state": network.forward_features(pixels)}

    sha256 = hash_files(weight_files(folder))[1]
    return _Foreign(
        name, weights, config, sha256, "timm", cfg.get("license"), names=names, processor=processor, reference=reference
    )


def _kind(weights: Mapping[str, Tensor]) -> str:
    if "decoder_pred.weight" in weights:
        return "pretraining"
    return "classifier" if {"head.weight", "head.1.weight"} & weights.keys() else "encoder"


def imagenet_names() -> tuple[str, ...]:
    """Return WordNet's words for ImageNet's classes, in their order, no name twice.

    The second crane, the machine, is `crane2` as in ILSVRC/imagenet-1k on the Hub.
    """
    words = cast("list[str]", timm_library().data.ImageNetInfo("imagenet-1k").label_descriptions())
    return tuple(f"{name}2" if name in words[:row] else name for row, name in enumerate(words))


# ------------------------------------------------------------------------------------------------ writing


def _build(foreign: _Foreign, id2label: Mapping[int, str] | None, say: Callable[[str], None]) -> MAEPreTrainedModel:
    """Return the model in float32 with all of the weights."""
    kind, config = _kind(foreign.weights), foreign.config
    for name, tensor in foreign.weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"weight {name} of {foreign.name} is not finite: the file is broken; get it again.")
    labels = None if id2label is None else dict(id2label)
    num_labels = cast(int, config.num_labels)
    if kind == "classifier":
        names = foreign.names
        if names is None and foreign.known is not None:
            names = imagenet_names()
        labels = dict(enumerate(names)) if labels is None and names is not None else labels
        if labels is None:
            say(f"the {num_labels} classes have no names; they stay LABEL_0, ... unless id2label is given")
        elif sorted(labels) != list(range(num_labels)):
            raise ValueError(
                f"id2label names {len(labels)} classes and {foreign.name} has {num_labels}; name the classes 0 "
                f"to {num_labels - 1}."
            )
        else:
            names = [labels[row] for row in range(num_labels)]
            check_unique(names, "id2label")
            config.id2label, config.label2id = dict(enumerate(names)), {name: row for row, name in enumerate(names)}
    elif labels is not None:
        raise ValueError(f"id2label is given and {foreign.name} has no head, so no classes; leave it out.")
    if config.pos_embed == "sincos" and not _is_sincos(config, foreign.weights):
        config.pos_embed = "learned"
        say("the position tables are not the fixed sine-cosine ones, so they count as learned")
    config.dtype, weights = None, {name: _float32(tensor) for name, tensor in foreign.weights.items()}
    model = KINDS[kind].from_pretrained(None, config=config, state_dict=weights).eval()
    model.name_or_path = model.config.name_or_path = foreign.name
    return cast(MAEPreTrainedModel, model)


def _float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _is_sincos(config: MAEConfig, weights: Mapping[str, Tensor]) -> bool:
    tables = [weights[name] for name in ("pos_embed", "decoder_pos_embed") if name in weights]
    return all(
        table.shape[-1] % 4 == 0
        and torch.allclose(table.float(), sincos_pos_embed(table.shape[-1], config.grid)[None], atol=1e-4)
        for table in tables
    )


def _license(foreign: _Foreign, given: str | None, say: Callable[[str], None]) -> str | None:
    stated = foreign.license
    if stated is not None and given not in (None, stated) and "-nc" in stated:
        raise ValueError(
            f"license={given!r} cannot be given to {foreign.name}, whose authors license it as {stated}: "
            "non-commercial terms stay; leave it out."
        )
    if stated is None and given is None:
        say(f"the licence of {foreign.name} is not known; a card will ask for it (--license NAME records it here)")
    return given or stated


@torch.no_grad()
def _compare(foreign: _Foreign, model: MAEPreTrainedModel) -> dict[str, Any]:
    """Run both sides in float64, and refuse weights that mean something else here."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    size = height_width(config.image_size)
    pixels = torch.randn(2, config.num_channels, *size, generator=generator, dtype=torch.float64)
    noise = torch.rand(2, config.num_patches, generator=generator, dtype=torch.float64)
    assert foreign.reference is not None
    expected = foreign.reference(config)(pixels, noise)
    ours = type(model)(config).double().eval()
    ours.load_state_dict(model.state_dict())
    masked = {} if foreign.layout == "timm" else {"noise": noise}
    found = cast(nn.Module, ours)(pixels, **masked)
    differences = []
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise _other(foreign, f"{name} has shape {tuple(value.shape)} there and {tuple(found[name].shape)} here")
        difference = largest_difference(value, found[name])
        limit = TOLERANCE["float64"] * max(1.0, float(value.abs().max()))
        if not difference <= limit:
            raise _other(foreign, f"{name} differs by {difference:.3g}")
        differences.append(difference)
    return {
        "float64": max(differences),
        "images": len(pixels),
        "what": f"{' and '.join(expected)} of {'timm' if masked == {} else 'transformers'}",
        "tolerance": {"float64": TOLERANCE["float64"]},
    }


def _other(foreign: _Foreign, what: str) -> ValueError:
    return ValueError(
        f"{foreign.name} computes something else with its weights than this package would: {what}. It has an option "
        "that MAEConfig cannot express (pooling, activation, normalisation); use it in its own library."
    )


def _processor(
    model: MAEPreTrainedModel, stated: Mapping[str, Any], given: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """Return our evaluation transform in full, with what the source says of it, with what the user says."""
    channels = model.config.num_channels
    fits = {name: value for name, value in stated.items() if name not in STATISTICS or len(value) == channels}
    fitting = {**fits, **given}
    if channels != len(IMAGENET_MEAN) and not set(STATISTICS) <= fitting.keys():
        grey = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
        say(f"no mean and std are known for {channels} channels; 0.5 is written (--image-mean, --image-std)")
        fitting = grey | fitting
    check_statistics(evaluation_processor(model, fitting), channels)
    return evaluation_processor(model, fitting)
