import hashlib
import json
import os
import pickle
import time
import tracemalloc
from pathlib import Path

import pytest

from mslora_cr.data import json_list, records
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords, Turn

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_a" / "conversations.json"
HUMAN = {"from": "human", "value": "<image>\nWhat is shown?"}
GPT = {"from": "gpt", "value": "The liver."}
GOOD = {"id": "a", "image": "images/a.png", "conversations": [HUMAN, GPT]}
QUESTION = {"question_id": 1, "image": "a.png", "text": "Is it?", "gt": "yes", "answer_type": "CLOSED"}


def write(path: Path, content: bytes | str | list) -> Path:
    if isinstance(content, list):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*items: dict) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def test_golden_conversations_are_read_as_they_are():
    opened = TrainingRecords(GOLDEN)
    expected = json.loads(GOLDEN.read_text())
    assert len(opened) == len(expected) == 24
    assert opened.digest == hashlib.sha256(GOLDEN.read_bytes()).hexdigest()
    for record, raw in zip(opened, expected, strict=True):
        assert record.id == raw["id"]
        assert record.images == ((raw["image"],) if "image" in raw else ())
        assert [(turn.speaker, turn.text) for turn in record.turns] == [
            (turn["from"], turn["value"]) for turn in raw["conversations"]
        ]


def test_access_by_index_slice_and_after_pickling(tmp_path):
    raw = [{**GOOD, "id": f"é病{i}"} for i in range(5)]
    path = write(tmp_path / "train.json", " \n" + json.dumps(raw, ensure_ascii=False, indent=2) + "\n\n")
    opened = pickle.loads(pickle.dumps(TrainingRecords(path)))  # noqa: S301
    assert [record.id for record in opened] == [f"é病{i}" for i in range(5)]
    assert opened[-1] == opened[4] and opened[-1].id == "é病4"
    assert [record.id for record in opened[1:4:2]] == ["é病1", "é病3"]
    assert opened[0].turns[1] == Turn(speaker="gpt", text="The liver.")
    with pytest.raises(IndexError):
        opened[5]


def test_records_may_lie_across_the_chunks_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 7)  # splits characters, strings and separators alike
    raw = [{**GOOD, "id": i, "conversations": [HUMAN, {**GPT, "value": "é病" * i}]} for i in range(30)]
    for text in (json.dumps(raw), json.dumps(raw, ensure_ascii=False, indent=3)):
        opened = TrainingRecords(write(tmp_path / "train.json", text))
        assert [(record.id, record.turns[1].text) for record in opened] == [(i, "é病" * i) for i in range(30)]


def test_image_is_a_name_a_list_or_absent(tmp_path):
    plain = [{**HUMAN, "value": "What is shown?"}, GPT]
    raw = [GOOD, {**GOOD, "image": ["a", "b"]}, {**GOOD, "image": None, "conversations": plain}, {**GOOD, "extra": 1.5}]
    raw.append({"id": "b", "conversations": plain})
    opened = TrainingRecords(write(tmp_path / "train.json", raw))
    assert [record.images for record in opened] == [("images/a.png",), ("a", "b"), (), ("images/a.png",), ()]


def test_questions_are_read_line_by_line(tmp_path):
    content = lines(QUESTION, {**QUESTION, "image": ["a", "b"]}) + "\n  \n" + lines({**QUESTION, "text": "é"})
    opened = TestRecords(write(tmp_path / "test.jsonl", content))
    assert [record.images for record in opened] == [("a.png",), ("a", "b"), ("a.png",)]
    assert opened[2].text == "é" and opened[2].answer_type == "CLOSED"
    assert [opened.location(i) for i in range(3)] == ["line 1", "line 2", "line 5"]
    assert opened.digest == hashlib.sha256(opened.path.read_bytes()).hexdigest()


def test_a_sample_of_records_has_both_kinds_where_they_alternate(tmp_path):
    """As in Fitzpatrick17k's annotations: diagnosis, malignancy, diagnosis, … Every n-th would be one kind only."""
    kinds = [f"{number}-{kind}" for number in range(200) for kind in ("diagnosis", "malignancy")]
    opened = TestRecords(write(tmp_path / "test.jsonl", lines(*({**QUESTION, "question_id": kind} for kind in kinds))))
    some = [record.question_id for record in opened.thinned(40)]
    assert len(some) == 40 and some == sorted(some, key=kinds.index)
    assert 10 <= sum(name.endswith("malignancy") for name in some) <= 30
    assert [record.question_id for record in opened.thinned(40)] == some
    assert [record.question_id for record in opened.thinned(400)] == kinds


