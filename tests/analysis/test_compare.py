"""`mslora-cr compare`, on answers whose differences are known."""

import json
import math
import shutil
from pathlib import Path

import pytest

from mslora_cr.analysis.compare import compare, render_comparison
from mslora_cr.cli.main import main
from mslora_cr.evaluation.probabilities import AnswerProbability, write_rows
from tests.reporting.test_report import make_run

TASKS = ("pathvqa", "PCAM", "nmi")


def compared(tmp_path: Path, *runs: Path, options: tuple[str, ...] = ()) -> dict:
    output = tmp_path / "comparison.json"
    assert main(["compare", *map(str, runs), "--output", str(output), *options]) == 0
    return json.loads(output.read_text())


def by_task(found: dict, metric: str, run: str) -> dict:
    return {test["task"]: test for test in found["metrics"][metric] if test["run"] == run}


def test_a_difference_is_found_where_there_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_run(tmp_path, "base", tasks=TASKS, right=lambda task, stage: 18)[1]
    same = make_run(tmp_path, "same", tasks=TASKS, right=lambda task, stage: 18)[1]
    worse = make_run(tmp_path, "worse", tasks=TASKS, right=lambda task, stage: 8 if task == "PCAM" else 18)[1]
    found = compared(tmp_path, base, same, worse)
    assert found["baseline"] == "base"
    assert all(
        test["difference"] == 0 and test["p"] == 1 for test in by_task(found, "closed accuracy", "same").values()
    )
    tests = by_task(found, "closed accuracy", "worse")
    assert set(tests) == {"pathvqa", "PCAM", "overall"}  # nmi has no closed question
    assert tests["pathvqa"]["p_adjusted"] == 1
    # 10 of 20 answers are lost and none gained: the exact McNemar test gives 2/2^10
    lost = tests["PCAM"]
    assert (lost["baseline_score"], lost["score"], lost["difference"]) == (90, 40, -50)
    assert lost["p"] == pytest.approx(2 / 2**10, abs=2e-3)
    assert lost["p_adjusted"] == pytest.approx(4 * lost["p"])  # of four tests: two runs, two tasks
    assert lost["interval"][0] < -50 < lost["interval"][1] < -19
    assert 67 < lost["baseline_interval"][0] < 90 < lost["baseline_interval"][1] <= 100
    assert lost["score_interval"][0] < 40 < lost["score_interval"][1] < 70
    everything = tests["overall"]
    assert everything["score_interval"][0] < everything["score"] < everything["score_interval"][1]
    assert tests["overall"]["difference"] == pytest.approx(-25)
    assert tests["overall"]["p_adjusted"] == pytest.approx(2 * tests["overall"]["p"])  # of two runs
    assert lost["banks"] == {"base": "1–2", "worse": "1–2"}
    text = capsys.readouterr().out
    assert "prefix 1–2" in text and "Holm" in text and "-50.00 [" in text and "90.00 [" in text


def test_a_few_answers_that_differ_have_interval_count_and_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_run(tmp_path, "base", tasks=("PCAM", "CXP"), right=lambda task, stage: 14)[1]
    other = make_run(tmp_path, "other", tasks=("PCAM", "CXP"), right=lambda task, stage: 18)[1]
    tests = by_task(compared(tmp_path, base, other), "closed accuracy", "other")
    assert [test["changed"] for test in tests.values()] == [4, 4, 8]
    assert [test["change"]["mcnemar_p"] for test in tests.values()] == [0.125, 0.125, 2 / 2**8]
    low, high = tests["overall"]["interval"]
    assert tests["PCAM"]["interval"][0] < low and 0 < low < 20 < high
    assert tests["PCAM"]["change"]["most_lost"] == pytest.approx(100 * (1 - 0.05 ** (1 / 20)))
    text = capsys.readouterr().out
    assert "+20.00 [" in text and "4 of 20 differ (+4, -0)" in text and "19 degrees of freedom" in text


