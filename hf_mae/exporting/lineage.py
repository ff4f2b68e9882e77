"""What an export derives from, with licences: the `lineage` of export.json, which binds its card.

The links are those of `hf_mae.training.origins`, the nearest first; the run that made the weights is not among them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_mae.exporting.official import LICENSE, OFFICIAL, is_copy
from hf_mae.training.origins import Link, lineage_of, plain_name, run_of

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
    # An object that was loaded from a run may have been trained since, and a copy of an export is of that run.
    own = not isinstance(model, nn.Module) and run_of(Path(name)) is not None
    unknown = first["kind"] in ("folder", "file", "missing", "export") and not first["license"]
    return links[1:] if own or unknown else links


def with_official_terms(links: Sequence[Mapping[str, Any]]) -> list[Link]:
    """Return links where the official weights of MAE and their copies are under their licence, whatever cards say."""
    return [{**link, "license": LICENSE, "source": OFFICIAL_TERMS} if _is_bound(link) else dict(link) for link in links]


def _is_bound(link: Mapping[str, Any]) -> bool:
    name = str(link["name"])
    if link["kind"] in ("hub", "missing"):
        return is_official(name)
    if link["kind"] == "conversion":
        return is_copy(plain_name(name))  # of a file the conversion looked at the hash
    return link["kind"] == "file" and _is_official_file(name, str(link.get("md5") or ""))


def is_official(name: str) -> bool:
    """Return whether weights are the official ones of MAE, or a known copy of them, by their name.

    Args:
        name: a Hub id, a name of timm's weights, or of a file that cannot be looked at any more.
    """
    plain = plain_name(name)
    return (
        re.split(r"[\\/]", plain)[-1].removesuffix(".pth") in {one.name.removesuffix(".pth") for one in OFFICIAL}
        or is_copy(plain)
        or ("/" not in plain and is_copy(f"timm/{plain}"))
    )


def _is_official_file(name: str, md5: str) -> bool:
    """Return whether a file is a published one: by its hash; by its name only where no hash was published."""
    return any(md5.startswith(one.md5) if one.md5 is not None else name == one.name for one in OFFICIAL)
