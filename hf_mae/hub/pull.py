"""`hf-mae pull`: a run that `hf-mae publish --checkpoint` put on the Hub, made into a run folder that goes on here.

Only safetensors and JSON are taken, by names that stay inside the folder; every file is compared with the hash in the
repository, and every checkpoint with its own manifest. The folder appears whole or not at all; a pull that was killed
keeps the files that had arrived.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from hf_mae.hub.stage import RUN, bytes_in_words, is_inside, is_same, read_file
from hf_mae.patience import HTTP_ERROR, GaveUpError, explain, patient
from hf_mae.training.checkpoint import damage, list_checkpoints, write_atomic

ENDINGS = (".json", ".jsonl", ".safetensors")


def pull(
    repo_id: str,
    out: str | os.PathLike[str],
    *,
    revision: str | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Make a run folder from the checkpoint in a repository.

    Args:
        repo_id: ORG/NAME.
        out: the run folder to make; `--out` of the command that continues.
        revision: branch, tag or commit; None is main.
        say: called with lines for the user; None drops them.

    Returns:
        The run folder.

    Raises:
        ValueError: `out` exists, the repository cannot be read or holds no run.
        RuntimeError: the network failed, or what arrived is damaged; the same command continues.
    """
    say, out = say or _quiet, Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists; name another folder, or continue the run in it as it is")
    try:
        return _pull(repo_id, out, revision, say)
    except GaveUpError:
        raise
    except (OSError, HTTP_ERROR) as error:
        raise explain(error, repo_id=repo_id, what=f"pulling {repo_id}") from error


def _quiet(line: str) -> None:
    del line


def _pull(repo_id: str, out: Path, revision: str | None, say: Callable[[str], None]) -> Path:
    api = HfApi(library_name="hf_mae")
    commit = patient(f"looking at {repo_id}", lambda: str(api.model_info(repo_id, revision=revision).sha), say=say)
    files = _files(api, repo_id, commit, say)
    partial = out.absolute().with_name(f".pull_{out.name}")
    _begin(partial, {"repo_id": repo_id, "commit": commit})
    total = sum(file.size for file in files)
    say(f"{repo_id} at {commit[:10]}: {len(files)} files, {bytes_in_words(total)}")
    for file in files:
        _fetch(repo_id, commit, file, partial, say)
    run = partial / RUN.rstrip("/")
    checkpoints = list_checkpoints(run / "checkpoints")
    for checkpoint in checkpoints:
        if (wrong := damage(checkpoint)) is not None:
            raise ValueError(f"{repo_id} holds a damaged checkpoint, {checkpoint.name}: {wrong}; pull another revision")
    write_atomic(run / "last", checkpoints[-1].name + "\n")
    if out.exists():
        out.rmdir()  # it is empty
    os.rename(run, out)
    shutil.rmtree(partial)
    say(f"{out}: continues at {checkpoints[-1].name}; run its command with --out {out}")
    return out


def _files(api: HfApi, repo_id: str, commit: str, say: Callable[[str], None]) -> list[RepoFile]:
    """List what is taken: records, the best model and checkpoints."""

    def listed() -> list[RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        return [entry for entry in entries if isinstance(entry, RepoFile) and entry.path.startswith(RUN)]

    found = patient(f"listing {repo_id}", listed, say=say)
    if outside := [file.path for file in found if not is_inside(file.path)]:
        raise ValueError(f"{repo_id} names {outside[0]!r}, which leads out of the folder; nothing of it is taken")
    taken = [file for file in found if file.path.endswith(ENDINGS)]
    if left := [file.path for file in found if not file.path.endswith(ENDINGS)]:
        say(f"left there, neither safetensors nor JSON: {', '.join(left[:5])}")
    if not any(file.path.endswith("/manifest.json") and "/checkpoints/step_" in f"/{file.path}" for file in taken):
        raise ValueError(
            f"{repo_id} holds no run that can be continued (no {RUN}checkpoints/step_*); publish one with "
            "`hf-mae publish RUN ORG/NAME --checkpoint`"
        )
    return taken


def _begin(partial: Path, source: dict[str, str]) -> None:
    """Make the folder that fills, or take up the one that a killed pull of the same commit left."""
    told = partial / "source.json"
    if partial.exists() and (not told.is_file() or told.read_text() != json.dumps(source)):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomic(told, json.dumps(source))


def _fetch(repo_id: str, commit: str, file: RepoFile, partial: Path, say: Callable[[str], None]) -> None:
    names = partial / file.path
    if names.is_file() and _is_whole(names, file):
        return
    names.unlink(missing_ok=True)
    patient(
        f"downloading {file.path} of {repo_id}",
        lambda: hf_hub_download(repo_id, file.path, revision=commit, local_dir=partial),
        say=say,
    )
    if not _is_whole(names, file):
        names.unlink()
        raise RuntimeError(f"{file.path} of {repo_id} arrived damaged; run the same command again")


def _is_whole(path: Path, file: RepoFile) -> bool:
    here = read_file(path, file.path)
    return here.size == file.size and is_same(file, [here.sha256, here.blob])
