"""`hf_mae.export`: a trained model as a folder that others load without us, checked before it is kept.

An export folder holds what its library reads (config.json, model.safetensors, preprocessor_config.json), and
export.json: where the model comes from, what was changed on the way, and how far the outputs are apart. No path of this
machine stands in it. `hf_mae.cards` adds the card, `hf_mae.hub` uploads it.

    model                          target    class
    classifier, pool mean          beit      BeitForImageClassification
    classifier, pool cls           vit       ViTForImageClassification
    pretraining, vanilla           vit_mae   ViTMAEForPreTraining
    encoder (MAEModel, or that     vit       ViTModel: tokens
      of a pretraining model)      beit      BeitModel: norm of the mean of the tokens, see `stock.as_beit_encoder`
    any of these ViTs              timm      VisionTransformer: tokens and pooled features, or logits
    model of timm                  timm      its own
    classifier, encoder, timm      onnx      a graph for onnxruntime
    anything of ours               hf_mae    its own class, the decoder included
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

import hf_mae
from hf_mae.exporting.check import process
from hf_mae.exporting.checked import judge_processor, write_stock
from hf_mae.exporting.files import write_json
from hf_mae.exporting.folders import check_out, new_folder
from hf_mae.exporting.lineage import lineage
from hf_mae.exporting.parity import (
    TOLERANCE,
    Outputs,
    decoded,
    example_pixels,
    flower,
    largest_difference,
    ours,
    prepare,
    trial_images,
)
from hf_mae.exporting.questions import logits, noise, reconstruction, tokens
from hf_mae.exporting.source import MULTI_LABEL, Source, Target, Weights, read
from hf_mae.exporting.stock import HOW_TO_LOAD, as_graph, left_out
from hf_mae.exporting.telling import Say, no_bars_in_logs, silent
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining, MAEModel, MAEPreTrainedModel
from hf_mae.models.timm_models import write_timm_folder

RECORD = "export.json"
"""Tells a folder as an export."""
FORMAT = 1


def export(
    model: PreTrainedModel | nn.Module | str | os.PathLike[str],
    out_dir: str | os.PathLike[str] | None = None,
    target: Target = "auto",
    *,
    weights: Weights = "last",
    processor: Mapping[str, Any] | None = None,
    picture: Path | None = None,
    code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write a model as a folder that others load, and check that it computes the same.

    The folder is loaded in a new process that does not import this package, by the Auto class of its library, and its
    outputs are compared with ours in float64 (1e-12) and float32 (1e-5). It takes its place only if they agree.

    Args:
        model: an instance of a class of ours (its `config.problem_type` says if it was trained for binary
            cross-entropy, as a run folder knows of itself); a run folder; a model folder of ours, of timm or in the
            layout of facebook/vit-mae-*; a Hub id of such; or an official `.pth` file.
        out_dir: the folder to write. None is RUN/export/TARGET of a run.
        target: see the module; `auto` is the stock class of a classifier, `vit_mae` for a vanilla pretraining model and
            `hf_mae` for others, `vit` for an encoder, `timm` for a model of timm.
        weights: of a run folder: those of its newest checkpoint, of its best evaluation, or their moving average.
        processor: fields of BitImageProcessor (`image_mean`, `image_std`, ...) in place of what the model folder says;
            of a model of timm these two only.
        picture: a photograph for the checks; None is one that comes with scikit-learn.
        code: of target `hf_mae`: add files of Python that load the folder without this package.
        overwrite: replace `out_dir` even if it is no export of ours, or something in it was edited or added since.
        say: called with lines for the user; None drops them.

    Returns:
        The folder.

    Raises:
        ValueError: the model cannot be read, the target cannot express it, or `out_dir` cannot be used: it holds
            something of the user's (`hf_mae.exporting.folders.WouldOverwriteError`).
        RuntimeError: the export does not compute what the model computes. Nothing is left of it.
    """
    say = say or silent
    if target not in get_args(Target):
        raise ValueError(f"target={target!r} is unknown; use one of {', '.join(get_args(Target))}")
    if picture is not None and not Path(picture).is_file():
        raise ValueError(f"picture={picture} is no file; name a picture")
    if out_dir is not None:  # before anything is downloaded
        check_out(Path(out_dir), mark=RECORD, source=_read_from(model, Path(out_dir)), overwrite=overwrite)
    with no_bars_in_logs():
        source = read(model, weights=weights, processor=processor, say=say)
    target = _resolve(source, target)
    if code and target != "hf_mae":
        raise ValueError(f"code=True is for target 'hf_mae', and target is {target!r}; stock classes need no code")
    if out_dir is None and source.folder is None:
        raise ValueError("out_dir is not given; name the folder to write (only a run folder has a place of its own)")
    out = Path(cast(Any, out_dir)) if out_dir is not None else cast(Path, source.folder) / "export" / target
    out = out.expanduser()
    with no_bars_in_logs(), new_folder(out, mark=RECORD, source=_read_from(model, out), overwrite=overwrite) as folder:
        record = _write(source, target, folder, Path(picture) if picture is not None else flower(), code, say)
        if source.conversion is not None:
            (folder / "conversion.json").write_text(source.conversion)
        record["lineage"] = lineage(model)
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    say(f"exported {source.origin.name} as {record['class']} ({record['library']}) to {out}{_summary(record)}")
    if (note := HOW_TO_LOAD.get(record["class"])) is not None:
        say(f"note: {note}")
    return out


