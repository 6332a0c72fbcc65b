"""Which decoder layers are recomputed in the backward pass: any number gives the same banks, to the bit."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mslora_cr.cli.main import main
from mslora_cr.training import objective as objective_module
from mslora_cr.training.out_of_memory import NOTE, LayersNote, least_layers
from mslora_cr.training.recomputation import Memory, layers_to_recompute
from mslora_cr.training.trainer import BankTrainer
from mslora_cr.utils.state import NewerError
from tests.conftest import ConfigWriter, bank_bytes, first_in_make_test

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


@pytest.mark.parametrize("setting", first_in_make_test("auto", "1"))
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


@pytest.mark.parametrize("fails", first_in_make_test(17, 2))  # in the second micro-batch, in the first
def test_a_step_that_runs_out_of_memory_is_made_again_exactly(
    fails: int, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a backward pass, with dropout, accumulation, and a learnable weight."""
    accumulated = ("training.per_device_train_batch_size=2", "tasks=[pathvqa, slake-vqarad]")
    plain = trained(*accumulated, "training.gradient_checkpointing=false")
    hook, calls = objective_module.penalty_hook, 0

    def deadly(pending: Any, key: Any) -> Any:
        add = hook(pending, key)

        def called(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == fails:
                raise torch.OutOfMemoryError("planted")
            return add(gradient)

        return called

    monkeypatch.setattr(objective_module, "penalty_hook", deadly)
    ours = trained(*accumulated, "training.gradient_checkpointing=auto")
    assert calls > fails
    assert "memory ran out; the activations of 1 decoder layers are recomputed from here on" in capsys.readouterr().err
    assert ours[0] == plain[0]
    assert ours[1] == plain[1]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            "false",
            "with 0 of 3 decoder layers recomputed (planted). Set training.gradient_checkpointing to true or auto",
        ),
        ("true", "although all 3 decoder layers are recomputed (planted). To need less memory, use a smaller"),
        ("auto", "although all 3 decoder layers are recomputed (planted). To need less memory, use a smaller"),
    ],
)
def test_memory_that_does_not_suffice_is_explained(
    setting: str,
    words: str,
    config_file: ConfigWriter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(BankTrainer, "compute_loss", fail)
    assert main(["train", str(config_file()), f"training.gradient_checkpointing={setting}"]) == 1
    assert f"error: tiny/pathvqa: memory ran out at step 1{'' if setting == 'false' else ','} {words}" in (
        capsys.readouterr().err
    )
    assert not list(tmp_path.glob(f"checkpoints/tiny/work/*/{NOTE}*"))


def test_an_optimizer_that_runs_out_of_memory(
    config_file: ConfigWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have moved half of the bank, so the step is not made again: the same command goes on with more layers
    recomputed, to the same bank."""
    settings = ["tasks=[pathvqa]", "training.gradient_checkpointing=auto"]
    assert main(["train", str(config_file()), *settings, f"output_dir={tmp_path / 'whole'}"]) == 0
    step, calls = torch.optim.AdamW.step, 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        done = step(*args, **kwargs)
        if calls == 3:
            raise torch.OutOfMemoryError("planted")
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    assert main(["train", str(config_file()), *settings]) == 1
    assert "checkpoint-2, with 1 of 3 recomputed, to the same bank" in capsys.readouterr().err
    assert main(["train", str(config_file()), *settings]) == 0
    assert "1 of 3 decoder layers are recomputed: memory ran out with fewer" in capsys.readouterr().err
    assert bank_bytes(tmp_path / "checkpoints" / "tiny") == bank_bytes(tmp_path / "whole" / "tiny")


def test_what_a_note_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The most that any rank's says of such a batch or a smaller one; a damaged one says nothing."""
    assert least_layers(tmp_path / "none", 8) == 0
    for number, (layers, samples) in enumerate([(8, 16), (24, 24), (16, 16)]):
        LayersNote(recomputed_layers=layers, samples=samples).write(tmp_path / f"{NOTE}{number}.json")
    assert [least_layers(tmp_path, samples) for samples in (8, 16, 24)] == [0, 16, 24]
    (tmp_path / f"{NOTE}1.json").write_text('{"recomputed_layers": -1, "samples": 24}')
    with caplog.at_level("WARNING", "mslora_cr"):
        assert least_layers(tmp_path, 24) == 16
    (tmp_path / f"{NOTE}1.json").write_text('{"version": 2}')
    with pytest.raises(NewerError, match="upgrade mslora-cr"):
        least_layers(tmp_path, 24)


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
