"""What is read from tables, conversations, Arrow and folders: never cut, joined or guessed, and counted where left out."""

import base64
import io
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mslora_cr.cli.main import main
from mslora_cr.data.answers.kinds import answer_kinds
from mslora_cr.data.records import DataError, TestRecords, TrainingRecords
from mslora_cr.data.rows import arrow as arrow_module
from mslora_cr.data.rows import arrow_sizes
from mslora_cr.data.rows import read as read_module
from mslora_cr.data.rows.read import read_rows
from mslora_cr.data.rows.row import Columns, Row
from mslora_cr.data.sources.convert import convert

HEADER = "image,question,answer\n"


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 7, 9)).save(file, "PNG")
    return file.getvalue()


def read(path: Path, text: str | bytes, columns: Columns | None = None, ask: str | None = None) -> list[Any]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_rows(path, columns or Columns(), ask))


def answers(rows: list[Any]) -> list[Any]:
    return [row.turns[1][1] if isinstance(row, Row) else row for row in rows]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.png,What?,a cyst, solid\nb.png,What?,mass,,\n", [("more fields", "line 2"), "mass"]),
        ("a.png,What?\n\nb.png,What?,mass\n", [("fewer fields than the header has", "line 2"), "mass"]),
        ('a.png,A 5" nodule?,yes\nb.png,What?,mass\n', [("a quote inside a field", "line 2"), "mass"]),
        ('a.png,"What\nis ""it""?","a, b"\nb.png,What?,mass\n', ["a, b", "mass"]),
        ("a.png,What?,one\u2028two\nb.png,What?,x\x85y\n", ["one\u2028two", "x\x85y"]),
    ],
)
def test_rows_that_do_not_fit_their_header(text: str, expected: list[Any], tmp_path: Path) -> None:
    found = answers(read(tmp_path / "t.csv", HEADER + text))
    assert len(found) == len(expected)
    for one, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, tuple):
            assert one[0].startswith(wanted[0]) and one[1].endswith(wanted[1])
        else:
            assert one == wanted


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (HEADER + 'a.png,"Is it?,yes\nb.png,Is "it?,no\n', "line 2: the row that begins there is quoted wrongly"),
        (HEADER + 'a.png,x,y\nb.png,"never closed,no\nc.png,x,y\n', "line 3: the row that begins there"),
        ("image,question,answer,answer\na.png,x,y,z\n", "two columns are called 'answer'"),
        (
            "Image,IMAGE,question,answer\na.png,b.png,y,z\n",
            "columns 'Image', 'IMAGE' could be meant; name one with --image",
        ),
        ("", "contains no table"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_line(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem):
        read(tmp_path / "t.csv", text)


@pytest.mark.parametrize(
    "text",
    [
        "image;question;answer\na.png;Is it, here?;yes\n",
        "sep=;\r\nimage;question;answer\r\na.png;Is it, here?;yes\r\n",
        "Image|Question|ANSWER\na.png|Is it, here?|yes\n",
        "image\tquestion\tanswer\na.png\tIs it, here?\tyes\n",
        'image,question,answer\na.png,"Is it, here?",yes\n'.encode("utf-16"),
        'image,question,answer\na.png,"Is it, here?",yes\n'.encode("utf-32"),
    ],
)
def test_a_table_is_read_however_it_is_separated(text: str | bytes, tmp_path: Path) -> None:
    [row] = read(tmp_path / "t.csv", text)
    assert (row.images, row.turns) == (("a.png",), (("human", "Is it, here?"), ("gpt", "yes")))


def test_a_table_in_utf_16_without_its_mark_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not UTF-8 text; save it as CSV in UTF-8"):
        read(tmp_path / "t.csv", (HEADER + "a.png,What?,yes\n").encode("utf-16-le"))


def test_a_table_in_latin_1_is_read_and_remarked_upon(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes((HEADER + "a.png,Où?,fémur\n").encode("latin-1"))
    remarks: list[str] = []
    [row] = read_rows(tmp_path / "t.csv", Columns(), None, remarks.append)
    assert isinstance(row, Row) and row.turns == (("human", "Où?"), ("gpt", "fémur")) and "Windows-1252" in remarks[0]


def test_pictures_in_base64_options_and_vlmevalkits_references(tmp_path: Path) -> None:
    picture = base64.b64encode(png()).decode()
    lines = ["index\timage\thint\tquestion\tA\tB\tC\tanswer", f"0\t{picture}\tLook well.\tWhat?\tlung\theart\t\tB"]
    lines += ["1\t0\t\tWhere?\tleft\tright\tboth\tA", f"2\tdata:image/png;base64,{picture}\t\tWho?\tx\ty\t\tA"]
    lines += [f"3\t{picture[:-9]}!\t\tWho?\tx\ty\t\tA", f"4\t{'n' * 2_000}\t\tWho?\tx\ty\t\tA"]
    first, second, third, damaged, long = read(tmp_path / "bench.tsv", "\n".join(lines) + "\n")
    assert first.images == second.images == third.images == (png(),)
    assert first.turns[0][1] == "Look well.\nWhat?" and first.options == {"A": "lung", "B": "heart"}
    assert second.options == {"A": "left", "B": "right", "C": "both"}
    assert "base64 that is damaged" in damaged[0] and "more than 1,000 characters" in long[0]


def test_options_reach_training_and_testing(tmp_path: Path) -> None:
    rows = ["image,question,choices,answer,sex,age,patient"]
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(png(number * 20))
        rows.append(
            f"{number}.png,What is it?,lung|heart,{('lung', 'B')[number % 2]},{'FM'[number % 2]},{40 + number},{number}"
        )
    rows.append("0.png,What is it?,lung|heart,liver,F,,0")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    words = ["data", "convert", str(tmp_path / "t.csv"), "--output", str(tmp_path / "d"), "--options", "choices"]
    assert main([*words, "--attributes", "sex", "age"]) == 0
    train, test = TrainingRecords(tmp_path / "d" / "train.json"), TestRecords(tmp_path / "d" / "test.jsonl")
    for record in test:
        number = int(str(record.patient))
        assert record.options == {"A": "lung", "B": "heart"} and record.gt == "AB"[number % 2]
        assert record.attributes == {"sex": "FM"[number % 2], "age": 40 + number}
        assert (record.answer_kind, record.answer_type) == ("choice", "CLOSED")
    assert "A. lung\nB. heart\nAnswer with" in train[0].turns[0].text and {r.turns[1].text for r in train} == {"A", "B"}
    report = json.loads((tmp_path / "d" / "convert.json").read_text())
    assert report["left_out"]["a true answer that is none of the options"]["count"] == 1


def test_omnimedvqa_and_flat_lists(tmp_path: Path) -> None:
    omni = {"question_id": "x_0", "question": "Which modality?", "gt_answer": "CT", "image_path": "Images/a.png"}
    omni |= {"option_A": "MR", "option_B": "CT", "modality_type": "CT(Computed Tomography)", "dataset": "ACRIN"}
    flat = {"image": "b.png", "question": "Is it?", "answer": "no", "Patient ID": 3}
    first, second = read(tmp_path / "q.json", json.dumps([omni, flat]))
    assert first.options == {"A": "MR", "B": "CT"} and first.turns[1] == ("gpt", "CT")
    assert first.attributes == {"dataset": "ACRIN", "modality_type": "CT(Computed Tomography)"}
    assert (second.group, second.turns[1][1]) == ("3", "no")


def chat(question: str = "<image>\nWhat?", **more: Any) -> dict[str, Any]:
    return {
        "image": "a.png",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "x"}],
        **more,
    }


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    text = "".join(json.dumps(chat(f"one{mark}two"), ensure_ascii=False) + "\n" for mark in "\u2028\u0085\x0b\u2029")
    rows = read(tmp_path / "c.jsonl", text)
    assert [row.turns[0][1] for row in rows] == [f"one{mark}two" for mark in "\u2028\u0085\x0b\u2029"]


