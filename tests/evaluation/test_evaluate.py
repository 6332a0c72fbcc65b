import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mslora_cr.banks.io import load_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.records import TestRecords
from mslora_cr.data.tasks import task_folder
from mslora_cr.evaluation import answer_files
from mslora_cr.evaluation import evaluate as evaluate_module
from mslora_cr.evaluation import session as session_module
from mslora_cr.evaluation.answer_files import Origin
from mslora_cr.evaluation.cells import cells
from mslora_cr.evaluation.evaluate import evaluate
from mslora_cr.generation.prefix_decoder import Decoder
from mslora_cr.runs.ledger import finished_banks
from tests.helpers.killing import KillPoint, run_until_killed

TASKS = ["pathvqa", "slake-vqarad", "PCAM"]
QUESTIONS = {"pathvqa": 8, "slake-vqarad": 8, "PCAM": 4}


def test_after_a_swap_that_failed_half_way_an_evaluation_folds_anew(
    trained_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(trained_config)
    task, known = config.task("PCAM"), finished_banks(config)
    records = {"PCAM": TestRecords(task_folder(config, task) / "test.jsonl")}
    session = session_module.EvaluationSession(config, list(known.values()), records, switches=True)

    def weights(name: str) -> list[torch.Tensor]:
        session.answer_merged(task, [known["pathvqa"]], tmp_path / name, Origin(name))
        return [weight.clone() for weight in session.base.model.state_dict().values()]

    before, sums = weights("before"), []
    add_product = torch.Tensor.addmm_

    def failing(total: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        sums.append(total)
        if len(sums) == 3:
            raise torch.OutOfMemoryError("no memory is left")
        return add_product(total, *factors)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "addmm_", failing)
        session.answer_merged(task, list(known.values()), tmp_path / "failed", Origin("failed"))
    assert all(map(torch.equal, before, weights("after")))


class Results:
    """A results folder of its own for the shared trained run, and what was asked."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.run = folder / "tiny"

    def command(self, *arguments: str) -> list[str]:
        return ["evaluate", str(self.config), f"results_dir={self.folder}", *arguments]

    def evaluate(self, *arguments: str) -> dict[str, Any]:
        assert main(self.command(*arguments)) == 0
        return json.loads((self.run / "evaluation.json").read_text())

    def answers(self) -> dict[str, bytes]:
        return {str(file.relative_to(self.run)): file.read_bytes() for file in self.run.rglob("answer-file.jsonl")}


@pytest.fixture
def results(trained_config: Path, tmp_path: Path) -> Results:
    return Results(trained_config, tmp_path / "results")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions each call of the decoder answers."""
    counts: list[int] = []
    answer = Decoder.answer

    def counted(decoder: Any, openings: Any, questions: Any, waiting: int = 1) -> Any:
        counts.append(len(questions))
        return answer(decoder, openings, questions, waiting)

    monkeypatch.setattr(Decoder, "answer", counted)
    return counts


# --- what is answered ----------------------------------------------------------------------------------------------


def test_the_diagonal(results: Results) -> None:
    summary = results.evaluate()
    assert [(cell["task"], cell["stage"], cell["banks"]) for cell in summary["cells"]] == [
        ("pathvqa", 1, TASKS[:1]),
        ("slake-vqarad", 2, TASKS[:2]),
        ("PCAM", 3, TASKS[:3]),
    ]
    config = load_config(results.config)
    for cell in summary["cells"]:
        rows = [json.loads(line) for line in (results.run / cell["answers"]).read_text().splitlines()]
        folder = Path(config.data.root) / config.task(cell["task"]).folder
        questions = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
        assert cell["rows"] == len(rows) == len(questions) == QUESTIONS[cell["task"]]
        for row, question in zip(rows, questions, strict=True):
            assert list(row) == [
                "question_id",
                "prompt",
                "text",
                "gt",
                "answer_type",
                "answer_id",
                "model_id",
                "metadata",
            ]
            assert [row[key] for key in ("question_id", "prompt", "gt", "answer_type")] == [
                question[key] for key in ("question_id", "text", "gt", "answer_type")
            ]
            assert row["model_id"] == "llava_med_tiny"
        assert len({row["answer_id"] for row in rows}) == len(rows)
        assert (results.run / cell["task"] / "metrics.txt").is_file()
        stored = json.loads((results.run / cell["task"] / "metrics.json").read_text())
        assert cell["metrics"] == stored["metrics"]


def test_batched_answers_are_those_given_one_by_one(results: Results, asked: list[int], tmp_path: Path) -> None:
    results.evaluate("evaluation.batch_size=5", "evaluation.max_new_tokens=8")
    assert sorted(asked) == [3, 3, 4, 5, 5]
    one_by_one = Results(results.config, tmp_path / "single")
    asked.clear()
    one_by_one.evaluate("evaluation.batch_size=1", "evaluation.max_new_tokens=8")
    assert asked == [1] * 20
    assert one_by_one.answers() == results.answers()
    texts = {json.loads(line)["text"] for data in results.answers().values() for line in data.splitlines()}
    assert len(texts) > 5  # not one answer for all


def test_questions_of_very_different_length_are_answered_as_one_by_one(
    results: Results, own_data: Path, tmp_path: Path
) -> None:
    """Mostly padding, and answers that end early beside others that do not. In float32: docs/explanation/answering.md."""
    file = own_data / "PathVQA" / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] = " ".join([row["text"]] * (1 + 3 * number))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (f"data.root={own_data}", "--task", "pathvqa", "evaluation.max_new_tokens=16")
    [cell] = results.evaluate("evaluation.batch_size=8", *options)["cells"]
    assert cell["padding"] > 0.25
    one_by_one = Results(results.config, tmp_path / "single")
    one_by_one.evaluate("evaluation.batch_size=1", *options)
    assert one_by_one.answers() == results.answers()


