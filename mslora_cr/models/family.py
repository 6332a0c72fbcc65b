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
    """Whether the model is prompted by its own processor and chat template; otherwise LLaVA-Med's protocol is used."""

    @property
    def published_banks(self) -> bool:
        """Whether its layers have names in the published checkpoints."""
        return not self.own_template

    @property
    def tags(self) -> tuple[str, ...]:
        """What a model card says about the base model, besides its name."""
        return () if self.own_template else ("llava-med",)


def family_of(path: Path) -> Family:
    """Return the family of a base model's folder.

    transformers' LLaVA may be LLaVA-Med, converted, if the folder has no processor, or else another LLaVA.

    Raises:
        ModelError: As `read_config`.
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
