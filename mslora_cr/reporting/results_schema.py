"""One JSON Schema of every file of results, made from the models that read them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mslora_cr.clinical.calibrated import CALIBRATION, Calibrations
from mslora_cr.clinical.file import CLINICAL, Clinical
from mslora_cr.evaluation.judge import Judged
from mslora_cr.evaluation.passes import CIRCULAR, CircularFile
from mslora_cr.evaluation.probabilities import PROBABILITIES, AnswerProbability
from mslora_cr.evaluation.probe_result import Probe
from mslora_cr.evaluation.results import EVALUATION, Evaluation
from mslora_cr.evaluation.schemas import (
    ANALYSIS,
    METRICS_FILE,
    ROUTING,
    STAMP,
    Analysis,
    Comparison,
    Metrics,
    Routing,
    Stamp,
)
from mslora_cr.release.records import ReleaseRecord
from mslora_cr.reporting.submission import MANIFEST, Submission
from mslora_cr.reporting.sweep_result import RESULT, SweepResult

FILES: dict[str, type[BaseModel]] = {
    EVALUATION: Evaluation,
    METRICS_FILE: Metrics,
    CLINICAL: Clinical,
    STAMP: Stamp,
    ROUTING: Routing,
    ANALYSIS: Analysis,
    "probe.json": Probe,
    "judged.json": Judged,
    "comparison.json": Comparison,
    CALIBRATION: Calibrations,
    CIRCULAR: CircularFile,
    RESULT: SweepResult,
    MANIFEST: Submission,
    "release.json": ReleaseRecord,
    PROBABILITIES: AnswerProbability,
}
"""Model by file name. `comparison.json` stands for what `compare --output` writes, `release.json` for a record in
`releases/`, and the model of `probabilities.jsonl` describes a line of it."""


def results_schema() -> dict[str, Any]:
    """Return a JSON Schema (draft 2020-12) whose property of a file's name describes that file."""
    names, schema = models_json_schema([(model, "validation") for model in FILES.values()], by_alias=True)
    references = {model: reference for (model, _), reference in names.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Results of MSLoRA-CR",
        "description": "The files of a results folder, by name.",
        "type": "object",
        "properties": {file: references[model] for file, model in FILES.items()},
        "additionalProperties": False,
        **schema,
    }
