"""ONNX files of classifiers and encoders: any batch, one image size, checked with onnxruntime before they are kept.

What PyTorch's exporter notes beside the graph, stack traces with the paths of this machine among it, is taken out.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_mae.models.configuration_mae import height_width
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEModel
from hf_mae.recipes.base import Size

Kind = Literal["classifier", "encoder"]
OUTPUTS: Mapping[Kind, str] = {"classifier": "logits", "encoder": "last_hidden_state"}
OPSET = 18
"""The operator set PyTorch's exporter is written for; newer ones would only need newer runtimes."""
BATCHES = (1, 3)
"""Images per batch of the check; the graph is traced with two."""
TOLERANCE = 1e-4
"""Largest difference allowed, times the largest output where that is above 1. Measured with onnxruntime 1.31: of the
largest output, 8e-7 on a ViT-B whose weights, norms and biases are all random, and 3e-5 on a tiny network of positive
weights, which amplifies rounding."""
EXTERNAL_BYTES = 2**30
"""Weights above this many bytes go into a file beside the graph: one ONNX file ends at 2 GB."""


def export_onnx(
    model: nn.Module, folder: Path, *, kind: Kind, image_size: Size, channels: int, external_bytes: int = EXTERNAL_BYTES
) -> dict[str, Any]:
    """Write `folder/onnx/model.onnx`, run it with onnxruntime and compare.

    Input `pixel_values` [batch, C, H, W] float32, normalised; output `logits` [batch, num_labels], or
    `last_hidden_state`: [batch, 1 + L, D] of an encoder of this package, what `forward_features` gives of one of timm.
    Weights are written in float32 whatever the model's precision. Weights above `external_bytes` lie in
    `onnx/model.onnx_data`, the name transformers.js looks for. The model that was given stays as it is.

    Args:
        model: `MAEForImageClassification`, `MAEModel` or a model of timm.
        folder: an export folder; created if need be.
        kind: what the output is.
        image_size: height and width in pixels, fixed in the file.
        channels: colour channels.
        external_bytes: see above.

    Returns:
        The parity record: `float64` (None: the file is float32), `float32` (largest absolute difference), `largest`
        (absolute output), `images`, `what`, `tolerance`, `opset`, `versions`.

    Raises:
        ValueError: ONNX is not installed, or the model is not of this kind.
        RuntimeError: PyTorch cannot trace the model, or the file gives other numbers; nothing is left.
    """
    onnxruntime, ir = _libraries()
    network = _Network(_float32(model, kind), kind)
    output = OUTPUTS[kind]
    pixels = [_pixels(n, channels, image_size) for n in (2, *BATCHES)]
    graph = _trace(network, pixels[0], output)
    _strip(graph)
    target = folder / "onnx"
    target.mkdir(parents=True, exist_ok=True)
    path = target / "model.onnx"
    is_large = sum(4 * p.numel() for p in [*network.parameters(), *network.buffers()]) > external_bytes
    try:
        ir.save(graph, path, external_data="model.onnx_data" if is_large else None)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        difference, largest = _compare(network, session, pixels[1:], output)
    except BaseException:
        shutil.rmtree(target)
        raise
    if not difference <= TOLERANCE * max(1.0, largest):  # also where it is not a number
        shutil.rmtree(target)
        raise RuntimeError(
            f"the ONNX file gives other {output} than the model: they differ by {difference:.3g}, and "
            f"{TOLERANCE * max(1.0, largest):.3g} is allowed; nothing was kept. Other versions of torch or onnxruntime "
            "may agree"
        )
    return {
        "float64": None,
        "float32": difference,
        "largest": largest,
        "images": sum(BATCHES),
        "what": f"{output}, onnxruntime on the CPU, batches of {' and '.join(map(str, BATCHES))}",
        "tolerance": {"float32": TOLERANCE * max(1.0, largest)},
        "opset": OPSET,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }


class _Network(nn.Module):
    """One tensor in, one tensor out."""

    def __init__(self, model: nn.Module, kind: Kind):
        super().__init__()
        self.model = model
        self.kind: Kind = kind

    def forward(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.model, PreTrainedModel):
            return self.model(pixel_values)[OUTPUTS[self.kind]]
        return (
            self.model(pixel_values)
            if self.kind == "classifier"
            else cast(Any, self.model).forward_features(pixel_values)
        )


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx  # noqa: F401  # onnxscript and PyTorch's exporter need it
        import onnxruntime
        from onnxscript import ir
    except ImportError as error:
        raise ValueError(
            f'writing ONNX needs onnx, onnxscript and onnxruntime ({error}); pip install "hf_mae[onnx]"'
        ) from error
    return onnxruntime, ir


def _float32(model: nn.Module, kind: Kind) -> nn.Module:
    expected = {"classifier": MAEForImageClassification, "encoder": MAEModel}.get(kind)
    if expected is None:
        raise ValueError(f"kind={kind!r} is unknown; use 'classifier' or 'encoder'.")
    if isinstance(model, PreTrainedModel) and not isinstance(model, expected):
        raise ValueError(
            f"model is a {type(model).__name__}, and ONNX files of kind={kind!r} are made of {expected.__name__} or of "
            f"timm's models; load the folder with {expected.__name__}.from_pretrained."
        )
    model = copy.deepcopy(model).cpu().float().eval()
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation("sdpa")
    return model


def _pixels(num: int, channels: int, image_size: Size) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, channels, *height_width(image_size), generator=generator)


def _trace(network: nn.Module, pixels: Tensor, output: str) -> Any:
    """Return the graph, of any batch."""
    from torch._dynamo.exc import TorchDynamoException  # half a second to import

    axes = {"pixel_values": {0: torch.export.Dim("batch")}}
    try:
        with torch.no_grad():
            # Strict, as the other mode takes len(tensor) for a constant and fixes the batch.
            program = torch.export.export(network, (pixels,), dynamic_shapes=axes, strict=True)
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=[output],
                dynamic_shapes={"pixel_values": {0: "batch"}},
                opset_version=OPSET,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, TorchDynamoException) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"PyTorch cannot write this model as ONNX: {why}") from error
    return cast(Any, exported).model


def _strip(graph: Any) -> None:
    """Take out what the exporter noted beside the numbers."""
    parts = [graph, graph.graph, *graph.graph.all_nodes(), *graph.functions.values()]
    parts += [node for function in graph.functions.values() for node in function.all_nodes()]
    for part in parts:
        part.metadata_props.clear()
        part.doc_string = None
    for value in [*graph.graph.inputs, *graph.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in graph.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()


@torch.no_grad()
def _compare(network: nn.Module, session: Any, batches: list[Tensor], output: str) -> tuple[float, float]:
    """Return the largest absolute difference, and the largest absolute output."""
    differences, sizes = [], []
    for pixels in batches:
        expected = network(pixels)
        found = torch.from_numpy(session.run([output], {"pixel_values": pixels.numpy()})[0])
        if found.shape != expected.shape:
            raise RuntimeError(
                f"the ONNX file gives {output} of shape {tuple(found.shape)} and the model {tuple(expected.shape)}"
            )
        differences.append(float((found - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
    return max(differences), max(sizes)
