"""The published JSON Schema takes what an evaluation writes."""

import json
from pathlib import Path

import pytest

from mslora_cr.evaluation.probabilities import AnswerProbability
from mslora_cr.reporting.results_schema import FILES, results_schema
from tests.helpers.report_run import make_run


def test_the_schema_takes_a_results_folder_and_refuses_another_type(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    _, results_dir = make_run(tmp_path, "seq", "sequential", ("pathvqa", "PCAM"))
    validator = jsonschema.Draft202012Validator(results_schema())
    validator.check_schema(validator.schema)
    files = [path for path in results_dir.rglob("*.json") if path.name in FILES]
    assert {path.name for path in files} == {"evaluation.json", "metrics.json", "clinical.json"}
    for path in files:
        content = json.loads(path.read_text())
        validator.validate({path.name: content})
        assert not validator.is_valid({path.name: content | {"version": "one"}})
    line = AnswerProbability(tokens=2, candidates=("no", "yes"), logprobs=(-0.5, -1.0), lengths=(2, 2)).row("q1")
    validator.validate({"probabilities.jsonl": json.loads(json.dumps(line))})
    assert not validator.is_valid({"probabilities.jsonl": line | {"logprobs": "none"}})
