"""The tiny model of the golden files: 32 x 32 images, 4 x 4 patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_mae.models.configuration_mae import MAEConfig
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.models.modeling_mae import MAEForPreTraining

TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}


@pytest.fixture
def tiny() -> Callable[..., MAEConfig]:
    """Make the golden configuration, with changes."""
    return lambda **changes: MAEConfig(**(TINY | changes))


@pytest.fixture(scope="session")
def golden(goldens: Path) -> dict[str, Tensor]:
    """Tensors of the official code."""
    return load_file(goldens / "mae_tiny.safetensors")


@pytest.fixture(scope="session")
def golden_numbers(goldens: Path) -> dict[str, Any]:
    """Losses, gradient norms, initialisation statistics of the official code."""
    return json.loads((goldens / "golden.json").read_text())


@pytest.fixture(scope="session")
def official_weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The golden weights under their official names."""
    return {name[3:]: tensor for name, tensor in golden.items() if name.startswith("sd.")}


@pytest.fixture
def golden_model(
    tiny: Callable[..., MAEConfig], official_weights: dict[str, Tensor]
) -> Callable[..., MAEForPreTraining]:
    """Make the golden model in evaluation mode, with changes to its configuration."""

    def build(attn_implementation: str = "sdpa", **changes: Any) -> MAEForPreTraining:
        model = MAEForPreTraining(tiny(attn_implementation=attn_implementation, **changes)).eval()
        model.load_state_dict(official_weights)
        return model

    return build


@pytest.fixture(scope="session")
def golden_vit(goldens: Path) -> dict[str, Tensor]:
    """Heads, features and logits of the official classifier; its trunk is that of `golden`."""
    return load_file(goldens / "vit_tiny.safetensors")


@pytest.fixture
def golden_classifier(
    tiny: Callable[..., MAEConfig], official_weights: dict[str, Tensor], golden_vit: dict[str, Tensor]
) -> Callable[..., MAEForImageClassification]:
    """Make the golden classifier of one pool in evaluation mode, with changes to its configuration."""

    def build(pool: str = "mean", attn_implementation: str = "sdpa", **changes: Any) -> MAEForImageClassification:
        fields = {"pool": pool, "pos_embed": "learned", "num_labels": 10} | changes
        model = MAEForImageClassification(tiny(attn_implementation=attn_implementation, **fields)).eval()
        key = "gap." if pool == "mean" else "cls."
        heads = {name.removeprefix(key): tensor for name, tensor in golden_vit.items() if name.startswith(key)}
        model.load_state_dict({name: (official_weights | heads)[name] for name in model.state_dict()})
        return model

    return build


@pytest.fixture
def images() -> Tensor:
    """Two 32 x 32 RGB images of noise."""
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise() -> Tensor:
    """Masking noise for them."""
    return torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
