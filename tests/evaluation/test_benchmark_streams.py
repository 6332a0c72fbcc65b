"""CoIN, UCIT and MLLM-CL as shipped: their files are read as they are, checked, answered and scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mslora_cr.banks.io import load_bank
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data import tasks
from mslora_cr.data.listed import ListedQuestion
from mslora_cr.data.records import DataError
from mslora_cr.data.tasks import read_questions
from mslora_cr.evaluation.results import required_evaluation
from mslora_cr.evaluation.score import score_file
from mslora_cr.metrics.captions import WITHOUT_JAVA
from tests.helpers.benchmarks import ANSWERS, make_benchmark


def small(name: str, folder: Path, model: str = "no-model", **changes: Any) -> Path:
    """A shipped configuration with a tiny base, and its data."""
    path = folder / f"{name}.yaml"
    shipped: dict[str, Any] = {
        "extends": name,
        "output_dir": str(folder / "checkpoints"),
        "results_dir": str(folder / "results"),
        "model": {"path": model, "dtype": "float32", "device": "cpu"},
        "data": {"root": str(folder / "data"), "check_images": False},
        "lora": {"rank": 2, "alpha": 4},  # and the projector, as shipped
        "training": {"disable_tqdm": True, "bf16": False, "gradient_checkpointing": False, "dataloader_num_workers": 0},
        "evaluation": {"max_new_tokens": 4, "batch_size": 4},
    }
    path.write_text(yaml.safe_dump(shipped | changes), encoding="utf-8")
    make_benchmark(load_config(path))
    return path


@pytest.mark.parametrize("name", ["coin", "ucit", "mllm_cl"])
def test_every_file_is_read_as_it_is_and_right_answers_score_all(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mslora_cr.metrics.captions.shutil.which", lambda _: None)  # Java takes half a minute
    path = small(name, tmp_path)
    config = load_config(path)
    checked = ["data", "check", str(path), "--workers", "1", "--output", str(tmp_path / "check.json")]
    assert main(checked) == 0, capsys.readouterr().out
    for task in config.stream:
        if task.benchmark == "captions":
            pytest.importorskip("pycocoevalcap", reason="pip install 'mslora-cr[captions]'")
        records = tasks.test_records(config, task)
        rows = [
            {"question_id": question.question_id, "prompt": question.text, "text": question.gt, "gt": question.gt,
             "answer_type": question.answer_type}
            for question in records
        ]  # fmt: skip
        answers = tmp_path / task.name / "answer-file.jsonl"
        answers.parent.mkdir()
        answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        scores = score_file(answers, answers.parent, records)
        metrics = json.loads((answers.parent / "metrics.json").read_text())["metrics"]
        assert scores.benchmark.keys() <= metrics.keys()
        if task.benchmark not in ("captions", "grounding", "ocrvqa"):
            assert metrics["benchmark"] == 100, task.name
        if task.benchmark == "grounding":  # the last digit is lost: of 0.75 none, of 0.70 nothing
            assert metrics["benchmark"] == metrics["benchmark corrected"] == 100
        if task.benchmark == "ocrvqa":
            assert (metrics["benchmark"], metrics["benchmark corrected"]) == (50, 100)


def trained_and_scored(path: Path) -> StreamConfig:
    """Train a stream, answer every task at its own stage, and check that each has its benchmark's score."""
    assert main(["train", str(path)]) == 0
    assert main(["evaluate", str(path)]) == 0
    config = load_config(path)
    cells = {cell.task: cell for cell in required_evaluation(config.results_run_dir).cells}
    assert cells.keys() == {task.name for task in config.stream}
    for task in config.stream:
        metric = WITHOUT_JAVA if task.benchmark == "captions" else "benchmark"
        assert metric in cells[task.name].metrics and len(cells[task.name].intervals[metric]) == 2, task.name
        corrected = task.benchmark not in ("textvqa", "gqa", "exact", "captions")
        assert ("benchmark corrected" in cells[task.name].metrics) == corrected, task.name
        assert load_bank(config.run_dir / "banks" / task.name).projector
    return config


