"""Train a model of timm on labels: ResNet strikes back, the ReXNet birds, your own; on one process or many.

python scripts/supervise.py supervise-small --data.path DIR_OR_HUB_ID

accelerate launch --multi_gpu --num_processes 8 scripts/supervise.py PRESET ...
"""

import sys

from hf_mae.cli import main

if __name__ == "__main__":
    main(["supervise", *sys.argv[1:]])
