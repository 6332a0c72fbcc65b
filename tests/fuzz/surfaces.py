"""Every place where files from outside come in: a hostile input is put there, and a command reads it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import torch
import yaml
from PIL import Image

from tests.conftest import GOLDEN
from tests.fuzz import hostile
from tests.fuzz.conversions import (
    convert_datasets,
    convert_folders,
    convert_lists,
    convert_scans,
    convert_tables,
)

EARLIER_RUN = Path(__file__).parents[1] / "fixtures" / "run_0_1_0"
Surface = Callable[[Path, Random], list[str]]
"""Writes a hostile input into a folder and gives the command that reads it, to be run in that folder."""

TURNS = [{"from": "human", "value": "<image>\nWhat is seen?"}, {"from": "gpt", "value": "a cell"}]
RECORDS = [{"id": number, "image": f"images/{number}.png", "conversations": TURNS} for number in range(3)]
QUESTIONS = [
    {"question_id": number, "image": f"images/{number}.png", "text": "Is it?", "gt": "yes", "answer_type": "CLOSED"}
    for number in range(3)
]
ANSWERS = [{**row, "prompt": row["text"], "text": "no, it is not"} for row in QUESTIONS]


def lines(rows: list[dict[str, object]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def data_root(folder: Path, images: bool = False) -> Path:
    place = folder / "root" / "PathVQA"
    (place / "images").mkdir(parents=True)
    (place / "train.json").write_bytes(json.dumps(RECORDS).encode())
    (place / "test.jsonl").write_bytes(lines(QUESTIONS))
    for number in range(3 if images else 0):
        Image.new("RGB", (8, 6), (number, 9, 9)).save(place / "images" / f"{number}.png")
    return place


def annotations(folder: Path, random: Random) -> list[str]:
    place = data_root(folder)
    if random.random() < 0.5:
        change = random.choice((hostile.in_bytes, hostile.in_json))
        (place / "train.json").write_bytes(change((place / "train.json").read_bytes(), random))
    else:
        change = random.choice((hostile.in_bytes, hostile.in_lines))
        (place / "test.jsonl").write_bytes(change((place / "test.jsonl").read_bytes(), random))
    return ["data", "check", "root", "--only", "pathvqa", "--no-images", "--output", "check.json"]


def names(folder: Path, random: Random) -> list[str]:
    """Image names in annotations, and a raw download that is searched for them."""
    place = data_root(folder)
    name = random.choice(hostile.TEXTS) + random.choice(("", ".png", "/a.png"))
    record = {**RECORDS[0], "image": random.choice((name, [name], [name, "images/1.png"]))}
    (place / "train.json").write_bytes(json.dumps([record, *RECORDS[1:]]).encode("utf-8", "surrogatepass"))
    (folder / "raw").mkdir()
    Image.new("RGB", (8, 6)).save(folder / "raw" / "1.png")
    return ["data", "prepare", "pathvqa", "--raw", "raw", "--root", "root", *random.choice(([], ["--copy"]))]


def raw_annotations(folder: Path, random: Random) -> list[str]:
    rows = [{"image": f"i{number}", "question": "Is it?", "answer": "yes"} for number in range(3)]
    for split in ("train", "test"):
        place = folder / "raw" / "qas" / split
        place.mkdir(parents=True)
        kind = random.choice(("pkl", "json", "jsonl"))
        content = {"pkl": pickle.dumps(rows), "json": json.dumps(rows).encode(), "jsonl": lines(list(rows))}[kind]
        change = {"pkl": hostile.in_bytes, "json": hostile.in_json, "jsonl": hostile.in_lines}[kind]
        (place / f"{split}_qa.{kind}").write_bytes(change(content, random) if random.random() < 0.7 else content)
    return ["data", "prepare", "pathvqa", "--raw", "raw", "--root", "root", "--annotations"]


def tables(folder: Path, random: Random) -> list[str]:
    (folder / "raw").mkdir()
    table = "md5hash,label,three_partition_label\n" + "".join(f"{n:032x},psoriasis,benign\n" for n in range(20))
    (folder / "raw" / "fitzpatrick17k.csv").write_bytes(hostile.in_bytes(table.encode(), random))
    return ["data", "prepare", "derm", "--raw", "raw", "--root", "root", "--annotations"]


def image(random: Random) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(random.randrange(1 << 30)).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, random.choice(("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")))
    return hostile.in_bytes(buffer.getvalue(), random)


def archives(folder: Path, random: Random) -> list[str]:
    place = data_root(folder)
    shutil.rmtree(place / "images")
    members = [random.choice(hostile.TEXTS)[:300] or "x" for _ in range(3)] + ["images/0.png", "0.PNG", "inner.zip"]
    kind = random.choice(("zip", "tar", "tar.gz"))
    path = folder / f"raw.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in members:
                info = zipfile.ZipInfo("placeholder")
                info.filename = name.encode("utf-8", "replace").decode()
                archive.writestr(info, image(random))
    else:
        with tarfile.open(path, "w:gz" if kind.endswith("gz") else "w") as tar:
            for name in members:
                member = tarfile.TarInfo(name.replace("\0", "0").encode("utf-8", "replace").decode())
                member.type = random.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE))
                member.linkname = "../../evil"
                content = image(random)
                member.size = len(content) if member.type == tarfile.REGTYPE else 0
                tar.addfile(member, io.BytesIO(content) if member.size else None)
    if random.random() < 0.6:
        path.write_bytes(hostile.in_bytes(path.read_bytes(), random))
    return ["data", "prepare", "pathvqa", "--raw", path.name, "--root", "root"]


SETTINGS = {
    "run": "r",
    "model": {"path": "model", "dtype": "float32", "device": "cpu"},
    "data": {"root": "root"},
    "lora": {"rank": 4, "alpha": 8},
    "training": {"save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
    "tasks": [{"name": "pathvqa", "epochs": 1, "batch_size": 4, "learning_rate": 1e-3}],
}


def configurations(folder: Path, random: Random) -> list[str]:
    content = yaml.safe_dump(SETTINGS).encode()
    if random.random() < 0.5:
        content = hostile.in_json(json.dumps(SETTINGS).encode(), random)
    else:
        content = hostile.in_bytes(content, random)
    (folder / "run.yaml").write_bytes(content)
    overrides = []
    if random.random() < 0.4:
        key = random.choice(("seed", "run", "lora.rank", "tasks.*.epochs", "training.optim", "training.x", "data.root"))
        text = random.choice((*hostile.TEXTS, *map(str, hostile.NUMBERS), "&a {b: *a}", "!!int ''", "!!binary x"))
        overrides = [f"{key}={text}".replace("\0", "\\0").encode("utf-8", "replace").decode()[:2000]]
    return ["train", "run.yaml", "--dry-run", *overrides]


def banks(folder: Path, random: Random) -> list[str]:
    shutil.copytree(EARLIER_RUN / "checkpoints" / "kept" / "banks" / "pathvqa", folder / "bank")
    name, change = random.choice(
        (
            ("adapter_config.json", hostile.in_json),
            ("adapter_config.json", hostile.in_bytes),
            ("adapter_model.safetensors", hostile.in_bytes),
            ("bank.json", hostile.in_json),
        )
    )
    path = folder / "bank" / name
    path.write_bytes(change(path.read_bytes(), random))
    return ["bank", "show", "bank"]


def checkpoints(folder: Path, random: Random) -> list[str]:
    shutil.copytree(GOLDEN / "checkpoints" / "pathvqa", folder / "bank")
    weights, config = folder / "bank" / "cl_lora.bin", folder / "bank" / "config.json"
    change = random.randrange(4)
    if change == 0:
        config.write_bytes(hostile.in_json(config.read_bytes(), random))
    elif change == 1:
        weights.write_bytes(hostile.in_bytes(weights.read_bytes(), random))
    elif change == 2:
        weights.write_bytes(hostile.in_bytes(pickle.dumps({"a": [1, 2.5, "x"]}), random))
    else:
        stored = torch.load(weights, weights_only=True)
        key = random.choice(list(stored))
        other = random.choice(
            (torch.zeros(0), torch.ones(2, dtype=torch.int8), torch.tensor(1.0), hostile.value(random))
        )
        stored[random.choice((key, *(text for text in hostile.TEXTS if "\ud800" not in text)))] = other
        torch.save(stored, weights)
    return ["bank", "show", "bank"]


def answers(folder: Path, random: Random) -> list[str]:
    change = random.choice((hostile.in_bytes, hostile.in_lines))
    (folder / "answers.jsonl").write_bytes(change(lines(list(ANSWERS)), random))
    return ["score", "answers.jsonl", "--output", "scores"]


def models(folder: Path, random: Random) -> list[str]:
    shutil.copytree(GOLDEN / "llava_med_tiny", folder / "model")
    data_root(folder)
    name = random.choice(("config.json", "model.safetensors.index.json", "tokenizer_config.json"))
    path = folder / "model" / name
    path.write_bytes(random.choice((hostile.in_json, hostile.in_bytes))(path.read_bytes(), random))
    (folder / "run.yaml").write_text(yaml.safe_dump(SETTINGS))
    return ["train", "run.yaml", "--dry-run"]


def state(folder: Path, random: Random) -> list[str]:
    """A file of a run that was finished, routed, analysed and evaluated."""
    shutil.copytree(EARLIER_RUN, folder / "made")
    (folder / "made" / "model").symlink_to(GOLDEN)
    command = random.choice(
        (["report", "run.yaml"], ["train", "run.yaml", "--dry-run"], ["bank", "export", "run.yaml", "--output", "out"])
    )
    places = {
        "report": ("checkpoints/kept/*.json", "results/kept/*.json", "results/kept/*/*.json", "results/kept/*/*.csv"),
        "train": ("checkpoints/kept/ledger.json", "checkpoints/kept/config.yaml"),
        "bank": ("checkpoints/kept/ledger.json", "checkpoints/kept/banks/*/bank.json"),
    }[command[0]]
    path = random.choice(sorted(file for place in places for file in (folder / "made").glob(place)))
    structured = path.suffix == ".json" and random.random() < 0.8
    change = random.choice((hostile.in_json, hostile.of_same_type)) if structured else hostile.in_bytes
    path.write_bytes(change(path.read_bytes(), random))
    return command


def special_files(folder: Path, random: Random) -> list[str]:
    """Something that is no file where another surface has a file: opened, it would block, or have no end."""
    words = random.choice((annotations, tables, configurations, banks, checkpoints, answers, models, state))(
        folder, random
    )
    files = sorted(Path(place) / name for place, _, names in os.walk(folder) for name in names)
    path = random.choice([file for file in files if file.is_file() and not file.is_symlink()])
    path.unlink()
    kind = random.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(random.choice(("/dev/zero", "/dev/tty", "/proc/self/mem", "nowhere", path.name)))
    elif kind == 2:
        os.mkfifo(path.with_name("fifo"))
        path.symlink_to("fifo")
    else:
        path.mkdir()
    return words


SURFACES: dict[str, tuple[Surface, int]] = {
    "annotations": (annotations, 45),
    "names": (names, 45),
    "raw_annotations": (raw_annotations, 25),
    "tables": (tables, 10),
    "archives": (archives, 35),
    "configurations": (configurations, 50),
    "banks": (banks, 25),
    "checkpoints": (checkpoints, 20),
    "answers": (answers, 25),
    "state": (state, 12),
    "special_files": (special_files, 25),
    "convert_tables": (convert_tables, 25),
    "convert_lists": (convert_lists, 30),
    "convert_datasets": (convert_datasets, 30),
    "convert_folders": (convert_folders, 15),
    "convert_scans": (convert_scans, 15),
}
"""Every surface with how many inputs of it `make test` tries."""
