"""A task's statistics for the router, from its training records."""

from __future__ import annotations

from dataclasses import replace

import torch

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.records import sample_of
from mslora_cr.data.tasks import TaskRecords, task_image_roots
from mslora_cr.distributed.comm import all_reduce_sum, get_device, rank, world_size
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.load import input_processor_of
from mslora_cr.routing.features import FeatureExtractor, sampled_records
from mslora_cr.routing.lda import TaskStatistics, statistics_of


def router_statistics(
    config: StreamConfig, task: Task, records: TaskRecords, base: BaseModel, examples: int = 0
) -> TaskStatistics:
    """Compute a task's router statistics in a pass over its training records that all ranks share.

    Args:
        config: The run.
        task: The task.
        records: Its training records.
        base: The base model.
        examples: The number of records whose features are stored.
    """
    extractor = feature_extractor(config, base)
    mine = sampled_records(len(records))[rank() :: world_size()]
    label, roots = f"{task.name}, for the router" if rank() == 0 else None, task_image_roots(config, task)
    statistics = statistics_of(all_reduce_sum(extractor.gram(records, mine, roots, label)))
    if not examples:
        return statistics
    examples_features = list(
        extractor.batches(records, sample_of(len(records), examples), roots, None)
    )  # They are few, so every rank computes them all.
    return replace(statistics, examples=torch.cat(examples_features))


def feature_extractor(config: StreamConfig, base: BaseModel) -> FeatureExtractor:
    workers = int(config.training.get("dataloader_num_workers", 0))
    return FeatureExtractor(base, input_processor_of(config, base), get_device(config.model.device), workers)
