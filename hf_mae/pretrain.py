"""Masked-autoencoder pretraining from a recipe: where data, model, task, loop and monitors are put together."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoImageProcessor

from hf_mae.data.examples import load_examples
from hf_mae.data.images import ImageError, decode_image, eval_image
from hf_mae.data.loader import Loader, check_state, loader_state, steps_per_epoch
from hf_mae.data.order import NOISE, Order, choose_lanes_and_window, uniforms
from hf_mae.data.sources import Source, list_splits, open_source
from hf_mae.evaluation.features import FeatureQuality
from hf_mae.evaluation.reconstruction import Pictures, reconstruct
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.models.masking import mask_noise, num_uniforms
from hf_mae.models.modeling_mae import MAEForPreTraining
from hf_mae.recipes.base import Recipe, check, choose_micro_batch, to_dict
from hf_mae.training.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_data_state,
    save_checkpoint,
)
from hf_mae.training.distributed import describe_world, gather_objects, make_accelerator
from hf_mae.training.loop import fit
from hf_mae.training.memory import keep_freed_memory, largest_micro_batch
from hf_mae.training.monitors import Clock, Monitor, Printer, Window, read_rows
from hf_mae.training.optim import MovingAverage, build_adamw
from hf_mae.training.run_folder import (
    find_start,
    last_micro_batch,
    open_run_folder,
    record_start,
    require_same_on_all_ranks,
    restore_rank,
)
from hf_mae.training.schedules import make_plan
from hf_mae.training.signals import StopSignal
from hf_mae.training.tasks import Pretraining

BASELINE_IMAGES = 256
"""Training images that the mean-patch baseline is measured on."""

WAITING_IS_LONG = 0.1
"""Share of a run's time spent waiting for data from which on the run says what would help."""

RANKME_IMAGES = 2000
"""Training images for RankMe where no kNN needs more: above the width of any preset, which bounds the rank."""


