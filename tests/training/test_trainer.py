import json
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.data.collator import TrainingCollator, in_batches, padding_share
from mslora_cr.data.datasets import ConcatTrainDataset, TrainDataset
from mslora_cr.data.images import image_roots
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.records import TrainingRecords
from mslora_cr.losses.bank_penalties import BankPenalties
from mslora_cr.models.language import last_mlp
from mslora_cr.models.llava_med import LlavaMed, load
from mslora_cr.training import checkpoints as checkpoints_module
from mslora_cr.training.sampler import FixedOrderSampler
from mslora_cr.training.trainer import BankTrainer, loss_mask
from tests.conftest import first_in_make_test

TASK = "slake-vqarad"  # the second of the stream, with answers of several lengths

Rows = list[dict[str, Any]]
Retrain = Callable[..., tuple[dict[str, torch.Tensor], Rows]]


@pytest.fixture
def retrain(trained_config: Path, tmp_path: Path) -> Retrain:
    """Trains one task of the finished tiny run again with other settings: its bank's tensors and its log."""

    def run(*overrides: str, task: str = TASK) -> tuple[dict[str, torch.Tensor], Rows]:
        place = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(trained_config.parent / "checkpoints", place)
        ledger = place / "tiny" / "ledger.json"
        content = json.loads(ledger.read_text())
        del content["tasks"][task]
        ledger.write_text(json.dumps(content))
        (place / "tiny" / "logs" / f"{task}.jsonl").unlink()
        arguments = ["train", str(trained_config), f"output_dir={place}", "--task", task, "--force", *overrides]
        assert main(arguments) == 0
        tensors = load_file(place / "tiny" / "banks" / task / "adapter_model.safetensors")
        return tensors, [json.loads(line) for line in (place / "tiny" / "logs" / f"{task}.jsonl").open()]

    return run


@pytest.fixture
def base(tiny_model: Path) -> LlavaMed:
    return load(tiny_model, dtype=torch.float32)


def make_trainer(base: LlavaMed, tiny_data: Path, folder: Path) -> BankTrainer:
    stack = BankStack(base.model, "merge")
    stack.add_trainable(4, 8)
    input_processor = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    records = TrainingRecords(tiny_data / "PathVQA" / "train.json")
    samples = TrainDataset(records, image_roots(tiny_data, "PathVQA"), input_processor)
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", use_cpu=True, remove_unused_columns=False, label_names=["labels"]
    )
    return BankTrainer(
        stack, ConcatTrainDataset([samples]), TrainingCollator(base.tokenizer.pad_token_id), args, bank_shape=(4, 8)
    )


# --- labelled positions --------------------------------------------------------------------------------------------


def test_labelled_positions_by_hand() -> None:
    labels = torch.tensor([[-100, -100, 7, 8, -100], [5, -100, -100, -100, 9], [-100] * 5])
    keep, targets = loss_mask(labels)
    assert keep.tolist() == [[False, True, True, False, False], [False, False, False, True, False], [False] * 5]
    assert targets.tolist() == [7, 8, 9]  # the 5 opens its row: nothing predicts it


