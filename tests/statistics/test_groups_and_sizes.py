"""Subgroups, association of attributes, and how many questions are enough."""

import numpy as np
import pytest
from scipy.stats import contingency

from mslora_cr.statistics.intervals import estimate, independent, score_interval
from mslora_cr.statistics.sample_size import (
    auroc_half_width,
    design_effect,
    detectable_difference,
    share_half_width,
)
from mslora_cr.statistics.subgroups import banded, cramers_v, subgroups


def test_groups_are_scored_from_ten_patients_on() -> None:
    scores, patients = np.tile([1.0, 0.0], 30), np.arange(60) // 2
    labels = ["A"] * 20 + ["B"] * 36 + ["C"] * 4
    found = subgroups(scores, patients, labels)
    assert {name: (group.questions, group.patients) for name, group in found.groups.items()} == {
        "A": (20, 10),
        "B": (36, 18),
        "C": (4, 2),
    }
    assert found.groups["C"].score is None and found.groups["A"].score == 0.5
    assert found.groups["A"].ends == score_interval([estimate(scores[:20], patients[:20])])
    assert found.gap == 0 and found.groups["A"].p == 1.0


def test_a_group_that_is_worse_is_found_and_named() -> None:
    scores = np.repeat([1.0, 0.0, 1.0], [45, 35, 80])
    found = subgroups(scores, independent(160), ["F"] * 80 + ["M"] * 80)
    assert found.worst == "F" and found.gap == pytest.approx(35 / 80)
    assert found.gap_ends is not None and 0.3 < found.gap_ends[0] < 35 / 80 < found.gap_ends[1] < 0.6
    assert found.groups["F"].p is not None and found.groups["F"].p < 0.01
    mixed = subgroups(scores, np.arange(160) // 2, ["F", "M"] * 80)
    assert mixed.groups["F"].p is None, "labels that differ within a patient cannot be permuted over patients"


@pytest.mark.long
def test_permuted_labels_give_five_percent_of_findings() -> None:
    found = 0
    for trial in range(200):
        random = np.random.default_rng(trial)
        patients = np.arange(240) // 4
        scores = (random.random(240) < random.beta(3, 1, size=60)[patients]).astype(float)
        labels = np.array(["A", "B", "C"])[random.integers(0, 3, size=60)[patients]]
        p_values = [group.p for group in subgroups(scores, patients, labels.tolist()).groups.values() if group.p]
        found += min(p_values) < 0.05
    assert found <= 20, "of 200 at 5 %: 10 expected"


def test_numbers_of_many_values_are_cut_into_bands() -> None:
    ages = [*range(20, 60)]
    names = banded([*ages, None])
    assert names[0] == "up to 29.75" and names[-2] == "above 49.25" and names[-1] is None
    assert sorted(names.count(name) for name in set(names) - {None}) == [10, 10, 10, 10]
    assert banded(["F", "M", None, 3]) == ["F", "M", None, "3"] and banded([1, 2]) == ["1", "2"]


def test_association_against_scipy() -> None:
    random = np.random.default_rng(0)
    view = random.random(600) < 0.4
    answer = np.where(random.random(600) < 0.8, view, ~view)
    found = cramers_v([str(one) for one in view], [str(one) for one in answer], independent(600))
    table = np.array([[np.sum((view == a) & (answer == b)) for b in (False, True)] for a in (False, True)])
    plain = contingency.association(table, correction=False)
    assert found.value == pytest.approx(plain, abs=0.01)
    assert found.ends is not None and found.ends[0] < found.value < found.ends[1]
    none = cramers_v([str(one) for one in view], [str(one) for one in random.random(600) < 0.5], independent(600))
    assert none.value < 0.1 and cramers_v(["a"] * 9, ["b"] * 9, independent(9)).value == 0


def test_how_many_are_enough() -> None:
    assert design_effect(800, 100) == pytest.approx(2.4) and design_effect(80, 100) == 1
    low, high = (0.40927543031016883, 0.9285207872478909)  # Wilson's of 6 in 8
    assert share_half_width(0.75, 8) == pytest.approx((high - low) / 2, abs=1e-6)
    assert share_half_width(0.9, 200, 2.0) == pytest.approx(share_half_width(0.9, 100))
    # Hanley and McNeil's example: an area of 0.893 with 51 positive and 58 negative pictures has an error of 0.032
    assert auroc_half_width(0.893, 51, 58) / 1.96 == pytest.approx(0.0325, abs=1e-3)
    assert detectable_difference(200, 0.08) == pytest.approx(2.8016 * (0.08 / 200) ** 0.5, abs=1e-4)
