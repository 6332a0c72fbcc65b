"""The configuration of a run: one YAML file, read strictly.

A file may start from another with `extends: other.yaml`; every value can be overridden with `key.path=value`. Unknown
keys are refused with the nearest known one. What can be derived is computed here and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from mslora_cr.config.benchmarks import Annotations
from mslora_cr.config.fingerprint import deciding_fields
from mslora_cr.config.methods import check_method, if_trusted, load_method, method_names
from mslora_cr.config.protocols import TaskProtocol, check_protocols
from mslora_cr.utils.errors import UserError, nearest

LEARNABLE = -1
"""The published spelling of a penalty weight that is learned as exp(a)."""
CATALOGUE = Path(__file__).with_name("catalog.yaml")


class ConfigError(UserError):
    """The configuration is wrong. The message says where and how to fix it."""


def as_number(value: Any) -> Any:
    """Read `2e-4` as a number: YAML 1.1 reads it as a string, because it has no dot."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(as_number), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
PathStr = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder. A leading `~` means the home folder, which a shell does not expand after `key=`."""


class Section(BaseModel):
    """Keys of a configuration, read strictly: no unknown one, no wrong type, no change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class UnreadSection(Section):
    """The section of a method whose module may not be imported (`trust`), as written and unchecked."""

    written: dict[str, Any] = {}
    """The section, under the method's own name; empty if there is none."""


class ModelConfig(Section):
    """The frozen base model and how it is loaded."""

    path: PathStr
    vision_tower: PathStr = "config"
    """`config` (the tower that the base's `mm_vision_tower` names), `checkpoint` (that of the files), or a path."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["4bit", "8bit"] | None = None
    """Store the language model's linear layers in 4 or 8 bits (bitsandbytes). Computation uses `dtype`."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Each process takes its own GPU among those in CUDA_VISIBLE_DEVICES. `auto` falls back to the CPU."""
    device_map: Literal["auto"] | None = None
    """`auto` splits a base model over all GPUs of the host, to answer. Training refuses it; ZeRO-3 splits there."""
    kernels: Literal["auto", "liger", "torch"] = "auto"
    """Computes norms, rotations and activations in training. `auto` takes Liger on a GPU if it is installed."""

    @model_serializer(mode="wrap")
    def _as_before_it_could_be_split(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("device_map", None)}


class DataConfig(Section):
    """Where the data sets are and how a record becomes a sample."""

    root: PathStr
    images: Literal["first", "all"] = "first"
    """Which images of a record with several are used. The published evaluation takes the first."""
    max_length: PositiveInt = 2048
    """Positions per sample, image patches included. Longer samples are cut at the end."""
    validation: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """The share of a task's training records that is held out for validation, by patient or image, if the data set has
    no `val.jsonl`. `seed` draws it; it is the same for every method and every launch."""
    validation_questions: PositiveInt = 200
    """The most records of a task that validation measures, the same ones every time."""
    check_images: bool = True
    """Decode every image once before the first step. The run folder remembers which images are good."""
    cache_image_features: PathStr | None = None
    """A folder that caches images' features, 1.2 MB per image in bfloat16 with LLaVA-Med. Without it, they are computed
    at every step. A cache pays off if images repeat over questions and epochs and the tower or the disk is slow."""


class LoraSettings(Section):
    """The shape of a bank and how frozen banks take part in the forward pass."""

    rank: PositiveInt = 64
    alpha: PositiveNumber = 64.0
    dropout: Annotated[NotNegative, Field(lt=1)] = 0.0
    fold: Literal["merge", "concatenate"] = "merge"
    """`merge` adds frozen banks to the base weights. `concatenate` keeps one frozen adapter of rank r·(t-1); it is the
    default with `model.quantization`, because banks are never merged into a quantised base."""
    projector_learning_rate: PositiveNumber | None = None
    """Train the projector between tower and language model with every bank, at this rate, and store it in the bank.
    Without it the projector stays frozen. Methods that sum banks refuse it: projectors have no sum."""

    @model_serializer(mode="wrap")
    def _as_before_it_could_be_trained(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if (key, value) != ("projector_learning_rate", None)}


class RegularizationConfig(Section):
    """Weights of the two penalties. -1 makes a weight learnable as exp(a), with a starting at -4.6."""

    alpha: Number = 0.1
    beta: Number = 0.01
    distance: Literal["frobenius", "cosine"] = "frobenius"
    """The similarity of two banks' matrices in the contrastive term: `frobenius` is exp(-‖W - P‖), as published;
    `cosine` is exp(cos(W, P) - 1), which does not vanish at high ranks and is not the published term."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of earlier banks for the penalties: 4 or 2 bytes per number. The arithmetic is float32."""
    frozen_device: Literal["model", "cpu"] = "model"
    """Where earlier banks are: on the model's device, or in pinned CPU memory, which a GPU reads once a step."""

    @model_validator(mode="after")
    def _check(self) -> RegularizationConfig:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value != LEARNABLE and value < 0:
                raise ValueError(f"{name} is {value}; give a weight of at least 0, or -1 for a learnable one")
        return self


