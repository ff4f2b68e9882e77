"""What every test shares: where the real images lie, one thread, no network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch is loaded: see hf_mae/threads.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState

SHARED = Path(os.environ.get("HF_MAE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Sums depend on the number of threads; bitwise tests need it fixed."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one state per process; each test starts its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images beside the checkout; tests that need it are skipped without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip(
            f"needs the real images of {SHARED.name}/data, which are not part of the package (set HF_MAE_SHARED)"
        )
    return SHARED


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Numbers of the official code on tiny fixed problems."""
    return GOLDENS


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A pretraining folder for digits, two blocks of random weights: protocols do not depend on what it knows."""
    from hf_mae import MAEConfig, MAEForPreTraining

    torch.manual_seed(1)
    config = MAEConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    )
    MAEForPreTraining(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"