def test_a_patients_number_is_the_same_with_and_without_a_decimal(tmp_path: Path) -> None:
    """A column with a missing value turns 7 into 7.0; a UID that ends so stays as it is."""
    names = ["7", "7.0", "07", "1.2.0", ""]
    table = "image,question,answer,patient\n" + "".join(f"a.png,What?,yes,{name}\n" for name in names)
    assert [row.group for row in read(tmp_path / "t.csv", table)] == ["7", "7", "07", "1.2.0", None]
    [row] = read(tmp_path / "c.json", json.dumps([chat(patient=7.0)]))
    assert row.group == "7"


def test_parts_of_conversations_are_counted(tmp_path: Path) -> None:
    later = chat()
    later["conversations"] += [{"from": "human", "value": "And <image>?"}, {"from": "gpt", "value": "y"}]
    items = [
        chat(system="Be brief."),
        chat("First <image> then <image>?"),
        later,
        chat(subject_id=4),
        chat("What? <image>"),
    ]
    system, inside, moved, patient, plain = read(tmp_path / "c.json", json.dumps(items))
    assert system.dropped[0].startswith("a system text") and "inside a question" in inside.dropped[0]
    assert moved[0].startswith("a picture that is shown with a later turn")
    assert patient.group == "4" and not patient.dropped and not plain.dropped
    odd = [chat(conversations=[{"from": ["human"], "value": "?"}]), chat(image=[["a.png"]])]
    assert [problem for problem, _ in read(tmp_path / "odd.json", json.dumps(odd))] == [
        "a turn without a known speaker and a text",
        "images in lists of lists",
    ]