def test_the_whole_matrix(results: Results, asked: list[int]) -> None:
    summary = results.evaluate("--stages", "all")
    banks = {(cell["task"], cell["stage"]): cell["banks"] for cell in summary["cells"]}
    assert summary["stages"] == [0, 1, 2, 3]
    # As published, task i is answered with banks 1..i from its own stage on, and with those there are before; at stage
    # 0 the base model answers alone.
    assert banks == {
        (task, stage): TASKS[: min(number, stage)] for number, task in enumerate(TASKS, 1) for stage in (0, 1, 2, 3)
    }
    places = {(cell["task"], cell["stage"]): cell["answers"] for cell in summary["cells"]}
    assert places["pathvqa", 1] == places["pathvqa", 3] == "pathvqa/answer-file.jsonl"
    assert places["PCAM", 1] == "PCAM/stage-1/answer-file.jsonl"
    # 2 ways to answer the first task, 3 for the second, 4 for the third.
    assert sum(asked) == 2 * 8 + 3 * 8 + 4 * 4


def test_switching_the_stage_loads_nothing_again(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    loads, bank_counts = [], []
    load, set_frozen = session_module.load_base, BankStack.set_frozen
    monkeypatch.setattr(session_module, "load_base", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr(BankStack, "set_frozen", lambda *args: bank_counts.append(len(args[1])) or set_frozen(*args))
    results.evaluate("--stages", "all", "evaluation.banks_by=all")
    assert len(loads) == 1
    assert bank_counts == [0, 1, 2, 3]


def test_answers_of_several_stages_are_scored_once(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    score = evaluate_module.score_file
    monkeypatch.setattr(
        evaluate_module, "score_file", lambda *args, **options: scored.append(args[1]) or score(*args, **options)
    )
    summary = results.evaluate("--stages", "all")
    assert len(summary["cells"]) == 12
    assert len(scored) == len(set(scored)) == 2 + 3 + 4


def test_seconds_are_those_of_answering(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of loading the model, which the first cell waits for."""
    clock = SimpleNamespace(now=0.0)
    load, answer = session_module.load_base, Decoder.answer

    def slowly(seconds: float, call: Any) -> Any:
        def wrapped(*args: Any) -> Any:
            clock.now += seconds
            return call(*args)

        return wrapped

    monkeypatch.setattr(answer_files, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(session_module, "load_base", slowly(100, load))
    monkeypatch.setattr(Decoder, "answer", slowly(1, answer))
    assert [cell["seconds"] for cell in results.evaluate("evaluation.batch_size=4")["cells"]] == [2, 2, 1]


def test_the_share_of_padding_stands_in_the_record(results: Results) -> None:
    cells = {cell["task"]: cell for cell in results.evaluate("evaluation.batch_size=2")["cells"]}
    assert all(0 <= cell[name] < 1 for cell in cells.values() for name in ("padding", "padding_unsorted"))
    assert cells["slake-vqarad"]["padding_unsorted"] > 0
    [cell] = results.evaluate("evaluation.batch_size=1", "--task", "PCAM", "evaluation.max_new_tokens=3")["cells"]
    assert cell["padding"] == cell["padding_unsorted"] == 0


def test_cached_features_give_the_same_answers(results: Results, tmp_path: Path) -> None:
    results.evaluate()
    cached = Results(results.config, tmp_path / "with cache")
    cached.evaluate(f"data.cache_image_features={tmp_path / 'features'}")
    assert cached.answers() == results.answers()
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) > 0


def test_all_banks_at_every_stage(results: Results, asked: list[int]) -> None:
    summary = results.evaluate("--stages", "seen", "evaluation.banks_by=all")
    banks = {(cell["task"], cell["stage"]): cell["banks"] for cell in summary["cells"]}
    assert banks == {(task, stage): TASKS[:stage] for number, task in enumerate(TASKS, 1) for stage in range(number, 4)}
    assert sum(asked) == 3 * 8 + 2 * 8 + 1 * 4
    published, later = (results.run / "pathvqa" / part / "answer-file.jsonl" for part in ("", "stage-3"))
    assert published.read_text() != later.read_text()


def test_one_task(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    assert [cell["task"] for cell in results.evaluate("--task", "PCAM")["cells"]] == ["PCAM"]
    # Another call adds its cells.
    assert [cell["task"] for cell in results.evaluate("--task", "pathvqa")["cells"]] == ["pathvqa", "PCAM"]
    assert main(results.command("--task", "PACM")) == 1
    assert "did you mean 'PCAM'?" in capsys.readouterr().err


def cell_table(config: StreamConfig, stages: Any, learned: list[int]) -> dict[tuple[int, int], tuple[int, ...]]:
    return {(cell.task.index + 1, cell.stage): cell.banks for cell in cells(config, stages, learned)}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("mslora_cr", {(1, 1): (1,), (1, 2): (1,), (2, 1): (1,), (2, 2): (1, 2), (3, 1): (1,), (3, 2): (1, 2)}),
        ("each", {(1, 1): (1,), (1, 2): (1,), (2, 1): (), (2, 2): (2,), (3, 1): (), (3, 2): ()}),
        ("sequential", {(task, stage): (stage,) for task in (1, 2, 3) for stage in (1, 2)}),
    ],
)
def test_cells_of_each_method(method: str, expected: Any, trained_config: Path) -> None:
    """With two of three tasks learned."""
    config = load_config(trained_config, [f"method={method}"])
    zero_shot = {(task, 0): () for task in (1, 2, 3)}
    assert cell_table(config, "all", [1, 2]) == expected | zero_shot
    assert cell_table(config, "own", [1, 2]) == {key: expected[key] for key in ((1, 1), (2, 2))}
    assert cell_table(config, "seen", [1, 2]) == {key: expected[key] for key in ((1, 1), (1, 2), (2, 2))}


def test_each_answers_with_one_bank_though_an_earlier_one_is_missing(trained_config: Path) -> None:
    config = load_config(trained_config, ["method=each"])
    assert cell_table(config, "own", [1, 3]) == {(1, 1): (1,), (3, 3): (3,)}
    config = load_config(trained_config)
    assert cell_table(config, "own", [1, 3]) == {(1, 1): (1,)}


# --- published banks -------------------------------------------------------------------------------------------------


def test_exported_banks_answer_as_the_run_does(results: Results, tmp_path: Path) -> None:
    results.evaluate()
    assert main(["bank", "export", str(results.config), "--output", str(tmp_path / "published")]) == 0
    other = Results(results.config, tmp_path / "others")
    other.evaluate("--banks", str(tmp_path / "published"))
    assert other.answers() == results.answers()


# --- killed and started again --------------------------------------------------------------------------------------

ANSWER = "mslora_cr.generation.prefix_decoder:Decoder.answer"
POINTS = {
    "before the first answer": KillPoint(ANSWER, call=1),
    "after the first batch": KillPoint(ANSWER, call=2),
    "a batch answered, but not yet noted": KillPoint(ANSWER, call=2, after=True),
    "all answered, the file not yet written": KillPoint("mslora_cr.evaluation.answer_files:publish"),
    "the file written, not yet taken note of": KillPoint("mslora_cr.evaluation.answer_files:publish", after=True),
    "before the second task": KillPoint("mslora_cr.evaluation.evaluate:score_file", after=True),
    "before the summary": KillPoint("mslora_cr.evaluation.evaluate:write_summary"),
}


def noted(run: Path) -> int:
    """Answers that a killed run has on disk."""
    journals = sum(file.read_bytes().count(b"\n") for file in run.rglob(".answers-*.jsonl"))
    finished = [file for file in run.rglob("answer-file.jsonl") if not list(file.parent.glob(".answers-*"))]
    return journals + sum(file.read_bytes().count(b"\n") for file in finished)


@pytest.fixture(scope="module")
def whole(trained_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """An evaluation without a break."""
    done = Results(trained_config, tmp_path_factory.mktemp("whole"))
    done.evaluate()
    return done


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_a_killed_evaluation_asks_no_question_twice_and_loses_none(
    point: KillPoint, results: Results, whole: Results, asked: list[int], tmp_path: Path
) -> None:
    run_until_killed(results.command(), point, tmp_path / "output")
    before = noted(results.run)
    results.evaluate()
    assert sum(asked) == 20 - before
    assert results.answers() == whole.answers()
    assert not list(results.run.rglob(".answers-*"))


@pytest.mark.parametrize("cut", [1, 12])
def test_a_line_that_was_cut_short_is_asked_again(
    cut: int, results: Results, whole: Results, asked: list[int], tmp_path: Path
) -> None:
    run_until_killed(results.command(), KillPoint(ANSWER, call=2), tmp_path / "output")
    [journal] = results.run.rglob(".answers-*.jsonl")
    journal.write_bytes(journal.read_bytes()[:-cut])
    results.evaluate()
    assert sum(asked) == 20 - 3
    assert results.answers() == whole.answers()


def test_what_was_answered_is_not_asked_again(results: Results, asked: list[int]) -> None:
    first = results.evaluate()
    asked.clear()
    again = results.evaluate()
    assert asked == []
    assert again["cells"] == first["cells"]


def test_what_decides_the_answers_asks_again(results: Results, asked: list[int]) -> None:
    results.evaluate("--stages", "all")
    asked.clear()
    summary = results.evaluate("evaluation.max_new_tokens=3")
    assert sum(asked) == 20
    # Cells that the first call scored with the old limit are not kept beside the new ones.
    assert {(cell["task"], cell["stage"]) for cell in summary["cells"]} >= {("pathvqa", 1), ("PCAM", 3)}
    for cell in summary["cells"]:
        texts = [json.loads(line)["text"] for line in (results.run / cell["answers"]).read_text().splitlines()]
        assert len(texts) == cell["rows"]
    fingerprints = {(cell["task"], cell["stage"]): cell["fingerprint"] for cell in summary["cells"]}
    assert fingerprints["pathvqa", 1] == fingerprints.get(("pathvqa", 2), fingerprints["pathvqa", 1])


def places(summary: dict[str, Any]) -> list[tuple[str, int]]:
    return [(cell["task"], cell["stage"]) for cell in summary["cells"]]


@pytest.mark.parametrize("change", ["evaluation.max_new_tokens=3", "model.dtype=bfloat16"])
def test_cells_answered_with_other_settings_are_left_out(
    change: str, results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.evaluate("--stages", "seen", "method=sequential")
    before = results.answers()
    capsys.readouterr()
    summary = results.evaluate("method=sequential", change)
    assert places(summary) == [("pathvqa", 1), ("slake-vqarad", 2), ("PCAM", 3)]
    assert summary["stages"] == [1, 2, 3]
    assert "left out" in (printed := capsys.readouterr().err)
    assert "gave the answers: pathvqa at stage 2, 3; slake-vqarad at stage 3\n" in printed
    staged = {name: answers for name, answers in before.items() if "stage-" in name}
    assert len(staged) == 3 and staged.items() <= results.answers().items()
    # As long as nothing changes, cells of earlier calls stay.
    results.evaluate("--stages", "seen", "method=sequential")
    assert len(results.evaluate("method=sequential")["cells"]) == 6
    assert "left out" not in capsys.readouterr().err


def test_cells_answered_by_a_bank_that_was_trained_again_are_left_out(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(results.config, ["method=sequential", f"results_dir={results.folder}"])
    banks = {task: load_bank(config.run_dir / "banks" / task) for task in TASKS}
    evaluate(config, "seen", banks=banks)
    again = replace(banks["PCAM"], matrices={name: (a, 2 * b) for name, (a, b) in banks["PCAM"].matrices.items()})
    path = evaluate(config, "own", banks={**banks, "PCAM": again})
    summary = json.loads(path.read_text())
    assert places(summary) == [("pathvqa", 1), ("pathvqa", 2), ("slake-vqarad", 2), ("PCAM", 3)]
    assert "gave the answers: pathvqa at stage 3; slake-vqarad at stage 3\n" in capsys.readouterr().err


def test_cells_of_a_stream_in_another_order_are_left_out(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["method=sequential", f"results_dir={results.folder}"]
    config = load_config(results.config, options)
    banks = {task: load_bank(config.run_dir / "banks" / task) for task in TASKS}
    evaluate(config, "seen", banks=banks)
    capsys.readouterr()
    turned = config.model_copy(update={"tasks": config.tasks[::-1]})
    assert [task.name for task in turned.stream] == TASKS[::-1]
    summary = json.loads(evaluate(turned, "own", banks=banks).read_text())
    # The second task's bank is the same, hence its answers.
    assert places(summary) == [("PCAM", 1), ("slake-vqarad", 2), ("pathvqa", 2), ("pathvqa", 3)]
    printed = capsys.readouterr().err
    assert "gave the answers: pathvqa at stage 1; slake-vqarad at stage 3; PCAM at stage 3\n" in printed


def test_cells_of_a_task_without_questions_are_left_out(
    results: Results, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a task that is not asked now, as its test file is not needed either."""
    results.evaluate(f"data.root={own_data}")
    (own_data / "PCam" / "test.jsonl").unlink()
    summary = results.evaluate(f"data.root={own_data}", "--task", "pathvqa")
    assert places(summary) == [("pathvqa", 1), ("slake-vqarad", 2)]
    assert "gave the answers: PCAM at stage 3\n" in capsys.readouterr().err


def test_cells_of_other_questions_are_not_kept(results: Results, own_data: Path) -> None:
    """A task's questions change between two calls, the later of which answers its own stage alone."""
    options = (f"data.root={own_data}", "evaluation.banks_by=all")
    results.evaluate("--stages", "seen", *options)
    file = own_data / "PathVQA" / "test.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    summary = results.evaluate(*options)
    assert [(cell["task"], cell["stage"], cell["rows"]) for cell in summary["cells"]] == [
        ("pathvqa", 1, 6),
        ("slake-vqarad", 2, 8),
        ("slake-vqarad", 3, 8),
        ("PCAM", 3, 4),
    ]
    assert main(["report", str(results.config), f"results_dir={results.folder}"]) == 0


def test_a_kill_while_answering_anew_leaves_no_old_stamp_on_new_answers(
    results: Results, asked: list[int], tmp_path: Path
) -> None:
    results.evaluate()
    before = results.answers()
    changed = results.command("evaluation.max_new_tokens=1")
    run_until_killed(changed, KillPoint("mslora_cr.evaluation.answer_files:publish", after=True), tmp_path / "output")
    results.evaluate()
    assert results.answers() == before


# --- refused -------------------------------------------------------------------------------------------------------


def test_a_run_without_banks_is_refused(results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(results.command(f"output_dir={tmp_path / 'nowhere'}")) == 1
    assert "no task of this run is trained yet" in capsys.readouterr().err


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_data, tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_missing_image_is_named(
    workers: int, results: Results, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = json.loads((own_data / "PCam" / "test.jsonl").read_text().splitlines()[2])
    (own_data / "PCam" / question["image"]).unlink()
    options = [f"data.root={own_data}", f"training.dataloader_num_workers={workers}"]
    assert main(results.command(*options, "--task", "PCAM")) == 1
    message = capsys.readouterr().err
    assert "line 3" in message and question["image"] in message


def test_a_question_that_cannot_be_asked_is_named(
    results: Results, own_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = own_data / "PCam" / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["text"] = "What is\0this?"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(results.command(f"data.root={own_data}", "--task", "PCAM")) == 1
    message = capsys.readouterr().err
    assert "line 2" in message and "NUL" in message
