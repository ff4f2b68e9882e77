"""One process or many: what really started, and the few places where DDP and FSDP2 differ.

Launch forms that work (measured; `accelerate launch --cpu --num_processes 2` silently starts ONE process):

    python scripts/pretrain.py ...                                            one process
    accelerate launch --multi_gpu --num_processes 8 scripts/pretrain.py ...   one process per GPU
    accelerate launch --config_file scripts/configs/fsdp2.yaml scripts/pretrain.py ...   FSDP2
    torchrun --standalone --nproc_per_node 2 scripts/pretrain.py ...          works without a GPU as well (gloo)

`accelerate config` offers more than this package supports; `make_accelerator` takes what works, and refuses or replaces
the rest. docs/clusters.md shows how to start on Slurm.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_mae.recipes.base import Engine
from hf_mae.threads import choose_threads, describe_threads

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others; what one of them waits for, such as the Hub, has to take less."""


WORLD_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where MPI launchers say how many processes they started."""


def make_accelerator(engine: Engine) -> Accelerator:
    """Start Accelerate, and refuse a launch that is not the one that was asked for or that would not work.

    Raises:
        ValueError: `accelerate config` chose a way of training that is not supported, or `engine.precision` does not
            work on this device.
        RuntimeError: the launcher started another number of processes than Accelerate uses, or than
            `engine.expect_processes` says. Without this check several processes would each believe to be alone and
            write one run folder.
    """
    _refuse_separate_tasks()
    plugin = _fsdp_plugin(engine)
    has_gpu = torch.accelerator.is_available()
    if engine.precision == "fp16" and not has_gpu:
        raise ValueError("engine.precision=fp16 needs a GPU; use --engine.precision bf16 or no")
    if engine.deterministic:
        _be_deterministic()
    if engine.tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    accelerator = Accelerator(
        # Without a GPU, Accelerate joins the launched processes only when told to use the CPU.
        cpu=not has_gpu,
        mixed_precision=engine.precision,
        fsdp_plugin=plugin,
        # The recipe decides, not the environment, which could divide every loss or compile the model.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            # Not static_graph: it fails when the first micro-batch runs without synchronisation (torch 2.14), and every
            # parameter takes part in every loss anyway.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    torch.set_num_threads(choose_threads(torch.get_num_threads()))
    used = accelerator.num_processes
    said = [name for name in WORLD_SIZES if "WORLD_SIZE" not in os.environ and name in os.environ]
    name = said[0] if said else "WORLD_SIZE"
    if (launched := _number(name)) != used:
        raise RuntimeError(
            f"the launcher started {name}={launched} process(es) but Accelerate uses {used}; they would "
            "overwrite each other. Without a GPU set ACCELERATE_USE_CPU=true, or use: "
            "torchrun --nproc_per_node N scripts/pretrain.py"
        )
    if engine.expect_processes is not None and engine.expect_processes != used:
        raise RuntimeError(
            f"engine.expect_processes={engine.expect_processes} but {used} process(es) started. `accelerate "
            "launch --cpu --num_processes N` and a launch without GPUs start one process: use "
            "torchrun --standalone --nproc_per_node N"
        )
    return accelerator


def _be_deterministic() -> None:
    """Set all of torch's switches for the same bits; the first is read when CUDA makes its context.

    Raises:
        ValueError: the environment has set it to what is not deterministic.
    """
    if (found := os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")) not in (":4096:8", ":16:8"):
        raise ValueError(
            f"engine.deterministic=True needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, and it is {found}; unset it"
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def refuse_nondeterministic() -> Iterator[None]:
    """Say in one sentence that an operation has no deterministic kernel, where `engine.deterministic` asks for one.

    Raises:
        ValueError: torch refused an operation inside.
    """
    try:
        yield
    except RuntimeError as error:
        # "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set ..."
        said = str(error)
        if not torch.are_deterministic_algorithms_enabled() or "deterministic" not in said:
            raise
        operation = said.split(" does not have ")[0] if " does not have a deterministic" in said else said.split(".")[0]
        raise ValueError(
            f"engine.deterministic=True: {operation} has no deterministic kernel on this device; leave "
            "--engine.deterministic out, or take a model without it"
        ) from error


def _number(name: str, default: int = 1) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _refuse_separate_tasks() -> None:
    """Refuse several tasks of Slurm that no launcher has joined: each would be a whole run, in one folder.

    SLURM_STEP_NUM_TASKS counts the tasks of the step that this process belongs to. A batch script does not have it: it
    is one process, and SLURM_NTASKS says that several were meant.
    """
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    if (tasks := _number(name)) > 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"{name}={tasks}: Slurm was asked for {tasks} tasks, which no launcher has joined, so that each would be "
            "a run by itself; start one task per node, which starts the processes: srun --ntasks-per-node=1 torchrun "
            "--nnodes $SLURM_NNODES --nproc_per_node 8 --rdzv_backend c10d --rdzv_id $SLURM_JOB_ID --rdzv_endpoint "
            "HOST:29500 scripts/pretrain.py ... (docs/clusters.md), or set WORLD_SIZE=1 for runs of one process"
        )


def _fsdp_plugin(engine: Engine) -> FullyShardedDataParallelPlugin | None:
    """Return FSDP2 as this package needs it where the launcher asks for FSDP, else None.

    Two settings are not the ones that `accelerate config` makes by default:

    - "CPU RAM efficient loading" leaves the weights of all ranks but the first empty, and fails on buffers, such as the
      position tables. Every rank makes or reads the weights itself.
    - With bf16 the policy of Accelerate also casts inputs, losses and gradient sums to bf16, and so changes masks:
      noise from 0.5 to 1 has 128 values in bf16, 2 ** 23 in float32. Here autocast chooses, operation by operation, as
      without FSDP; weights and gradients travel as float32, twice the bytes.

    Raises:
        ValueError: DeepSpeed, Megatron-LM, FSDP1, parallelism other than over data, or an option of FSDP that is not
            supported.
    """
    for variable, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ):
        if _is_on(variable):
            raise ValueError(
                f"`accelerate config` chose {what} ({variable}={os.environ[variable]}), which is not supported; shard "
                "the model with FSDP2: accelerate launch --config_file scripts/configs/fsdp2.yaml"
            )
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    found = _number("FSDP_VERSION")
    if found != 2:
        raise ValueError(
            f"FSDP version {found} (`--use_fsdp` alone means 1) is not supported; add --fsdp_version 2 to "
            "`accelerate launch`, or choose 2 in `accelerate config`"
        )
    if engine.precision == "fp16":
        raise ValueError(
            "engine.precision=fp16 does not work with FSDP, whose gradient scaler does not fit fused optimizers; use "
            "--engine.precision bf16"
        )
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise ValueError(
            "fsdp_offload_params=true is not supported; set it to false, and save memory with "
            "--engine.checkpoint-activations blocks or a smaller --micro-batch"
        )
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "fsdp_activation_checkpointing=true would change the names of the weights; set it to false and use "
            "--engine.checkpoint-activations blocks"
        )
    names = [name for name in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",") if name.strip()]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=cast(Any, os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")),
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # also sets the environment variable that transformers reads
    )
    plugin.transformer_cls_names_to_wrap = names or None  # None: what the task names; an empty answer is read as [""]
    return plugin


def prepare(accelerator: Accelerator, task: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Wrap task and optimizer for the ranks that were started. A collective: call it on all ranks.

    Raises:
        ValueError: a class that `accelerate config` wraps by is not in the model.
    """
    names = getattr(getattr(accelerator.state, "fsdp_plugin", None), "transformer_cls_names_to_wrap", None) or []
    there = {type(module).__name__ for module in task.modules()}
    if missing := [name for name in names if name not in there]:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap={','.join(names)}: this model has no layer of class {missing[0]}; "
            "leave it empty, and the blocks are found"
        )
    task, optimizer = accelerator.prepare(task, optimizer)
    return task, optimizer


