"""One training run, from a recipe to a finished run folder: what every kind of training shares.

A `Training` says what is trained; `run` opens the data, puts model, optimizer and loader together, continues where the
run folder ends, and hands all of it to the one loop. Read `_run` from top to bottom.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import AutoImageProcessor

from hf_mae.data.examples import check_pixels
from hf_mae.data.images import stated_range
from hf_mae.data.loader import Loader, check_state, loader_state, steps_per_epoch
from hf_mae.data.order import Order, choose_lanes_and_window
from hf_mae.data.sources import Source, open_source
from hf_mae.data.stream import images_per_epoch
from hf_mae.models.configuration_mae import MAEConfig, height_width
from hf_mae.patience import one_line
from hf_mae.recipes.base import Recipe, to_dict
from hf_mae.recipes.checks import choose_micro_batch
from hf_mae.recipes.crop import EvalCrop, stated_crop
from hf_mae.recipes.defaults import Chosen, fit_batch, fit_intervals, is_default, overfills, warn_of_few_updates
from hf_mae.recipes.mae import PRESETS
from hf_mae.resolve import model_folder as model_folder
from hf_mae.training.best import bring_best
from hf_mae.training.checkpoint import (
    TrainState,
    list_checkpoints,
    load_checkpoint,
    read_data_state,
    read_recipe,
    save_checkpoint,
)
from hf_mae.training.console import Bar, can_draw_bars, one_writer
from hf_mae.training.distributed import (
    agreement,
    describe_world,
    gather_objects,
    make_accelerator,
    prepare,
    refuse_nondeterministic,
)
from hf_mae.training.loop import Evaluator, fit
from hf_mae.training.memory import keep_freed_memory, largest_micro_batch
from hf_mae.training.monitors import Clock, Monitor, Printer, Window, check_tracker, read_rows
from hf_mae.training.optim import MovingAverage
from hf_mae.training.run_folder import (
    find_start,
    last_micro_batch,
    open_run_folder,
    record_start,
    require_same_on_all_ranks,
    restore_rank,
)
from hf_mae.training.schedules import Plan, make_plan
from hf_mae.training.signals import StopSignal

WAITING_IS_LONG = 0.1
"""Share of a run's time spent waiting for data from which on the run says what would help."""

R = TypeVar("R", bound=Recipe)


