"""Train one recipe several times, with other seeds or other numbers of trainable blocks, on one process or many.

python scripts/sweep.py partial finetune-small --init-from runs/NAME --data.path DIR_OR_HUB_ID

torchrun --standalone --nproc_per_node 8 scripts/sweep.py seeds finetune PRESET --num-seeds 5 ...
"""

import sys

from hf_mae.cli import main

if __name__ == "__main__":
    main(["sweep", *sys.argv[1:]])
