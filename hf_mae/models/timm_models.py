"""Models of timm: made from a description, started from other weights, kept in the folder format timm publishes in.

Their stochastic depth draws from PyTorch's global generator; here its layers are replaced by ones that are given their
draws. What is written has timm's own names of weights, and is loaded by timm (`local-dir:FOLDER`) as well as by
transformers (`AutoModelForImageClassification`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_mae.models.timm_spec import TimmSource, TimmSpec, read_source, timm_library
from hf_mae.models.timm_spec import is_timm_folder as is_timm_folder  # part of what this module offers


class PlannedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) whose random numbers come with the batch.

    In training, sample i keeps its branch, divided by 1 - rate, where its draw is at least the rate. In evaluation
    nothing happens. A block that calls one layer for two branches keeps or drops both.

    Attributes:
        rate: share of the samples that skip the branch.
        draws: [N] uniforms in [0, 1) for the next forward pass. They stay until the next are set, as recomputing
            activations in the backward pass reads them again.
    """

    draws: Tensor | None

    def __init__(self, rate: float):
        super().__init__()
        self.rate, self.draws = rate, None

    def forward(self, branch: Tensor) -> Tensor:
        """Map [N, ...] to the same shape.

        Raises:
            RuntimeError: there are no draws for this batch.
        """
        if not self.training:
            return branch
        if self.draws is None or self.draws.shape != branch.shape[:1]:
            given = "none" if self.draws is None else f"draws of shape {tuple(self.draws.shape)}"
            raise RuntimeError(
                f"stochastic depth needs one draw for each of {len(branch)} samples and was given {given}; train "
                "through hf_mae's TimmClassification with `drop_path_noise` in the batch, or set `draws` of each of "
                "`drop_paths(model)`"
            )
        scale = (self.draws >= self.rate).to(branch.dtype) / (1 - self.rate)
        return branch * scale.view(-1, *[1] * (branch.ndim - 1))

    def extra_repr(self) -> str:
        """Return the rate."""
        return f"rate={self.rate:.3f}"


def create(spec: TimmSpec) -> nn.Module:
    """Return a new model with timm's initial weights, in training mode.

    All of its randomness in training is stochastic depth, by draws that are passed in (`drop_paths`).

    Raises:
        ValueError: timm has no such architecture, or it cannot be what the spec asks for, or it draws random numbers of
            its own in training.
    """
    model = _build(spec)
    _plan_drop_paths(model)
    if spec.drop_path_rate > 0 and not drop_paths(model):
        raise ValueError(
            f"model.drop_path_rate={spec.drop_path_rate} has no effect: {spec.architecture} has no stochastic depth; "
            "leave it out, or take another architecture"
        )
    _check_runs(model, spec)
    return model


def drop_paths(model: nn.Module) -> list[PlannedDropPath]:
    """Return the layers of stochastic depth, in the order of the model's modules."""
    return [module for module in model.modules() if isinstance(module, PlannedDropPath)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; each module is as before afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether training takes statistics of a micro-batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def classifier(model: nn.Module) -> nn.Linear:
    """Return the last layer.

    Raises:
        ValueError: it is not one linear layer.
    """
    layer = cast(Any, model).get_classifier()
    if not isinstance(layer, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} does not end in one linear layer ({type(layer).__name__}); take another "
            "architecture"
        )
    return layer


def checkpoint_blocks(model: nn.Module) -> None:
    """Compute the activations of whole blocks again in the backward pass rather than keep them.

    Raises:
        ValueError: the architecture cannot, or has batch normalisation, whose statistics would move twice.
    """
    if has_batch_norm(model):
        raise ValueError(
            "engine.checkpoint_activations=blocks would move the running statistics of batch normalisation twice per "
            "update; use none with this architecture, and a smaller --micro-batch to save memory"
        )
    try:
        cast(Any, model).set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts where it does not support it
        raise ValueError(
            f"engine.checkpoint_activations=blocks is not supported by timm's {type(model).__name__}; use none"
        ) from error


def compile_features(model: nn.Module) -> None:
    """Compile all of the network but its last layer, for batches of one size."""
    network = cast(Any, model)
    network.forward_features = torch.compile(network.forward_features, dynamic=False)


# ------------------------------------------------------------------------------------------------ making


