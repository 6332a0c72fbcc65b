import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mslora_cr.banks.bank import BankError
from mslora_cr.banks.similarity import Similarity, bank_similarity
from mslora_cr.data.records import DataError
from mslora_cr.evaluation.console import score_table
from mslora_cr.evaluation.results import ReportError, read_evaluation
from mslora_cr.evaluation.score import AnswerRecord
from mslora_cr.metrics.published import score_answers
from mslora_cr.reporting.comparison import write_comparison
from mslora_cr.reporting.heatmaps import similarity_map
from mslora_cr.reporting.plots import logged_terms, loss_curves
from mslora_cr.reporting.render import chance, render
from mslora_cr.reporting.report import _context, pick_examples, write_report
from mslora_cr.reporting.run_record import load_published_scores, read_log, read_run
from mslora_cr.statistics.intervals import difference_interval, estimate, independent, percent
from mslora_cr.utils.state import StateError
from tests.helpers.report_run import CLOSED_ONLY, MODALITIES, OPEN_ONLY, Page, answer_lines, make_run


def test_report_of_a_whole_run(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "demo", published=True)
    path = write_report(run_dir, results_dir)
    assert path == results_dir / "report.html"
    page = Page(path)
    # closed accuracy of the six tasks that have closed questions: 18, 17, 16, 18, 17, 16 of 20
    assert re.search(r"Final average exact choice 85.0 % 7\d.\d to 9\d.\d; mean of 6 tasks, after the last", page.text)
    assert "the interval of 95 % over other questions" in page.text
    assert "Backward transfer 0.0 points zero by construction" in page.text
    assert "Forgetting is zero by construction here" in page.text
    assert "91.54" in page.text  # published
    assert "finetune_lora_MSLoRA-CR-ORTHO-64-64_llava_med_v1.5" in page.text
    assert "Not in this report" not in page.text
    for heading in (
        "Scores",
        "Task × stage",
        "Training losses",
        "Similarity between banks",
        "What made this run",
    ):
        assert heading in page.text
    for term in ("Cross-entropy", "Contrastive term", "Orthogonality term", "α = 0.1", "β = 0.01"):
        assert term in page.text
    assert "0123456789abcdef" in page.text
    assert "git · dirty True" in page.text
    assert "hardware · gpus none" in page.text


def test_pages_stand_alone_and_escape_what_they_show(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "demo")
    page = Page(write_report(run_dir, results_dir))
    comparison = Page(write_comparison([("a", run_dir, results_dir)], tmp_path / "index.html"))
    assert page.loads == comparison.loads == []
    assert "<script>alert(1)</script>" in page.text  # as text: the parser saw no such tag
    assert page.data["tasks"][0]["rows"][0][0] == "What about <b>pathvqa</b> | no 0?"
    assert "<b>" not in (results_dir / "report.html").read_text(encoding="utf-8")


def test_markdown_has_the_same_figures(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "demo", published=True)
    write_report(run_dir, results_dir)
    text = (results_dir / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\*\*Final average exact choice: 85.00 %\*\* \[7\d.\d to 9\d.\d\] over 6 tasks", text)
    assert "zero by construction" in text
    assert re.search(r"\| pathvqa \| pathology \| 6761 \| 1 (\| 90.00 \[[\d.]+ to 9[\d.]+\] ){2}\| 91.54 \|", text)
    assert re.search(r"\| slake-vqarad \| radiology \| 1512 \| 1–2 \| 85.00 \[", text)
    assert "\\<b\\>pathvqa\\</b\\> \\| no" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) == 18, "twelve and one of classes for each of six tasks"
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_markdown_shows_everything_as_text(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "demo", tasks=("derm",), stages="own")
    hostile = "<img src=x>\n# `head` [a](b)"
    for name in ("ledger.json", "evaluation.json"):
        path = run_dir / name if name == "ledger.json" else results_dir / name
        content = json.loads(path.read_text())
        content["method"] = hostile
        path.write_text(json.dumps(content))
    (run_dir / "logs" / "derm.jsonl").rename(run_dir / "logs" / "other.jsonl")
    (run_dir / "config.yaml").write_text("run: x\nnote: |\n````\n# out\n")
    context = _context(read_run(run_dir, results_dir), {})
    context |= {"browser": None, "confusions": [], "missing": [hostile], "leaks": {"derm": hostile}, "shown_tasks": []}
    context["doubts"] = {"derm": [hostile]}
    render("report.md", tmp_path / "report.md", context)
    text = (tmp_path / "report.md").read_text()
    assert "- \\<img src=x\\> \\# \\`head\\` \\[a\\](b)\n" in text
    assert "- **derm**: \\<img src=x\\> \\# \\`head\\` \\[a\\](b)\n" in text
    assert "- derm: \\<img src=x\\> \\# \\`head\\` \\[a\\](b)\n" in text
    assert "Method `<img src=x> # 'head' [a](b)`, a stream" in text
    assert "`````yaml\nrun: x\nnote: |\n````\n# out\n`````\n" in text
    assert not re.search(r"^# out|^# \W", text.partition("`````yaml")[0], re.MULTILINE)