def test_a_byte_order_mark_is_read_over(tmp_path):
    records = [GOOD, {**GOOD, "id": "é"}]
    opened = TrainingRecords(
        write(tmp_path / "train.json", json.dumps(records, ensure_ascii=False).encode("utf-8-sig"))
    )
    assert [opened[index].id for index in range(2)] == [record.id for record in opened] == [GOOD["id"], "é"]
    content = ("\n" + lines(QUESTION, {**QUESTION, "text": "é"})).encode("utf-8-sig")
    for text in (content, content.replace(b"\n", b"", 1)):
        questions = TestRecords(write(tmp_path / "test.jsonl", text))
        assert [questions[index].text for index in range(2)] == [QUESTION["text"], "é"]
        assert [questions.location(index)[-1] for index in range(2)] == (["2", "3"] if text is content else ["1", "2"])
        assert questions.digest == hashlib.sha256(text).hexdigest()


G = json.dumps(GOOD)
BAD_TRAINING = {
    "empty": (b"", "expected one list"),
    "empty list": ("[]", "no records"),
    "two byte order marks": (f"\ufeff[{G}]".encode("utf-8-sig"), "expected one list"),
    "object": ("{}", "expected one list"),
    "lines": (lines(GOOD, GOOD), "expected one list"),
    "numbers": ("[1]", "record 0: expected an object"),
    "string": (f'[{G}, "x"]', "record 1: expected an object"),
    "cut after a record": (f"[{G}", "record 0: the file ends inside the list"),
    "cut after a comma": (f"[{G},", "record 1: the file ends inside the list"),
    "cut inside": (f"[{G}, {G[:-4]}", "record 1: not valid JSON"),
    "comma too many": (f"[{G},]", "record 1: expected an object"),
    "comma too few": (f"[{G} {G}]", "record 0: expected ',' or ']'"),
    "trailing": (f"[{G}] x", "unexpected content after the end"),
    "two lists": (f"[{G}][]", "unexpected content after the end"),
    "not UTF-8": (f"[{G},é]".encode("latin-1"), "not UTF-8"),
    "not UTF-8, cut": (f"[{G}]é".encode()[:-1], "not UTF-8"),
    "syntax": (f"[{G}, {G.replace('}', '', 1)}]", "record 1: not valid JSON"),
    "huge number": ("[" + G.replace('"a"', "1" * 5000) + "]", "digits"),
    "NaN": ("[" + G.replace('"a"', "NaN") + "]", "NaN is not JSON"),
    "depth": ('[{"a":' * 100_000, "nested too deeply"),
    "half a surrogate": ("[" + G.replace("liver", "\\ud83d") + "]", r"conversations\[1\].value.*surrogate"),
    "id a bool": ([GOOD, {**GOOD, "id": True}], "record 1: field 'id': .*found True"),
    "id a float": ([{**GOOD, "id": 1.5}], "field 'id': should be a string or an integer"),
    "no id": ([{"conversations": [HUMAN]}], "field 'id' is missing"),
    "no turns": ([{**GOOD, "conversations": []}], "field 'conversations' is empty"),
    "turns a text": ([{**GOOD, "conversations": "x"}], "field 'conversations': should be a list; found 'x'"),
    "speaker": (
        [{**GOOD, "conversations": [{**HUMAN, "from": "user"}]}],
        r"\[0\].from': should be 'human' or 'gpt'",
    ),
    "turn without text": ([{**GOOD, "conversations": [HUMAN, {"from": "gpt"}]}], r"\[1\].value' is missing"),
    "text a number": (
        [{**GOOD, "conversations": [{**HUMAN, "value": 3}]}],
        r"\[0\].value': should be a valid string",
    ),
    "image a number": ([{**GOOD, "image": 3}], "field 'image': should be a name or a list of names; found 3"),
    "image in list": ([{**GOOD, "image": ["a", 3]}], r"field 'image\[1\]'"),
}


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_malformed_training_files_are_refused(name, tmp_path):
    content, message = BAD_TRAINING[name]
    path = write(tmp_path / "train.json", content)
    with pytest.raises(DataError, match=message) as caught:
        TrainingRecords(path)
    assert str(caught.value).startswith(str(path))


