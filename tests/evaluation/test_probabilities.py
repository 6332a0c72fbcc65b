"""Probabilities of answers: closed sets, shares, the file beside the answers, and a run that resumes."""

import json
import math
from pathlib import Path

import pytest
import torch

from mslora_cr.data.datasets import EvalDataset
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.records import TestRecords
from mslora_cr.evaluation.answer_files import (
    Answered,
    Origin,
    answer_once,
    answer_questions,
    journal_line,
    journal_of,
    read_journals,
)
from mslora_cr.evaluation.doubts import doubts_in_words, doubts_of
from mslora_cr.evaluation.probabilities import (
    PROBABILITIES,
    AnswerProbability,
    read_probabilities,
    write_rows,
)
from mslora_cr.evaluation.results import Cell
from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.generation.run import Decoding
from mslora_cr.models.llava_med import load
from tests.conftest import GOLDEN


def test_probabilities_of_a_worked_example() -> None:
    """Three candidates of three, three and one tokens, worked by hand: sums −0.55, −1.9 and −2.2."""
    probability = AnswerProbability(candidates=("a", "b", "c"), logprobs=(-0.55, -1.9, -2.2), lengths=(3, 3, 1))
    assert probability.probabilities() == pytest.approx((0.6890420821, 0.1786274490, 0.1323304689))
    assert probability.probabilities(normalized=True) == pytest.approx((0.5647399402, 0.3600940842, 0.0751659755))
    assert probability.share == pytest.approx(0.8373215880)
    missing = AnswerProbability(candidates=("a", "b"), logprobs=(-0.5, None), lengths=(1, 1))
    assert missing.probabilities() is None and missing.share is None
    assert AnswerProbability(tokens=4, logprob=-2.0).logprob_mean == -0.5


def test_a_journal_gives_back_what_was_known_of_an_answer(tmp_path: Path) -> None:
    known = AnswerProbability(tokens=2, finished=False, logprob=-0.25, candidates=("no", "yes"), logprobs=(-1.0, -2.0))
    lines = [journal_line(0, Answered("yes", known), "key"), journal_line(1, Answered("no"), "key")]
    changed = lines[0].replace(b"-0.25", b"-0.24")
    journal_of(tmp_path, "key", 0).write_bytes(b"".join([*lines, changed.replace(b'"index": 0', b'"index": 2')]))
    assert read_journals(tmp_path, "key") == {0: Answered("yes", known), 1: Answered("no")}


def test_answers_resume_with_their_probabilities_and_notice_other_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = load(GOLDEN / "llava_med_tiny", dtype=torch.float32)
    images = sorted(f"images/{path.name}" for path in (GOLDEN / "images").glob("*.png"))[:2]
    rows = [
        {"question_id": number, "image": image, "text": text, "gt": truth, "answer_type": "CLOSED"}
        for number, (image, text, truth) in enumerate(
            [(images[0], "is it round?", "yes"), (images[0], "which side?", "left"), (images[1], "which side?", "no")]
        )
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    samples = EvalDataset(TestRecords(tmp_path / "test.jsonl"), [GOLDEN], prepare)
    decoding = Decoding(max_new_tokens=3, batch_size=2, model_id="tiny")
    folder, origin = tmp_path / "answers", Origin("f" * 64, "first")

    def answer() -> dict[str, float]:
        sides = ("left", "right")
        return answer_questions(base.model, samples, folder, decoding, origin, "questions", [("no", "yes"), sides, ()])

    stamp = answer_once(folder, origin, 3, answer)
    answers, probabilities = (folder / ANSWERS).read_bytes(), read_probabilities(folder / PROBABILITIES)
    assert stamp.images == "first" and [of.candidates for of in probabilities] == [("no", "yes"), ("left", "right"), ()]
    assert all(
        of.tokens == 3 and of.finished is False for of in probabilities
    )  # a model of random numbers ends nothing
    for row, of in zip(map(json.loads, (folder / PROBABILITIES).read_text().splitlines()), probabilities, strict=True):
        if of.candidates:
            assert sum(row["p"]) == pytest.approx(1)
            assert row["share"] == pytest.approx(sum(map(math.exp, row["logprobs"])))
        assert of.logprob is not None and of.logprob_first is not None and of.logprob <= of.logprob_first < 0

    # A run that was killed behind its first answers: they are kept, word for word and number for number.
    (folder / "answers.json").unlink()
    resumed = Answered("as it was", probabilities[0].model_copy(update={"logprob": -9.0}))
    journal_of(folder, origin.journal, 0).write_bytes(journal_line(0, resumed, origin.journal))
    answer_once(folder, origin, 3, answer)
    again = read_probabilities(folder / PROBABILITIES)
    assert (
        again[0].logprob == -9.0 and json.loads((folder / ANSWERS).read_text().splitlines()[0])["text"] == "as it was"
    )
    assert [of.logprob for of in again[1:]] == pytest.approx([of.logprob for of in probabilities[1:]], abs=1e-5)

    # Other images behind the same names.
    origin = Origin(origin.fingerprint, "second")
    answer_once(folder, origin, 3, answer)
    assert "images have changed" in caplog.text and (folder / ANSWERS).read_bytes() == answers


def test_answers_of_earlier_versions_pass_without_a_digest_of_images() -> None:
    assert Origin("a", "b").gave("a", None) and Origin("a", "b").gave("a", "b")
    assert not Origin("a", "b").gave("a", "c") and not Origin("a", "b").gave("c", "b")


@pytest.mark.parametrize(
    ("text", "advice"), [("yes yes yes", "does not end them"), ("ye", "raise it"), ("<think>is it, or", "raise it")]
)
def test_what_to_do_about_answers_that_were_cut(text: str, advice: str, tmp_path: Path) -> None:
    line = {"question_id": 1, "prompt": "Is it?", "text": text, "gt": "yes", "answer_type": "CLOSED"}
    (tmp_path / ANSWERS).write_text(json.dumps(line) + "\n")
    write_rows(tmp_path / PROBABILITIES, [AnswerProbability(tokens=3, finished=False).row(1)])
    facts = {"task": "CXP", "stage": 2, "banks": (), "answers": "a", "questions": "", "rows": 1, "fingerprint": ""}
    cell = Cell(**facts, seconds=0.0, metrics={}, intervals={}, **doubts_of(tmp_path))
    doubt = doubts_in_words(cell, 3)[0]
    assert doubt.startswith("1 of 1 answers (100 %) were cut off at evaluation.max_new_tokens = 3") and advice in doubt
