"""An archive for a leaderboard: what it holds, and that nothing in it is believed."""

import csv
import hashlib
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mslora_cr.analysis.compare import compare
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import StreamConfig
from mslora_cr.data import tasks
from mslora_cr.data.records import DataError
from mslora_cr.evaluation.results import ReportError, required_evaluation
from mslora_cr.evaluation.score import metrics_of, read_scores, score_file
from mslora_cr.reporting.report import write_report
from mslora_cr.reporting.submission import MANIFEST, open_submission, write_submission
from mslora_cr.utils.state import StateError
from tests.helpers.report_run import make_run

TASKS = ("pathvqa", "PCAM")
Files = dict[str, bytes]


def configuration(root: Path, name: str) -> StreamConfig:
    places = [f"run={name}", f"output_dir={root / 'checkpoints'}", f"results_dir={root / 'results'}"]
    return load_config("demo", [*places, "tasks=[pathvqa, PCAM]"])


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    _, results = make_run(root, "ours", tasks=TASKS)
    scores = results / "PCAM" / "scores.csv"
    with scores.open(newline="") as file:
        header, *rows = csv.reader(file)
    places = header.index("image"), header.index("group")
    for number, row in enumerate(rows):
        row[places[0]], row[places[1]] = f"smith-{number}.png", f"patient Smith {number}"
    with scores.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return write_submission(configuration(root, "ours"), results, root / "ours.zip")


