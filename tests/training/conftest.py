"""A tiny real model on tiny random images, without the data room: what loop and checkpoint tests train."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.fsdp import register_fsdp_forward_method

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.base import Engine, Evals, Recipe, Schedule, to_dict
from hf_mae.recipes.classification import ClassifierAugment, ClassifierOptim, ClassifierRecipe
from hf_mae.training.best import Best, bring_best
from hf_mae.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from hf_mae.training.loop import fit
from hf_mae.training.mixing import MixDraws
from hf_mae.training.monitors import Monitor, Window
from hf_mae.training.optim import MovingAverage, build_adamw, build_optimizer
from hf_mae.training.schedules import make_plan
from hf_mae.training.signals import StopSignal
from hf_mae.training.tasks import Classification, Pretraining

CONFIG = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "norm_pix_loss": True,
}
RECIPE = Recipe(
    name="tiny",
    source="",
    expected="",
    epochs=4,
    global_batch=8,
    log_every=3,
    save_every=4,
    schedule=Schedule(warmup_epochs=1),
    evals=Evals(),
    engine=Engine(keep_checkpoints=2),
)


@dataclass
class ToyBatch:
    cursor: int
    values: dict[str, torch.Tensor]
    bad: list[Any] = field(default_factory=list)

    def tensors(self):
        return self.values


@dataclass
class ToyBatches:
    """Batch k is a function of k alone, as the real loader's."""

    start: int
    batch: int = 8
    poison: int | None = None
    rank: int = 0
    world: int = 1
    seconds_waiting: float = 0.0

    def count_bad(self, samples):
        assert samples == []

    def __iter__(self):
        k = self.start
        while True:
            g = torch.Generator().manual_seed(k)
            pixels = torch.randint(0, 256, (self.batch, 3, 16, 16), generator=g, dtype=torch.uint8)
            noise = torch.rand(self.batch, 16, generator=g)
            if k == self.poison:
                noise = noise * float("nan")
                pixels = pixels.double() * float("nan")
            k += 1
            mine = slice(self.rank, None, self.world)
            yield ToyBatch(k, {"pixel_values": pixels[mine], "noise": noise[mine]})


@dataclass
class Interrupted:
    """Batches during which this process gets a signal, just before batch `at` (1-based) is trained on."""

    batches: Any
    at: int
    number: int
    seconds_waiting: float = 0.0

    def count_bad(self, samples):
        self.batches.count_bad(samples)

    def __iter__(self):
        for batch in self.batches:
            if batch.cursor == self.at:
                os.kill(os.getpid(), self.number)
            yield batch


def interrupt(at, number):
    """For `ToyRun.train(on_batch=...)`."""
    return partial(Interrupted, at=at, number=number)


