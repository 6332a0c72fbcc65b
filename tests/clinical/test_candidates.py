"""Which answers of a question are scored: never those that the test file alone gives."""

from collections import Counter
from typing import Any

from mslora_cr.clinical.candidates import candidate_answers
from mslora_cr.data.records import TestRecord


def question(text: str, truth: str, kind: str = "CLOSED", **more: Any) -> TestRecord:
    line = {"question_id": 1, "image": "a.png", "text": text, "gt": truth, "answer_type": kind}
    return TestRecord.model_validate(line | more)


def test_a_closed_set_is_the_options_or_yes_and_no_or_what_training_says() -> None:
    training = {
        "which class?": Counter({"Melanoma": 3, "melanoma": 1, "Nevus": 2, "bcc": 1}),
        "is it round?": Counter({"Yes.": 4}),
        "which side?": Counter({"left": 9}),
        "which number?": Counter({str(number): 1 for number in range(40)}),
        "is it sharp?": Counter({"yes": 5, "no": 4, "partly": 1}),
    }
    sets = [
        (question(" which  CLASS? ", "vasc"), ("bcc", "Melanoma", "Nevus")),  # the truth is not in training: not told
        (question("Which class?", "nevus", "OPEN"), ()),
        (question("Is it round?", "no"), ("No.", "Yes.")),
        (question("Is it sharp?", "no"), ("no", "partly", "yes")),
        (question("Which side?", "right"), ()),  # training has one answer alone
        (question("Which number?", "3"), ()),  # and here too many
        (question("Is it large?", "No"), ("No", "Yes")),  # not in training; every truth is yes or no
        (question("Which colour?", "red"), ()),  # not in training
        (question("Which?", "B", options=["lung", "heart"]), ("A", "B")),
        (question("Which?", "lung", options=["lung", "heart"]), ("lung", "heart")),
    ]
    assert candidate_answers([record for record, _ in sets], training) == [candidates for _, candidates in sets]
    assert candidate_answers([question("Which class?", "nevus"), question("Is it?", "yes")], None) == [
        (),
        ("no", "yes"),
    ]
