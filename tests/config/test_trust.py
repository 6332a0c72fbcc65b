"""A run folder from elsewhere runs no code: what it names is imported only with the user's consent."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import mslora_cr
from mslora_cr.cli.main import main
from mslora_cr.config import consent, trust
from mslora_cr.config.load import load_config
from mslora_cr.config.methods import load_method
from mslora_cr.config.trust import TrustedMethods, UntrustedMethodError, module_files, trust_file
from mslora_cr.methods.base import method_of
from tests.conftest import ConfigWriter

EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from mslora_cr.methods.mslora_cr import WeightedPenalties
class Evil(WeightedPenalties):
    name = "evil"
"""
NAMED = "checkpoints.foreign.banks.evil:Evil"


@pytest.fixture(scope="module")
def opened(trained_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with `checkpoints/foreign`, a run that is trained and evaluated, and code inside it."""
    here = tmp_path_factory.mktemp("opened")
    settings = yaml.safe_load(trained_config.read_text()) | {"run": "foreign"}
    places = {"output_dir": str(here / "checkpoints"), "results_dir": str(here / "results")}
    (here / "own.yaml").write_text(yaml.safe_dump(settings | places))
    shutil.copytree(trained_config.parent / "checkpoints" / "tiny", here / "checkpoints" / "foreign")
    assert main(["evaluate", str(here / "own.yaml"), "--stages", "seen"]) == 0
    run = here / "checkpoints" / "foreign"
    saved = yaml.safe_load((run / "config.yaml").read_text()) | places | {"run": "foreign", "method": NAMED}
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    (run / "banks" / "evil.py").write_text(EVIL.format(mark=str(here / "EXECUTED")))
    evaluation = here / "results" / "foreign" / "evaluation.json"
    evaluation.write_text(evaluation.read_text().replace('"method": "mslora_cr"', f'"method": "{NAMED}"'))
    shutil.copytree(here / "results" / "foreign", here / "results" / "copy")
    (here / "got").mkdir()  # neither a ledger nor banks: nothing but what the user opens it as makes it a run
    (here / "got" / "config.yaml").write_text("extends: base.yaml\n")
    got = saved | {"run": "got", "output_dir": str(here), "method": "got.evil:Evil"}
    (here / "got" / "base.yaml").write_text(yaml.safe_dump(got))
    shutil.copy(run / "banks" / "evil.py", here / "got")
    (here / "extends.yaml").write_text("extends: checkpoints/foreign/config.yaml\n")
    (here / "link.yaml").symlink_to(run / "config.yaml")
    return here


@pytest.fixture
def here(opened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That directory as the working directory of a user who has named and trusted nothing."""
    monkeypatch.chdir(opened)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trust, "_named", set())
    load_method.cache_clear()
    consent._warn.cache_clear()
    yield opened
    load_method.cache_clear()
    assert not (opened / "EXECUTED").exists()
    assert not [name for name in sys.modules if name.startswith("checkpoints")]


@pytest.mark.parametrize(
    "words",
    [
        ["report", "checkpoints/foreign"],
        ["report", "foreign"],
        ["report", "checkpoints/foreign/config.yaml"],
        ["report", "extends.yaml"],
        ["report", "link.yaml"],
        ["compare", "checkpoints/foreign", "results/copy"],
        ["compare", "results/foreign", "results/copy"],
        ["analyze", "foreign", "--questions", "1"],
        ["export", "foreign", "--output", "out", "--format", "published"],
        ["export", "foreign", "--output", "out", "--format", "peft", "--base", "elsewhere"],
        ["push", "foreign", "owner/name", "--dry-run", "--base", "owner/base"],
        ["bank", "show", "checkpoints/foreign/banks/PCAM"],
        ["config", "show", "checkpoints/foreign/config.yaml"],
        ["data", "check", "checkpoints/foreign/config.yaml", "--no-images"],
    ],
    ids=" ".join,
)
def test_what_needs_no_code_goes_on_without(words: list[str], here: Path) -> None:
    assert main(words) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "foreign", "What?"],
        ["web", "foreign", "--port", "0"],
        ["evaluate", "checkpoints/foreign/config.yaml", "--stages", "all"],
        ["evaluate", "checkpoints/foreign/config.yaml", "--banks-by", "routed"],
        ["train", "checkpoints/foreign/config.yaml", "run=other"],
        ["train", "extends.yaml", "run=other"],
        ["train", "link.yaml", "--dry-run", "run=other"],
        ["bank", "import", "extends.yaml", "run=other", "--from", "checkpoints/foreign"],
        ["bank", "fit-router", "extends.yaml"],
    ],
    ids=" ".join,
)
def test_what_needs_the_code_says_how_to_allow_it(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: method {NAMED} is outside the package" in message and f"--trust-method {NAMED}" in message


def test_a_run_folder_gives_no_consent_by_what_it_extends(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "got"]) == 1
    assert "method got.evil:Evil is outside the package" in capsys.readouterr().err


