"""Scoring an answer file, against scoring it with NLTK's BLEU and the `rouge-score` library's ROUGE themselves.

    python -m benchmarks.scoring                   # 60,000 answers, twice

`reports` are open answers of report length, no two alike; `mix` has closed and open questions in the published test
sets' proportion, short answers, and some reports. The time is that of `mslora-cr score` without Python's start: reading
the file, scoring, resampling, writing. `identical_files` says whether both ways wrote the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nltk.translate import bleu_score
from rouge_score.rouge_scorer import RougeScorer

from benchmarks.harness import finish, parse
from mslora_cr.evaluation import metrics
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

        def scoring(kind: str, score: Callable[[Path, Path], Any], way: str) -> Callable[[], Any]:
            return lambda: score(folder / f"{kind}.jsonl", folder / way / kind)

        ways: dict[str, Callable[[Path, Path], Any]] = {"ours": score_file, "libraries": _score_by_libraries}
        seconds = setting.interleaved(
            {f"{kind}, {way}": scoring(kind, score, way) for kind in KINDS for way, score in ways.items()}, warm_up=0
        )
        identical = all(
            file.read_bytes() == (folder / "libraries" / file.relative_to(folder / "ours")).read_bytes()
            for file in (folder / "ours").glob("*/*")
        )
    return finish(
        setting,
        seconds,
        {f"{kind}_libraries_over_ours": (f"{kind}, libraries", f"{kind}, ours") for kind in KINDS},
        extra={"answers": count, "identical_files": identical},
    )


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


def _score_by_libraries(answers: Path, output: Path) -> None:
    with (
        warnings.catch_warnings(),
        patch.object(metrics, "sentence_bleu", _library_bleu),
        patch.object(metrics, "report_overlap", _library_overlap),
    ):
        warnings.filterwarnings("ignore", module="nltk")  # of every answer without a shared 4-gram
        score_file(answers, output)


def _library_bleu(prediction: Sequence[str], reference: Sequence[str]) -> tuple[float, ...]:
    scores = bleu_score.sentence_bleu([reference], prediction, weights=list(metrics.BLEU_WEIGHTS.values()))
    return tuple(float(score) for score in scores)


_ROUGE = RougeScorer(["rouge1", "rougeL"])


def _library_overlap(prediction: str, reference: str) -> tuple[float, float]:
    found = _ROUGE.score(reference, prediction)
    return float(found["rougeL"].fmeasure), float(found["rouge1"].recall)


if __name__ == "__main__":
    main()
