"""A run as its commands leave it, made up without training, and a reader of report pages."""

import json
import math
from html.parser import HTMLParser

import torch
from safetensors.torch import save_file

from mslora_cr.data.sources.catalog import catalog
from mslora_cr.evaluation.score import metrics_of, score_file
from mslora_cr.statistics.intervals import independent

MODALITIES = {
    "pathvqa": "pathology",
    "slake-vqarad": "radiology",
    "derm": "dermatology",
    "PCAM": "pathology",
    "CXP": "radiology",
    "HAM": "dermatology",
    "nmi": "pathology",
    "iu-x-ray": "radiology",
}
OPEN_ONLY = {"nmi", "iu-x-ray"}
CLOSED_ONLY = {"PCAM", "CXP", "HAM"}
ENVIRONMENT = {
    "versions": {"python": "3.11.2", "torch": "2.13.0"},
    "git": {"commit": "0123456789abcdef", "dirty": True},
    "hardware": {"machine": "x86_64", "threads": 2, "gpus": []},
}


def answer_lines(task, right, rows=20):
    """`right` of `rows` answers of each kind that the task has are right."""
    lines = []
    for kind in ("OPEN", "CLOSED"):
        if task in (CLOSED_ONLY if kind == "OPEN" else OPEN_ONLY):
            continue
        truth = "Mild cardiomegaly, no effusion." if kind == "OPEN" else "yes"
        for row in range(rows):
            text = truth if row < right else ("no finding" if kind == "OPEN" else "not so")
            lines.append(
                {
                    "question_id": len(lines),
                    "prompt": f"What about <b>{task}</b> | no {row}?",
                    "text": text,
                    "gt": truth,
                    "answer_type": kind,
                    "answer_id": "a",
                    "model_id": "tiny",
                    "metadata": {},
                }
            )
    return lines


def published_rows(task):
    rows = catalog()[task].test_rows
    return rows.open + rows.closed


def make_run(root, name, method="mslora_cr", tasks=tuple(MODALITIES), stages="seen", published=False, right=None):
    """A run folder and a results folder as left behind; `right(task, stage)` of 20 answers are right.

    Args:
        published: the evaluation counts as many questions as the published test files have.
    """
    run_dir, results_dir = root / "checkpoints" / name, root / "results" / name
    right = right or (lambda task, stage: 18 - tasks.index(task) % 3)
    cells = []
    for number, task in enumerate(tasks, 1):
        train(run_dir, task, number, method)
        for stage in range(number, len(tasks) + 1) if stages == "seen" else [number]:
            folder = results_dir / task
            if stage != number and method == "sequential":
                folder = folder / f"stage-{stage}"
            folder.mkdir(parents=True, exist_ok=True)
            answers = folder / "answer-file.jsonl"
            answers.write_text("".join(json.dumps(line) + "\n" for line in answer_lines(task, right(task, stage))))
            scores = score_file(answers, folder)
            cells.append(
                {
                    "task": task,
                    "stage": stage,
                    "banks": [tasks[stage - 1]] if method == "sequential" else list(tasks[:number]),
                    "answers": str(answers.relative_to(results_dir)),
                    "questions": "ef" * 32,
                    "rows": published_rows(task) if published else len(scores.rows),
                    "seconds": 1.5,
                    "fingerprint": "0a" * 32,
                    "padding": 0.0,
                    "padding_unsorted": 0.0,
                    **metrics_of(scores, independent(len(scores.rows))).model_dump(include={"metrics", "intervals"}),
                }
            )
    evaluation = {
        "run": name,
        "method": method,
        "banks_by": "prefix",
        "tasks": list(tasks),
        "modalities": {task: MODALITIES[task] for task in tasks},
        "published": {task: task if published else None for task in tasks},
        "stages": sorted({cell["stage"] for cell in cells}),
        "cells": cells,
        "environment": ENVIRONMENT,
    }
    (results_dir / "evaluation.json").write_text(json.dumps(evaluation))
    entries = {
        task: {
            "digest": "ab" * 32,
            "steps": 60,
            "train_loss": 0.25,
            "seconds": 12.5,
            "finished": "2026-01-01T00:00:00",
        }
        for task in tasks
    }
    ledger = {"run": name, "method": method, "config_digest": "cd" * 32, **ENVIRONMENT, "tasks": entries}
    (run_dir / "ledger.json").write_text(json.dumps(ledger))
    (run_dir / "config.yaml").write_text(f"run: {name}\nnote: <script>alert(1)</script>\n")
    return run_dir, results_dir


def train(run_dir, task, number, method):
    """A log and a bank: banks of one modality lie close together."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(2, 61, 2):
        entry = {
            "step": step,
            "epoch": step / 60,
            "loss": 1.0,
            "ce": 2 * math.exp(-step / 15) + 0.02 * number,
        }
        if number > 1 and method == "mslora_cr":
            entry |= {
                "contrastive": 2.5 - step / 60,
                "orthogonality": 20 * math.exp(-step / 20),
                "alpha": 0.1,
                "beta": 0.01,
            }
        lines.append(json.dumps(entry))
    (run_dir / "logs" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    folder = run_dir / "banks" / task
    folder.mkdir(parents=True)
    centre = torch.full((2, 3), float(list(MODALITIES.values()).index(MODALITIES[task])))
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(number)) * 0.1
    key = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file(
        {key.format("A"): centre + noise, key.format("B"): (centre + noise).T.contiguous()},
        folder / "adapter_model.safetensors",
    )


class Page(HTMLParser):
    """The text of a page, its links, what it would load, its tips, its scripts and what it holds as JSON; refuses tags
    that are never closed."""

    def __init__(self, path):
        super().__init__()
        self.words, self.links, self.loads, self.open, self.tips, self.scripts = [], [], [], [], [], []
        self.data = None
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if tag == "a" and name == "href"]
        self.loads += [value for name, value in attrs if tag == "link" or name in ("src", "onload")]
        self.tips += [value for name, value in attrs if name == "title"]
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)
        self.json = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            if self.json:
                self.data = json.loads(data)
            else:
                self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.words.append(data)