def messages(*parts: Any, answer: Any = "yes", **further: Any) -> dict[str, Any]:
    """A conversation as processors of transformers take it."""
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}], **further}


def test_messages_whose_content_is_a_list_of_parts(tmp_path: Path) -> None:
    ask, url = {"type": "text", "text": "What?"}, f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    thought = [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "yes"}]
    items = [
        messages({"type": "image"}, ask, images=["a.png"]),
        messages({"type": "image_url", "image_url": {"url": url}}, ask, answer=thought),
        messages({"type": "image", "path": "b.png"}, {"type": "image", "url": "c.png"}, ask, "Where?"),
        messages({"type": "video", "video": "x.mp4"}, ask, images=["a.png"]),
        messages({"type": "image", "image": "a.png"}, ask, images=["b.png"]),
        messages({"type": "image"}, ask, answer=[{"type": "image"}], images=["a.png"]),
        messages({"type": "image"}, {"type": "text", "text": None}, images=["a.png"]),
        messages(["image"], images=["a.png"]),
    ]
    beside, inline, two, video, both, later, *odd = read(tmp_path / "m.json", json.dumps(items))
    assert (beside.images, beside.turns) == (("a.png",), (("human", "What?"), ("gpt", "yes"))) and not beside.dropped
    assert inline.images == (png(),) and inline.turns == beside.turns
    assert inline.dropped == ("a part of an answer that is no text ('reasoning')",)
    assert two.images == ("b.png", "c.png") and two.turns[0][1] == "What?\nWhere?"
    assert video[0] == "a part of a question that is neither text nor picture ('video')"
    assert both[0].startswith("pictures both inside") and later[0].startswith("an empty turn")
    assert [problem for problem, _ in odd] == [
        "a part of a question that is neither text nor picture ('text')",
        "a part of a question that is neither text nor picture (None)",
    ]


def test_of_a_file_with_a_damaged_page_nothing_is_left(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (64, 64), (40 * number, 0, 0)) for number in range(3)]
    file = tmp_path / "a.tif"
    pages[0].save(file, save_all=True, append_images=pages[1:], compression="tiff_adobe_deflate")
    with Image.open(file) as image:
        image.seek(2)
        start, content = image.tag_v2[273][0], bytearray(file.read_bytes())  # type: ignore[attr-defined]
    content[start : start + 8] = b"\xff" * 8
    file.write_bytes(content)
    (tmp_path / "b.png").write_bytes(png(1))
    (tmp_path / "c.png").write_bytes(png(2))
    table = HEADER + "a.tif,?,x\nb.png,?,y\nc.png,?,y\n"
    (tmp_path / "t.csv").write_text(table)
    converted = convert(tmp_path / "t.csv", tmp_path / "out")
    assert converted.images == 2 and sorted(path.name for path in (tmp_path / "out/images").iterdir()) == [
        "b.png",
        "c.png",
    ]
    assert "a.tif" in converted.left_out["an image that is missing or cannot be read"][0]


