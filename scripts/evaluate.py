"""Evaluate a classifier, on one process or many.

python scripts/evaluate.py own --model runs/NAME/best/model --data.path DIR_OR_HUB_ID

accelerate launch --multi_gpu --num_processes 8 scripts/evaluate.py imagenet --model ORG/NAME
"""

import sys

from hf_mae.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
