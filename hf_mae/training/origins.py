"""What a model was made from, and under which licence: put on record while it can still be looked up.

A lineage is a list of links, the nearest first. A link is a mapping of

    name      a Hub id, the name of a run, or the last part of a path
    kind      `run` (one of ours, or an export of one whose terms nobody has said yet), `hub`, `conversion`, `export`,
              `folder`, `file`, or `missing` (nothing is there now, or nobody answered)
    license   as the Hub writes it, None where nobody says
    source    where that was read, in words
    revision  of kind `hub`: the commit; only with one is a name taken for a repository later
    recipe    of kind `run`: its recipe's name
    md5       of kind `file`
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from hf_mae.models.timm_spec import timm_library
from hf_mae.patience import GaveUpError, patient

Link = dict[str, Any]

MAX_LINKS = 16
"""Models that a model may come from, one after another."""
RUNS = frozenset({"pretrain", "finetune", "probe", "supervise"})
"""What `source.kind` of export.json says of exports of runs."""
TIMM_SAYS = "timm's record of the weights"


def lineage_of(name: str) -> list[Link]:
    """Return what a model is and was made from, as far as records say; a repository of the Hub is asked, patiently.

    Args:
        name: as `init_from`: a run folder or a model folder in one, a model folder, a file, a Hub id, or a name of
            timm's weights.

    Returns:
        Its links; the first is the model itself.
    """
    found: list[Link] = []
    _follow(name, found, ask=True)
    return found[:MAX_LINKS]


def run_of(folder: Path) -> Path | None:
    """Return the run of a folder: RUN, RUN/best/model or RUN/checkpoints/step_N/model; None of others."""
    place = folder.expanduser().resolve()
    if (place / "recipe.json").is_file() and not (place / "config.json").is_file():
        step = place.parent.name == "checkpoints"
        return place.parents[1] if step and (place.parents[1] / "recipe.json").is_file() else place
    if place.name not in ("model", "model_ema") or len(place.parents) < 3:
        return None
    run = place.parents[1] if place.parent.name == "best" else place.parents[2]
    return run if (run / "recipe.json").is_file() else None


def timm_license(name: str) -> str | None:
    """Return the licence that timm records of weights.

    Args:
        name: `hf-hub:timm/NAME.TAG`, `timm/NAME.TAG`, `NAME.TAG`, or `NAME` for timm's default weights of it.
    """
    plain = _with_tag(plain_name(name)).removeprefix("timm/")
    if "/" in plain or "." not in plain or not timm_library().is_model(plain.partition(".")[0]):
        return None
    known = timm_library().models.get_pretrained_cfg(plain, allow_unregistered=False) if _is_listed(plain) else None
    return None if known is None else known.license or None


def plain_name(name: str) -> str:
    """Return a Hub id without the prefix of timm's and without a revision."""
    return name.removeprefix("hf-hub:").removeprefix("hf_hub:").partition("@")[0]


def _with_tag(name: str) -> str:
    """Return an architecture of timm's (`resnet50`) with the tag of the weights that timm loads for it."""
    if "/" in name or "." in name or not timm_library().is_model(name):
        return name
    known = timm_library().models.get_pretrained_cfg(name, allow_unregistered=False)
    return f"{name}.{known.tag}" if known is not None and known.tag else name


def _is_listed(name: str) -> bool:
    return name in timm_library().list_pretrained(f"{name.partition('.')[0]}.*")


def _follow(name: str, found: list[Link], *, ask: bool) -> None:
    path = Path(name).expanduser()
    if len(found) >= MAX_LINKS:
        return
    if path.is_file():
        found.append(_link(path.name, "file", md5=_md5(path)))
    elif path.is_dir():
        _follow_folder(path, found)
    elif ask and (repo := _repository(name)) is not None:
        _follow_repository(repo, name.partition("@")[2] or None, found)
    else:
        found.append(_missing(name))


def _follow_folder(path: Path, found: list[Link]) -> None:
    run, name = run_of(path), path.resolve().name
    if run is not None:
        found.append(_link(run.resolve().name, "run", recipe=_read(run / "recipe.json").get("name")))
        _follow_parents(run, found)
        return
    _add_described(name, "folder", lambda file: path / file if (path / file).is_file() else None, found)


def _follow_parents(run: Path, found: list[Link]) -> None:
    starts = _read(run / "environment.json").get("starts") or []
    recorded = next((start["lineage"] for start in starts if start.get("lineage") is not None), None)
    if recorded is not None:
        found += recorded
    elif init_from := _read(run / "recipe.json").get("init_from"):
        _follow(str(init_from), found, ask=False)  # a relative path of another folder may look like a Hub id


