"""Run a command of hf-mae whose third update takes long, inside one call that no handler of Python interrupts.

usage: slow_update.py BUSY COMMAND ... (the file BUSY is written when that update begins)
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hf_mae.cli import main
from hf_mae.training.tasks import Pretraining

updates, forward = [], Pretraining.forward


def slow(self, batch):
    updates.append(1)
    if len(updates) == 3:
        Path(sys.argv[1]).touch()
        matrix = torch.ones(6000, 6000, dtype=torch.float64)
        torch.mm(matrix, matrix)
    return forward(self, batch)


Pretraining.forward = slow
main(sys.argv[2:])
