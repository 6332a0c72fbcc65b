"""Protocols of a stream: few shots, boundaries that are not sharp, one task at several sites."""

import json
from pathlib import Path
from typing import Any

import pytest

from mslora_cr.banks.io import load_bank
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError
from mslora_cr.data.images import resolve_image
from mslora_cr.data.records import DataError
from mslora_cr.data.tasks import task_image_roots, training_records, validation_records
from mslora_cr.reporting.report import write_report
from mslora_cr.stream.plan import previous_task
from tests.conftest import ConfigWriter
from tests.helpers.report_run import make_run


def test_few_shots_are_nested_and_none_of_them_is_held_out(config_file: ConfigWriter) -> None:
    path, before = config_file(), set[Any]()
    for samples in (2, 5, 9):
        config = load_config(path, ["data.validation=0.25", f"tasks.pathvqa.samples={samples}"])
        held_out = validation_records(config, config.stream[0])
        taken = {record.id for record in training_records(config, config.stream[0])}
        assert len(taken) == samples and before <= taken and held_out is not None
        assert not taken & {record.id for record in held_out.conversations}
        before = taken
    other = load_config(path, ["seed=7", "tasks.pathvqa.samples=9"])
    assert {record.id for record in training_records(other, other.stream[0])} != before
    config = load_config(path, ["tasks.pathvqa.samples=99"])
    with pytest.raises(DataError, match=r"tasks.pathvqa.samples is 99, but \S+train.json has 16 records to train on"):
        training_records(config, config.stream[0])


def test_a_mixed_boundary_moves_records_to_the_task_before(config_file: ConfigWriter) -> None:
    """Nothing is lost and nothing is seen twice; images of both tasks are found, and a method that replays sees all."""
    path = config_file(method="joint", regularization={})
    sharp, mixed = load_config(path), load_config(path, ["tasks.*.mixed=0.25"])
    before = [list(training_records(sharp, task)) for task in sharp.stream]
    after = [training_records(mixed, task) for task in mixed.stream]
    first, second, last = (len(records) for records in before)
    assert [len(records) for records in after] == [
        first + round(second / 4),
        second - round(second / 4) + round(last / 4),
        last - round(last / 4),
    ]
    said = [sorted(str(record.turns) for records in kind for record in records) for kind in (before, after)]
    assert said[0] == said[1]
    for task, records in zip(mixed.stream, after, strict=True):
        for record in records:
            resolve_image(record.images[0], task_image_roots(mixed, task))
    assert after[0].digest != after[0].file_digest and "Slake-VQARad/train.json: record" in after[0].location(first)
    assert main(["train", str(path), "tasks=[pathvqa,slake-vqarad]", "tasks.*.mixed=0.25", "tasks.*.epochs=0.3"]) == 0


def test_another_site_extends_the_bank_of_the_site_before(config_file: ConfigWriter) -> None:
    """Without a move (the rate is too small) the second site's bank is the first one's; the third site reuses it without
    a step. A method that goes on with one bank, or adds banks up, starts as ever."""
    path = config_file(method="each", regularization={})
    site = ["tasks.PCAM.same_as=pathvqa", "tasks.PCAM.extend=true"]
    third = ["tasks.slake-vqarad.same_as=pathvqa", "tasks.slake-vqarad.reuse=true"]
    rates = ["tasks=[pathvqa,PCAM,slake-vqarad]", "tasks.PCAM.learning_rate=1e-30", "tasks.*.epochs=0.3"]
    assert main(["train", str(path), *rates, *site, *third]) == 0
    run = load_config(path).run_dir
    first, *others = (load_bank(run / "banks" / name) for name in ("pathvqa", "PCAM", "slake-vqarad"))
    for other in others:
        for name, (a, b) in first.matrices.items():
            assert a.equal(other.matrices[name][0]) and b.equal(other.matrices[name][1]) and b.any()
    assert json.loads((run / "ledger.json").read_text())["tasks"]["slake-vqarad"]["steps"] == 0
    assert main(["train", str(path), *rates, *third, "method=olora", "run=sum"]) == 1
    for method, starts in (("each", ["pathvqa"]), ("sequential", ["slake-vqarad"]), ("olora", [])):
        config = load_config(path, [f"method={method}", *site])
        assert [task.name for task in previous_task(config, config.task("PCAM"))] == starts


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.PCAM.same_as=pathvq", "did you mean 'pathvqa'?"),
        ("tasks.PCAM.same_as=PCAM", "tasks.PCAM.same_as: 'PCAM' is no first site in the stream"),
        ("tasks.PCAM.extend=true", "tasks.PCAM.extend: needs same_as"),
        ("tasks.PCAM.reuse=true", "tasks.PCAM.reuse: needs same_as"),
        ("tasks.PCAM.mixed=1", "tasks.PCAM.mixed"),
        ("tasks.PCAM.samples=0", "tasks.PCAM.samples"),
    ],
)
def test_a_wrong_protocol_is_refused(override: str, message: str, config_file: ConfigWriter) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file(), [override])
    assert message in str(caught.value)


def test_the_report_gives_forgetting_by_site(tmp_path: Path) -> None:
    tasks = ("pathvqa", "derm", "PCAM")
    run_dir, results_dir = make_run(
        tmp_path, "sites", "sequential", tasks, right=lambda task, stage: 18 - 2 * (stage - 1 - tasks.index(task))
    )
    file = results_dir / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"same_as": {"PCAM": "pathvqa"}}))
    write_report(run_dir, results_dir)
    page = (results_dir / "report.md").read_text(encoding="utf-8")
    rows = [line for line in page.partition("### Sites of one task")[2].splitlines() if line.startswith("| pathvqa |")]
    assert "| pathvqa | pathvqa | exact match | – | 90.00 | 70.00 | 20.00 |" in rows
    assert "| pathvqa | PCAM | exact match | – | 90.00 | 90.00 | 0.00 |" in rows
    assert "Sites of one task" in (results_dir / "report.html").read_text(encoding="utf-8")
