from pathlib import Path

import pytest
import yaml

from mslora_cr.config.load import load_config
from mslora_cr.runs.differences import with_former_defaults
from tests.config.test_config import write


def test_a_run_folder_goes_on_with_the_defaults_it_was_begun_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """O-LoRA's λ₁ was 0.5. Its run folder's own configuration says so in full; what a configuration sets comes first."""
    path = write(tmp_path, output_dir=str(tmp_path), method="olora")

    def resumed(*overrides: str) -> object:
        return with_former_defaults(load_config(path, overrides)).model_dump()["olora"]

    relative = {"lambda_2": 0.0, "relative": 3.0}
    assert resumed() == relative and not caplog.messages
    former = load_config(path, ["olora.lambda_1=0.5"])
    former.run_dir.mkdir()
    saved = former.run_dir / "config.yaml"
    saved.write_text(yaml.safe_dump(former.model_dump(mode="json")), encoding="utf-8")
    assert load_config(path).model_dump()["olora"] == relative, "reading a configuration opens no run folder"
    found = with_former_defaults(load_config(path))
    assert found == former and found.training_digest() == former.training_digest()
    assert f"{former.run_dir} continues with olora.lambda_1=0.5" in caplog.text
    assert resumed("olora.lambda_2=0.1") == {"lambda_1": 0.5, "lambda_2": 0.1}
    for given in ("olora.relative=20", "olora.relative=3"):
        value = float(given.partition("=")[2])
        assert resumed(given) == {"lambda_2": 0.0, "relative": value}, given
    assert resumed("run=another") == relative
    for other in ("olora: {lambda_2: 0.0, relative: 3.0}", "ewc: {strength: 1}", "olora: 3", "- olora", "{"):
        saved.write_text(other, encoding="utf-8")
        assert resumed() == relative, other
    saved.write_text(yaml.safe_dump(load_config(path).model_dump(mode="json")), encoding="utf-8")
    assert load_config(saved) == load_config(path)  # as commands that take a run folder read it
