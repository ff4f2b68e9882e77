"""Write the card of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_mae.cards.options import CardOptions


def write_card(
    export: Path, repo_id: str, options: CardOptions, *, run: Path | None = None, evaluations: Sequence[Path] = ()
) -> Path:
    """Write README.md, pictures/, samples/, records/ and .eval_results/ into an export folder."""
    raise NotImplementedError
