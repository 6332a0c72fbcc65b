import argparse
import json
import os
import re
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mslora_cr.cli.data import add_check_arguments, run_check
from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.lengths import count_learned
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.sources import check_report as module
from mslora_cr.data.sources.catalog import data_set
from mslora_cr.data.sources.check import Scan, check
from mslora_cr.data.sources.check_report import Report, Share, table
from mslora_cr.models.layout import ModelError
from mslora_cr.models.load import input_processor_in
from mslora_cr.stream.checks import check_labels
from tests.data.test_images import picture
from tests.helpers.families import make

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny_a" / "llava_med_tiny"
TURNS = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "yes"}]
NO = [TURNS[0], {"from": "gpt", "value": "No "}]


def question(image: str = "images/test0.png", gt: str = "yes", **changes) -> dict:
    return {"question_id": 1, "image": image, "text": "Is it?", "gt": gt, "answer_type": "CLOSED", **changes}


def training(image: str = "images/train0.png", **changes) -> dict:
    return {"id": 1, "image": image, "conversations": TURNS, **changes}


def write(root: Path, train: list[dict], test: list[dict]) -> Path:
    folder = root / "PathVQA"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set without a fault but its size: 4 training images, 3 test images."""
    for i in range(4):
        picture(tmp_path / f"PathVQA/images/train{i}.png", seed=i)
        picture(tmp_path / f"PathVQA/images/test{i}.png", seed=10 + i)
    train = [training(f"images/train{i}.png", conversations=NO if i == 3 else TURNS) for i in range(4)]
    return write(tmp_path, train, [question(f"images/test{i}.png", gt) for i, gt in enumerate(["yes", "no", "Yes"])])


def look(root: Path, **options) -> Report:
    return check(data_set("pathvqa"), root, scan=Scan(), **options)


def messages(report: Report, level: str) -> str:
    return "\n".join(f"{p.message} ({p.count}): {p.examples}" for p in report.problems if p.level == level)


def test_a_sound_data_set(root):
    report = look(root)
    assert report.errors == 0
    assert (report.train_rows, report.test_open, report.test_closed, report.images) == (4, 0, 3, 7)
    assert (report.missing, report.unreadable, report.shared_images, report.shared_contents) == (0, 0, 0, 0)
    assert report.closed_answers == {"yes": 2, "no": 1}
    assert report.training_answers == {"yes": Share(3, 0.75), "no": Share(1, 0.25)}
    assert report.truncated is None
    assert [problem.message for problem in report.problems] == [
        "the published test set holds 3370 open and 3391 closed rows, this one 0 and 3: "
        "scores cannot be compared with the published ones",
        "question ids that repeat: their rows are scored one by one, in order",
    ]


def test_a_missing_tree(root):
    assert "HAM: no such folder" in messages(check(data_set("HAM"), root, scan=Scan()), "error")
    (root / "PathVQA/test.jsonl").unlink()
    (root / "PathVQA/images").rename(root / "PathVQA/pictures")
    report = look(root)
    assert "test.jsonl: cannot be read" in messages(report, "error")
    assert "PathVQA/images: no such folder" in messages(report, "error")
    assert (report.train_rows, report.test_closed, report.missing) == (4, None, 4)


def test_malformed_records_are_named(root):
    write(root, [training(), {"id": 3}], [question(), question(gt=3)])
    errors = messages(look(root), "error")
    assert "train.json: record 1: field 'conversations' is missing" in errors
    assert "test.jsonl: line 2: field 'gt'" in errors


def test_missing_unsafe_and_broken_images(root):
    train = [training(f"images/train{i}.png") for i in range(4)] + [
        training("images/none.png"),
        training("../x.png"),
    ]
    write(root, train, [question("/etc/passwd"), question(["images/test0.png", "images/test1.png"])])
    (root / "PathVQA/images/test1.png").write_bytes(b"broken")
    truncated = root / "PathVQA/images/train2.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    report = look(root)
    errors = messages(report, "error")
    assert (report.images, report.missing, report.unreadable) == (6, 1, 2)
    assert "train.json: images that are missing" in errors and "images/none.png" in errors
    assert "'../x.png'" in errors and "'/etc/passwd'" in errors
    assert "test1.png: not a readable image" in errors and "train2.png: not a readable image" in errors
    assert report.errors == 4


def test_overlap_by_name_and_by_content(root):
    copy = root / "PathVQA/images/test2.png"
    copy.write_bytes((root / "PathVQA/images/train1.png").read_bytes())
    test = [question("images/test2.png"), question("images/test0.png", "no"), question("./images/train0.png")]
    write(root, [training(f"images/train{i}.png") for i in range(3)], test)
    report = look(root)
    assert (report.shared_images, report.shared_contents, report.errors) == (1, 1, 0)
    warnings = messages(report, "warning")
    assert "both the training and the test file (1)" in warnings and "train0.png" in warnings
    assert "under another name" in warnings and str(copy) in warnings


def test_overlap_is_told_from_names_alone(root):
    shutil.rmtree(root / "PathVQA/images")
    train = [training("images/a.png"), training(["images/b.png", "images/c.png"]), training("x.png")]
    write(root, train, [question("./images/a.png"), question("PathVQA/images/c.png"), question("images/d.png")])
    for scan in (None, Scan()):
        report = check(data_set("pathvqa"), root, scan=scan)
        assert report.shared_images == 2
        shared = "both the training and the test file (2): ['images/a.png', 'images/c.png']"
        assert shared in messages(report, "warning")
    (root / "PathVQA/test.jsonl").unlink()
    assert look(root).shared_images is None


def test_a_file_under_two_names_is_no_new_image(root):
    """`train0.png` is looked for in the image folder as well."""
    write(root, [training()], [question("train0.png")])
    report = look(root)
    assert (report.images, report.shared_images, report.shared_contents) == (1, 0, 1)


def test_unsafe_names_are_reported_without_looking_at_images(root):
    write(root, [training("../x.png")], [question()])
    assert "'../x.png'" in messages(check(data_set("pathvqa"), root), "error")


def test_which_answers_dominate_in_training(root):
    long = [TURNS[0], {"from": "gpt", "value": "The section shows a cell. " * 9}]
    twice = [*TURNS, {"from": "human", "value": "And?"}, {"from": "gpt", "value": "YES"}]
    rows = [training(conversations=turns) for turns in [TURNS] * 186 + [twice] + [NO] * 10 + [long]]
    write(root, rows, [question()])
    report = look(root)
    assert report.training_answers == {"yes": Share(188, 188 / 199), "no": Share(10, 10 / 199)}
    assert "training answers" not in messages(report, "warning")
    assert "training answers: pathvqa: yes 94%, no 5%" in table([report])

    write(root, [*rows, *[training()] * 60], [question()])
    assert "96% of the training answers are the same, 'yes'" in messages(look(root), "warning")
    write(root, [training(conversations=long)] * 3, [question()])
    report = look(root)
    assert report.training_answers == {} and "training answers" not in table([report])


def test_rare_answers_are_not_listed(root):
    turns = [[TURNS[0], {"from": "gpt", "value": f"word {i}"}] for i in range(150)]
    write(root, [training(conversations=each) for each in [NO, NO, *turns]], [question()])
    assert list(look(root).training_answers) == ["no"]


def test_marks_that_no_image_stands_for_are_errors(root):
    marked = [*TURNS, {"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "no"}]
    for record in (training(conversations=marked), {"id": 2, "conversations": TURNS}):
        write(root, [training(), record], [question(text="Is <image> it?")])
        errors = messages(look(root), "error")
        assert "train.json: record 1: field 'conversations[" in errors and "contains an <image> marker" in errors
        assert "test.jsonl" not in errors


def test_one_sided_answers_and_empty_answers(root):
    silent = [TURNS[0], {"from": "gpt", "value": " "}]
    write(root, [training(), training(conversations=silent)], [question()] * 38 + [question(gt="no")] * 2)
    report = look(root)
    assert "95% of the closed test questions have the same answer, 'yes'" in messages(report, "warning")
    assert "an empty answer (1): ['train.json: record 1']" in messages(report, "warning")
    write(root, [training(), training(conversations=NO)], [question()] * 37 + [question(gt="no")] * 3)
    assert "same answer" not in messages(look(root), "warning")


@pytest.mark.parametrize("truth", ["", " ", "A", "the", "?", "-.", "An."])
def test_a_truth_that_means_nothing_is_an_error(truth, root):
    write(root, [training()], [question(gt="yes"), question(gt=truth, question_id=7)])
    report = look(root)
    assert "any answer would count as right" in messages(report, "error")
    assert "test.jsonl: question 1 (id 7)" in messages(report, "error")


@pytest.mark.parametrize("truth", ["yes", "A1", "vitamin A", "%", "0"])
def test_a_short_truth_is_none_of_those(truth, root):
    write(root, [training()], [question(gt=truth)])
    assert "count as right" not in messages(look(root), "error")


def test_ids_that_repeat_are_named(root):
    write(root, [training()], [question(question_id=identifier) for identifier in (1, "x", 2, "x", "x")])
    assert "question ids that repeat" in messages(look(root), "warning")
    assert "'x', 3 times" in messages(look(root), "warning")


def test_images_of_which_the_model_sees_little_are_warned_of_every_time(root, tmp_path):
    folder = root / "PathVQA/images"
    ramp = np.tile(np.linspace(300, 4095, 64, dtype=np.uint16), (48, 1))
    Image.fromarray(ramp).save(folder / "twelve.png")
    Image.fromarray((ramp / 4096).astype(np.float32)).save(folder / "unit.tif")
    Image.fromarray((ramp // 16).astype(np.uint16)).save(folder / "low.png")
    Image.new("L", (9, 9), 7).save(folder / "blank.png")
    Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 9, 4))).save(folder / "clear.png")
    names = ("twelve.png", "unit.tif", "low.png", "blank.png", "clear.png")
    write(root, [training(f"images/{name}") for name in names], [question()])
    for _ in range(2):
        [warning] = [
            p
            for p in check(data_set("pathvqa"), root, scan=Scan(cache=tmp_path / "good")).problems
            if "sees little" in p.message
        ]
        assert [example.removeprefix(f"{folder}/").partition(":")[0] for example in warning.examples] == sorted(names)
        assert "blank.png: one single colour once decoded (stored as L)" in str(warning.examples)
        assert "clear.png: it has transparent parts" in str(warning.examples)
        assert "low.png: stored with more than 8 bits (mode I;16)" in str(warning.examples)


def test_samples_that_would_be_cut_off(root):
    long = [TURNS[0], {"from": "gpt", "value": "word " * 30}]
    unclear = [TURNS[0], {"from": "gpt", "value": "a [/INST] b"}]
    train = [training(), training(conversations=long), training(conversations=unclear)]
    write(root, train, [question(), question(text="word " * 40, gt="no")])
    report = look(root, processor=input_processor_in(GOLDEN, 50))
    assert report.truncated == 2
    warnings = messages(report, "warning")
    assert "longer than 50 positions: their end is cut off (1): ['train.json: record 1']" in warnings
    assert "longer than 50 positions: their end is cut off (1): ['test.jsonl: question 1']" in warnings
    assert "add nothing to the loss (1): ['train.json: record 2']" in warnings
    assert look(root, processor=input_processor_in(GOLDEN, 2048)).truncated == 0
    report = look(root, processor=input_processor_in(GOLDEN, 24))
    assert "lose their whole answer, which begins behind 24 positions (2)" in messages(report, "warning")
    assert "train.json: no conversation has an answer to learn, so training would learn nothing" in messages(
        report, "error"
    )
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        input_processor_in(root, 2048)


def test_samples_of_other_base_models_that_would_be_cut_off(root: Path, tmp_path: Path) -> None:
    """As many as the model's own processor makes longer; a missing image is no question of length."""
    make("qwen2_5_vl", tmp_path / "model")
    long = [TURNS[0], {"from": "gpt", "value": "word " * 30}]
    train = [training(), training(conversations=long), training("images/none.png")]
    write(root, train, [question(), question(text="word " * 40, gt="no")])
    records = TrainingRecords(root / "PathVQA" / "train.json")
    processor = input_processor_in(tmp_path / "model", 2048)
    short, other = (processor.length(record, [root / "PathVQA"]) for record in records[:2])
    report = look(root, processor=input_processor_in(tmp_path / "model", (short + other) // 2))
    warnings = messages(report, "warning")
    assert report.truncated == 2 and "their end is cut off (1): ['train.json: record 1']" in warnings
    assert "their end is cut off (1): ['test.jsonl: question 1']" in warnings
    assert "cannot be encoded" not in messages(report, "error")


@pytest.mark.parametrize("all_images", [False, True])
@pytest.mark.parametrize("max_length", [30, 40, 50, 80, 2048])
def test_training_counts_the_samples_that_it_cuts(all_images, max_length, tmp_path):
    texts = ["", "word", "word " * 20, "é病" * 9, '"\\\n' * 9, "😀" * 9]
    records = [
        training(id=i, image=["a", "b"][: 1 + i % 2], conversations=[TURNS[0], {"from": "gpt", "value": text}])
        for i, text in enumerate(texts)
    ]
    for ascii_only in (False, True):
        (tmp_path / "train.json").write_text(json.dumps(records, ensure_ascii=ascii_only))
        opened = TrainingRecords(tmp_path / "train.json")
        inputs = input_processor_in(GOLDEN, max_length, all_images)
        try:
            lengths = [inputs.count_labels(record, []).length for record in opened]
            counts = count_learned(opened, [], inputs, max_length)
        except ValueError as error:
            assert max_length == 30 and all_images and "past data.max_length = 30" in str(error)
            continue
        assert len(counts.cut) + len(counts.lost) == sum(length > max_length for length in lengths)


def test_training_says_once_how_many_samples_it_cuts(tiny_settings, caplog):
    config = StreamConfig.model_validate({**tiny_settings, "data": {**tiny_settings["data"], "max_length": 32}})
    records = {"pathvqa": TrainingRecords(Path(config.data.root) / "PathVQA" / "train.json")}
    with caplog.at_level("WARNING", "mslora_cr"):
        check_labels(config, records)
    # Libraries that are imported meanwhile have messages of their own.
    lost, cut = [record.getMessage() for record in caplog.records if record.name.startswith("mslora_cr")]
    assert lost.startswith("pathvqa: 4 of 16 training samples (25.0%) lose their whole answer")
    assert cut.startswith("pathvqa: 12 of 16 training samples (75.0%) are longer than data.max_length = 32 positions")


def test_training_on_nothing_is_refused_and_on_less_is_said(tiny_settings, tmp_path, caplog):
    """Of four records one ends in the template's own `</s>`; then all do."""
    shutil.copytree(tiny_settings["data"]["root"], tmp_path / "data")
    config = StreamConfig.model_validate({**tiny_settings, "data": {"root": str(tmp_path / "data")}})
    file = tmp_path / "data" / "PathVQA" / "train.json"
    rows = json.loads(file.read_text())[:4]
    rows[1]["conversations"][-1]["value"] += "</s>"
    file.write_text(json.dumps(rows))
    with caplog.at_level("WARNING", "mslora_cr"):
        check_labels(config, {"pathvqa": TrainingRecords(file)})
    assert "1 of 4 training samples (25.0%) add nothing to the loss" in caplog.text
    assert "the template cannot hold them: record 1. An answer that spells out a control token, such as `</s>`" in (
        caplog.text
    )
    rows[1]["conversations"][-1]["value"] = " \n"
    del rows[2]["conversations"][0]  # an answer without its question
    file.write_text(json.dumps(rows))
    records = TrainingRecords(file)
    check_labels(config, {"pathvqa": records})
    assert "(25.0%) have an empty answer, so that the model learns to say nothing: record 1." in caplog.text
    inputs = replace(input_processor_in(Path(config.model.path), 2048), image_processor=CLIPImageProcessorPil())
    place = [tmp_path / "data" / "PathVQA"]
    assert [len(inputs.sample(0, records[index], place)["pixel_values"]) for index in (1, 2)] == [1, 0]
    for row in rows:
        row["conversations"][-1]["value"] = "yes</s>"
    file.write_text(json.dumps(rows))
    with pytest.raises(
        DataError, match=r"train.json: no sample has an answer to learn.*4 of 4 training samples \(100.0%\)"
    ):
        check_labels(config, {"pathvqa": TrainingRecords(file)})


def test_texts_that_cannot_be_encoded(root):
    nul = [{"from": "human", "value": "<image>\na\0b"}, {"from": "gpt", "value": "yes"}]
    write(root, [training(), training(conversations=nul)], [question(), question(text="a\0b")])
    for processor in (None, input_processor_in(GOLDEN, 50)):
        errors = messages(look(root, processor=processor), "error")
        assert "conversations with a NUL character, which cannot be encoded (1): ['train.json: record 1']" in errors
        assert "questions with a NUL character, which cannot be encoded (1): ['test.jsonl: question 1']" in errors


def rows_of(tmp_path: Path, answer: str) -> Path:
    """A training file of 20,000 rows, their images missing; every answer is another one."""
    train = [
        training(f"images/train/train_{i // 4:05}.jpg", id=i, conversations=[TURNS[0], {"from": "gpt", "value": text}])
        for i, text in enumerate(f"{answer} {i}" for i in range(20_000))
    ]
    test = [question(f"images/test/test_{i // 4:05}.jpg", "yes" if i % 2 else "no") for i in range(6_761)]
    (tmp_path / "PathVQA/images").mkdir(parents=True)
    return write(tmp_path, train, test)


def test_twenty_thousand_rows_without_images(tmp_path):
    report = look(rows_of(tmp_path, "cells"))
    assert (report.train_rows, report.missing, report.images) == (20_000, 5_000 + 1_691, 0)
    assert (report.shared_images, report.shared_contents) == (0, 0)
    assert len(report.problems[2].examples) == module.EXAMPLES


@pytest.mark.long
def test_memory_is_bounded(tmp_path):
    """The records are looked at one by one, and nothing is kept of long answers."""
    root = rows_of(tmp_path, "The section shows a cell. " * 60)
    size = (root / "PathVQA/train.json").stat().st_size
    assert size > 32_000_000
    tracemalloc.start()
    report = look(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.train_rows == 20_000
    assert peak < size / 3


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_check_arguments(parser)
    return parser.parse_args(words)


def test_as_many_workers_as_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert arguments().workers == 3


def test_the_command_prints_a_table_writes_json_and_exits_by_the_errors(root, tmp_path, capsys):
    output = tmp_path / "out" / "check.json"
    words = [str(root), "--only", "pathvqa", "--workers", "1", "--output", str(output)]
    assert run_check(arguments(*words)) == 0
    printed = capsys.readouterr().out
    assert "pathvqa" in printed and "warnings" in printed and "0 errors" in printed
    assert "closed answers: pathvqa: yes 67%, no 33%\ntraining answers: pathvqa: yes 75%, no 25%" in printed
    assert output.with_suffix(".good-images").stat().st_size == 7 * 16
    saved = json.loads(output.read_text())["data_sets"][0]
    assert saved["closed_answers"] == {"yes": 2, "no": 1}
    assert saved["training_answers"] == {"yes": {"count": 3, "share": 0.75}, "no": {"count": 1, "share": 0.25}}

    (root / "PathVQA/images/test0.png").unlink()
    assert run_check(arguments(*words)) == 1
    assert "images/test0.png" in capsys.readouterr().out
    saved = json.loads(output.read_text())
    assert saved["errors"] == 1 and saved["data_sets"][0]["missing"] == 1

    assert run_check(arguments(*words, "--no-images")) == 0
    assert json.loads(output.read_text())["data_sets"][0]["images"] is None
    assert run_check(arguments(str(root), "--output", str(output))) == 1  # seven sets are not there
    with pytest.raises(DataError, match="no such folder"):
        run_check(arguments(str(root / "nowhere")))


@pytest.mark.parametrize("option", [("--workers", "0"), ("--max-length", "-5"), ("--workers", "x")])
def test_senseless_options_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        arguments(*option)
    assert f"argument {option[0]}" in capsys.readouterr().err


def test_the_table_is_aligned():
    report = Report("pathvqa", train_rows=19_755)
    report.error("something", ["here", "there"])
    lines = table([Report("CXP"), report]).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1
    assert "19,755" in lines[2] and lines[1].endswith("ok") and lines[2].endswith("errors")
    assert lines[4:] == ["error: pathvqa: something (2)", "    here", "    there"]


def test_every_malformed_record_is_listed(root):
    bad = {"id": True, "image": 3, "conversations": []}
    write(root, [training(), {"id": 3}, bad, training()], [question(gt=3), question(), question(answer_type="BOTH")])
    with (root / "PathVQA/test.jsonl").open("a") as file:
        file.write("{no json\n")
    report = look(root)
    found = [problem for problem in report.problems if problem.message.endswith("malformed records")]
    assert [(problem.message, problem.count) for problem in found] == [
        ("train.json: malformed records", 2),
        ("test.jsonl: malformed records", 3),
    ]
    both = found[0].examples[1]
    assert "train.json: record 2: field 'id'" in both and "field 'conversations' is empty" in both
    assert "line 4: not valid JSON" in found[1].examples[2] and "line 1: field 'gt'" in found[1].examples[0]
    assert (report.train_rows, report.test_closed) == (2, 1)  # the others are checked on
    many = [{"id": number} for number in range(60)]
    text = table([look(write(root, many, [question()]))])
    assert text.count("field 'conversations' is missing") == 50 and "… and 10 more, all in the JSON file" in text


def test_a_missing_file_with_a_table_beside_it_gets_advice(root):
    (root / "PathVQA/train.json").rename(root / "PathVQA/train.csv")
    assert re.search(
        r"train\.json: cannot be read .*; `mslora-cr data convert \S*/PathVQA/train\.csv", messages(look(root), "error")
    )


def test_the_tasks_of_a_configuration_are_checked(root, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    spec = {"Mine": {"modality": "pathology", "folder": "PathVQA", "image_folders": ["images"]}}
    task = {"name": "Mine", "epochs": 1, "batch_size": 1, "learning_rate": 1e-3}
    settings = {
        "run": "mine",
        "model": {"path": "none"},
        "data": {"root": str(root)},
        "datasets": spec,
        "tasks": [task],
    }
    config.write_text(json.dumps(settings))
    output = tmp_path / "check.json"
    words = [str(config), "--workers", "1", "--output", str(output)]
    assert run_check(arguments(*words)) == 0
    assert "0 errors" in capsys.readouterr().out
    [saved] = json.loads(output.read_text())["data_sets"]
    assert (saved["name"], saved["images"]) == ("Mine", 7)
    [problem] = saved["problems"]  # and none of published rows to compare with
    assert "question ids that repeat" in problem["message"]
    with pytest.raises(DataError, match=r"--only mine: no task of .*run\.yaml; did you mean 'Mine'\?"):
        run_check(arguments(*words, "--only", "mine"))


def test_the_same_question_about_the_same_image_with_other_answers(tmp_path):
    root = write(tmp_path, [training()], [question(), question(gt="no", text="is  IT?"), question(gt=["no", "Yes"])])
    [problem] = [problem for problem in look(root).problems if "about the same image with different" in problem.message]
    assert problem.count == 1 and "question 1, and test.jsonl: question 0" in problem.examples[0]


def test_a_question_that_is_always_answered_alike(tmp_path):
    rows = [question(f"images/{i}.png", "yes", text="A cell?") for i in range(20)]
    rows += [question(f"images/{i}.png", ("yes", "no")[i % 2], text="A plate?") for i in range(20)]
    found = [
        problem for problem in look(write(tmp_path, [training()], rows)).problems if "nearly always" in problem.message
    ]
    assert [problem.examples for problem in found] == [["'a cell?': 'yes', 20 of 20 times"]]


def test_what_is_in_training_and_in_testing_is_remembered_and_told(tmp_path, caplog):
    from mslora_cr.data.sources import leaks

    rows = [question("images/train0.png"), question("images/new.png", patient="p"), question("images/other.png")]
    root = write(tmp_path, [training(image="images/train0.png", patient="p")], rows)
    look(root)
    [folder] = [path.parent for path in root.rglob("leaks.json")]
    opened = TestRecords(folder / "test.jsonl")
    leaks.tell.cache_clear()
    leaks.tell("mine", folder, opened.digest)
    assert "2 of 3 test questions are about what is trained on, too (1 images, 1 patients)" in caplog.text
    assert leaks.remembered(folder, "0" * 64) is None
    write(tmp_path, [training(image="images/train0.png")], [question("images/new.png")])
    look(root)
    clean = leaks.remembered(folder, TestRecords(folder / "test.jsonl").digest)
    assert clean is not None and not clean.any and leaks.sentences({"mine": clean}) == {}


def test_a_val_jsonl_is_checked_against_training_and_testing(root):
    copy = root / "PathVQA/images/test2.png"
    copy.write_bytes((root / "PathVQA/images/train1.png").read_bytes())
    rows = [question("images/train0.png"), question("images/test1.png", patient="p"), question("images/test2.png", "")]
    rows += [question("images/none.png")]
    (root / "PathVQA/val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = [question("images/test0.png", patient="p"), question("images/test1.png")]
    write(root, [training(f"images/train{i}.png") for i in range(4)], test)
    report = look(root)
    assert (report.validation_rows, report.shared_images) == (4, 0)
    warnings, errors = messages(report, "warning"), messages(report, "error")
    assert "images in both the training and the validation file (1): ['images/train0.png']" in warnings
    assert "images in both the test and the validation file (1): ['images/test1.png']" in warnings
    assert "patients in both the test and the validation file (1): ['p']" in warnings
    assert "validation images that are, under another name, also training images (1)" in warnings
    assert "val.jsonl: question 2 (id 1)" in errors and "val.jsonl: images that are missing" in errors
