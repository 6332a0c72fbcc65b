"""Seconds that scoring an answer file takes, by kind of answers.

    python -m benchmarks.scoring                   # 60,000 answers, twice

`reports` are open answers of report length, no two alike; `mix` has closed and open questions in the published test
sets' proportion, short answers, and some reports. The time is that of `mslora-cr score` on one
core, without Python's start: reading the file, scoring, resampling, writing.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import finish, parse
from mslora_cr.evaluation.score import score_file

_VOCABULARY = (
    "the heart is normal in size lungs are clear without focal consolidation pneumothorax or pleural effusion no acute "
    "bony abnormality mild degenerative changes of thoracic spine stable cardiomediastinal silhouette within limits "
    "right left lower lobe opacity may represent atelectasis versus infiltrate there a an two three small calcified "
    "granuloma upper lung zone tortuous aorta hyperexpanded consistent with emphysema"
)
WORDS = _VOCABULARY.split()
MIX = {"closed": 0.65, "short": 0.24, "report": 0.11}
"""Shares of the published test sets' 23,229 questions; nmi and iu-x-ray ask for reports."""
KINDS = {"reports": {"report": 1.0}, "mix": MIX}
LENGTHS = {"short": (1, 4), "report": (20, 60)}
"""Words of an open answer, drawn evenly; at most 100 new tokens are generated."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("scoring", __doc__, argv, _add_arguments)
    count = 60 if setting.args.size == "tiny" else setting.args.answers
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for kind, shares in KINDS.items():
            lines = (json.dumps(answer) + "\n" for answer in _answers(count, shares))
            (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")

        def scoring(kind: str) -> Callable[[], Any]:
            return lambda: score_file(folder / f"{kind}.jsonl", folder / kind)

        seconds = setting.interleaved({kind: scoring(kind) for kind in KINDS}, warm_up=0)
    return finish(setting, seconds, {"reports_over_mix": ("reports", "mix")}, extra={"answers": count})


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--answers", type=int, default=60_000, metavar="N", help="of each kind (default: 60,000)")


def _answers(count: int, shares: dict[str, float]) -> Iterator[dict[str, Any]]:
    draw = random.Random(4)
    for number, kind in enumerate(draw.choices(list(shares), list(shares.values()), k=count)):
        truth = _text(draw, *LENGTHS[kind]) if kind in LENGTHS else draw.choice(("yes", "no"))
        yield {
            "question_id": number,
            "prompt": "What does the picture show?",
            "text": _retold(draw, truth),
            "gt": truth,
            "answer_type": "CLOSED" if kind == "closed" else "OPEN",
        }


def _text(draw: random.Random, least: int, most: int) -> str:
    """Words in sentences of nine."""
    words = draw.choices(WORDS, k=draw.randint(least, most))
    return ". ".join(" ".join(words[start : start + 9]) for start in range(0, len(words), 9)).capitalize() + "."


def _retold(draw: random.Random, truth: str) -> str:
    """The truth with every third word another one, on average."""
    return " ".join(draw.choice(WORDS) if draw.random() < 1 / 3 else word for word in truth.split())


if __name__ == "__main__":
    main()
