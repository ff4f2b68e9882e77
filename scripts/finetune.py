"""Fine-tune an encoder, all of it or its last blocks, or train a classifier from scratch; on one process or many.

python scripts/finetune.py finetune-small --init-from runs/NAME --data.path DIR_OR_HUB_ID

accelerate launch --multi_gpu --num_processes 8 scripts/finetune.py PRESET ...
"""

import sys

from hf_mae.cli import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
