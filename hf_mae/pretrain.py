"""Masked-autoencoder pretraining from a recipe: where data, model, task, loop and monitors are put together.

Run folder: recipe.json, environment.json, metrics.jsonl, bad_samples.jsonl, pictures/, checkpoints/, last.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoImageProcessor

from hf_mae.data.images import ImageError, decode_image, eval_image
from hf_mae.data.loader import Loader, check_state, load_examples, loader_state, steps_per_epoch
from hf_mae.data.order import NOISE, Order, choose_lanes_and_window, uniforms
from hf_mae.data.sources import Source, list_splits, open_source
from hf_mae.evaluation.features import FeatureQuality
from hf_mae.evaluation.reconstruction import Pictures, reconstruct
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.masking import mask_noise, num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.recipes.base import Recipe, changed_fields, from_dict, to_dict
from hf_mae.training import checkpoint as checkpoints
from hf_mae.training.checkpoint import RunLock, TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from hf_mae.training.distributed import agree, describe_world, gather_objects, make_accelerator
from hf_mae.training.loop import fit
from hf_mae.training.monitors import Clock, Monitor, Window, read_rows
from hf_mae.training.optim import MovingAverage, build_adamw
from hf_mae.training.schedules import make_plan
from hf_mae.training.signals import StopSignal
from hf_mae.training.tasks import Pretraining

MAX_MICRO_BATCH = 64
"""Micro-batch when none is given: the largest divisor of a process's share up to this."""

BITWISE = ("processes", "device", "cpu_threads")
"""What the last bits of a sum depend on besides the recipe, as recorded in environment.json."""