def content(path: Path) -> Files:
    with zipfile.ZipFile(path) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def repacked(files: Files, path: Path) -> Path:
    """An archive of these files, with the digests that they have."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != MANIFEST}
    manifest = json.loads(files[MANIFEST]) | {"files": digests}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in {**files, MANIFEST: json.dumps(manifest).encode()}.items():
            opened.writestr(name, data)
    return path


def test_an_archive_is_a_results_folder_without_names(archive: Path, tmp_path: Path) -> None:
    root = archive.parent
    again = write_submission(configuration(root, "ours"), root / "results" / "ours", tmp_path / "again.zip")
    assert again.read_bytes() == archive.read_bytes()
    files = content(archive)
    assert not any(b"mith" in data or str(root).encode() in data for data in files.values())
    folder = open_submission(archive, tmp_path / "unpacked")
    ours, theirs = required_evaluation(root / "results" / "ours"), required_evaluation(folder)
    assert [cell.metrics for cell in ours.cells] == [cell.metrics for cell in theirs.cells]
    comparison = compare({"ours": root / "results" / "ours", "archive": folder})
    assert all(test.difference == 0 for tests in comparison.metrics.values() for test in tests)


def boxed_run(root: Path, model: Path) -> StreamConfig:
    """A run whose questions are about boxes: two found, one missed, one not said."""
    config = load_config(
        "demo",
        ["run=boxes", f"output_dir={root / 'checkpoints'}", f"results_dir={root / 'results'}", "tasks=[pathvqa]",
         f"data.root={root / 'data'}", f"model.path={model}"],
    )  # fmt: skip
    _, results = make_run(root, "boxes", tasks=("pathvqa",))
    questions = root / "data" / config.task("pathvqa").folder / "test.jsonl"
    questions.parent.mkdir(parents=True)
    asked = [
        {"question_id": n, "image": f"smith-{n}.png", "text": "what is in <box>, and where?", "gt": "<box>",
         "answer_type": "OPEN", "boxes": [[1, 1, 9, 9], [0, 0, 50, 40]], "size": [100, 50]}
        for n in range(4)
    ]  # fmt: skip
    questions.write_text("".join(json.dumps(line) + "\n" for line in asked), encoding="utf-8")
    records = tasks.test_records(config, config.task("pathvqa"))
    square = "[0.0000, 0.2500, 0.5000, 0.6500]"  # LLaVA-Med's words for it: shares of the padded square
    said = [square, f"at {square}", "[0.9, 0.3, 1.0, 0.7]", "nowhere"]
    rows = [
        {"question_id": record.question_id, "prompt": record.text, "text": text, "gt": record.gt, "answer_type": "OPEN"}
        for record, text in zip(records, said, strict=True)
    ]
    answers = results / "pathvqa" / "answer-file.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scores = score_file(answers, answers.parent, records, model=model)
    evaluation = json.loads((results / "evaluation.json").read_text())
    measured = metrics_of(scores, read_scores(answers.with_name("scores.csv")).groups)
    evaluation["cells"][0] |= {
        "rows": 4,
        "questions": records.digest,
        **measured.model_dump(include={"metrics", "intervals"}),
    }
    (results / "evaluation.json").write_text(json.dumps(evaluation))
    return config


def test_answers_with_boxes_are_scored_again_by_the_rule_of_their_model(tiny_model: Path, tmp_path: Path) -> None:
    config = boxed_run(tmp_path, tiny_model)
    write_report(config.run_dir, config.results_run_dir, config)
    report = (config.results_run_dir / "report.md").read_text(encoding="utf-8")
    assert "mean IoU" in report and re.search(r"\| 50\.00 \[\d+\.\d+ to \d+\.\d+\]", report)
    archive = write_submission(config, config.results_run_dir, tmp_path / "boxes.zip")
    files = content(archive)
    assert not any(b"smith" in data for data in files.values())
    [cell] = required_evaluation(open_submission(archive, tmp_path / "unpacked")).cells
    assert cell.metrics["recall at IoU 0.5"] == 50 and cell.intervals["recall at IoU 0.5"] is not None
    files["pathvqa/answer-file.jsonl"] = files["pathvqa/answer-file.jsonl"].replace(b"0.9, 0.3", b"0.0, 0.3")
    with pytest.raises(ReportError, match=r"pathvqa: scores\.csv: IoU is given as"):
        open_submission(repacked(files, tmp_path / "forged.zip"), tmp_path / "forged")
    other = content(archive)
    other[MANIFEST] = json.dumps(json.loads(other[MANIFEST]) | {"box_rule": ["thousandths", 28, 0, 0]}).encode()
    with pytest.raises(ReportError, match="IoU is given as"):
        open_submission(repacked(other, tmp_path / "rule.zip"), tmp_path / "rule")


def better(files: Files) -> None:
    evaluation = json.loads(files["evaluation.json"])
    evaluation["cells"][-1]["metrics"]["close accuracy"] = 99.0
    files["evaluation.json"] = json.dumps(evaluation).encode()


def narrower(files: Files) -> None:
    evaluation = json.loads(files["evaluation.json"])
    evaluation["cells"][0]["intervals"]["close accuracy"] = [89.0, 91.0]
    files["evaluation.json"] = json.dumps(evaluation).encode()


def one_metric_less(files: Files) -> None:
    evaluation = json.loads(files["evaluation.json"])
    del evaluation["cells"][0]["metrics"]["close accuracy"]
    files["evaluation.json"] = json.dumps(evaluation).encode()


def without_digest(files: Files, name: str, data: bytes) -> None:
    evaluation = json.loads(files["evaluation.json"])
    for cell in evaluation["cells"]:
        cell.pop("scores_sha256", None)
    files |= {"evaluation.json": json.dumps(evaluation).encode(), name: data}


def scores_of_another(files: Files) -> None:
    without_digest(files, "PCAM/scores.csv", files["PCAM/scores.csv"].replace(b",0.0,", b",1.0,", 1))


def fewer_answers(files: Files) -> None:
    files["PCAM/answer-file.jsonl"] = files["PCAM/answer-file.jsonl"].split(b"\n", 1)[1]


def other_answers(files: Files) -> None:
    files["PCAM/answer-file.jsonl"] = files["PCAM/answer-file.jsonl"].replace(b"not so", b"yes")


def leads_outside(files: Files) -> None:
    evaluation = json.loads(files["evaluation.json"])
    evaluation["cells"][0]["answers"] = "../../secret.jsonl"
    files["evaluation.json"] = json.dumps(evaluation).encode()


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (better, "PCAM at stage 2: close accuracy is given as 99.0; its answers give"),
        (narrower, "the interval of close accuracy is given as 89.0"),
        (one_metric_less, "close accuracy is given as None"),
        (scores_of_another, r"PCAM: scores.csv: .* is given as 100"),
        (fewer_answers, "is of other answers"),
        (other_answers, r"PCAM: scores.csv: .* is given as 0"),
        (leads_outside, "leads out of the results folder"),
    ],
)
def test_figures_that_the_answers_do_not_give_are_refused(
    forge: Callable[[Files], None], message: str, archive: Path, tmp_path: Path
) -> None:
    files = content(archive)
    forge(files)
    with pytest.raises((ReportError, StateError), match=message):
        open_submission(repacked(files, tmp_path / "forged.zip"), tmp_path / "unpacked")


def member(path: Path, name: str, data: bytes = b"x", mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        opened.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


def test_hostile_archives_are_refused(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = [
        member(tmp_path / "climbs.zip", "../evil.json"),
        member(tmp_path / "absolute.zip", "/evil.json"),
        member(tmp_path / "link.zip", "link", mode=0o120777),
    ]
    whole = archive.read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.zip").write_bytes(b"no archive")
    for place, path in enumerate([*outside, tmp_path / "cut.zip", tmp_path / "text.zip", tmp_path / "gone.zip"]):
        with pytest.raises(DataError):
            open_submission(path, tmp_path / "unpacked" / str(place))
    assert not [*tmp_path.glob("**/evil.json")]

    files = content(archive)
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as opened:
        for name, data in {**files, "more.txt": b"x"}.items():
            opened.writestr(name, data)
    with pytest.raises(ReportError, match=r"more\.txt is not the file that submission\.json names"):
        open_submission(tmp_path / "more.zip", tmp_path / "more")
    with pytest.raises(ReportError, match=r"has no submission\.json"):
        open_submission(member(tmp_path / "other.zip", "a.txt"), tmp_path / "other")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as opened, pytest.warns(UserWarning, match="Duplicate name"):
        for name, data in [*files.items(), ("evaluation.json", b"{}")]:
            opened.writestr(name, data)
    with pytest.raises(ReportError, match="a name stands in it twice"):
        open_submission(tmp_path / "twice.zip", tmp_path / "twice")
    monkeypatch.setattr("mslora_cr.data.sources.raw.EXPANSION_SLACK", 1 << 10)
    with pytest.raises(DataError, match="archive bomb"):
        open_submission(member(tmp_path / "bomb.zip", "a.txt", bytes(4 << 20)), tmp_path / "bomb")


def test_any_number_of_archives_is_compared_and_shown(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [archive]
    for number, name in enumerate(("second", "third")):
        _, results = make_run(tmp_path, name, tasks=TASKS, right=lambda task, stage, low=number: 9 - low)
        paths.append(write_submission(configuration(tmp_path, name), results, tmp_path / f"{name}.zip"))
    page = tmp_path / "board.html"
    assert main(["compare", *map(str, paths), "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "second" in printed and "third" in printed
    assert all(name in page.read_text(encoding="utf-8") for name in ("ours", "second", "third"))

    files = content(paths[1])
    for name in [name for name in files if name.endswith("answer-file.jsonl")]:
        files[name] = files[name].replace(b'"gt": "yes"', b'"gt": "no"')
    with pytest.raises(ReportError):  # whoever changes the truths has other scores
        open_submission(repacked(files, tmp_path / "truths.zip"), tmp_path / "truths")
