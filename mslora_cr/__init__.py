"""Modality-specific LoRA banks with contrastive regularization for incremental biomedical imaging tasks.

    import mslora_cr
    model = mslora_cr.load("checkpoints/RUN", task="derm")
    model.answer("photo.jpg", "Which skin condition is seen?")

Every name below is loaded on first use, so `import mslora_cr` imports no torch. docs/how-to/use.md is the guide.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mslora_cr.api import (
        Answer,
        AnsweringModel,
        Bank,
        BankError,
        ConfigError,
        DataError,
        ImageSource,
        ModelError,
        Results,
        StreamConfig,
        UserError,
        banks_of,
        evaluate,
        load,
        load_bank,
        load_config,
        merge_banks,
        read_results,
        save_bank,
        sum_banks,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "AnsweringModel",
    "Bank",
    "BankError",
    "ConfigError",
    "DataError",
    "ImageSource",
    "ModelError",
    "Results",
    "StreamConfig",
    "UserError",
    "banks_of",
    "evaluate",
    "load",
    "load_bank",
    "load_config",
    "merge_banks",
    "read_results",
    "save_bank",
    "sum_banks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        # PEFT imports bitsandbytes, which warns if a processor could use an optional kernel that is not installed.
        logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
        return getattr(import_module("mslora_cr.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