def pretrain(recipe: Recipe) -> Path:
    """Pretrain a masked autoencoder, or continue the run in `recipe.out`.

    Everything a user can get wrong is checked before the first update. A collective: every process calls it.

    Returns:
        The run folder.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    config = MAEConfig(**asdict(recipe.model))
    accelerator = make_accelerator(recipe.engine)
    say = _Printer(accelerator.is_main_process)
    micro_batch = choose_micro_batch(recipe, accelerator.num_processes)
    say(f"hf_mae: {recipe.name}, {describe_world(accelerator)}")

    with _run_folder(recipe, accelerator) as out:
        _run(recipe, config, out, accelerator, micro_batch, say)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return out


def _run(
    recipe: Recipe, config: MAEConfig, out: Path, accelerator: Accelerator, micro_batch: int, say: _Printer
) -> None:
    source = open_source(recipe.data)
    say(source.summary())
    plan = make_plan(
        recipe, steps_per_epoch=steps_per_epoch(int(source.sizes.sum()), recipe.global_batch, recipe.data.remainder)
    )

    resume_from = _find_start(recipe, out, accelerator, say)
    torch.manual_seed(recipe.seed)  # the same weights on every rank; nothing else draws from it
    model = MAEForPreTraining(config)
    if recipe.engine.checkpoint_activations:
        # Renamed after transformers 5.20; the old name warns.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if recipe.engine.compile:
        for block in [*model.blocks, *model.decoder_blocks]:
            block.compile()  # in place, so that parameter names stay
    task: nn.Module = Pretraining(model, recipe.augment.mean, recipe.augment.std)
    optimizer: Any = build_adamw(task, recipe.optim)
    task, optimizer = accelerator.prepare(task, optimizer)
    for method in ("features", "predict"):  # only FSDP2 takes notice
        register_fsdp_forward_method(accelerator.unwrap_model(task), method)
    average = MovingAverage(task, recipe.optim.ema_decay) if recipe.optim.ema_decay is not None else None

    order = Order(source.sizes, recipe.seed, *choose_lanes_and_window(source.sizes, source.bytes_per_row, recipe.data))
    loader_arguments: dict[str, Any] = {
        "augment": recipe.augment,
        "image_size": height_width(config.image_size),
        "channels": config.num_channels,
        "global_batch": recipe.global_batch,
        "rank": accelerator.process_index,
        "world": accelerator.num_processes,
        "remainder": recipe.data.remainder,
        "num_workers": recipe.num_workers,
        "worker_kind": recipe.data.workers,
        "max_bad_fraction": recipe.data.max_bad_fraction,
        "max_pixels": recipe.data.max_pixels,
        "extras": MaskNoise(config, recipe.seed),
    }
    data_state = loader_state(source, order, recipe.global_batch, recipe.data.remainder)
    data_state["revision"] = source.revision

    state, window = TrainState(), Window(accelerator.device)
    if resume_from is not None:
        clock = Clock()
        loaded = load_checkpoint(
            resume_from, task=accelerator.unwrap_model(task), optimizer=optimizer.optimizer, average=average
        )
        check_state(loaded.data, data_state, loaded.state.step)
        state = loaded.state
        _restore_rank(loaded.rank_states, window, accelerator)
        if state.scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        say(f"resuming at step {state.step} of {plan.total_steps} from {resume_from} ({clock.lap():.1f} s)")
    elif accelerator.is_main_process:
        (out / "recipe.json").write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
    _record_start(out, recipe, accelerator, state, data_state, say)
    _same_on_all_ranks({"recipe": to_dict(recipe), "data": data_state, "step": state.step}, accelerator)

    loader = Loader(source, order, cursor=state.step, stop=plan.total_steps, **loader_arguments)
    for line in loader.describe():
        say(line)
    parameters, world = sum(p.numel() for p in model.parameters()), accelerator.num_processes
    say(
        f"{parameters / 1e6:.2f} M parameters; {plan.total_steps} updates of {recipe.global_batch} images "
        f"({world} x {recipe.global_batch // micro_batch // world} x {micro_batch}: processes, micro-batches, images), "
        f"{plan.steps_per_epoch:.2f} an epoch; lr up to {plan.lr:.3g} after {plan.warmup_steps:.0f} updates; "
        f"run folder {out}"
    )
    if state.step >= plan.total_steps:
        say(
            f"this run is finished ({state.step} updates); nothing to do. --resume never with another --out starts anew"
        )

    def save(current: TrainState, sums: Window) -> Path:
        current.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        return save_checkpoint(
            out / "checkpoints",
            accelerator=accelerator,
            task=accelerator.unwrap_model(task),
            optimizer=optimizer.optimizer,
            average=average,
            state=current,
            rank_state={"cursor": current.step, "window": sums.state(), "torch_rng": torch.get_rng_state().tolist()},
            recipe=to_dict(recipe),
            data=data_state,
            keep=recipe.engine.keep_checkpoints,
        )

    monitor = Monitor(
        out,
        step=state.step if resume_from is not None else -1,
        total_steps=plan.total_steps,
        judge_from=max(100, math.ceil(2 * plan.warmup_steps)),
        track=recipe.engine.track,
        is_main=accelerator.is_main_process,
        name=recipe.name,
    )
    stop = StopSignal(accelerator.num_processes)
    try:
        evaluators: list[Any] = []
        if state.step < plan.total_steps:
            evaluators, state.trivial_loss = _evaluators(recipe, config, source, out, accelerator, task, state, say)
        monitor.trivial_loss = state.trivial_loss
        with loader:
            loader.count_bad(read_rows(out / "bad_samples.jsonl"))
            outcome = fit(
                task,
                optimizer,
                loader,
                recipe=recipe,
                plan=plan,
                micro_batch=micro_batch,
                accelerator=accelerator,
                state=state,
                window=window,
                monitor=monitor,
                stop=stop,
                save=save,
                evaluators=evaluators,
                average=average,
            )
    finally:
        monitor.close()
        stop.close()
    if outcome == "stopped":
        if accelerator.is_main_process:
            (out / "stopped_by_signal").write_text(f"{stop.received or 'another rank'} at step {state.step}\n")
        say(f"stopped by a signal after step {state.step}, saved; the same command continues")
    else:
        _finish(recipe, out, monitor, say)


def choose_micro_batch(recipe: Recipe, processes: int) -> int:
    """Return the images per process and forward pass.

    Raises:
        ValueError: the global batch does not divide evenly.
    """
    batch, micro = recipe.global_batch, recipe.micro_batch
    if batch < 1:
        raise ValueError(f"global_batch={batch} must be at least 1")
    if batch % processes:
        below = batch - batch % processes
        raise ValueError(
            f"global_batch={batch} is not divisible by {processes} processes; use "
            f"{' or '.join(str(b) for b in (below, below + processes) if b)}"
        )
    share = batch // processes
    if micro is None:
        return max(d for d in range(1, min(share, MAX_MICRO_BATCH) + 1) if share % d == 0)
    if micro < 1 or share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        nearest = sorted(divisors, key=lambda d: abs(math.log(d / max(micro, 1))))[:2]
        raise ValueError(
            f"micro_batch={micro} does not divide the {share} images each process takes of global_batch={batch}; use "
            f"{' or '.join(map(str, sorted(nearest)))}"
        )
    return micro


class MaskNoise:
    """Makes the mask of each sample from (seed, epoch, position) alone: {"noise": float32 [n, L]}."""

    def __init__(self, config: MAEConfig, seed: int):
        self.config, self.seed = config, seed

    def __call__(self, epochs: np.ndarray, positions: np.ndarray) -> dict[str, Tensor]:
        """Return the noise of the samples at these places of the stream."""
        count = num_uniforms(self.config.mask_strategy, self.config.grid)
        drawn = torch.from_numpy(uniforms(count, self.seed, epochs, positions, NOISE)).float()
        return {"noise": mask_noise(self.config.mask_strategy, drawn, self.config.grid, self.config.mask_ratio)}


class _Printer:
    """Prints a line on the main process, to standard error, where the progress bar is."""

    def __init__(self, is_main: bool):
        self.is_main = is_main

    def __call__(self, text: str) -> None:
        if self.is_main:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


# ------------------------------------------------------------------------------------------------ the run folder


@contextmanager
def _run_folder(recipe: Recipe, accelerator: Accelerator) -> Iterator[Path]:
    """Make, lock and tidy the run folder; the main process holds the lock until the run ends."""
    out = Path(recipe.out or f"runs/{recipe.name}")
    error, lock = None, None
    try:
        if accelerator.is_main_process:
            try:
                (out / "checkpoints").mkdir(parents=True, exist_ok=True)
                lock = RunLock(out)
                lock.acquire()
                checkpoints.clean(out / "checkpoints")
                (out / "stopped_by_signal").unlink(missing_ok=True)
            except RuntimeError as caught:
                error = caught
            except OSError as caught:
                error = ValueError(f"out={out} cannot be written ({caught}); choose another --out or free some space")
        agree(error, accelerator, f"opening {out}")
        yield out
    except OSError as caught:
        if caught.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RuntimeError(
            f"{caught}: the disk of out={out} is full. What was saved is whole; free some space and run the same "
            "command again to continue"
        ) from caught
    finally:
        if lock is not None:
            lock.release()


def _find_start(recipe: Recipe, out: Path, accelerator: Accelerator, say: _Printer) -> Path | None:
    """Return the checkpoint to continue from: the run folder's newest whole one, the one asked for, or none."""
    found: tuple[Path | None, list[str]] | None = None
    error = None
    if accelerator.is_main_process:
        try:
            found = _choose_checkpoint(recipe, out)
            if found[0] is not None:
                _check_recipe(recipe, found[0])
                checkpoints.prune(found[0], recipe.engine.keep_checkpoints)
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
        if (out / "metrics.jsonl").exists():
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
        if found is not None:
            return found, skipped
    if not (path / "manifest.json").is_file():
        raise ValueError(
            f"resume={recipe.resume} is neither auto, never, nor a checkpoint folder (one with a manifest.json)"
        )
    if (wrong := checkpoints.damage(path)) is not None:
        raise ValueError(f"resume={recipe.resume} is damaged: {wrong}; name another checkpoint")
    return path, []


