"""Answers from a served model: any server that speaks OpenAI's chat completions. Files and scores as `evaluate`'s."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO

import httpx

from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.images import load_image, resolve_image
from mslora_cr.data.prompts import question_text
from mslora_cr.data.records import DataError, TestRecord, TestRecords
from mslora_cr.distributed.comm import world_size
from mslora_cr.evaluation.files import ANSWERS
from mslora_cr.evaluation.generate import answer_once, fingerprint_of, journal_line, publish, read_journals
from mslora_cr.evaluation.results import EVALUATION
from mslora_cr.evaluation.score import score_file
from mslora_cr.evaluation.summary import cell_row, write_summary
from mslora_cr.runs.lock import one_writer
from mslora_cr.runs.session import task_folder, task_image_roots
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import append_to
from mslora_cr.utils.progress import progress_bar

SERVED = "served"
"""Where answers of served models go in a results folder, each in a folder of the model's name."""
KEY = "OPENAI_API_KEY"
TASK = "{task}"
LONGEST_PAUSE = 30.0


class EndpointError(UserError):
    """A served model does not answer; what it has answered is kept."""


@dataclass(frozen=True)
class Endpoint:
    """A served model.

    Attributes:
        url: of the server, up to and with `/v1`. model: its name there; `{task}` stands for the name of the task asked.
        concurrency: questions that are asked at once. timeout: seconds until an answer is given up. attempts: how often
        a question is asked before that ends the evaluation. pause: seconds before the second attempt; each next pause
        is twice as long, up to half a minute.
    """

    url: str
    model: str
    concurrency: int = 8
    timeout: float = 300.0
    attempts: int = 6
    pause: float = 1.0


def evaluate_endpoint(config: StreamConfig, endpoint: Endpoint, only: str | None = None) -> Path:
    """Ask a served model the test questions of every task, or of the one named, and score its answers as one model
    after the last stage; returns the path of `evaluation.json`, below `served/` of the run's results folder.

    Every answer is noted as soon as it is there: an interrupted evaluation asks no question again.

    Raises:
        ConfigError, DataError: before anything is asked.
        EndpointError: the server is gone, or refuses a question. LockedError: another launch writes there.
    """
    _check(endpoint)
    with one_writer(config.results_run_dir):
        return _evaluate_endpoint(config, endpoint, only)


def _evaluate_endpoint(config: StreamConfig, endpoint: Endpoint, only: str | None) -> Path:
    tasks = [config.task(only)] if only else config.stream
    records = {task.name: TestRecords(task_folder(config, task) / "test.jsonl") for task in tasks}
    served = config.model_copy(
        update={
            "run": _folder_name(endpoint.model),
            "results_dir": str(config.results_run_dir / SERVED),
            "method": SERVED,
        }
    )
    stage, rows, possible = len(config.tasks), [], {}
    headers = {"Authorization": f"Bearer {os.environ[KEY]}"} if os.environ.get(KEY) else {}
    limits = httpx.Limits(max_connections=endpoint.concurrency)
    with httpx.Client(timeout=endpoint.timeout, headers=headers, limits=limits) as client:
        for task in tasks:
            asker = _Asker(served, endpoint, client, task, records[task.name])
            folder = served.results_run_dir / task.name
            stamp = answer_once(folder, asker.fingerprint, len(asker.records), partial(asker.answer, folder))
            scores, root = score_file(folder / ANSWERS, folder, asker.records), served.results_run_dir
            rows.append(cell_row(task, stage, [asker.model], folder, root, stamp, asker.records, scores))
            possible[task.name, stage] = [asker.fingerprint]
    for task in config.stream:  # tasks of an earlier call stay if their answers would be the same
        path = task_folder(config, task) / "test.jsonl"
        if task.name not in records and path.is_file():
            fingerprint = _fingerprint(served, endpoint, task, TestRecords(path))
            possible[task.name, stage] = [fingerprint]
    path = served.results_run_dir / EVALUATION
    write_summary(served, path, rows, possible)
    return path


