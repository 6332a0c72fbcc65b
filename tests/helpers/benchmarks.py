"""Miniatures of CoIN, UCIT and MLLM-CL: the files of each task as its configuration names them, of a few records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from mslora_cr.config.schema import StreamConfig, Task

ANSWERS = {
    "scienceqa": ("B", "A"),
    "imagenet": ("tabby cat", "red fox"),
    "gqa": ("yes", "chair"),
    "exact": ("Yes", "7"),
    "ocrvqa": ("History", "Unanswerable"),
    "ai2d": ("forest", "going ahead"),
    "pvqa": ("no", "liver"),
    "sci": ("B", "ohio,iowa"),
    "finvis": ("Yes", "C"),
    "textvqa": ("stop", "coca cola"),
    "captions": ("a dog in the grass", "two people on a street"),
    "grounding": ("[0.10,0.20,0.50,0.70]", "[0.00,0.00,1.00,0.75]"),
}


def make_benchmark(config: StreamConfig) -> None:
    """Write every task of a configuration below its data root: four training records and two questions each."""
    for task in config.stream:
        _make_task(Path(config.data.root), task)


def _make_task(root: Path, task: Task) -> None:
    folder = root / task.folder
    pictures = [f"{task.name}/images/{'MapQA' if place == 1 else 'AI2D'}_{place}.png" for place in range(2)]
    for place, name in enumerate(pictures):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40 + 8 * place, 36), 60).convert("RGB").save(root / name)
    folder.mkdir(parents=True, exist_ok=True)
    answers = ANSWERS[str(task.benchmark)]
    asked = ("What is it?", "Which states are red?")
    training = [
        {
            "id": str(number),
            "image": pictures[number % 2],
            "conversations": [
                {"from": "human", "value": f"<image>\n{asked[number % 2]}"},
                {"from": "gpt", "value": answers[number % 2]},
            ],
        }
        for number in range(4)
    ]
    test: list[dict[str, Any]] = [
        {"question_id": place, "image": f"./{name}", "text": asked[place], "answer": answers[place]}
        for place, name in enumerate(pictures)
    ]
    if task.benchmark == "scienceqa":
        test[1].pop("image")
        training[1].pop("image")
        training[1]["conversations"] = [{"from": "human", "value": asked[1]}, {"from": "gpt", "value": answers[1]}]
    if task.benchmark == "grounding":
        test = [{**row, "answer_bbox": row.pop("answer"), "size": [40, 36]} for row in test]
    _write(folder / task.train, training)
    _write(folder / task.test, test)
    if task.benchmark == "textvqa":
        _write(folder / str(task.references), {"data": [
            {"question_id": place, "answers": [answers[place]] * 7 + ["other"] * 3} for place in range(2)
        ]})  # fmt: skip
    if task.benchmark == "captions":
        _write(folder / str(task.references), {"images": [], "annotations": [
            {"image_id": place + 1, "id": number, "caption": f"{answers[place]} {number}"}
            for place in range(2)
            for number in range(2)
        ]})  # fmt: skip


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
