"""However a stream is spread over processes, the numbers are those of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mslora_cr.banks.io import load_bank
from mslora_cr.models.llava_med import load
from mslora_cr.utils.files import file_digest
from tests.conftest import first_in_make_test
from tests.distributed import faults
from tests.distributed.conftest import FIXED, TWO_TASKS, Run, write_exact_config
from tests.distributed.launch import compare_runs, deepspeed_file, launch, logged

TASKS = ("pathvqa", "slake-vqarad", "PCAM")
RAGGED = "tasks.*.batch_size=6"
"""Neither 16 nor 8 records are a multiple of it."""
SPLIT = "training.per_device_train_batch_size=1"
CHECKPOINTED = ("training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={use_reentrant: false}")


@pytest.mark.parametrize(
    ("stage", "weights"),
    first_in_make_test(
        *((stage, "fixed") for stage in ("ddp", "zero3")),
        ("ddp", "learnable"),
        *((stage, "fixed") for stage in ("zero1", "zero2")),
        *((stage, "learnable") for stage in ("zero3", "zero1", "zero2")),
        first=3,
    ),
)
def test_two_processes_give_the_numbers_of_one(trained: Run, stage: str, weights: str) -> None:
    compare_runs(trained(stage, weights), trained("one", weights), TASKS)


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3"))
def test_records_that_do_not_fill_the_last_batch_are_not_repeated(trained: Run, stage: str) -> None:
    compare_runs(trained(stage, "fixed", RAGGED), trained("one", "fixed", RAGGED), TASKS)


def test_both_penalties_are_on_and_learnable_weights_move(trained: Run) -> None:
    steps = logged(trained("one", "learnable"), "PCAM")
    assert all(row["contrastive"] > 0 and row["orthogonality"] > 0 for row in steps)
    assert len({row["alpha"] for row in steps}) == len({row["beta"] for row in steps}) == len(steps)


def test_four_micro_batches_with_checkpointing_equal_one_batch(trained: Run) -> None:
    compare_runs(trained("one", "fixed", SPLIT, *CHECKPOINTED), trained("one"), TASKS)


@pytest.mark.long  # test_methods.py has micro-batches of two processes under ZeRO-3
@pytest.mark.parametrize("stage", ["ddp", "zero2", "zero3", "zero1"])
def test_micro_batches_of_two_processes_equal_one_batch(trained: Run, stage: str) -> None:
    """2 processes × 1 sample × 2 micro-batches against 4 samples at once."""
    compare_runs(trained(stage, "fixed", SPLIT), trained("one"), TASKS)


@pytest.mark.long
def test_zero3_with_accumulation_checkpointing_and_concatenated_banks(trained: Run) -> None:
    ours = trained("zero3", "fixed", SPLIT, *CHECKPOINTED, "lora.fold=concatenate")
    compare_runs(ours, trained("one"), TASKS)


def test_offload_gives_the_numbers_of_one(trained: Run) -> None:
    compare_runs(trained("zero3_offload"), trained("one"), TASKS)


@pytest.mark.long  # it tests the comparison
def test_a_penalty_without_gradient_is_caught(trained: Run, tmp_path: Path, tiny_settings: dict[str, Any]) -> None:
    config = write_exact_config(tmp_path, tiny_settings, FIXED)
    override = deepspeed_file("zero3", tmp_path)
    launch(["train", config, TWO_TASKS, *override], before=faults.penalty_without_gradient)
    ours = tmp_path / "checkpoints" / "tiny"
    compare_runs(ours, trained("one"), TASKS[:1])  # the first task has no penalties
    with pytest.raises(AssertionError):
        compare_runs(ours, trained("one"), TASKS[:2])


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3", "zero1", "zero2"))
def test_bf16_trains_with_penalties_in_float32(trained: Run, stage: str) -> None:
    ours = trained(stage, "fixed", "training.bf16=true", "model.dtype=bfloat16")
    for task in TASKS:
        steps, exact = logged(ours, task), logged(trained("one"), task)
        assert steps[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)
        for name in {"contrastive", "orthogonality"} & exact[0].keys():
            # The first step's matrices are those of float32, at most rounded; the terms are not.
            assert steps[0][name] == pytest.approx(exact[0][name], rel=2e-3)
    bank = load_file(ours / "banks" / "PCAM" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in bank.values()} == {torch.float32}
    # What the optimizer holds, not what DeepSpeed rounds it to for the model.
    assert all((tensor != tensor.bfloat16().float()).float().mean() > 0.9 for tensor in bank.values())


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3", "zero1", "zero2", first=2))
def test_a_bank_is_whole_and_plain_peft_opens_it(trained: Run, stage: str, tiny_model: Path) -> None:
    run = trained(stage)
    ours, one = (load_bank(folder / "banks" / "PCAM") for folder in (run, trained("one")))
    assert {name: (a.shape, b.shape) for name, (a, b) in ours.matrices.items()} == {
        name: (a.shape, b.shape) for name, (a, b) in one.matrices.items()
    }
    model = PeftModel.from_pretrained(load(tiny_model, dtype=torch.float32).model, run / "banks" / "PCAM")
    loaded = {name: tensor for name, tensor in model.state_dict().items() if "lora_B" in name}
    assert len(loaded) == len(ours.matrices) and all(tensor.any() for tensor in loaded.values())


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3", "zero1", "zero2", first=2))
def test_earlier_banks_stay_as_they_were_written(trained: Run, stage: str) -> None:
    run = trained(stage)
    ledger = json.loads((run / "ledger.json").read_text(encoding="utf-8"))
    for task in TASKS:
        folder = run / "banks" / task
        assert file_digest(folder / "adapter_model.safetensors") == ledger["tasks"][task]["digest"]
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors", "bank.json", "router.safetensors"
        ]  # fmt: skip
    assert sorted(path.name for path in run.iterdir()) == ["banks", "config.yaml", "ledger.json", "logs", "work"]
    assert not list((run / "work").iterdir())


@pytest.mark.parametrize("stage", first_in_make_test("ddp", "zero3", "zero1", "zero2", first=2))
def test_ranks_share_what_the_router_learns(trained: Run, stage: str) -> None:
    for task in TASKS:
        ours, one = (load_file(run / "banks" / task / "router.safetensors") for run in (trained(stage), trained("one")))
        assert ours["count"] == one["count"]
        for name in ("mean", "scatter"):
            assert (ours[name] - one[name]).norm() <= 1e-5 * one[name].norm()


def test_two_processes_route_and_answer_as_one(trained: Run) -> None:
    answers = []
    for processes, folder in ((1, "alone"), (2, "together")):
        run = trained("one")
        results = run.parents[1] / folder
        command = [
            "evaluate",
            run / "config.yaml",
            "--banks-by",
            "routed",
            "--stages",
            "seen",
            f"results_dir={results}",
        ]
        launch(command, processes)
        files = sorted((results / "tiny" / "routed").rglob("answer-file.jsonl"))
        answers.append([file.read_bytes() for file in files])
        answers[-1].append((results / "tiny" / "routed" / "routing.json").read_bytes())
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1 + 2 + 3 + 1
