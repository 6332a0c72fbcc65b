"""Fields of TrainingArguments that a configuration sets itself."""

DERIVED_TRAINING_FIELDS = {
    "output_dir": "use output_dir instead",
    "num_train_epochs": "use tasks.NAME.epochs instead",
    "max_steps": "use tasks.NAME.epochs instead",
    "learning_rate": "use tasks.NAME.learning_rate instead",
    "gradient_accumulation_steps": "use tasks.NAME.batch_size and training.per_device_train_batch_size instead",
    "seed": "use seed instead",
    "data_seed": "use seed instead",
    "remove_unused_columns": "the collator needs every column",
    "resume_from_checkpoint": "the same command resumes automatically",
    "do_train": "`mslora-cr train` trains",
    "do_eval": "use training.eval_strategy instead",
    "load_best_model_at_end": "use training.keep instead",
    "ignore_data_skip": "a resumed run continues with the next sample",
    "save_only_model": "a checkpoint contains everything a resumed run needs",
    "auto_find_batch_size": "use training.per_device_train_batch_size instead",
    "push_to_hub": "upload the banks of a finished run yourself",
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "upload the banks of a finished run yourself",
    ),
    "hub_token": "use HF_TOKEN in the environment: a configuration is saved with the run",
    **dict.fromkeys(
        {"eval_on_start", "eval_delay", "prediction_loss_only", "do_predict", "include_for_metrics"}
        | {"batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object"}
        | {"bf16_full_eval", "fp16_full_eval"},
        "`mslora-cr evaluate` evaluates",
    ),
    "per_device_eval_batch_size": "use evaluation.batch_size instead",
    "label_smoothing_factor": "the loss is the mean cross-entropy of the labels, as published",
    "save_on_each_node": "all nodes write to one shared folder, each file once",
    "length_column_name": "lengths are counted from the records",
    "logging_nan_inf_filter": "a loss that is not finite stops training",
    "label_names": "the labels of a batch are named `labels`",
    "use_cpu": "use model.device instead",
    "fsdp": "use training.deepspeed: banks are gathered from ZeRO's shards alone",
    "fsdp_config": "use training.deepspeed: banks are gathered from ZeRO's shards alone",
}
"""TrainingArguments that a configuration sets itself, or that would have no effect or do harm here, each with the
reason."""
