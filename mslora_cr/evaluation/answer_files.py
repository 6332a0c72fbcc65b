"""Answer files: written whole, resumed after the last batch, stamped with what decided them. Ranks share the work."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.collator import in_batches, padding_share
from mslora_cr.data.records import TestRecord
from mslora_cr.distributed.comm import all_gather_object, barrier, broadcast_object, rank, world_size
from mslora_cr.evaluation.probabilities import (
    PROBABILITIES,
    AnswerProbability,
    continuations_of,
    probability_of,
    write_probabilities,
)
from mslora_cr.evaluation.schemas import ANSWERS, STAMP, Stamp
from mslora_cr.generation.batching import grouped, in_waves, padding_of
from mslora_cr.generation.run import Decoding, Questions, decoder_of, scored_batches, waves_of_rank
from mslora_cr.utils.files import append_to, file_digest, replacing
from mslora_cr.utils.journal import line_check, read_journal
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_regular

log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """An answer, and what is known of its probability; None for answers of earlier versions."""

    text: str
    probability: AnswerProbability | None = None


def journal_of(folder: Path, key: str, rank: int) -> Path:
    """Return the file in which a rank keeps its answers until all are there."""
    return folder / f".answers-{key[:16]}-{rank}.jsonl"


def journal_line(index: int, answer: Answered, key: str) -> bytes:
    """Return the journal's line for an answer, with a check against later changes."""
    probability = {} if answer.probability is None else {"known": answer.probability.model_dump(exclude_defaults=True)}
    facts = f"{key}/{index}/{answer.text}" + (f"/{json.dumps(probability)}" if probability else "")
    return json.dumps({"index": index, "text": answer.text, **probability, "check": line_check(facts)}).encode() + b"\n"


def _of_line(row: dict[str, Any]) -> tuple[int, Answered]:
    probability = AnswerProbability.model_validate(row["known"]) if "known" in row else None
    return operator.index(row["index"]), Answered(row["text"], probability)


def read_journals(folder: Path, key: str) -> dict[int, Answered]:
    """Read the answers given so far under this key, by any rank; for the first rank alone.

    A line that a kill cut short is removed. A line that was changed is passed over, so that its question is asked
    again. Journals of other keys are removed.
    """
    answered: dict[int, Answered] = {}
    changed = 0
    for journal in sorted(folder.glob(".answers-*.jsonl")):
        if not journal.name.startswith(f".answers-{key[:16]}-"):
            journal.unlink()
            continue
        lines = check_regular(journal).read_bytes().split(b"\n")
        if lines[-1]:  # Without a line break the line was cut short, and the next line would be appended to it.
            with replacing(journal) as partial:
                partial.write_bytes(b"".join(line + b"\n" for line in lines[:-1]))
        entries, damaged = read_journal(journal, _of_line, lambda entry: journal_line(*entry, key))
        answered |= dict(entries)
        changed += damaged
    if changed:
        log.warning("%s: %d answers of a stopped run are damaged; they are asked again", folder, changed)
    return answered


class Origin(NamedTuple):
    """What decides answers.

    Attributes:
        fingerprint: Digest of banks, base model, questions and settings.
        images: Digest of the shown image files; None if it is unknown, as for answers of earlier versions and for tasks
            that are not evaluated now, whose images are not read again.
    """

    fingerprint: str
    images: str | None = None

    @property
    def journal(self) -> str:
        """The key under which answers are kept until they are published."""
        return self.fingerprint if self.images is None else fingerprint_of(self._asdict())

    def gave(self, fingerprint: str, images: str | None) -> bool:
        """Return whether answers with this fingerprint and these images have this origin. Images that either side does
        not know pass.
        """
        return fingerprint == self.fingerprint and (None in (images, self.images) or images == self.images)


