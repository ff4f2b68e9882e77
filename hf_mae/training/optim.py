"""Parameter groups, the optimizer and the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_mae.recipes.base import Optim

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


class MovingAverage:
    """Exponential moving average of a module's parameters, in parameter order.

    Works on plain and on sharded (FSDP2) parameters alike: each rank averages what it holds.

    Args:
        module: the wrapped module; its parameters are read at every update.
        decay: weight kept per optimizer update, between 0 and 1.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.names = [name.removeprefix("module.").removeprefix("model.") for name, _ in module.named_parameters()]
        self.parameters = list(module.parameters())
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        current = [p.detach() for p in self.parameters]
        torch._foreach_lerp_(self.shadow, current, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]

    def state(self) -> dict[str, Tensor]:
        """Return the averages by parameter name (sharded tensors stay sharded)."""
        return dict(zip(self.names, self.shadow, strict=True))
