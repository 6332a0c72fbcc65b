"""A projector that trains with its bank, against PEFT's `modules_to_save`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image

from mslora_cr.banks.bank import Bank, BankError, sum_banks
from mslora_cr.banks.io import load_bank, save_bank
from mslora_cr.banks.per_sample import PerSampleAdapters, whole_banks
from mslora_cr.banks.published import export_published
from mslora_cr.banks.similarity import bank_similarity
from mslora_cr.banks.stack import TRAINABLE, BankStack
from mslora_cr.data.records import TrainingRecord
from mslora_cr.models.language import LANGUAGE_LINEARS, PROJECTOR, projector_of
from mslora_cr.models.layout import ModelError
from mslora_cr.models.load import load_model
from mslora_cr.models.shapes import projector_size
from tests.banks.test_banks import golden_bank, golden_base, logits
from tests.conftest import first_in_make_test
from tests.helpers.families import FAMILIES, make
from tests.helpers.more_families import make_more


def batch(images: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 32000, (2, 12), generator=generator)
    if not images:
        return {"input_ids": ids, "labels": ids}
    ids = torch.cat([torch.full((2, 16), 3), ids], dim=1)
    return {"input_ids": ids, "labels": ids, "pixel_values": torch.randn(2, 3, 56, 56, generator=generator)}


def with_projector(number: int, scale: float) -> Bank:
    """A golden bank with a projector of its own."""
    pristine = dict(projector_of(golden_base().model).named_parameters())
    generator = torch.Generator().manual_seed(number)
    moved = {
        name: (tensor + scale * torch.randn(tensor.shape, generator=generator)).detach()
        for name, tensor in pristine.items()
    }
    return replace(golden_bank(number), projector=moved)


def test_gradients_are_those_of_peft_s_modules_to_save() -> None:
    bank, base = with_projector(0, 0.1), golden_base().model
    stack = BankStack(base, "merge")
    stack.add_trainable(bank.rank, bank.alpha, initial=bank, projector_learning_rate=1e-3)
    stack.model(**batch()).loss.backward()
    config = LoraConfig(
        r=bank.rank, lora_alpha=bank.alpha, target_modules=LANGUAGE_LINEARS, modules_to_save=[PROJECTOR]
    )
    theirs = get_peft_model(golden_base().model, config, adapter_name=TRAINABLE)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if f"{PROJECTOR}.modules_to_save" in name:
                parameter.copy_(bank.projector[name.rpartition(f"{TRAINABLE}.")[2]])
            elif ".lora_" in name:
                layer, half = name.removeprefix("base_model.model.").split(".lora_")
                parameter.copy_(bank.matrices[layer][half.startswith("B")])
    theirs(**batch()).loss.backward()
    expected = {
        name.replace(f".modules_to_save.{TRAINABLE}", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    found = {name: parameter.grad for name, parameter in stack.model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys() and sum(PROJECTOR in name for name in found) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
        assert gradient.abs().sum() > 0


def test_a_batch_without_a_picture_gives_the_projector_a_gradient_of_zero() -> None:
    """DDP waits for a gradient of every parameter."""
    stack = BankStack(golden_base(torch.bfloat16).model, "merge")
    stack.add_trainable(2, 4, projector_learning_rate=1e-3)
    stack.model(**batch(images=False)).loss.backward()
    assert all(parameter.dtype == torch.float32 for parameter in stack.projector.trained.values())
    assert all(not parameter.grad.any() for parameter in stack.projector.trained.values())
    images = batch()
    stack.model(**{**images, "pixel_values": images["pixel_values"].bfloat16()}).loss.backward()
    assert all(parameter.grad.any() for parameter in stack.projector.trained.values())


def test_a_bank_with_a_projector_is_peft_s_adapter(tmp_path: Path) -> None:
    bank = with_projector(1, 0.1)
    save_bank(bank, tmp_path / "bank")
    theirs = PeftModel.from_pretrained(golden_base().model, tmp_path / "bank").eval()
    stack = BankStack(golden_base().model, "merge")
    stack.set_frozen([load_bank(tmp_path / "bank")])
    torch.testing.assert_close(logits(stack.model), logits(theirs), rtol=0, atol=1e-5)
    plain = BankStack(golden_base().model, "merge")
    plain.set_frozen([golden_bank(1)])
    assert (logits(plain.model) - logits(theirs)).abs().max() > 1e-2  # the projector does something
    theirs.save_pretrained(tmp_path / "peft")
    assert load_bank(tmp_path / "peft").digest == bank.digest != golden_bank(1).digest
    assert bank_similarity({name: tmp_path / name / "adapter_model.safetensors" for name in ("bank", "peft")})


@pytest.mark.parametrize("merge_mode", first_in_make_test("merge", "concatenate"))
def test_each_set_of_banks_answers_with_its_projector(merge_mode: str) -> None:
    first, second, plain = with_projector(0, 0.1), with_projector(1, 0.1), golden_bank(2)
    stack = BankStack(golden_base().model, merge_mode, reuse=True)
    base = logits(stack.model)
    seen: dict[str, torch.Tensor] = {}
    for banks in ([first], [], [second], [plain], [first], []):
        stack.set_frozen(banks)
        found = logits(stack.model)
        assert torch.equal(found, seen.setdefault(banks[0].name if banks else "", found))
        with stack.projector.own():
            projected = dict(projector_of(stack.base).named_parameters())
            pristine = projector_of(golden_base().model).named_parameters()
            assert all(torch.equal(projected[name], parameter) for name, parameter in pristine)
        assert torch.equal(logits(stack.model), found)
    assert torch.equal(seen[""], base) and len(seen) == 4


def test_rows_of_a_batch_have_one_projector() -> None:
    banks = [with_projector(0, 0.1), with_projector(1, 0.1), golden_bank(2)]
    base = golden_base().model
    adapters = PerSampleAdapters(base, banks)
    with adapters.answering(whole_banks([[0], [1], [0], [2], []], 3)) as mixed:
        assert len({mixed.projector(question) for question in range(5)}) == 4
        mixed.choose([0, 2])
        together = logits(base)
        with pytest.raises(BankError, match="answers alone"):
            mixed.choose([0, 1])
    stack = BankStack(golden_base().model, "merge")
    stack.set_frozen(banks[:1])
    torch.testing.assert_close(together, logits(stack.model), rtol=0, atol=1e-5)
    adapters.remove()
    assert torch.equal(logits(base), logits(golden_base().model))


def test_projectors_have_no_sum_and_no_place_elsewhere(tmp_path: Path) -> None:
    bank = with_projector(0, 0.1)
    for banks in ([bank, golden_bank(1)], [golden_bank(1), bank]):
        with pytest.raises(BankError, match="projectors of 2 banks cannot be summed"):
            sum_banks(banks, "all")
        with pytest.raises(BankError, match="projectors of 2 banks cannot be summed"):
            BankStack(golden_base().model, "merge").set_frozen(banks)
    assert sum_banks([bank], "alone").projector == bank.projector
    with pytest.raises(BankError, match="the published format cannot represent"):
        export_published(bank, tmp_path / "out", 0, {})
    narrow = replace(bank, projector={name: tensor[:1] for name, tensor in bank.projector.items()})
    with pytest.raises(BankError, match="other layers or sizes"):
        BankStack(golden_base().model, "merge").set_frozen([narrow])
    save_bank(bank, tmp_path / "bank")
    save_bank(golden_bank(0), tmp_path / "plain")
    (tmp_path / "plain" / "adapter_config.json").write_bytes((tmp_path / "bank" / "adapter_config.json").read_bytes())
    with pytest.raises(BankError, match="does not hold it"):
        load_bank(tmp_path / "plain")


@pytest.mark.parametrize("family", first_in_make_test("internvl", "llava", "llava_next", "gemma3", "llava_onevision"))
def test_other_families_train_their_projector(family: str, tmp_path: Path) -> None:
    """Every one of its parameters has a gradient, and PEFT reads the bank."""
    (make if family in FAMILIES else make_more)(family, tmp_path / "model")
    base = load_model(tmp_path / "model", dtype=torch.float32)
    Image.effect_noise((60, 45), 60).convert("RGB").save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a mass"}]
    record = TrainingRecord.model_validate({"id": 1, "image": "a.png", "conversations": turns})
    inputs = base.input_processor(2048, True)
    batch = inputs.collator()([inputs.sample(0, record, [tmp_path])])
    del batch["record_index"]
    stack = BankStack(base.model, "merge")
    stack.add_trainable(2, 4, projector_learning_rate=1e-3)
    assert projector_size(tmp_path / "model") == sum(one.numel() for one in stack.projector.trained.values())
    stack.model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in stack.projector.trained.values())
    assert sum(float(parameter.grad.abs().sum()) for parameter in stack.projector.trained.values()) > 0
    with torch.no_grad():
        for parameter in stack.trainable_parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        ours = stack.model.eval()(**batch).logits
        save_bank(stack.snapshot("a", 2, 4), tmp_path / "bank")
        theirs = PeftModel.from_pretrained(load_model(tmp_path / "model", dtype=torch.float32).model, tmp_path / "bank")
        torch.testing.assert_close(theirs.eval()(**batch).logits, ours, rtol=0, atol=1e-4)


def test_a_family_without_such_a_projector_is_refused(tmp_path: Path) -> None:
    make("qwen2_5_vl", tmp_path / "model")
    with pytest.raises(ModelError, match="has no multi_modal_projector"):
        projector_size(tmp_path / "model")
    with pytest.raises(BankError, match="has no multi_modal_projector"):
        BankStack(load_model(tmp_path / "model").model, "merge").add_trainable(2, 4, projector_learning_rate=1e-3)
