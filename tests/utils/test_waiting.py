"""A command's threads leave the cores to others while they wait."""

import os

import pytest

from mslora_cr.cli.main import main
from mslora_cr.utils.waiting import POLICIES


def test_commands_wait_passively(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in POLICIES:
        monkeypatch.delenv(name, raising=False)
    assert main(["config", "list"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_of_the_users_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in POLICIES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    assert main(["config", "list"]) == 0
    assert {other: os.environ[other] for other in POLICIES if other in os.environ} == {name: "7"}
