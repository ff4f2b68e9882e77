"""A script that loads a stock folder as a stranger would, without this package, and writes down what comes out.

Run by `parity.run_stock` as `python check.py REQUEST.json`, in a new process that cannot import this package: what it
loads, transformers or timm must be able to load. The request names the folder, the Auto class, its inputs and the
pictures; the answer goes to `outputs.safetensors` and `answer.json` beside the request.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOP = 5


class Blocked(MetaPathFinder):
    """Lets nothing import this package, wherever it is installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """Refuse this package, and leave all others to others."""
        if fullname.partition(".")[0] == "hf_mae":
            raise ModuleNotFoundError("hf_mae is not to be imported: others have to load the folder without it")


def main(request_path: Path) -> None:
    """Answer one request."""
    sys.meta_path.insert(0, Blocked())
    request = json.loads(request_path.read_text())
    inputs = load_file(request_path.with_name("inputs.safetensors"))
    outputs: dict[str, torch.Tensor] = {}
    answer: dict[str, Any] = {"processor": {}, "pipeline": None}
    for name, dtype in DTYPES.items():
        for route, forward in _routes(request, dtype).items():
            with torch.no_grad():
                found = forward({key: value.to(dtype) for key, value in inputs.items()})
            outputs |= {f"{name}.{route}.{key}": found[key].contiguous() for key in request["outputs"]}
    images = [Image.open(path) for path in request["decoded"]]
    found = process(request["folder"], request["library"], images)
    outputs |= {f"processor.{name}": pixels.contiguous() for name, pixels in found.items()}
    if request["pipeline"]:
        answer["pipeline"], pixels = _run_pipeline(request)
        outputs["pipeline.pixel_values"] = pixels.contiguous()
    answer["versions"] = _versions(request["library"])
    assert "hf_mae" not in sys.modules, "this process must not know hf_mae"
    save_file(outputs, request_path.with_name("outputs.safetensors"))
    request_path.with_name("answer.json").write_text(json.dumps(answer))


def _routes(request: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return each way of loading the folder, as a function from inputs to outputs by name."""
    import transformers

    folder = request["folder"]
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtype} | request["options"]
    if request["library"] == "transformers":
        options["attn_implementation"] = "sdpa"
    auto, report = getattr(transformers, request["auto"]).from_pretrained(folder, output_loading_info=True, **options)
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys") if report[key]}
    if wrong:
        raise SystemExit(f"{type(auto).__name__} does not find its weights: {wrong}")
    routes: dict[str, Any] = {"auto": lambda inputs: auto.eval()(**inputs)}
    if request["library"] == "timm":
        import timm

        network: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(dtype)

        def of_timm(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            tokens = network.forward_features(inputs["pixel_values"])
            head = network.forward_head(tokens)
            return {"last_hidden_state": tokens, "pooler_output": head, "logits": head}

        routes["timm"] = of_timm
    return routes


def process(folder: str, library: str, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """Return the images as each backend of the folder's image processor prepares them, by BACKEND.NUMBER.

    Args:
        folder: with its processor, whatever else is there.
        library: `timm` if its config.json is of that format, else `transformers`.
        images: of any size.

    Returns:
        float [1, C, H, W], normalised.
    """
    from transformers import AutoImageProcessor

    def stock(**options: str) -> Any:
        processor = AutoImageProcessor.from_pretrained(folder, **options)
        return lambda image: processor(image, return_tensors="pt")["pixel_values"]

    backends: dict[str, Any] = {"default": stock()}
    if library == "timm":
        from timm.data.config import resolve_data_config
        from timm.data.transforms_factory import create_transform

        config = json.loads((Path(folder) / "config.json").read_text())
        transform: Any = create_transform(**resolve_data_config(pretrained_cfg=config["pretrained_cfg"]))
        backends["timm"] = lambda image: transform(image)[None]
    else:
        backends["pil"] = stock(backend="pil")
    return {f"{name}.{i}": run(image) for name, run in backends.items() for i, image in enumerate(images)}


def _run_pipeline(request: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Return what the pipeline of the task says about the picture, and the pixels it says it of."""
    from transformers import pipeline

    task = request["pipeline"]
    pipe: Any = pipeline(task, model=request["folder"], device="cpu")
    result, pixels = pipe(request["picture"]), pipe.preprocess(request["picture"])["pixel_values"].float()
    if task == "image-classification":
        answers = [{"label": str(one["label"]), "score": float(one["score"])} for one in result[:TOP]]
        return {"answers": answers}, pixels
    return {"answers": [], "shape": list(torch.tensor(result).shape)}, pixels


def _versions(library: str) -> dict[str, str]:
    import transformers

    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    if library == "timm":
        import timm

        versions["timm"] = timm.__version__
    return versions


if __name__ == "__main__":
    main(Path(sys.argv[1]))