def _check(endpoint: Endpoint) -> None:
    if world_size() > 1:
        raise EndpointError("a served model is asked from one process; start without a launcher, with --concurrency")
    try:
        url = httpx.URL(endpoint.url)
    except httpx.InvalidURL as error:
        raise EndpointError(f"--endpoint {endpoint.url}: no address ({error})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise EndpointError(f"--endpoint {endpoint.url}: expected an address such as http://127.0.0.1:8000/v1")
    if url.userinfo:
        raise EndpointError(f"--endpoint: keep keys out of the address; set {KEY} in the environment")


def _folder_name(model: str) -> str:
    """The model's name as a folder's, the same for the same name and for no other."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", model).strip("-.")[:80]
    return plain if plain == model else f"{plain or 'model'}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _fingerprint(config: StreamConfig, endpoint: Endpoint, task: Task, records: TestRecords) -> str:
    return fingerprint_of(
        {
            "endpoint": endpoint.url.rstrip("/"),
            "model": endpoint.model.replace(TASK, task.name),
            "questions": records.digest,
            "images": config.data.images,
            "max_new_tokens": config.evaluation.max_new_tokens,
        }
    )


class _Asker:
    """Asks the questions of one task."""

    def __init__(
        self, config: StreamConfig, endpoint: Endpoint, client: httpx.Client, task: Task, records: TestRecords
    ) -> None:
        self.config, self.endpoint, self.task, self.records = config, endpoint, task, records
        self.model = endpoint.model.replace(TASK, task.name)
        self.fingerprint = _fingerprint(config, endpoint, task, records)
        self._client, self._url = client, f"{endpoint.url.rstrip('/')}/chat/completions"
        self._roots = task_image_roots(config, task)
        self._lock, self._stopped = Lock(), Event()

    def answer(self, folder: Path) -> dict[str, Any]:
        """Answer every question that has no answer yet, and write the answer file."""
        folder.mkdir(parents=True, exist_ok=True)
        answered = read_journals(folder, self.fingerprint)
        journal = folder / f".answers-{self.fingerprint[:16]}-0.jsonl"
        started, total = time.monotonic(), len(self.records)
        label = f"{self.task.name} from {self.model}"
        with (
            append_to(journal) as file,
            progress_bar(desc=label, total=total, initial=len(answered), unit="answer") as bar,
            ThreadPoolExecutor(self.endpoint.concurrency) as pool,
        ):
            missing = [index for index in range(total) if index not in answered]
            futures = [pool.submit(self._note, index, file, answered, bar) for index in missing]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except UserError as error:
                self._stop(pool)
                kept = f"{len(answered)} of {total} answers to {self.task.name} are kept; the same command goes on"
                raise type(error)(f"{error}. {kept}") from None
            except BaseException:  # Ctrl-C: the threads would go on
                self._stop(pool)
                raise
        publish(self.records, answered, folder / ANSWERS, self.model, self.fingerprint)
        return {"seconds": round(time.monotonic() - started, 3)}

    def _stop(self, pool: ThreadPoolExecutor) -> None:
        self._stopped.set()
        pool.shutdown(wait=True, cancel_futures=True)

    def _note(self, index: int, file: BinaryIO, answered: dict[int, str], bar: Any) -> None:
        text = self._ask(index)
        if text is None:
            return
        with self._lock:
            file.write(journal_line(index, text, self.fingerprint))
            file.flush()
            answered[index] = text
            bar.update()

    def _ask(self, index: int) -> str | None:
        """The answer; None if the evaluation ends meanwhile."""
        body, problem = self._body(self.records[index]), ""
        for attempt in range(self.endpoint.attempts):
            pause = min(self.endpoint.pause * 2 ** (attempt - 1), LONGEST_PAUSE) if attempt else 0.0
            if self._stopped.wait(pause):
                return None
            try:
                response = self._client.post(self._url, json=body)
            except httpx.TransportError as error:  # refused, timed out, broken off
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            if response.is_success:
                text = _text_of(response)
                if text is not None:
                    return text
                problem = "an answer that is not a whole chat completion"
            elif response.status_code == 429 or response.status_code >= 500:
                problem = f"HTTP {response.status_code}"
                if response.headers.get("Retry-After", "").isdecimal():
                    self._stopped.wait(min(float(response.headers["Retry-After"]), LONGEST_PAUSE))
            else:
                raise EndpointError(
                    f"{self._url}: the server refuses the question on {self.records.place(index)} of "
                    f"{self.records.path} (HTTP {response.status_code}: {response.text[:300]!r})"
                )
        raise EndpointError(
            f"{self._url}: no answer from {self.model} in {self.endpoint.attempts} attempts (last: {problem}); see "
            "whether the server runs and knows the model"
        )

    def _body(self, record: TestRecord) -> dict[str, Any]:
        shown = record.images if self.config.data.images == "all" else record.images[:1]
        content: list[Mapping[str, Any]] = [
            {"type": "image_url", "image_url": {"url": self._data_url(name)}} for name in shown
        ]
        content.append({"type": "text", "text": question_text(record.text, 0)})
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.config.evaluation.max_new_tokens,
            "temperature": 0,
        }

    def _data_url(self, name: str) -> str:
        """The picture as this project decodes it, so that no metadata of the file leaves the machine."""
        file = io.BytesIO()
        try:
            load_image(resolve_image(name, self._roots)).save(file, "PNG", compress_level=1)
        except DataError as error:
            raise DataError(f"{self.records.path}: {error}") from None
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _text_of(response: httpx.Response) -> str | None:
    """The text of a chat completion; None if it is none."""
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    if content is None:  # a refusal, or nothing but reasoning
        return ""
    return content.strip() if isinstance(content, str) else None
