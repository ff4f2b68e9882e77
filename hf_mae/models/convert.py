"""Read weights written by others: official `.pth` files, timm, and every spelling of transformers' ViT-MAE.

Our names are the official ones, with fused qkv. Files with pickles are read with PyTorch's restricted unpickler, which
may build one class besides tensors and plain data: `argparse.Namespace`, where the official code keeps its arguments.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.recipes.base import VIT_SIZES
from hf_mae.resolve import ModelFileError, index_of, read_index, weight_files

# Module paths of transformers 4.x, of 5.x, and of what 5.23 saves for the decoder ("decoder_encoder"), to ours.
RENAMES = [
    (r"^(vit\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(vit\.)?(encoder\.layer|layers)\.(?=\d)", "blocks."),
    (r"^(vit\.)?layernorm\.", "norm."),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.(?=\d)", "decoder_blocks."),
    (r"^decoder\.(?=(decoder_embed|decoder_norm|decoder_pred)\.|mask_token$|decoder_pos_embed$)", ""),
    (r"^classifier\.", "head."),
]
# Inside a block; 4.x first, then 5.x. Ours pass through.
BLOCK_RENAMES = [
    (r"^attention\.attention\.(query|key|value)\.", r"attn.\1."),
    (r"^attention\.output\.dense\.", "attn.proj."),
    (r"^intermediate\.dense\.", "mlp.fc1."),
    (r"^output\.dense\.", "mlp.fc2."),
    (r"^attention\.q_proj\.", "attn.query."),
    (r"^attention\.k_proj\.", "attn.key."),
    (r"^attention\.v_proj\.", "attn.value."),
    (r"^attention\.o_proj\.", "attn.proj."),
    (r"^layernorm_before\.", "norm1."),
    (r"^layernorm_after\.", "norm2."),
]
BLOCK = re.compile(r"^((?:decoder_)?blocks\.\d+\.)(.+)$")
OURS = re.compile(
    r"cls_token|mask_token|encoder_mask_token|pos_embed|decoder_pos_embed"
    r"|(patch_embed\.proj|norm|fc_norm|head|decoder_embed|decoder_norm|decoder_pred)\.(weight|bias)"
    r"|head\.0\.(running_mean|running_var|num_batches_tracked)|head\.1\.(weight|bias)"
    r"|(decoder_)?blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
SHOWN = 10
"""Names listed in an error before it is cut short."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""How safetensors calls the types of weights that are not quantised."""


