"""MLflow, on a database of its own, holds one run per task, which a launch after a kill continues."""

from pathlib import Path

import pytest

from mslora_cr.cli.main import main
from tests.conftest import ConfigWriter
from tests.helpers.killing import KillPoint, run_until_killed


@pytest.mark.long
def test_a_task_that_was_killed_goes_on_in_its_mlflow_run(
    config_file: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs MLflow: pip install mlflow-skinny sqlalchemy alembic")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    words = ["train", str(config_file()), "tasks=[pathvqa, slake-vqarad]", "training.report_to=mlflow"]
    kill = KillPoint("mslora_cr.training.callbacks:JsonLinesCallback.on_log", call=4)
    run_until_killed(words, kill, tmp_path / "output")
    assert main(words) == 0
    client = mlflow.MlflowClient()
    [experiment] = client.search_experiments()
    runs = {run.info.run_name: run.info for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tiny/pathvqa", "tiny/slake-vqarad"}
    for name, run in runs.items():
        losses = client.get_metric_history(run.run_id, "loss")
        steps = [point.step for point in losses]
        assert run.status == "FINISHED" and steps == ([1, 2, 3, 3, 4] if name == "tiny/pathvqa" else [1, 2, 3, 4])
        assert len({(point.step, point.value) for point in losses}) == 4  # logged again, with the same numbers

    # A server that does not know the run gets a new one; one that cannot be used is told in a line.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    run_until_killed([*words, "run=again"], kill, tmp_path / "output")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'third.db'}")
    assert main([*words, "run=again"]) == 0
    assert "MLflow does not know the run" in capsys.readouterr().err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    assert main([*words, "run=last"]) == 1
    assert "training.report_to: MLflow cannot start a run" in capsys.readouterr().err
