"""Answers from a served model: any server that speaks OpenAI's chat completions. Files and scores are those of
`evaluate`."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mslora_cr.clinical.calibrated import stored_temperature
from mslora_cr.clinical.candidates import candidate_answers
from mslora_cr.clinical.training import task_frequencies
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.answers.boxes import PIXELS, filled
from mslora_cr.data.images import load_image, resolve_image
from mslora_cr.data.prompts import question_text
from mslora_cr.data.records import DataError, TestRecord, TestRecords, shown_images
from mslora_cr.data.tasks import task_image_roots
from mslora_cr.evaluation.answer_files import (
    Answered,
    Origin,
    answer_once,
    fingerprint_of,
    journal_line,
    journal_of,
    publish,
    read_journals,
)
from mslora_cr.evaluation.asking import AS_IT_IS, Asking, asked_records, blank_records, write_blank
from mslora_cr.evaluation.doubts import warn_of_doubts
from mslora_cr.evaluation.openai_client import TOP_LOGPROBS, Body, Chat, Endpoint, EndpointError, Reply, folder_name
from mslora_cr.evaluation.probabilities import AnswerProbability
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import score_file
from mslora_cr.evaluation.summary import ImageDigests, ResultsTarget, cell_row, write_summary
from mslora_cr.runs.lock import one_writer
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import append_to
from mslora_cr.utils.progress import progress_bar

SERVED = "served"
"""The folder below a results folder for answers of served models, each in a folder of the model's name."""
TASK = "{task}"
"""A placeholder in a model's name for the name of the task that is asked."""


def evaluate_endpoint(
    config: StreamConfig, endpoint: Endpoint, only: str | None = None, asking: Asking = AS_IT_IS
) -> Path:
    """Ask a served model the test questions of every task, or of the one named, and score its answers as one model
    after the last stage.

    Returns the path of `evaluation.json`, below `served/` of the run's results folder. Every answer is stored as soon
    as it arrives: an interrupted evaluation asks no question again.

    Args:
        config: The run whose tasks are asked.
        endpoint: The server.
        asking: How questions are put. Tasks that have no such questions are left out.

    Raises:
        ConfigError, DataError: Before anything is asked.
        EndpointError: The server is gone, or refuses a question.
        LockedError: Another launch writes to the results folder.
    """
    endpoint.check()
    with one_writer(config.results_run_dir):
        tasks = asking.tasks(config, [config.task(only)] if only else config.stream)
        records = asked_records(asking.config(config), tasks, asking)
        name = folder_name(endpoint.model)
        target = ResultsTarget(config.results_run_dir / SERVED / name / asking.name, run=name, method=SERVED)
        images = ImageDigests(config, records)
        blank = target.folder if asking.blank else None
        if blank is not None:
            write_blank(blank)
        stage, rows, possible = len(config.tasks), [], {}
        with Chat(endpoint) as chat:
            for task in tasks:
                image_digest = None if blank else images.of(task)
                origin = _origin(config, endpoint, task, records[task.name], image_digest, asking)
                asker = _Asker(config, endpoint, chat, task, records[task.name], origin, blank)
                folder = target.folder / task.name
                stamp = answer_once(folder, asker.origin, len(asker.records), partial(asker.answer, folder))
                training = task_frequencies(config, task)
                temperature = stored_temperature(target.folder, task.name, [asker.model])
                scores = score_file(folder / ANSWERS, folder, asker.records, training=training, temperature=temperature)
                rows.append(cell_row(task, stage, [asker.model], folder, target.folder, stamp, asker.records, scores))
                warn_of_doubts(rows[-1], config.evaluation.max_new_tokens)
                possible[task.name, stage] = [asker.origin]
        rest = [task for task in config.stream if task.name not in records and asking.path(config, task).is_file()]
        for task in asking.tasks(config, rest):  # Those of an earlier call stay if their answers would be the same.
            others = asking.records(config, task)
            possible[task.name, stage] = [_origin(config, endpoint, task, others, None, asking)]
        write_summary(config, target, rows, possible)
        return target.path


def _origin(
    config: StreamConfig, endpoint: Endpoint, task: Task, records: TestRecords, images: str | None, asking: Asking
) -> Origin:
    fingerprint = fingerprint_of(
        {
            "endpoint": endpoint.url.rstrip("/"),
            "model": endpoint.model.replace(TASK, task.name),
            "questions": records.digest,
            "images": config.data.images,
            "max_new_tokens": config.evaluation.max_new_tokens,
            **asking.facts,
        }
    )
    return Origin(fingerprint, images)


