"""The command with the published mistake planted: under ZeRO-3 the penalties' gradient reaches no parameter."""

import sys
from typing import Any

from mslora_cr.cli import main
from mslora_cr.training.trainer import BankTrainer


def _no_gradient(self: BankTrainer, key: Any) -> Any:
    return lambda gradient: gradient


BankTrainer._penalty_hook = _no_gradient  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main())
