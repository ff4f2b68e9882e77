"""What several processes run together, one command after another; started by test_shares.py under torchrun.

usage: commands.py FILE, which holds a list of the arguments of `hf-mae`
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hf_mae import cli

if __name__ == "__main__":
    torch.set_num_threads(1)
    end = cli._end_processes
    cli._end_processes = lambda: None  # all commands share one process group
    for command in json.loads(Path(sys.argv[1]).read_text()):
        sys.stderr.write(f"commands.py: {' '.join(command)}\n")
        cli.main(command)
    end()