def _read_from(model: nn.Module | str | os.PathLike[str], out: Path) -> Path | None:
    """Return the file or folder that is read and that `out` must not touch; RUN/export/ is for what is written."""
    if isinstance(model, nn.Module):
        return None
    exports = (Path(model).expanduser() / "export").resolve()
    return None if exports in out.expanduser().resolve().parents else Path(model)


def _resolve(source: Source, target: Target) -> Target:
    """Return the target that `auto` stands for, and refuse one of another kind of model."""
    model = source.model
    if source.spec is not None:
        if target not in ("auto", "timm", "onnx"):
            raise ValueError(
                f"target={target!r} is for models of hf_mae, and this is one of timm; use 'timm' or 'onnx'"
            )
        return "timm" if target == "auto" else target
    config = cast(MAEPreTrainedModel, model).config
    if isinstance(model, MAEForImageClassification):
        fits: Target = "beit" if config.pool == "mean" else "vit"
        if target == "vit_mae":
            raise ValueError(f"target='vit_mae' has no head for classes, and this is a classifier; use {fits!r}")
        if target in ("beit", "vit") and target != fits:
            raise ValueError(
                f"pool={config.pool!r} is not how {target!r} pools its tokens; use target {fits!r}, which does, or "
                "'timm'"
            )
        return fits if target == "auto" else target
    if isinstance(model, MAEForPreTraining):
        vanilla = (
            config.mask_strategy == "random"
            and not config.mask_tokens_in_encoder
            and config.pos_embed == "sincos"
            and all(isinstance(side, int) or side[0] == side[1] for side in (config.image_size, config.patch_size))
        )
        return ("vit_mae" if vanilla else "hf_mae") if target == "auto" else target
    if target == "vit_mae":
        raise ValueError("target='vit_mae' needs a decoder, and this is an encoder without one; use 'vit'")
    return "vit" if target == "auto" else target