class _Asker:
    """Asks the questions of one task."""

    def __init__(
        self,
        config: StreamConfig,
        endpoint: Endpoint,
        chat: Chat,
        task: Task,
        records: TestRecords,
        origin: Origin,
        blank: Path | None,
    ) -> None:
        self.config, self.task, self.origin = config, task, origin
        self.records = records if blank is None else blank_records(records)
        self.model = endpoint.model.replace(TASK, task.name)
        self._candidates = candidate_answers(records, task_frequencies(config, task))
        self._chat, self._roots = chat, task_image_roots(config, task) if blank is None else [blank]

    def answer(self, folder: Path) -> dict[str, Any]:
        """Answer every question that has no answer yet, and write the answer file."""
        folder.mkdir(parents=True, exist_ok=True)
        answered = read_journals(folder, self.origin.journal)
        journal = journal_of(folder, self.origin.journal, 0)
        started, total = time.monotonic(), len(self.records)
        label = f"{self.task.name} from {self.model}"
        with (
            append_to(journal) as file,
            progress_bar(desc=label, total=total, initial=len(answered), unit="answer") as bar,
        ):

            def note(index: int, reply: Reply) -> None:
                answer = Answered(reply.text, _probability(reply, self._candidates[index]))
                file.write(journal_line(index, answer, self.origin.journal))
                file.flush()
                answered[index] = answer
                bar.update()

            missing = [index for index in range(total) if index not in answered]
            try:
                self._chat.ask_each(missing, lambda index: self._body(self.records[index]), self._location, note)
            except UserError as error:
                progress = (
                    f"{len(answered)} of {total} answers to {self.task.name} are stored; the same command resumes"
                )
                raise type(error)(f"{error}. {progress}") from None
        if not any(answer.text for answer in answered.values()):
            journal.unlink()  # The same command then asks again.
            raise EndpointError(self._nothing_said(answered))
        publish(list(self.records), answered, folder, self.model, self.origin.fingerprint)
        return {"seconds": round(time.monotonic() - started, 3), "greedy": self._chat.greedy}

    def _nothing_said(self, answered: Mapping[int, Answered]) -> str:
        reasons = Counter(of.probability.reason for of in answered.values() if of.probability is not None)
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        limit = self.config.evaluation.max_new_tokens
        return (
            f"{self.model} gave no text in any of its {len(answered)} answers to {self.task.name} (finish_reason "
            f"{counts}). For length, raise evaluation.max_new_tokens = {limit}: a model that reasons needs "
            "more; content_filter and refusal say that the service does not answer such questions"
        )

    def _location(self, index: int) -> str:
        return f"the question on {self.records.location(index)} of {self.records.path}"

    def _body(self, record: TestRecord) -> Body:
        images = shown_images(record, self.config.data.images == "all")
        content: list[Body] = [{"type": "image_url", "image_url": {"url": self._data_url(name)}} for name in images]
        content.append({"type": "text", "text": question_text(filled([record.question], record, PIXELS)[0], 0)})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.evaluation.max_new_tokens,
            "temperature": 0,
            **({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if self.config.evaluation.probabilities else {}),
        }

    def _data_url(self, name: str) -> str:
        """Return the picture as this project decodes it, so that no metadata of the file leaves the machine."""
        file = io.BytesIO()
        try:
            load_image(resolve_image(name, self._roots)).save(file, "PNG", compress_level=1)
        except DataError as error:
            raise DataError(f"{self.records.path}: {error}") from None
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _probability(reply: Reply, candidates: tuple[str, ...]) -> AnswerProbability:
    """Return what a server reports about an answer: its tokens' log-probabilities, and the likeliest first tokens,
    which may include a candidate of one token."""
    first = {token.strip().casefold(): logprob for token, logprob in reversed(list(reply.first.items()))}
    logprobs = tuple(first.get(candidate.casefold()) for candidate in candidates)
    return AnswerProbability(
        tokens=None if reply.logprobs is None else len(reply.logprobs),
        finished=None if reply.reason is None else not reply.cut,
        reason=reply.reason,
        logprob=None if reply.logprobs is None else sum(reply.logprobs),
        logprob_first=reply.logprobs[0] if reply.logprobs else None,
        candidates=candidates,
        logprobs=logprobs,
        lengths=tuple(1 for _ in candidates),
    )