def test_names_in_another_unicode_form_and_jpg_stay(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "fe\u0301mur.jpg")  # decomposed, as macOS writes it
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "b.jpg")
    (tmp_path / "t.csv").write_text(HEADER + "f\u00e9mur.jpg,Is it?,yes\nb.jpg,Is it?,no\n", encoding="utf-8")
    convert(tmp_path / "t.csv", tmp_path / "d")
    assert {path.name for path in (tmp_path / "d" / "images").iterdir()} == {"f\u00e9mur.jpg", "b.jpg"}


def arrow(path: Path, columns: dict[str, Any], note: Any = None) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table(columns)
    if note is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path.parent


def test_missing_values_whole_numbers_and_dates_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    nan, image = math.nan, [{"bytes": png(i), "path": None} for i in range(4)]
    whole = arrow(
        tmp_path / "a" / "x.parquet", {"image": image, "question": ["?"] * 4, "answer": [1.0, nan, None, 3.0]}
    )
    rows = list(read_rows(whole, Columns(), None))
    assert answers(rows) == ["1", ("no answer", "x.parquet: row 1"), ("no answer", "x.parquet: row 2"), "3"]
    parts = arrow(tmp_path / "b" / "x.parquet", {"image": image, "question": ["?"] * 4, "answer": [1.0, 2.5, 2.0, 3.0]})
    assert answers(list(read_rows(parts, Columns(), None))) == ["1.0", "2.5", "2.0", "3.0"]
    far = pa.array([2**62, 0, 1, 2], pa.timestamp("us"))
    dates = arrow(tmp_path / "c" / "x.parquet", {"image": image, "question": ["?"] * 4, "answer": far})
    problems = Counter(problem for problem, _ in read_rows(dates, Columns(), None))  # type: ignore[misc]
    assert problems == {
        "a value that Python cannot hold, such as a date before the year 1": 1,
        "an answer that is a date or a time": 3,
    }
    lists = arrow(
        tmp_path / "d" / "x.parquet", {"image": image, "question": ["?"] * 4, "answer": [["a", "b"], ["c"], [], None]}
    )
    assert [one if isinstance(one, str) else one[0] for one in answers(list(read_rows(lists, Columns(), None)))] == [
        "an answer that is a list",
        "c",
        "an answer that is a list",
        "no answer",
    ]


@pytest.mark.parametrize(
    ("note", "problem"),
    [
        ({"info": {"features": {"answer": {"names": ["a", None]}}}}, "names of the classes of column 'answer'"),
        ({"info": {"features": {"answer": {"names": 3}}}}, "names of the classes of column 'answer'"),
        ({"info": {"features": ["x"]}}, None),
        ({"info": 3}, None),
        ([1], None),
        ({"info": {"features": {"answer": {"names": None}}}}, None),
    ],
)
def test_the_note_of_datasets_in_other_shapes(note: Any, problem: str | None, tmp_path: Path) -> None:
    folder = arrow(tmp_path / "x" / "d.parquet", {"image": ["a.png"], "question": ["?"], "answer": [0]}, note)
    if problem is None:
        assert answers(list(read_rows(folder, Columns(), None))) == ["0"]
    else:
        with pytest.raises(DataError, match=problem):
            list(read_rows(folder, Columns(), None))


def test_a_class_of_minus_one_is_none(tmp_path: Path) -> None:
    columns = {"image": ["a.png"] * 2, "question": ["?"] * 2, "answer": [-1, 1]}
    note = {"info": {"features": {"answer": {"names": ["no", "yes"]}}}}
    found = answers(list(read_rows(arrow(tmp_path / "x" / "d.parquet", columns, note), Columns(), None)))
    assert found == [("no answer", "d.parquet: row 0"), "yes"]


