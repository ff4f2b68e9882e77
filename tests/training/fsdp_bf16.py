"""What FSDP2 with bf16 computes in float32; started by test_launch.py under torchrun. Writes FOLDER/found.json.

usage: fsdp_bf16.py FOLDER
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from fsdp_on_cpu import take_cpu_for_a_gpu
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hf_mae import MAEConfig, MAEForPreTraining
from hf_mae.models.masking import count_kept, mask_from_noise
from hf_mae.models.modeling_classification import MAEForImageClassification
from hf_mae.recipes.base import Engine
from hf_mae.training import distributed
from hf_mae.training.optim import build_adamw
from hf_mae.training.tasks import Classification, Pretraining

SIZE = {"image_size": 28, "patch_size": 2, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    take_cpu_for_a_gpu()
    accelerator = distributed.make_accelerator(Engine(precision="bf16"))
    optim = type("Optim", (), {"weight_decay": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "decay_tokens": True})()
    dtypes: dict[str, str] = {}
    g = torch.Generator().manual_seed(accelerator.process_index)

    # Pretraining: the masks of thousands of draws of 196 patches, and the loss.
    torch.manual_seed(0)
    task = Pretraining(MAEForPreTraining(MAEConfig(**SIZE, **DECODER)), (0.5,) * 3, (0.5,) * 3)
    alone = copy.deepcopy(task)
    task, _ = accelerator.prepare(task, build_adamw(task, optim))
    masks, seen = [], task.model.masking_of

    def masking_of(patches, noise):
        dtypes["noise"] = str(noise.dtype)
        masking = seen(patches, noise)
        masks.append(masking.mask)
        return masking

    task.model.masking_of = masking_of
    pixels = torch.randint(0, 256, (500, 3, 28, 28), dtype=torch.uint8, generator=g)
    different = 0
    for _ in range(4):
        noise = torch.rand(500, 196, generator=g)
        with accelerator.autocast():
            loss = task({"pixel_values": pixels, "noise": noise})["loss"]
        different += int((masks[-1] != mask_from_noise(noise, count_kept(196, 0.75)).mask).any(1).sum())
    with torch.autocast("cpu", torch.bfloat16):
        loss_alone = alone({"pixel_values": pixels, "noise": noise})["loss"]
    accelerator.backward(loss)
    dtypes |= {"loss": str(loss.dtype), "gradient": str(next(p.grad.dtype for p in task.parameters()))}

    # Classification: what comes with the batch, and the scores of an evaluation.
    config = MAEConfig(**SIZE, drop_path_rate=0.3, num_labels=3)
    classifier = Classification(MAEForImageClassification(config), (0.5,) * 3, (0.5,) * 3)
    plain = copy.deepcopy(classifier).eval()
    classifier, _ = accelerator.prepare(classifier, build_adamw(classifier, optim))
    register_fsdp_forward_method(classifier, "logits")
    mixed = classifier.pixels

    def looked_at(batch):
        dtypes.update({name: str(batch[name].dtype) for name in ("mix_lam", "drop_path_noise") if name in batch})
        return mixed(batch)

    classifier.pixels = looked_at
    batch = {"pixel_values": pixels[:8], "labels": torch.arange(8) % 3, "mix_lam": torch.rand(8, generator=g)}
    batch |= {"mix_box": torch.zeros(8, 4, dtype=torch.int64), "drop_path_noise": torch.rand(8, 4, generator=g)}
    with accelerator.autocast():
        dtypes["classifier_loss"] = str(classifier(batch)["loss"].dtype)
    with torch.no_grad():
        score = classifier.eval().logits({"pixel_values": pixels[:8]})
        expected = plain.logits({"pixel_values": pixels[:8]})
    dtypes["score"] = str(score.dtype)

    found = {
        "sharded": all(isinstance(p, DTensor) for p in task.parameters()),
        "masks": sum(distributed.gather_objects(sum(map(len, masks)), accelerator)),
        "different_masks": sum(distributed.gather_objects(different, accelerator)),
        "dtypes": dtypes,
        "loss": float(loss),
        "loss_alone": float(loss_alone),
        "score_difference": float((score - expected).abs().max()),
    }
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
