"""Non-inferiority: worked cases, its level and power by simulation, and what clusters cost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mslora_cr.statistics.intervals import independent
from mslora_cr.statistics.noninferiority import NonInferiority, non_inferiority, sample_size, spent

WORKED: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "medical" / "non_inferiority.json").read_text()
)


def paired(gained: int, lost: int, questions: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [gained, lost, questions - gained - lost])


@pytest.mark.parametrize("case", WORKED["cases"], ids=lambda case: f"{case['gained']}-{case['lost']}-{case['n']}")
def test_tango_worked_cases(case: dict[str, Any]) -> None:
    values = paired(case["gained"], case["lost"], case["n"])
    found = non_inferiority(values, independent(case["n"]), case["margin"], 0.025, binary=True)
    assert found.difference == pytest.approx(case["d"])
    assert found.p == pytest.approx(case["p"], abs=1e-9)
    assert found.bound == pytest.approx(case["lower_97_5"], abs=1e-8)
    at_5 = non_inferiority(values, independent(case["n"]), case["margin"], 0.05, binary=True)
    assert at_5.bound == pytest.approx(case["lower_95"], abs=1e-8)
    assert (found.gained, found.lost, found.questions) == (case["gained"], case["lost"], case["n"])


def test_example_of_two_hundred_patients() -> None:
    found = non_inferiority(paired(2, 6, 200), independent(200), 0.05, 0.05, binary=True)
    assert (100 * found.bound, found.p) == pytest.approx((-4.833, 0.0425), abs=5e-4)
    worse = non_inferiority(paired(3, 12, 200), independent(200), 0.05, 0.05, binary=True)
    assert (100 * worse.bound, worse.p) == pytest.approx((-8.099, 0.398), abs=1e-3)
    assert worse.needed is not None and worse.needed > 200
    assert non_inferiority(paired(3, 23, 200), independent(200), 0.05, 0.05, binary=True).needed is None


def test_equal_answers_of_few_patients_need_more_patients() -> None:
    """Even if no answer changed, the test passes only from some number of questions on."""

    def found(questions: int) -> NonInferiority:
        return non_inferiority(np.zeros(questions), independent(questions), 0.03, spent(0.05, 1), binary=True)

    needed = found(80).needed
    assert needed is not None and needed > 100
    assert found(needed - 1).bound < -0.03 < found(needed).bound


@pytest.mark.parametrize("case", WORKED["sample_size"])
def test_sample_size(case: dict[str, Any]) -> None:
    assert sample_size(case["discordant"], case["margin"], case["alpha"], case["power"], case["deff"]) == case["n"]


def test_levels_of_a_stream_add_up() -> None:
    levels = [spent(0.05, number) for number in range(1, 2000)]
    assert levels[:5] == pytest.approx([0.0304, 0.0076, 0.0034, 0.0019, 0.0012], abs=5e-5)
    assert 0.0499 < sum(levels) < 0.05


def test_questions_about_one_patient_count_for_less() -> None:
    values = np.tile(paired(2, 6, 100), 4)
    alone = non_inferiority(values, independent(400), 0.05, 0.05, binary=True)
    together = non_inferiority(values, np.tile(np.arange(100), 4), 0.05, 0.05, binary=True)
    assert together.groups == 100
    assert together.bound < alone.bound
    once = non_inferiority(paired(2, 6, 100), independent(100), 0.05, 0.05, binary=True)
    assert together.bound == pytest.approx(once.bound, abs=0.004)  # four equal answers say what one does


@pytest.mark.parametrize("clustered", [False, True])
def test_the_level_holds_at_the_margin(clustered: bool) -> None:
    """True loss = margin: the test passes in at most its level of cases, within the simulation's error."""
    generator, margin, trials = np.random.default_rng(5), 0.05, 1500
    groups = np.repeat(np.arange(100), 4) if clustered else independent(400)
    passed = 0
    for _ in range(trials):
        if clustered:
            changes = generator.random(100) < 0.15
            signs = np.where(generator.random(100) < 1 / 3, 1.0, -1.0)
            values = np.repeat(changes * signs, 4) * (generator.random(400) < 0.999)
        else:
            values = generator.choice([1.0, -1.0, 0.0], p=[0.05, 0.10, 0.85], size=400)
        passed += non_inferiority(values, groups, margin, 0.05, binary=True).p < 0.05
    assert passed / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_scores_between_0_and_1_take_a_t_test() -> None:
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(0).normal(0.0, 0.1, 50).clip(-1, 1)
    found = non_inferiority(values, independent(50), 0.03, 0.05, binary=False)
    assert found.p == pytest.approx(ttest_1samp(values, -0.03, alternative="greater").pvalue)
