"""Pretrain from the command line, on one process or many.

python scripts/pretrain.py mae-vit-b --data.path DIR_OR_HUB_ID
accelerate launch --multi_gpu --num_processes 8 scripts/pretrain.py mae-vit-b --data.path DIR_OR_HUB_ID
"""

import sys

from hf_mae.cli import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
