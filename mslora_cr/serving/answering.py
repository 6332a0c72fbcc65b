"""A trained run that answers questions: the base model is loaded once, and banks are swapped for tasks and stages."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.answers.boxes import Box, filled, filled_question
from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.images import decode_image, load_image, washed_out
from mslora_cr.data.input_processor import TextTokenizer
from mslora_cr.data.prompts import Message
from mslora_cr.data.records import DataError, TestRecord
from mslora_cr.distributed.comm import get_device
from mslora_cr.methods.base import method_of
from mslora_cr.models.load import input_processor_of, load_base
from mslora_cr.routing.fit import feature_extractor
from mslora_cr.routing.foreign import LEVEL, foreign_p_values
from mslora_cr.routing.lda import TaskRouter, TaskStatistics
from mslora_cr.runs.ledger import Ledger, finished_banks
from mslora_cr.serving.alone import answer_and_probability
from mslora_cr.serving.selection import RunBanks
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)
ImageSource = str | Path | bytes | Image.Image
"""A picture's file, its encoded bytes, or the picture itself."""
Exchange = tuple[str, str]
"""A question and the answer that it got."""


@dataclass(frozen=True)
class Answer:
    """An answer, and the banks that gave it.

    Attributes:
        text: The answer without outer white space.
        ids: Its token ids, up to and including `</s>`.
        task: The task whose banks answered; None if all tasks have the same banks.
        stage: The stage of the stream that answered; 0 is the base model alone.
        banks: The names of the banks that answered; empty for the base model alone.
        probabilities: The router's probabilities by task; empty if the task was given.
        confidence: The probability of the answer's tokens after the question.
        abstained: Whether that probability is below the requested one, or the question was refused; then do not use the
            text as an answer.
        foreign: Whether the question is like none of the tasks; None if the task was given, or it is not known.
    """

    text: str
    ids: tuple[int, ...]
    task: str | None
    stage: int
    banks: tuple[str, ...]
    probabilities: dict[str, float]
    confidence: float | None = None
    abstained: bool = False
    foreign: bool | None = None


Foreign = Literal["answer", "base", "refuse"]
"""What becomes of a routed question that is like none of the tasks: it is answered all the same, answered by the base
model without a bank, or refused."""


