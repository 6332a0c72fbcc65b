"""Settings that the pages share: metrics and their titles, colours of runs and modalities."""

from mslora_cr.metrics.typed import CHOICE, TYPED

METRICS = {"closed": "close accuracy", "f1": "f1 score", "exact": "exact match score"}
"""Names in `published_scores.yaml`, mapped to names in `metrics.json`."""
TITLES = {
    "closed": "closed accuracy",
    "f1": "F1 of open answers",
    "exact": "exact match",
    "benchmark": "the benchmark's own score",
}
REPORTED = {"choice": CHOICE, **METRICS}
"""The columns of a report's table of scores."""
MATRICES = {"benchmark": "benchmark", **REPORTED}
"""The same for tables of tasks and stages. A public benchmark's own score comes first where the run has one. The
headline is the first metric that a run has."""
REPORTED_TITLES = {**TITLES, "choice": CHOICE, "closed": "published closed accuracy"}
ADDED_TITLES = {
    "whole-word accuracy": "closed accuracy by whole words",
    "squad f1": "F1 as SQuAD's",
    "corpus bleu": "corpus BLEU",
    "rouge-l": "ROUGE-L",
    "token recall": "token recall",
    **{name: name for name in TYPED if name != CHOICE},
}
"""Titles of what the published evaluation does not measure, by name in `metrics.json`."""
BENCHMARK_TITLES = {
    "IoU": "mean IoU",
    "recall at IoU 0.5": "recall at IoU 0.5",
    "benchmark": "benchmark's own score",
    "benchmark corrected": "corrected",
    "benchmark without METEOR": "mean of captions' scores without METEOR",
    **{name: name for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "caption ROUGE-L", "CIDEr / 10")},
}
"""The same for boxes and public benchmarks' scorers; shown where a run has them."""
PALETTE = ("#2f7fd6", "#d97a2b", "#2f9e6e", "#a65cc9", "#c94f6d", "#8a8f2a")
"""Colours that are legible on white and on black alike."""
