"""What validation questions give: a temperature for probabilities, and thresholds below which to abstain."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from mslora_cr.clinical.asked import AskedAnswer, right_of
from mslora_cr.metrics.calibration import fitted_temperature, risk_threshold
from mslora_cr.metrics.closed import class_of
from mslora_cr.statistics.intervals import Groups
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.state import Part, StateFile

CALIBRATION = "calibration.json"
FEWEST = 20
"""A temperature is fitted on at least this many validation questions with candidates."""
SEED = 0


class CalibratedTask(Part):
    """What the closed validation questions of a task say about the banks that answered them.

    Attributes:
        banks: Digests of the banks, in order.
        questions: Number of closed questions.
        temperature: The temperature that minimises the log loss of the candidates' probabilities; None if there are too
            few questions.
        confidence: The probability of the answer to one randomly drawn question of each patient or image.
        right: Whether that answer is right.
    """

    task: str
    stage: int
    banks: tuple[str, ...]
    questions: int
    temperature: float | None
    confidence: tuple[float, ...]
    right: tuple[bool, ...]

    def threshold(self, risk: float) -> float:
        """Return the least probability from which to give an answer, so that at most this share of all questions is
        answered wrongly, in expectation over questions exchangeable with these (`risk_threshold`).

        Raises:
            UserError: There are too few questions for such a bound.
        """
        threshold = risk_threshold(np.array(self.confidence), np.array(self.right, dtype=np.float64), risk)
        if threshold is None:
            count = len(self.right)
            raise UserError(
                f"{self.task}: validation questions of {count} patients or images promise no risk below "
                f"{1 / (count + 1):.3f}; ask for a larger --risk, or validate on more"
            )
        return threshold


class Calibrations(StateFile):
    """The content of `calibration.json`: what validation questions say, by task and stage."""

    MEND: ClassVar[str] = "remove it; `mslora-cr evaluate CONFIG --calibrate` writes it again"

    cells: tuple[CalibratedTask, ...]

    def of(self, task: str, banks: Sequence[str]) -> CalibratedTask | None:
        """Return what is known of the banks with these digests when they answer a task."""
        return next((cell for cell in self.cells if (cell.task, cell.banks) == (task, tuple(banks))), None)


def calibrated(results_dir: Path, task: str, banks: Sequence[str]) -> CalibratedTask | None:
    """Return what `calibration.json` of a results folder says of the banks with these digests; None where it does not
    know them."""
    stored = Calibrations.read_if_there(results_dir / CALIBRATION)
    return stored.of(task, banks) if stored else None


def stored_temperature(results_dir: Path, task: str, banks: Sequence[str]) -> float | None:
    """Return the temperature of `calibrated`; None where none is fitted."""
    calibration = calibrated(results_dir, task, banks)
    return calibration.temperature if calibration else None


def calibrate(
    task: str,
    stage: int,
    banks: Sequence[str],
    asked: Sequence[AskedAnswer],
    logprobs: Sequence[float | None],
    groups: Groups,
) -> CalibratedTask:
    """Fit a task's temperature, and draw the questions on which thresholds rest.

    Patients are exchangeable, their questions are not: one question of each patient is drawn.

    Args:
        banks: Digests of the banks that answered.
        logprobs: The log probability of each answer's tokens together; None where unknown.
        groups: (questions,), the number of each question's patient or image.
    """
    closed = [index for index, one in enumerate(asked) if one.closed and one.kind == "choice"]
    right = right_of([asked[index] for index in closed], [asked[index].answer for index in closed])
    right_of_index = {index: bool(one) for index, one in zip(closed, right, strict=True) if logprobs[index] is not None}
    generator = random.Random(SEED)
    by_group: dict[int, list[int]] = {}
    for index in right_of_index:
        by_group.setdefault(int(groups[index]), []).append(index)
    drawn = [generator.choice(indices) for _, indices in sorted(by_group.items())]
    return CalibratedTask(
        task=task,
        stage=stage,
        banks=tuple(banks),
        questions=len(closed),
        temperature=_temperature([asked[index] for index in closed]),
        confidence=tuple(math.exp(logprobs[index] or 0.0) for index in drawn),
        right=tuple(right_of_index[index] for index in drawn),
    )


def _temperature(asked: Sequence[AskedAnswer]) -> float | None:
    scores, truths = [], []
    for one in asked:
        classes = [class_of(text, one.options) for text in one.probabilities or ()]
        accepted = [class_of(truth, one.options) for truth in one.truths]
        columns = [column for column, name in enumerate(classes) if name in accepted]
        if one.probabilities and columns:
            scores.append(np.log(np.maximum(list(one.probabilities.values()), 1e-300)))
            truths.append(columns[0])
    return fitted_temperature(scores, truths) if len(scores) >= FEWEST else None
