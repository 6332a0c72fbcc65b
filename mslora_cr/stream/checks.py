"""Pre-flight checks: fail before training starts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mslora_cr.banks.bank import Bank
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.datasets import KEPT_BYTES, ConcatTrainDataset, Records
from mslora_cr.data.image_digests import images_digest
from mslora_cr.data.images import image_size, inspect_images, load_image, resolve_image
from mslora_cr.data.input_processor import Collate
from mslora_cr.data.lengths import LearnedCounts, count_learned, locations
from mslora_cr.data.records import DataError, TrainingRecord, shown_images
from mslora_cr.data.tasks import TaskRecords, images_shown, task_image_roots
from mslora_cr.data.validation import ValidationRecords
from mslora_cr.distributed.comm import get_device
from mslora_cr.distributed.deepspeed import zero_stage
from mslora_cr.methods.base import method_of
from mslora_cr.models.base_check import check_loss
from mslora_cr.models.base_model import BaseModel, inputs_on
from mslora_cr.models.describe import fixed_date
from mslora_cr.models.family import family_of
from mslora_cr.models.load import input_processor_without_weights
from mslora_cr.models.shapes import projector_size
from mslora_cr.runs.ledger import Ledger, work_folder
from mslora_cr.training.checkpoints import checkpoints
from mslora_cr.training.inputs import loss_mask
from mslora_cr.utils.strict_json import read_object
from mslora_cr.utils.workers import cores

log = logging.getLogger(__name__)


def check_trainable(config: StreamConfig, fields: dict[str, Any]) -> None:
    """Refuse settings that are valid by themselves, but not together.

    Raises:
        ConfigError: The message names them.
    """
    if config.model.device_map:
        raise ConfigError(
            "model.device_map splits a base model to answer; leave it out, and train with training.deepspeed=zero3"
        )
    if config.model.quantization and zero_stage(fields.get("deepspeed")) == 3:
        raise ConfigError(
            "training.deepspeed: ZeRO-3 cannot shard a quantised base; use zero2, or no model.quantization"
        )
    if config.model.kernels == "liger" and get_device(config.model.device).type != "cuda":
        raise ConfigError("model.kernels: liger needs a GPU; set it to auto, or to torch")
    method = method_of(config)
    if method.keeps_frozen_adapters and (reused := [task.name for task in config.stream if task.reuse]):
        raise ConfigError(
            f"tasks.{reused[0]}.reuse: {config.method} answers with the sum of its banks, so a copy would count twice; "
            "leave the task out and ask its questions with `mslora-cr evaluate --probe`, or train it"
        )
    if (
        fields.get("fp16")
        and method.has_penalty
        and any(method.regularizes(config, task) for task in method.trained(config))
    ):
        raise ConfigError(
            "training.fp16 scales the loss, so that a penalty's gradient, which is added after it, would all but "
            f"vanish; use training.bf16, or a method without a penalty instead of {config.method}"
        )


def check_projector(config: StreamConfig, fields: Mapping[str, Any], records: Mapping[str, TaskRecords]) -> None:
    """Refuse to train the projector where that cannot be exact.

    Raises:
        ConfigError: Features behind the projector are cached; DeepSpeed's own optimizer has one learning rate; or under
            ZeRO-3 a record has no picture.
        ModelError: The base model has no projector of LLaVA's name.
    """
    if config.lora.projector_learning_rate is None:
        return
    path = Path(config.model.path)
    projector_size(path)
    if config.data.cache_image_features and family_of(path).own_template:
        raise ConfigError(
            "data.cache_image_features keeps what the projector of this base model makes of images, and "
            "lora.projector_learning_rate trains it; set one of them to null"
        )
    deepspeed = fields.get("deepspeed")
    if isinstance(deepspeed, str) and "optimizer" in read_object(Path(deepspeed)):
        raise ConfigError(
            f"training.deepspeed: the optimizer of {deepspeed} has one learning rate, but the projector has its own; "
            "remove `optimizer` from the file: the optimizer is that of training.optim"
        )
    for part in records.values() if zero_stage(deepspeed) == 3 else ():
        if any(not record.images for record in part):
            raise ConfigError(
                f"{part.path}: some records have no picture, and under ZeRO-3 the projector trains only where every "
                "record has one; set training.deepspeed to zero2"
            )


def check_projectors(banks: Sequence[Bank], trained: bool) -> None:
    """Refuse earlier banks with a projector where a later bank does not train it: their projector would be lost.

    Args:
        banks: The earlier banks with which a task starts.
        trained: Whether the projector is trained.

    Raises:
        ConfigError: The message says how to continue.
    """
    for bank in banks:
        if bank.projector and not trained:
            raise ConfigError(
                f"bank {bank.name!r} was trained together with the projector; to continue from it, set "
                "lora.projector_learning_rate"
            )


def shared_facts(
    config: StreamConfig,
    records: dict[str, TaskRecords],
    validation: Mapping[str, ValidationRecords],
    ledger: Ledger,
    fields: dict[str, Any],
    model_digest: str,
) -> dict[str, Any]:
    """Return the facts that must be equal on all ranks of a run."""
    return {
        "the configuration": config.training_digest(),
        "training.deepspeed": zero_stage(fields.get("deepspeed")),
        "the base model's files": model_digest,
        "the training records": {name: part.digest for name, part in records.items()},
        "the validation records": {name: part.digest for name, part in validation.items()},
        "the finished tasks": {name: entry.digest for name, entry in ledger.tasks.items()},
        "the checkpoints": {
            name: [path.name for path in checkpoints(work_folder(config.run_dir, name))] for name in records
        },
    }


def check_records_unchanged(ledger: Ledger, records: dict[str, TaskRecords]) -> None:
    """Raise if the records of a finished task changed, and its samples are still needed.

    Raises:
        DataError: The message names the file.
    """
    for name, part in records.items():
        entry = ledger.tasks.get(name)
        if entry is not None and entry.records_digest not in (None, part.digest):
            raise DataError(f"{part.path} has changed since {name!r} was trained on it; restore it to continue")


def say_fixed_date(config: StreamConfig) -> None:
    """Log the date that the base model's chat template is given, if it asks for today's."""
    if date := fixed_date(Path(config.model.path)):
        log.info(
            "the base model's chat template asks for today's date: it is given %s every day, in training and in "
            "answering",
            date,
        )


def check_labels(config: StreamConfig, records: dict[str, TaskRecords]) -> None:
    """Warn of samples without a label and of cut answers; refuse a task from which nothing would be learned.

    Raises:
        DataError: No sample of a task has a label; or a record cannot be encoded.
        ModelError: The base model's tokenizer or processor cannot be read.
    """
    input_processor, max_length = input_processor_without_weights(config), config.data.max_length
    for name, part in records.items():
        counts = count_learned(part, task_image_roots(config, config.task(name)), input_processor, max_length)
        messages = [message for message in _label_messages(part, counts, max_length) if message]
        if not counts.learned:
            raise DataError(
                f"{part.path}: no sample has an answer to learn, so training would learn nothing: {'; '.join(messages)}"
            )
        for message in messages:
            log.warning("%s: %s", name, message)


def _label_messages(records: TaskRecords, counts: LearnedCounts, max_length: int) -> Iterator[str]:
    """Yield messages about what is not learned."""

    def share(indices: Sequence[int]) -> str:
        return f"{len(indices):,} of {counts.samples:,} training samples ({len(indices) / counts.samples:.1%})"

    if counts.unlabelled:
        yield (
            f"{share(counts.unlabelled)} add nothing to the loss, as the template cannot hold them: "
            f"{locations(records, counts.unlabelled)}. An answer that spells out a control token, such as `</s>` at "
            "its end, or turns that do not alternate are the usual cause; take them out of the records"
        )
    if counts.empty:
        yield (
            f"{share(counts.empty)} have an empty answer, so that the model learns to say nothing: "
            f"{locations(records, counts.empty)}. Give them an answer, or take them out of the records"
        )
    if counts.lost:
        yield (
            f"{share(counts.lost)} lose their whole answer, which begins after data.max_length = {max_length:,} "
            f"positions: {locations(records, counts.lost)}. A larger data.max_length keeps it, and takes memory"
        )
    if counts.cut:
        yield (
            f"{share(counts.cut)} are longer than data.max_length = {max_length:,} positions, so that their end is cut "
            "off; a larger data.max_length keeps it, and takes memory"
        )


def try_first_record(base: BaseModel, samples: ConcatTrainDataset, collator: Collate, device: torch.device) -> None:
    """Read the first record as a training step would, before any step.

    Raises:
        DataError: It cannot be prepared.
        ModelError: The model cannot read it, or computes another loss than that of the labels.
    """
    try:
        batch = collator([samples[0]])
    except ValueError as error:
        raise DataError(f"{samples.location(0)}: {error}") from None
    del batch["record_index"]
    keep, targets = loss_mask(batch.pop("labels"))
    if len(targets):
        check_loss(base, inputs_on(device, batch), keep.to(device), targets.to(device))


LARGE_PIXELS = 2_000_000
"""If pictures have more megapixels on average, decoding one takes longer than computing a small step."""
SAMPLED = 32
"""How many pictures of a task are measured."""
DIGESTED = 1_000
"""The number of images of a task whose contents are compared to notice changes."""


def warn_of_large_images(config: StreamConfig, records: dict[str, TaskRecords]) -> None:
    """Warn of each task with large pictures: how long decoding takes, and what to do about it."""
    if config.data.cache_image_features:
        return
    for name, part in records.items():
        roots = task_image_roots(config, config.task(name))
        chosen = [part[index] for index in range(0, len(part), max(1, len(part) // SAMPLED))]
        names = dict.fromkeys(image for record in chosen for image in shown_images(record, config.data.images == "all"))
        paths = [resolve_image(image, roots) for image in list(names)[:SAMPLED]]
        pixels = [math.prod(image_size(path)) for path in paths]
        if not pixels or sum(pixels) / len(pixels) < LARGE_PIXELS:
            continue
        begun = time.perf_counter()
        load_image(paths[len(paths) // 2])
        log.warning(
            "%s: its pictures have %.1f megapixels on average, and one takes %.2f s to decode, in every epoch unless "
            "all samples fit into %d MB and training.dataloader_num_workers is 0. data.cache_image_features: FOLDER "
            "keeps what the model makes of them; for a base model that takes no features, store them smaller",
            name,
            sum(pixels) / len(pixels) / 1e6,
            time.perf_counter() - begun,
            KEPT_BYTES >> 20,
        )


def training_images(config: StreamConfig, records: Mapping[str, Records[TrainingRecord]]) -> dict[str, dict[Path, int]]:
    """Find every image that training will read: by task, with the index of the first record that shows it.

    Raises:
        DataError: An image is missing or outside its root; the message names the record.
    """
    return {name: images_shown(config, config.task(name), part) for name, part in records.items()}


def training_image_digests(images: dict[str, dict[Path, int]]) -> dict[str, str]:
    """Digest the training images of each task: the sizes of all, and the contents of at most `DIGESTED` of them."""
    return {name: images_digest(paths, DIGESTED) for name, paths in images.items()}


def check_images_unchanged(
    ledger: Ledger, digests: dict[str, str], records: Mapping[str, Records[TrainingRecord]]
) -> None:
    """Refuse to go on if the images of a finished task whose samples are still needed have changed.

    Raises:
        DataError: The message names the file whose records show them.
    """
    for name, digest in digests.items():
        entry = ledger.tasks.get(name)
        if entry is not None and entry.images_digest not in (None, digest):
            raise DataError(
                f"the images of {records[name].path} have changed since {name!r} was trained on them; restore them to "
                "continue"
            )


def check_task_images(
    config: StreamConfig, records: Mapping[str, Records[TrainingRecord]], images: dict[str, dict[Path, int]]
) -> None:
    """Decode every image that training will read, unless `data.check_images` is off.

    Args:
        records: The open training files, by task.
        images: The images, as `training_images` returns them.

    Raises:
        DataError: The message names the bad ones, each with the first record that uses it.
    """
    paths = {path: (records[name], index) for name, indices in images.items() for path, index in indices.items()}
    if not config.data.check_images or not paths:
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    inspected = inspect_images(list(paths), cores(), progress=True, cache=config.run_dir / "images-checked.bin")
    if inspected.washed_out:
        path, remark = inspected.washed_out[0]
        log.warning(
            "%s of %s images look different to the model than in a viewer, such as %s: %s. `mslora-cr "
            "data check` names them all, `mslora-cr data convert` writes them as a viewer shows them",
            f"{len(inspected.washed_out):,}",
            f"{len(paths):,}",
            path,
            remark,
        )
    bad = inspected.bad
    if bad:
        listed = ((path, problem, *paths[path]) for path, problem in bad[:10])
        lines = [f"{part.path}: {part.location(index)}: {path}: {problem}" for path, problem, part, index in listed]
        raise DataError(f"{len(bad)} of {len(paths)} images cannot be read\n  " + "\n  ".join(lines))
