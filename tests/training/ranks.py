"""What two processes check together; started by test_ranks.py under torchrun. Prints nothing, writes one JSON file.

usage: ranks.py CONFTEST FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hf_mae.evaluation.features import extract_features
from hf_mae.recipes.base import Engine
from hf_mae.training import memory
from hf_mae.training.distributed import agree, full, make_accelerator
from hf_mae.training.monitors import Window

spec = importlib.util.spec_from_file_location("toy", sys.argv[1])
assert spec is not None
assert spec.loader is not None
toy = importlib.util.module_from_spec(spec)
sys.modules["toy"] = toy
spec.loader.exec_module(toy)

FOLDER = Path(sys.argv[2])
RANK = int(os.environ["RANK"])


def fsdp_accelerator() -> Accelerator:
    """FSDP2 on the CPU: Accelerate ignores its own plugin there unless its state is told otherwise."""
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    for state in (AcceleratorState._shared_state, PartialState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def ddp_accelerator() -> Accelerator:
    """DDP again after FSDP2, which Accelerate would keep for the life of the process."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state()
    if PartialState._shared_state:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    return Accelerator(cpu=True)


def whole(run):
    return {k: full(v.detach()).clone() for k, v in run.task.named_parameters()}


def same(a, b):
    return all(torch.equal(x.detach(), y.detach()) for x, y in zip(a.values(), b.values(), strict=True))


def classifiers(results):
    """Fine-tuning and the probe, by DDP and FSDP2: what they make, and that they take it up again."""
    quality = {"evaluators": (toy.Accuracy(),), "micro_batch": 4}
    tuning = toy.ClassifierRun(FOLDER / "tuning_ddp", best="top1", **quality)
    probe = toy.ClassifierRun(FOLDER / "probe_ddp", best="eval_loss", ema=False, recipe=toy.PROBE, **quality)
    for name, run in (("tuning", tuning), ("probe", probe)):
        for kind, make in (("ddp", ddp_accelerator), ("fsdp", fsdp_accelerator)):
            run = replace(run, out=FOLDER / f"{name}_{kind}", make_accelerator=make)
            run.train()
            results[f"{name}_{kind}_is_sharded"] = any(isinstance(p, DTensor) for p in run.task.parameters())
            again = replace(run, out=FOLDER / f"{name}_{kind}_resumed")
            again.train(resume=run.out / "checkpoints" / "step_00000016")
            results[f"{name}_{kind}_resumes_exactly"] = (
                same(whole(again), whole(run))
                and same(dict(again.task.named_buffers()), dict(run.task.named_buffers()))
                and again.state == run.state
                and (run.average is None or same(shadow(again), shadow(run)))
            )
            if name == "tuning":
                results[f"{kind}_average"] = averages(run)


def convs(results):
    """What models of timm bring along; FSDP2 takes no weights in channels_last."""
    lamb = toy.ConvRun(FOLDER / "conv_ddp", micro_batch=4)
    clipped = lamb.change(optim=replace(lamb.recipe.optim, name="adamw", base_lr=0.3, agc=0.01))
    for kind, run, make in (
        ("ddp", lamb, ddp_accelerator),
        ("fsdp", replace(lamb, channels_last=False), fsdp_accelerator),
        ("fsdp_agc", replace(clipped, channels_last=False), fsdp_accelerator),
    ):
        run = replace(run, out=FOLDER / f"conv_{kind}", make_accelerator=make)
        run.train()
        again = replace(run, out=FOLDER / f"conv_{kind}_resumed")
        again.train(resume=run.out / "checkpoints" / "step_00000016")
        results[f"conv_{kind}_is_sharded"] = any(isinstance(p, DTensor) for p in run.task.parameters())
        results[f"conv_{kind}_resumes_exactly"] = (
            same(whole(again), whole(run))
            and same(dict(again.task.named_buffers()), dict(run.task.named_buffers()))
            and same(shadow(again), shadow(run))
        )


def averages(run):
    """Scores with the weights, with their averages, and with the weights again; then the weights' own bits."""
    inner, before = getattr(run.task, "module", run.task).eval(), whole(run)
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        scores = [inner.logits({"pixel_values": pixels})]
        with run.average.swapped():
            scores.append(inner.logits({"pixel_values": pixels}))
        scores.append(inner.logits({"pixel_values": pixels}))
    attention = inner.attention(pixels)
    # The share of the second rank is used up.
    share = pixels[: 4 * (1 - RANK)]
    with torch.no_grad():
        uneven = [inner.logits({"pixel_values": share}), inner.attention(share)]
    sizes = [None, None]
    torch.distributed.all_gather_object(sizes, [list(x.shape) for x in uneven])
    return {
        "scores": [x.tolist() for x in scores],
        "same": same(whole(run), before),
        "attention": attention.tolist(),
        "uneven": [x.tolist() for x in uneven],
        "uneven_sizes": sizes,
    }


def shadow(run):
    return {k: full(v) for k, v in run.average.state().items()}


