"""The fields of `training` that say when training validates, and the consequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mslora_cr.config.schema import ConfigError, PositiveInt, StreamConfig

OWN_TRAINING_FIELDS: Mapping[str, Any] = {"keep": Literal["last", "best"], "patience": PositiveInt | None}
"""Fields of `training` that transformers' TrainingArguments lacks, with their types."""
STRATEGIES = ("steps", "epoch", "no")
LOSS = "loss"
"""The metric that decides by default; lower is better."""


def validation_fields(config: StreamConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the fields of `training` about validation; empty if training does not validate.

    If records are held out or validation decides, the default of `eval_strategy` is `epoch`.

    Args:
        given: The fields of `training`, each of the right type.

    Raises:
        ConfigError: Fields do not fit together.
    """
    wanted = config.data.validation is not None or config.validation_decides
    chosen = given.get("eval_strategy", "epoch" if wanted else "no")
    strategy = str(getattr(chosen, "value", chosen))
    if strategy not in STRATEGIES:
        raise ConfigError(f"training.eval_strategy is {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if strategy == "steps" and not (given.get("eval_steps") or 0) > 0:
        raise ConfigError(
            "training.eval_strategy: steps needs training.eval_steps, the steps between validations; or set it to epoch"
        )
    if strategy == "no":
        if config.validation_decides:
            key = "patience" if given.get("patience") else "keep"
            raise ConfigError(f"training.{key} needs validation; set training.eval_strategy to steps or epoch")
        return {}
    decides = {"metric_for_best_model": given.get("metric_for_best_model") or LOSS} if config.validation_decides else {}
    return {"eval_strategy": strategy, **decides}