def test_tasks_are_read_as_themselves_and_as_a_sample(tmp_path: Path) -> None:
    tasks = ("pathvqa", "PCAM", "CXP", "HAM")
    base = make_run(tmp_path, "base", tasks=tasks, right=lambda task, stage: 10)[1]
    gains = dict(zip(tasks, (4, 2, 3, -1), strict=True))
    other = make_run(tmp_path, "other", tasks=tasks, right=lambda task, stage: 10 + gains[task])[1]
    overall = by_task(compare({"base": base, "other": other}).model_dump(), "closed accuracy", "other")["overall"]
    assert overall["difference"] == pytest.approx(10)
    between = overall["between_tasks"]
    assert (between["tasks"], between["wins"], between["losses"]) == (4, 3, 1)
    error = 5 * (14 / 3) ** 0.5 / 2  # differences of 20, 10, 15 and -5 points
    assert between["interval"] == pytest.approx((10 - 3.1824 * error, 10 + 3.1824 * error), abs=1e-3)
    assert between["p"] == pytest.approx(0.1612, abs=1e-3)  # t = 1.852 of 3 degrees of freedom
    assert between["sign_p"] == pytest.approx(2 * 5 / 16)
    far = make_run(tmp_path, "far", tasks=tasks, right=lambda task, stage: 12 if task == "HAM" else 20)[1]
    none = make_run(tmp_path, "none", tasks=tasks, right=lambda task, stage: 0)[1]
    overall = by_task(compare({"none": none, "far": far}).model_dump(), "closed accuracy", "far")["overall"]
    assert overall["between_tasks"]["interval"] == (
        pytest.approx(90 - 3.1824 * 10, abs=1e-3),
        100,
    )  # no score is 122 more


def only_answers(results: Path, folder: Path) -> Path:
    """A run's answer files alone, in the published layout."""
    for answers in results.glob("*/answer-file.jsonl"):
        (folder / answers.parent.name).mkdir(parents=True)
        shutil.copy(answers, folder / answers.parent.name)
    return folder


def numbers(tests: dict) -> dict:
    """Tests by task without the names of the banks; sums in another order differ in their last digits."""
    known = {task: {key: value for key, value in test.items() if key != "banks"} for task, test in tests.items()}
    return json.loads(json.dumps(known, sort_keys=True), parse_float=lambda text: round(float(text), 9))


def test_answer_files_alone_give_what_run_folders_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_run(tmp_path, "base", tasks=TASKS, stages="own")[1]
    other = make_run(tmp_path, "other", tasks=TASKS, stages="own", right=lambda task, stage: 15)[1]
    alone = [only_answers(run, tmp_path / "alone" / run.name) for run in (base, other)]
    runs, files, mixed = (
        compared(tmp_path, *pair, options=("--at", "own")) for pair in ((base, other), alone, (base, alone[1]))
    )
    assert {"exact choice", "closed accuracy", "exact match", "F1 of open answers", "ROUGE-L"} == set(runs["metrics"])
    for metric in runs["metrics"]:
        expected = numbers(by_task(runs, metric, "other"))
        assert numbers(by_task(files, metric, "other")) == numbers(by_task(mixed, metric, "other")) == expected
    assert files["runs"]["other"] == {"method": None, "banks_by": None}
    line = (alone[1] / "PCAM" / "answer-file.jsonl").read_text().replace('"gt": "yes"', '"gt": "no"', 1)
    (alone[1] / "PCAM" / "answer-file.jsonl").write_text(line)
    assert main(["compare", *map(str, alone)]) == 1
    assert "base and other were asked different questions of PCAM" in capsys.readouterr().err


def test_questions_of_one_image_flip_together(tmp_path: Path) -> None:
    """20 gains on 2 images are no 20 independent ones."""
    base = make_run(tmp_path, "base", tasks=("PCAM",), right=lambda task, stage: 0)[1]
    other = make_run(tmp_path, "other", tasks=("PCAM",), right=lambda task, stage: 20)[1]
    [alone, *_] = by_task(compare({"base": base, "other": other}).model_dump(), "closed accuracy", "other").values()
    assert alone["groups"] == 20 and alone["p"] < 0.001
    for folder in (base, other):
        rows = (folder / "PCAM" / "scores.csv").read_text().splitlines()
        grouped = [row.removesuffix(",") + f",image {number % 2}" for number, row in enumerate(rows[1:])]
        (folder / "PCAM" / "scores.csv").write_text("\n".join([rows[0], *grouped]) + "\n")
    [clustered, *_] = by_task(compare({"base": base, "other": other}).model_dump(), "closed accuracy", "other").values()
    assert clustered["groups"] == 2 and clustered["p"] > 0.4


def test_one_of_many_runs_can_come_out_significant(tmp_path: Path) -> None:
    """With 1,000 flips the least adjusted p of 80 tests would be 80 / 1001."""
    base = make_run(tmp_path, "base", tasks=("PCAM", "CXP"), right=lambda task, stage: 20)[1]
    worse = make_run(tmp_path, "worse", tasks=("PCAM", "CXP"), right=lambda task, stage: 2)[1]
    found = compare({"base": base, "worse": worse, **{f"same {number}": base for number in range(39)}}).model_dump()
    for test in by_task(found, "closed accuracy", "worse").values():  # exactly, 2/2^18 each
        assert test["p_adjusted"] < 0.05
    assert by_task(found, "closed accuracy", "same 7")["PCAM"]["p_adjusted"] == 1


