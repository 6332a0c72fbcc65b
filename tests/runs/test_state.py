"""A run's own files: damaged, foreign and newer ones are named; what was answered is what is scored; what is forced."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mslora_cr.cli.main import main
from mslora_cr.evaluation.schemas import Comparison, Metrics
from mslora_cr.utils.state import NewerError, StateFile
from tests.conftest import first_in_make_test

TASKS = ["pathvqa", "slake-vqarad", "PCAM"]
DEEP = b'{"a": ' + b"[" * 100_000
DAMAGED = {"cut": b'{"run": "t', "foreign": b'{"a": 1}', "not UTF-8": b'{"run": "\xff"}', "deep": DEEP, "list": b"[]"}
DAMAGED |= {"huge": b'{"run": 1' + b"0" * 5000 + b"}", "twice": b'{"run": "a", "run": "b"}', "NaN": b'{"run": NaN}'}


@pytest.fixture(scope="module")
def evaluated(trained_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the trained stream. Read only."""
    results = tmp_path_factory.mktemp("evaluated")
    assert main(["evaluate", str(trained_config), "--stages", "seen", f"results_dir={results}"]) == 0
    assert main(["analyze", str(trained_config), "--questions", "0", f"results_dir={results}"]) == 0
    return results


class Copy:
    """A run and its results, to be damaged."""

    def __init__(self, config: Path, results: Path, folder: Path) -> None:
        self.config, self.folder = config, folder
        shutil.copytree(config.parent / "checkpoints", folder / "checkpoints")
        shutil.copytree(results, folder / "results")
        self.run, self.results = folder / "checkpoints" / "tiny", folder / "results" / "tiny"

    def __call__(self, command: str, *arguments: str) -> int:
        places = [f"output_dir={self.folder / 'checkpoints'}", f"results_dir={self.folder / 'results'}"]
        return main([command, str(self.config), *places, *arguments])