def _follow_repository(repo: str, revision: str | None, found: list[Link]) -> None:
    try:  # asked once: a model that is in the cache may be used without a network
        info = patient(f"looking at {repo}", lambda: HfApi().model_info(repo, revision=revision), tries=2)
    except (HfHubHTTPError, HFValidationError, OSError, GaveUpError):
        config = _cached(repo, "config.json", revision)
        if config is None:
            found.append(_missing(repo))
        else:
            commit = config.parent.name  # the cache names a snapshot after its commit
            _add_described(repo, "hub", lambda file: _cached(repo, file, commit), found, revision=commit)
        return
    sha, names = str(info.sha), {file.rfilename for file in info.siblings or []}
    here: list[Link] = []
    try:
        _add_described(
            repo, "hub", lambda file: _download(repo, file, sha) if file in names else None, here, revision=sha
        )
    except (HfHubHTTPError, HFValidationError, OSError, GaveUpError):  # it is there, and may say what binds
        known = timm_license(repo) or ""
        here = [_link(repo, "hub", *((known, TIMM_SAYS) if "-nc" in known else ()), revision=sha)]
    found += here


def _add_described(
    name: str, kind: str, file: Callable[[str], Path | None], found: list[Link], *, revision: str | None = None
) -> None:
    """Add a model folder, here or on the Hub, by its own records: export.json, conversion.json, its card.

    Raises:
        OSError, HfHubHTTPError, HFValidationError, GaveUpError: as `file` does.
    """
    export, conversion = _read(file("export.json")), _read(file("conversion.json"))
    said: list[tuple[str | None, str]] = []
    if conversion:
        kind = "conversion" if kind == "folder" else kind
        said.append((conversion.get("license"), "its conversion.json"))
    elif export:
        kind = "export" if kind == "folder" else kind
    if (card := file("README.md")) is not None:
        said.append((_license_of_card(card), "its card"))
    if kind == "hub":
        said.append((timm_license(name), TIMM_SAYS))
    known = [(license_id, where) for license_id, where in said if license_id]
    # The strictest of them.
    license_id, where = next((one for one in known if "-nc" in one[0]), known[0] if known else (None, ""))
    source = export.get("source") or {}
    if kind == "export" and not known and source.get("kind") in RUNS:
        found.append(_link(str(source["name"]), "run", recipe=source.get("run")))  # on this machine: one's own
    else:
        found.append(_link(name, kind, license_id, where, revision=revision))
    if conversion.get("source"):
        found.append(_link(str(conversion["source"]), "conversion", conversion.get("license"), "its conversion.json"))
    found += export.get("lineage") or []


def _missing(name: str) -> Link:
    """Return the link of what is not there, or not known to be a repository: the last part of its name."""
    plain = plain_name(name)
    # Without a tag it may as well be a folder.
    license_id = timm_license(plain) if re.fullmatch(r"(?:timm/)?[\w-]+\.[\w.-]+", plain) else None
    shown = plain if license_id or re.match(r"(?:timm|facebook)/[\w.-]+$", plain) else re.split(r"[\\/]", plain)[-1]
    return _link(shown or plain, "missing", license_id, TIMM_SAYS if license_id else "")


def _link(name: str, kind: str, license_id: str | None = None, source: str = "", **more: str | None) -> Link:
    return {"name": name, "kind": kind, "license": license_id, "source": source} | {
        key: value for key, value in more.items() if value is not None
    }


def _repository(name: str) -> str | None:
    """Return the Hub id that a name stands for, None if it can be none."""
    plain = plain_name(name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", plain) and not name.startswith(("runs/", ".", "~")):
        return plain
    tagged = _with_tag(plain)
    return f"timm/{tagged}" if "/" not in plain and "." in tagged and timm_license(tagged) else None


def _download(repo: str, file: str, revision: str | None) -> Path:
    download = partial(hf_hub_download, repo, file, revision=revision)
    return Path(patient(f"reading {file} of {repo}", download, tries=2))  # the client tries six times each


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    try:
        path = try_to_load_from_cache(repo, file, revision=revision)
    except HFValidationError:  # it has the form of a Hub id, and is none: two dots, too long
        return None
    return Path(path) if isinstance(path, str) else None


def _license_of_card(path: Path) -> str | None:
    try:
        said = (metadata_load(path) or {}).get("license")
    except (ValueError, OSError):
        return None
    names = [one for one in (said if isinstance(said, list) else [said]) if isinstance(one, str)]
    return next((one for one in names if "-nc" in one), names[0] if names else None)


def _read(path: Path | None) -> Mapping[str, Any]:
    if path is None or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
