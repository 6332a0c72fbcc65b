"""Scores by the type of an answer, against worked examples."""

import pytest

from mslora_cr.metrics.typed import Typed, label_figures, label_set, set_f1, soft_accuracy, typed_scores
from mslora_cr.statistics.intervals import independent

OPTIONS = {"A": "Lung", "B": "Liver", "C": "A cyst"}


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        (Typed("Yes, there is.", ("yes",), "choice", {}, "CLOSED"), {"exact choice": 1}),
        (Typed("abnormal", ("no",), "choice", {}, "CLOSED"), {"exact choice": 0}),  # the published accuracy: right
        (Typed("The answer is B", ("Liver",), "choice", OPTIONS, "CLOSED"), {"exact choice": 1}),
        (Typed("It is a lung or a liver", ("A",), "choice", OPTIONS, "CLOSED"), {"exact choice": 0}),
        (Typed("three cells", ("4",), "number", {}, "OPEN"), {"exact count": 0, "count within 1": 1}),
        (Typed("many", ("4",), "number", {}, "OPEN"), {"exact count": 0, "count within 1": 0}),
        (Typed("Effusion; edema", ("edema, effusion",), "set", {}, "OPEN"), {"label set F1": 1}),
        (
            Typed("left lung", ("the heart", "left lung"), "text", {}, "OPEN"),
            {"exact match, best truth": 1, "F1, best truth": 1, "ROUGE-L, best truth": 1},
        ),
    ],
)
def test_an_answer_is_scored_by_its_type(row: Typed, scores: dict[str, float]) -> None:
    assert typed_scores([row]) == {name: [score] for name, score in scores.items()}


def test_ten_annotators_agree_in_part() -> None:
    truths = ["yes"] * 2 + ["no"] * 8
    assert soft_accuracy("Yes.", truths) == pytest.approx(0.6) and soft_accuracy("no", truths) == 1
    assert soft_accuracy("lung", ["lung"] * 3 + ["left lung"] * 7) == pytest.approx(0.9)
    assert typed_scores([Typed("yes", truths, "choice", {}, "CLOSED")])["soft accuracy"] == pytest.approx([0.6])


def test_sets_of_labels_in_any_order() -> None:
    said, true = (
        [label_set("edema"), label_set("effusion, pneumonia"), frozenset()],
        [
            label_set("Effusion | Edema"),
            label_set("effusion"),
            frozenset(),
        ],
    )
    assert [set_f1(*pair) for pair in zip(said, true, strict=True)] == pytest.approx([2 / 3, 2 / 3, 1])
    [of] = label_figures(said, true, independent(3), most=1)
    assert (of.name, of.questions, of.said) == ("effusion", 2, 1)
    assert of.sensitivity is not None and of.specificity is not None
    assert (of.sensitivity.value, of.specificity.value) == (0.5, 1.0) and of.sensitivity.interval is None