def test_a_file_without_a_split_beside_others_with_one(tmp_path: Path) -> None:
    columns = {"image": ["a.png"], "question": ["?"], "answer": ["x"]}
    for name in ("Train_00000", "eval-1", "dev.0"):
        folder = arrow(tmp_path / "x" / f"{name}.parquet", columns)
    rows = [row for row in read_rows(folder, Columns(), None) if isinstance(row, Row)]
    assert {row.location.split(":")[0]: row.split for row in rows} == {
        "Train_00000.parquet": "train",
        "eval-1.parquet": "test",
        "dev.0.parquet": "validation",
    }
    arrow(tmp_path / "x" / "more.parquet", columns)
    with pytest.raises(DataError, match=r"more\.parquet: its name tells no split, unlike those of other files"):
        list(read_rows(folder, Columns(), None))


def test_folders_named_by_class(tmp_path: Path) -> None:
    for split, name, number in (("train", "NORMAL", 1), ("train", "PNEUMONIA", 2), ("test", "NORMAL", 3)):
        place = tmp_path / "xray" / split / name
        place.mkdir(parents=True)
        (place / f"{number}.png").write_bytes(png(number))
    (tmp_path / "xray" / "beside.png").write_bytes(png(4))
    (tmp_path / "xray" / "test" / "again").symlink_to(tmp_path / "xray")  # a link that leads back up
    assert main(["data", "convert", str(tmp_path / "xray"), "--output", str(tmp_path / "d")]) == 0
    [question] = TestRecords(tmp_path / "d" / "test.jsonl")
    assert (question.text, question.gt) == ("Which of these does the image show: normal, pneumonia?", "normal")
    assert len(TrainingRecords(tmp_path / "d" / "train.json")) == 2
    left_out = json.loads((tmp_path / "d" / "convert.json").read_text())["left_out"]
    assert left_out["a file that is no picture in a folder named by class"]["examples"] == ["beside.png"]


VOC = "<annotation><filename>{0}.png</filename>{1}</annotation>"
BOX = "<object><name>{}</name></object>"


def test_columns_that_could_be_meant_as_well_are_named(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "t.csv").write_text("image,question,answer,Answer,subject,Patient ID\na.png,What?,x,y,s,p\n")
    [row] = read_rows(tmp_path / "t.csv", Columns(), None, said.append)
    assert isinstance(row, Row) and (row.turns[1][1], row.group) == ("x", "s")
    assert said == [
        "column 'answer' is read, though 'Answer' could be meant as well; name one with --answer",
        "column 'subject' names the patient, though 'Patient ID' may as well; choose with --group",
    ]
    [row] = read(tmp_path / "t.json", json.dumps([{"Image": "a.png", "Question": "What?", "Answer": "x"}]))
    assert row.turns == (("human", "What?"), ("gpt", "x"))


def test_an_annotation_takes_the_image_that_is_nearest(tmp_path: Path) -> None:
    """Image names may repeat from split to split, and beside a mask of the same name."""
    for number, split in enumerate(("train", "test")):
        for name in ("Annotations", "JPEGImages", "masks"):
            (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / "Annotations" / "1.xml").write_text(VOC.format(1, BOX.format("cell")))
        (tmp_path / split / "JPEGImages" / "1.png").write_bytes(png(number))
        (tmp_path / split / "masks" / "1.tif").write_bytes(png(number))
    rows = [row for row in read_rows(tmp_path, Columns(), None) if isinstance(row, Row)]
    assert {(row.split, row.images) for row in rows} == {
        ("train", ("train/JPEGImages/1.png",)),
        ("test", ("test/JPEGImages/1.png",)),
    }
    (tmp_path / "test" / "masks" / "1.png").write_bytes(png())
    problems = [row[0] for row in read_rows(tmp_path, Columns(), None) if not isinstance(row, Row)]
    assert problems == ["several images of the name that the annotation gives"]