def _check_recipe(recipe: Recipe, checkpoint: Path) -> None:
    if changed := changed_fields(from_dict(checkpoints.read_recipe(checkpoint)), recipe):
        listed = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
        raise ValueError(
            f"{checkpoint} was written by another recipe: {listed}. Use the saved values to continue, or another "
            "--out to start a new run"
        )


def _restore_rank(rank_states: list[dict[str, Any]], window: Window, accelerator: Accelerator) -> None:
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


def _record_start(
    out: Path,
    recipe: Recipe,
    accelerator: Accelerator,
    state: TrainState,
    data_state: Mapping[str, Any],
    say: _Printer,
) -> None:
    """Append this start to environment.json: versions, machine, launch, and what was read."""
    pids = gather_objects(os.getpid(), accelerator)
    if not accelerator.is_main_process:
        return
    packages = (
        "hf_mae",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "numpy",
        "pillow",
        "pyarrow",
        "safetensors",
    )
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": state.step,
        "processes": accelerator.num_processes,
        "pids": pids,
        "distributed_type": str(accelerator.distributed_type),
        "device": str(accelerator.device),
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "launcher": "torchrun or accelerate" if "TORCHELASTIC_RUN_ID" in os.environ else "python",
        "restarts": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        "packages": {name: version(name) for name in packages},
        "data": dict(data_state),
        "seed": recipe.seed,
    }
    path = out / "environment.json"
    starts = json.loads(path.read_text())["starts"] if path.exists() and state.step else []
    if starts:
        before, now = ({k: s[k] for k in BITWISE} | {"torch": s["packages"]["torch"]} for s in (starts[-1], start))
        if changed := [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]:
            say(f"note: {'; '.join(changed)}: the run goes on, equal up to rounding but not to the last bit")
    temporary = out / ".environment.json.tmp"
    temporary.write_text(json.dumps({"starts": [*starts, start]}, indent=2) + "\n")
    os.replace(temporary, path)


def _same_on_all_ranks(values: Mapping[str, Any], accelerator: Accelerator) -> None:
    everyone = gather_objects(json.dumps(dict(values), sort_keys=True, default=str), accelerator)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            raise RuntimeError(
                f"rank {rank} was started with another recipe or sees other data than rank 0; start all alike"
            )


# ------------------------------------------------------------------------------------------------ monitors