def test_forgetting_of_a_sequential_run(tmp_path):
    # 18 of 20 right at its own stage, four fewer at each later one
    def right(task, stage):
        return 18 - 4 * (stage - 1 - list(MODALITIES).index(task))

    tasks = ("pathvqa", "slake-vqarad", "derm")
    run_dir, results_dir = make_run(tmp_path, "seq", "sequential", tasks, right=right)
    page = Page(write_report(run_dir, results_dir))
    table = score_table(read_evaluation(results_dir), results_dir)
    transfer = "backward transfer -30.0 [-46.6 to -12.7; 12 of 40 changed"
    assert f"closed, letters found: own stage 90.0, final average 70.0, forgetting 30.0, {transfer}" in table
    assert f"Final average exact choice {(50 + 70 + 90) / 3:.1f} %" in page.text
    assert re.search(r"Backward transfer -30.0 points -46.6 to -12.7; .* Forgetting 30.0, no interval", page.text)
    assert "by construction" not in page.text
    assert "pathvqa 90.0 1 70.0 2 50.0 3 -40.0 8 of 20 changed (+0, -8)" in page.text  # the bank, the change
    assert any(re.fullmatch(r"95 %: \d+.\d to \d+.\d", tip) for tip in page.tips)
    assert "derm 90.0" in page.text and "3 – Average over tasks" in page.text  # nothing came after it


def test_a_change_of_few_answers_has_interval_count_bound_and_test(tmp_path):
    def right(task, stage):
        return 18 if stage == 1 + ("pathvqa", "derm").index(task) else 16

    run_dir, results_dir = make_run(tmp_path, "seq", "sequential", ("pathvqa", "derm"), right=right)
    path = write_report(run_dir, results_dir)
    page, markdown = Page(path), path.with_suffix(".md").read_text(encoding="utf-8")
    ends, note = "-32.5 to 10.6", "2 of 20 changed (+0, -2), at most 28.3 % lost, McNemar p 0.500"
    precision = "19 degrees of freedom, largest cluster 5.0 %"
    assert f"Backward transfer -10.0 points {ends}; {note}; change of earlier tasks" in page.text
    assert f"pathvqa 90.0 1 80.0 2 -10.0 {note} derm" in page.text
    assert f"Published closed accuracy 2 90.00 85.00 87.50 10.00 -10.00 {note}" in page.text
    assert f'data-changed="{note}"' in path.read_text(encoding="utf-8")  # for the table's CSV
    assert f"**Backward transfer: -10.00 points** [{ends}; {note}; {precision}]; forgetting 10.00 points" in markdown
    assert re.search(r"\| pathvqa \| 90.0 .* \| -10.0 " + re.escape(f"[{ends}; {note}] |"), markdown)
    table = score_table(read_evaluation(results_dir), results_dir)
    assert f"forgetting 10.0, backward transfer -10.0 [{ends}; {note}; {precision}]" in table
    both = [("a", run_dir, results_dir), ("b", None, results_dir)]
    page = Page(write_comparison(both, tmp_path / "index.html"))
    assert page.text.count(f"pathvqa 90.0 1 80.0 2 -10.0 {note} derm") == 4  # both closed accuracies of


def test_no_p_value_is_zero():
    assert [chance(p) for p in (None, 1e-9, 0.0005, 0.34)] == ["–", "< 0.001", "0.001", "0.340"]


def test_intervals_of_figures_are_paired_by_question(tmp_path):
    """Each stage loses five answers of a task: the loss is as uncertain as their number, no more."""

    def right(task, stage):
        return 18 - 5 * (stage - 1 - list(MODALITIES).index(task))

    _, results_dir = make_run(tmp_path, "seq", "sequential", ("pathvqa", "slake-vqarad"), right=right)
    evaluation = read_evaluation(results_dir)
    intervals = evaluation.matrix_intervals(results_dir, "close accuracy")
    found = intervals.figures
    matrix = evaluation.matrix("close accuracy")
    assert set(found) == {name for name, value in matrix.summary().items() if value is not None} - {"forgetting"}
    # 5 of 20 questions change. Were the stages taken apart, a difference of 90 and 65 % would have 27 points either way.
    low, high = found["backward_transfer"].ends
    assert low < matrix.backward_transfer() == -25 < high
    lost = np.array([-1.0] * 5 + [0.0] * 15)
    assert (low, high) == pytest.approx(percent(difference_interval(estimate(lost, independent(20)), binary=True)))
    assert high - low < 2 * 2.093 * 100 * math.sqrt((0.9 * 0.1 + 0.65 * 0.35) / 19)
    assert intervals.transfer["pathvqa"].ends == (low, high)
    assert intervals.transfer["pathvqa"].changed.startswith("5 of 20 changed (+0, -5)")
    assert list(intervals.stages) == [1, 2]
    assert intervals.stages[2] == found["final_average"].ends


def test_scores_of_other_questions_at_another_stage_are_named(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "seq", "sequential", ("pathvqa", "slake-vqarad"))
    scores = results_dir / "pathvqa" / "stage-2" / "scores.csv"
    scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"pathvqa has scores of different questions \(20 at stage 1, 19 at stage 2\)"):
        write_report(run_dir, results_dir)


def test_own_stages_alone_give_no_forgetting(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "own", stages="own")
    page = Page(write_report(run_dir, results_dir))
    assert re.search(r"Average exact choice 85.0 % .*; mean of 6 tasks, each at its own stage", page.text)
    assert "Backward transfer – needs the scores of all later stages (--stages seen)" in page.text
    assert "by construction" not in page.text


def test_published_run_fits_the_method_and_the_tasks(tmp_path):
    six = tuple(task for task in MODALITIES if task not in ("derm", "HAM"))
    for name, method, tasks, expected, whose in (
        ("a", "each", tuple(MODALITIES), "finetune_lora_each-64-64", "each"),
        ("b", "mslora_cr", six, "MSLoRA-CR-ORTHO_6TASK", "mslora_cr"),
        ("c", "sequential", tuple(MODALITIES), "MSLoRA-CR-ORTHO-64-64", "mslora_cr"),
    ):
        run_dir, results_dir = make_run(tmp_path, name, method, tasks, stages="own", published=True)
        page = Page(write_report(run_dir, results_dir))
        text = (results_dir / "report.md").read_text(encoding="utf-8")
        assert expected in page.text and expected in text
        assert page.text.count(f"published {whose}") == 3
        assert f"| *published {whose} *|".replace(" *|", "* |").replace("_", "\\_") in text
        assert ("for sequential none are published" in page.text) == (method == "sequential")


def test_published_scores_are_percentages_of_the_known_tasks():
    runs = load_published_scores()
    assert {kind: len(run.scores) for kind, run in runs.items()} == {
        "each": 8,
        "mslora_cr_ortho": 8,
        "mslora_cr_ortho_6task": 6,
    }
    for run in runs.values():
        assert set(run.scores) <= set(MODALITIES)
        for task, scores in run.scores.items():
            assert set(scores) == {"exact"} | ({"f1"} - ({"f1"} if task in CLOSED_ONLY else set())) | (
                set() if task in OPEN_ONLY else {"closed"}
            )
            assert all(0 < score < 100 for score in scores.values())


def test_missing_parts_are_named(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "part", tasks=("pathvqa", "derm", "nmi"))
    (run_dir / "logs" / "derm.jsonl").unlink()
    (run_dir / "banks" / "nmi" / "adapter_model.safetensors").unlink()
    (results_dir / "pathvqa" / "answer-file.jsonl").unlink()
    page = Page(write_report(run_dir, results_dir))
    assert "no training log of derm" in page.text
    assert "no bank of nmi" in page.text
    assert "no answers at the own stage of pathvqa" in page.text

    (results_dir / "evaluation.json").unlink()
    page = Page(write_report(run_dir, results_dir))
    assert "the run is not evaluated yet" in page.text
    assert "Task × stage" not in page.text
    assert "Training losses" in page.text

    run_dir, results_dir = make_run(tmp_path, "bare", tasks=("pathvqa", "derm"))
    page = Page(write_report(tmp_path / "nowhere", results_dir))
    assert "no ledger.json in the run folder" in page.text
    assert "Training losses" not in page.text


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ReportError, match=r"no .*ledger\.json and no .*evaluation\.json; train the run first"):
        write_report(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ReportError, match=r"no .*evaluation\.json; evaluate that run first"):
        write_comparison([("a", tmp_path / "a", tmp_path / "b")], tmp_path / "index.html")


def test_malformed_files_are_named(tmp_path):
    run_dir, results_dir = make_run(tmp_path, "bad", tasks=("pathvqa",))
    ledger = json.loads((run_dir / "ledger.json").read_text())
    del ledger["tasks"]["pathvqa"]["seconds"]
    (run_dir / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(StateError, match=r"ledger\.json: field 'tasks\.pathvqa\.seconds' is missing"):
        read_run(run_dir, results_dir)
    (run_dir / "ledger.json").write_text("{")
    with pytest.raises(StateError, match=r"ledger\.json is damaged: not valid JSON"):
        read_run(run_dir, results_dir)


def test_comparison_of_two_runs(tmp_path):
    tasks = ("pathvqa", "slake-vqarad", "derm")
    ours = make_run(tmp_path, "ours", tasks=tasks)
    forgetful = make_run(
        tmp_path,
        "seq",
        "sequential",
        tasks,
        right=lambda task, stage: 18 - 5 * (stage - 1 - tasks.index(task)),
    )
    output = tmp_path / "results" / "index.html"
    path = write_comparison([("MSLoRA-CR", *ours), ("one LoRA", *forgetful)], output)
    page = Page(path)
    assert "Each task after the last stage" in page.text
    assert "MSLoRA-CR: exact choice 85.0 % final average; forgetting 0.0 points, zero by construction." in page.text
    assert "one LoRA: exact choice 65.0 % final average" in page.text
    assert "forgetting 37.5 points." in page.text
    assert page.links == []  # there is no report yet
    (ours[1] / "report.html").touch()
    assert set(Page(write_comparison([("MSLoRA-CR", *ours), ("one LoRA", *forgetful)], output)).links) == {
        "ours/report.html"
    }
    assert "Average over the tasks learned so far" in page.text
    assert path.read_text(encoding="utf-8").count("FillBetweenPolyCollection") == 8  # a band for each line
    for title in ("Exact choice", "Published closed accuracy", "F1 of open answers", "Exact match"):
        assert f"{title} Run Method" in page.text


def test_validation_is_drawn_below_the_losses():
    logs = {"a": [{"step": 1, "ce": 2.0}, {"step": 2, "ce": 1.0, "eval_loss": 1.5, "eval_close accuracy": 50.0}]}
    assert logged_terms(logs) == ["ce"]
    drawn = loss_curves(logs, {"a": "#123456"})
    titles = ["Cross-entropy", "Validation: cross-entropy", "Validation: closed accuracy (%)"]
    assert [title for title in titles if f">{title}<" in drawn] == titles
    assert drawn.index(titles[0]) < drawn.index(titles[1]) < drawn.index(titles[2])
    assert "Validation: F1" not in drawn


def test_log_of_a_resumed_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "ce": 1}\n{"step": 4, "ce": 2}\n{"step": 2, "ce": 3}\n{"step": 6, "c')
    assert read_log(path) == [{"step": 2, "ce": 3}, {"step": 4, "ce": 2}]
    path.write_text('{"step": 2, "ce": 1}\n{"step": 2, "eval_loss": 3}\n')
    assert read_log(path) == [{"step": 2, "ce": 1, "eval_loss": 3}]
    path.write_text('{"step": 2}\n{"ste\n{"step": 4}\n')
    with pytest.raises(ReportError, match=r"log\.jsonl: line 2: expected a JSON object with a 'step'"):
        read_log(path)


def test_similarity_by_hand(tmp_path):
    # distances: A 5 (a 3-4-5 triangle), B 0; so s = (exp(-5) + 1) / 2
    banks = {
        "a": {"x.lora_A.weight": torch.zeros(1, 2), "x.lora_B.weight": torch.ones(2, 1)},
        "b": {"x.lora_A.weight": torch.tensor([[3.0, 4.0]]), "x.lora_B.weight": torch.ones(2, 1)},
    }
    paths = {}
    for name, tensors in banks.items():
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    similarity = bank_similarity(paths)
    assert similarity.values[1][0] == similarity.values[0][1] == pytest.approx((math.exp(-5) + 1) / 2)
    assert similarity.values[0][0] == 1

    save_file({"x.lora_A.weight": torch.zeros(1, 2)}, paths["b"])
    with pytest.raises(BankError, match=r"b\.safetensors does not contain matrices of the same names"):
        bank_similarity(paths)
    paths["b"].write_bytes(b"nonsense")
    with pytest.raises(BankError, match="cannot be read"):
        bank_similarity(paths)


def test_similarity_is_tinted_over_the_range_it_spans():
    similarity = Similarity(("a", "b", "c"), [[1, 0.2, 0.6], [0.2, 1, 0.4], [0.6, 0.4, 1]])
    rows = similarity_map(similarity).rows
    assert [(cell.text, cell.tint) for cell in rows["b"]] == [("0.200", 0.15), ("", None)]
    assert [(cell.text, cell.tint) for cell in rows["c"]] == [("0.600", 1.0), ("0.400", pytest.approx(0.575))]


def test_similarity_meets_the_golden_values(tmp_path):
    golden = Path(__file__).parents[1] / "golden" / "tiny_a"
    training = json.loads((golden / "training.json").read_text())
    folders = [
        "pathvqa",
        "pathvqa_slake-vqarad",
        "pathvqa_slake-vqarad_derm",
        "pathvqa_slake-vqarad_derm_PCAM",
    ]
    paths = {}
    for number, folder in enumerate(folders):
        state = torch.load(golden / "checkpoints" / folder / "cl_lora.bin", weights_only=True)
        matrices = {
            key.replace(f"task_{number}_lora.", ""): value
            for key, value in state.items()
            if f"task_{number}_lora" in key
        }
        paths[folder] = tmp_path / f"{number}.safetensors"
        save_file(matrices, paths[folder])
    values = bank_similarity(paths).values
    for number, task in enumerate(training["tasks"]):
        assert values[number][:number] == pytest.approx(task["end_sim_to_previous"], rel=1e-5)


def test_examples_are_right_and_wrong_and_repeatable():
    answers = [AnswerRecord.model_validate(line) for line in answer_lines("pathvqa", right=15)]
    examples = pick_examples(answers)
    assert [example.hit for example in examples] == [True, True, False, False]
    assert pick_examples(answers) == examples
    by_question = {(answer.prompt, answer.gt): answer for answer in answers}
    assert all(score_answers([by_question[one.question, one.truth]]).rows[0].hit is one.hit for one in examples)
    assert [example.hit for example in pick_examples(answers[:15])] == [True, True]
    assert pick_examples([]) == []
