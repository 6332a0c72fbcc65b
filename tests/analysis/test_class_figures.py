"""Figures of closed questions, probabilities and counts by task and stage."""

import json
from pathlib import Path

import pytest

from mslora_cr.analysis.class_figures import class_matrices
from mslora_cr.clinical.file import CLINICAL
from mslora_cr.evaluation.results import read_evaluation
from tests.helpers.report_run import make_run

SHARE = {"value": 0.5, "interval": None}


def test_errors_of_counts_and_calibration_stand_beside_the_figures_of_classes(tmp_path: Path) -> None:
    _, results = make_run(tmp_path, "seq", "sequential", ("pathvqa", "PCAM"))
    evaluation = read_evaluation(results)
    assert evaluation is not None
    parts = dict.fromkeys(("reliability", "resolution", "uncertainty", "risk_coverage_area"), 0.1)
    for cell in evaluation.cells:
        file = (results / cell.answers).with_name(CLINICAL)
        content = json.loads(file.read_text())
        error = {"value": cell.stage / 2, "interval": None}
        content["counts"] = {"questions": 20, "unparsed": 0, "mean_absolute_error": error, "exact": SHARE}
        content["closed"]["calibration"] = {
            **parts,
            **{"expected_error": 0.05, "brier": 0.2, "accuracy_at_80": 1.0, "accuracy_at_90": 1.0},
        }
        file.write_text(json.dumps(content))
    matrices = class_matrices(evaluation, results)
    assert matrices["mean absolute error"].summary()["own_stage_average"] == pytest.approx(0.75)
    assert matrices["calibration error"].summary()["final_average"] == pytest.approx(5.0)
    assert matrices["Brier score"].summary()["final_average"] == pytest.approx(0.2)
    assert "balanced accuracy" in matrices