def test_boxes_become_questions_of_presence_and_count(tmp_path: Path) -> None:
    folder = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    boxes = {"one": ["WBC", "RBC", "RBC"], "two": ["RBC"]}
    for number, (name, classes) in enumerate(boxes.items()):
        (folder / "Annotations" / f"{name}.xml").write_text(VOC.format(name, "".join(map(BOX.format, classes))))
        (folder / "JPEGImages" / f"{name}.png").write_bytes(png(number))
    (folder / "Annotations" / "bomb.xml").write_text('<!DOCTYPE x [<!ENTITY a "b">]><annotation>&a;</annotation>')
    (folder / "JPEGImages" / "three.png").write_bytes(png(3))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("one\n")
    (folder / "ImageSets" / "Main" / "test.txt").write_text("two\n")
    rows = list(read_rows(folder, Columns(), None))
    expected = [
        ("train", "Is there a RBC in the image?", "yes"),
        ("train", "How many objects of the kind RBC are in the image?", "2"),
        ("train", "Is there a WBC in the image?", "yes"),
        ("train", "How many objects of the kind WBC are in the image?", "1"),
        ("test", "Is there a RBC in the image?", "yes"),
        ("test", "How many objects of the kind RBC are in the image?", "1"),
        ("test", "Is there a WBC in the image?", "no"),
    ]
    assert [(row.split, row.turns[0][1], row.turns[1][1]) for row in rows if isinstance(row, Row)] == expected
    assert [row for row in rows if not isinstance(row, Row)] == [
        ("an annotation that cannot be read ('it defines entities')", "Annotations/bomb.xml"),
        ("an image without an annotation", "JPEGImages/three.png"),
    ]
    coco = {
        "images": [{"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": "two.png"}],
        "categories": [{"id": 1, "name": "RBC"}, {"id": 2, "name": "WBC"}],
        "annotations": [{"image_id": i, "category_id": c} for i, c in ((1, 2), (1, 1), (1, 1), (2, 1))],
    }
    found = read(tmp_path / "boxes.json", json.dumps(coco))
    assert [(row.turns[0][1], row.turns[1][1]) for row in found] == [row[1:] for row in expected]


@pytest.mark.parametrize(
    ("output", "problem"), [("", "would be replaced"), ("d/inside", "lies in"), ("link", "a link")]
)
def test_an_output_where_it_should_not_be(output: str, problem: str, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    for name in ("no", "yes"):
        (folder / name).mkdir(parents=True)
        (folder / name / "a.png").write_bytes(png())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "convert.json").write_text('{"left_out": {}}')
    with pytest.raises(DataError, match=problem):
        convert(folder, tmp_path / output)
    assert (folder / "no" / "a.png").is_file() and not list((tmp_path / "elsewhere").iterdir())


