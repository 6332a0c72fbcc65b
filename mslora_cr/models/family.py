"""The capabilities of a base model's family, read from its folder alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mslora_cr.models.layout import CHAT_TEMPLATES, LLAVA_MED, ModelError, read_config
from mslora_cr.utils.strict_json import JsonError, read_object


@dataclass(frozen=True)
class Family:
    """Capabilities of a base model's family."""

    own_template: bool
    """The model is prompted by a processor and a chat template of its own; otherwise by LLaVA-Med's protocol."""

    @property
    def fixed_image_length(self) -> bool:
        """Every image takes equally many positions, so that lengths are known without looking at images."""
        return not self.own_template

    @property
    def published_banks(self) -> bool:
        """The published checkpoints' names of layers exist for it."""
        return not self.own_template

    @property
    def liger(self) -> bool:
        """Liger's kernels are checked for its language model."""
        return not self.own_template

    @property
    def tags(self) -> tuple[str, ...]:
        """The text of a model card about the base model, besides its name."""
        return () if self.own_template else ("llava-med",)


def family_of(path: Path) -> Family:
    """The family of a base model's folder.

    transformers' LLaVA is of either kind: LLaVA-Med converted, where no processor is in the folder, or another LLaVA.

    Raises:
        ModelError: as `read_config`.
    """
    model_type = read_config(path)["model_type"]
    return Family(own_template=_has_processor(path) if model_type == "llava" else model_type != LLAVA_MED)


def _has_processor(path: Path) -> bool:
    settings = path / "processor_config.json"
    if not settings.is_file():
        return False
    try:
        beside = any((path / name).is_file() for name in CHAT_TEMPLATES)
        return beside or "chat_template" in read_object(settings)
    except JsonError as error:
        raise ModelError(f"{error}") from None