def test_python_opens_it_without_running_it(here: Path) -> None:
    assert mslora_cr.read_results("foreign").scores is not None
    assert list(mslora_cr.banks_of("checkpoints/foreign")) == ["pathvqa", "slake-vqarad", "PCAM"]
    with pytest.raises(UntrustedMethodError, match="--trust-method"):
        mslora_cr.load("foreign")
    with pytest.raises(UntrustedMethodError, match="--trust-method"):
        mslora_cr.train("checkpoints/foreign")


@pytest.mark.parametrize("given", [[f"method={NAMED}"], ["--trust-method", NAMED]], ids=["named", "trusted"])
def test_no_module_of_a_run_folder_is_imported_whoever_names_it(
    given: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "foreign", *given]) == 1
    assert f"evil.py lies in {here / 'checkpoints/foreign'}, a folder for runs" in capsys.readouterr().err
    assert not trust_file().exists()


# --- a method of the user's own ---------------------------------------------------------------------------------------

METHOD_SOURCE = "from mslora_cr.methods.each import Each\nclass Mine(Each):\n    name = 'mine'\n"


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with `owned.py`, a method of the user's own, who has named and trusted nothing yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(trust, "_named", set())
    (tmp_path / "owned.py").write_text(METHOD_SOURCE)
    yield tmp_path
    _forget(monkeypatch)


def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(trust, "_named", set())
    sys.modules.pop("owned", None)
    consent._warn.cache_clear()
    load_method.cache_clear()


def _run_of(workdir: Path, config_file: ConfigWriter, **changes: Any) -> Path:
    """A run folder, trained or not, whose configuration names `owned:Mine`."""
    folder = workdir / "checkpoints" / "tiny"
    folder.mkdir(parents=True)
    shutil.copy(config_file(method="owned:Mine", **changes), folder / "config.yaml")
    return folder


def test_a_configuration_of_the_users_names_its_method(workdir: Path, config_file: ConfigWriter) -> None:
    assert method_of(load_config(config_file(method="owned:Mine"))).name == "mine"


def test_an_override_names_a_method(workdir: Path, config_file: ConfigWriter) -> None:
    folder = _run_of(workdir, config_file)
    assert method_of(load_config(folder / "config.yaml", ["method=owned:Mine"])).name == "mine"


def test_a_method_is_trusted_once_until_it_changes(
    workdir: Path, config_file: ConfigWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _run_of(workdir, config_file)
    dry_run = ["train", str(folder / "config.yaml"), "--dry-run"]
    assert main(dry_run) == 1
    assert main([*dry_run, "--trust-method", "owned:Mine"]) == 0
    _forget(monkeypatch)
    assert main(dry_run) == 0
    assert list(TrustedMethods.read(trust_file()).methods) == ["owned:Mine"]
    (workdir / "owned.py").write_text(METHOD_SOURCE + "    mixes_banks = False\n")
    _forget(monkeypatch)
    capsys.readouterr()
    assert main(dry_run) == 1
    assert "owned.py has changed since it was trusted" in capsys.readouterr().err
    assert main([*dry_run, "--trust-method", "owned:Mine"]) == 0


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("owned", "'owned': expected module:Class"),
        ("nowhere.mine:Mine", "there is no module 'nowhere' in the working directory"),
        ("sys:Mine", "sys is no file"),
    ],
)
def test_only_a_module_that_is_there_is_trusted(
    method: str, message: str, workdir: Path, config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(config_file()), "--trust-method", method]) == 1
    assert message in capsys.readouterr().err


def test_looking_for_a_module_runs_none_of_its_packages(workdir: Path) -> None:
    package = workdir / "outer" / "inner"
    package.mkdir(parents=True)
    for file in (workdir / "outer" / "__init__.py", package / "__init__.py"):
        file.write_text("raise SystemExit")
    (package / "mine.py").write_text(METHOD_SOURCE)
    (workdir / "space" / "deep").mkdir(parents=True)
    (workdir / "space" / "deep" / "mine.py").write_text(METHOD_SOURCE)
    names = [str(file.relative_to(workdir)) for file in module_files("outer.inner.mine")]
    assert names == ["outer/__init__.py", "outer/inner/__init__.py", "outer/inner/mine.py"]
    assert module_files("space.deep.mine") == [workdir / "space" / "deep" / "mine.py"]
    with pytest.raises(ModuleNotFoundError, match=r"space\.other"):
        module_files("space.other.mine")


def test_a_run_of_a_method_from_outside_is_exported_without_its_code(
    workdir: Path, config_file: ConfigWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger records which banks answer."""
    method = METHOD_SOURCE + "    def banks(self, task, stage, banks_by):\n        return [1, task]\n"
    (workdir / "owned.py").write_text(method)
    config = config_file(method="owned:Mine")
    assert main(["train", str(config), "tasks=[pathvqa,slake-vqarad]"]) == 0
    _forget(monkeypatch)
    (workdir / "owned.py").write_text("raise SystemExit")
    words = ["export", "tiny", "--output", "out", "--format", "peft", "--base", "elsewhere", "--task", "slake-vqarad"]
    assert main(words) == 0
    record = yaml.safe_load((workdir / "out" / "slake-vqarad" / "export.json").read_text())
    assert list(record["banks"]) == ["pathvqa", "slake-vqarad"]
    assert "method owned:Mine is outside the package" in capsys.readouterr().err
