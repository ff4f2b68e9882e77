"""The run folder: who may write it, where a run starts, and what is put on record about each start.

runs/NAME/ holds recipe.json, environment.json, metrics.jsonl, bad_samples.jsonl, pictures/, checkpoints/ and `last`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_mae.recipes.base import Recipe, changed_fields, from_dict, to_dict
from hf_mae.training.checkpoint import (
    RunLock,
    TrainState,
    clean,
    damage,
    newest_checkpoint,
    prune,
    read_recipe,
    write_atomic,
)
from hf_mae.training.distributed import agree, gather_objects
from hf_mae.training.monitors import Printer, Window, read_rows

PACKAGES = (
    *("hf_mae", "torch", "transformers", "timm", "accelerate", "datasets", "numpy"),
    *("pillow", "simplejpeg", "pyarrow", "safetensors"),
)

RECORDS = ("recipe.json", "metrics.jsonl", "environment.json", "evaluation.json")
"""Files that a run writes beside its checkpoints."""

SHARED_WITHIN = 20.0
"""Seconds in which a file that one node has written is to be seen by the others."""

BITWISE = ("processes", "micro_batch", "device", "device_name", "cpu_threads", "cuda", "cudnn")
"""What the last bits of a sum depend on besides the recipe, as recorded in environment.json."""

_OF_A_START = frozenset(
    {"checkpoints", ".lock", "recipe.json", "environment.json", "metrics.jsonl", "events", "pictures"}
)
"""What lies in a run folder before the first update. Not bad_samples.jsonl: it says why a run could not start."""


def check_names_are_free(out: Path, mark: str, names: Sequence[str]) -> None:
    """Refuse to write files into a folder that has some of these names from elsewhere.

    Args:
        out: the folder; it need not exist.
        mark: the file or folder that is there wherever these files were written by us.
        names: of the files that are going to be written.

    Raises:
        ValueError: `mark` is not there, and one of the files is.
    """
    taken = [] if (out / mark).exists() else [name for name in names if (out / name).exists()]
    if taken:
        raise ValueError(
            f"out={out} holds {', '.join(taken)} that would be overwritten and is not known to be ours (there is no "
            f"{mark} beside it); choose another --out, or move {'it' if len(taken) == 1 else 'them'} away"
        )


@contextmanager
def open_run_folder(recipe: Recipe, accelerator: Accelerator) -> Iterator[Path]:
    """Make, lock and tidy the run folder; the main process holds the lock until the run ends.

    A folder that was made for a run which then failed to start, or was interrupted, is removed again.
    """
    out = Path(recipe.out or f"runs/{recipe.name}")
    error, lock, made = None, None, list[Path]()
    try:
        if accelerator.is_main_process:
            try:
                if recipe.resume != "never":  # which refuses what is there by itself
                    check_names_are_free(out, "checkpoints", RECORDS)
                absent = [folder for folder in (out, *out.parents) if not folder.exists()]
                (out / "checkpoints").mkdir(parents=True, exist_ok=True)
                lock = RunLock(out)
                if warning := lock.acquire():
                    Printer(True)(warning)
                made = absent
                clean(out / "checkpoints")
                for left in out.glob(".shared_*"):
                    left.unlink(missing_ok=True)
                (out / "stopped_by_signal").unlink(missing_ok=True)
            except (RuntimeError, ValueError) as caught:
                error = caught
            except OSError as caught:
                error = ValueError(f"out={out} cannot be written ({caught}); choose another --out or free some space")
        agree(error, accelerator, f"opening {out}")
        _require_one_folder(out, accelerator)
        yield out
        made = []
    except OSError as caught:
        if caught.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            f"{caught}: the disk of out={out} is full. What was saved is whole; free some space and run the same "
            "command again to continue"
        ) from caught
    except FloatingPointError:
        made = []  # it did train
        raise
    finally:
        _remove_failed_start(out, made)
        if lock is not None:
            lock.release()


def _remove_failed_start(out: Path, made: list[Path]) -> None:
    """Remove the folders that a start made, unless there is something in them that is worth keeping."""
    if out not in made:
        return
    rows = read_rows(out / "metrics.jsonl")
    if any("loss" in row for row in rows) or any((out / "checkpoints").glob("step_*")):
        return
    if {entry.name for entry in out.iterdir()} - _OF_A_START:
        return
    shutil.rmtree(out, ignore_errors=True)
    with suppress(OSError):  # the folders above may hold other runs by now
        for folder in made[1:]:
            folder.rmdir()


def _require_one_folder(out: Path, accelerator: Accelerator) -> None:
    """Refuse a run folder that is another one on some machine. A collective: call it on all ranks.

    Rank 0 writes a file under a name of its own, which no file system has cached, and every rank has to see it.

    Raises:
        ValueError: on every rank, with the machines and the path.
    """
    if accelerator.num_processes == 1:
        return
    error, token = None, out / f".shared_{secrets.token_hex(8)}"
    if accelerator.is_main_process:
        try:
            token.touch()
        except OSError as caught:
            error = ValueError(f"out={out} cannot be written ({caught}); choose another --out or free some space")
    agree(error, accelerator, f"opening {out}")
    token = out / gather_objects(token.name, accelerator)[0]
    deadline = time.monotonic() + SHARED_WITHIN
    while not (seen := _is_there(token)) and time.monotonic() < deadline:
        time.sleep(0.1)
    everyone = gather_objects((platform.node(), str(out.absolute()), seen), accelerator)
    if accelerator.is_main_process:
        token.unlink(missing_ok=True)
    first, path, _ = everyone[0]
    if missing := [f"{there} on {host}" for host, there, seen in everyone if not seen]:
        raise ValueError(
            f"out={out}: the run folder is not shared: what rank 0 wrote to {path} on {first} is not in "
            f"{', '.join(dict.fromkeys(missing))}; choose an --out that all nodes share, written as an absolute "
            "path"
        )


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a folder that may not be read, before Python 3.12
        return False


def find_start(
    recipe: Recipe,
    out: Path,
    accelerator: Accelerator,
    say: Printer,
    *,
    as_saved: Callable[[Recipe, Path], Recipe] = lambda recipe, _: recipe,
) -> Path | None:
    """Return the checkpoint to continue from: the run folder's newest whole one, the one asked for, or none.

    `as_saved` returns the recipe with what was adapted when the run of a checkpoint was started.
    """
    found: tuple[Path | None, list[str]] | None = None
    error = None
    if accelerator.is_main_process:
        try:
            found = _choose_checkpoint(recipe, out)
            if found[0] is not None:
                found[1].extend(_check_recipe(as_saved(recipe, found[0]), found[0]))
                if recipe.resume == "auto":
                    prune(found[0], recipe.engine.keep_checkpoints)
        except (ValueError, OSError) as caught:
            error = caught
    agree(error, accelerator, "looking for a checkpoint")
    found = gather_objects(found, accelerator)[0]
    assert found is not None
    for line in found[1]:
        say(line)
    return found[0]


def _choose_checkpoint(recipe: Recipe, out: Path) -> tuple[Path | None, list[str]]:
    if recipe.resume == "never":
        if newest_checkpoint(out / "checkpoints") != (None, []) or read_rows(out / "metrics.jsonl"):
            raise ValueError(
                f"resume=never but out={out} holds a run; choose another --out, or --resume auto to continue it"
            )
        return None, []
    if recipe.resume == "auto":
        found, skipped = newest_checkpoint(out / "checkpoints")
        if found is None and skipped:
            raise ValueError(
                "; ".join(skipped) + f". No whole checkpoint is left in {out}; choose another --out to start anew"
            )
        return found, skipped
    path = Path(recipe.resume)
    if (path / "checkpoints").is_dir():
        found, skipped = newest_checkpoint(path / "checkpoints")
        if found is None:
            raise ValueError(f"resume={recipe.resume} holds no whole checkpoint. {'; '.join(skipped)}")
        return found, skipped
    if not (path / "manifest.json").is_file():
        raise ValueError(
            f"resume={recipe.resume} is neither auto, never, nor a checkpoint folder (one with a manifest.json)"
        )
    if (wrong := damage(path)) is not None:
        raise ValueError(f"resume={recipe.resume} is damaged: {wrong}; name another checkpoint")
    return path, []


def _check_recipe(recipe: Recipe, checkpoint: Path) -> list[str]:
    """Refuse a recipe that decides otherwise than the saved one; return what changes all the same."""
    values, notes = read_recipe(checkpoint), []
    evals = values.get("evals", {})
    if hasattr(recipe.evals, "crop_pct") and "crop_pct" not in evals:
        values = {**values, "evals": {**evals, "crop_pct": recipe.evals.crop_pct}}
        if "architecture" not in values.get("model", {}):  # models of timm have a crop of their own
            notes = [
                "note: this run began when evaluation left images of exactly the input size as they are; from here on "
                f"evals.crop_pct={recipe.evals.crop_pct} holds for them too (1 shows the whole of them)"
            ]
    if changed := changed_fields(from_dict(values, type(recipe)), recipe):
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"{checkpoint} was written by another recipe: {listed}. Use the saved values to continue, or another "
            "--out to start a new run"
        )
    return notes


def restore_rank(rank_states: list[dict[str, Any]], window: Window, accelerator: Accelerator) -> None:
    """Take up this rank's part of the loss window; with another number of ranks the first takes all."""
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(rank_states) == world:
        window.load(rank_states[rank]["window"])
        torch.set_rng_state(torch.tensor(rank_states[rank]["torch_rng"], dtype=torch.uint8))
        return
    windows = [saved["window"] for saved in rank_states]
    merged = {name: math.fsum(w["sums"].get(name, 0.0) for w in windows) for w0 in windows[:1] for name in w0["sums"]}
    count = sum(w["count"] for w in windows)
    window.load({"sums": merged if rank == 0 else dict.fromkeys(merged, 0.0), "count": count if rank == 0 else 0})


