"""`python -m mslora_cr`, which launchers such as torchrun need."""

import sys

from mslora_cr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
