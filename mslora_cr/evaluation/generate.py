"""Greedy answers by the batch: left-padded, grouped by length, resumable, shared by all ranks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from mslora_cr.data.collator import QuestionCollator, in_batches, padding_share
from mslora_cr.data.datasets import Preprocessing, Sample
from mslora_cr.data.records import TestRecord
from mslora_cr.data.tokenizer import Tokenizer
from mslora_cr.distributed.comm import all_gather_object, barrier, broadcast_object, rank, world_size
from mslora_cr.utils.files import replacing, write_json

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


class Questions(Protocol):
    """What is answered: the questions of a task's file, or of several."""

    @property
    def preprocessing(self) -> Preprocessing: ...
    @property
    def records(self) -> Iterable[TestRecord]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...
    def lengths(self) -> list[int]: ...


def answer_questions(
    model: nn.Module,
    samples: Questions,
    folder: Path,
    decoding: Decoding,
    fingerprint: str,
    label: str,
    choose: Callable[[Sequence[int]], None] | None = None,
) -> dict[str, float]:
    """Answer every question of some samples, greedily, and write `answer-file.jsonl` in the questions' order.

    Each batch is appended to a file of this rank as soon as it is answered, so that a killed run resumes after its
    last batch. The answer file appears whole, when the last question is answered.

    Args:
        folder: where the answer file goes.
        fingerprint: says what decides the answers (banks, questions, limits); answers given under another one are
            thrown away.
        label: what the progress bar says.
        choose: is told the questions of each batch before they are answered.

    Returns:
        The seconds that answering took in this call, and the share of padding in the prompts' batches and what it would
        be in the questions' own order.
    """
    target = folder / ANSWERS
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / f".answers-{fingerprint[:16]}-{rank()}.jsonl"
    # One rank reads, before any writes again: all must see the same questions as answered.
    answered = broadcast_object(read_journals(folder, fingerprint) if rank() == 0 else {})
    lengths = samples.lengths()
    # Longest first: padding is least among neighbours, and what does not fit in memory fails at once.
    order = sorted(range(len(samples)), key=lambda index: -lengths[index])
    batches = in_batches([index for index in order if index not in answered], decoding.batch_size)
    mine: dict[int, str] = {}
    started = time.monotonic()
    with (
        journal.open("a", encoding="utf-8") as file,
        tqdm(desc=label, total=len(samples), initial=len(answered), unit="answer", disable=rank() != 0) as bar,
    ):
        for rows in _answer_batches(model, samples, batches[rank() :: world_size()], decoding, choose):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            mine.update((row["index"], row["text"]) for row in rows)
            bar.update(min(len(rows) * world_size(), len(samples) - bar.n))
    # Ranks tell each other: a shared file system may show a file late.
    for theirs in all_gather_object(mine):
        answered |= theirs
    seconds = time.monotonic() - started
    if rank() == 0:
        assert len(answered) == len(samples), f"{len(samples) - len(answered)} questions have no answer"
        publish(samples.records, answered, target, decoding.model_id, fingerprint)
    barrier()
    return {
        "seconds": round(seconds, 3),
        "padding": padding_share(lengths, in_batches(order, decoding.batch_size)),
        "padding_unsorted": padding_share(lengths, in_batches(range(len(samples)), decoding.batch_size)),
    }


def _answer_batches(
    model: nn.Module,
    samples: Questions,
    batches: list[list[int]],
    decoding: Decoding,
    choose: Callable[[Sequence[int]], None] | None,
) -> Iterator[list[dict[str, Any]]]:
    tokenizer = samples.preprocessing.tokenizer
    loader: DataLoader[Any] = DataLoader(
        samples,  # type: ignore[arg-type]  # it has what a Dataset has
        batch_sampler=batches,
        collate_fn=QuestionCollator(tokenizer.pad_token_id),
        num_workers=decoding.workers,
    )
    for batch in loader:
        indices = batch.pop("record_index").tolist()
        if choose is not None:
            choose(indices)
        texts = tokenizer.decode(greedy(model, batch, tokenizer, decoding.max_new_tokens))
        yield [{"index": index, "text": text} for index, text in zip(indices, texts, strict=True)]


@torch.inference_mode()
def greedy(
    model: Any, batch: Mapping[str, Tensor], tokenizer: Tokenizer, max_new_tokens: int, streamer: Any = None
) -> list[list[int]]:
    """The new ids of each prompt of a left-padded batch, up to and with `</s>`, by greedy decoding.

    Args:
        streamer: is handed the ids as they come, as transformers' `generate` does; for a batch of one.
    """
    parameter = next(model.parameters())
    inputs = {
        name: tensor.to(parameter.device, parameter.dtype if tensor.is_floating_point() else None)
        for name, tensor in batch.items()
    }
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer,
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    eos = tokenizer.eos_token_id
    return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in new]


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
