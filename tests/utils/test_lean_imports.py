"""A command leaves out parts of libraries, and whatever needs them later in the same process gets them."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import bank_bytes

PARTS = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "scipy.optimize", "peft", "bitsandbytes")
CODE = """
import sys
from mslora_cr.cli.main import main
config, folder = sys.argv[1:]
assert main(["ask", config, "--task", "PCAM", "Is it?"]) == 0
assert not {parts!r} & sys.modules.keys(), {parts!r} & sys.modules.keys()
assert main(["train", config, "output_dir=" + folder]) == 0
assert "bitsandbytes" not in sys.modules
from transformers.utils.import_utils import is_bitsandbytes_available
assert is_bitsandbytes_available()  # as an optimizer asks
quantised = ("run=quantised", "tasks=[PCAM]", "method=each", "model.quantization=4bit", "output_dir=" + folder)
assert main(["train", config, *quantised]) == 0
"""


def test_one_process_answers_trains_and_quantises(trained_config: Path, tmp_path: Path) -> None:
    code = CODE.format(parts=set(PARTS))
    done = subprocess.run([sys.executable, "-c", code, trained_config, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bank_bytes(tmp_path / "tiny") == bank_bytes(trained_config.parent / "checkpoints" / "tiny")
    assert bank_bytes(tmp_path / "quantised")
