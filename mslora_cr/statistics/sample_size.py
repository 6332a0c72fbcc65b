"""What a number of questions and patients can show: widths of intervals, and differences that a test would find."""

from __future__ import annotations

from statistics import NormalDist

from mslora_cr.statistics.interval import CONFIDENCE

CORRELATION = 0.2
"""The intra-class correlation of one patient's questions, if nothing is known."""
POWER = 0.8
CHANGED = 0.08
"""The share of changed answers for which the smallest difference that would be found is told."""
RECALL, AREA = 0.9, 0.85
"""The values whose intervals' widths are told."""
FEWEST = 15
"""An interval needs at least this many questions of each class: with fewer, simulated intervals do not cover as often
as they say (`python -m benchmarks.coverage`)."""
FEWEST_SHARED = 20
"""An interval of a share needs at least this many images (of one size) where questions share images: with ten it is too
wide."""


def design_effect(questions: int, patients: int, correlation: float = CORRELATION) -> float:
    """Return the factor by which a variance grows because patients have several questions: ``1 + (m - 1) ρ``.

    Source: Kish, Survey Sampling, 1965.

    Args:
        patients: The number of patients, at least one.
        correlation: ρ, between questions of one patient.
    """
    return 1 + max(questions / patients - 1, 0.0) * correlation


def share_half_width(share: float, questions: int, effect: float = 1.0) -> float:
    """Return half the width of Wilson's interval of a share, such as a sensitivity over so many positive questions.

    Args:
        share: The expected share.
        questions: The number of questions, at least one.
        effect: `design_effect`.
    """
    number, z = questions / effect, _z()
    return float(z / (1 + z**2 / number) * (share * (1 - share) / number + z**2 / (4 * number**2)) ** 0.5)


def auroc_half_width(area: float, positives: int, negatives: int, effect: float = 1.0) -> float:
    """Return half the width of the normal interval of an area under the ROC curve.

    Source: Hanley and McNeil, "The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC) Curve",
    Radiology 1982.

    Args:
        area: The expected area.
        positives: The number of questions whose truth is the class, at least one.
        negatives: The number of other questions, at least one.
        effect: `design_effect`.
    """
    ones, others = positives / effect, negatives / effect
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (ones - 1) * (q1 - area**2) + (others - 1) * (q2 - area**2)) / (ones * others)
    return float(_z() * variance**0.5)


def detectable_difference(questions: int, changed: float, effect: float = 1.0, power: float = POWER) -> float:
    """Return the smallest paired difference that a two-sided test at 5 % finds: ``(z_{α/2} + z_β) √(s / n)``.

    Args:
        questions: The number of questions that both sides answer, at least one.
        changed: The share whose score changes.
        effect: `design_effect`.
        power: The probability of finding it.
    """
    return float((_z() + NormalDist().inv_cdf(power)) * (changed * effect / questions) ** 0.5)


def shown_by(questions: int, groups: int, positives: int) -> str:
    """Say what so many closed questions can show.

    Args:
        questions: The number of closed questions, at least one.
        groups: The number of images or patients that they are about.
        positives: The number of questions of the rarest class.
    """
    effect = design_effect(questions, groups)
    widths = ["nothing"]
    if positives:
        widths = [f"±{100 * share_half_width(RECALL, positives, effect):.1f} points for a recall of {RECALL:.0%}"]
    if min(positives, questions - positives) >= FEWEST:
        half = auroc_half_width(AREA, positives, questions - positives, effect)
        widths.append(f"±{half:.3f} for an AUROC of {AREA}")
    least = 100 * detectable_difference(questions, CHANGED, effect)
    return (
        f"{questions} questions of {groups} images or patients, design effect {effect:.1f}: the rarest class, "
        f"{positives} questions, shows {' and '.join(widths)}; with {CHANGED:.0%} of answers changed a difference of "
        f"{least:.1f} points would be found with {POWER:.0%} power"
    )


def _z() -> float:
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
