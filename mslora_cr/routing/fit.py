"""A task's statistics for the router, from its training records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.records import sample_of
from mslora_cr.data.tasks import TaskRecords, task_image_roots
from mslora_cr.distributed.comm import all_gather_object, all_reduce_sum, get_device, rank, world_size
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.load import input_processor_of
from mslora_cr.routing.features import FeatureExtractor, sampled_records
from mslora_cr.routing.foreign import FOLDS, held_out_distances
from mslora_cr.routing.lda import TaskStatistics, statistics_of


def router_statistics(
    config: StreamConfig, task: Task, records: TaskRecords, base: BaseModel, examples: int = 0
) -> TaskStatistics:
    """Compute a task's router statistics in a pass over its training records that all ranks share.

    Args:
        examples: The number of records whose features are stored.
    """
    extractor = feature_extractor(config, base)
    sampled = sampled_records(len(records))
    positions = range(rank(), len(sampled), world_size())
    label, roots = f"{task.name}, for the router" if rank() == 0 else None, task_image_roots(config, task)
    batches = list(extractor.batches(records, [sampled[position] for position in positions], roots, label))
    total = all_reduce_sum(extractor.gram(batches))
    statistics = replace(statistics_of(total), distances=_distances(extractor, batches, list(positions), total))
    if not examples:
        return statistics
    examples_features = list(
        extractor.batches(records, sample_of(len(records), examples), roots, None)
    )  # They are few, so every rank computes them all.
    return replace(statistics, examples=torch.cat(examples_features))


def _distances(
    extractor: FeatureExtractor, batches: Sequence[Tensor], positions: Sequence[int], total: Tensor
) -> Tensor:
    """The held-out distances of all ranks' records, ascending.

    Args:
        positions: The positions of these records among all.
        total: The gram of all records.
    """
    features = torch.cat([torch.empty(0, extractor.features), *batches])
    folds = torch.tensor(positions, dtype=torch.int64) % FOLDS
    grams = torch.stack([extractor.gram([features[folds == fold]]) for fold in range(FOLDS)])
    mine = held_out_distances(features, folds, total, all_reduce_sum(grams))
    return torch.cat(all_gather_object(mine)).sort().values


def feature_extractor(config: StreamConfig, base: BaseModel) -> FeatureExtractor:
    workers = int(config.training.get("dataloader_num_workers", 0))
    return FeatureExtractor(base, input_processor_of(config, base), get_device(config.model.device), workers)
