"""Measures a task's validation records during training: the loss, and the scores of answers. It changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from mslora_cr.banks.stack import BankStack
from mslora_cr.data.datasets import ConcatEvalDataset, ConcatTrainDataset
from mslora_cr.data.records import AnswerType
from mslora_cr.distributed.comm import all_gather_object, broadcast_object
from mslora_cr.generation.run import Decoding, decoder_of, scored_batches, waves_of_rank
from mslora_cr.metrics.published import score_answers
from mslora_cr.training.passes import Passes


class ValidationAnswer(NamedTuple):
    """An answer to a validation question, in the form that the scorer takes."""

    text: str
    gt: str
    answer_type: AnswerType


@dataclass(frozen=True)
class ValidationSet:
    """The validation records of a task.

    Attributes:
        samples: The samples for the loss.
        batch_size: The number of samples whose loss is computed at once.
        questions: The questions for the scores.
        decoding: How the questions are answered.
        together: Whether every rank answers every question, step by step with the others. Under ZeRO-3 each step needs
            all ranks, so that ranks with questions of their own would wait for each other forever.
    """

    samples: ConcatTrainDataset
    batch_size: int
    questions: ConcatEvalDataset
    decoding: Decoding
    together: bool = False


class Validation:
    """Loss and scores of a validation set with the current bank. Call every method on every rank."""

    def __init__(self, data: ValidationSet, stack: BankStack, passes: Passes) -> None:
        """
        Args:
            stack: The model, with the trainable bank on top.
        """
        self._data, self._stack, self._passes = data, stack, passes

    def measure(self) -> dict[str, float]:
        """Return `loss`, the mean cross entropy over the answers' tokens, and every score of `evaluate`, in percent.

        The result is the same on every rank. The random state is restored, so that training continues as if nothing was
        measured.
        """
        device = self._stack.base.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._stack.model.eval()
            measured = {"loss": self._passes.mean_loss(self._data.batch_size)}
            scores = score_answers(self._answers(self._data.questions))
            measured |= scores.metrics | scores.added
        return dict(broadcast_object(measured))

    def _answers(self, questions: ConcatEvalDataset) -> list[ValidationAnswer]:
        """Return the questions' answers, in order; ranks share the questions, or answer them together."""
        processor, decoding = questions.input_processor, self._data.decoding
        decoder = decoder_of(
            processor,
            self._stack.model,
            questions.prompts(),
            decoding.max_new_tokens,
            together=self._data.together,
        )
        waves = waves_of_rank(decoder, decoding, range(len(questions)))
        mine: dict[int, str] = {}
        for batch in scored_batches(decoder, questions, waves, None, decoding.workers):
            mine |= zip(batch.questions, processor.tokenizer.decode(batch.ids), strict=True)
        texts = {index: text for part in all_gather_object(mine) for index, text in part.items()}
        return [
            ValidationAnswer(texts[index], record.gt, record.answer_type)
            for index, record in enumerate(questions.records)
        ]


class EarlyStop(EarlyStoppingCallback):
    """transformers' own callback, whose count of validations without improvement is part of a checkpoint."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Stop a run that resumes from the step at which it stopped. transformers' own callback requires
        `load_best_model_at_end` here; `training.keep` replaces it."""
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience
