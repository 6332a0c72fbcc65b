"""Scripts that import by the names of version 0.1.0 run, and are told the new ones."""

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from mslora_cr.banks.io import load_bank
from mslora_cr.earlier import MOVED


def test_every_name_leads_somewhere() -> None:
    for earlier, places in MOVED.items():
        assert import_module(f"mslora_cr.{earlier}") is not None
        assert all(find_spec(f"mslora_cr.{place}") for place in places), earlier


def test_a_script_of_0_1_0_imports_what_it_did() -> None:
    script = """
import sys, warnings
from mslora_cr.cli import main
import mslora_cr.tiny_model as model
assert "torch" not in sys.modules and callable(main)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from mslora_cr.bank_stack import BankStack
    from mslora_cr.banks import BankError, load_bank
    from mslora_cr.config import ConfigError, StreamConfig
    from mslora_cr.config_file import load_config
    from mslora_cr.data.images import load_image
    from mslora_cr.data.synthetic import make_stream
    from mslora_cr.llava_med import LANGUAGE_LINEARS, load
    from mslora_cr.losses import contrastive_value
    from mslora_cr.tiny_model import make_tiny_llava_med
assert model.make_tiny_llava_med is make_tiny_llava_med
messages = {str(one.message) for one in told if issubclass(one.category, DeprecationWarning)}
assert "mslora_cr.tiny_model has moved: `from mslora_cr.synthetic.model import make_tiny_llava_med`" in messages
import mslora_cr.cli.main, mslora_cr.banks.io, mslora_cr.config.load, mslora_cr.losses.penalty
from mslora_cr.config import load, schema
assert load.__name__ == "mslora_cr.config.load" and mslora_cr.banks.io.load_bank is load_bank
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_module_is_reached_through_its_package() -> None:
    script = """
import sys
for name in ("bank_stack", "data.check", "training.stream"):
    exec(f"import mslora_cr.{name}")
assert "torch" not in sys.modules
assert mslora_cr.bank_stack.BankStack.__name__ == "BankStack"
assert callable(mslora_cr.data.check.check) and callable(mslora_cr.training.stream.train)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_never_was_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match=r"from mslora_cr\.banks\.io import load_bank"):
        assert import_module("mslora_cr.banks").load_bank is load_bank
    for module in ("mslora_cr.banks", "mslora_cr.llava_med"):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = import_module(module).nothing
