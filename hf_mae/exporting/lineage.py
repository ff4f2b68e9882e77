"""What an export derives from, with licences: the `lineage` of export.json, which binds its card.

The links are those of `hf_mae.training.origins`, the nearest first; the run that made the weights is not among them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_mae.exporting.official import LICENSE, OFFICIAL, is_copy
from hf_mae.training.origins import Link, lineage_of, parents_of_run, plain_name, run_of

OFFICIAL_TERMS = "the LICENSE of facebookresearch/mae"


def lineage(model: nn.Module | str | os.PathLike[str]) -> list[Link]:
    """Return what the weights to be exported derive from.

    Args:
        model: as of `hf_mae.export`; of an instance, what it was loaded from, where it says.

    Returns:
        Links as of `hf_mae.training.origins`. A folder or a file without any record of its terms is not among them:
        whoever exports it says what they are.
    """
    if isinstance(model, nn.Module):
        name = str(vars(model).get("name_or_path") or "")
        if not name or (not Path(name).exists() and "/" not in name):
            return []
    else:
        name = str(model)
    links = with_official_terms(lineage_of(name))
    first = links[0]
    own = first["kind"] == "run" or (first["kind"] in ("folder", "file", "missing", "export") and not first["license"])
    return links[1:] if own else links


def lineage_of_run(run: Path) -> list[Link]:
    """Return what the weights of a run derive from."""
    return with_official_terms(parents_of_run(run_of(run) or run))


def with_official_terms(links: Sequence[Mapping[str, Any]]) -> list[Link]:
    """Return links where the official weights of MAE and their copies are under their licence, whatever cards say."""
    return [
        {**link, "license": LICENSE, "source": OFFICIAL_TERMS}
        if link["kind"] != "run" and (is_official(str(link["name"])) or _is_official_file(str(link.get("md5") or "")))
        else dict(link)
        for link in links
    ]


def is_official(name: str) -> bool:
    """Return whether weights are the official ones of MAE, or a known copy of them, by their name."""
    plain = plain_name(name)
    return (
        any(f"mae_{kind}_vit_" in plain for kind in ("pretrain", "finetuned", "visualize"))
        or is_copy(plain)
        or ("/" not in plain and is_copy(f"timm/{plain}"))
        or plain in ("vit-mae-base", "vit-mae-large", "vit-mae-huge")
    )


def _is_official_file(md5: str) -> bool:
    return any(one.md5 is not None and md5.startswith(one.md5) for one in OFFICIAL)
