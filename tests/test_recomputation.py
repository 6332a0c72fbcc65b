"""Which decoder layers are recomputed in the backward pass: any number gives the same banks, to the bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.cli.main import main
from mslora_cr.training import trainer as trainer_module
from mslora_cr.training.recomputation import Memory, layers_to_recompute
from mslora_cr.training.trainer import BankTrainer
from tests.conftest import ConfigWriter, bank_bytes

Trained = Callable[..., tuple[dict[str, bytes], str, str]]


@pytest.fixture
def trained(config_file: ConfigWriter, tmp_path: Path) -> Trained:
    """Trains the first two tasks, two steps each; gives the banks, the second task's log, and the ledger."""

    def run(*overrides: str) -> tuple[dict[str, bytes], str, str]:
        config = config_file()
        folder = tmp_path / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        tasks = ["tasks=[pathvqa, slake-vqarad]", "tasks.*.epochs=0.5", 'training.save_strategy="no"']
        assert main(["train", str(config), *tasks, *overrides]) == 0
        place = folder / "tiny"
        log = (place / "logs" / "slake-vqarad.jsonl").read_text()
        return bank_bytes(place), log, (place / "ledger.json").read_text()

    return run


@pytest.mark.parametrize("setting", ["1", "auto"])
def test_any_number_of_layers_gives_the_same_banks(setting: str, trained: Trained, monkeypatch: Any) -> None:
    calls: dict[int, int] = {}

    class Watched(BankTrainer):
        def __init__(self, stack: Any, **kwargs: Any) -> None:
            super().__init__(stack=stack, **kwargs)
            for number, layer in enumerate(stack.base.model.language_model.layers):
                layer.self_attn.register_forward_pre_hook(
                    lambda *_, number=number: calls.update({number: calls.get(number, 0) + 1})
                )

    monkeypatch.setattr("mslora_cr.stream.train.BankTrainer", Watched)
    everything = trained("lora.dropout=0", "training.gradient_checkpointing=true")
    assert calls == dict.fromkeys(range(3), 8)  # two tasks of two steps, and each layer again in the backward pass
    assert everything[2].count('"recomputed_layers": 3') == 2
    calls.clear()
    some = trained("lora.dropout=0", f"training.gradient_checkpointing={setting}")
    recomputed = {"1": 1, "auto": 0}[setting]  # on the CPU memory is not measured
    assert calls == {number: 8 if number < recomputed else 4 for number in range(3)}
    assert some[2].count(f'"recomputed_layers": {recomputed}') == 2
    assert some[0] == everything[0]
    assert [line.split('"grad_norm"')[0] for line in some[1].splitlines()] == [
        line.split('"grad_norm"')[0] for line in everything[1].splitlines()
    ]


@pytest.mark.parametrize("fails", [2, 17], ids=["in the first micro-batch", "in the second"])
def test_a_step_that_runs_out_of_memory_is_made_again_exactly(
    fails: int, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a backward pass, with dropout, accumulation, and a learnable weight."""
    accumulated = ("training.per_device_train_batch_size=2", "tasks=[pathvqa, slake-vqarad]")
    plain = trained(*accumulated, "training.gradient_checkpointing=false")
    hook, calls = trainer_module.penalty_hook, 0

    def deadly(pending: Any, key: Any) -> Any:
        add = hook(pending, key)

        def called(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == fails:
                raise torch.OutOfMemoryError("planted")
            return add(gradient)

        return called

    monkeypatch.setattr(trainer_module, "penalty_hook", deadly)
    ours = trained(*accumulated, "training.gradient_checkpointing=auto")
    assert calls > fails
    assert "memory ran out; the activations of 1 decoder layers are recomputed from here on" in capsys.readouterr().err
    assert ours[0] == plain[0]
    assert ours[1] == plain[1]


def test_a_setting_that_is_not_auto_does_not_retreat(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(BankTrainer, "compute_loss", fail)
    with pytest.raises(torch.OutOfMemoryError):
        trained("training.gradient_checkpointing=false")


def test_layers_to_recompute_by_hand() -> None:
    """The 7B model on 80 GB: 29 GB with all 32 layers recomputed, 2 GB for each that is not, 2 GB held back."""
    memory = Memory(peak=29, layer=2, room=73)
    assert layers_to_recompute(32, memory, 2) == 11  # 42 GB keep 21 layers
    assert layers_to_recompute(32, memory._replace(room=129), 2) == 0
    assert layers_to_recompute(32, memory._replace(room=20), 2) == 32


def test_another_word_is_refused(config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("some", "-1", "0.5"):
        assert main(["train", str(config_file()), f"training.gradient_checkpointing={wrong}"]) == 1
        assert "training.gradient_checkpointing: should be true, false, auto, or how many layers" in (
            capsys.readouterr().err
        )