def answer_questions(
    model: Any,
    samples: Questions,
    folder: Path,
    decoding: Decoding,
    origin: Origin,
    label: str,
    candidates: Sequence[tuple[str, ...]] | None = None,
    mixed: QuestionBanks | None = None,
) -> dict[str, float]:
    """Answer every question of some samples greedily, and write `answer-file.jsonl` in the questions' order.

    Each rank appends each batch to a file of its own as soon as it is answered, so that a killed run resumes after its
    last batch. The answer file appears whole when the last question is answered.

    Args:
        origin: What decides the answers; answers of another origin are discarded.
        label: The text of the progress bar.
        candidates: The closed set of answers of each question, empty if it has none. These and the answers are scored;
            None scores nothing.
        mixed: The banks of each question, if they are not the same for all.

    Returns:
        The seconds that answering took in this call, the share of padding among the computed positions of the prompts,
        and that share for whole prompts in the questions' own order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One rank reads before any rank writes: all must see the same questions as answered.
    answered = broadcast_object(read_journals(folder, origin.journal) if rank() == 0 else {})
    processor, records = samples.input_processor, list(samples.records)
    decoder = decoder_of(processor, model, samples.prompts(), decoding.max_new_tokens, mixed)
    prompts = decoder.prompts
    banks = mixed.of if mixed is not None else _the_same
    limits = decoding.limits(prompts)
    unanswered = [index for index in range(len(samples)) if index not in answered]
    wanted = None if candidates is None else continuations_of(records, processor, candidates)
    waves = waves_of_rank(decoder, decoding, unanswered, banks)
    mine: dict[int, Answered] = {}
    started = time.monotonic()
    with (
        append_to(journal_of(folder, origin.journal, rank())) as file,
        progress_bar(desc=label, total=len(samples), initial=len(answered), unit="answer", disable=rank() != 0) as bar,
    ):
        for batch in scored_batches(decoder, samples, waves, wanted, decoding.workers):
            texts = processor.tokenizer.decode(batch.ids)
            scores: Sequence[Any] = batch.scores or [None] * len(texts)
            probabilities = [
                probability_of(ids, processor.end_ids, candidates[index] if candidates else (), score)
                for index, ids, score in zip(batch.questions, batch.ids, scores, strict=True)
            ]
            given = dict(zip(batch.questions, map(Answered, texts, probabilities), strict=True))
            file.writelines(journal_line(index, answer, origin.journal) for index, answer in given.items())
            file.flush()
            mine |= given
            bar.update(min(len(given) * world_size(), len(samples) - bar.n))
    # Ranks exchange their answers: a shared file system may show a file late.
    for theirs in all_gather_object(mine):
        answered |= theirs
    seconds = time.monotonic() - started
    if rank() == 0:
        assert len(answered) == len(samples), f"{len(samples) - len(answered)} questions have no answer"
        publish(records, answered, folder, decoding.model_id, origin.fingerprint)
    barrier()
    every = range(len(samples))
    waves = in_waves(grouped(prompts, every, banks), prompts, limits, mixed.projector if mixed else _the_same)
    return {
        "seconds": round(seconds, 3),
        "padding": padding_of(waves, prompts),
        "padding_unsorted": padding_share([len(prompt) for prompt in prompts], in_batches(every, decoding.batch_size)),
    }


def _the_same(question: int) -> None:
    """Return the banks of any question, if all have the same."""


def publish(
    records: Sequence[TestRecord], answered: Mapping[int, Answered], folder: Path, model_id: str, fingerprint: str
) -> None:
    """Write an answer file in the questions' order, and the probabilities of the answers beside it."""
    probabilities = {index: answer.probability for index, answer in answered.items()}
    write_probabilities(folder / PROBABILITIES, records, probabilities)
    with replacing(folder / ANSWERS) as partial, partial.open("w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            row: dict[str, Any] = {
                "question_id": record.question_id,
                "prompt": record.text,
                "text": answered[index].text,
                "gt": record.gt,
                "answer_type": record.answer_type,
                "answer_id": hashlib.sha256(f"{fingerprint}/{index}".encode()).hexdigest()[:22],
                "model_id": model_id,
                "metadata": {},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def answer_once(
    folder: Path,
    origin: Origin,
    questions: int,
    answer: Callable[[], dict[str, Any]],
    parts: Mapping[Path, int] | None = None,
) -> Stamp:
    """Let `answer` write a folder's answers, unless the existing ones have the same origin and are unchanged.

    Call it on every rank.

    Args:
        origin: What decides the answers, the same on every rank.
        questions: The number of answers to expect.
        answer: Writes the answers, and returns what else to record about them.
        parts: Folders that share the answers, with the number of answers in each; `answer` writes their stamps. The
            folder itself then has no answer file.

    Returns:
        The folder's stamp.
    """
    stamp = None
    if rank() == 0:
        stamp = read_stamp(folder, origin.fingerprint)
        if stamp and not origin.gave(stamp.fingerprint, stamp.images):
            log.warning("%s: the images have changed since these questions were answered; they are asked again", folder)
            stamp = None
        for target, count in (parts or {folder: questions}).items():
            stamp = stamp if stamp and answers_are_whole(target, origin.fingerprint, count) else None
    stamp = broadcast_object(stamp)
    if stamp is not None:
        return stamp
    if rank() == 0:
        (folder / STAMP).unlink(missing_ok=True)  # A stamp must never be beside answers that it does not describe.
    noted = answer()
    if rank() == 0:
        stamp = write_stamp(folder, origin.fingerprint, questions, {**noted, "images": origin.images})
        for journal in folder.glob(".answers-*.jsonl"):
            journal.unlink()
    barrier()
    return broadcast_object(stamp)


def write_stamp(folder: Path, fingerprint: str, rows: int, noted: Mapping[str, Any] | None = None) -> Stamp:
    """Record the origin of a folder's answers, and their digest if they are in the folder."""
    answers = folder / ANSWERS
    held = {"sha256": file_digest(answers), "rows": rows} if answers.is_file() else {}
    stamp = Stamp.model_validate({"fingerprint": fingerprint, **held, **(noted or {})})
    stamp.write(folder / STAMP)
    return stamp


def read_stamp(folder: Path, fingerprint: str) -> Stamp | None:
    """Return the stamp of a folder's answers if its fingerprint matches; a damaged stamp counts as none.

    Raises:
        NewerError: A later version wrote it.
    """
    stamp = Stamp.read_if_whole(folder / STAMP)
    return stamp if stamp and stamp.fingerprint == fingerprint else None


def answers_are_whole(folder: Path, fingerprint: str, rows: int) -> bool:
    """Return whether a folder has all answers of this origin, unchanged; warn if they were changed.

    Version 0.1.0 noted no digest, so only the number of its answers is checked.
    """
    stamp, answers = read_stamp(folder, fingerprint), folder / ANSWERS
    if stamp is None or not answers.is_file():
        return False
    if stamp.sha256 is not None:
        whole = (stamp.sha256, stamp.rows) == (file_digest(answers), rows)
    else:
        whole = sum(1 for line in answers.read_bytes().split(b"\n") if line.strip()) == rows
    if not whole:
        log.warning("%s was cut or changed after it was written, so these questions are answered again", answers)
    return whole


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of facts that decide answers: plain values, lists and mappings of them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
