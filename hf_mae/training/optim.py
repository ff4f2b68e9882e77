"""Parameter groups, the optimizer and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_mae.recipes.base import Optim
from hf_mae.recipes.classification import ClassifierOptim
from hf_mae.recipes.fields import unknown
from hf_mae.training.distributed import full
from hf_mae.training.statistics import running_statistics

TOKENS = ("cls_token", "mask_token", "encoder_mask_token")


def weight_decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, *, decay_tokens: bool = True
) -> list[dict[str, object]]:
    """Split trainable parameters into [no decay, decay], in that order.

    Vectors and biases are not decayed; everything else is. As in the official pretraining code this includes the cls
    and mask tokens, which are 3-D; `decay_tokens=False` exempts them. Frozen parameters are left out.

    Returns:
        Two groups for a torch optimizer, each with `params`, `weight_decay` and `names`.
        Source: facebookresearch/mae main_pretrain.py (timm's add_weight_decay), numbers only.
    """
    groups: list[dict[str, object]] = [
        {"params": [], "names": [], "weight_decay": 0.0},
        {"params": [], "names": [], "weight_decay": weight_decay},
    ]
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        exempt = not decay_tokens and name.rsplit(".", 1)[-1] in TOKENS
        group = groups[int(parameter.ndim > 1 and not name.endswith(".bias") and not exempt)]
        group["params"].append(parameter)  # type: ignore[attr-defined]
        group["names"].append(name)  # type: ignore[attr-defined]
    return groups


def build_adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """Build fused AdamW over the official parameter groups; the lr is set by the loop before every update."""
    groups = weight_decay_groups(model.named_parameters(), optim.weight_decay, decay_tokens=optim.decay_tokens)
    for group in groups:
        del group["names"]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


def layer_of(name: str, num_layers: int) -> int:
    """Return the number of the layer a parameter belongs to, for layer-wise learning rates.

    0 is the embedding (cls token, positions, patches), i + 1 is block i, and `num_layers + 1` is everything behind the
    blocks: `norm`, `fc_norm` and `head`.

    Args:
        name: of the parameter in the model.
        num_layers: blocks of the encoder.

    Returns:
        0 .. num_layers + 1. Source: facebookresearch/mae util/lr_decay.py (timm puts `norm` with the last block).
    """
    first, *rest = name.split(".")
    if first in ("cls_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest[0]) + 1 if first == "blocks" else num_layers + 1


def layer_decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    num_layers: int,
    weight_decay: float,
    layer_decay: float,
    decay_tokens: bool = False,
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:
    """Split trainable parameters by layer, and each layer into what is decayed and what is not.

    Vectors are not decayed, and neither are the cls token and the positions unless `decay_tokens`. Frozen parameters
    are left out.

    Args:
        named_parameters: of a model, or of a task that holds it as `model`.
        num_layers: blocks of the encoder.
        weight_decay: of the matrices.
        layer_decay: the head has the whole learning rate, each layer below this fraction of the one above it.
        decay_tokens: decay the cls token and the positions.
        decay_vectors: decay everything.

    Returns:
        Groups for a torch optimizer in the order of their first parameters, each with `params`, `names`, `name`
        ("layer_3_decay"), `lr_scale` and `weight_decay`. Source: facebookresearch/mae util/lr_decay.py, numbers only.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        name = name.removeprefix("model.")
        layer = layer_of(name, num_layers)
        exempt = parameter.ndim == 1 or (not decay_tokens and name in (*TOKENS, "pos_embed"))
        exempt = exempt and not decay_vectors
        key = f"layer_{layer}_{'no_decay' if exempt else 'decay'}"
        group = groups.setdefault(
            key,
            {
                "name": key,
                "lr_scale": layer_decay ** (num_layers + 1 - layer),
                "weight_decay": 0.0 if exempt else weight_decay,
                "params": [],
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def timm_groups(model: nn.Module, optim: ClassifierOptim) -> list[dict[str, Any]]:
    """Split the trainable parameters of a timm model by timm's own rules.

    Vectors and biases are not decayed, and neither is what the model itself exempts (`no_weight_decay`: cls token and
    positions of its transformers) unless `optim.decay_tokens`. Layers are those of the model's `group_matcher`.

    Args:
        model: a timm model.
        optim: weight decay, layer-wise lr decay, and what is exempt.

    Returns:
        Groups as of `layer_decay_groups`, without `names`. Without layer-wise decay all are of "layer_0". With
        `optim.decay_vectors` everything is decayed.
    """
    from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay  # slow to import

    # Only some architectures have a say: timm itself asks in this way.
    exempt = set() if optim.decay_tokens else getattr(model, "no_weight_decay", set)()
    # By a decay of 1 decayed groups are told from others, whatever the decay is meant to be.
    if optim.layer_decay < 1:
        found = param_groups_layer_decay(model, 1.0, no_weight_decay_list=exempt, layer_decay=optim.layer_decay)
    else:
        found = param_groups_weight_decay(model, 1.0, no_weight_decay_list=exempt)
    found = [group for group in found if group["params"]]
    scales = sorted({group.get("lr_scale", 1.0) for group in found})
    groups: dict[str, dict[str, Any]] = {}
    for group in found:
        scale, decayed = group.get("lr_scale", 1.0), optim.decay_vectors or group["weight_decay"] > 0
        name = f"layer_{scales.index(scale)}_{'decay' if decayed else 'no_decay'}"
        empty = {"name": name, "lr_scale": scale, "weight_decay": optim.weight_decay if decayed else 0.0, "params": []}
        groups.setdefault(name, empty)["params"] += group["params"]
    return list(groups.values())


def build_optimizer(model: nn.Module, optim: ClassifierOptim, *, num_layers: int | None) -> torch.optim.Optimizer:
    """Build the optimizer of a classifier over its trainable parameters; the loop sets the lr before every update.

    Each group keeps its `name` and the `lr_scale` by which the loop multiplies the lr. LAMB does not clip: the loop's
    `clip_grad` does, by the norm over all ranks.

    Args:
        model: the model. Of ours, the task that holds it will do as well.
        optim: which optimizer, and its numbers.
        num_layers: blocks of an encoder of ours; None is a timm model, which knows its layers.

    Raises:
        ValueError: every parameter is frozen, or the numbers contradict each other.
    """
    _check(optim)
    lars = optim.name == "lars"
    if num_layers is None:
        groups = timm_groups(model, optim)
    else:
        groups = layer_decay_groups(
            model.named_parameters(),
            num_layers=num_layers,
            weight_decay=optim.weight_decay,
            layer_decay=optim.layer_decay,
            decay_tokens=optim.decay_tokens or lars,  # LARS asks for the number of dimensions alone
            decay_vectors=optim.decay_vectors,
        )
        for group in groups:
            del group["names"]
    if not groups:
        raise ValueError("every parameter is frozen, so there is nothing to train; raise --trainable-blocks")
    optimizer = _lars(groups, optim) if lars else _optimizer(groups, optim)
    if optim.agc is not None:
        # All but the last layer, as in timm's training script (Brock et al. 2021, section 4.1). By their places, since
        # FSDP2 puts others there.
        last = {id(p) for p in list(model.parameters())[-2:]}
        clipped = [[i for i, p in enumerate(group["params"]) if id(p) not in last] for group in groups]
        optimizer.register_step_pre_hook(partial(_clip_adaptively, clipped, optim.agc))
    return optimizer


def _check(optim: ClassifierOptim) -> None:
    if optim.name == "lars" and optim.decay_vectors:
        raise ValueError(
            "optim.decay_vectors=True with optim.name=lars: LARS adapts what is decayed, and would adapt vectors as "
            "well; leave decay_vectors out"
        )
    if optim.nesterov and (optim.name != "sgd" or optim.momentum == 0):
        raise ValueError(
            f"optim.nesterov=True needs optim.name=sgd and a momentum above 0, not name={optim.name} and "
            f"momentum={optim.momentum}; leave it out, or add --optim.name sgd --optim.momentum 0.9"
        )


def _optimizer(groups: list[dict[str, Any]], optim: ClassifierOptim) -> torch.optim.Optimizer:
    momentum: Any = optim.momentum  # which timm takes for an int
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=optim.nesterov)
    if optim.name == "lamb":
        from timm.optim.lamb import Lamb

        return Lamb(groups, lr=0.0, betas=optim.betas, eps=optim.eps, max_grad_norm=None)
    if optim.name == "rmsprop":
        from timm.optim.rmsprop_tf import RMSpropTF

        return RMSpropTF(groups, lr=0.0, alpha=0.9, momentum=momentum, eps=optim.eps)
    if optim.name not in ("adam", "adamw"):
        raise unknown("optim.name", optim.name, ("adamw", "adam", "lamb", "lars", "rmsprop", "sgd"))
    kind = torch.optim.Adam if optim.name == "adam" else torch.optim.AdamW
    # A fused optimizer takes the scale of fp16 off the gradients itself: too late for adaptive clipping before it.
    return kind(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=optim.agc is None)


def _lars(groups: list[dict[str, Any]], optim: ClassifierOptim) -> torch.optim.Optimizer:
    from timm.optim.lars import Lars

    for group in groups:
        # By itself timm adapts no group whose weight decay is 0, and that of the official probe is.
        group["always_adapt"] = not group["name"].endswith("_no_decay")
        # The official trust ratio divides by the norm of gradient and decay together, timm's by the sum of both.
        group["decay_before"], group["weight_decay"] = group["weight_decay"], 0.0
    momentum: Any = optim.momentum
    optimizer = Lars(groups, lr=0.0, momentum=momentum, trust_coeff=0.001, eps=0.0)
    optimizer.register_step_pre_hook(_decay_before)
    return optimizer


@torch.no_grad()
def _clip_adaptively(
    places: list[list[int]], ratio: float, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any
) -> None:
    """Clip each unit's gradient to `ratio` times the norm of its weights, after `clip_grad` if there is one.

    The numbers of timm's `adaptive_clip_grad`, which fails on sharded (FSDP2) vectors.
    """
    groups = zip(optimizer.param_groups, places, strict=True)
    for parameter in [group["params"][i] for group, chosen in groups for i in chosen]:
        if parameter.grad is not None:
            limit, norm = _unit_norms(parameter).clamp(min=1e-3) * ratio, _unit_norms(parameter.grad)
            parameter.grad.mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))