def test_most_rows_left_out_fails_with_the_share(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [f"{number}.png,Is it?,yes" for number in range(5)]
    (tmp_path / "t.csv").write_text(HEADER + "\n".join(rows))
    assert main(["data", "convert", str(tmp_path / "t.csv"), "--output", str(tmp_path / "d")]) == 1
    assert "left out, an image that is missing or cannot be read: 3 (60.0%)" in capsys.readouterr().out


def test_kinds_of_answers() -> None:
    asked = ["How many?"] * 3 + ["Which?"] * 6 + ["Why?"] * 2 + ["Is it?"]
    said = ["1", "2", "-3.5", "a|b", "a", "b", "a|c", "c", "b|c", "so, then", "because", "no"]
    kinds = answer_kinds(asked, said, [False] * 11 + [True])
    assert kinds == ["number"] * 3 + ["set"] * 6 + ["text"] * 2 + ["choice"]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
def test_more_rows_than_can_be_held_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / name
    if name == "t.parquet":
        columns = {key: pyarrow.nulls(40) for key in ("image", "question", "answer")}
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        path.write_text("null\n" * 40 if name == "t.jsonl" else HEADER + "a,b\n" * 40)
    source = tmp_path if name == "t.parquet" else path
    assert len(list(read_rows(source, Columns(), None))) == 40
    monkeypatch.setattr(read_module, "MOST_ROWS", 39)
    with pytest.raises(DataError, match=r"more than 39 rows; convert it in parts"):
        list(read_rows(source, Columns(), None))


def test_large_values_of_a_row_group_are_decoded_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text that all rows share takes little space in a file, and as much as all of them once it is read."""
    pyarrow = pytest.importorskip("pyarrow")
    shared = ["x" * 100_000] * 64
    table = pyarrow.table({"image": ["a.png"] * 64, "question": ["?"] * 64, "answer": shared})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 50_000
    monkeypatch.setattr(arrow_module, "BYTES_AT_ONCE", 1 << 20)
    _, batches, _ = arrow_module._opened(tmp_path / "t.parquet")
    assert max(batch.num_rows for batch in batches(["answer"])) <= 10
    assert answers(list(read_rows(tmp_path, Columns(), None))) == shared
    monkeypatch.setattr(arrow_module, "MOST_GROUP_BYTES", 90_000)
    with pytest.raises(DataError, match=r"row group 0 unpacks to .* bytes, more than 90,000"):
        list(read_rows(tmp_path, Columns(), None))


def zigzag(number: int) -> bytes:
    """A number of 15 to 21 bits as Thrift writes it."""
    return bytes([2 * number & 127 | 128, number >> 6 & 127 | 128, number >> 13])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_parquet_file_whose_footer_says_less_than_its_pages(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    columns = {"image": ["a.png"] * 3, "question": ["?"] * 3, "answer": ["0" * 9_000] * 3}
    path = arrow(tmp_path / "x" / "d.parquet", columns) / "d.parquet"
    options = {"compression": "zstd", "use_dictionary": False, "data_page_version": version}
    parquet.write_table(parquet.read_table(path), path, **options)
    assert answers(list(read_rows(path.parent, Columns(), None))) == ["0" * 9_000] * 3
    group = parquet.ParquetFile(path).metadata.row_group(0)
    said = {group.column(2).total_uncompressed_size, group.total_byte_size}
    content, footer = path.read_bytes(), -8 - int.from_bytes(path.read_bytes()[-8:-4], "little")
    for size in said:
        assert zigzag(size) in content[footer:]
        content = content[:footer] + content[footer:].replace(zigzag(size), zigzag(16_384))
    path.write_bytes(content)
    assert parquet.ParquetFile(path).metadata.row_group(0).column(2).total_uncompressed_size == 16_384
    monkeypatch.setattr(arrow_module, "MOST_GROUP_BYTES", 20_000)
    with pytest.raises(DataError, match="row group 0 unpacks to 27,"):
        list(read_rows(path.parent, Columns(), None))


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_compressed_arrow_file_that_unpacks_to_too_much(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    from pyarrow import ipc

    table = pa.table({"image": ["a.png"] * 3, "question": ["?"] * 3, "answer": pa.array(["x"] * 3).dictionary_encode()})
    table = table.append_column("further", [["0" * 9_000] * 3])
    options = ipc.IpcWriteOptions(compression="zstd")
    with getattr(ipc, f"new_{kind}")(str(tmp_path / "train.arrow"), table.schema, options=options) as file:
        file.write_table(table)
    assert answers(list(read_rows(tmp_path, Columns(), None))) == ["x"] * 3
    monkeypatch.setattr(arrow_sizes, "MOST_UNPACKED_BYTES", 20_000)
    with pytest.raises(DataError, match="a batch unpacks to 27,"):
        list(read_rows(tmp_path, Columns(), None))


def test_whole_numbers_of_a_table_with_gaps_and_an_unused_split_column(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    rows = [f"images/{number}.png,How many?,{number}.0,test\n" for number in range(6)]
    rows += [f"images/{number}.png,Which?,grade 1.0,test\n" for number in range(6)]
    (tmp_path / "t.csv").write_text("image,question,answer,Subset\n" + "".join(rows))
    converted = convert(tmp_path / "t.csv", tmp_path / "out")
    answered = [row.turns[1].text for row in TrainingRecords(tmp_path / "out" / "train.json")]
    answered += [row.gt for row in TestRecords(tmp_path / "out" / "test.jsonl")]
    assert sorted(answered) == ["0", "1", "2", "3", "4", "5", *["grade 1.0"] * 6]
    remarks = " ".join(converted.remarks)
    assert "written as 2.0; they are kept as 2" in remarks and "column 'Subset' may say which rows" in remarks
