"""`hf-mae pull`: a run that `hf-mae publish --checkpoint` put on the Hub, made into a run folder that goes on here.

Only safetensors and JSON are taken, by names that stay inside the folder; every file is compared with the hash in the
repository, and every checkpoint with its own manifest. The folder appears whole or not at all; a pull that was killed
keeps the files that had arrived.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.hf_api import RepoFile

from hf_mae.exporting.telling import silent
from hf_mae.hub.repository import check_token
from hf_mae.hub.stage import RUN, bytes_in_words, is_inside, is_same, read_file
from hf_mae.patience import HTTP_ERROR, GaveUpError, explain, patient
from hf_mae.training.checkpoint import RunLock, damage, list_checkpoints, write_atomic

ENDINGS = (".json", ".jsonl", ".safetensors")

PARTS = ("recipe.json", "model/", "training_state/", "data_state/")
"""What a run goes on from, of which a checkpoint's manifest names each."""


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
        ValueError: `out` exists, the repository cannot be read or holds no run that is whole.
        RuntimeError: the network failed, what arrived is damaged, or another pull fills `out`; the same command
            continues.
    """
    say, out = say or silent, Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out={out} exists; name another folder, or continue the run in it as it is")
    check_token()
    try:
        return _pull(repo_id, out, revision, say)
    except GaveUpError:
        raise
    except (OSError, HTTP_ERROR) as error:
        raise explain(error, repo_id=repo_id, what=f"pulling {repo_id}") from error


def _pull(repo_id: str, out: Path, revision: str | None, say: Callable[[str], None]) -> Path:
    api = HfApi(library_name="hf_mae")
    commit = patient(f"looking at {repo_id}", lambda: str(api.model_info(repo_id, revision=revision).sha), say=say)
    files = _files(api, repo_id, commit, say)
    partial = out.absolute().with_name(f".pull_{out.name}")
    lock = _begin(partial, {"repo_id": repo_id, "commit": commit})
    try:
        total = sum(file.size for file in files)
        say(f"{repo_id} at {commit[:10]}: {len(files)} files, {bytes_in_words(total)}")
        for file in files:
            _fetch(repo_id, commit, file, partial, say)
        run = partial / RUN.rstrip("/")
        say("comparing the checkpoints with their manifests")
        checkpoints = _check_run(repo_id, run)
        write_atomic(run / "last", checkpoints[-1].name + "\n")
        if out.exists():
            out.rmdir()  # it is empty
        os.rename(run, out)
        shutil.rmtree(partial, ignore_errors=True)  # some systems keep a file that is open: the lock
    finally:
        lock.release()
    say(f"{out}: continues at {checkpoints[-1].name}; run its command with --out {shlex.quote(str(out))}")
    return out


def _check_run(repo_id: str, run: Path) -> list[Path]:
    """Return the checkpoints, all of them whole; what the manifest does not name nobody has hashed."""
    checkpoints = list_checkpoints(run / "checkpoints")
    best = run / "best"
    for folder in [*checkpoints, *([best] if best.is_dir() else [])]:
        if (wrong := _lacking(folder, PARTS if folder != best else ("model/",)) or damage(folder)) is not None:
            kind = "best model" if folder == best else f"checkpoint, {folder.name}"
            raise ValueError(f"{repo_id} holds a damaged {kind}: {wrong}; pull another revision")
    return checkpoints


def _lacking(folder: Path, parts: tuple[str, ...]) -> str | None:
    """Say what a manifest does not name."""
    try:
        entries = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be used ({error})"
    if not isinstance(entries, dict) or not all(isinstance(e, list) and len(e) == 2 for e in entries.values()):
        return "manifest.json is no list of files with size and hash"
    if outside := [name for name in entries if not is_inside(name)]:
        return f"manifest.json names {outside[0]!r}"
    missing = [part for part in parts if not any(name == part or name.startswith(part) for name in entries)]
    return f"manifest.json names no {', '.join(missing)}" if missing else None


def _files(api: HfApi, repo_id: str, commit: str, say: Callable[[str], None]) -> list[RepoFile]:
    """List what is taken: records, the best model and checkpoints."""

    def listed() -> list[RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        return [entry for entry in entries if isinstance(entry, RepoFile) and entry.path.startswith(RUN)]

    found = patient(f"listing {repo_id}", listed, say=say)
    if outside := [file.path for file in found if not is_inside(file.path)]:
        raise ValueError(f"{repo_id} names {outside[0]!r}, which leads out of the folder; nothing of it is taken")
    taken = [file for file in found if file.path.endswith(ENDINGS) and not _is_other_step(file.path)]
    if left := sorted({file.path for file in found} - {file.path for file in taken}):
        say(f"left there, neither safetensors nor JSON of a run: {', '.join(left[:5])}")
    names = {file.path for file in taken}
    if f"{RUN}recipe.json" not in names or not any(
        _step_of(name) and name.endswith("/manifest.json") for name in names
    ):
        raise ValueError(
            f"{repo_id} holds no run that can be continued (no {RUN}recipe.json with {RUN}checkpoints/step_NUMBER); "
            "publish one with `hf-mae publish RUN ORG/NAME --checkpoint`"
        )
    return taken


def _step_of(path: str) -> re.Match[str] | None:
    return re.match(rf"{RUN}checkpoints/step_[0-9]+/", path)


def _is_other_step(path: str) -> bool:
    """Whether a path lies beside the checkpoints, in a folder that is none."""
    return path.startswith(f"{RUN}checkpoints/") and _step_of(path) is None


def _begin(partial: Path, source: dict[str, str]) -> RunLock:
    """Make the folder that fills, or take up the one that a killed pull of the same commit left; keep others out."""
    told = partial / "source.json"
    if (
        partial.exists()
        and not told.is_file()
        and (not partial.is_dir() or {p.name for p in partial.iterdir()} - {".lock"})
    ):
        raise ValueError(f"{partial} was not left by a pull (it has no source.json); move it away, or name another OUT")
    partial.mkdir(parents=True, exist_ok=True)
    lock = RunLock(partial)
    try:
        try:
            lock.acquire()
        except RuntimeError as error:
            raise RuntimeError(
                f"another process is pulling into the same OUT ({partial} is locked); wait for it, or name another OUT"
            ) from error
        if told.is_file() and told.read_text() != json.dumps(source):
            for path in partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        write_atomic(told, json.dumps(source))
    except BaseException:
        lock.release()
        raise
    return lock


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
