"""The part of a configuration that decides the banks, for digests."""

from __future__ import annotations

from typing import Any

from mslora_cr.utils.kernels import chosen_kernels

UNDECIDING_FIELDS = frozenset(
    {"model.path", "model.device", "model.device_map", "data.root", "data.check_images", "data.cache_image_features"}
    | {"regularization.frozen_device"}
)
"""Settings that say where or how fast, but do not change the banks. The ledger has digests of the base model and the
records."""

UNDECIDING_TRAINING_FIELDS = frozenset(
    {"save_steps", "save_total_limit", "save_strategy", "logging_steps", "report_to", "disable_tqdm"}
    | {"dataloader_num_workers", "dataloader_pin_memory", "log_level", "run_name", "project"}
    | {"deepspeed", "ddp_timeout"}
    | {"per_device_train_batch_size", "gradient_checkpointing", "gradient_checkpointing_kwargs"}
)
"""Fields of `training` that may differ when a run continues: they change weights by no more than rounding."""

VALIDATION_FIELDS = frozenset(
    {"keep", "patience", "eval_strategy", "eval_steps", "metric_for_best_model", "greater_is_better"}
)
"""Fields of `training` that decide a bank only if validation does (`validation_decides`); measuring alone changes no
weight."""


def deciding_fields(fields: dict[str, Any], validation_decides: bool) -> dict[str, Any]:
    """Return the fields of a configuration, apart from its tasks, that decide the banks.

    Args:
        fields: The whole configuration as JSON; it is changed.
    """
    for key in ("run", "output_dir", "results_dir", "datasets", "tasks"):
        del fields[key]
    evaluation = fields.pop("evaluation")
    kernels = chosen_kernels(fields["model"]["kernels"], fields["model"]["device"])
    for section, key in (field.split(".") for field in UNDECIDING_FIELDS):
        fields[section].pop(key, None)
    fields["model"]["kernels"] = kernels
    if kernels == "torch":  # Every bank was trained with it before there was a choice.
        del fields["model"]["kernels"]
    if fields["data"]["validation"] is None:  # This keeps the digests from before there was validation.
        del fields["data"]["validation"]
    undeciding = UNDECIDING_TRAINING_FIELDS
    if validation_decides:
        fields["evaluation"] = {"max_new_tokens": evaluation["max_new_tokens"]}
    else:
        undeciding = undeciding | VALIDATION_FIELDS
        del fields["data"]["validation_questions"]
    for key in undeciding:
        fields["training"].pop(key, None)
    if fields["regularization"]["distance"] == "frobenius":
        del fields["regularization"]["distance"]  # This keeps the digests from before there was a choice.
    return fields
