"""The state that the evaluations of a run share: the base model with its banks, and the fingerprint of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.per_sample import PerSampleAdapters
from mslora_cr.banks.stack import BankStack
from mslora_cr.clinical.candidates import candidate_answers
from mslora_cr.clinical.training import task_frequencies
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.datasets import ConcatEvalDataset, EvalDataset
from mslora_cr.data.input_processor import InputProcessor
from mslora_cr.data.records import TestRecords
from mslora_cr.data.tasks import task_image_roots
from mslora_cr.distributed.comm import get_device
from mslora_cr.evaluation.answer_files import Origin, answer_questions, fingerprint_of
from mslora_cr.evaluation.asking import blank_records
from mslora_cr.evaluation.summary import decoding, fingerprint_fields
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.cached_features import CachedFeatures, cached_features
from mslora_cr.models.load import input_processor_of, load_base


class EvaluationSession:
    """The base model, loaded when the first question needs it, and the banks that answer: merged into it, one set after
    another (`answer_merged`), or next to it, each question with its own (`answer_mixed`)."""

    def __init__(
        self,
        config: StreamConfig,
        banks: Sequence[Bank],
        records: Mapping[str, TestRecords],
        cached_images: bool = False,
        switches: bool = False,
        blank: Path | None = None,
    ) -> None:
        """
        Args:
            cached_images: Take the images' features from `data.cache_image_features`, if it is given. A router, which
                looks at images itself, cannot.
            switches: Keep the base's weights, because several sets of banks are merged one after another.
            blank: A folder with the grey picture that replaces every image.
        """
        self.config, self.banks, self.records = config, banks, records
        self._cached_images, self._switches, self._blank = cached_images, switches, blank
        self._fingerprint_fields = fingerprint_fields(config)
        self._features: CachedFeatures | None = None
        self._beside: tuple[Sequence[Bank], PerSampleAdapters] | None = None
        self._merged: list[str] | None = None

    def fingerprint(self, banks: Sequence[Bank], **facts: Any) -> str:
        """Return the digest of what decides answers: base model and settings, these banks, and further facts."""
        of_banks = {"banks": [bank.digest for bank in banks], "scalings": [bank.scaling for bank in banks]}
        return fingerprint_of({**self._fingerprint_fields, **of_banks, **facts})

    @cached_property
    def base(self) -> BaseModel:
        base = load_base(self.config, get_device(self.config.model.device))
        if self._cached_images:
            projectors = any(bank.projector for bank in self.banks)
            self._features = cached_features(self.config, base, projectors)
        return base

    @cached_property
    def input_processor(self) -> InputProcessor:
        return input_processor_of(self.config, self.base, self._features)

    @cached_property
    def _stack(self) -> BankStack:
        return BankStack(self.base.model, self.config.lora.fold, reuse=self._switches)

    def _adapters(self, banks: Sequence[Bank]) -> PerSampleAdapters:
        if self._beside is not None and self._beside[0] is not banks:
            self._beside[1].remove()
            self._beside = None
        self._beside = self._beside or (banks, PerSampleAdapters(self.base.model, banks))
        return self._beside[1]

    def answer_merged(self, task: Task, banks: Sequence[Bank], folder: Path, origin: Origin) -> dict[str, float]:
        """Answer a task's questions with some banks; returns as `answer_questions`."""
        names = [bank.name for bank in banks]
        if self._merged != names:
            # Until it is done: a failure leaves weights that are neither these nor the earlier ones.
            self._merged = None
            self._stack.set_frozen(banks)
            self._stack.model.eval()
            self._merged = names
        samples, label = self._questions(task), f"{task.name} with {'+'.join(names) or 'no bank'}"
        candidates = self._candidates([task])
        return answer_questions(self._stack.model, samples, folder, decoding(self.config), origin, label, candidates)

    def answer_mixed(
        self,
        tasks: Sequence[Task],
        weights: Tensor,
        folder: Path,
        origin: Origin,
        label: str,
        banks: Sequence[Bank] | None = None,
    ) -> dict[str, float]:
        """Answer the questions of some tasks in common batches; returns as `answer_questions`.

        Args:
            weights: (questions, banks), the weight of each bank for each question, one task after another.
            banks: The banks that answer; the session's by default.
        """
        samples = ConcatEvalDataset([self._questions(task) for task in tasks])
        candidates, how = self._candidates(tasks), decoding(self.config)
        with self._adapters(self.banks if banks is None else banks).answering(weights) as mixed:
            return answer_questions(self.base.model, samples, folder, how, origin, label, candidates, mixed)

    def _candidates(self, tasks: Sequence[Task]) -> list[tuple[str, ...]] | None:
        """Return the closed set of answers of each question, one task after another; None where nothing is to be
        scored.
        """
        if not self.config.evaluation.probabilities:
            return None
        sets = [candidate_answers(self.records[task.name], task_frequencies(self.config, task)) for task in tasks]
        return [candidates for of_task in sets for candidates in of_task]

    def _questions(self, task: Task) -> EvalDataset:
        records, roots = self.records[task.name], task_image_roots(self.config, task)
        if self._blank is not None:
            records, roots = blank_records(records), [self._blank]
        processor = self.input_processor
        if self._features is not None:
            self._features.fill(processor.image_paths(records, roots), decoding(self.config).workers)
        return EvalDataset(records, roots, processor)
