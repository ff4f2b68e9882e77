"""What two processes evaluate together; started by test_ranks.py under torchrun. Each rank writes one JSON file.

usage: ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from hf_mae.evaluation import features as of_features
from hf_mae.evaluation.classification import ClassificationQuality, evaluate_real
from hf_mae.evaluation.features import FrozenFeatures, split_features

NAMES = [f"class {i}" for i in range(7)]


class Linear(nn.Module):
    """A task whose features are the pixels."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 7, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 84).sin().view(7, 12))

    def features(self, pixel_values):
        return pixel_values.flatten(1).float() / 255

    def logits(self, batch):
        # One example after the other: a matrix product of another height may round otherwise.
        features = self.features(batch["pixel_values"])
        return torch.stack([self.head(f) for f in features]) if len(features) else features[:, :7]


def batches(rank, world, n, seed, size=4):
    """Contiguous shares of n rows, as many batches on every rank: the last are smaller, or empty."""
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 3, 2, 2), generator=g, dtype=torch.uint8)
    labels, share = torch.randint(0, 7, (n,), generator=g), -(-n // world)
    mine = torch.arange(rank * share, min((rank + 1) * share, n))
    parts = [mine[i : i + size] for i in range(0, share, size)]
    return [{"pixel_values": pixels[p], "labels": labels[p], "rows": p} for p in parts]


def evaluate(accelerator):
    """Return every number of every evaluator, times aside."""
    rank, world = accelerator.process_index, accelerator.num_processes
    task, test = Linear(), batches(rank, world, 13, 0)
    quality = ClassificationQuality(test, NAMES, accelerator, every=0)
    numbers = quality(task, 1)
    del numbers["eval_images_per_second"]
    numbers |= evaluate_real(task, test, lambda row: [row % 7, 3] if row % 5 else [], accelerator)
    train, labels, _ = split_features(task, batches(rank, world, 41, 1), accelerator)
    features, test_labels, _ = split_features(task, test, accelerator)
    of_features.QUERIES, of_features.BANK = 2, 16  # several blocks for every rank, and none left over for the last
    frozen = FrozenFeatures((train, labels), (features, test_labels), accelerator, k=5)
    return {"numbers": numbers | frozen(task, 0), "results": quality.latest["weights"].to_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = evaluate(Accelerator(cpu=True))
    (Path(sys.argv[1]) / f"rank_{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
