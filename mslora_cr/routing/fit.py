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
from mslora_cr.routing.foreign import BOTH, FOLDS, held_out_distances, part_columns
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
    distances = _distances(extractor, batches, list(positions), total)
    together = distances.pop(BOTH)
    statistics = replace(statistics_of(total), distances=together, part_distances=distances)
    if not examples:
        return statistics
    examples_features = list(
        extractor.batches(records, sample_of(len(records), examples), roots, None)
    )  # They are few, so every rank computes them all.
    return replace(statistics, examples=torch.cat(examples_features))


def _distances(
    extractor: FeatureExtractor, batches: Sequence[Tensor], positions: Sequence[int], total: Tensor
) -> dict[str, Tensor]:
    """Return the held-out distances of all ranks' records, ascending, by the features that count.

    Args:
        positions: The positions of these records among all.
        total: The gram of all records.
    """
    features = torch.cat([torch.empty(0, extractor.features), *batches])
    folds = torch.tensor(positions, dtype=torch.int64) % FOLDS
    grams = torch.stack([extractor.gram([features[folds == fold]]) for fold in range(FOLDS)])
    grams = all_reduce_sum(grams)
    columns = part_columns(extractor.image_features)
    mine = {part: held_out_distances(features, folds, total, grams, of) for part, of in columns.items()}
    by_rank = all_gather_object(mine)
    return {part: torch.cat([of[part] for of in by_rank]).sort().values for part in columns}


def feature_extractor(config: StreamConfig, base: BaseModel) -> FeatureExtractor:
    workers = int(config.training.get("dataloader_num_workers", 0))
    return FeatureExtractor(base, input_processor_of(config, base), get_device(config.model.device), workers)