def main():
    torch.set_num_threads(1)
    results = {}
    ddp = toy.ToyRun(FOLDER / "ddp", micro_batch=4, ema=True).change(save_every=8)
    ddp.train()
    results["ddp_trains"] = ddp.state.step == 20
    expected = whole(ddp)

    # Resume under DDP from the middle of a log window: the same bits, rows included.
    resumed = replace(ddp, out=FOLDER / "ddp_resumed")
    resumed.train(resume=ddp.out / "checkpoints" / "step_00000016")
    results["ddp_resumes_exactly"] = same(whole(resumed), expected)

    # A signal on one rank stops both after the same update.
    stopped = replace(ddp, out=FOLDER / "stopped")
    results["signal_outcome"] = stopped.train(on_batch=toy.interrupt(5 if RANK == 1 else -1, signal.SIGTERM))
    steps = [None, None]
    torch.distributed.all_gather_object(steps, stopped.state.step)
    results["signal_steps"] = steps
    finished = replace(ddp, out=FOLDER / "stopped_then_resumed")
    finished.train(resume=stopped.checkpoints()[-1])
    results["stopped_run_resumes_exactly"] = same(whole(finished), expected)

    # A loss that is not finite on one rank is seen by all.
    accelerator = Accelerator(cpu=True)
    window = Window(torch.device("cpu"))
    window.add({"loss": torch.tensor(float("nan") if RANK == 1 else 1.0)}, step=3)
    results["nan_step"] = window.non_finite_step(accelerator)

    # One rank's error reaches the other.
    try:
        agree(OSError("disk on fire") if RANK == 1 else None, accelerator, "saving")
    except (OSError, RuntimeError) as error:
        results["agreed_error"] = str(error)
    try:
        make_accelerator(Engine(expect_processes=3))
    except RuntimeError as error:
        results["expected_three"] = str(error)

    # FSDP2, from the state that DDP saved and from scratch.
    fsdp = replace(ddp, out=FOLDER / "fsdp", make_accelerator=fsdp_accelerator)
    fsdp.train()
    results["fsdp_blocks"] = sum(isinstance(m, FSDPModule) for m in fsdp.task.modules())
    results["fsdp_is_sharded"] = any(isinstance(p, DTensor) for p in fsdp.task.parameters())
    results["fsdp_to_ddp"] = max(
        float((a - b).abs().max()) for a, b in zip(whole(fsdp).values(), expected.values(), strict=True)
    )
    from_ddp = replace(fsdp, out=FOLDER / "fsdp_from_ddp")
    from_ddp.train(resume=ddp.out / "checkpoints" / "step_00000016")
    results["fsdp_from_ddp"] = max(
        float((a - b).abs().max()) for a, b in zip(whole(from_ddp).values(), expected.values(), strict=True)
    )
    again = replace(fsdp, out=FOLDER / "fsdp_resumed")
    again.train(resume=fsdp.out / "checkpoints" / "step_00000016")
    results["fsdp_resumes_exactly"] = same(whole(again), whole(fsdp))
    shadow = {k: full(v) for k, v in again.average.state().items()}
    results["fsdp_average_resumes_exactly"] = same(shadow, {k: full(v) for k, v in fsdp.average.state().items()})

    # What is computed again changes no bit of a sharded step.
    gelu = fsdp.change(engine=replace(fsdp.recipe.engine, checkpoint_activations="gelu"))
    gelu = replace(gelu, out=FOLDER / "fsdp_gelu")
    gelu.train()
    results["fsdp_gelu_is_exact"] = same(whole(gelu), whole(fsdp))

    # The micro-batch that fits on the rank with less memory is taken by both.
    def sample(n):
        return {"pixel_values": torch.zeros(n, 3, 16, 16, dtype=torch.uint8), "noise": torch.rand(n, 16)}

    for name, run in (("ddp", finished), ("fsdp", again)):
        inner, before = accelerator.unwrap_model(run.task), whole(run)
        needed = memory._measure(inner, sample(5), accelerator)  # on both: it gathers shards
        sizes = []
        for budget in (1e9, 1e9 if RANK == 0 else needed + 1e6):
            memory._budget = lambda device, budget=budget: budget
            sizes.append(memory.largest_micro_batch(inner, sample, 64, accelerator))
        everyone = [None, None]
        torch.distributed.all_gather_object(everyone, sizes)
        results[f"{name}_micro_batches"] = everyone
        results[f"{name}_is_untouched"] = same(whole(run), before)

    # Features of 11 images on two ranks: each once, in order, the same under DDP and FSDP2.
    images = torch.randint(0, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for name, run in (("ddp", finished), ("fsdp", again)):
        run.task.eval()
        register_fsdp_forward_method(accelerator.unwrap_model(run.task), "features")
        found = extract_features(run.task, images, accelerator, batch=4)
        results[f"{name}_features"] = found.tolist()
    classifiers(results)
    convs(results)
    if RANK == 0:
        (FOLDER / "results.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


main()
