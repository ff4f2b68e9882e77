"""From the name of a model to its files: one answer for `from_pretrained`, `from_encoder` and the command line.

A name is a run folder, a checkpoint or model folder, an official `.pth` file or a Hub id. Run folders and checkpoints
are laid out as `hf_mae.training.checkpoint` says. Weights are safetensors: `model.safetensors`, or the files that
`model.safetensors.index.json` names beside itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from transformers.utils.hub import cached_file, extract_commit_hash

from hf_mae.patience import HTTP_ERROR, GaveUpError, is_worth_opening_again, one_line, patient, quick_look

ONE_OF_SEVERAL = (".bin", ".json", ".safetensors")
"""How files end that are one part of a model folder."""


class ModelFileError(ValueError, OSError):
    """A model has no usable files. Also an OSError, as `from_pretrained` of transformers raises for missing files."""


# ------------------------------------------------------------------------------------------------ names


def locate(name: str | os.PathLike[str], *, subfolder: str = "", field: str | None = None) -> Path | str:
    """Return where a model is, without asking the Hub.

    Args:
        name: a run folder (its newest whole checkpoint is meant), a checkpoint, `best` of a run, a model folder, an
            official `.pth` file, or a Hub id, also with `hf-hub:`.
        subfolder: of the folder.
        field: the argument that the name was given as, for messages.

    Returns:
        A model folder, a file, or a Hub id.

    Raises:
        ValueError: a path that does not exist or holds no model; also an OSError.
    """
    said = f"{field}={name}" if field else str(name)
    try:
        path = Path(name).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a zero byte
        raise ModelFileError(f"{said} is neither a path nor a Hub id ({error}); check the spelling") from error
    if is_file:
        if path.suffix in ONE_OF_SEVERAL:
            raise ModelFileError(f"{said} is a file; pass its folder, or call from_official for an official .pth file")
        return path
    if is_folder:
        return _in_folder(path / subfolder, said)
    text = str(name)
    hub_id = text.removeprefix("hf-hub:").removeprefix("hf_hub:")
    is_path = not isinstance(name, str) or text.startswith((".", "/", "~", "runs/"))
    if is_path or hub_id.count("/") > 1 or (field and hub_id.count("/") != 1):
        first = "; `hf-mae pretrain` makes runs/quickstart in two minutes" if text == "runs/quickstart" else ""
        raise ModelFileError(
            f"{said} does not exist; name a run folder, a model folder, an official .pth file or a Hub id "
            f"(ORG/NAME){first}"
        )
    return hub_id


def _in_folder(path: Path, said: str) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "checkpoints").is_dir():
        newest, skipped = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise ModelFileError(f"{said} holds no whole checkpoint. {'; '.join(skipped)}")
        return newest / "model"
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "recipe.json").is_file():
        raise ModelFileError(f"{said} is a run folder without a checkpoint; train it first, or name another model")
    raise ModelFileError(
        f"{said} is not a model folder (no config.json); name a run folder, a model folder, a Hub id or an official "
        ".pth file"
    )


def model_folder(name: str, *, field: str) -> Path | str:
    """Return where the weights of a model are, as `locate`; a Hub id has been opened.

    Raises:
        ValueError: a run folder without a whole checkpoint, a path that does not exist, or a Hub id that cannot be
            opened.
    """
    found = locate(name, field=field)
    if isinstance(found, Path):
        return found
    try:
        if (wrong := quick_look(found, "model")) is not None:
            raise wrong
        before = try_to_load_from_cache(found, "config.json")
        what = f"opening {found} on the Hub"
        config = patient(what, lambda: cached_file(found, "config.json"), passing=is_worth_opening_again)
        if config != before:  # a model that was opened before opens without the Hub
            _cache_processor(found)
    except (OSError, HTTP_ERROR, GaveUpError, HFValidationError) as error:
        raise _closed(f"{field}={name}", error) from error
    return found


def _closed(said: str, error: Exception) -> ModelFileError:
    text = str(error).strip() if isinstance(error, (OSError, HFValidationError)) else ""
    why = text.splitlines()[0].rstrip(".") if text else one_line(error)
    return ModelFileError(
        f"{said} is no path on this machine and cannot be opened as a Hub id ({why}); check the spelling and the "
        "network, and log in with `hf auth login` if it is private"
    )


def _cache_processor(name: str) -> None:
    """Fetch what the stock loader of processors does not wait for."""
    file = "preprocessor_config.json"
    with suppress(EntryNotFoundError):  # not every model has one; or no server answers, then who needs it says so
        patient(f"reading {file} of {name}", lambda: hf_hub_download(name, file), passing=is_worth_opening_again)


def fetch(name: str, *, subfolder: str = "", variant: str | None = None, **hub: Any) -> Path:
    """Return the folder of the Hub's cache with config and weights of a repository, all of one commit.

    Args:
        name: a Hub id.
        subfolder: of the repository.
        variant: of the weights, as for `from_pretrained`.
        hub: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

    Raises:
        ValueError: there is no such repository or revision, it has no config.json, or its index cannot be used; also an
            OSError.
        RuntimeError: the Hub did not answer in several tries.
    """

    def get(file: str, *, optional: bool = False) -> Path | None:
        options = {"subfolder": subfolder, "_raise_exceptions_for_missing_entries": not optional, **hub}
        try:
            found = patient(f"loading {file} of {name} from the Hub", lambda: cached_file(name, file, **options))
        except (OSError, HTTP_ERROR, HFValidationError) as error:
            raise _closed(name, error) from error
        return None if found is None else Path(found)

    config = get("config.json")
    assert config is not None
    hub["revision"] = extract_commit_hash(str(config), None) or hub.get("revision")
    whole = _whole(variant)
    if get(whole, optional=True) is None and (index := get(f"{whole}.index.json", optional=True)) is not None:
        for shard in sorted(set(read_index(index).values())):
            get(shard)
    return config.parent


# ------------------------------------------------------------------------------------------------ files


def read_config(folder: Path | str) -> dict[str, Any]:
    """Return the `config.json` of a model folder or of an opened Hub id, as it is written.

    Raises:
        ValueError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json" if isinstance(folder, Path) else Path(str(cached_file(folder, "config.json")))
    if not path.is_file():
        raise ModelFileError(f"{folder} is not a model folder (no config.json); name a model folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of a model.

    Raises:
        ValueError: it cannot be read, or is not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise ModelFileError(f"{path} holds {type(values).__name__}, not a JSON object; copy or download it again")
    return values


def _whole(variant: str | None) -> str:
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def index_of(folder: Path, *, variant: str | None = None) -> Path | None:
    """Return the index of the weights of a model folder, None where they are one file.

    Raises:
        ValueError: there are neither.
    """
    whole = folder / _whole(variant)
    if whole.is_file():
        return None
    index = folder / f"{whole.name}.index.json"
    if not index.is_file():
        pickled = ", ".join(sorted(path.name for path in folder.glob("*.bin"))[:3])
        has = f" but {pickled}" if pickled else ""
        raise ModelFileError(
            f"{folder} has no {whole.name}{has}; pickled weights are not read, as they can carry code. Use a revision "
            "that has safetensors, or load it with the library that wrote it and save it again"
        )
    return index


def weight_files(folder: Path, *, variant: str | None = None) -> list[Path]:
    """Return the files of weights of a model folder: one, or all that its index names.

    Raises:
        ValueError: there are none, the index cannot be used, or a file that it names is missing.
    """
    index = index_of(folder, variant=variant)
    if index is None:
        return [folder / _whole(variant)]
    files = [folder / name for name in sorted(set(read_index(index).values()))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ModelFileError(
            f"{index} names {len(missing)} of {len(files)} files that are not there: {', '.join(missing[:3])}; copy or "
            "download them again"
        )
    return files


def read_index(path: Path) -> dict[str, str]:
    """Return the `weight_map` of an index: names of weights to names of files beside it.

    Raises:
        ValueError: it has none, or a file would lie outside of its folder.
    """
    weights = read_json(path).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(file, str) for file in weights.values()):
        raise ModelFileError(f"{path} has no weight_map of weights to files; copy or download it again")
    for name, file in weights.items():
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise ModelFileError(
                f"{path} names the file {file!r} for {name}; only safetensors files beside the index are read"
            )
    return weights


# ------------------------------------------------------------------------------------------------ checkpoints of runs


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the committed checkpoint folders, oldest first, without checking what is in them."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder, or None if every file is what its manifest says."""
    try:
        entries = json.loads((checkpoint / "manifest.json").read_text())
        for name, (size, digest) in entries.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if sha256(path) != digest:
                return f"{name} does not match its SHA-256"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be used ({error})"
    return None


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and one line about each newer, damaged one."""
    skipped = []
    for checkpoint in reversed(list_checkpoints(folder)):
        if (wrong := damage(checkpoint)) is None:
            return checkpoint, skipped
        skipped.append(f"skipping damaged checkpoint {checkpoint}: {wrong}")
    return None, skipped


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
