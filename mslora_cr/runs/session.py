"""What every command that runs the model starts from: processes, folders, base model, preprocessing, features."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mslora_cr.config.load import training_fields
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.features import FeatureCache, feature_key
from mslora_cr.data.images import image_roots
from mslora_cr.data.preparation import Preparation
from mslora_cr.data.records import TrainingRecords, sample_of
from mslora_cr.distributed.comm import (
    all_reduce_sum,
    assert_same_on_all_ranks,
    assert_shared_fs,
    barrier,
    get_device,
    rank,
    world_size,
)
from mslora_cr.distributed.launch import TIMEOUT_SECONDS, start_process_group
from mslora_cr.models.base_model import BaseModel, Tower
from mslora_cr.models.digest import weights_digest
from mslora_cr.models.kernels import use_kernels
from mslora_cr.models.layout import has_processor
from mslora_cr.models.load import load_model
from mslora_cr.models.vision import detach_tower, tower_features
from mslora_cr.routing.features import FeatureExtractor, sampled_records
from mslora_cr.routing.lda import TaskStatistics, statistics_of
from mslora_cr.runs.ledger import versions
from mslora_cr.utils.kernels import chosen_kernels

log = logging.getLogger(__name__)


def start_processes(config: StreamConfig) -> dict[str, Any]:
    """Join the processes that a launcher started, and return the checked `training` section.

    Raises:
        ConfigError: that section is wrong.
    """
    fields = training_fields(config)
    use_gpu = get_device(config.model.device).type == "cuda"
    start_process_group(use_gpu, fields.get("ddp_timeout", TIMEOUT_SECONDS))
    return fields


def check_hosts(output: Path, facts: Mapping[str, Any]) -> None:
    """Let every rank see that all ranks work on the same thing and write to the same folder.

    Raises:
        DistributedError: on every rank; names what differs.
    """
    assert_same_on_all_ranks({**facts, "the package versions": versions()})
    assert_shared_fs(output)


def task_folder(config: StreamConfig, task: Task) -> Path:
    return Path(config.data.root) / task.folder


def task_image_roots(config: StreamConfig, task: Task) -> list[Path]:
    return image_roots(Path(config.data.root), task.folder, task.image_folders)


def kernels_of(config: StreamConfig) -> Literal["liger", "torch"]:
    """What computes the small operations in training: `auto` is PyTorch where Liger has nothing for the model.

    Raises:
        ModelError: the base model's configuration cannot be read.
    """
    chosen = chosen_kernels(config.model.kernels, config.model.device)
    path = Path(config.model.path)
    if chosen == "liger" and config.model.kernels == "auto" and has_processor(path):
        return "torch"
    return chosen


def load_base(
    config: StreamConfig, device: torch.device | str, kernels: Literal["liger", "torch"] | None = None
) -> BaseModel:
    """The base model as the configuration asks for it.

    Args:
        kernels: what computes the small operations, as `kernels_of` gives it; None: what answers are computed with.
    """
    base = load_model(
        Path(config.model.path),
        vision_tower=config.model.vision_tower,
        dtype=getattr(torch, config.model.dtype),
        attn_implementation=config.model.attn_implementation,
        device=device,
        quantization=config.model.quantization,
    )
    use_kernels(base.model, kernels or answering_kernels(config, device))
    return base


def answering_kernels(config: StreamConfig, device: torch.device | str) -> Literal["liger", "torch"]:
    """What computes a model's small operations when it answers: as in training, but in float32, where answers are to be
    those of every machine, PyTorch; and PyTorch where Liger cannot run, whatever trained the banks."""
    path = Path(config.model.path)
    if config.model.dtype == "float32" or config.model.kernels == "torch" or has_processor(path):
        return "torch"
    return chosen_kernels("auto", torch.device(device).type)


def base_digest(config: StreamConfig) -> str:
    """What tells the configuration's base model, its vision tower included, from another; reads some of its weights."""
    return weights_digest(Path(config.model.path), config.model.vision_tower)


class CachedTower:
    """The tower, taken out of its model, and the folder where its features are kept."""

    def __init__(self, folder: Path, model: Any, tower: Tower, device: torch.device) -> None:
        self._layer, self._processor = tower.layer, tower.image_processor
        self._tower, self._device = detach_tower(model), device
        self.cache = FeatureCache(folder / feature_key(self._tower, self._layer, self._processor))

    def fill(self, images: Sequence[Path], workers: int) -> None:
        """See to it that every image has its features; the ranks share the work."""
        self._tower.to(self._device)
        self.cache.fill(images[rank() :: world_size()], self._processor, self._encode, workers, progress=rank() == 0)
        self._tower.to("cpu")
        barrier()

    @torch.inference_mode()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        parameter = next(self._tower.parameters())
        return tower_features(self._tower, self._layer, pixels.to(parameter.device, parameter.dtype))


def cached_tower(config: StreamConfig, base: BaseModel) -> CachedTower | None:
    """The tower apart from its model, if `data.cache_image_features` asks for it and the model has one to take out."""
    folder = config.data.cache_image_features
    if not folder:
        return None
    if base.tower is None:
        log.warning("data.cache_image_features has no effect: this base model's features are computed at every step")
        return None
    return CachedTower(Path(folder), base.model, base.tower, get_device(config.model.device))


def preprocessing(config: StreamConfig, base: BaseModel, tower: CachedTower | None = None) -> Preparation:
    return base.preparation(config.data.max_length, config.data.images == "all", tower.cache if tower else None)


def router_statistics(
    config: StreamConfig, task: Task, records: TrainingRecords, base: BaseModel, examples: int = 0
) -> TaskStatistics:
    """What a router needs to know of a task, from a pass over its training records that all ranks share.

    Args:
        examples: of how many records the features are kept.
    """
    extractor = feature_extractor(config, base)
    mine = sampled_records(len(records))[rank() :: world_size()]
    label, roots = f"{task.name}, for the router" if rank() == 0 else None, task_image_roots(config, task)
    statistics = statistics_of(all_reduce_sum(extractor.gram(records, mine, roots, label)))
    if not examples:
        return statistics
    kept = list(extractor.batches(records, sample_of(len(records), examples), roots, None))  # few: by every rank
    return replace(statistics, examples=torch.cat(kept))


def feature_extractor(config: StreamConfig, base: BaseModel) -> FeatureExtractor:
    workers = int(config.training.get("dataloader_num_workers", 0))
    return FeatureExtractor(base, preprocessing(config, base), get_device(config.model.device), workers)