MARK = {"value": "see <image>"}
AGAIN = {"from": "human", "value": "And?"}
MISPLACED = {
    "answer": ([HUMAN, {**GPT, **MARK}], 1),
    "later question": ([HUMAN, GPT, {**AGAIN, **MARK}, GPT], 2),
    "later answer": ([HUMAN, GPT, AGAIN, {**GPT, **MARK}], 3),
    "unanswered question": ([HUMAN, GPT, {**AGAIN, **MARK}], 2),
    "opening answer": ([{**GPT, **MARK}, HUMAN, GPT], 0),
    "question behind two answers": ([GPT, GPT, HUMAN], 2),
    "second answer in place of a question": ([GPT, {**GPT, **MARK}], 1),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_an_image_mark_outside_the_first_question_is_refused(name, tmp_path):
    turns, place = MISPLACED[name]
    path = write(tmp_path / "train.json", [GOOD, {**GOOD, "conversations": turns}])
    with pytest.raises(DataError) as caught:
        TrainingRecords(path)
    problem = "contains an <image> marker, but only the first question may contain one"
    assert str(caught.value) == f"{path}: record 1: field 'conversations[{place}].value': {problem}"


@pytest.mark.parametrize("images", [{}, {"image": None}, {"image": []}])
def test_an_image_mark_without_an_image_is_refused(images, tmp_path):
    record = {"id": 1, "conversations": [HUMAN, GPT], **images}
    with pytest.raises(DataError, match=r"record 0: field 'conversations\[0\].value': .*names no image"):
        TrainingRecords(write(tmp_path / "train.json", [record]))


@pytest.mark.parametrize(
    "text", ["What <image> is it?", "What is it?\n<image>", "<image>\n<image>\nWhat is it?", "What?"]
)
def test_image_marks_may_stand_anywhere_in_the_first_question_and_in_test_questions(text, tmp_path):
    for turns in ([{**HUMAN, "value": text}, GPT], [GPT, {**HUMAN, "value": text}, GPT]):
        record = TrainingRecords(write(tmp_path / "train.json", [{**GOOD, "conversations": turns}]))[0]
        assert record.turns[-2].text == text
    assert TestRecords(write(tmp_path / "test.jsonl", lines({**QUESTION, "text": text})))[0].text == text


Q = json.dumps(QUESTION)
BAD_TEST = {
    "empty": ("\n\n", "no records"),
    "two byte order marks": (f"\ufeff{Q}".encode("utf-8-sig"), "line 1: not valid JSON"),
    "list": (f"[{Q}]", "line 1: expected an object .* on each line, found the start of a list"),
    "list, indented": (json.dumps([QUESTION], indent=1), "line 1: expected an object .* on each line, found the start"),
    "syntax": (f"{Q}\n\n{Q[:-1]}\n", "line 3: not valid JSON"),
    "two on a line": (f"{Q} {Q}", "line 1: not valid JSON: Extra data"),
    "not UTF-8": (Q.encode() + b"\n\xff", "line 2: not UTF-8"),
    "huge number": (Q.replace("1", "1" * 5000), "line 1: .*digits"),
    "Infinity": (Q.replace("1", "-Infinity"), "line 1: .*-Infinity is not JSON"),
    "depth": ('{"a":' * 100_000, "line 1: nested too deeply"),
    "no image": (lines({**QUESTION, "image": None}), "line 1: field 'image' is empty"),
    "answer type": (
        lines(QUESTION, {**QUESTION, "answer_type": "open"}),
        "line 2: field 'answer_type'.*'OPEN' or",
    ),
    "gt a number": (lines({**QUESTION, "gt": 2}), "field 'gt': should be a valid string; found 2"),
}


@pytest.mark.parametrize("name", BAD_TEST)
def test_malformed_test_files_are_refused(name, tmp_path):
    content, message = BAD_TEST[name]
    with pytest.raises(DataError, match=message):
        TestRecords(write(tmp_path / "test.jsonl", content))


def test_a_missing_file_and_one_changed_behind_our_back(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        TrainingRecords(tmp_path / "train.json")
    path = write(tmp_path / "test.jsonl", lines(QUESTION, QUESTION))
    opened = TestRecords(path)
    for changed in ("x" * 10 + lines(QUESTION, QUESTION), lines(QUESTION, {**QUESTION, "gt": 123})):
        write(path, changed)
        with pytest.raises(DataError, match="changed since"):
            opened[1]


def test_endless_records_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 100)
    for module in (records, json_list):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    long = {**GOOD, "extra": "x" * 5000}
    with pytest.raises(DataError, match="record 0: a record of more than 16 MB"):
        TrainingRecords(write(tmp_path / "train.json", [long]))
    with pytest.raises(DataError, match="line 1: a record of more than 16 MB"):
        TestRecords(write(tmp_path / "test.jsonl", lines({**QUESTION, "extra": "x" * 5000})))
    monkeypatch.setattr(json_list, "CHUNK_BYTES", 10_000)  # the record is in the window already
    with pytest.raises(DataError, match="record 0: a record of more than 16 MB"):
        TrainingRecords(write(tmp_path / "train.json", [long]))


def test_blanks_are_skipped_in_one_step(tmp_path):
    path = write(tmp_path / "train.json", json.dumps([GOOD]).replace("[", "[" + " " * 30_000_000, 1))
    start = time.process_time()
    opened = TrainingRecords(path)
    assert time.process_time() - start < 3
    assert len(opened) == 1 and opened[0].id == GOOD["id"]


def test_a_fifo_is_not_waited_for(tmp_path):
    for kind in (TrainingRecords, TestRecords):
        os.mkfifo(tmp_path / kind.__name__)
        with pytest.raises(DataError, match="not a regular file"):
            kind(tmp_path / kind.__name__)


def test_memory_stays_bounded(tmp_path):
    """14 MB of records are opened with a few chunks held at a time, and kept in 16 bytes each."""
    raw = {**GOOD, "conversations": [HUMAN, {**GPT, "value": "word " * 150}]}
    path = write(tmp_path / "train.json", [raw] * 16000)
    assert path.stat().st_size > 13_000_000
    tracemalloc.start()
    opened = TrainingRecords(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * json_list.CHUNK_BYTES
    assert len(pickle.dumps(opened)) < 17 * len(opened)


def test_a_question_may_have_options_several_truths_attributes_and_a_kind(tmp_path):
    path = tmp_path / "test.jsonl"
    more = {"options": ["lung", "heart"], "gt": ["B", "Heart", "B"], "answer_kind": "choice"}
    path.write_text(lines({**QUESTION, **more, "attributes": {"sex": "F", "age": 63, "site": None}}, QUESTION))
    record, plain = TestRecords(path)
    assert record.options == {"A": "lung", "B": "heart"} and record.attributes == {"sex": "F", "age": 63}
    assert (record.truths, record.gt, record.answer_kind) == (("B", "Heart", "B"), "B", "choice")
    question = "Is it?\nA. lung\nB. heart\nAnswer with the option's letter from the given choices directly."
    assert record.question == question and plain.question == plain.text == "Is it?"
    assert (plain.truths, plain.gt, plain.options, plain.attributes) == (("yes",), "yes", {}, {})


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"options": ["lung"]}, "field 'options': should offer between 2 and 26 options, not 1"),
        ({"options": {"A": "lung", "C": "heart"}}, "should name its options A, B, in this order, not A, C"),
        ({"options": ["lung", ""]}, "field 'options': should hold texts alone, none of them empty"),
        ({"options": ["lung", "heart"]}, r"'yes' is none of the options \(A. lung, B. heart\)"),
        ({"gt": []}, "field 'gt' is empty"),
        ({"gt": ["yes", 2]}, r"field 'gt\[1\]': should be a valid string; found 2"),
        ({"attributes": {"age": True}}, "should hold texts and numbers alone, but 'age' is neither"),
        ({"atributes": {}}, "field 'atributes' is not known; did you mean 'attributes'"),
        ({"patients": 3}, "field 'patients' is not known; did you mean 'patient'"),
        ({"answer_kind": "letter"}, "field 'answer_kind': should be 'choice', 'number', 'set' or 'text'"),
    ],
)
def test_new_fields_are_strict(changed, problem, tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(lines({**QUESTION, **changed}))
    with pytest.raises(DataError, match=problem):
        TestRecords(path)