def test_only_labelled_positions_go_through_the_head(base: LlavaMed, tiny_data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tiny_data, tmp_path)
    rows: list[int] = []
    for module in (base.model.lm_head, last_mlp(base.model).down_proj):
        module.register_forward_hook(
            lambda module, inputs, output: rows.append(inputs[0].numel() // inputs[0].shape[-1])
        )
    batch = trainer.data_collator([trainer.samples[index] for index in range(4)])
    labelled = int((batch["labels"] != -100).sum())
    plain = {name: value for name, value in batch.items() if name != "record_index"}
    whole = base.model(**plain).loss
    keep, _ = loss_mask(batch["labels"])
    with trainer._sparse_mlp.masked(keep):
        sparse = trainer.compute_loss(trainer.model, dict(batch))
    assert sorted(rows) == [labelled] * 2 + [batch["labels"].numel()] * 2
    assert labelled < batch["labels"].numel() / 4
    torch.testing.assert_close(sparse, whole, rtol=1e-6, atol=0)
    summed = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(10))
    torch.testing.assert_close(summed * 10 / labelled, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_labelled_positions_are_the_same(
    checkpointing: bool, base: LlavaMed, tiny_data: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(base, tiny_data, tmp_path)
    batch = trainer.data_collator([trainer.samples[index] for index in range(4)])
    matrices = [b for _, b in trainer.stack.trainable().values()]  # A's gradient is zero while B is
    plain = {name: value for name, value in batch.items() if name != "record_index"}
    expected = torch.autograd.grad(trainer.model(**plain).loss, matrices)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
    with trainer._sparse_mlp.masked(loss_mask(batch["labels"])[0]):
        found = torch.autograd.grad(trainer.compute_loss(trainer.model, dict(batch)), matrices)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_what_a_step_prepares_ends_with_it_though_it_fails(base: LlavaMed, tiny_data: Path, tmp_path: Path) -> None:
    """The positions of a batch and the penalty's gradient: whatever comes next, they are not applied to it."""
    trainer = make_trainer(base, tiny_data, tmp_path)
    rows: list[int] = []
    last_mlp(base.model).down_proj.register_forward_hook(
        lambda module, inputs, output: rows.append(inputs[0].numel() // inputs[0].shape[-1])
    )
    batch = trainer.data_collator([trainer.samples[index] for index in range(4)])
    with pytest.raises(ZeroDivisionError), trainer._sparse_mlp.masked(loss_mask(batch["labels"])[0]):
        raise ZeroDivisionError
    with torch.no_grad():
        trainer.model(**{name: value for name, value in batch.items() if name != "record_index"})
    assert rows == [batch["labels"].numel()]


# --- equal ways to train -------------------------------------------------------------------------------------------

SGD = ("training.optim=sgd", "lora.dropout=0", f"tasks.{TASK}.learning_rate=0.05")
"""AdamW hides the scale of a gradient; SGD shows a penalty that is counted twice."""


def assert_same_training(
    one: tuple[dict[str, torch.Tensor], Rows], other: tuple[dict[str, torch.Tensor], Rows]
) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        torch.testing.assert_close(tensor, other[0][name], rtol=1e-4, atol=1e-6)
    assert len(one[1]) == len(other[1])
    for row, twin in zip(one[1], other[1], strict=True):
        assert row.keys() == twin.keys()
        assert row == {key: pytest.approx(value, rel=1e-4) for key, value in twin.items()}


@pytest.mark.parametrize(("alpha", "beta"), first_in_make_test(("-1", "-1"), ("5", "0.5")))  # learnable, fixed
def test_four_micro_batches_of_one_equal_one_of_four(alpha: str, beta: str, retrain: Retrain) -> None:
    options = (*SGD, f"regularization.alpha={alpha}", f"regularization.beta={beta}")
    whole = retrain(*options)
    assert_same_training(retrain(*options, "training.per_device_train_batch_size=1"), whole)
    assert_same_training(retrain(*options, "training.per_device_train_batch_size=3"), whole)  # 2 × 2


def test_penalties_change_the_bank(retrain: Retrain) -> None:
    """The comparison above would hold for penalties without effect as well."""
    with_them, without = (retrain(*SGD, f"regularization={{alpha: {a}, beta: {b}}}") for a, b in ((5, 0.5), (0, 0)))
    assert any(not torch.allclose(with_them[0][name], without[0][name], rtol=1e-2) for name in without[0])
    assert "contrastive" not in without[1][0]


def test_gradient_checkpointing_changes_nothing(retrain: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = [], []

    class Watched(BankTrainer):
        def __init__(self, stack: BankStack, **kwargs: Any) -> None:
            super().__init__(stack=stack, **kwargs)
            model = stack.base.model
            model.language_model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
            for part in (model.vision_tower, model.multi_modal_projector):
                part.register_forward_hook(lambda module, inputs, output: seen.append(requires_grad(output)))

    monkeypatch.setattr("mslora_cr.stream.train.BankTrainer", Watched)
    plain = retrain(*SGD)
    assert len(calls) == 4
    checkpointed = retrain(*SGD, "training.gradient_checkpointing=true")
    assert len(calls) == 4 + 2 * 4  # each layer ran again in the backward pass
    assert_same_training(checkpointed, plain)
    assert len(seen) == 2 * 8 and not any(seen)  # no graph through tower and projector


def requires_grad(output: Any) -> bool:
    tensors = [output] if isinstance(output, torch.Tensor) else list(output.values())
    return any(tensor.requires_grad for tensor in tensors if isinstance(tensor, torch.Tensor))


def test_concatenated_banks_train_as_merged_ones(retrain: Retrain) -> None:
    assert_same_training(retrain(*SGD, "lora.fold=concatenate", task="PCAM"), retrain(*SGD, task="PCAM"))


# --- the terms -----------------------------------------------------------------------------------------------------


def test_learnable_weights_follow_adamw_by_hand(retrain: Retrain) -> None:
    """From the log alone: the term's value and the learning rate of each step give the weight of the next."""
    _, rows = retrain("regularization.alpha=-1", "regularization.beta=-1", f"tasks.{TASK}.learning_rate=0.05")
    for weight, term in (("alpha", "contrastive"), ("beta", "orthogonality")):
        a, first, second = -4.6, 0.0, 0.0
        for step, row in enumerate(rows, start=1):
            assert row[weight] == pytest.approx(math.exp(a), rel=1e-5)
            gradient = math.exp(a) * row[term]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            a -= row["learning_rate"] * (first / (1 - 0.9**step)) / (math.sqrt(second / (1 - 0.999**step)) + 1e-8)
        assert math.exp(a) < 0.95 * math.exp(-4.6)


def test_terms_are_averaged_between_two_logs(retrain: Retrain) -> None:
    _, each = retrain(*SGD)
    _, pairs = retrain(*SGD, "training.logging_steps=2", "training.per_device_train_batch_size=1")
    assert [row["step"] for row in pairs] == [2, 4]
    for row, (first, second) in zip(pairs, (each[:2], each[2:]), strict=True):
        for name in ("loss", "ce", "contrastive", "orthogonality", "alpha", "beta"):
            assert row[name] == pytest.approx((first[name] + second[name]) / 2, rel=1e-5)


def test_the_ledger_holds_the_mean_loss(trained_config: Path) -> None:
    run = trained_config.parent / "checkpoints" / "tiny"
    tasks = json.loads((run / "ledger.json").read_text())["tasks"]
    assert TASK in tasks
    for name, entry in tasks.items():
        losses = [json.loads(line)["loss"] for line in (run / "logs" / f"{name}.jsonl").open()]
        assert entry["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# --- odd batches ---------------------------------------------------------------------------------------------------


# --- padding, cached features, where frozen banks are ----------------------------------------------------------------

GROUPED = ("training.train_sampling_strategy=group_by_length",)


def decode_nothing(path: Path) -> None:
    raise AssertionError(f"{path} was decoded to learn a length")


def test_lengths_are_learned_without_an_image(
    base: LlavaMed, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(base, tiny_data, tmp_path)
    expected = [len(trainer.samples[index]["input_ids"]) for index in range(len(trainer.samples))]
    monkeypatch.setattr("mslora_cr.data.llava_med_inputs.load_image", decode_nothing)
    trainer.args.train_sampling_strategy = "group_by_length"
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(len(expected)))


def test_grouping_by_length_saves_padding(base: LlavaMed, tiny_data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tiny_data, tmp_path)
    trainer.args.train_sampling_strategy = "group_by_length"
    trainer.order.lengths = lengths = [number % 7 for number in range(640)]
    grouped = in_batches(trainer._epoch_order(), trainer.args.train_batch_size)
    unsorted = in_batches(range(640), trainer.args.train_batch_size)
    assert padding_share(lengths, grouped) < padding_share(lengths, unsorted) / 2


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_order_follows_seed_and_epoch_alone(strategy: str, base: LlavaMed, tiny_data: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tiny_data, tmp_path)
    trainer.args.train_sampling_strategy = strategy
    sampler = trainer._get_train_sampler()
    first = list(sampler)
    torch.rand(5)  # as dropout would move the common generator
    assert list(sampler) == first
    trainer.state.epoch = 1.0  # as the Trainer leaves it at the end of an epoch
    assert list(sampler) != first
    assert sorted(sampler) == sorted(first)


def test_grouped_batches_are_those_of_one_process(
    base: LlavaMed, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(base, tiny_data, tmp_path)
    trainer.args.train_sampling_strategy = "group_by_length"
    trainer.order.lengths = [number % 101 for number in range(5000)]
    alone = trainer._epoch_order()
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    trainer.args.per_device_train_batch_size //= 2
    assert trainer._epoch_order() == alone


def test_padding_samples_fill_up_what_all_ranks_take_at_once(base: LlavaMed, tiny_data: Path, tmp_path: Path) -> None:
    assert list(FixedOrderSampler(lambda: [2, 0, 1], 3, 3, 4)) == [2, 0, 1, 3]
    assert len(FixedOrderSampler(lambda: [2, 0, 1], 3, 3, 3)) == 3
    samples = make_trainer(base, tiny_data, tmp_path).samples
    padding_sample = samples[len(samples)]
    assert padding_sample["input_ids"] == samples[0]["input_ids"]
    assert set(padding_sample["labels"]) == {-100}


def test_a_run_grouped_by_length_reports_its_padding(retrain: Retrain, tmp_path: Path) -> None:
    retrain(*GROUPED)
    ledger = json.loads(next(tmp_path.glob("run*/tiny/ledger.json")).read_text())
    padding = ledger["tasks"][TASK]["padding"]
    assert all(0 <= padding[order] < 1 for order in ("share", "in_random_order"))


def test_padding_share_by_hand() -> None:
    assert padding_share([4, 1, 3, 3], [[0, 1], [2, 3]]) == pytest.approx(3 / 14)
    assert padding_share([4, 1], [[0], [1]]) == 0


def test_cached_features_train_the_same_bank(retrain: Retrain, tmp_path: Path) -> None:
    plain, rows = retrain(*SGD)
    cached, cached_rows = retrain(*SGD, f"data.cache_image_features={tmp_path / 'features'}")
    assert_same_training((plain, rows), (cached, cached_rows))


def test_frozen_banks_are_visited_once_per_update(retrain: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group, however many micro-batches an update has."""
    visited: list[int] = []
    visit = BankPenalties._frozen

    def noted(penalties: BankPenalties, group: Any, coefficients: torch.Tensor) -> Any:
        visited.append(id(group))
        return visit(penalties, group, coefficients)

    monkeypatch.setattr(BankPenalties, "_frozen", noted)
    _, rows = retrain("training.per_device_train_batch_size=1")
    groups = set(visited)
    assert len(rows) == 4 and len(visited) == 4 * len(groups)
    assert all(visited.count(group) == 4 for group in groups)


def test_banks_held_in_bfloat16_change_the_penalties_little(retrain: Retrain) -> None:
    plain, rows = retrain()
    held, held_rows = retrain("regularization.frozen_dtype=bfloat16", "regularization.frozen_device=cpu")
    assert held_rows[0]["contrastive"] == pytest.approx(rows[0]["contrastive"], rel=1e-2)
    assert any(not plain[name].equal(held[name]) for name in plain)


def edited_data(tiny_data: Path, folder: Path, edit: Callable[[int, dict[str, Any]], None]) -> Path:
    """A data root of links, with each record of the first task edited."""
    for task in tiny_data.iterdir():
        if task.is_dir():
            (folder / task.name).mkdir(parents=True)
            for part in task.iterdir():
                (folder / task.name / part.name).symlink_to(part)
    file = folder / "PathVQA" / "train.json"
    records = json.loads(file.read_text())
    for index, record in enumerate(records):
        edit(index, record)
    file.unlink()
    file.write_text(json.dumps(records))
    return folder


def test_a_batch_that_is_masked_whole_has_no_loss(retrain: Retrain, tiny_data: Path, tmp_path: Path) -> None:
    """A task of which nothing at all is learned is refused before its first step; half of the batches may be empty."""

    def spoil(index: int, record: dict[str, Any]) -> None:
        if index % 2:
            record["conversations"][1]["value"] = "an answer with [/INST] inside"

    root = edited_data(tiny_data, tmp_path / "data", spoil)
    _, rows = retrain(f"data.root={root}", "tasks.pathvqa.batch_size=1", task="pathvqa")
    assert 2 * sum(row["loss"] == 0.0 for row in rows) == len(rows)


def test_records_without_an_image_train_among_others(retrain: Retrain, tiny_data: Path, tmp_path: Path) -> None:
    def blind(index: int, record: dict[str, Any]) -> None:
        if index % 2:
            del record["image"]
            turn = record["conversations"][0]
            turn["value"] = turn["value"].replace("<image>\n", "")

    _, rows = retrain(f"data.root={edited_data(tiny_data, tmp_path / 'data', blind)}", task="pathvqa")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_loss_that_is_not_finite_stops_and_names_the_records(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["training.optim=sgd", "tasks.pathvqa.learning_rate=1e30", "regularization.alpha=0.1"]
    assert main(["train", str(trained_config), f"output_dir={tmp_path}", *overrides]) == 1
    message = capsys.readouterr().err
    assert "the loss at step" in message and "nothing was updated" in message
    named = [line.strip() for line in message.splitlines() if line.startswith("  record ")]
    assert len(named) == 4 and len(set(named)) == 4
    assert not (tmp_path / "tiny" / "banks").exists()


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_gets_its_name(retrain: Retrain, monkeypatch: pytest.MonkeyPatch) -> None:
    went_on, published = threading.Event(), []
    step, publish = BankTrainer.training_step, checkpoints_module.replace_folder

    def watched_step(trainer: BankTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step >= 2:
            went_on.set()
        return step(trainer, *args, **kwargs)

    def patient(staging: Path, folder: Path) -> None:
        published.append((folder.name, went_on.wait(timeout=60)))
        publish(staging, folder)

    monkeypatch.setattr(BankTrainer, "training_step", watched_step)
    monkeypatch.setattr(checkpoints_module, "replace_folder", patient)
    retrain()
    assert published == [("checkpoint-2", True), ("checkpoint-4", True)]


def test_a_checkpoint_holds_the_live_bank_and_nothing_of_the_base(
    retrain: Retrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    publish = checkpoints_module.replace_folder

    def watched(staging: Path, folder: Path) -> None:
        publish(staging, folder)
        seen[folder.name] = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert [path.name for path in folder.parent.glob("checkpoint-*")] != []

    monkeypatch.setattr(checkpoints_module, "replace_folder", watched)
    retrain()
    assert list(seen) == ["checkpoint-2", "checkpoint-4"]
    assert {name for name in seen["checkpoint-2"] if "model" in name} == {"bank/adapter_model.safetensors"}
