"""The golden numbers, and that the replay notices a wrong one."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import first_in_make_test
from tests.golden.replay import MERGE_MODES, Replay, main

GOLDEN = Path(__file__).parent / "tiny_a"


@pytest.mark.parametrize("merge_mode", first_in_make_test(*MERGE_MODES))
def test_every_golden_number_is_met(merge_mode: str) -> None:
    checks = Replay(GOLDEN, merge_mode).run()
    assert len(checks) == 19
    assert [check.name for check in checks if not check.passed] == []


def test_an_altered_number_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second task, behind which the others are left out."""
    folder = tmp_path / "tiny"
    shutil.copytree(GOLDEN, folder)
    training = json.loads((folder / "training.json").read_text())
    training["tasks"] = training["tasks"][:2]
    training["tasks"][1]["train_loss"][3] += 1e-3
    (folder / "training.json").write_text(json.dumps(training))
    answers = json.loads((folder / "generations.json").read_text())
    (folder / "generations.json").write_text(json.dumps([answer for answer in answers if answer["banks"] <= 2]))
    assert main([str(folder), "--merge-mode", "merge"]) == 1
    printed = capsys.readouterr().out
    assert [line.split("  ")[0] for line in printed.splitlines() if line.endswith("FAILED")] == ["training loss"]
