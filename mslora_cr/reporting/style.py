"""Settings that the pages share: metrics and their titles, colours of runs and modalities."""

METRICS = {"closed": "close accuracy", "f1": "f1 score", "exact": "exact match score"}
"""Name in `published_scores.yaml` → name in `metrics.json`; the first that a run has is its headline."""
TITLES = {"closed": "closed accuracy", "f1": "F1 of open answers", "exact": "exact match"}
ADDED_TITLES = {
    "whole-word accuracy": "closed accuracy by whole words",
    "squad f1": "F1 as SQuAD's",
    "corpus bleu": "corpus BLEU",
    "rouge-l": "ROUGE-L",
    "token recall": "token recall",
}
"""Title by name in `metrics.json` of what the published evaluation does not measure."""
PALETTE = ("#2f7fd6", "#d97a2b", "#2f9e6e", "#a65cc9", "#c94f6d", "#8a8f2a")
"""Colours that read on white and on black alike."""
