"""How often a stream of updates is released wrongly, and how often rightly: streams simulated through the gate's test.

    python -m benchmarks.release --trials 4000

Each update redraws answers to an earlier task and may lose some for good; the gate compares with the stage that learned
the task, and for contrast with the predecessor. Streams of 8 and of 20 updates are judged at the levels that the gate
spends, and, for contrast, at the same level every time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mslora_cr.statistics.intervals import independent
from mslora_cr.statistics.noninferiority import non_inferiority, sample_size, spent

LEVEL, MARGIN, QUESTIONS, REDRAWN = 0.05, 0.03, 934, 0.04


def stream(generator: np.random.Generator, updates: int, lost: float) -> np.ndarray:
    """Scores of one task after each update, (updates + 1, questions): a share `REDRAWN` of the answers is drawn anew at
    the accuracy that the model has by then, which falls by `lost` with each update."""
    accuracy, scores = 0.8, [generator.random(QUESTIONS) < 0.8]
    for update in range(1, updates + 1):
        drawn = generator.random(QUESTIONS) < REDRAWN + lost
        # Where answers are drawn anew, the share right makes the whole fall by `lost` on average.
        right = (accuracy * (REDRAWN + lost) - lost) / (REDRAWN + lost)
        scores.append(np.where(drawn, generator.random(QUESTIONS) < max(right, 0.0), scores[-1]))
        accuracy = 0.8 - update * lost
    return np.array(scores, dtype=np.float64)


def passes(before: np.ndarray, after: np.ndarray, level: float) -> bool:
    found = non_inferiority(after - before, independent(QUESTIONS), MARGIN, level, binary=True)
    return found.bound > -MARGIN


def creep(trials: int, updates: int, lost: float) -> dict[str, list[float]]:
    """The share of streams that were released up to each update, by what they are compared with."""
    generator = np.random.default_rng(7)
    counts = {"learned": np.zeros(updates), "predecessor": np.zeros(updates)}
    for _ in range(trials):
        scores = stream(generator, updates, lost)
        alive = dict.fromkeys(counts, True)
        for number in range(1, updates + 1):
            references = {"learned": scores[0], "predecessor": scores[number - 1]}
            for name, reference in references.items():
                alive[name] = alive[name] and passes(reference, scores[number], LEVEL)
                counts[name][number - 1] += alive[name]
    return {name: (count / trials).round(4).tolist() for name, count in counts.items()}


def false_releases(trials: int, candidates: int) -> dict[str, float]:
    """The share of streams in which any of several candidates that lose exactly the margin is released."""
    generator = np.random.default_rng(11)
    wrong = {"spent": 0, "the same level each time": 0}
    for _ in range(trials):
        passed = dict.fromkeys(wrong, False)
        for number in range(1, candidates + 1):
            values = generator.choice([1.0, -1.0, 0.0], p=[0.025, 0.055, 0.92], size=QUESTIONS)
            p = non_inferiority(values, independent(QUESTIONS), MARGIN, LEVEL, binary=True).p
            passed["spent"] |= p < spent(LEVEL, number)
            passed["the same level each time"] |= p < LEVEL
        for name in wrong:
            wrong[name] += passed[name]
    return {name: count / trials for name, count in wrong.items()}


def power(trials: int, level: float) -> dict[str, float]:
    """The size at a loss of the margin, and the power where nothing is lost, with 8 % of the answers changed."""
    generator = np.random.default_rng(13)
    shares = {"size": [0.025, 0.055, 0.92], "power": [0.04, 0.04, 0.92]}
    found = {}
    for name, chances in shares.items():
        draws = (generator.choice([1.0, -1.0, 0.0], p=chances, size=QUESTIONS) for _ in range(trials))
        ps = [non_inferiority(values, independent(QUESTIONS), MARGIN, level, binary=True).p for values in draws]
        found[name] = float(np.mean(np.array(ps) < level))
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    figures = {
        "questions for a power of 0.9 at 2.5 %": sample_size(0.08, MARGIN, 0.025, 0.9),
        "one test at 2.5 %": power(args.trials, 0.025),
        "8 candidates that lose the margin": false_releases(args.trials, 8),
        "20 candidates that lose the margin": false_releases(args.trials, 20),
        "released up to each of 8 updates, 1.5 points lost a time": creep(args.trials // 4, 8, 0.015),
        "released up to each of 8 updates, nothing lost": creep(args.trials // 4, 8, 0.0),
    }
    print(json.dumps(figures, indent=2))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    main()
