"""Hostile inputs of `data convert`: tables, lists of JSON, Arrow and Parquet, folders, boxes, scans, places to write to."""

from __future__ import annotations

import gzip
import io
import json
import warnings
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from tests.fuzz import hostile

TURNS = [{"from": "human", "value": "<image>\nWhat is seen?"}, {"from": "gpt", "value": "a cell"}]
OUTPUTS = ["out"] * 6 + [
    ".",
    "..",
    "images",
    "images/out",
    "link",
    "source",
    "source/out",
    "fifo",
    "x" * 300,
    "../inside/out",
]


def _images(folder: Path) -> None:
    (folder / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 6), (60 * number, 0, 9)).save(folder / "images" / f"{number}.png")


def _command(folder: Path, source: str, random: Random, *words: str) -> list[str]:
    (folder / "link").symlink_to("..")
    return ["data", "convert", source, "--output", random.choice(OUTPUTS), *words]


def convert_tables(folder: Path, random: Random) -> list[str]:
    """A table of one of the forms, whose bytes are changed."""
    _images(folder)
    mark, name = random.choice(((",", "t.csv"), (";", "t.csv"), ("\t", "t.tsv"), ("|", "t.csv")))
    rows = [["image", "question", "answer", "patient", "A", "B"]]
    rows += [
        [
            f"{n % 4}.png#{'9' * random.choice((1, 5_000))}"[: random.choice((5, None))],
            "Is it?",
            "A",
            f"p{n}",
            "yes",
            "no",
        ]
        for n in range(9)
    ]
    row = random.choice(rows)
    row[random.randrange(6)] = random.choice([text for text in hostile.TEXTS if "\ud800" not in text])
    text = "\n".join(mark.join(row) for row in rows).encode(random.choice(("utf-8", "utf-16", "latin-1")), "replace")
    (folder / name).write_bytes(hostile.in_bytes(text, random) if random.random() < 0.7 else text)
    return _command(
        folder, name, random, "--images", "images", *random.choice(([], ["--attributes", "A", "--options", "B"]))
    )


def convert_lists(folder: Path, random: Random) -> list[str]:
    """Conversations, flat questions, OmniMedVQA's, COCO's boxes."""
    _images(folder)
    deep: Any = "0.png"
    for _ in range(random.choice((1, 2, 900))):
        deep = [deep]
    chats = [{"image": f"{n}.png", "conversations": TURNS, "patient": n} for n in range(4)]
    flat = [
        {"image": random.choice((f"{n}.png", deep)), "question": "?", "answer": random.choice(("x", ["a"], 2.0))}
        for n in range(4)
    ]
    omni = [
        {"image_path": f"{n}.png", "question": "?", "gt_answer": "a", "option_A": "a", "option_B": "b"}
        for n in range(4)
    ]
    coco = {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)], "categories": [{"id": 1, "name": "cell"}]}
    coco["annotations"] = [{"image_id": n, "category_id": 1} for n in (0, 0, 1)]  # type: ignore[list-item]
    parts = [{"type": random.choice(("image", "text", "video", deep)), "text": "What?"}, hostile.value(random)]
    asked = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a cell"}]}]
    messages = [{"images": [f"{n}.png"], "messages": asked} for n in range(4)]
    content = random.choice((chats, flat, omni, coco, messages))
    if random.random() < 0.3 and isinstance(content, list):
        content[0]["conversations"] = [{"from": hostile.value(random), "value": hostile.value(random)}]
    text = json.dumps(content).encode("utf-8", "surrogatepass")
    name = "t.json"
    if isinstance(content, list) and random.random() < 0.4:
        name, text = "t.jsonl", b"\n".join(json.dumps(item).encode("utf-8", "surrogatepass") for item in content)
    change = hostile.in_json if name == "t.json" and random.random() < 0.6 else hostile.in_bytes
    (folder / name).write_bytes(change(text, random) if random.random() < 0.8 else text)
    return _command(folder, name, random, "--images", "images")