def cpu_accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@dataclass
class ToyRun:
    """One run of the real loop in one folder; `train()` starts or resumes it."""

    out: Path
    recipe: Recipe = RECIPE
    micro_batch: int = 8
    poison: int | None = None
    ema: bool = False
    batches: Any = None
    evaluators: tuple[Any, ...] = ()
    compile_backend: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    make_accelerator: Any = cpu_accelerator
    best: str | None = None
    patience: int | None = None
    interrupt = staticmethod(interrupt)
    forward_methods = ()

    def build(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = MAEForPreTraining(MAEConfig(**(CONFIG | self.config)))
        model.checkpoint_activations(self.recipe.engine.checkpoint_activations)
        for block in [*model.blocks, *model.decoder_blocks] if self.compile_backend is not None else []:
            block.compile(fullgraph=True, dynamic=False, backend=self.compile_backend)
        task = Pretraining(model, (0.5,) * 3, (0.5,) * 3)
        return task, build_adamw(task, self.recipe.optim)

    def read(self, start: int, rank: int, world: int) -> Any:
        return ToyBatches(start, poison=self.poison, rank=rank, world=world)

    def change(self, **fields) -> ToyRun:
        return replace(self, recipe=replace(self.recipe, **fields))

    def train(self, resume: Path | None = None, *, on_batch=None):
        (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
        accelerator = self.make_accelerator()
        rank, world = accelerator.process_index, accelerator.num_processes
        plan = make_plan(self.recipe, steps_per_epoch=5)
        torch.manual_seed(0)
        task, optimizer = accelerator.prepare(*self.build())
        for method in self.forward_methods:
            register_fsdp_forward_method(accelerator.unwrap_model(task), method)
        average = MovingAverage(task, 0.9, warmup=self.recipe.optim.ema_warmup) if self.ema else None
        state, window = TrainState(trivial_loss=1.0), Window(torch.device("cpu"))
        if resume is not None:
            loaded = load_checkpoint(resume, task=task, optimizer=optimizer.optimizer, average=average)
            state = loaded.state
            window.load(loaded.rank_states[rank % len(loaded.rank_states)]["window"])
            bring_best(self.out / "best", resume, state, accelerator)

        def save(current, sums):
            return save_checkpoint(
                self.out / "checkpoints",
                accelerator=accelerator,
                task=task,
                optimizer=optimizer.optimizer,
                average=average,
                state=current,
                rank_state={"cursor": current.step, "window": sums.state()},
                recipe=to_dict(self.recipe),
                data={"fingerprint": "toy"},
                keep=self.recipe.engine.keep_checkpoints,
            )

        monitor = Monitor(
            self.out,
            step=state.step if resume else -1,
            total_steps=plan.total_steps,
            judge_from=100,
            track="none",
            is_main=accelerator.is_main_process,
            name="toy",
            owes_evaluation=state.owes_evaluation,
        )
        monitor.trivial_loss = 1.0
        stop = StopSignal(world)
        batches = self.batches or self.read(state.step, rank, world)
        judge = None
        if self.best is not None:
            judge = Best(
                self.out / "best",
                metric=self.best,
                accelerator=accelerator,
                task=task,
                average=average,
                patience=self.patience,
            )
        try:
            outcome = fit(
                task,
                optimizer,
                batches if on_batch is None else on_batch(batches),
                recipe=self.recipe,
                plan=plan,
                micro_batch=self.micro_batch,
                accelerator=accelerator,
                state=state,
                window=window,
                monitor=monitor,
                stop=stop,
                save=save,
                evaluators=self.evaluators,
                average=average,
                judge=judge,
            )
        finally:
            monitor.close()
            stop.close()
        self.task, self.optimizer, self.state, self.monitor, self.average = task, optimizer, state, monitor, average
        return outcome

    def checkpoints(self) -> list[Path]:
        return sorted((self.out / "checkpoints").glob("step_*"))

    def weights(self):
        return {k: v.clone() for k, v in self.task.state_dict().items()}


CLASSES = 3
FINE_TUNING = ClassifierRecipe(
    **{f: getattr(RECIPE, f) for f in ("name", "source", "expected", "epochs", "global_batch", "log_every", "engine")},
    save_every=8,
    schedule=RECIPE.schedule,
    augment=ClassifierAugment(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
    optim=ClassifierOptim(layer_decay=0.75, ema_decay=0.9, base_lr=0.1),
)
"""All that draws random numbers or keeps state: mixing, drop path, layer-wise rates, averaged weights."""
PROBE = replace(FINE_TUNING, augment=ClassifierAugment(), optim=ClassifierOptim(name="lars", base_lr=200.0))
"""LARS and batch normalisation on a frozen encoder."""


@dataclass
class LabelledBatches:
    """Class k is brightest in channel k, so that there is something to learn. Batch b is a function of b alone."""

    start: int
    draws: MixDraws | None
    branches: int
    batch: int = 8
    rank: int = 0
    world: int = 1
    seconds_waiting: float = 0.0

    def count_bad(self, samples):
        assert samples == []

    def __iter__(self):
        k = self.start
        while True:
            g = torch.Generator().manual_seed(k)
            labels = torch.randint(0, CLASSES, (self.batch,), generator=g)
            pixels = torch.randint(0, 200, (self.batch, 3, 16, 16), generator=g, dtype=torch.uint8)
            pixels[torch.arange(self.batch), labels] += 50
            values = {"pixel_values": pixels, "labels": labels}
            values["drop_path_noise"] = torch.rand(self.batch, self.branches, generator=g)
            places = np.arange(k * self.batch, (k + 1) * self.batch)
            if self.draws is not None:
                values |= self.draws(places // 40, places % 40)
            k += 1
            yield ToyBatch(k, {name: t[self.rank :: self.world] for name, t in values.items()})


class Accuracy:
    """Evaluator: top-1 and loss on fixed images, all on every rank."""

    def __init__(self, every: int = 4):
        self.every = every

    def due(self, step, total):
        return step % self.every == 0 or step == total

    @torch.no_grad()
    def __call__(self, task, step):
        values = next(iter(LabelledBatches(10**6, None, 4, batch=32))).tensors()
        logits = getattr(task, "module", task).logits({"pixel_values": values["pixel_values"]}).float()
        loss = torch.nn.functional.cross_entropy(logits, values["labels"])
        return {"top1": float((logits.argmax(1) == values["labels"]).float().mean()), "eval_loss": float(loss)}

    def finish(self, task, step):
        pass


@dataclass
class ClassifierRun(ToyRun):
    """Fine-tuning by `FINE_TUNING`, or a probe where the recipe says lars."""

    recipe: ClassifierRecipe = FINE_TUNING
    ema: bool = True
    forward_methods = ("logits", "features", "attention")

    def build(self):
        probe = self.recipe.optim.name == "lars"
        kind = {"head": "batchnorm", "pool": "cls"} if probe else {"drop_path_rate": 0.5, "pos_embed": "learned"}
        encoder = {k: v for k, v in CONFIG.items() if not k.startswith(("decoder", "norm_pix"))}
        model = MAEForImageClassification(MAEConfig(**(encoder | kind | self.config), num_labels=CLASSES))
        if probe:
            model.set_trainable(0)
        smoothing = self.recipe.augment.label_smoothing
        task = Classification(model, (0.5,) * 3, (0.5,) * 3, label_smoothing=smoothing)
        return task, build_optimizer(task, self.recipe.optim, num_layers=2)

    def read(self, start, rank, world):
        augment = self.recipe.augment
        mixing = augment.mixup > 0 or augment.cutmix > 0
        draws = MixDraws(augment, 0, size=(16, 16), images=8, length=40) if mixing else None
        return LabelledBatches(start, draws, 4, rank=rank, world=world)


SUPERVISED = replace(
    FINE_TUNING,
    optim=ClassifierOptim(name="lamb", base_lr=0.5, weight_decay=0.02, clip_grad=1.0, ema_decay=0.9, ema_warmup=True),
)
"""What models of timm bring along: LAMB, batch normalisation, an average that warms up, 4-D weights."""


class ConvNet(torch.nn.Module):
    """Two convolutions, the second in a branch that a whole image may skip; batch normalisation after both."""

    def __init__(self, channels_last: bool):
        super().__init__()
        self.channels_last = channels_last
        self.stem, self.stem_norm = torch.nn.Conv2d(3, 8, 4, stride=4, bias=False), torch.nn.BatchNorm2d(8)
        self.branch, self.branch_norm = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8)
        self.mix = torch.nn.Conv2d(8, 8, 1, bias=False)
        self.head = torch.nn.Linear(8, CLASSES)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, x, noise=None):
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem_norm(self.stem(x)).relu()  # [n, 8, 4, 4]
        branch = self.mix(self.branch_norm(self.branch(x)).relu())
        keep = torch.ones(len(x)) if noise is None else (noise >= 0.25).float() / 0.75
        return self.head((x + branch * keep.view(-1, 1, 1, 1)).mean((2, 3)))


class ConvTask(torch.nn.Module):
    """A task around it, as small as the loop allows."""

    def __init__(self, channels_last: bool):
        super().__init__()
        self.model = ConvNet(channels_last)

    def logits(self, batch):
        noise = batch["drop_path_noise"][:, 0] if self.training else None
        return self.model(batch["pixel_values"].float() / 255 - 0.5, noise)

    def forward(self, batch):
        return {"loss": torch.nn.functional.cross_entropy(self.logits(batch).float(), batch["labels"])}

    def write_model(self, folder, weights):
        folder.mkdir(parents=True)
        save_file(weights, folder / "model.safetensors")


@dataclass
class ConvRun(ToyRun):
    """Training by `SUPERVISED`."""

    recipe: ClassifierRecipe = SUPERVISED
    ema: bool = True
    channels_last: bool = True
    forward_methods = ("logits",)

    def build(self):
        task = ConvTask(self.channels_last)
        return task, build_optimizer(task.model, self.recipe.optim, num_layers=None)

    def read(self, start, rank, world):
        return LabelledBatches(start, None, 4, rank=rank, world=world)


@pytest.fixture
def conv(tmp_path):
    return ConvRun(tmp_path / "run", micro_batch=4)


@pytest.fixture
def toy(tmp_path):
    return ToyRun(tmp_path / "run")


@pytest.fixture(params=["fine-tuning", "probe"])
def classifier(tmp_path, request):
    recipe = FINE_TUNING if request.param == "fine-tuning" else PROBE
    return ClassifierRun(tmp_path / "run", recipe=recipe, micro_batch=4, ema=recipe is FINE_TUNING)


@pytest.fixture
def judged(classifier):
    """With an evaluation now and then, and the best model kept."""
    best = "eval_loss" if classifier.recipe.optim.name == "lars" else "top1"
    return replace(classifier, evaluators=(Accuracy(),), best=best)


@pytest.fixture
def probe(tmp_path):
    return ClassifierRun(tmp_path / "run", recipe=PROBE, ema=False)


@pytest.fixture
def fine_tuning(tmp_path):
    return ClassifierRun(tmp_path / "run", evaluators=(Accuracy(),), best="top1")