def test_a_task_of_every_scorer_trains_is_answered_and_scored(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks of the three streams in one; a record and a question of ScienceQA have no picture."""
    pytest.importorskip("pycocoevalcap", reason="pip install 'mslora-cr[captions]'")
    monkeypatch.setattr("mslora_cr.metrics.captions.shutil.which", lambda _: None)  # Java takes half a minute
    datasets, chosen = {}, {}
    for stream in ("coin", "ucit", "mllm_cl"):
        config = load_config(stream)
        for name, dataset in config.datasets.items():
            if dataset.benchmark is not None:
                chosen.setdefault(dataset.benchmark, f"{stream}-{name}")
                datasets[f"{stream}-{name}"] = dataset.model_dump(exclude={"published"}, exclude_none=True)
    assert chosen.keys() == ANSWERS.keys()
    settings = {"epochs": 0.5, "batch_size": 2, "learning_rate": 1e-3}
    tasks = [{"name": name, **settings} for name in chosen.values()]
    path = small("coin", tmp_path, str(tiny_model), tasks=tasks, datasets=datasets, method="each")
    config = trained_and_scored(path)
    assert main(["report", str(path)]) == 0
    page = (config.results_run_dir / "report.html").read_text(encoding="utf-8")
    assert "The benchmark&#39;s own score" in page or "benchmark's own score" in page
    assert "published protocol" in page
    assert main(["report", str(path), "lora.projector_learning_rate=null"]) == 0
    page = (config.results_run_dir / "report.html").read_text(encoding="utf-8")
    assert "published protocol" not in page and "do not compare with theirs" in page


@pytest.mark.long
@pytest.mark.parametrize("name", ["coin", "ucit", "mllm_cl"])
def test_a_miniature_of_the_whole_stream_runs(
    name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the published order, by the shipped method, with a batch that fits four records."""
    pytest.importorskip("pycocoevalcap", reason="pip install 'mslora-cr[captions]'")
    monkeypatch.setattr("mslora_cr.metrics.captions.shutil.which", lambda _: None)
    tasks = [{**task.model_dump(), "batch_size": 4} for task in load_config(name).tasks]
    trained_and_scored(small(name, tmp_path, str(tiny_model), tasks=tasks))


def test_what_runners_append_is_asked_and_not_kept(tmp_path: Path) -> None:
    config = load_config(small("mllm_cl", tmp_path))
    suffixes = {
        task.name: [question.question.removeprefix(question.text) for question in tasks.test_records(config, task)]
        for task in config.stream
    }
    assert suffixes == {
        "RS": ["", ""],
        "Med": [" Answer the question with a single word (or phrase)."] * 2,
        "AD": ["", ""],
        "Sci": ["", ""],
        "Fin": [
            " Only answer with yes or no directly.",
            " Answer with the given letter directly, e.g., A, B, C, D.",
        ],
    }


def test_captions_are_those_of_the_question_s_place(tmp_path: Path) -> None:
    config = load_config(small("ucit", tmp_path))
    records = tasks.test_records(config, config.task("VizWiz"))
    first, second = ANSWERS["captions"]
    assert [question.truths for question in records] == [(f"{first} 0", f"{first} 1"), (f"{second} 0", f"{second} 1")]
    assert records[1].truths == (f"{second} 0", f"{second} 1")


@pytest.mark.parametrize(
    ("content", "benchmark", "references", "message"),
    [
        ([{"question_id": 1, "text": "a?"}], "exact", None, r"record 0: .*'gt'"),
        ([{"question_id": 1, "text": "a?", "answer": ["x", 2]}], "exact", None, r"record 0: .*'gt"),
        ([{"question_id": 1, "text": "a?", "answer": "b"}], "textvqa", None, "name it as `references`"),
        ([{"question_id": 1, "text": "a?", "answer": "b"}], "captions", [], "expected a COCO file"),
        ([{"question_id": 1, "text": "a?", "answer": "b"}], "captions", {"annotations": []}, "captions of 0 images"),
        ([{"question_id": 1, "text": "a?", "answer": "b"}], "textvqa", {"data": [{"answers": []}]}, "TextVQA's"),
        ({"question_id": 1}, "exact", None, "expected one list"),
    ],
)
def test_malformed_lists_are_refused(
    content: Any, benchmark: Any, references: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path / "test.json").write_text(json.dumps(content), encoding="utf-8")
    given = tmp_path / "references.json" if references is not None else None
    if given is not None:
        given.write_text(json.dumps(references), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_questions(tmp_path / "test.json", benchmark, given)


def test_a_number_is_an_answer_and_a_list_several(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "text": "a?", "answer": 7}, {"question_id": 2, "text": "b?", "answer": ["x", "y"]}]
    (tmp_path / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    questions = read_questions(tmp_path / "test.json", "exact")
    assert [question.truths for question in questions] == [("7",), ("x", "y")]
    assert all(isinstance(question, ListedQuestion) and not question.images for question in questions)


def test_a_file_of_annotations_stays_below_the_data_set(tmp_path: Path) -> None:
    path = small("coin", tmp_path)
    with pytest.raises(ConfigError, match=r"datasets\.GQA\.test.*without '\.\.'"):
        load_config(path, ["datasets.GQA.test=../x.json"])