class OfficialCheckpoint(NamedTuple):
    """What an official `.pth` holds, in our names."""

    state_dict: dict[str, Tensor]
    has_decoder: bool
    args: dict[str, Any]
    """The command line of the run that wrote it; empty in the published files."""


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under our names: official, timm, transformers 4.x and 5.x, and what 5.23 saves by default.

    Separate queries, keys and values are joined. Names that are ours already pass through, a classifier's `fc_norm` and
    `head` among them, so converting twice changes nothing. No tensor is copied except the joined ones.

    Args:
        state_dict: names to tensors.

    Returns:
        Our names to tensors.

    Raises:
        ValueError: names are left over that belong to no known spelling, or an attention layer is incomplete; they are
            listed.
    """
    if wrong := [name for name in state_dict if not isinstance(name, str)]:
        raise ValueError(
            f"a weight has the name {wrong[0]!r}, which is not text; pass a dictionary of names to tensors."
        )
    converted: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if (ours := _rename(name)) in converted:
            raise ValueError(f"two weights are {ours}, one of them under the name {name}; remove one.")
        converted[ours] = tensor
    for query in [name for name in converted if ".attn.query." in name]:
        parts = [query.replace(".attn.query.", f".attn.{part}.") for part in ("query", "key", "value")]
        if all(part in converted for part in parts):
            if len({converted[part].shape for part in parts}) > 1 or converted[query].ndim == 0:
                raise ValueError(
                    f"{', '.join(f'{part} is {shape_of(converted[part])}' for part in parts)}; queries, keys and "
                    "values need one shape."
                )
            joined = torch.cat([converted.pop(part) for part in parts])
            converted[query.replace(".attn.query.", ".attn.qkv.")] = joined
    if left_over := [name for name in converted if not OURS.fullmatch(name)]:
        raise ValueError(
            f"{len(left_over)} of {len(state_dict)} weights belong to no masked autoencoder that is known here: "
            f"{list_names(left_over)}. Known are the official code, timm's ViT and transformers' ViTMAE; "
            "rename or remove the others."
        )
    return converted


def load_official_checkpoint(path: str | os.PathLike[str]) -> OfficialCheckpoint:
    """Read a `.pth` file of the official code without running what it may contain.

    Args:
        path: a file holding `{"model": weights, ...}` or the weights alone.

    Raises:
        ValueError: the file holds objects other than tensors, plain data and `argparse.Namespace`, or no weights, or it
            is damaged or of another format.
    """
    if not os.path.isfile(path):
        raise ModelFileError(f"{path} is not a file; name a .pth file of the official code.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, pickle.UnpicklingError) and (zipfile.is_zipfile(path) or "GLOBAL" in str(error)):
            raise ValueError(
                f"{path} is refused: it holds Python objects other than tensors and argparse.Namespace, which could "
                "run code when read. Ask its author for a safetensors file."
            ) from error
        why = "is damaged" if zipfile.is_zipfile(path) else "is damaged, or not a file of PyTorch"
        raise ValueError(
            f"{path} {why}: it cannot be read ({type(error).__name__}). Copy or download it again, or name another."
        ) from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} holds no weights; expected a dictionary of tensors, or one under 'model'.")
    try:
        state_dict = convert_state_dict(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    args = content.get("args")
    return OfficialCheckpoint(
        state_dict,
        has_decoder="decoder_pred.weight" in state_dict,
        args=vars(args) if isinstance(args, argparse.Namespace) else {},
    )


def config_from_state_dict(
    state_dict: Mapping[str, Tensor], *, args: Mapping[str, Any] | None = None, **overrides: Any
) -> MAEConfig:
    """Infer the configuration of official weights from their shapes.

    Shapes do not show the number of heads (known for the named sizes), whether a grid is square (assumed), or what the
    decoder was trained to predict.

    Args:
        state_dict: weights under our names.
        args: arguments of the official run, where its checkpoint has them.
        overrides: fields of `MAEConfig`; they win.

    Raises:
        ValueError: a needed field can neither be inferred nor is given.
    """
    args = args or {}
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    if "decoder_embed.weight" in state_dict:
        needed |= {"decoder_embed.weight": 2, "decoder_blocks.0.mlp.fc1.weight": 2}
    for name, dimensions in needed.items():
        if name not in state_dict or state_dict[name].ndim != dimensions:
            found = shape_of(state_dict[name]) if name in state_dict else "missing"
            raise ValueError(
                f"{name} is {found}, and without its {dimensions} dimensions the weights do not tell their "
                "architecture; use a whole checkpoint of a masked autoencoder."
            )
    width, channels, *patch = state_dict["patch_embed.proj.weight"].shape
    fields: dict[str, Any] = {
        "num_channels": channels,
        "patch_size": patch[0] if patch[0] == patch[1] else tuple(patch),
        "hidden_size": width,
        "num_hidden_layers": _count_blocks(state_dict, "blocks."),
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
    }
    known = [size for size in VIT_SIZES.values() if size["hidden_size"] == width]
    if known:
        fields["num_attention_heads"] = known[0]["num_attention_heads"]
    if "decoder_embed.weight" in state_dict:
        fields["decoder_hidden_size"] = decoder_width = state_dict["decoder_embed.weight"].shape[0]
        fields["decoder_num_hidden_layers"] = _count_blocks(state_dict, "decoder_blocks.")
        fields["decoder_intermediate_size"] = state_dict["decoder_blocks.0.mlp.fc1.weight"].shape[0]
        if decoder_width == 512:  # every decoder of the official code
            fields["decoder_num_attention_heads"] = 16
        fields |= {name: args[name] for name in ("norm_pix_loss", "mask_ratio") if name in args}
        _require(
            "decoder_num_attention_heads", fields | overrides, f"a decoder of width {decoder_width} is not official"
        )
        _require(
            "norm_pix_loss",
            fields | overrides,
            "weights do not show it: the published `mae_visualize_*` predict raw pixels (False), `*_full` normalised "
            "ones (True)",
        )
    if head := [name for name in ("head.weight", "head.1.weight") if name in state_dict]:
        fields["head"] = "linear" if head == ["head.weight"] else "batchnorm"
        fields["pool"] = "mean" if "fc_norm.weight" in state_dict else "cls"
        fields["pos_embed"] = "learned"  # official fine-tuning trains the positions
        if "id2label" not in overrides:
            fields["num_labels"] = len(state_dict[head[0]])
    _require("num_attention_heads", fields | overrides, f"an encoder of width {width} is not official")
    if "image_size" not in overrides:
        num_patches = state_dict["pos_embed"].shape[1] - 1
        side = round(num_patches**0.5)
        if side**2 != num_patches:
            raise ValueError(
                f"image_size is not given and {num_patches} patches make no square; pass image_size=(H, W)."
            )
        h, w = height_width(overrides.get("patch_size", fields["patch_size"]))
        fields["image_size"] = side * h if h == w else (side * h, side * w)
    return MAEConfig(**(fields | overrides))


def load_folder(folder: Path, *, variant: str | None = None) -> dict[str, Tensor]:
    """Read the safetensors weights of a model folder under our names.

    Args:
        folder: on this machine, see `hf_mae.resolve`.
        variant: as for `from_pretrained`.

    Raises:
        ValueError: there are no safetensors files, they are damaged or do not fit together, or names are left over.
            Pickled `.bin` files are not read.
    """
    check_files(folder, variant=variant)
    state_dict: dict[str, Tensor] = {}
    for file in weight_files(folder, variant=variant):
        state_dict |= load_file(file)
    try:
        return convert_state_dict(state_dict)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def check_files(folder: Path, *, variant: str | None = None) -> None:
    """Look at the headers of the safetensors files of a model folder, not at the weights.

    Raises:
        ValueError: a file is damaged, weights are quantised, or several files do not hold what their index says.
    """
    files = weight_files(folder, variant=variant)
    place: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                dtypes = {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged, or not a safetensors file ({error}, {file.stat().st_size} bytes); copy or "
                "download it again."
            ) from error
        for name, dtype in dtypes.items():
            if dtype not in FLOATS and not name.endswith("num_batches_tracked"):
                raise ValueError(
                    f"{name} of {file} is {dtype}, not a plain float: quantised weights are not read; use the model "
                    "they were made of."
                )
            if name in place:
                raise ValueError(f"{name} is in {place[name]} and in {file.name} of {folder}; remove one of them.")
            place[name] = file.name
    index = index_of(folder, variant=variant)
    if index is not None:
        listed = read_index(index)
        if wrong := sorted(name for name in listed.keys() | place.keys() if listed.get(name) != place.get(name)):
            name = wrong[0]
            raise ValueError(
                f"{index} and its files differ in {len(wrong)} weights: {name} is in "
                f"{listed.get(name, 'no file')} by the index and in {place.get(name, 'no file')} in fact; copy or "
                "download the folder again."
            )


def check_finite(weights: Iterable[tuple[str, Tensor]], source: object) -> None:
    """Refuse weights with NaN or infinity in them. One pass of sums: 0.3 s for the 330 M of a ViT-L on two cores.

    Args:
        weights: names and tensors; those without storage and those that are not floats are passed over.
        source: where they are from, for the message.

    Raises:
        ValueError: a weight is not finite.
    """
    for name, tensor in weights:
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        # NaN and infinity stay in a sum; a sum of finite numbers that is too large is looked at again.
        if not tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite():
            bad = tensor.numel() - int(tensor.isfinite().sum())
            if bad:
                raise ValueError(
                    f"weight {name} of {source} is not finite ({bad:,} of {tensor.numel():,} values are NaN or "
                    "infinite): its training diverged or the file is damaged; use an earlier checkpoint, or get it "
                    "again."
                )


def shape_of(tensor: Tensor) -> str:
    """Return the shape of a tensor as text: `48 x 192`, or `a scalar`."""
    return " x ".join(map(str, tensor.shape)) or "a scalar"


def list_names(names: list[str]) -> str:
    """Return names joined by commas, the first ten of them when there are many."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _rename(name: str) -> str:
    for pattern, ours in RENAMES:
        name = re.sub(pattern, ours, name)
    if not (inside := BLOCK.match(name)):
        return name
    block, rest = inside.groups()
    for pattern, ours in BLOCK_RENAMES:
        rest = re.sub(pattern, ours, rest)
    return block + rest


def _count_blocks(state_dict: Mapping[str, Tensor], prefix: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith(prefix))


def _require(name: str, fields: Mapping[str, Any], why: str) -> None:
    if name not in fields:
        raise ValueError(f"{name} is not given and cannot be inferred ({why}); pass {name}=...")