class EvaluationConfig(Section):
    """Greedy generation, and which banks answer."""

    max_new_tokens: PositiveInt = 100
    batch_size: PositiveInt = 16
    probabilities: bool = True
    """Score each answer, and each candidate answer of a closed question. `probabilities.jsonl` beside the answers has
    the scores."""
    banks_by: Literal["prefix", "all", "routed"] = "prefix"
    """Banks that answer task i at stage k: `prefix` takes 1..min(i, k) (published), `all` takes 1..k, `routed` takes
    the `prefix` banks of the task that the router predicts."""


class DatasetConfig(Section, Annotations):
    """A data set that tasks can name: its folder below the data root and its modality."""

    modality: Name
    folder: str
    image_folders: list[str] = []
    published: str | None = None
    """The published task whose scores reports show beside this data set's."""


class TaskConfig(Section, TaskProtocol):
    """One task of the stream."""

    name: Name
    epochs: PositiveNumber
    batch_size: PositiveInt
    """Samples per optimizer step over all processes and accumulation steps."""
    learning_rate: PositiveNumber


class Task(Section, Annotations, TaskProtocol):
    """A task together with its data set."""

    index: int
    name: str
    modality: str
    folder: str
    image_folders: list[str]
    epochs: float
    batch_size: int
    learning_rate: float


