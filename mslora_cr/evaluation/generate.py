"""Greedy answers by the batch: openings shared, neighbours alike, resumable, shared by all ranks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.collator import in_batches, padding_share
from mslora_cr.data.datasets import Preprocessing, Prompt
from mslora_cr.data.records import TestRecord
from mslora_cr.distributed.comm import all_gather_object, barrier, broadcast_object, rank, world_size
from mslora_cr.evaluation.decoding import Decoder, Openings
from mslora_cr.evaluation.prefix import Limits, Wave, grouped, in_waves, padding_of, shared_out
from mslora_cr.utils.files import replacing, write_json
from mslora_cr.utils.progress import progress_bar

ANSWERS = "answer-file.jsonl"
STAMP = "answers.json"
"""What the answers beside it were made from."""


@dataclass(frozen=True)
class Decoding:
    """How answers are generated, and who is named as their author."""

    max_new_tokens: int
    batch_size: int
    model_id: str
    workers: int = 0

    def limits(self, prompts: Sequence[Prompt]) -> Limits:
        """What may be held at once: what the longest `batch_size` whole prompts and their answers would take."""
        longest = max(map(len, prompts), default=0)
        return Limits(self.batch_size, self.max_new_tokens, self.batch_size * (longest + self.max_new_tokens))


class Questions(Protocol):
    """What is answered: the questions of a task's file, or of several."""

    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def records(self) -> Iterable[TestRecord]: ...
    def __len__(self) -> int: ...
    def prompts(self) -> list[Prompt]: ...
    def pixel_values(self, index: int, /) -> Tensor: ...