def pretrain(recipe: Recipe) -> Path:
    """Pretrain a masked autoencoder, or continue the run in `recipe.out`.

    Everything a user can get wrong is checked before the first update. A collective: every process calls it.

    Returns:
        The run folder.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    check(recipe)
    config = MAEConfig(**asdict(recipe.model))
    accelerator = make_accelerator(recipe.engine)
    say = Printer(accelerator.is_main_process)
    choose_micro_batch(recipe, accelerator.num_processes)  # refuses what does not divide
    if recipe.engine.keep_freed_memory:
        keep_freed_memory()
    say(f"hf_mae: {recipe.name}, {describe_world(accelerator)}")
    with open_run_folder(recipe, accelerator) as out:
        _run(recipe, config, out, accelerator, say)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return out


def _run(recipe: Recipe, config: MAEConfig, out: Path, accelerator: Accelerator, say: Printer) -> None:
    resume_from = find_start(recipe, out, accelerator, say)

    # What is read, in which order, and for how long.
    data = recipe.data
    if resume_from is not None and data.revision is None:
        data = replace(data, revision=read_data_state(resume_from)["revision"])  # where a branch stood at the start
    source = open_source(data)
    say(source.summary())
    rows, world = int(source.sizes.sum()), accelerator.num_processes
    images = recipe.global_batch // data.repeats  # different ones in a global batch
    plan = make_plan(recipe, steps_per_epoch=steps_per_epoch(rows, images, data.remainder))
    order = Order(source.sizes, recipe.seed, *choose_lanes_and_window(source.sizes, source.bytes_per_row, recipe.data))
    data_state = loader_state(source, order, recipe.global_batch, data.remainder, data.repeats)
    data_state["revision"] = source.revision

    # What is trained.
    torch.manual_seed(recipe.seed)  # the same weights on every rank; nothing else draws from it
    model = MAEForPreTraining(config)
    model.checkpoint_activations(recipe.engine.checkpoint_activations)
    if recipe.engine.compile:
        for block in [*model.blocks, *model.decoder_blocks]:
            block.compile(fullgraph=True, dynamic=False)  # in place, so that parameter names stay
    task: nn.Module = Pretraining(model, recipe.augment.mean, recipe.augment.std)
    optimizer: Any = build_adamw(task, recipe.optim)
    task, optimizer = accelerator.prepare(task, optimizer)
    inner = accelerator.unwrap_model(task)
    for method in ("features", "predict"):  # only FSDP2 takes notice
        register_fsdp_forward_method(inner, method)
    average = MovingAverage(task, recipe.optim.ema_decay) if recipe.optim.ema_decay is not None else None

    # Where it starts.
    state, window, clock = TrainState(), Window(accelerator.device), Clock()
    if resume_from is not None:
        loaded = load_checkpoint(resume_from, task=inner, optimizer=optimizer.optimizer, average=average)
        check_state(loaded.data, data_state, loaded.state.step)
        state = loaded.state
        restore_rank(loaded.rank_states, window, accelerator)
        if state.scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        say(f"resuming at step {state.step} of {plan.total_steps} from {resume_from} ({clock.lap():.1f} s)")
    require_same_on_all_ranks({"recipe": to_dict(recipe), "data": data_state, "step": state.step}, accelerator)
    share, auto = recipe.global_batch // world, recipe.micro_batch == "auto"
    measured = last_micro_batch(out, share, accelerator) if auto and state.step else None
    micro_batch = choose_micro_batch(recipe, world, measured=measured)
    if state.step >= plan.total_steps:
        record_start(out, recipe, accelerator, state, data_state, micro_batch, say)
        say(f"this run is finished ({state.step} updates); nothing to do. Another --out starts anew")
        return
    if auto and measured is not None:
        say(f"micro_batch=auto: {micro_batch}, as before the restart")
    elif auto:
        zeros = torch.zeros(4, config.num_channels, *height_width(config.image_size), dtype=torch.uint8)
        noise = MaskNoise(config, recipe.seed)(np.zeros(4, np.int64), np.arange(4))["noise"]
        micro_batch = largest_micro_batch(
            inner,
            lambda n: {"pixel_values": zeros[:n], "noise": noise[:n]},
            share,
            accelerator,
            moments_exist=resume_from is not None,
        )
        say(f"micro_batch=auto: {micro_batch} images fit into memory")
    evaluators, examples = _evaluators(recipe, config, source, out, accelerator, say)
    if state.trivial_loss is None:
        state.trivial_loss = inner.trivial_loss(examples.to(accelerator.device))
    record_start(out, recipe, accelerator, state, data_state, micro_batch, say)

    if micro_batch < min(16, recipe.global_batch // world):
        say(f"warning: micro-batches of {micro_batch} are slow; a global batch with more divisors makes larger ones")
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{parameters / 1e6:.2f} M parameters; {plan.total_steps} updates of {recipe.global_batch} images "
        f"({world} x {recipe.global_batch // micro_batch // world} x {micro_batch}: processes, micro-batches, images), "
        f"{plan.steps_per_epoch:.2f} an epoch; lr up to {plan.lr:.3g} after {plan.warmup_steps:.0f} updates; "
        f"run folder {out}"
    )

    def save(current: TrainState, sums: Window) -> Path:
        current.scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
        return save_checkpoint(
            out / "checkpoints",
            accelerator=accelerator,
            task=inner,
            optimizer=optimizer.optimizer,
            average=average,
            state=current,
            rank_state={"cursor": current.step, "window": sums.state(), "torch_rng": torch.get_rng_state().tolist()},
            recipe=to_dict(recipe),
            data=data_state,
            keep=recipe.engine.keep_checkpoints,
        )

    with (
        Monitor(
            out,
            step=state.step if resume_from is not None else -1,
            total_steps=plan.total_steps,
            judge_from=max(100, math.ceil(2 * plan.warmup_steps)),
            track=recipe.engine.track,
            is_main=accelerator.is_main_process,
            name=recipe.name,
        ) as monitor,
        Loader(
            source,
            order,
            augment=recipe.augment,
            image_size=height_width(config.image_size),
            channels=config.num_channels,
            global_batch=recipe.global_batch,
            rank=accelerator.process_index,
            world=world,
            cursor=state.step,
            stop=plan.total_steps,
            remainder=recipe.data.remainder,
            num_workers=recipe.num_workers,
            worker_kind=recipe.data.workers,
            max_bad_fraction=recipe.data.max_bad_fraction,
            max_pixels=recipe.data.max_pixels,
            decoder=recipe.data.decoder,
            repeats=recipe.data.repeats,
            pin_memory=accelerator.device.type == "cuda",
            extras=MaskNoise(config, recipe.seed),
        ) as loader,
        StopSignal(world) as stop,
    ):
        for line in loader.describe():
            say(line)
        known_bad = read_rows(out / "bad_samples.jsonl") if accelerator.is_main_process else []
        loader.count_bad(gather_objects(known_bad, accelerator)[0])  # the main process has just cut that file
        monitor.trivial_loss = state.trivial_loss
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
        if outcome == "stopped":
            if accelerator.is_main_process:
                (out / "stopped_by_signal").write_text(f"{stop.received or 'another rank'} at step {state.step}\n")
            say(f"stopped by a signal after step {state.step}, saved; the same command continues")
    if outcome == "finished" and accelerator.is_main_process:
        _report(recipe, out, monitor.verdict(), say)


class MaskNoise:
    """Makes the mask of each sample from (seed, epoch, position) alone: {"noise": float32 [n, L]}."""

    def __init__(self, config: MAEConfig, seed: int):
        self.config, self.seed = config, seed

    def __call__(self, epochs: np.ndarray, positions: np.ndarray) -> dict[str, Tensor]:
        """Return the noise of the samples at these places of the stream."""
        count = num_uniforms(self.config.mask_strategy, self.config.grid)
        drawn = torch.from_numpy(uniforms(count, self.seed, epochs, positions, NOISE)).float()
        return {"noise": mask_noise(self.config.mask_strategy, drawn, self.config.grid, self.config.mask_ratio)}


# ------------------------------------------------------------------------------------------------ monitors


def _evaluators(
    recipe: Recipe, config: MAEConfig, source: Source, out: Path, accelerator: Accelerator, say: Printer
) -> tuple[list[Any], Tensor]:
    """Build what is measured while training; also return a few training images."""
    evals, every = recipe.evals, recipe.eval_every
    load = partial(
        load_examples,
        seed=recipe.seed,
        image_size=height_width(config.image_size),
        channels=config.num_channels,
        max_pixels=recipe.data.max_pixels,
    )
    labelled = _labelled_split(recipe, source, say) if evals.knn or evals.probe else None
    evaluators: list[Any] = []
    count = evals.train_examples if labelled else min(evals.train_examples, RANKME_IMAGES) if evals.rankme else 0
    count = max(count, BASELINE_IMAGES)
    say(f"loading up to {count:,} training images{f' and {evals.test_examples:,} to test on' if labelled else ''}")
    train = load(source, count)
    shown = train[0]
    if labelled or evals.rankme:
        test = load(labelled, evals.test_examples) if labelled else None
        if test and not ((train[1] >= 0).any() and (test[1] >= 0).any()):
            say("kNN: off, none of the images read has a label")
            test = None
        shown = test[0] if test else shown
        evaluators.append(
            FeatureQuality(
                train,
                test,
                accelerator,
                every=every,
                at_start=evals.at_start,
                knn=evals.knn,
                rank=evals.rankme,
                probe=evals.probe,
            )
        )
    if evals.pictures:
        shown = shown[: evals.pictures]
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
    return evaluators, train[0][:BASELINE_IMAGES]


def _labelled_split(recipe: Recipe, source: Source, say: Printer) -> Source | None:
    """Open the labelled split to test on, or say why there is none."""
    if not source.has_labels:
        say("kNN: off, the training split has no labels")
        return None
    data, split = replace(recipe.data, revision=source.revision), recipe.evals.split  # the same commit
    if split is None:
        split = next((s for s in ("test", "validation", "val") if s in list_splits(data)), None)
    if split is None:
        say("kNN: off, no test or validation split was found (--evals.split names one)")
        return None
    test = open_source(data, split=split, field="evals.split")
    if not test.has_labels:
        say(f"kNN: off, split {split} has no labels")
        return None
    return test


def _report(recipe: Recipe, out: Path, verdict: str, say: Printer) -> None:
    """Say what came out, and what to do next."""
    say(verdict)
    rows = read_rows(out / "metrics.jsonl")
    if advice := data_advice(recipe, rows):
        say(advice)
    for name, title in (("knn_accuracy", "kNN accuracy"), ("probe_accuracy", "logistic probe"), ("rankme", "RankMe")):
        values = [(row["step"], row[name]) for row in rows if name in row]
        if values and values[0][0] == 0:
            say(f"{title}: {values[0][1]:.3f} untrained -> {values[-1][1]:.3f} after {values[-1][0]} updates")
    whole = list_checkpoints(out / "checkpoints")
    if pictures := sorted((out / "pictures").glob("*.png")):
        say(f"reconstructions: {pictures[-1]}")
    if whole:
        say(f'model: {whole[-1] / "model"}, load it with hf_mae.MAEModel.from_pretrained("{whole[-1] / "model"}")')
    if recipe.data.path == "digits":
        say("next, on your own images: hf-mae pretrain mae-vit-s --data.path DIR_OR_HUB_ID --global-batch 256")


def data_advice(recipe: Recipe, rows: list[dict[str, Any]]) -> str | None:
    """Return what to do about a run that waited for its data for more than a tenth of the time; None if it did not."""
    shares = [row["waiting_share"] for row in rows if "waiting_share" in row]
    waited = sum(shares) / len(shares) if shares else 0.0
    if waited < WAITING_IS_LONG:
        return None
    ways: list[str] = []
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (cores := usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > recipe.num_workers:
        ways.append(f"--num-workers {cores} (the cores of this process)")
    if recipe.data.decoder == "exact":
        ways.append("--data.decoder fast (the same crops, pixels that differ by rounding)")
    ways.append(
        f"--data.repeats {2 * recipe.data.repeats} with --epochs {recipe.epochs / 2:g} (more samples "
        "of each image for the same number of updates: changes training)"
    )
    return f"waited for data {waited:.0%} of the time; try {', or '.join(ways)}"


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
    folder = Path(name)
    if (folder / "checkpoints").is_dir():  # a run folder: its newest model
        newest, _ = newest_checkpoint(folder / "checkpoints")
        folder = newest / "model" if newest else folder
        name = str(folder)
    if (folder.exists() or name.startswith((".", "/", "~"))) and not (folder / "config.json").is_file():
        raise ValueError(f"{name} is not a model folder (no config.json); name runs/NAME, a model folder or a Hub id")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"out={out} cannot be written: its folder does not exist; make it or choose another --out")
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