def record_start(
    out: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    state: TrainState,
    data_state: Mapping[str, Any],
    micro_batch: int,
    say: Printer,
    *,
    tested_on: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Append this start to environment.json: versions, machine, launch, data. The first also writes recipe.json.

    `tested_on` names the split that is measured on; `origin` says what the weights of a new run were made from.
    """
    pids = gather_objects(os.getpid(), accelerator)
    if not accelerator.is_main_process:
        return
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": state.step,
        "processes": accelerator.num_processes,
        "micro_batch": micro_batch,
        "pids": pids,
        "distributed_type": str(accelerator.distributed_type),
        "device": str(accelerator.device),
        **describe_device(accelerator.device),
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "launcher": "torchrun or accelerate" if "TORCHELASTIC_RUN_ID" in os.environ else "python",
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "packages": {name: version(name) for name in PACKAGES},
        "data": dict(data_state),
        "tested_on": tested_on,
        "seed": recipe.seed,
        **(origin or {}),
    }
    path = out / "environment.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() and state.step else []
    if starts:
        packages = ("torch", "pillow", "simplejpeg")  # what computes and what decodes
        before, now = (
            # Older versions recorded less: what is not there has not changed.
            {k: s.get(k, start[k]) for k in BITWISE} | {k: s["packages"].get(k, "absent") for k in packages}
            for s in (starts[-1], start)
        )
        if changed := [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]:
            say(f"note: {'; '.join(changed)}: the run goes on, equal up to rounding but not to the last bit")
    write_atomic(path, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")
    if not starts:
        write_atomic(out / "recipe.json", json.dumps(to_dict(recipe), indent=2) + "\n")


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return what a GPU and its software are, for environment.json; None where a field does not apply."""
    facts: dict[str, Any] = dict.fromkeys(("device_name", "gpus_visible", "driver", "cuda", "cudnn", "hip"))
    if device.type != "cuda":
        return facts
    driver = Path("/proc/driver/nvidia/version")
    version_line = driver.read_text() if driver.is_file() else ""
    number = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", version_line)
    return facts | {
        "device_name": torch.cuda.get_device_name(device),
        "gpus_visible": torch.cuda.device_count(),
        "driver": number[0] if number else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "hip": torch.version.hip,
    }


def require_same_on_all_ranks(values: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Compare what decides the run over ranks. A collective: call it on all ranks.

    Raises:
        RuntimeError: a rank differs from the first.
    """
    everyone = gather_objects(json.dumps(dict(values), sort_keys=True, default=str), accelerator)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise RuntimeError(
                f"rank {rank} was started with another recipe or sees other data than rank 0; start all alike"
            )


def last_micro_batch(out: Path, share: int, accelerator: Accelerator) -> int | None:
    """Return the micro-batch of the run's last start, if it divides `share`: a resumed run then keeps its bits."""
    found, error = None, None
    if accelerator.is_main_process and (path := out / "environment.json").exists():
        try:
            found = json.loads(path.read_text())["starts"][-1]["micro_batch"]
        except (ValueError, KeyError, IndexError) as caught:
            error = ValueError(f"{path} cannot be read ({caught}); give --micro-batch a number")
    agree(error, accelerator, "reading the last micro-batch")
    found = gather_objects(found, accelerator)[0]
    return found if found is not None and share % found == 0 else None
