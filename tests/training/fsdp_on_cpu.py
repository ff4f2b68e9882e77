"""Run a command of hf-mae with FSDP2 on CPUs: Accelerate ignores its own plugin there unless it is told otherwise.

usage: fsdp_on_cpu.py COMMAND ... (started by `accelerate launch` with a YAML that asks for FSDP)
"""

from __future__ import annotations

import os
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState


def take_cpu_for_a_gpu() -> None:
    """Let AcceleratorState do for MULTI_CPU what it does for MULTI_GPU: the lines of its `__init__`."""
    init = AcceleratorState.__init__

    def patched(self, *args, fsdp_plugin=None, **kwargs):
        fresh = not AcceleratorState._shared_state
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fresh and self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        take_cpu_for_a_gpu()
    from hf_mae.cli import main

    main(sys.argv[1:])