class StreamConfig(Section):
    """The configuration of a whole run. Read it with `load_config`."""

    run: Name
    method: Annotated[str, AfterValidator(check_method)] = "mslora_cr"
    """A file of `mslora_cr/methods`, or `module:Class` for a method outside the package."""
    output_dir: PathStr = "checkpoints"
    results_dir: PathStr = "results"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """The seed of a task is this plus the task's index in the stream; NumPy accepts none from 2**32 on."""
    model: ModelConfig
    data: DataConfig
    lora: LoraSettings = LoraSettings()
    regularization: RegularizationConfig = RegularizationConfig()
    """The penalties of `mslora_cr`. Other methods ignore them; the published configurations share the section."""
    method_section: SerializeAsAny[Section] | None = None
    """The method's own section. Its key in files and dumps is the method's name; `Method.settings` gives it a type."""
    training: dict[str, Any] = {}
    """Fields of transformers' TrainingArguments. Fields that other keys set, or that would have no effect here, are
    refused. `gradient_checkpointing` is `true`, `false`, the number of decoder layers to recompute in the backward
    pass, or `auto`: as many as a GPU's memory requires. If memory still runs out, the same command continues with
    more. `eval_strategy: steps` (with `eval_steps`) or `epoch` measures loss and scores on validation records. Two
    fields are not in TrainingArguments: `keep: best` stores the bank of the best validation instead of the last one, by
    `metric_for_best_model` (`loss`, or a score of `metrics.json`) in the direction of `greater_is_better`; and
    `patience: N` stops a task after N validations without a better one."""
    evaluation: EvaluationConfig = EvaluationConfig()
    datasets: dict[Name, DatasetConfig]
    """The published data sets, from the package's catalogue, and those that the file adds."""
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _concatenate_beside_a_quantised_base(cls, raw: Any) -> Any:
        model, lora = raw.get("model"), raw.get("lora", {})
        if isinstance(model, dict) and model.get("quantization") and isinstance(lora, dict):
            return {**raw, "lora": {"fold": "concatenate", **lora}}
        return raw

    @model_validator(mode="after")
    def _check_merge_mode(self) -> StreamConfig:
        if self.model.quantization and self.model.device_map:
            raise ValueError("model.device_map: a quantised base is not split; leave one of the two out")
        if self.model.quantization and self.lora.fold == "merge":
            raise ValueError("lora.fold: banks cannot be merged into a quantised base; set it to concatenate")
        return self

    @model_validator(mode="before")
    @classmethod
    def _settle_method(cls, raw: Any) -> Any:
        """Fill in the chosen method's section and its default `banks_by`; refuse sections of other methods."""
        if not isinstance(raw, Mapping):
            return raw
        if "method_section" in raw:
            raise ValueError("method_section: unknown key; a method's section is named after the method")
        others = raw.keys() & set(method_names())
        chosen = raw.get("method", cls.model_fields["method"].default)
        try:
            method = if_trusted(str(chosen))
        except ValueError:  # The validation of the field reports it.
            return {key: value for key, value in raw.items() if key not in others}
        if method is None:
            method_keys = [
                key for key, value in raw.items() if key not in cls.model_fields and isinstance(value, Mapping)
            ][:1]
            settings = {key: value for key, value in raw.items() if key not in method_keys}
            return {**settings, "method_section": {"written": {key: raw[key] for key in method_keys}}}
        if method.name in cls.model_fields:
            raise ValueError(f"method {chosen}: its name, {method.name!r}, is a key of every configuration; rename it")
        for other in sorted(others - {method.name}):
            if load_method(other).section is not None:
                raise ValueError(
                    f"{other}: belongs to method {other!r}, but this run's method is {chosen!r}; remove it"
                )
        settled = dict(raw)
        if method.section is not None:
            given = settled.pop(method.name, None)
            settled["method_section"] = {} if given is None else given
        evaluation = raw.get("evaluation", {})
        if isinstance(evaluation, Mapping):
            settled["evaluation"] = {"banks_by": method.banks_by, **evaluation}
        return settled

    @field_validator("method_section", mode="before")
    @classmethod
    def _read_section(cls, given: Any, info: ValidationInfo) -> Section | None:
        if "method" not in info.data:
            return None
        method = if_trusted(info.data["method"])
        section = UnreadSection if method is None else method.section
        return cast(Section, section.model_validate(given)) if section is not None else None

    @model_serializer(mode="wrap")
    def _name_section(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        if isinstance(self.method_section, UnreadSection):
            plain = {key: value for key, value in write(self).items() if key != "method_section"}
            return {**plain, **self.method_section.written}
        name = load_method(self.method).name
        written = {name if key == "method_section" else key: value for key, value in write(self).items()}
        return {key: value for key, value in written.items() if key != name or value is not None}

    @model_validator(mode="after")
    def _check_tasks(self) -> StreamConfig:
        seen: set[str] = set()
        for position, task in enumerate(self.tasks):
            if task.name not in self.datasets:
                raise ValueError(
                    f"tasks.{position}.name: unknown task {task.name!r}{nearest(task.name, self.datasets)}; "
                    "a new one needs an entry in `datasets` with its modality and folder"
                )
            if task.name in seen:
                raise ValueError(f"tasks.{position}.name: task {task.name!r} appears twice in the stream")
            seen.add(task.name)
        check_protocols({task.name: task for task in self.tasks})
        return self

    @model_validator(mode="after")
    def _check_by_method(self) -> StreamConfig:
        if self.knows_method:
            method = load_method(self.method)
            method.check(self)
            if self.lora.projector_learning_rate is not None and (method.keeps_frozen_adapters or method.mixes_banks):
                raise ValueError(
                    f"lora.projector_learning_rate: method {self.method} sums banks, and projectors have no sum; "
                    "remove it, or choose a method that answers with one bank (each, sequential, ewc, replay, joint, "
                    "moe_lora, mr_lora, …)"
                )
        return self

    @property
    def knows_method(self) -> bool:
        """Whether the method's code could be read. If not, the run can be read and exported, but not trained."""
        return not isinstance(self.method_section, UnreadSection)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.run

    @property
    def results_run_dir(self) -> Path:
        return Path(self.results_dir) / self.run

    @property
    def stream(self) -> list[Task]:
        """The tasks in order, each with its data set."""
        return [
            Task(
                index=index,
                **task.model_dump(),
                **self.datasets[task.name].model_dump(exclude={"published"}),
            )
            for index, task in enumerate(self.tasks)
        ]

    def task(self, name: str) -> Task:
        """Return the task of that name.

        Raises:
            ConfigError: There is none; the message names the nearest one.
        """
        for task in self.stream:
            if task.name == name:
                return task
        names = [task.name for task in self.tasks]
        raise ConfigError(f"unknown task {name!r}{nearest(name, names)}; the stream has {', '.join(names)}")

    def same_modality(self, task: Task) -> list[bool]:
        """Return for each earlier task of the stream whether it has the same modality."""
        return [earlier.modality == task.modality for earlier in self.stream[: task.index]]

    def fingerprint_fields(self, last: Task | None = None) -> dict[str, Any]:
        """Return everything in this configuration that decides the banks up to a task.

        Paths, speed and evaluation do not decide them, nor do later tasks, unless the method trains on all tasks at
        once.

        Args:
            last: The task; by default the last one.
        """
        tasks = self.tasks if last is None or self._all_at_once else self.tasks[: last.index + 1]
        fields = deciding_fields(self.model_dump(mode="json"), self.validation_decides)
        fields["tasks"] = [task.model_dump(mode="json") for task in tasks]
        fields["modalities"] = {task.name: self.datasets[task.name].modality for task in tasks}
        return fields

    @property
    def validation_decides(self) -> bool:
        """Whether validation decides which bank of a task is kept, or when its training stops."""
        return self.training.get("keep", "last") != "last" or self.training.get("patience") is not None

    @property
    def _all_at_once(self) -> bool:
        return self.knows_method and load_method(self.method).all_at_once

    def training_digest(self, last: Task | None = None) -> str:
        """Return the SHA-256 of `fingerprint_fields`."""
        return hashlib.sha256(json.dumps(self.fingerprint_fields(last), sort_keys=True).encode()).hexdigest()