class AnsweringModel:
    """A run's base model with its banks. Create it with `load`; do not use it from several threads at once.

    Attributes:
        config: The run's configuration.
        run: The run's banks.
    """

    def __init__(self, config: StreamConfig, task: str | None = None, stage: int | None = None) -> None:
        """
        Args:
            config: The run's configuration.
            task: The task whose banks answer, unless a question names another; None routes each question to a task.
            stage: The stage of the stream that answers; None takes the last trained one, 0 the base model alone.

        Raises:
            ConfigError, BankError, ModelError: Before the model is loaded, if the task or stage cannot answer.
        """
        self.config = config
        self.run = RunBanks(config, finished_banks(config))
        self.task, self.stage = task, self.run.stage(stage)
        if task is not None:
            self.run.answering(task, self.stage)
        self._routers: dict[int, TaskRouter] = {}
        self._known: dict[int, list[TaskStatistics]] = {}
        if task is None and self.stage and self.run.needs_task:
            method_of(config)  # Its router needs the method's code.
            self._statistics(self.stage)
        self._base = load_base(config, get_device(config.model.device))
        self._input_processor = input_processor_of(config, self._base)
        self._stack = BankStack(self._base.model, config.lora.fold, reuse=True)
        self._features = feature_extractor(config, self._base)
        self._merged: list[tuple[str, float]] | None = []

    def answer(self, images: ImageSource | Sequence[ImageSource], question: str, **options: Any) -> str:
        """Return the answer's text; `options` are those of `ask`."""
        return self.ask(images, question, **options).text

    def ask(
        self,
        images: ImageSource | Sequence[ImageSource],
        question: str,
        task: str | None = None,
        stage: int | None = None,
        history: Sequence[Exchange] = (),
        max_new_tokens: int | None = None,
        on_text: Callable[[str], None] | None = None,
        abstain_below: float | None = None,
        risk: float | None = None,
        foreign: Foreign = "answer",
        boxes: Sequence[Sequence[float]] = (),
    ) -> Answer:
        """Answer a question greedily, as `evaluate` does.

        Args:
            images: One picture or several, all of which come before the question; `[]` for none.
            question: The question.
            task: Replaces the model's task. Banks are swapped, the base model stays.
            stage: Replaces the model's stage.
            history: Earlier questions about the same pictures, with their answers.
            max_new_tokens: Replaces `evaluation.max_new_tokens`; at least 1.
            on_text: Called with each new piece of the answer's text.
            abstain_below: The least probability of the answer's tokens for it to count as an answer.
            risk: Sets `abstain_below` from the run's validation questions (`evaluate --calibrate`): of all questions
                like these, at most this share is answered wrongly, in expectation.
            foreign: What happens to a question that is like none of the tasks, if no task is given.
            boxes: The boxes for which each `<box>` in the question stands, left, top, right and bottom in pixels of the
                first picture. They are written as in the family's training records.

        Raises:
            UserError: A risk is asked for, and there are no validation questions, or too few.
            ConfigError, BankError: The task or stage cannot answer, or `max_new_tokens` is below 1.
            DataError: A picture cannot be read, a box is not in it or has no mark in the question, or prompt and answer
                would exceed `data.max_length`.
        """
        new_tokens = self.config.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
        if not question.strip():
            raise DataError("the question is empty; type a question")
        if not question.isascii() and question != question.encode(errors="replace").decode():
            raise DataError("the question has half of a surrogate pair, which is no text")
        if new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {new_tokens}; use at least 1")
        pictures = _opened(images)
        written = self._with_boxes(question, boxes, pictures)
        images = self._input_processor.process_images(pictures)
        stage = self.stage if stage is None else self.run.stage(stage)
        task = task or self.task
        likely, is_foreign = self._look(images, history[0][0] if history else question, stage, task)
        task = max(likely, key=lambda name: likely[name]) if likely else task
        if is_foreign and foreign == "refuse":
            return Answer("", (), None, stage, (), likely, abstained=True, foreign=True)
        if is_foreign and foreign == "base":
            stage, likely = 0, {}
        names = self._use(task, stage, likely)
        if risk is not None:
            abstain_below = self._threshold(task, names, risk)
        ids, inputs = self._asked(written, history, images)
        tokenizer = self._input_processor.tokenizer
        streamer = _Streamer(tokenizer, on_text) if on_text else None
        tell = streamer.put if streamer else None
        ids, confidence = answer_and_probability(
            self._input_processor, self._stack.model, ids, inputs, new_tokens, tell
        )
        if streamer:
            streamer.end()
        [text] = tokenizer.decode([ids])
        abstained = abstain_below is not None and confidence < abstain_below
        return Answer(text, tuple(ids), task, stage, names, likely, confidence, abstained, is_foreign)

    def question_of(self, record: TestRecord) -> str:
        """Return a test question as `evaluate` asks it: with its options, and its boxes as the model writes them."""
        return filled([record.question], record, self._input_processor.box_rule)[0]

    def box_in(self, answer: str, size: tuple[int, int]) -> Box | None:
        """Return the first box of an answer, in pixels of a picture of this width and height; None where there is
        none."""
        return self._input_processor.box_rule.read(final_answer(answer).text, size)

    def route(
        self, images: ImageSource | Sequence[ImageSource], question: str, stage: int | None = None
    ) -> dict[str, float]:
        """Return the probability that a question belongs to each task learned by a stage, the likeliest first; empty if
        the same banks answer all tasks.

        Raises:
            BankError: A bank has no statistics for the router.
        """
        stage = self.stage if stage is None else self.run.stage(stage)
        return self._look(self._input_processor.process_images(_opened(images)), question, stage, None)[0]

    def _look(self, images: Any, question: str, stage: int, task: str | None) -> tuple[dict[str, float], bool | None]:
        """Return how likely each task is, and whether the question is like none; nothing where the task is given, or
        all are answered by the same banks."""
        if task is not None or not stage or not self.run.needs_task:
            return {}, None
        with self._stack.projector.own():
            features = self._features.of_question(images, question)
        shares = self._router(stage).probabilities(features)[0].tolist()
        names = [routed.name for routed in self.run.routed(stage)]
        p = foreign_p_values(self._statistics(stage), features)
        likely = dict(sorted(zip(names, shares, strict=True), key=lambda item: -item[1]))
        return likely, None if p is None else bool(p[0] < LEVEL)

    def _statistics(self, stage: int) -> list[TaskStatistics]:
        if stage not in self._known:
            ledger = Ledger.read(self.config)
            self._known[stage] = [ledger.statistics(task.name) for task in self.run.routed(stage)]
        return self._known[stage]

    def _router(self, stage: int) -> TaskRouter:
        if stage not in self._routers:
            method, count = method_of(self.config), self._features.image_features
            self._routers[stage] = method.router(self.config, self._statistics(stage), count)
        return self._routers[stage]

    def _use(self, task: str | None, stage: int, likely: Mapping[str, float]) -> tuple[str, ...]:
        """Swap the banks if others answer; return their names."""
        mixed = likely and method_of(self.config).mixes_banks
        banks = self.run.mixed(stage, likely) if mixed else self.run.answering(task, stage)
        chosen = [(bank.name, bank.scaling) for bank in banks]
        if chosen != self._merged:
            # Until this is done, a failure leaves weights that are neither these nor the earlier ones.
            self._merged = None
            self._stack.set_frozen(banks)
            self._stack.model.eval()
            self._merged = chosen
        return tuple(bank.name for bank in banks)

    def _threshold(self, task: str | None, names: Sequence[str], risk: float) -> float:
        """Return the least probability of an answer that keeps a risk."""
        from mslora_cr.clinical.calibrated import CALIBRATION, calibrated  # needs SciPy, of the extra eval

        digests = [self.run.banks[name].digest for name in names if name in self.run.banks]
        calibration = calibrated(self.config.results_run_dir, task, digests) if task else None
        if calibration is None:
            raise UserError(
                f"no validation questions say which answers of {task or 'the base model'} keep a risk of {risk}: run "
                f"`mslora-cr evaluate` with --calibrate for this stage ({self.config.results_run_dir / CALIBRATION})"
            )
        return calibration.threshold(risk)

    def _asked(self, question: str, history: Sequence[Exchange], images: Any) -> tuple[list[int], dict[str, Tensor]]:
        turns = [turn for asked, answered in history for turn in (Message("human", asked), Message("gpt", answered))]
        try:
            return self._input_processor.asked(turns, question, images)
        except ValueError as error:
            raise DataError(f"the question cannot be asked: {error}") from None

    def _with_boxes(self, question: str, boxes: Sequence[Sequence[float]], pictures: Sequence[Image.Image]) -> str:
        size = pictures[0].size if pictures else None
        try:
            return filled_question(question, boxes, size, self._input_processor.box_rule)
        except ValueError as error:
            raise DataError(f"the question cannot be asked: {error}") from None