def _column(random: Random) -> Any:
    """A column of four rows, of some type."""
    import pyarrow as pa

    kinds: list[tuple[Any, Any]] = [
        (["a", "b", None, "c"], pa.string()),
        ([1, -1, 0, 7], pa.int64()),
        ([1.0, float("nan"), None, float("inf")], pa.float64()),
        ([-(2**62), 0, 2**62, None], pa.timestamp("us")),
        ([-(2**31), 0, 2**31 - 1, None], pa.date32()),
        ([2**62, 0, -(2**62), None], pa.duration("s")),
        ([2**62, 0, 1, None], pa.int64()),
        ([b"\xff\xfe", b"a", None, b"\0"], pa.binary()),
        ([["a"], [], None, ["b", "c"]], pa.list_(pa.string())),
        ([[["a"]], [], None, [["b"]]], pa.list_(pa.list_(pa.string()))),
        ([{"bytes": b"x", "path": None}] * 4, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ([{"a": {"b": 1}}] * 4, pa.struct([("a", pa.struct([("b", pa.int8())]))])),
        ([[("k", "v")]] * 4, pa.map_(pa.string(), pa.string())),
        ([True, False, None, True], pa.bool_()),
        ([None] * 4, pa.null()),
    ]
    values, kind = random.choice(kinds)
    if kind == pa.binary() and random.random() < 0.7:  # bytes that claim to be a text
        binary = pa.array(values, kind)
        return pa.Array.from_buffers(pa.string(), 4, binary.buffers())
    column = pa.array(values, kind)
    return column.dictionary_encode() if random.random() < 0.2 and not pa.types.is_nested(kind) else column


NOTES: list[Any] = [
    *({"info": {"features": {"answer": {"names": names}}}} for names in (["a"], [1, None], 3, None, {"a": 1}, [["a"]])),
    *({"info": value} for value in (None, 3, [], "x")),
    *({"info": {"features": value}} for value in (None, 3, [1], {"answer": 3}, {"answer": ["names"]})),
    *([], 3, None, "x"),
]


def convert_datasets(folder: Path, random: Random) -> list[str]:
    """Arrow and Parquet files of odd types, notes and names."""
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "source").mkdir()
    png = (Path(__file__).parent / "none").name.encode()
    names = ["image", "question", "answer", random.choice(("patient", "answer", "split", "caf\u00e9", ""))]
    for split in random.sample(("train-0", "Test_1", "validation", "x"), 2):
        columns = [pa.array([png] * 4), pa.array(["?"] * 4), _column(random), _column(random)]
        columns[random.randrange(4)] = _column(random)
        note = random.choice([json.dumps(note) for note in NOTES] + ["{", "\x00", "[" * 5_000])
        schema = pa.schema(
            [pa.field(name, column.type) for name, column in zip(names, columns, strict=True)], {"huggingface": note}
        )
        table = pa.Table.from_arrays(columns, schema=schema)
        path = folder / "source" / f"{split}.{random.choice(('parquet', 'arrow'))}"
        try:
            if path.suffix == ".parquet":
                parquet.write_table(table, path)
            else:
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as out:
                    out.write_table(table)
        except (pa.ArrowException, ValueError):  # a type that the format cannot hold
            path.write_bytes(b"PAR1")
        if random.random() < 0.3:
            path.write_bytes(hostile.in_bytes(path.read_bytes(), random))
    return _command(folder, "source", random, *random.choice(([], ["--split", "split"], ["--ask", "What?"])))


def convert_folders(folder: Path, random: Random) -> list[str]:
    """Images in folders, and boxes in XML."""
    from tests.fuzz.surfaces import image

    boxes = "<annotation><filename>{}.png</filename><object><name>cell</name></object></annotation>"
    for number in range(5):
        place = folder / "source" / random.choice(("a", "b", "train", "x" * 200))
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(image(random))
        if random.random() < 0.5:
            xml = boxes.format(number).encode()
            (place / f"{number}.xml").write_bytes(hostile.in_bytes(xml, random))
    (folder / "source" / "loop").symlink_to("..")
    return _command(folder, "source", random)


TAGS: dict[str, list[Any]] = {
    "NumberOfFrames": [0, -1, 2, 10**8],
    "BitsStored": [0, 1, 13, 64],
    "HighBit": [0, 11, 300],
    "Rows": [0, 1, 65_535],
    "SamplesPerPixel": [0, 2, 3, 4],
    "PlanarConfiguration": [1, 7],
    "PhotometricInterpretation": ["PALETTE COLOR", "YBR_FULL_422", "HSV", "x" * 16, ""],
    "PixelPaddingValue": [0, 65_535],
    "PixelSpacing": [[0.5], ["1e9", "1"], ["nan", "1"], [1, 1, 1]],
    "WindowWidth": ["0", "-5", ["1", "2"], "nan"],
    "WindowCenter": ["1e300", ["1", "2", "3"]],
    "RescaleSlope": ["0", "1e308", "nan"],
    "VOILUTFunction": ["SIGMOID", "x"],
    "PatientID": ["", "x" * 64, "a\\b"],
    "RedPaletteColorLookupTableDescriptor": [[0, 0, 8], [4, 0, 99], [1]],
}


def _dicom(random: Random) -> bytes:
    """A DICOM file of a few pixels with some tags that do not fit them."""
    from tests.helpers.dicom import dicom

    data, buffer = dicom(np.arange(64, dtype=np.uint16).reshape(8, 8)), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tag in random.sample(sorted(TAGS), random.choice((1, 2, 3))):
            setattr(data, tag, random.choice(TAGS[tag]))
        try:
            data.save_as(buffer, enforce_file_format=True)
        except Exception:  # pydicom raises many kinds for what it cannot write
            return bytes(128) + b"DICM" + bytes(300)
    return buffer.getvalue()


def _nifti(random: Random) -> bytes:
    """A NIfTI file whose header claims another shape, type, offset or scale."""
    import nibabel

    image = nibabel.Nifti1Image(np.zeros((4, 5, 3), np.int16), np.diag([1, 1, 4, 1]))  # type: ignore[no-untyped-call]
    content = bytearray(image.to_bytes())
    place, length = random.choice(((40, 16), (70, 2), (72, 2), (76, 32), (108, 4), (112, 8), (124, 8), (252, 100)))
    content[place : place + length] = random.choice((b"\x7f", b"\xff", b"\0", b"\x01")) * length
    return bytes(content)


def convert_scans(folder: Path, random: Random) -> list[str]:
    """DICOM and NIfTI files, some of them compressed or damaged, beside sound ones."""
    (folder / "source").mkdir()
    for number in range(4):
        content, ending = random.choice(((_dicom(random), "dcm"), (_nifti(random), "nii")))
        if random.random() < 0.5:
            content = hostile.in_bytes(content, random)
        if ending == "nii" and random.random() < 0.3:
            content, ending = gzip.compress(content), "nii.gz"
        (folder / "source" / f"{number}.{ending}").write_bytes(content)
    words = random.choice(([], ["--frames", "1"], ["--window", "40", "400"]))
    return _command(folder, "source", random, *words)