def describe_world(accelerator: Accelerator) -> str:
    """Return one line: how many processes, on what, in which precision, and what was asked for but is not used."""
    n = accelerator.num_processes
    kind = "FSDP2" if accelerator.is_fsdp2 else str(accelerator.distributed_type).rsplit(".", 1)[-1]
    used = accelerator.mixed_precision
    device = accelerator.device.type
    if device == "cuda":
        device += f" ({torch.cuda.get_device_name(accelerator.device)})"
    line = (
        f"{n} process{'es' if n > 1 else ''} ({kind}) on {device}, precision {used}, "
        f"{describe_threads(torch.get_num_threads())}"
    )
    if (asked := os.environ.get("ACCELERATE_MIXED_PRECISION", used)) not in (used, "no"):
        line += f" (the {asked} of `accelerate config` is not used: --engine.precision {asked} chooses it)"
    if _is_on("ACCELERATE_USE_FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        line += " (the FSDP of `accelerate config` is not used: it needs more than one process, each with a GPU)"
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        line += " (the dynamo backend of `accelerate config` is not used: --engine.compile compiles the blocks)"
    if accelerator.device.type == "cuda":
        local, visible = _number("LOCAL_WORLD_SIZE"), torch.cuda.device_count()
        if local < visible:
            line += (
                f" ({local} of {visible} GPUs used: accelerate launch --multi_gpu --num_processes {visible} "
                "scripts/pretrain.py ... uses all)"
            )
    return line


@contextmanager
def accumulate(accelerator: Accelerator, module: nn.Module, last: bool) -> Iterator[None]:
    """Run one micro-batch; gradients are synchronised over ranks only in the last one.

    Forward AND backward belong inside: under DDP a forward outside of `no_sync` synchronises anyway.
    """
    with nullcontext() if last else accelerator.no_sync(module):
        yield


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a possibly sharded tensor. A collective when it is sharded: call it on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole` laid out as `like`: this rank's shard if `like` is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    return whole


def reduce_sum(values: Tensor, accelerator: Accelerator) -> Tensor:
    """Return the sum over ranks. A collective: call it on all ranks."""
    if accelerator.num_processes > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def gather_objects(value: Any, accelerator: Accelerator) -> list[Any]:
    """Return every rank's value, in rank order. A collective: call it on all ranks."""
    if accelerator.num_processes == 1:
        return [value]
    gathered: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(gathered, value)
    return gathered


def agree(error: BaseException | None, accelerator: Accelerator, doing: str) -> None:
    """Raise on every rank what happened on any. A collective: call it on all ranks.

    Raises:
        BaseException: this rank's own error, or a RuntimeError that quotes another rank's.
    """
    messages = gather_objects(None if error is None else f"{type(error).__name__}: {error}", accelerator)
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {rank} failed while {doing}: {message}")


@contextmanager
def agreement(accelerator: Accelerator, doing: str) -> Iterator[None]:
    """Raise on every rank what any rank meets inside, where no collective may be: the others would wait for it.

    Raises:
        BaseException: see `agree`.
    """
    error = None
    try:
        yield
    except (ValueError, RuntimeError, OSError) as caught:
        error = caught
    agree(error, accelerator, doing)