class Training(ABC, Generic[R]):
    """What is trained, and how it is judged. One object serves one run; its methods are called in this order.

    `labels` and `build` hold no collective: what they raise on one rank is raised on all.

    Attributes:
        forward_methods: methods of the task that are called besides `forward`; FSDP2 has to know them.
        baseline: what `baseline_loss` is the loss of, in words.
        image_size: (height, width) in pixels, known after `build`.
        channels: 3 or 1, known after `build`.
        origin: what new weights were made from, for environment.json; known after `build`.
        tested_on: the split that `evaluators` measure on, for environment.json; None without one; known after them.
        num_classes: that labels must lie in, None where labels do not matter; known after `labels`.
    """

    forward_methods: ClassVar[Sequence[str]]
    baseline: ClassVar[str]
    image_size: tuple[int, int]
    channels: int
    tested_on: str | None = None
    num_classes: int | None = None

    def __init__(self, recipe: R):
        self.recipe = recipe
        self.origin: dict[str, Any] = {}

    def find_weights(self) -> None:
        """Refuse a model to start from that is not there, before the data are opened; not called at resume."""

    def labels(self, source: Source, say: Printer) -> dict[str, Any]:
        """Return what of the labels decides the run; compared at resume. Refuses what cannot be trained on."""
        return {}

    @abstractmethod
    def build(self, source: Source, resume_from: Path | None, accelerator: Accelerator, say: Printer) -> nn.Module:
        """Return the task on the CPU. Draws weights from torch's generator, which is seeded."""

    @abstractmethod
    def optimizer(self, task: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer of the task's parameters; the loop sets the lr."""

    @abstractmethod
    def sample(self, n: int) -> dict[str, Tensor]:
        """Return some batch of n, to measure memory with."""

    @abstractmethod
    def evaluators(
        self, out: Path, inner: nn.Module, average: MovingAverage | None, accelerator: Accelerator, say: Printer
    ) -> list[Evaluator]:
        """Return what is measured while training."""

    @abstractmethod
    def baseline_loss(self, inner: nn.Module) -> float | None:
        """Return the loss of a prediction that ignores the input; None: nobody is told whether the run learns."""

    @abstractmethod
    def extras(self, images_per_epoch: int) -> Callable[..., Mapping[str, Tensor]] | None:
        """Return what draws the random numbers of each sample from its place in the stream."""

    def batches(self, order: Order, images_per_epoch: int, cursor: int, accelerator: Accelerator) -> Any | None:
        """Return batches that need no images, or None to read images."""
        return None

    def judge(
        self, out: Path, task: nn.Module, average: MovingAverage | None, accelerator: Accelerator
    ) -> Callable[[Mapping[str, float], TrainState], bool] | None:
        """Return what keeps the best model and ends the run early, if anything does."""
        return None

    def describe(self, optimizer: torch.optim.Optimizer, plan: Plan) -> list[str]:
        """Return lines to print before the first update."""
        return []

    def after_stop(self) -> str:
        """Return what the same command does with a run that a signal has stopped and that was saved."""
        if self.recipe.resume == "auto":
            return "the same command continues"
        return f"--resume auto in place of {self.recipe.resume} continues"

    @abstractmethod
    def report(self, out: Path, rows: list[dict[str, Any]], verdict: str, say: Printer) -> None:
        """Say what came out, and what to do next."""


def run(training: Training[Any], chosen: Chosen = None) -> Path:
    """Train, or continue the run in `recipe.out`. The recipe has been checked.

    Everything a user can get wrong is found before the first update. A collective: every process calls it.

    Args:
        training: what is trained; its recipe becomes the one that was run.
        chosen: fields of the recipe that have to stay; the others may be adapted to the data. None: all.

    Returns:
        The run folder.

    Raises:
        ValueError: something in the recipe, the data or the run folder has to be changed; the message says what.
        RuntimeError: the run met something it cannot go on with; the message names the last good checkpoint.
    """
    recipe = training.recipe
    check_tracker(recipe.engine.track)
    accelerator = make_accelerator(recipe.engine)
    say = Printer(accelerator.is_main_process)
    choose_micro_batch(recipe, accelerator.num_processes)  # refuses what does not divide
    if recipe.engine.keep_freed_memory:
        keep_freed_memory()
    say(f"hf_mae: {recipe.name}, {describe_world(accelerator)}")
    if advice := precision_advice(recipe, accelerator.device.type):
        say(advice)
    with (
        one_writer(draws=accelerator.is_main_process),
        open_run_folder(recipe, accelerator) as out,
        refuse_nondeterministic(),
    ):
        _run(training, chosen, out, accelerator, say)
        accelerator.wait_for_everyone()  # the process group stays: a sweep or a script may start another run
    return out


def _run(training: Training[Any], chosen: Chosen, out: Path, accelerator: Accelerator, say: Printer) -> None:
    recipe: Recipe = training.recipe
    resume_from = find_start(recipe, out, accelerator, say, as_saved=partial(_with_saved_batch, chosen=chosen))

    if resume_from is None:
        training.find_weights()

    # What is read, in which order, and for how long.
    data = recipe.data
    if resume_from is not None and data.revision is None:
        data = replace(data, revision=read_data_state(resume_from)["revision"])  # where a branch stood at the start
    with agreement(accelerator, f"opening data.path={data.path}"):
        source = open_source(data)
        check_pixels(source, data, refuse=resume_from is None)
        say(source.summary())
        labels = training.labels(source, say)
    rows, world = int(source.sizes.sum()), accelerator.num_processes
    if resume_from is not None:
        recipe, notes = _with_saved_batch(recipe, resume_from, chosen=chosen), []
    else:
        recipe, notes = fit_batch(recipe, rows, chosen, processes=world)
    for note in notes:
        say(note)
    images = recipe.global_batch // data.repeats  # different ones in a global batch
    plan = make_plan(recipe, steps_per_epoch=steps_per_epoch(rows, images, data.remainder))
    recipe, notes = fit_intervals(recipe, plan.total_steps, chosen)
    for note in [*notes, *warn_of_few_updates(recipe, rows, plan.total_steps, plan.steps_per_epoch)]:
        say(note)
    training.recipe = recipe  # from here on what is run, recorded and compared
    order = Order(source.sizes, recipe.seed, *choose_lanes_and_window(source.sizes, source.bytes_per_row, recipe.data))
    data_state = loader_state(source, order, recipe.global_batch, data.remainder, data.repeats, data.repeat_augment)
    data_state |= {"revision": source.revision, **labels}

    # What is trained.
    torch.manual_seed(recipe.seed)  # the same weights on every rank; nothing else draws from it
    with agreement(accelerator, "making the model"):
        task = training.build(source, resume_from, accelerator, say)
    task.pixel_range = source.pixel_range  # type: ignore[assignment]  # for the folders it writes, see `ImageTask`
    parameters = sum(p.numel() for p in task.parameters())
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    optimizer: Any = training.optimizer(task)
    task, optimizer = prepare(accelerator, task, optimizer)
    inner = accelerator.unwrap_model(task)
    for method in training.forward_methods:  # only FSDP2 takes notice
        register_fsdp_forward_method(inner, method)
    ema = recipe.optim
    average = MovingAverage(task, ema.ema_decay, warmup=ema.ema_warmup) if ema.ema_decay is not None else None

    # Where it starts.
    state, window, clock = TrainState(), Window(accelerator.device), Clock()
    if resume_from is not None:
        loaded = load_checkpoint(resume_from, task=inner, optimizer=optimizer.optimizer, average=average)
        _check_labels_unchanged(loaded.data, labels)
        check_state(loaded.data, data_state, loaded.state.step)
        state = loaded.state
        restore_rank(loaded.rank_states, window, accelerator)
        if state.scaler is not None and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        bring_best(out / "best", resume_from, state, accelerator)
        say(f"resuming at step {state.step} of {plan.total_steps} from {resume_from} ({clock.lap():.1f} s)")
    require_same_on_all_ranks({"recipe": to_dict(recipe), "data": data_state, "step": state.step}, accelerator)
    share, auto = recipe.global_batch // world, recipe.micro_batch == "auto"
    measured = last_micro_batch(out, share, accelerator) if auto and state.step else None
    micro_batch = choose_micro_batch(recipe, world, measured=measured)
    if state.stopped_early or (state.step >= plan.total_steps and not state.owes_evaluation):
        record_start(out, recipe, accelerator, state, data_state, micro_batch, say)
        early = "early, as it got no better, " if state.stopped_early else ""
        say(f"this run is finished ({early}after {state.step} updates); nothing to do. Another --out starts anew")
        return
    if auto and measured is not None:
        say(f"micro_batch=auto: {micro_batch}, as before the restart")
    elif auto:
        found = largest_micro_batch(inner, training.sample, share, accelerator, moments_exist=resume_from is not None)
        micro_batch = choose_micro_batch(recipe, world, measured=found)
        say(f"micro_batch=auto: {micro_batch} images fit into memory")
    evaluators = training.evaluators(out, inner, average, accelerator, say)
    if state.trivial_loss is None:
        state.trivial_loss = training.baseline_loss(inner)
    record_start(
        out, recipe, accelerator, state, data_state, micro_batch, say,
        tested_on=training.tested_on, origin=training.origin,
    )  # fmt: skip

    if micro_batch < min(16, recipe.global_batch // world):
        say(f"warning: micro-batches of {micro_batch} are slow; a global batch with more divisors makes larger ones")
    say(
        f"{parameters / 1e6:.2f} M parameters{_trained(trainable, parameters)}; {plan.total_steps} updates of "
        f"{recipe.global_batch} images ({world} x {recipe.global_batch // micro_batch // world} x {micro_batch}: "
        f"processes, micro-batches, images), {plan.steps_per_epoch:.2f} an epoch; lr up to {plan.lr:.3g} after "
        f"{plan.warmup_steps:.0f} updates; run folder {out}"
    )
    for line in training.describe(optimizer.optimizer, plan):
        say(line)

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

    length = images_per_epoch(rows, images, data.remainder)
    with (
        StopSignal(world) as stop,  # first, so that it answers until all else has ended
        Monitor(
            out,
            step=state.step if resume_from is not None else -1,
            total_steps=plan.total_steps,
            judge_from=max(100, math.ceil(2 * plan.warmup_steps)),
            track=recipe.engine.track,
            is_main=accelerator.is_main_process,
            name=out.resolve().name,
            baseline=training.baseline,
            shorter=_shorter(recipe, accelerator),
            owes_evaluation=state.owes_evaluation,
        ) as monitor,
        _batches(training, source, order, state.step, plan, length, accelerator) as batches,
    ):
        for line in batches.describe():
            say(line)
        known_bad = read_rows(out / "bad_samples.jsonl") if accelerator.is_main_process else []
        batches.count_bad(gather_objects(known_bad, accelerator)[0])  # the main process has just cut that file
        monitor.trivial_loss = state.trivial_loss
        outcome = fit(
            task,
            optimizer,
            batches,
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
            judge=training.judge(out, task, average, accelerator),
        )
        if outcome == "stopped":
            if accelerator.is_main_process:
                (out / "stopped_by_signal").write_text(f"{stop.received or 'another rank'} at step {state.step}\n")
            say(f"stopped by a signal after step {state.step}, saved; {training.after_stop()}")
    if outcome != "stopped" and accelerator.is_main_process:
        rows_written = read_rows(out / "metrics.jsonl")
        training.report(out, rows_written, monitor.verdict(), say)
        if advice := data_advice(recipe, rows_written):
            say(advice)


def _with_saved_batch(recipe: Recipe, checkpoint: Path, *, chosen: Chosen) -> Recipe:
    """Return the recipe with the global batch that the run was started with, where it is not one that was chosen."""
    if not is_default("global_batch", chosen) or not overfills(recipe, read_data_state(checkpoint)["rows"]):
        return recipe
    return replace(recipe, global_batch=read_recipe(checkpoint)["global_batch"])


def _batches(
    training: Training[Any],
    source: Source,
    order: Order,
    cursor: int,
    plan: Plan,
    length: int,
    accelerator: Accelerator,
) -> AbstractContextManager[Any]:
    recipe: Recipe = training.recipe
    without_images = training.batches(order, length, cursor, accelerator)
    if without_images is not None:
        return without_images
    return Loader(
        source,
        order,
        augment=recipe.augment,
        image_size=training.image_size,
        channels=training.channels,
        global_batch=recipe.global_batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        cursor=cursor,
        stop=plan.total_steps,
        remainder=recipe.data.remainder,
        num_workers=recipe.num_workers,
        worker_kind=recipe.data.workers,
        max_bad_fraction=recipe.data.max_bad_fraction,
        max_pixels=recipe.data.max_pixels,
        decoder=recipe.data.decoder,
        repeats=recipe.data.repeats,
        repeat_augment=recipe.data.repeat_augment,
        pin_memory=accelerator.device.type == "cuda",
        extras=training.extras(length),
        num_classes=training.num_classes,
    )


def _shorter(recipe: Recipe, accelerator: Accelerator) -> str:
    """Return what makes a run of many hours shorter, to be typed."""
    ways = ["fewer --epochs" if recipe.max_steps is None else "fewer --max-steps", "a smaller model"]
    if accelerator.device.type == "cuda" and accelerator.mixed_precision == "no":
        ways.insert(0, "--engine.precision bf16")
    if accelerator.device.type == "cpu":
        ways.append("a GPU")
    plan = f" (`hf-mae plan {recipe.name}` estimates the hours of other machines)"
    return f"{', '.join(ways)}{plan if recipe.name in PRESETS else ''}"


def _trained(trainable: int, parameters: int) -> str:
    return "" if trainable == parameters else f" ({trainable / 1e6:.3g} M of them trained)"


def _check_labels_unchanged(saved: Mapping[str, Any], labels: Mapping[str, Any]) -> None:
    for name, now in labels.items():
        if name in saved and saved[name] != now:  # the first checkpoints do not say all of it
            raise ValueError(
                f"{name} of the data have changed since the checkpoint was written (was {_short(saved[name])}, is "
                f"{_short(now)}); restore them (the files, or data.splits), or start a new run with another --out"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def load_preparation(
    folder: Path | str, config: MAEConfig, *, what: str, say: Printer
) -> tuple[list[float], list[float], tuple[float, float] | None, EvalCrop]:
    """Return mean and std per channel, pixel range and crop of evaluation, as the image processor of a model says.

    Args:
        folder: a model folder, or a Hub id that was opened.
        config: of the model.
        what: the argument and its value, for messages.
        say: takes a warning where the crop is not one that evaluation has; the default is taken instead.

    Raises:
        ValueError: there is no preprocessor_config.json, or it does not say them for these channels.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        mean, std = ([float(value) for value in values] for values in (processor.image_mean, processor.image_std))
        pixel_range = stated_range(processor)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(folder, Path) and (folder / "preprocessor_config.json").is_file():
            why = f"has a preprocessor_config.json that cannot be used ({one_line(error)})"
        else:
            why = "has no preprocessor_config.json"
        raise ValueError(
            f"{what} {why}, so its mean and std are not known; copy the one that was written beside the weights"
        ) from error
    channels = config.num_channels
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise ValueError(
            f"{what} has image_mean={mean} and image_std={std} in its preprocessor_config.json, and the model takes "
            f"{channels} channel(s); write one value per channel, image_std above 0"
        )
    return mean, std, pixel_range, stated_crop(processor.to_dict(), height_width(config.image_size), say)


def progress(batches: Any, accelerator: Accelerator) -> Any:
    """Return the batches with a progress bar on the main process, where one can be drawn."""
    hidden = not accelerator.is_main_process or not can_draw_bars()
    return Bar(batches, desc="evaluating", unit="batch", leave=False, dynamic_ncols=True, disable=hidden)


def last_model(out: Path) -> Path | None:
    """Return the model folder of the newest checkpoint of a run, or None."""
    whole = list_checkpoints(out / "checkpoints")
    return whole[-1] / "model" if whole else None


def precision_advice(recipe: Recipe, device: str) -> str | None:
    """Return what to set on a GPU where the recipe computes in float32, as every preset does; None elsewhere."""
    if device != "cuda" or recipe.engine.precision != "no" or recipe.engine.tf32:
        return None
    return (
        "note: engine.precision=no computes in float32, and the papers trained with mixed precision; on a GPU set "
        "--engine.precision bf16 (fp16 on one without it), or --engine.tf32 where float32 has to stay"
    )


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
    if not recipe.mixes_pairs:  # partners are half a batch apart: with even repeats the same image
        ways.append(
            f"--data.repeats {2 * recipe.data.repeats} with --epochs {recipe.epochs / 2:g} (more samples "
            "of each image for the same number of updates: changes training)"
        )
    ways = ways or ["a faster disk", "more cores"]
    return f"waited for data {waited:.0%} of the time; try {', or '.join(ways)}"