class _Streamer:
    """Receives the answer's ids as they are generated; passes on the text that is new since the last call."""

    def __init__(self, tokenizer: TextTokenizer, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] = []
        self._streamed = ""

    def put(self, question: int, token: int) -> None:
        self._ids.append(token)
        self._show(whole=False)

    def end(self) -> None:
        self._show(whole=True)

    def _show(self, whole: bool) -> None:
        [text] = self._tokenizer.decode([self._ids])
        # Half a character is not shown yet.
        if text.startswith(self._streamed) and (whole or not text.endswith("\ufffd")):
            if text != self._streamed:
                self._tell(text[len(self._streamed) :])
            self._streamed = text


def _opened(images: ImageSource | Sequence[ImageSource]) -> list[Image.Image]:
    several = [images] if isinstance(images, str | Path | bytes | Image.Image) else images
    return [open_image(source) for source in several]


def open_image(source: ImageSource) -> Image.Image:
    """Return a picture as RGB, decoded as by `load_image`; warns if a viewer shows the file differently.

    Raises:
        DataError: It cannot be read.
    """
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, bytes):
        return decode_image(io.BytesIO(source), f"an image of {len(source):,} bytes")
    path = Path(source)
    if remark := washed_out(path):
        log.warning("%s: %s; `mslora-cr data convert` writes what a viewer shows", path, remark)
    return load_image(path)
