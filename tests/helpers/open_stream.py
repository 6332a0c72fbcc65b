"""Miniatures of the open stream's repositories, made here, and a stand-in for the site that ships their archives."""

import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

CLASSES = ("nv", "mel", "bcc", "akiec", "bkl", "df", "vasc")


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 9), (number % 256, number // 256, 7)).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def miniatures(folder: Path) -> Path:
    """Clones of all six, in the layout of the true ones."""
    rad = folder / "med-vqa" / "data"
    sides: dict[str, list[dict]] = {"train": [], "test": []}
    for number in range(40):
        name = f"synpic{number % 20}.jpg"
        picture(rad / "images" / name, number % 20)
        row = {"qid": number, "image_name": name, "image_organ": "CHEST", "question": f"What is in {number}?"}
        row |= {"answer": 3 if number == 0 else "lung", "answer_type": "CLOSED " if number == 1 else "OPEN"}
        sides["test" if number >= 35 else "train"].append({**row, "question_type": "PRES", "phrase_type": "freeform"})
    for side, rows in sides.items():
        write(rad / f"{side}set.json", json.dumps(rows))
    chest = folder / "ai-pneumonia-detection" / "dataset"
    for number in range(30):
        side = "test" if number >= 24 else "train"
        kind = "bacteria" if number % 2 else "virus"
        picture(chest / side / "PNEUMONIA" / f"person{number % 26}_{kind}_{number}.jpeg", 100 + number)
        picture(chest / side / "NORMAL" / f"NORMAL2-IM-{number:04}-0001.jpeg", 200 + number)
    skin = folder / "ham" / "data"
    rows, boxes = ["lesion_id,image_id,dx,dx_type,age,sex,localization"], [",image_id,top,bottom,left,right"]
    for number in range(60):
        name = f"ISIC_{number:07}"
        picture(skin / "images" / f"{name}.jpg", 300 + number)
        age = "" if number == 0 else "45.0"
        sex = "unknown" if number == 1 else "male"
        rows.append(f"HAM_{number // 2:07},{name},{CLASSES[number // 2 % 7]},histo,{age},{sex},back")
        boxes.append(f"{number},{name},2,7,1,9")
    write(skin / "HAM10000_metadata.csv", "\n".join(rows) + "\n")
    write(skin / "HAM10000_metadata_ext.csv", "\n".join(boxes) + "\n")
    for number in range(45):
        kind = ("normal", "benign", "malignant")[number % 3]
        picture(folder / "busi" / "Dataset_BUSI_with_GT" / kind / f"{kind} ({number}).png", 400 + number // 3 * 3)
    cells = folder / "BCCD_Dataset" / "BCCD"
    for number in range(10):
        picture(cells / "JPEGImages" / f"BloodImage_{number}.jpg", 500 + number)
        objects = "".join(
            f"<object><name>{name}</name></object>"
            for name in ["WBC"] + ["RBC"] * number + ["Platelets"] * (number % 2)
        )
        write(cells / "Annotations" / f"BloodImage_{number}.xml", f"<annotation>{objects}</annotation>")
    names = [f"BloodImage_{number}" for number in range(10)]
    write(cells / "ImageSets" / "Main" / "trainval.txt", "\n".join(names[:7]))
    write(cells / "ImageSets" / "Main" / "test.txt", "\n".join(names[7:]))
    for number in range(20):
        place = folder / "dsb" / "stage1_train" / f"{number:08x}"
        picture(place / "images" / f"{number:08x}.png", 600 + number)
        for mask in range(1 + 6 * number):
            write(place / "masks" / f"{number:04x}{mask:04x}.png", "no picture: masks are counted")
    return folder


def archive(clone: Path, path: Path, top: str) -> Path:
    """As the site packs a commit: everything below one folder."""
    with zipfile.ZipFile(path, "w") as packed:
        for file in sorted(clone.rglob("*")):
            if file.is_file():
                packed.write(file, f"{top}/{file.relative_to(clone)}")
    return path


class Site(ThreadingHTTPServer):
    """Serves `files` by path. After `cut[path]` bytes the next transfer breaks off; `ranges` says whether it can begin
    in the middle; `asked` logs path and Range header."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.cut, self.ranges = files, dict[str, list[int]](), True
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Site]:
    site = Site(files)
    threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cuts = self.server.cut.get(self.path) or [None]
        self.wfile.write(content[start:][: cuts.pop(0)])
        return None
