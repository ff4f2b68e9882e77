"""Checkpoints that are whole or absent: written aside, hashed, synced, renamed.

    checkpoints/step_00001000/
        model/                 a Hugging Face folder: config.json, model.safetensors
        model_ema/             the same with averaged weights, if the recipe asks for them
        training_state/        optimizer.safetensors (NAME/exp_avg, ...), state.json
        data_state/rank_*.json what only that rank knows: its part of the loss window, its random state
        recipe.json            the recipe of the run
        manifest.json          size and SHA-256 of every other file; written last
    last                       name of the newest, for people

One format for one process, DDP and FSDP2: whole tensors by parameter name, gathered to rank 0, without pickle. A
folder without a manifest that fits is damaged: it is named and skipped, never read. Deleting renames first, since
removing a tree is not atomic.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_mae.resolve import damage as damage
from hf_mae.resolve import list_checkpoints as list_checkpoints
from hf_mae.resolve import newest_checkpoint as newest_checkpoint
from hf_mae.resolve import sha256
from hf_mae.training.distributed import agree, full, shard_like
from hf_mae.training.optim import MovingAverage

PREFIX = "model."
"""A task holds its model under this name; checkpoints store the model's own names."""


@dataclass
class TrainState:
    """All that a run knows besides weights, optimizer and data: the same on every rank."""

    step: int = 0
    """Optimizer updates done."""
    examples_seen: int = 0
    trivial_loss: float | None = None
    """Loss of a prediction that ignores the input (for MAE: the mean patch), to judge the loss by."""
    bad_samples: int = 0
    """Samples that could not be decoded so far."""
    scaler: dict[str, Any] | None = None
    """State of the fp16 gradient scaler."""
    owes_evaluation: bool = False
    """The evaluation after the last update is still to come: a signal left no time, or it is the last of all."""
    best_value: float | None = None
    """The best value so far of the number that decides which model is kept."""
    best_step: int | None = None
    """Updates done when it was measured."""
    evaluations_since_best: int = 0
    stopped_early: bool = False
    """The run has ended before its last update, because it got no better."""


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` could not put back by itself."""

    state: TrainState
    rank_states: list[dict[str, Any]]
    """One per rank of the run that saved, in rank order."""
    recipe: dict[str, Any]
    data: dict[str, Any]
    """What the order of the samples depends on, as saved."""


# ------------------------------------------------------------------------------------------------ writing


def save_checkpoint(
    folder: Path,
    *,
    accelerator: Accelerator,
    task: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
    state: TrainState,
    rank_state: Mapping[str, Any],
    recipe: Mapping[str, Any],
    data: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write `folder/step_N` atomically, then prune to the newest `keep`. A collective: call it on all ranks.

    Raises:
        RuntimeError: the disk is full or cannot be written (on every rank); earlier checkpoints are untouched.
    """
    final, temporary = folder / f"step_{state.step:08d}", folder / f".tmp_step_{state.step:08d}"
    inner = accelerator.unwrap_model(task)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = gather_weights(task)
    moments = get_optimizer_state_dict(task, optimizer, options=options)
    shadow = gather_average(average) if average is not None else {}

    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            if wrong := next((k for k, v in weights.items() if not torch.isfinite(v).all()), None):
                raise FloatingPointError(
                    f"weight {wrong} is not finite after update {state.step}, so no checkpoint is written; the newest "
                    f"whole one is {_newest_name(folder)}. Lower --optim.base-lr or use --optim.clip-grad 1.0"
                )
            remove(temporary)
            temporary.mkdir(parents=True)
            sizes = (
                v.numel() * v.element_size() for v in [*weights.values(), *_flat_tensors(moments), *shadow.values()]
            )
            _require_room(folder, sum(sizes))
            inner.write_model(temporary / "model", weights)
            if shadow:
                inner.write_model(temporary / "model_ema", weights | shadow)
            _write_training_state(temporary / "training_state", moments, state, data)
            (temporary / "recipe.json").write_text(json.dumps(recipe, indent=2))
        except FloatingPointError as caught:
            error = caught
        except (OSError, RuntimeError, SafetensorError) as caught:
            error = _explain(caught, folder)
    agree(error, accelerator, f"writing {final}")

    error = None
    try:
        ranks = temporary / "data_state"
        ranks.mkdir(exist_ok=True)
        (ranks / f"rank_{accelerator.process_index}.json").write_text(json.dumps(rank_state))
    except OSError as caught:
        error = _explain(caught, folder)
    agree(error, accelerator, f"writing {final}")

    error = None
    if accelerator.is_main_process:
        try:
            commit(temporary, final)
            write_atomic(folder.parent / "last", final.name + "\n")
            prune(final, keep)
        except (OSError, RuntimeError) as caught:
            error = _explain(caught, folder)
    agree(error, accelerator, f"writing {final}")
    return final


def gather_weights(task: nn.Module) -> dict[str, Tensor]:
    """Return the model's whole weights and buffers by name, on the CPU of rank 0. A collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered: dict[str, Any] = get_model_state_dict(task, options=options)
    return {k.removeprefix(PREFIX): v.contiguous() for k, v in gathered.items()}


def gather_average(average: MovingAverage) -> dict[str, Tensor]:
    """Return the whole averaged weights by name, on the CPU. A collective."""
    return {k: full(v).cpu().contiguous() for k, v in average.state().items()}


def commit(temporary: Path, final: Path) -> None:
    """Hash every file into manifest.json, sync files and folders, and rename `temporary` to `final`."""
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    entries = {p.relative_to(temporary).as_posix(): [p.stat().st_size, sha256(p)] for p in files}
    (temporary / "manifest.json").write_text(json.dumps(entries, indent=1))
    for path in [*files, temporary / "manifest.json", *(p for p in temporary.rglob("*") if p.is_dir()), temporary]:
        _sync(path)
    old = None
    if final.exists():  # saved before its evaluation, damaged, or of a run that was taken up before it
        old = final.with_name(f".trash_{final.name}")
        os.rename(final, old)
    os.rename(temporary, final)
    _sync(final.parent)
    if old is not None:
        shutil.rmtree(old)


def remove(folder: Path) -> None:
    """Delete a folder in two steps, so that a kill in between leaves nothing that looks whole."""
    if folder.exists():
        trash = folder.with_name(f".trash_{folder.name}_{os.getpid()}")
        os.rename(folder, trash)
        shutil.rmtree(trash)


def prune(newest: Path, keep: int) -> None:
    """Delete the checkpoints beside `newest` that are older, but for `keep - 1` of them."""
    older = [c for c in list_checkpoints(newest.parent) if c.name < newest.name]
    for old in older[: max(0, len(older) - max(keep, 1) + 1)]:
        remove(old)


def put_back(final: Path) -> None:
    """Undo a `commit` that was killed between its two renames: the folder it was replacing comes back."""
    old = final.with_name(f".trash_{final.name}")
    if old.is_dir() and not final.exists():
        os.rename(old, final)


def clean(folder: Path) -> None:
    """Remove what a killed run left behind: half-written and half-deleted checkpoints."""
    for step in (p.name.removeprefix(".trash_step_") for p in folder.glob(".trash_step_*")):
        if step.isdigit():  # those of `remove` have a process id as well
            put_back(folder / f"step_{step}")
    for leftover in [*folder.glob(".tmp_*"), *folder.glob(".trash_*")]:
        shutil.rmtree(leftover)


def _write_training_state(folder: Path, moments: Mapping[str, Any], state: TrainState, data: Mapping[str, Any]) -> None:
    folder.mkdir()
    tensors, scalars = {}, {}
    for name, values in moments["state"].items():
        for key, value in values.items():
            kind = f"{name.removeprefix(PREFIX)}/{key}"
            if isinstance(value, Tensor):
                tensors[kind] = value.contiguous()
            else:
                scalars[kind] = value
    save_file(tensors, folder / "optimizer.safetensors")
    groups = []
    for group in moments["param_groups"]:  # LAMB counts its updates there, in a tensor
        plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items()}
        groups.append(plain | {"params": [n.removeprefix(PREFIX) for n in group["params"]]})
    values = {"state": asdict(state), "data": data, "param_groups": groups, "optimizer_scalars": scalars}
    (folder / "state.json").write_text(json.dumps(values, indent=1))


def _flat_tensors(moments: Mapping[str, Any]) -> list[Tensor]:
    return [v for values in moments["state"].values() for v in values.values() if isinstance(v, Tensor)]


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free")


def _explain(error: Exception, folder: Path) -> RuntimeError:
    """Say what a failed write means: torch and safetensors hide a full disk behind messages of their own."""
    whole = list_checkpoints(folder)
    previous = f"the newest whole checkpoint is {_newest_name(folder)}" if whole else "there is no earlier checkpoint"
    free = shutil.disk_usage(folder).free if folder.exists() else 0
    return RuntimeError(
        f"no checkpoint could be written under {folder}: {error} ({free / 1e6:.1f} MB free there); {previous}. "
        "Free some space or lower --engine.keep-checkpoints, then run the same command again to continue"
    )


def _newest_name(folder: Path) -> str:
    return str(next(reversed(list_checkpoints(folder)), "none"))


def write_atomic(path: Path, text: str) -> None:
    """Replace a small file so that a reader sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    is_folder = path.is_dir()
    try:
        # Windows syncs only what may be written, and opens no folder: there a rename is not made to last.
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ reading


def read_data_state(checkpoint: Path) -> dict[str, Any]:
    """Return what the order of the samples depended on when a checkpoint was written."""
    return json.loads((checkpoint / "training_state" / "state.json").read_text())["data"]


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """Return the recipe a checkpoint was written with."""
    return json.loads((checkpoint / "recipe.json").read_text())


def load_checkpoint(
    checkpoint: Path, *, task: nn.Module, optimizer: torch.optim.Optimizer, average: MovingAverage | None
) -> Loaded:
    """Put weights, optimizer state and moving average back, in place, under any kind of parallelism.

    A collective under FSDP2: call it on all ranks, each of which reads the files.

    Raises:
        ValueError: names or shapes are not those of this model.
    """
    weights = load_file(checkpoint / "model" / "model.safetensors")
    options = StateDictOptions(full_state_dict=True)
    own: dict[str, Any] = get_model_state_dict(task)
    expected = {k.removeprefix(PREFIX): v.shape for k, v in own.items()}
    found = {k: v.shape for k, v in weights.items()}
    if wrong := sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k)):
        listed = ", ".join(f"{k} (saved {_shape(found, k)}, model {_shape(expected, k)})" for k in wrong[:4])
        raise ValueError(
            f"checkpoint {checkpoint} is of another architecture: {listed}; {len(wrong)} tensors differ in all"
        )
    set_model_state_dict(task, {PREFIX + k: v for k, v in weights.items()}, options=options)

    saved = json.loads((checkpoint / "training_state" / "state.json").read_text())
    moments: dict[str, Any] = {}
    tensors = load_file(checkpoint / "training_state" / "optimizer.safetensors")
    for key, value in [*tensors.items(), *saved["optimizer_scalars"].items()]:
        name, kind = key.rsplit("/", 1)
        moments.setdefault(PREFIX + name, {})[kind] = value
    for group in saved["param_groups"]:
        if "betas" in group:  # JSON has no tuples
            group["betas"] = tuple(group["betas"])
        group["params"] = [PREFIX + name for name in group["params"]]
    if moments:
        set_optimizer_state_dict(
            task, optimizer, {"state": moments, "param_groups": saved["param_groups"]}, options=options
        )
        _lay_out_as_parameters(optimizer)
    if average is not None:
        shadow = load_file(checkpoint / "model_ema" / "model.safetensors")
        for name, own_shadow in average.state().items():
            own_shadow.copy_(shard_like(shadow[name].to(own_shadow.device), own_shadow))
    ranks = sorted((checkpoint / "data_state").glob("rank_*.json"), key=lambda p: int(p.stem.split("_")[1]))
    return Loaded(
        state=TrainState(**saved["state"]),
        rank_states=[json.loads(p.read_text()) for p in ranks],
        recipe=read_recipe(checkpoint),
        data=saved["data"],
    )


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the strides of their parameters, which files do not keep: fused steps go by raw memory."""
    for parameter, values in optimizer.state.items():
        for kind, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[kind] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return "x".join(map(str, shapes[name])) if name in shapes else "absent"


# ------------------------------------------------------------------------------------------------ one run per folder


class RunLock:
    """An advisory lock on a run folder; the kernel drops it when the process and its children are gone.

    Where the file system has no locks, the file tells which process took it last: one that still runs on this machine
    is refused, and of one on another machine nothing can be known.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.file = self.path.open("a+")
        self.held = False

    def acquire(self) -> str | None:
        """Take the lock.

        Returns:
            A warning where the file system has no locks and a process of another machine may be writing, else None.

        Raises:
            RuntimeError: another process holds it.
        """
        warning = None
        with suppress(ImportError):  # no fcntl on Windows
            import fcntl

            deadline = time.monotonic() + 10
            while True:
                try:
                    fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    owner = self._owner()
                    # The decode processes of a killed run hold its lock for the moments they outlive it.
                    if time.monotonic() < deadline and (owner is None or owner.is_gone()):
                        time.sleep(0.1)
                        continue
                    raise self._in_use(owner) from None
                except OSError:  # some network file systems have no locks
                    warning = self._refuse_owner()
                    break
        self.held = True
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps(asdict(_Owner.here())))
        self.file.flush()
        return warning

    def release(self) -> None:
        """Give the lock back."""
        if self.held:
            with suppress(OSError):
                self.file.truncate(0)
        self.file.close()

    def _owner(self) -> _Owner | None:
        """Return who took the lock last, None after a clean end."""
        self.file.seek(0)
        text = self.file.read()
        with suppress(ValueError, TypeError):
            return _Owner(int(text)) if text.strip().isdigit() else _Owner(**json.loads(text))
        return None

    def _in_use(self, owner: _Owner | None) -> RuntimeError:
        process = "?" if owner is None else f"{owner.pid} on {owner.host}" if owner.is_elsewhere() else str(owner.pid)
        return RuntimeError(
            f"{self.path.parent} is in use by process {process}; wait for it, stop it, or choose another --out"
        )

    def _refuse_owner(self) -> str | None:
        owner = self._owner()
        if owner is None or owner == _Owner.here():
            return None
        if owner.is_elsewhere():
            return (
                f"warning: the file system of {self.path.parent} has no locks, and process {owner.pid} on {owner.host} "
                "has not said that it has ended; two runs in one folder damage each other"
            )
        if not owner.is_gone():
            raise self._in_use(owner)
        return None


@dataclass(frozen=True)
class _Owner:
    """The process that holds a lock, as its file says."""

    pid: int
    host: str | None = None
    """None as written by earlier versions."""
    started: float | None = None
    """Seconds since the epoch: process numbers are given out again."""

    @classmethod
    def here(cls) -> _Owner:
        return cls(os.getpid(), platform.node(), psutil.Process().create_time())

    def is_elsewhere(self) -> bool:
        return self.host not in (None, platform.node())

    def is_gone(self) -> bool:
        """Return whether it has surely ended."""
        if self.is_elsewhere():
            return False
        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False
        return self.started is not None and abs(started - self.started) > 2
