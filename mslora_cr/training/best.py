"""The bank of a task's best validation so far, which a checkpoint stores beside the latest one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.io import load_bank, save_bank
from mslora_cr.training.checkpoints import EXTRA_STATE

BEST_FOLDER = "best"


@dataclass(frozen=True)
class BestBank:
    """A bank and its origin.

    Attributes:
        step: The optimizer step of its validation.
        metrics: The figures measured then.
        bank: Its numbers, on the CPU.
        extra_state: Further trained tensors.
    """

    step: int
    metrics: dict[str, float]
    bank: Bank
    extra_state: Mapping[str, Tensor]

    def write(self, checkpoint: Path) -> dict[str, Any]:
        """Write the numbers into a checkpoint, and return the rest for its state."""
        save_bank(self.bank, checkpoint / BEST_FOLDER, beside={EXTRA_STATE: self.extra_state})
        return {"step": self.step, "metrics": self.metrics}

    @classmethod
    def read(cls, checkpoint: Path, state: Mapping[str, Any]) -> BestBank:
        """Read what `write` stored.

        Raises:
            BankError: The numbers are damaged.
        """
        folder = checkpoint / BEST_FOLDER
        file = folder / EXTRA_STATE
        extra_state = load_file(file) if file.is_file() else {}
        return cls(state["step"], state["metrics"], load_bank(folder), extra_state)
