"""Probe a frozen encoder with a linear head, on one process or many.

python scripts/probe.py probe-small --init-from runs/NAME --data.path DIR_OR_HUB_ID

accelerate launch --multi_gpu --num_processes 8 scripts/probe.py PRESET ...
"""

import sys

from hf_mae.cli import main

if __name__ == "__main__":
    main(["probe", *sys.argv[1:]])