def check_architecture(name: str) -> None:
    """Refuse a name that timm has no architecture of; nothing is made.

    Raises:
        ValueError: it is unknown, or names weights.
    """
    if "/" in name or ":" in name:
        raise ValueError(
            f"model.architecture={name} names weights, not an architecture; pass it as --init-from, and the "
            "architecture of those weights as --model.architecture"
        )
    base, _, tag = name.partition(".")
    known = timm_library().is_model(base)
    if known and tag:
        raise ValueError(
            f"model.architecture={name} names weights; use --model.architecture {base}, and to start from them "
            f"--init-from {name}"
        )
    if not known:
        near = difflib.get_close_matches(base, timm_library().list_models(), n=5)
        raise ValueError(
            f"model.architecture={name} is unknown to timm {timm_library().__version__}"
            f"{'; nearest: ' + ', '.join(near) if near else ''}; timm.list_models() has all"
        )


def _arguments(spec: TimmSpec) -> dict[str, Any]:
    """Return what rebuilds the network, besides the number of classes."""
    arguments = dict(spec.model_args)
    if spec.channels != 3:
        arguments["in_chans"] = spec.channels
    if _is_fixed(spec.architecture):
        if spec.image_size != spec.test_image_size:
            raise ValueError(
                f"model.test_image_size={spec.test_image_size} is not model.image_size={spec.image_size}, and "
                f"{spec.architecture} takes one size only; leave model.test_image_size out"
            )
        arguments.setdefault("img_size", list(spec.image_size))
    return arguments


def _is_fixed(architecture: str) -> bool:
    config = timm_library().models.get_pretrained_cfg(architecture)
    return config is not None and config.fixed_input_size


def _build(spec: TimmSpec, **options: Any) -> nn.Module:
    """Return timm's model as it is, with its own stochastic depth."""
    check_architecture(spec.architecture)
    arguments = _arguments(spec) | {"drop_rate": 0.0}  # some have a default
    if spec.drop_path_rate > 0:
        arguments["drop_path_rate"] = spec.drop_path_rate
    try:
        return timm_library().create_model(spec.architecture, num_classes=len(spec.names), **arguments, **options)
    except TypeError as error:
        raise ValueError(
            f"timm's {spec.architecture} does not take one of {', '.join(sorted(arguments))} ({error}); leave it out, "
            "or take another architecture"
        ) from error