@pytest.fixture
def copy(trained_config: Path, evaluated: Path, tmp_path: Path) -> Iterator[Copy]:
    yield Copy(trained_config, evaluated, tmp_path)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mslora-cr: error")]
    return line


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_named(damage: str, copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    for path, command in (
        (copy.run / "ledger.json", "train"),
        (copy.results / "evaluation.json", "report"),
        (copy.results / "analysis.json", "report"),
    ):
        whole = path.read_bytes()
        path.write_bytes(DAMAGED[damage])
        capsys.readouterr()
        assert copy(command) == 1
        message = one_line(capsys)
        assert str(path) in message and ("; restore" in message or "write" in message), message
        path.write_bytes(whole)


def test_files_of_a_later_version_are_refused(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    for path, command in (
        (copy.run / "ledger.json", "train"),
        (copy.results / "evaluation.json", "evaluate"),
        (copy.results / "PCAM" / "answers.json", "evaluate"),
    ):
        whole = path.read_bytes()
        newer = json.dumps({**json.loads(whole), "version": 99}).encode()
        path.write_bytes(newer)
        capsys.readouterr()
        assert copy(command) == 1
        assert f"{path} was written by a later version of mslora-cr" in one_line(capsys)
        assert path.read_bytes() == newer
        path.write_bytes(whole)


def test_scores_and_comparisons_are_read_as_they_were_written(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """By whoever reads them in Python; those without a version too, and never those of a later version."""
    comparison = copy.results / "comparison.json"
    assert main(["compare", *[str(copy.results)] * 2, "--output", str(comparison)]) == 1  # the same run twice
    shutil.copytree(copy.results, copy.folder / "other")
    assert main(["compare", str(copy.results), str(copy.folder / "other"), "--output", str(comparison)]) == 0
    files: dict[Path, type[StateFile]] = {comparison: Comparison, copy.results / "PCAM" / "metrics.json": Metrics}
    for path, schema in files.items():
        content = json.loads(path.read_text())
        assert content["version"] == 1 and json.loads(schema.read(path).model_dump_json(exclude_unset=True)) == content
        del content["version"]
        path.write_text(json.dumps(content))
        schema.read(path)
        path.write_text(json.dumps({**content, "version": 99}))
        with pytest.raises(NewerError, match=f"{path} was written by a later version"):
            schema.read(path)
    earlier = Path(__file__).parents[1] / "fixtures" / "run_0_1_0" / "results" / "kept" / "PCAM" / "metrics.json"
    assert Metrics.read(earlier).groups is None


@pytest.mark.parametrize("change", first_in_make_test("edited", "stamp", "cut", "table", first=2))
def test_what_is_scored_is_what_was_answered(change: str, copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    answers = copy.results / "PCAM" / "answer-file.jsonl"
    whole, lines = answers.read_bytes(), answers.read_bytes().splitlines(keepends=True)
    if change == "cut":
        answers.write_bytes(b"".join(lines[:2]))
    elif change == "edited":
        row = json.loads(lines[0])
        answers.write_bytes(json.dumps({**row, "text": "another"}).encode() + b"\n" + b"".join(lines[1:]))
    elif change == "stamp":
        answers.with_name("answers.json").write_bytes(b"{")
    else:
        (copy.results / "evaluation.json").write_bytes(b"{")
    if change in ("cut", "edited"):
        assert copy("report") == 1
        assert f"{answers} was changed since it was scored" in one_line(capsys)
    capsys.readouterr()
    assert copy("evaluate", "--stages", "seen") == 0
    assert "warning" in capsys.readouterr().err
    assert answers.read_bytes() == whole
    assert copy("report") == 0


def test_changed_scores_are_not_reported(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    scores = copy.results / "PCAM" / "scores.csv"
    scores.write_text(scores.read_text().replace("0.0", "1.0"))
    assert copy("report") == 1
    assert f"{scores} was changed since" in one_line(capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tasks=[slake-vqarad, pathvqa, PCAM]", f"order: {', '.join(TASKS)} there; slake-vqarad, pathvqa, PCAM here"),
        ("lora.rank=8", "lora.rank: 4 there, 8 here"),
        ("method=olora", "method: mslora_cr there, olora here"),
        ("tasks=[pathvqa, PCAM]", "'slake-vqarad' is finished there, and not a task here"),
    ],
)
def test_order_rank_and_method_of_finished_tasks_are_never_forced(
    change: str, said: str, copy: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy.run / "config.yaml").read_bytes()
    capsys.readouterr()
    for force in ([], ["--force"]):
        assert copy("train", change, *force) == 1
        assert f"({said})" in one_line(capsys)
    assert (copy.run / "config.yaml").read_bytes() == before


def test_what_is_forced_stands_in_ledger_and_report(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert copy("train", "lora.dropout=0") == 1
    assert "(lora.dropout: 0.05 there, 0.0 here)" in one_line(capsys)
    for _ in range(2):
        assert copy("train", "lora.dropout=0", "--force") == 0
    [forced] = json.loads((copy.run / "ledger.json").read_text())["forced"]
    assert forced["finished"] == TASKS and forced["changed"] == ["lora.dropout: 0.05 there, 0.0 here"]
    assert copy("report") == 0
    for name in ("report.md", "report.html"):
        assert "0.05 there, 0.0 here" in (copy.results / name).read_text()


def test_a_damaged_checkpoint_is_named(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    """What a launch finds where it would resume from."""
    ledger = json.loads((copy.run / "ledger.json").read_text())
    del ledger["tasks"]["PCAM"]
    (copy.run / "ledger.json").write_text(json.dumps(ledger))
    checkpoint = copy.run / "work" / "PCAM" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for state in (b"{", b'{"global_step": 2}'):
        (checkpoint / "trainer_state.json").write_bytes(state)
        (checkpoint / "launch.json").write_bytes(b"{")
        assert copy("train") == 1
        message = one_line(capsys)
        assert str(checkpoint) in message and "remove this checkpoint" in message
