"""The command line: `hf-mae COMMAND PRESET --group.field value`.

The only importer of tyro. A preset is a complete recipe; flags override single fields.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hf_mae
from hf_mae.cli.arguments import list_presets, nearest, parse_recipe
from hf_mae.cli.hub import (
    card_command,
    convert_command,
    demo_command,
    export_command,
    publish_command,
    pull_command,
    space_command,
)
from hf_mae.cli.sweeps import parse_sweep, sweep_command
from hf_mae.cli.tools import (
    background_command,
    doctor_command,
    evaluate_command,
    parse_plan,
    plan_command,
    reconstruct_command,
    split_command,
)
from hf_mae.cli.training import (
    birds_command,
    finetune_command,
    lr_find_command,
    pretrain_command,
    probe_command,
    supervise_command,
)
from hf_mae.training.console import one_writer

__all__ = ["list_presets", "main", "parse_plan", "parse_recipe", "parse_sweep"]

USAGE = f"""hf-mae {hf_mae.__version__}: masked autoencoders for the Hugging Face ecosystem

  hf-mae pretrain [PRESET] [--group.field value ...]   pretrain, or continue the run in --out (default: quickstart)
  hf-mae pretrain --list                               every preset, with its source and what to expect
  hf-mae pretrain PRESET --help                        every field of a recipe, with the preset's values
  hf-mae finetune [PRESET] --init-from MODEL [...]     train a classifier: all of it, --trainable-blocks K, or scratch
  hf-mae probe [PRESET] --init-from MODEL [...]        train a head on the frozen encoder; nearest neighbours as well
  hf-mae supervise [PRESET] --data.path DATA [...]     train a model of timm: ResNet strikes back, birds, your own
  hf-mae birds [VARIANT] --data.path DATA [...]        the ReXNet bird classifier in its stages
  hf-mae lr-find [COMMAND] [PRESET] [...]              loss against learning rate: plot and suggestion
  hf-mae split DATA RULE --out FILE                    divide one split into train, validation and test: index lists
  hf-mae background DIR OUT                            a copy of a folder of pictures without backgrounds (GrabCut)
  hf-mae evaluate [PRESET] --model MODEL [...]         accuracy, calibration, confusion and mistakes of a classifier
  hf-mae sweep KIND [...]                              several runs side by side: seeds, over, partial, augment,
                                                       transfer, resolution (`hf-mae sweep --help`)
  hf-mae plan [PRESET] --gpu a100 --gpus 64 [...]      FLOPs, memory, hours, loader and disk of a run, by arithmetic
  hf-mae plan --check                                  what published runs say of its assumptions
  hf-mae doctor [--train]                              this machine: versions, devices, threads, extras; does it train?
  hf-mae reconstruct MODEL IMAGE ... [--out FILE]      masked / predicted / pasted pictures of your images
  hf-mae convert SOURCE OUT                            official .pth and other weights to a model folder
  hf-mae export MODEL [OUT] [--target vit_mae ...]     stock classes of transformers, timm, ONNX; proven equal
  hf-mae card EXPORT ORG/NAME                          the model card, from the run's records
  hf-mae publish RUN_OR_EXPORT ORG/NAME [--dry-run]    export, card, checks, one commit on the Hub, verdict
  hf-mae pull ORG/NAME OUT                             a checkpoint published with --checkpoint, to continue here
  hf-mae demo [--reconstruct MODEL] [--classify MODEL] try models on your pictures in the browser
  hf-mae space OUT [--reconstruct ID] [--classify ID]  the same page as a Hugging Face Space

On several GPUs: accelerate launch --multi_gpu --num_processes N scripts/pretrain.py PRESET ...
On several CPU processes: torchrun --standalone --nproc_per_node N scripts/pretrain.py PRESET ...
HF_MAE_TRACEBACK=1 shows where an error came from.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exit 2 with one plain sentence if the user can mend it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    commands = {
        "pretrain": pretrain_command,
        "finetune": finetune_command,
        "probe": probe_command,
        "supervise": supervise_command,
        "birds": birds_command,
        "lr-find": lr_find_command,
        "evaluate": evaluate_command,
        "sweep": sweep_command,
        "plan": plan_command,
        "doctor": doctor_command,
        "split": split_command,
        "background": background_command,
        "reconstruct": reconstruct_command,
        "convert": convert_command,
        "export": export_command,
        "card": card_command,
        "publish": publish_command,
        "pull": pull_command,
        "demo": demo_command,
        "space": space_command,
    }
    if command in {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return
    if command == "--version":
        sys.stdout.write(f"{hf_mae.__version__}\n")
        return
    try:
        if command not in commands:
            raise ValueError(f"command {command!r} is unknown; {nearest(command, commands)}")
        with one_writer(draws=os.environ.get("RANK", "0") == "0"):
            commands[command](arguments)
        _end_processes()
    except KeyboardInterrupt:
        sys.stderr.write("hf-mae: interrupted; what was saved before is whole\n")
        raise SystemExit(130) from None
    except BrokenPipeError:  # `hf-mae pretrain --help | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        if not _ours(error) or os.environ.get("HF_MAE_TRACEBACK"):
            raise
        sys.stderr.write(f"hf-mae: error: {error}\n")
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None


def _end_processes() -> None:
    """Leave the process group, if a command has joined one. Not after an error: others may be waiting in it."""
    distributed = sys.modules.get("torch.distributed")  # not imported: some commands answer without torch
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _ours(error: BaseException) -> bool:
    """Return whether a `raise` of this package made the error, rather than a library or the interpreter met it."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(hf_mae.__file__).parent)
    return inside and (frames[-1].line or "").startswith("raise")