def test_the_stage_is_chosen(tmp_path: Path) -> None:
    def forgets(task: str, stage: int) -> int:
        return 18 - 5 * (stage - 1 - TASKS.index(task))

    base = make_run(tmp_path, "base", tasks=TASKS, right=lambda task, stage: 18)[1]
    one = make_run(tmp_path, "one", "sequential", TASKS, right=forgets)[1]
    final = by_task(compared(tmp_path, base, one), "closed accuracy", "one")
    at_own_stage = by_task(compared(tmp_path, base, one, options=("--at", "own")), "closed accuracy", "one")
    assert {task: test["difference"] for task, test in final.items()} == {"pathvqa": -50, "PCAM": -25, "overall": -37.5}
    assert {test["difference"] for test in at_own_stage.values()} == {0}


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_run(tmp_path, "base", tasks=TASKS)[1]
    other = make_run(tmp_path, "other", tasks=TASKS)[1]
    own_results = make_run(tmp_path, "own", tasks=TASKS, stages="own")[1]
    assert main(["compare", str(base), str(own_results)]) == 1
    assert "own: pathvqa was not evaluated after the last stage" in capsys.readouterr().err
    summary = json.loads((other / "evaluation.json").read_text())
    for cell in summary["cells"]:
        cell["questions"] = "00" * 32
    (other / "evaluation.json").write_text(json.dumps(summary))
    assert main(["compare", str(base), str(other)]) == 1
    assert "base and other were asked different questions of pathvqa" in capsys.readouterr().err
    lines = (own_results / "PCAM" / "scores.csv").read_text().splitlines()
    (own_results / "PCAM" / "scores.csv").write_text("\n".join(lines[:-3]) + "\n")
    assert main(["compare", str(base), str(own_results), "--at", "own"]) == 1
    message = "base and own were asked the same questions of PCAM, but scores.csv has 20 of base and 17 of own"
    assert message in capsys.readouterr().err
    assert main(["compare", str(base), str(base)]) == 1
    assert "the same run was given twice" in capsys.readouterr().err
    assert main(["compare", str(base)]) == 1
    assert "at least two" in capsys.readouterr().err


def test_figures_of_classes_are_paired_and_clustered(tmp_path: Path) -> None:
    """Of 20 questions with the truth yes and 20 with no, the second model loses 6 of the first and 2 of the second."""
    for name, wrong in (("one", ()), ("two", (*range(6), 20, 21))):
        (tmp_path / name / "CXP").mkdir(parents=True)
        truths = ["yes" if number < 20 else "no" for number in range(40)]
        said = [{"yes": "no", "no": "yes"}[truth] if n in wrong else truth for n, truth in enumerate(truths)]
        lines = [
            {
                "question_id": number,
                "prompt": "Is it?",
                "text": said[number],
                "gt": truths[number],
                "answer_type": "CLOSED",
                "image": f"{number // 2}.png",
            }
            for number in range(40)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "CXP" / "answer-file.jsonl").write_text(text)
    found = compare({name: tmp_path / name for name in ("one", "two")}).model_dump()
    [sensitivity, _] = found["metrics"]["sensitivity"]
    assert (sensitivity["score"], sensitivity["difference"], sensitivity["changed"]) == pytest.approx((70, -30, 6))
    assert (sensitivity["questions"], sensitivity["groups"]) == (20, 10)
    [correlation, _] = found["metrics"]["Matthews' correlation"]
    assert correlation["score"] == pytest.approx(100 * (14 * 18 - 12) / (20 * 20 * 24 * 16) ** 0.5)
    assert correlation["changed"] is None and correlation["interval"][1] < 0 and correlation["p"] < 0.05
    assert {"specificity", "PPV", "NPV", "macro F1", "balanced accuracy"} < set(found["metrics"])
    assert "recall by class" not in found["metrics"] and "AUROC" not in found["metrics"]


