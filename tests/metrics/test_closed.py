"""Clinical figures against scikit-learn and worked examples."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sk

from mslora_cr.metrics.closed import (
    _FUNCTIONS,
    class_figures,
    confusion,
    confusion_figures,
)
from mslora_cr.metrics.discrimination import _average_precision, auroc, average_precision, obuchowski_error
from mslora_cr.metrics.guessing import hindsight_guesses, majority_guesses, question_key
from mslora_cr.metrics.numbers import count_figures, is_count, number_in
from mslora_cr.statistics.intervals import independent

FIXTURES = Path(__file__).parents[1] / "fixtures" / "statistics"
BINARY = json.loads((FIXTURES / "binary_closed.json").read_text())
SEVERAL = json.loads((FIXTURES / "multiclass_closed.json").read_text())
CLUSTERED = json.loads((FIXTURES / "clustered_auc.json").read_text())


def binary():
    said = ["yes" if chance >= 0.5 else "no" for chance in BINARY["p_yes"]]
    return confusion(said, [["yes" if one else "no"] for one in BINARY["truth"]], independent(len(said)))


def test_yes_or_no_by_the_worked_example() -> None:
    found = {name: figure.value for name, figure in confusion_figures(binary()).items()}
    names = {
        "accuracy": "accuracy",
        "balanced accuracy": "balanced_accuracy",
        "macro F1": "macro_f1",
        "Matthews' correlation": "mcc",
        "sensitivity": "sensitivity",
        "specificity": "specificity",
        "PPV": "ppv",
        "NPV": "npv",
    }
    assert found == pytest.approx({name: BINARY[theirs] for name, theirs in names.items()})
    assert binary().counts[:, :2].tolist() == BINARY["confusion_rows_truth_no_yes"]


def test_several_classes_and_an_answer_of_none_of_them() -> None:
    truths = [[truth] for truth in SEVERAL["truth"]]
    known = confusion(SEVERAL["prediction"], truths, independent(len(truths)))
    found = confusion_figures(known)
    assert found["accuracy"].value == pytest.approx(SEVERAL["accuracy"])
    assert found["balanced accuracy"].value == pytest.approx(SEVERAL["balanced_accuracy"])
    assert found["macro F1"].value == pytest.approx(SEVERAL["macro_f1_sklearn"])
    assert found["Matthews' correlation"].value == pytest.approx(SEVERAL["mcc"])
    assert found["balanced accuracy"].interval is None and "sensitivity" not in found, (
        "two questions of a class are too few"
    )
    by_class = class_figures(known)
    for name, (recall, precision) in by_class.items():
        assert recall is not None and recall.value == pytest.approx(SEVERAL["recall"][name])
        assert precision is not None and precision.value == pytest.approx(SEVERAL["precision"][name])
    assert known.counts[:, -1].sum() == 1, "the answer of no class"


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_what_intervals_are_linearised_from_is_what_scikit_learn_gives(name: str) -> None:
    random = np.random.default_rng(3)
    truth, said = random.integers(0, 3, 200), random.integers(0, 4, 200)
    counts = np.zeros((3, 4))
    np.add.at(counts, (truth, said), 1)
    theirs = {
        "balanced accuracy": sk.recall_score(truth, said, labels=[0, 1, 2], average="macro"),
        "macro F1": sk.f1_score(truth, said, labels=[0, 1, 2], average="macro"),
        "Matthews' correlation": sk.matthews_corrcoef(truth, said),
    }
    assert float(_FUNCTIONS[name](counts)) == pytest.approx(theirs[name])


def test_intervals_widen_where_questions_share_images() -> None:
    random = np.random.default_rng(4)
    images = np.arange(400) // 8
    right = (random.random(50) < 0.8)[images]
    truth = random.random(400) < 0.5
    said = ["yes" if one == answer else "no" for one, answer in zip(truth, right, strict=True)]
    truths = [["yes" if one else "no"] for one in truth]
    alone = confusion_figures(confusion(said, truths, independent(400)))
    shared = confusion_figures(confusion(said, truths, images))
    for name, figure in shared.items():
        narrow = alone[name].interval
        assert figure.interval is not None and narrow is not None
        assert figure.interval[0] < narrow[0] < figure.value < narrow[1] < figure.interval[1], name


def test_how_an_answer_says_a_class() -> None:
    truths = [["no"], ["yes"], ["yes"], ["no"]]
    known = confusion(["No, there is none.", "YES", "yes or no", "abnormal"], truths, independent(4))
    assert known.names == ("no", "yes") and known.said.tolist() == [0, 1, 2, 2]
    options = {"A": "Lung", "B": "Liver"}
    lettered = confusion(
        ["B", "lung", "a lung or a liver", "b.", "It is a lung"],
        [["Liver"], ["A"], ["Lung"], ["B"], ["A"]],
        independent(5),
        [options] * 5,
    )
    assert lettered.names == ("liver", "lung") and lettered.said.tolist() == [0, 1, 2, 0, 1]
    several = confusion(["heart", "lung"], [["lung", "heart"], ["lung"]], independent(2))
    assert several.right.tolist() == [1, 1], "any accepted truth counts"
    assert confusion(["no pneumonia", "covid"], [["pneumonia"], ["covid"]], independent(2)).right.tolist() == [0, 1]


def test_area_under_the_curve_by_the_worked_examples() -> None:
    positive, scores = np.array(CLUSTERED["truth"]) == 1, np.array(CLUSTERED["score"])
    groups = np.array(CLUSTERED["cluster"])
    assert auroc(positive, scores, groups).value == pytest.approx(CLUSTERED["auroc"])
    assert obuchowski_error(positive, scores, groups) == pytest.approx(CLUSTERED["obuchowski_se"])
    alone = obuchowski_error(positive, scores, independent(len(scores)))
    assert alone == pytest.approx(CLUSTERED["delong_se_ignoring_clusters"])
    positive, scores = np.array(BINARY["truth"]) == 1, np.array(BINARY["p_yes"])
    assert auroc(positive, scores, independent(20)).value == pytest.approx(BINARY["auroc"])
    assert obuchowski_error(positive, scores, independent(20)) == pytest.approx(BINARY["auroc_delong_se"])
    assert average_precision(positive, scores, independent(20)).value == pytest.approx(BINARY["average_precision"])


def test_twenty_questions_of_nine_patients() -> None:
    chances = ".95 .90 .85 .80 .70 .55 .40 .30 .75 .60 .45 .35 .35 .25 .20 .15 .10 .10 .05 .05"
    patients = "0 0 1 1 2 3 4 4 1 2 3 3 5 5 6 6 7 7 8 8"
    scores, groups = np.array([*map(float, chances.split())]), np.array([*map(int, patients.split())])
    positive = np.arange(20) < 8
    area = auroc(positive, scores, groups)
    assert area.value == pytest.approx(0.885417, abs=1e-6) and area.interval is None, "eight positives are too few"
    assert obuchowski_error(positive, scores, groups) == pytest.approx(0.084076, abs=1e-6)
    assert obuchowski_error(positive, scores, independent(20)) == pytest.approx(0.073733, abs=1e-6)
    known = confusion(["yes" if chance >= 0.5 else "no" for chance in scores], [["yes"]] * 8 + [["no"]] * 12, groups)
    found = {name: figure.value for name, figure in confusion_figures(known).items()}
    assert found["sensitivity"] == 0.75 and found["specificity"] == pytest.approx(10 / 12)
    assert found["Matthews' correlation"] == pytest.approx(0.58333, abs=1e-5)


def test_what_guessing_gives() -> None:
    training = {question_key("Is there a mass?"): {"no": 3, "yes": 1}, question_key("Is it CT?"): {"yes": 9}}
    from collections import Counter

    counted = {question: Counter(answers) for question, answers in training.items()}
    asked = ["<image>\nIs there  a MASS?", "Is it CT?", "Is it MR?"]
    guesses = majority_guesses(asked, counted)
    assert guesses == (["no", "yes", "yes"], 1)
    asked, truths = ["a?"] * 12 + ["b?", "c?", "d?"], ["no"] * 7 + ["yes"] * 5 + ["yes", "Yes", "no"]
    assert hindsight_guesses(asked, truths) == ["no"] * 12 + ["yes"] * 3, "questions asked once share a constant"


def test_counts() -> None:
    assert [number_in(text) for text in ("about 3.1 cm", "There are two.", "none", "-4")] == [3.1, 2, None, -4]
    assert [is_count(text) for text in ("3", "three", "3 cm", "", "T2")] == [True, True, False, False, False]
    found = count_figures(["3", "five", "none", "2"], ["3", "4", "1", "4"], independent(4))
    assert (found.questions, found.unparsed) == (4, 1)
    assert found.mean_absolute_error is not None and found.mean_absolute_error.value == pytest.approx(1.0)
    assert found.exact.value == 0.25


def test_the_jackknife_takes_scikit_learns_average_precision() -> None:
    random = np.random.default_rng(4)
    positive, scores = random.random(60) < 0.3, random.integers(9, size=60) / 8  # with ties
    place = np.unique(-scores, return_inverse=True)[1]
    assert _average_precision(positive, place) == pytest.approx(sk.average_precision_score(positive, scores))
    rest = scores != 0.5  # a place that no question has
    left = sk.average_precision_score(positive[rest], scores[rest])
    assert _average_precision(positive[rest], place[rest]) == pytest.approx(left)