def _evaluators(
    recipe: Recipe,
    config: MAEConfig,
    source: Source,
    out: Path,
    accelerator: Accelerator,
    task: nn.Module,
    state: TrainState,
    say: _Printer,
) -> tuple[list[Any], float]:
    """Build what is measured while training, and the loss of a prediction that ignores the image."""
    evals, every = recipe.evals, recipe.eval_every
    fixed: dict[str, Any] = {
        "seed": recipe.seed,
        "image_size": height_width(config.image_size),
        "channels": config.num_channels,
        "max_pixels": recipe.data.max_pixels,
    }
    test_source = None
    if evals.knn or evals.probe:
        test_source = _test_source(recipe, source, say)
    count = evals.train_examples if test_source is not None else min(evals.train_examples, 2000)
    train = (
        load_examples(source, max(count, 256), **fixed)
        if evals.rankme or test_source
        else load_examples(source, 256, **fixed)
    )
    evaluators: list[Any] = []
    if evals.rankme or test_source is not None:
        evaluators.append(
            FeatureQuality(
                train,
                load_examples(test_source, evals.test_examples, **fixed) if test_source is not None else None,
                accelerator,
                every=every,
                at_start=evals.at_start,
                knn=evals.knn,
                rank=evals.rankme,
                probe=evals.probe,
            )
        )
    if evals.pictures:
        shown = (train[0] if test_source is None else evaluators[0].test[0])[: evals.pictures]
        rows = np.arange(len(shown))
        evaluators.append(
            Pictures(
                shown,
                MaskNoise(config, recipe.seed)(np.zeros_like(rows), rows)["noise"],
                out / "pictures",
                mean=recipe.augment.mean,
                std=recipe.augment.std,
                accelerator=accelerator,
                every=every,
            )
        )
    trivial = state.trivial_loss
    if trivial is None:
        trivial = accelerator.unwrap_model(task).trivial_loss(train[0][:256].to(accelerator.device))
    return evaluators, trivial


def _test_source(recipe: Recipe, source: Source, say: _Printer) -> Source | None:
    """Open the labelled split to test on, or say why there is none."""
    if not source.has_labels:
        say("kNN: off, the training split has no labels")
        return None
    split = recipe.evals.split
    if split is None:
        split = next((s for s in ("test", "validation", "val") if s in list_splits(recipe.data)), None)
    if split is None:
        say("kNN: off, no test or validation split was found (--evals.split names one)")
        return None
    test = open_source(replace(recipe.data, split=split))
    if not test.has_labels:
        say(f"kNN: off, split {split} has no labels")
        return None
    return test


def _finish(recipe: Recipe, out: Path, monitor: Monitor, say: _Printer) -> None:
    """Say what came out, and what to do next."""
    if not say.is_main:
        return
    say(monitor.verdict())
    rows = read_rows(out / "metrics.jsonl")
    for name, title in (("knn_accuracy", "kNN accuracy"), ("probe_accuracy", "logistic probe"), ("rankme", "RankMe")):
        values = [(row["step"], row[name]) for row in rows if name in row]
        if values and values[0][0] == 0:
            say(f"{title}: {values[0][1]:.3f} untrained -> {values[-1][1]:.3f} after {values[-1][0]} updates")
    whole = checkpoints.list_checkpoints(out / "checkpoints")
    if pictures := sorted((out / "pictures").glob("*.png")):
        say(f"reconstructions: {pictures[-1]}")
    if whole:
        say(f'model: {whole[-1] / "model"}, load it with hf_mae.MAEModel.from_pretrained("{whole[-1] / "model"}")')
    if recipe.data.path == "digits":
        say("next, on your own images: hf-mae pretrain mae-vit-s --data.path DIR_OR_HUB_ID --global-batch 256")


def reconstruct_files(name: str, files: list[Path], out: Path, *, seed: int = 0) -> None:
    """Write one picture with the reconstructions of image files.

    Args:
        name: a model folder or a Hub id.
        files: images of any format that training reads.
        out: where the picture goes.
        seed: chooses the masks.

    Raises:
        ValueError: a file is missing or no image, or the model has no decoder.
    """
    model = MAEForPreTraining.from_pretrained(name)
    config, size = model.config, height_width(model.config.image_size)
    images = []
    for path in files:
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name image files")
        try:
            images.append(
                torch.from_numpy(eval_image(decode_image(path.read_bytes(), config.num_channels), size).copy())
            )
        except ImageError as error:
            raise ValueError(f"{path} cannot be used: {error}") from error
    processor = AutoImageProcessor.from_pretrained(name)
    rows = np.arange(len(images))
    pictures = reconstruct(
        model,
        torch.stack(images),
        noise=MaskNoise(config, seed)(np.zeros_like(rows), rows)["noise"],
        mean=processor.image_mean,
        std=processor.image_std,
    )
    pictures.grid(out)