def _write(source: Source, target: Target, folder: Path, picture: Path, code: bool, say: Say) -> dict[str, Any]:
    """Write the folder, check it, and return its record."""
    if target == "hf_mae":
        record = _write_research(source, folder, code, picture, say)
    elif target == "onnx":
        record = _write_onnx(source, folder, picture, say)
    else:
        record = write_stock(source, target, folder, picture, say)
    versions = {"hf_mae": hf_mae.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "format": FORMAT,
        "target": target,
        "class": record["class"],
        "library": record["library"],
        "task": record["task"],
        "classifies": source.classes is not None,
        "channels": source.channels,
        "problem_type": source.problem_type,
        "source": asdict(source.origin),
        "parity": record["parity"],
        "processor": record["processor"],
        "pipeline": record["pipeline"],
        "changes": [*record["changes"], *source.notes],
        "versions": record.get("versions", {}) | versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# ------------------------------------------------------------------------------------------------ other folders


def _write_research(source: Source, folder: Path, code: bool, picture: Path, say: Say) -> dict[str, Any]:
    """Write our own class, whole, and read it back."""
    model = cast(MAEPreTrainedModel, source.model)
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.float32
    model.config.save_pretrained(folder)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "preprocessor_config.json", source.processor)
    read_back = type(model).from_pretrained(folder)
    if changed := [name for name, tensor in read_back.state_dict().items() if not torch.equal(tensor, weights[name])]:
        raise RuntimeError(f"{changed[0]} was not written as it is; check the disk and export again")
    prepared = prepare(decoded(picture, source.channels), source.crop)
    pixels = example_pixels(prepared, source.processor["image_mean"], source.processor["image_std"])
    inputs: Outputs = {"pixel_values": pixels}
    forward, what = tokens, "tokens and features"
    if isinstance(model, MAEForImageClassification):
        forward, what = logits, "logits"
    elif isinstance(model, MAEForPreTraining):
        inputs["noise"] = noise(pixels, model)
        forward, what = reconstruction, "loss, predicted patches and mask, under the same noise"
    mine, theirs = (ours(one, forward, inputs) for one in (model, read_back))
    changes = []
    if code:
        from hf_mae.exporting.code import write_code

        write_code(folder)
        changes.append("files of Python are added, which load the folder without hf_mae if remote code is trusted")
    parity: dict[str, Any] = {
        dtype: max(largest_difference(mine[key], theirs[key]) for key in mine if key.startswith(dtype))
        for dtype in TOLERANCE
    }
    parity |= {
        "images": len(pixels),
        "what": f"{what}; the folder read back by hf_mae",
        "tolerance": dict.fromkeys(TOLERANCE, 0),
    }
    return _unchecked(type(model).__name__, "hf_mae", changes, source, folder, picture, say) | {"parity": parity}


def _write_onnx(source: Source, folder: Path, picture: Path, say: Say) -> dict[str, Any]:
    """Write a graph, with the config and the image processor of the stock class beside it."""
    from hf_mae.exporting.onnx import export_onnx

    model, changes = source.model, []
    if isinstance(model, MAEForPreTraining):
        model, changes = _encoder_of(model), left_out(model)
    classifies = source.classes is not None
    parity = export_onnx(
        model,
        folder,
        kind="classifier" if classifies else "encoder",
        image_size=source.size,
        channels=source.channels,
    )
    if source.spec is not None:
        write_timm_folder(folder, source.spec, model.state_dict())
        (folder / "model.safetensors").unlink()
    else:
        beside = as_graph(cast(MAEPreTrainedModel, model), problem_type=MULTI_LABEL if source.bce else None)
        write_json(folder / "config.json", beside.config_json())
        write_json(folder / "preprocessor_config.json", source.processor)
    task = None
    if source.channels == 3:
        task = "image-classification" if classifies else "image-feature-extraction"
    record = _unchecked(type(model).__name__, "onnx", changes, source, folder, picture, say)
    return record | {"parity": parity, "task": task}


def _encoder_of(model: MAEForPreTraining) -> MAEModel:
    encoder = MAEModel(model.config)
    own = encoder.state_dict().keys()
    encoder.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in own})
    return encoder.eval()


def _unchecked(
    name: str, library: str, changes: list[str], source: Source, folder: Path, picture: Path, say: Say
) -> dict[str, Any]:
    """Return the record of a folder whose model stock classes do not read; its image processor they do."""
    of = "transformers" if source.spec is None else "timm"
    converts = of == "transformers" and source.channels == 3
    images = trial_images(decoded(picture, source.channels), source.crop, converts=converts)
    processor, notes = judge_processor(images, of, process(str(folder), of, images), source, say)
    changes = [*changes, *notes]
    return {
        "class": name,
        "library": library,
        "task": None,
        "processor": processor,
        "pipeline": None,
        "changes": changes,
    }


def _summary(record: Mapping[str, Any]) -> str:
    parity = record["parity"]
    found = [f"{parity[name]:.2g} in {name}" for name in TOLERANCE if parity.get(name) is not None]
    return f"; outputs differ from ours by at most {', '.join(found)}" if found else ""
