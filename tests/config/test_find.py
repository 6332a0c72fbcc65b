"""Runs by name and by folder, from `checkpoints/` on."""

from pathlib import Path

import pytest
import yaml

from mslora_cr.config.find import find_run
from mslora_cr.config.schema import ConfigError


def run_folder(output: Path, name: str) -> Path:
    """A run folder with nothing but its configuration."""
    task = {"name": "pathvqa", "epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    settings = {"run": name, "output_dir": str(output), "model": {"path": "m"}, "data": {"root": "d"}, "tasks": [task]}
    (output / name).mkdir(parents=True)
    (output / name / "config.yaml").write_text(yaml.safe_dump(settings))
    return output / name


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for group in ("demo", "other"):
        run_folder(Path("checkpoints") / group, "mslora_cr")
    run_folder(Path("checkpoints"), "alone")
    (tmp_path / "demo" / "mslora_cr").mkdir(parents=True)  # results or data, not a run
    with pytest.raises(ConfigError, match=r"several runs are called mslora_cr: .*demo/mslora_cr, .*other/mslora_cr"):
        find_run("mslora_cr")
    assert find_run("alone").run_dir == Path("checkpoints/alone")
    for target in ("demo/mslora_cr", "checkpoints/demo/mslora_cr", tmp_path / "checkpoints/demo/mslora_cr"):
        assert find_run(target).run_dir == Path("checkpoints/demo/mslora_cr")
    run_folder(Path("checkpoints"), "mslora_cr")
    with pytest.raises(ConfigError, match="several runs are called mslora_cr"):
        find_run("mslora_cr")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_configuration_in_another_encoding_is_refused_with_the_remedy(encoding: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, "tiny")
    file = folder / "config.yaml"
    file.write_bytes((file.read_text() + "# é\n").encode(encoding))
    for target in (file, folder):
        with pytest.raises(ConfigError, match=r"config\.yaml: .*not UTF-8 text; save the file as UTF-8"):
            find_run(target)
