"""Answer files: written whole, resumed after the last batch, stamped with what decided them; ranks share the work."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.collator import in_batches, padding_share
from mslora_cr.data.records import TestRecord
from mslora_cr.distributed.comm import all_gather_object, barrier, broadcast_object, rank, world_size
from mslora_cr.evaluation.schemas import ANSWERS, STAMP, Stamp
from mslora_cr.generation.batching import grouped, in_waves, padding_of, shared_out
from mslora_cr.generation.run import Decoding, Questions, answered_batches, decoder_of
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import append_to, file_digest, replacing
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.strict_json import decode_json

log = logging.getLogger(__name__)


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
    decoder = decoder_of(samples.input_processor, model, samples.prompts(), decoding.max_new_tokens, mixed)
    prompts = decoder.prompts
    banks = mixed.of if mixed is not None else _the_same
    limits = decoding.limits(prompts)
    unanswered = [index for index in range(len(samples)) if index not in answered]
    groups = grouped(prompts, unanswered, banks, most=max(1, -(-len(unanswered) // world_size())))
    tokenizer = samples.input_processor.tokenizer
    fitting = replace(limits, positions=min(limits.positions, decoder.positions_that_fit() or limits.positions))
    waves = in_waves(shared_out(groups, world_size(), limits.new_tokens)[rank()], prompts, fitting)
    mine: dict[int, str] = {}
    started = time.monotonic()
    with (
        append_to(journal) as file,
        progress_bar(desc=label, total=len(samples), initial=len(answered), unit="answer", disable=rank() != 0) as bar,
    ):
        for batch, ids in answered_batches(decoder, samples, waves, decoding.workers):
            texts = tokenizer.decode(ids)
            given = dict(zip(batch, texts, strict=True))
            file.writelines(journal_line(index, text, fingerprint) for index, text in given.items())
            file.flush()
            mine |= given
            bar.update(min(len(given) * world_size(), len(samples) - bar.n))
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


def journal_line(index: int, text: str, fingerprint: str) -> bytes:
    """An answer as a rank's journal keeps it, with a check that it is still this one when it is read."""
    check = hashlib.sha256(f"{fingerprint}/{index}/{text}".encode(errors="backslashreplace")).hexdigest()[:16]
    return json.dumps({"index": index, "text": text, "check": check}).encode() + b"\n"


def read_journals(folder: Path, fingerprint: str) -> dict[int, str]:
    """Answers given so far under this fingerprint, by any rank. A line that a kill cut short is removed, one that was
    changed since is passed over, so that its question is asked again.

    For the first rank alone; it also removes journals of other fingerprints.
    """
    answered: dict[int, str] = {}
    changed = 0
    for journal in sorted(folder.glob(".answers-*.jsonl")):
        if not journal.name.startswith(f".answers-{fingerprint[:16]}-"):
            journal.unlink()
            continue
        lines = check_regular(journal).read_bytes().split(b"\n")
        if lines[-1]:  # without a line break at its end: cut short, and the next line would join it
            with replacing(journal) as partial:
                partial.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
        for line in lines[:-1]:
            try:
                row = decode_json(line)
                index, text = row["index"], row["text"]
                whole = journal_line(index, text, fingerprint) == line + b"\n"
            except (UserError, KeyError, TypeError):
                whole = False
            if whole:
                answered[index] = text
            else:
                changed += 1
    if changed:
        log.warning("%s: %d answers of a stopped run are damaged; they are asked again", folder, changed)
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
    folder: Path,
    fingerprint: str,
    questions: int,
    answer: Callable[[], dict[str, Any]],
    parts: Mapping[Path, int] | None = None,
) -> Stamp:
    """Let `answer` write a folder's answers, unless those there were made from the same and are still what was
    answered; to be called on every rank.

    Args:
        fingerprint: of everything that decides the answers, alike on every rank.
        questions: how many answers there are to be.
        answer: writes them, and returns what else to note of them.
        parts: folders that share the answers, each with a stamp of its own that `answer` writes, and how many of the
            answers it holds; the folder itself has no answer file then.

    Returns:
        The folder's stamp.
    """
    stamp = None
    if rank() == 0:
        stamp = read_stamp(folder, fingerprint)
        for target, count in (parts or {folder: questions}).items():
            stamp = stamp if stamp and answers_are_whole(target, fingerprint, count) else None
    stamp = broadcast_object(stamp)
    if stamp is not None:
        return stamp
    if rank() == 0:
        (folder / STAMP).unlink(missing_ok=True)  # it must never be beside answers that it does not describe
    noted = answer()
    if rank() == 0:
        stamp = write_stamp(folder, fingerprint, questions, noted)
        for journal in folder.glob(".answers-*.jsonl"):
            journal.unlink()
    barrier()
    return broadcast_object(stamp)


def write_stamp(folder: Path, fingerprint: str, rows: int, noted: Mapping[str, Any] | None = None) -> Stamp:
    """Note what a folder's answers were made from and what they are; with their digest, if they are in the folder."""
    answers = folder / ANSWERS
    held = {"sha256": file_digest(answers), "rows": rows} if answers.is_file() else {}
    stamp = Stamp.model_validate({"fingerprint": fingerprint, **held, **(noted or {})})
    stamp.write(folder / STAMP)
    return stamp


def read_stamp(folder: Path, fingerprint: str) -> Stamp | None:
    """The stamp of a folder's answers if its fingerprint matches; a damaged stamp counts as none.

    Raises:
        NewerError: it is of a later version.
    """
    stamp = Stamp.read_if_whole(folder / STAMP)
    return stamp if stamp and stamp.fingerprint == fingerprint else None


def answers_are_whole(folder: Path, fingerprint: str, rows: int) -> bool:
    """Whether a folder has all answers made from the same, as they were given; says so where they were changed since.

    Version 0.1.0 noted no digest: of its answers only the number is known.
    """
    stamp, answers = read_stamp(folder, fingerprint), folder / ANSWERS
    if stamp is None or not answers.is_file():
        return False
    if stamp.sha256 is not None:
        whole = (stamp.sha256, stamp.rows) == (file_digest(answers), rows)
    else:
        whole = sum(1 for line in answers.read_bytes().split(b"\n") if line.strip()) == rows
    if not whole:
        log.warning("%s: cut or changed since it was answered, so these questions are answered again", answers)
    return whole


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of facts that decide answers; plain values, lists and mappings of them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
