"""Trains the runs that the configurations on the command line ask for, one after another in the same processes."""

import sys

from mslora_cr.config import load_config
from mslora_cr.training.distributed import stopping_together
from mslora_cr.training.stream import train

if __name__ == "__main__":
    with stopping_together():
        for path in sys.argv[1:]:
            train(load_config(path))