def _plan_drop_paths(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            rate = cast(Any, child).drop_prob if isinstance(child, timm_library().layers.DropPath) else 0.0
            if rate > 0:
                setattr(parent, name, PlannedDropPath(rate))


@torch.no_grad()
def _check_runs(model: nn.Module, spec: TimmSpec) -> None:
    """Refuse what trains by numbers of its own, or is not a last layer on features. Leaves no trace."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for layer in drop_paths(model):
        layer.draws = torch.ones(2)
    before = torch.get_rng_state()
    try:
        model.train()(torch.zeros(2, spec.channels, *spec.image_size))
        draws = not torch.equal(before, torch.get_rng_state())
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"timm's {spec.architecture} does not take pictures of {spec.image_size[0]} x {spec.image_size[1]} "
            f"pixels and {spec.channels} channel(s) ({error}); choose another image size"
        ) from error
    finally:
        torch.set_rng_state(before)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        for layer in drop_paths(model):
            layer.draws = None
    if draws:
        raise ValueError(
            f"model.architecture={spec.architecture} draws random numbers of its own in training (dropout inside the "
            "network), so that a resumed run would differ; take another architecture"
        )
    layer, network = classifier(model), cast(Any, model.eval())
    pixels = torch.linspace(-1, 1, spec.channels * spec.image_size[0] * spec.image_size[1])
    pixels = pixels.view(1, spec.channels, *spec.image_size)
    features = network.forward_head(network.forward_features(pixels), pre_logits=True)
    if not torch.allclose(layer(features), network(pixels), atol=1e-5, rtol=1e-4):
        raise ValueError(
            f"the scores of timm's {spec.architecture} are not one linear layer on its features; take another "
            "architecture"
        )
    model.train()


# ------------------------------------------------------------------------------------------------ reading


def load(name: str | Path) -> tuple[nn.Module, TimmSpec]:
    """Return a trained model in evaluation mode, and what it is.

    Args:
        name: a folder in timm's format, a Hub id (`ORG/NAME`, also with `hf-hub:`), or a name of timm's weights
            (`resnet50.a1_in1k`).

    Raises:
        ValueError: there is no such model, it is not in timm's format, its weights are not safetensors, or they do not
            fit the architecture.
    """
    source = read_source(name)
    return _filled(source, source.spec).eval(), source.spec


def from_weights(name: str | Path, spec: TimmSpec) -> tuple[nn.Module, list[str]]:
    """Return a new model of `spec` with the weights of another: all of the body, and the head's known classes.

    Rows of the head whose class names stay keep their weights, wherever they now stand; the others are new. At another
    image size the positions of ViTs are resized, at other channels the first convolution is, both by timm.

    Args:
        name: as for `load`.
        spec: what the model is to be; of the same architecture.

    Returns:
        The model in training mode, and the names of the classes that were kept, in their new order.

    Raises:
        ValueError: as of `load` and `create`; or the architecture is another.
    """
    source = read_source(name)
    if source.spec.architecture != spec.architecture:
        raise ValueError(
            f"init_from={name} is a {source.spec.architecture} and model.architecture={spec.architecture}; use "
            f"--model.architecture {source.spec.architecture}, or other weights"
        )
    model = create(spec)
    wanted = replace(spec, names=source.spec.names, drop_path_rate=0.0)
    trained = _filled(source, wanted)
    new, old = classifier(model), classifier(trained)
    rows = _occurrences(source.spec.names)
    pairs = [(row, rows[key]) for key, row in _occurrences(spec.names).items() if key in rows]
    head = new.state_dict()  # shares memory with the layer
    for name, before in old.state_dict().items():
        for row, old_row in pairs:
            head[name][row] = before[old_row]
    prefix = next(key for key, module in model.named_modules() if module is new)
    model.load_state_dict(trained.state_dict() | {f"{prefix}.{name}": tensor for name, tensor in head.items()})
    return model, [spec.names[row] for row, _ in pairs]


def _filled(source: TimmSource, spec: TimmSpec) -> nn.Module:
    """Return a model of `spec`, with as many classes as the source has, and its weights, adapted by timm."""
    overlay = {
        "state_dict": dict(source.weights),
        "source": None,
        "file": None,
        "custom_load": False,
        "num_classes": len(source.spec.names),
        "label_offset": 0,
        "input_size": (source.spec.channels, *source.spec.image_size),
    }
    try:
        return _build(spec, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError) as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"the weights of {source.name} do not fit timm's {spec.architecture}: {why}; copy or download them again"
        ) from error


def _occurrences(names: Sequence[str]) -> dict[tuple[str, int], int]:
    # ImageNet has two cranes: a name and how often it stood before -> the class.
    seen: dict[str, int] = {}
    rows: dict[tuple[str, int], int] = {}
    for row, name in enumerate(names):
        seen[name] = seen.get(name, -1) + 1
        rows[name, seen[name]] = row
    return rows


# ------------------------------------------------------------------------------------------------ writing


def write_timm_folder(folder: Path, spec: TimmSpec, weights: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors`, for timm and for transformers; of an encoder if there are no names.

    `model_args` has no `num_classes`: transformers passes its own beside it and fails. A model trained with `bce` is
    marked `problem_type: multi_label_classification`, so that transformers' pipeline shows sigmoid scores.

    transformers and timm prepare pictures by `input_size`. # Differs from timm, whose released weights name the size of
    training there and hide that of testing in `test_input_size`: here it is the size of testing, so that stock classes
    give the accuracy that was measured; another size of training is kept as `train_input_size`.

    Args:
        folder: created if need be.
        spec: what the model is; one without classes has `embed_dim` and `global_pool` in its `model_args`.
        weights: whole, under timm's names.

    Raises:
        ValueError: the last layer is not that of this architecture and these classes.
    """
    arguments = _arguments(spec)
    default = timm_library().models.get_pretrained_cfg(spec.architecture)
    head = weights.get(f"{default.classifier}.weight")
    if (0 if head is None else len(head)) != len(spec.names):
        raise ValueError(
            f"the weights are not those of timm's {spec.architecture} with {len(spec.names)} classes: "
            f"{default.classifier}.weight is {'missing' if head is None else f'of {len(head)} classes'}"
        )
    cfg: dict[str, Any] = {
        "input_size": [spec.channels, *spec.test_image_size],
        "fixed_input_size": default.fixed_input_size,
        "interpolation": "bicubic",
        "crop_pct": spec.crop.pct,
        "test_crop_pct": spec.crop.pct,
        "crop_mode": spec.crop.mode,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "num_classes": len(spec.names),
        "pool_size": None,
        "first_conv": default.first_conv,
        "classifier": default.classifier,
    }
    config: dict[str, Any] = {
        "architecture": spec.architecture,
        "num_classes": len(spec.names),
        "num_features": arguments["embed_dim"] if head is None else head.shape[1],
        "model_args": dict(sorted(arguments.items())),
        "pretrained_cfg": cfg,
    }
    if spec.names:
        config["label_names"] = list(spec.names)
    else:
        config["global_pool"] = arguments["global_pool"]
    if spec.test_image_size != spec.image_size:
        config["train_input_size"] = [spec.channels, *spec.image_size]
    if spec.loss == "bce":
        config["problem_type"] = "multi_label_classification"
    if spec.pixel_range is not None:
        config["pixel_range"] = list(spec.pixel_range)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