def answer_questions(
    model: Any,
    samples: Questions,
    folder: Path,
    decoding: Decoding,
    fingerprint: str,
    label: str,
    mixed: QuestionBanks | None = None,
) -> dict[str, float]:
    """Answer every question of some samples, greedily, and write `answer-file.jsonl` in the questions' order.

    Each batch is appended to a file of this rank as soon as it is answered, so that a killed run resumes after its
    last batch. The answer file appears whole, when the last question is answered.

    Args:
        folder: where the answer file goes.
        fingerprint: says what decides the answers (banks, questions, limits); answers given under another one are
            thrown away.
        label: what the progress bar says.
        mixed: the banks of each question, where they are not the same for all.

    Returns:
        The seconds that answering took in this call, and the share of padding among the positions of the prompts that
        were computed, and what it would be for whole prompts in the questions' own order.
    """
    target = folder / ANSWERS
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / f".answers-{fingerprint[:16]}-{rank()}.jsonl"
    # One rank reads, before any writes again: all must see the same questions as answered.
    answered = broadcast_object(read_journals(folder, fingerprint) if rank() == 0 else {})
    prompts = samples.prompts()
    banks = mixed.of if mixed is not None else _the_same
    limits = decoding.limits(prompts)
    asked = [index for index in range(len(samples)) if index not in answered]
    groups = grouped(prompts, asked, banks, most=max(1, -(-len(asked) // world_size())))
    tokenizer = samples.preprocessing.tokenizer
    decoder = Decoder(model, prompts, tokenizer, decoding.max_new_tokens, mixed)
    own = replace(limits, positions=min(limits.positions, decoder.positions_that_fit() or limits.positions))
    waves = in_waves(shared_out(groups, world_size(), limits.new_tokens)[rank()], prompts, own)
    mine: dict[int, str] = {}
    started = time.monotonic()
    with (
        journal.open("a", encoding="utf-8") as file,
        progress_bar(desc=label, total=len(samples), initial=len(answered), unit="answer", disable=rank() != 0) as bar,
    ):
        for batch, ids in answered_batches(decoder, samples, waves, decoding.workers):
            texts = tokenizer.decode(ids)
            found = dict(zip(batch, texts, strict=True))
            for index, text in found.items():
                file.write(json.dumps({"index": index, "text": text}, ensure_ascii=False) + "\n")
            file.flush()
            mine |= found
            bar.update(min(len(found) * world_size(), len(samples) - bar.n))
    # Ranks tell each other: a shared file system may show a file late.
    for theirs in all_gather_object(mine):
        answered |= theirs
    seconds = time.monotonic() - started
    if rank() == 0:
        assert len(answered) == len(samples), f"{len(samples) - len(answered)} questions have no answer"
        publish(samples.records, answered, target, decoding.model_id, fingerprint)
    barrier()
    every = range(len(samples))
    return {
        "seconds": round(seconds, 3),
        "padding": padding_of(in_waves(grouped(prompts, every, banks), prompts, limits), prompts),
        "padding_unsorted": padding_share([len(prompt) for prompt in prompts], in_batches(every, decoding.batch_size)),
    }


def _the_same(question: int) -> None:
    """The banks of any question, where all have the same."""


def answered_batches(
    decoder: Decoder, samples: Questions, waves: Sequence[Wave], workers: int = 0
) -> Iterator[tuple[Sequence[int], list[list[int]]]]:
    """The questions of each batch of some waves, and their new ids, as they are answered."""
    images: DataLoader[Any] = DataLoader(_Images(samples, decoder.prompts, waves), batch_size=None, num_workers=workers)
    waiting = sum(len(wave.batches) for wave in waves)
    for wave, pixel_values in zip(waves, images, strict=True):
        openings = decoder.read(wave, pixel_values)
        for batch in wave.batches:
            yield batch, greedy(decoder, openings, batch, waiting)
            waiting -= 1


class _Images(Dataset[Tensor | None]):
    """The images of each wave, each once."""

    def __init__(self, samples: Questions, prompts: Sequence[Prompt], waves: Sequence[Wave]) -> None:
        self.samples, self.prompts, self.waves = samples, prompts, waves

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, number: int) -> Tensor | None:
        first = [group.questions[0] for group in self.waves[number].groups]
        shown = [self.samples.pixel_values(question) for question in first if self.prompts[question].images]
        return torch.cat(shown) if shown else None


def greedy(decoder: Decoder, openings: Openings, questions: Sequence[int], waiting: int) -> list[list[int]]:
    """The new ids of each question of a batch; `waiting` batches are to be answered, this one included."""
    return decoder.answer(openings, questions, waiting)


def read_journals(folder: Path, fingerprint: str) -> dict[int, str]:
    """Answers given so far under this fingerprint, by any rank. A line that a kill cut short is removed.

    For the first rank alone; it also removes journals of other fingerprints.
    """
    answered = {}
    for journal in sorted(folder.glob(".answers-*.jsonl")):
        if not journal.name.startswith(f".answers-{fingerprint[:16]}-"):
            journal.unlink()
            continue
        lines = journal.read_bytes().split(b"\n")
        if lines[-1]:  # without a line break at its end: cut short, and the next line would join it
            journal.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
        for line in lines[:-1]:
            row = json.loads(line)
            answered[row["index"]] = row["text"]
    return answered


def publish(
    records: Iterable[TestRecord], answered: Mapping[int, str], target: Path, model_id: str, fingerprint: str
) -> None:
    """Write an answer file in the questions' order; `answered` has an answer for each."""
    with replacing(target) as partial, partial.open("w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            row: dict[str, Any] = {
                "question_id": record.question_id,
                "prompt": record.text,
                "text": answered[index],
                "gt": record.gt,
                "answer_type": record.answer_type,
                "answer_id": hashlib.sha256(f"{fingerprint}/{index}".encode()).hexdigest()[:22],
                "model_id": model_id,
                "metadata": {},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def answer_once(
    folder: Path, fingerprint: str, answer: Callable[[], dict[str, Any]], complete: bool | None = None
) -> dict[str, Any]:
    """Let `answer` write a folder's answers, unless those there were made from the same; to be called on every rank.

    Args:
        fingerprint: of everything that decides the answers, alike on every rank.
        answer: writes them, and returns what else to note of them.
        complete: whether the answers are there, on the first rank; not given: whether the folder has its answer file.

    Returns:
        The folder's stamp: `fingerprint`, and what `answer` returned.
    """
    complete = (folder / ANSWERS).is_file() if complete is None else complete
    stamp = broadcast_object(read_stamp(folder) if complete else {})
    if stamp.get("fingerprint") == fingerprint:
        return stamp
    if rank() == 0:
        (folder / STAMP).unlink(missing_ok=True)  # it must never be beside answers that it does not describe
    stamp = {"fingerprint": fingerprint, **answer()}
    if rank() == 0:
        write_json(folder / STAMP, stamp)
        for journal in folder.glob(".answers-*.jsonl"):
            journal.unlink()
    barrier()
    return stamp


def read_stamp(folder: Path) -> dict[str, Any]:
    """What a folder's answers were made from, and what else is noted of them; empty if there is no stamp."""
    stamp = folder / STAMP
    return json.loads(stamp.read_text(encoding="utf-8")) if stamp.is_file() else {}


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts that decide answers; plain values, lists and mappings of them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
