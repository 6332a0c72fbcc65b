"""The published answers about VQA-RAD's pictures: counts by organ and kind of question, and examples with links.

    python -m benchmarks.published_examples --answers FOLDER --clone med-vqa

FOLDER holds the published answer files (FOLDER/RUN/slake-vqarad/answer-file.jsonl), `med-vqa` is a clone of
github.com/Awenbocc/med-vqa. The last 451 questions of `slake-vqarad` are VQA-RAD's, in its own order; an answer counts
as right if it is the true one, apart from case and a full stop at the end. Questions of one picture are one cluster.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from mslora_cr.evaluation.schemas import ANSWERS
from mslora_cr.evaluation.score import group_numbers, read_answers
from mslora_cr.reporting.run_record import load_published_scores
from mslora_cr.statistics.interval import bracketed
from mslora_cr.statistics.intervals import estimate, percent, score_interval

RUNS = ("each", "mslora_cr_ortho")
LINK = "https://github.com/Awenbocc/med-vqa/blob/1678ec2c97f0b2bf84591ddccd2e84932630e450/data/images/"
EXAMPLES = (
    *(
        "synpic42202.jpg: Is there evidence of an aortic aneurysm?",
        "synpic31928.jpg: Is the size of the ventricles abnormal?",
    ),
    *("synpic39301.jpg: Is there mass effect?", "synpic19782.jpg: Is there free air in the supraclavicular fossae?"),
    *("synpic16407.jpg: Which side of the lungs are hyperinflated?", "synpic31955.jpg: Where is the lesion located?"),
    *("synpic48122.jpg: From what structure is the large hypodense mass emanating from?",),
    *("synpic60703.jpg: How is the artifact in this image categorized?",),
    *("synpic22828.jpg: What are the hyperintensities surrounding the aorta?",),
    *("synpic47020.jpg: What is wrong with the ventricles?", "synpic56344.jpg: What modality was used for this image?"),
)


class Asked(NamedTuple):
    """A question of VQA-RAD, its true answer, and the answer of each run."""

    image: str
    organ: str
    kind: str
    question: str
    truth: str
    answers: tuple[str, ...]

    def right(self, run: int) -> bool:
        return _plain(self.answers[run]) == _plain(self.truth)


def main(argv: Sequence[str] | None = None) -> list[Asked]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published_examples", description=__doc__)
    parser.add_argument("--answers", type=Path, required=True, metavar="FOLDER", help="folder of RUN/slake-vqarad")
    parser.add_argument("--clone", type=Path, required=True, help="clone of github.com/Awenbocc/med-vqa")
    args = parser.parse_args(argv)
    asked = questions(args.answers, args.clone)
    groups: list[tuple[str, Callable[[Asked], str]]] = [
        ("answer", lambda one: one.kind),
        ("organ", lambda one: one.organ),
        ("true answer of yes or no", lambda one: _plain(one.truth) if _plain(one.truth) in ("yes", "no") else ""),
    ]
    rows = []
    for title, of in groups:
        for value, count in Counter(filter(None, map(of, asked))).most_common():
            chosen = [one for one in asked if of(one) == value]
            rows.append([f"{title}: {value}", count, *(_share(chosen, run) for run in range(len(RUNS)))])
    print(tabulate(rows, ["questions", "n", *RUNS], tablefmt="github", disable_numparse=True) + "\n")
    print(f"{sum(_plain(one.answers[0]) != _plain(one.answers[1]) for one in asked)} of {len(asked)} answers differ\n")
    by_name = {f"{one.image}: {one.question}": one for one in asked}
    chosen = [by_name[name] for name in EXAMPLES]
    examples = [[f"[{one.image}]({LINK}{one.image})", one.question, one.truth, *one.answers] for one in chosen]
    print(tabulate(examples, ["picture", "question", "truth", *RUNS], tablefmt="github", disable_numparse=True))
    return asked


def questions(answers: Path, clone: Path) -> list[Asked]:
    """VQA-RAD's questions in the order of the published files.

    Args:
        answers: The folder of the runs' answer files.
        clone: The clone with the questions' organs.
    """
    released = json.loads((clone / "data" / "testset.json").read_text(encoding="utf-8"))
    published = load_published_scores()
    files = [read_answers(answers / published[run].run / "slake-vqarad" / ANSWERS)[-len(released) :] for run in RUNS]
    asked = []
    for row, *same in zip(released, *files, strict=True):
        kind, question, truth = same[0].answer_type, same[0].prompt, str(same[0].gt)
        if (row["question"].strip(), str(row["answer"]).strip()) != (question, truth):
            raise SystemExit(f"{answers}: question {same[0].question_id} is not VQA-RAD's; give the published files")
        asked.append(
            Asked(row["image_name"], row["image_organ"], kind, question, truth, tuple(str(one.text) for one in same))
        )
    return asked


def _share(asked: Sequence[Asked], run: int) -> str:
    right = np.array([float(one.right(run)) for one in asked])
    measured = estimate(right, group_numbers([one.image for one in asked]))
    return f"{100 * measured.mean:.1f}{bracketed(percent(score_interval([measured])))}"


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".")


if __name__ == "__main__":
    main()
