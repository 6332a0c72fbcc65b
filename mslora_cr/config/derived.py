"""Fields of TrainingArguments that a configuration sets itself."""

DERIVED_TRAINING_FIELDS = {
    "output_dir": "output_dir",
    "num_train_epochs": "tasks.NAME.epochs",
    "max_steps": "tasks.NAME.epochs",
    "learning_rate": "tasks.NAME.learning_rate",
    "gradient_accumulation_steps": "tasks.NAME.batch_size and training.per_device_train_batch_size",
    "seed": "seed",
    "data_seed": "seed",
    "remove_unused_columns": "nothing: the collator needs every column",
    "resume_from_checkpoint": "nothing: the same command resumes automatically",
    "do_train": "nothing: `mslora-cr train` trains",
    "do_eval": "nothing: `mslora-cr evaluate` evaluates",
    "eval_strategy": "nothing: `mslora-cr evaluate` evaluates",
    "load_best_model_at_end": "nothing: the bank after the last step is kept",
    "ignore_data_skip": "nothing: a resumed run continues with the next sample",
    "save_only_model": "nothing: a checkpoint contains everything a resumed run needs",
    "auto_find_batch_size": "training.per_device_train_batch_size",
    "push_to_hub": "nothing: upload the banks of a finished run yourself",
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "nothing: upload the banks of a finished run yourself",
    ),
    "hub_token": "HF_TOKEN in the environment: a configuration is saved with the run",
    **dict.fromkeys(
        {"eval_on_start", "eval_steps", "eval_delay", "prediction_loss_only", "do_predict", "include_for_metrics"}
        | {"batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"}
        | {"bf16_full_eval", "fp16_full_eval"},
        "nothing: `mslora-cr evaluate` evaluates",
    ),
    "per_device_eval_batch_size": "evaluation.batch_size",
    "metric_for_best_model": "nothing: the bank after the last step is kept",
    "greater_is_better": "nothing: the bank after the last step is kept",
    "label_smoothing_factor": "nothing: the loss is the mean cross-entropy of the labels, as published",
    "save_on_each_node": "nothing: all nodes write to one shared folder, each file once",
    "length_column_name": "nothing: lengths are counted from the records",
    "logging_nan_inf_filter": "nothing: a loss that is not finite stops training",
    "label_names": "nothing: labels are `labels`",
    "use_cpu": "model.device",
    "fsdp": "training.deepspeed: banks are gathered from ZeRO's shards alone",
    "fsdp_config": "training.deepspeed: banks are gathered from ZeRO's shards alone",
}
"""TrainingArguments that this configuration sets itself, or that would do nothing or harm here, each with the key to
use instead."""
