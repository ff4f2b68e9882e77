"""What a fresh masked autoencoder starts from: stock transformers beside hf_mae.

Prints the largest position embedding of encoder and decoder, whether they train, and how far the predictions of the
masked patches of one image lie apart. With zero, frozen positions the decoder cannot tell masked patches apart.

    python benchmarks/stock_init.py
"""

from __future__ import annotations

import json

import torch
import transformers
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import hf_mae

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 192,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}


def main() -> None:
    torch.manual_seed(0)
    pixel_values = torch.randn(2, 3, 32, 32)
    stock = ViTMAEForPreTraining(ViTMAEConfig(**SIZES)).eval()
    ours = hf_mae.MAEForPreTraining(hf_mae.MAEConfig(**SIZES)).eval()
    stock_out, out = stock(pixel_values), ours(pixel_values)
    for name, tables, pred, mask in (
        (
            f"transformers {transformers.__version__}",
            (stock.vit.embeddings.position_embeddings, stock.decoder.decoder_pos_embed),
            stock_out.logits,
            stock_out.mask,
        ),
        (f"hf_mae {hf_mae.__version__}", (ours.pos_embed, ours.decoder_pos_embed), out.pred, out.mask),
    ):
        masked = pred[0][mask[0].bool()]
        found = {
            "largest positions": [round(t.abs().max().item(), 4) for t in tables],
            "trainable": [t.requires_grad for t in tables],
            "spread": round((masked - masked[0]).abs().max().item(), 4),
        }
        print(json.dumps({name: found}))


if __name__ == "__main__":
    main()