def test_errors_of_counts_are_paired_where_both_answers_have_a_number(tmp_path: Path) -> None:
    """The second model is off by one more in every third of 30 questions, and gives no number to the last."""
    for name, more in (("one", 0), ("two", 1)):
        (tmp_path / name / "nuclei").mkdir(parents=True)
        lines = [
            {
                "question_id": number,
                "prompt": "How many nuclei are there?",
                "text": "none at all" if more and number == 29 else f"{number + 1 + more * (number % 3 == 0)} nuclei",
                "gt": str(number),
                "answer_type": "OPEN",
            }
            for number in range(30)
        ]
        (tmp_path / name / "nuclei" / "answer-file.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    comparison = compare({name: tmp_path / name for name in ("one", "two")})
    [error, overall] = comparison.model_dump()["metrics"]["mean absolute error"]
    assert (error["questions"], error["baseline_score"], error["difference"]) == pytest.approx((29, 1.0, 10 / 29))
    assert error["interval"][0] > 0 and error["p"] < 0.01 and error["changed"] is None
    assert (overall["between_tasks"]["wins"], overall["between_tasks"]["losses"]) == (0, 1)
    assert "mean absolute error, lower is better" in render_comparison(comparison)


def test_calibration_and_abstention_are_paired(tmp_path: Path) -> None:
    """Both models are wrong in the same ten of 60 questions; the second one is as sure of these as of the others."""
    for name, unsure in (("one", 0.6), ("two", 0.9)):
        folder = tmp_path / name / "CXP"
        folder.mkdir(parents=True)
        truths = ["yes" if number % 2 else "no" for number in range(60)]
        said = [{"yes": "no", "no": "yes"}[truth] if number < 10 else truth for number, truth in enumerate(truths)]
        lines = [
            {"question_id": number, "prompt": "Is it?", "text": text, "gt": truth, "answer_type": "CLOSED"}
            for number, (text, truth) in enumerate(zip(said, truths, strict=True))
        ]
        (folder / "answer-file.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        chances = [unsure if number < 10 else 0.9 for number in range(60)]
        rows = [
            AnswerProbability(
                candidates=(text, "no" if text == "yes" else "yes"),
                logprobs=(math.log(chance), math.log(1 - chance)),
                lengths=(1, 1),
            ).row(number)
            for number, (text, chance) in enumerate(zip(said, chances, strict=True))
        ]
        write_rows(folder / "probabilities.jsonl", rows)
    comparison = compare({name: tmp_path / name for name in ("one", "two")})
    found = comparison.model_dump()["metrics"]
    [error, overall] = found["calibration error"]
    # Bins of six: one with six wrong answers, one with four, at 0.6; or all at 0.9, of which ten are wrong.
    assert error["baseline_score"] == pytest.approx(100 * (6 * 0.6 + abs(2 - 4.2) + 48 * 0.1) / 60, abs=1e-6)
    assert (error["interval"], error["score_interval"], error["changed"]) == (None, None, None)
    assert (overall["between_tasks"]["wins"], overall["between_tasks"]["losses"]) == (0, 1)
    [area, _] = found["area under risk over coverage"]
    risks = [max(0, place - 50) / place for place in range(1, 61)]
    assert area["baseline_score"] == pytest.approx(100 * sum(risks) / 60)
    assert area["interval"][0] > 0 and area["p"] < 0.01 and area["score_interval"] is None
    assert found["accuracy of the surest 80%"][0]["difference"] == pytest.approx(100 * (38 / 48 - 1))
    text = render_comparison(comparison)
    assert "calibration error, %, lower is better" in text and "accuracy of the surest 80%, %" in text


def test_sets_of_labels_are_compared_label_by_label(tmp_path: Path) -> None:
    """In 60 questions, half with an effusion, the second model never names it."""
    for name, named in (("one", "mass, effusion"), ("two", "mass")):
        (tmp_path / name / "chest").mkdir(parents=True)
        lines = [
            {
                "question_id": number,
                "prompt": "Which findings are there?",
                "text": named if number % 2 else "mass",
                "gt": "effusion, mass" if number % 2 else "mass",
                "answer_type": "OPEN",
            }
            for number in range(60)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "chest" / "answer-file.jsonl").write_text(text)
    found = compare({name: tmp_path / name for name in ("one", "two")}).model_dump()["metrics"]
    by_label = {test["task"]: test for test in found["sensitivity by label"]}
    effusion = by_label["chest: effusion"]
    assert (effusion["questions"], effusion["score"], effusion["changed"]) == (30, 0, 30)
    assert effusion["p_adjusted"] < 0.01 and by_label["chest: mass"]["difference"] == 0
    assert {test["task"] for test in found["specificity by label"]} == {"chest: effusion", "overall"}
    assert found["exact label set"][0]["score"] == 50