def _unit_norms(tensor: Tensor) -> Tensor:
    """Return the norm of each row [n, 1, ...], or of a whole vector []."""
    if tensor.ndim > 1:
        return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)
    return full(torch.linalg.vector_norm(tensor))


@torch.no_grad()
def _decay_before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if group["decay_before"]:
            trained = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in trained]
            torch._foreach_add_(gradients, trained, alpha=group["decay_before"])  # pyright: ignore[reportPrivateImportUsage]


def describe_groups(optimizer: torch.optim.Optimizer, lr: float) -> list[str]:
    """Return the effective lr per group, one line for each layer, the embedding first.

    Args:
        optimizer: of `build_optimizer`.
        lr: peak learning rate per update.
    """
    layers: dict[int, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        layers.setdefault(int(group["name"].split("_")[1]), []).append(group)
    lines = []
    for layer, groups in sorted(layers.items()):
        parts = [
            f"{sum(p.numel() for p in group['params']):,} values with weight decay "
            f"{group['weight_decay'] or group.get('decay_before', 0.0):g}"
            for group in groups
        ]
        scale = groups[0]["lr_scale"]
        lines.append(f"layer {layer}: lr up to {lr * scale:.3g} ({scale:.3g} of {lr:.3g}); {', '.join(parts)}")
    return lines


class MovingAverage:
    """Exponential moving average of a module's parameters, and of its batch normalisations' running statistics.

    Works on plain and on sharded (FSDP2) parameters alike: each rank averages what it holds. Other buffers are not
    averaged: an averaged model has their current values.

    Args:
        module: the wrapped module; its values are read at every update.
        decay: weight kept per optimizer update, between 0 and 1.
        warmup: let the decay rise to `decay` as timm's `ModelEmaV3` does, so that the first weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = False):
        self.decay, self.warmup = decay, warmup
        parameters, statistics = dict(module.named_parameters()), running_statistics(module)
        self.sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
        self.names = [n.removeprefix("module.").removeprefix("model.") for n in [*parameters, *statistics]]
        # Apart, as one operation on many tensors takes no sharded ones together with whole ones.
        self.sources = [list(values) for values in (parameters.values(), statistics.values()) if values]
        self.shadows = [[t.detach().clone() for t in source] for source in self.sources]

    def decay_at(self, step: int) -> float:
        """Return the weight kept at update `step` (1-based): with `warmup`, at most 1 - step ** (-2/3)."""
        return min(self.decay, 1 - step ** (-2 / 3)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the current weights.

        Args:
            step: optimizer updates done, this one included.
        """
        share = 1 - self.decay_at(step)
        for shadow, source in zip(self.shadows, self.sources, strict=True):
            torch._foreach_lerp_(shadow, [t.detach() for t in source], share)  # pyright: ignore[reportPrivateImportUsage]

    def state(self) -> dict[str, Tensor]:
        """Return the averages by name of parameter or statistic (sharded tensors stay sharded)."""
        return dict(zip(self.names, [t for shadow in self.shadows for t in shadow], strict=True))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Replace the weights by their averages inside; afterwards they are what they were, to the last bit."""
        current = [[t.detach().clone() for t in source] for source in self.sources]
        self._put(self.shadows)
        try:
            yield
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, values: list[list[Tensor]]) -> None:
        for module in self.sharded:
            module.reshard()  # gathered copies, which a forward pass without a backward pass leaves, would be stale
        for source, value in zip(self.sources, values, strict=True):
            for tensor, new in zip(source, value, strict=True):
                tensor.copy_(new)
