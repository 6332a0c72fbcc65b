import json
import math
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.experts import RoutedExperts
from mslora_cr.banks.io import load_bank, save_bank
from mslora_cr.banks.kinds import Experts
from mslora_cr.banks.published import export_published
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.models.language import language_linears
from mslora_cr.models.llava_med import LlavaMed, load
from tests.conftest import GOLDEN, ConfigWriter, first_in_make_test

SEQUENCE = ["pathvqa", "pathvqa_slake-vqarad", "pathvqa_slake-vqarad_derm", "pathvqa_slake-vqarad_derm_PCAM"]
MERGE_MODES = ("merge", "concatenate")


def golden_bank(number: int) -> Bank:
    return load_bank(GOLDEN / "checkpoints" / SEQUENCE[number])


def golden_base(dtype: torch.dtype = torch.float32) -> LlavaMed:
    return load(GOLDEN / "llava_med_tiny", dtype=dtype, attn_implementation="eager")


@torch.no_grad()
def logits(model: Any, image_token_id: int = 3, patches: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 32000, (2, 12), generator=generator)
    ids = torch.cat([torch.full((2, 1), 1), torch.full((2, patches), image_token_id), ids], dim=1)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    return model(input_ids=ids, pixel_values=pixels).logits


def unmerged(banks: list[Bank], folder: Path) -> torch.Tensor:
    """The logits of plain PEFT with every bank an adapter of its own, all of them active."""
    for bank in banks:
        save_bank(bank, folder / bank.name)
    model = PeftModel.from_pretrained(golden_base().model, folder / banks[0].name, adapter_name=banks[0].name)
    for bank in banks[1:]:
        model.load_adapter(folder / bank.name, adapter_name=bank.name)
    model.base_model.set_adapter([bank.name for bank in banks])
    return logits(model.eval())


@pytest.fixture(scope="module")
def patches() -> int:
    return golden_base().patches


# --- merging -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", first_in_make_test(4, 1))
def test_both_merge_modes_equal_the_unmerged_sum(count: int, tmp_path: Path) -> None:
    banks = [golden_bank(number) for number in range(count)]
    expected = unmerged(banks, tmp_path)
    assert (expected - logits(golden_base().model)).abs().max() > 1e-2  # the banks do something
    for merge_mode in MERGE_MODES:
        stack = BankStack(golden_base().model, merge_mode)
        stack.set_frozen(banks)
        torch.testing.assert_close(logits(stack.model), expected, rtol=0, atol=1e-5)
        # In training the last bank is trainable, on top of the others, which are merged.
        stack = BankStack(golden_base().model, merge_mode)
        stack.set_frozen(banks[:-1])
        stack.add_trainable(banks[-1].rank, banks[-1].alpha, initial=banks[-1])
        torch.testing.assert_close(logits(stack.model.eval()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge_mode", MERGE_MODES)
def test_freezing_again_starts_from_the_pristine_base(merge_mode: str) -> None:
    """Any banks after any others, and none: what was merged before leaves no trace, not even of rounding."""
    banks = [golden_bank(number) for number in range(4)]
    stack = BankStack(golden_base().model, merge_mode, reuse=True)
    base = logits(stack.model)
    seen = {}
    for chosen in [(0, 1, 2, 3), (0,), (), (2,), (0, 1, 2, 3), ()]:
        stack.set_frozen([banks[number] for number in chosen])
        found = logits(stack.model)
        assert torch.equal(found, seen.setdefault(chosen, found))
    assert torch.equal(seen[()], base)
    assert not torch.equal(seen[(0,)], seen[(2,)])


def test_merging_rounds_once() -> None:
    """In bfloat16 the banks are summed in float32 before they are rounded."""
    banks = [golden_bank(number) for number in range(4)]
    base = golden_base(torch.bfloat16).model
    pristine = {name: linear.weight.float() for name, linear in language_linears(base).items()}
    BankStack(base, "merge").set_frozen(banks)
    for name, linear in language_linears(base).items():
        total = pristine[name] + sum(bank.scaling * bank.matrices[name][1] @ bank.matrices[name][0] for bank in banks)
        expected = total.to(torch.bfloat16)
        # A float32 sum in another order may cross a rounding boundary here and there; rounding each bank would all over.
        assert (linear.weight != expected).float().mean() < 1e-3


# --- what is trainable -----------------------------------------------------------------------------------------------

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("merge_mode", MERGE_MODES)
@pytest.mark.parametrize("earlier", [0, 1, 3])
def test_exactly_the_live_bank_is_trainable(merge_mode: str, earlier: int) -> None:
    base = golden_base().model
    assert not [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    stack = BankStack(base, merge_mode)
    stack.set_frozen([golden_bank(number) for number in range(earlier)])
    assert not [name for name, parameter in stack.model.named_parameters() if parameter.requires_grad]
    stack.add_trainable(4, 8)
    expected = {
        f"base_model.model.model.language_model.layers.{layer}.{linear}.lora_{half}.live.weight"
        for layer in range(base.config.text_config.num_hidden_layers)
        for linear in LINEARS
        for half in "AB"
    }
    trainable = {name for name, parameter in stack.model.named_parameters() if parameter.requires_grad}
    assert trainable == expected
    assert all(parameter.dtype == torch.float32 for pair in stack.trainable().values() for parameter in pair)
    assert all(
        not b.any() and a.any() for a, b in stack.trainable().values()
    )  # the stage before is where training starts


@pytest.mark.parametrize("merge_mode", MERGE_MODES)
def test_only_the_live_bank_moves(merge_mode: str) -> None:
    stack = BankStack(golden_base().model, merge_mode)
    stack.set_frozen([golden_bank(0), golden_bank(1)])
    stack.add_trainable(4, 8, initial=None)
    before = {name: parameter.detach().clone() for name, parameter in stack.model.named_parameters()}
    optimizer = torch.optim.AdamW(stack.model.parameters(), lr=0.1)
    for _ in range(2):  # A has no gradient while B is zero
        output = stack.model(input_ids=torch.tensor([[1, 50, 60, 70]]), labels=torch.tensor([[1, 50, 60, 70]]))
        output.loss.backward()
        optimizer.step()
    moved = {name for name, parameter in stack.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".live." in name}


# --- on disk ---------------------------------------------------------------------------------------------------------


def same_matrices(one: Bank, other: Bank) -> bool:
    return one.matrices.keys() == other.matrices.keys() and all(
        torch.equal(x, y)
        for name in one.matrices
        for x, y in zip(one.matrices[name], other.matrices[name], strict=True)
    )


def test_a_bank_comes_back_as_it_was(tmp_path: Path) -> None:
    bank = golden_bank(1)
    bank = Bank("second", bank.rank, bank.alpha, bank.matrices, {"modality": "radiology"})
    digest = save_bank(bank, tmp_path / "bank")
    again = load_bank(tmp_path / "bank")
    assert (again.name, again.rank, again.alpha, again.metadata["modality"]) == (
        "second",
        bank.rank,
        bank.alpha,
        "radiology",
    )
    assert same_matrices(again, bank)
    assert save_bank(again, tmp_path / "other") == digest
    assert {file.name for file in (tmp_path / "bank").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "bank.json",
    }


def test_a_bank_that_changed_describes_itself_anew(tmp_path: Path) -> None:
    save_bank(golden_bank(0), tmp_path / "first")
    loaded = load_bank(tmp_path / "first")
    digest = save_bank(Bank("changed", 4, 4.0, golden_bank(1).matrices, loaded.metadata), tmp_path / "second")
    described = json.loads((tmp_path / "second" / "bank.json").read_text())
    assert (described["name"], described["alpha"], described["sha256"]) == ("changed", 4.0, digest)


def test_plain_peft_loads_a_bank(trained_config: Path, tmp_path: Path) -> None:
    bank = golden_bank(0)
    save_bank(bank, tmp_path / "bank")
    stack = BankStack(golden_base().model, "merge")
    stack.set_frozen([bank])
    model = PeftModel.from_pretrained(golden_base().model, tmp_path / "bank").eval()
    torch.testing.assert_close(logits(model), logits(stack.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
def test_published_in_and_out_is_bit_identical(number: int, tmp_path: Path) -> None:
    source = GOLDEN / "checkpoints" / SEQUENCE[number]
    bank = load_bank(source)
    export_published(bank, tmp_path / "exported", number, json.loads((source / "config.json").read_text()))
    stored, exported = (
        torch.load(folder / "cl_lora.bin", weights_only=True) for folder in (source, tmp_path / "exported")
    )
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[key], stored[key]) for key in stored)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    published = json.loads((source / "config.json").read_text())
    assert config["mslora_cfg"].keys() <= published["mslora_cfg"].keys()
    assert config["mslora_cfg"]["lora_rank"] == published["mslora_cfg"]["lora_rank"]
    assert config["mslora_cfg"]["lora_alpha"] == published["mslora_cfg"]["lora_alpha"]
    assert same_matrices(load_bank(tmp_path / "exported"), bank)
    assert same_matrices(load_bank(tmp_path / "exported" / "cl_lora.bin"), bank)


def test_a_trained_run_is_exported_and_read_again(
    trained_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bank", "export", str(trained_config), "--output", str(tmp_path)]) == 0
    folders = [tmp_path / "tiny" / name for name in ("pathvqa", "pathvqa_slake-vqarad", "pathvqa_slake-vqarad_PCAM")]
    assert capsys.readouterr().out.split() == [str(folder) for folder in folders]
    for folder, name in zip(folders, ("pathvqa", "slake-vqarad", "PCAM"), strict=True):
        ours = load_bank(trained_config.parent / "checkpoints" / "tiny" / "banks" / name)
        assert same_matrices(load_bank(folder), ours)


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bank", "show", str(GOLDEN / "checkpoints" / "pathvqa")]) == 0
    output = json.loads(capsys.readouterr().out)
    bank = golden_bank(0)
    assert output["rank"] == bank.rank and output["linear_layers"] == len(bank.matrices)
    updates = {name: bank.scaling * b @ a for name, (a, b) in bank.matrices.items()}
    largest = max(updates, key=lambda name: updates[name].norm())
    assert output["largest_update"]["layer"] == largest
    assert output["largest_update"]["norm"] == pytest.approx(updates[largest].norm().item(), rel=1e-5)
    assert output["update_norm"] == pytest.approx(
        torch.stack([x.norm() for x in updates.values()]).norm().item(), rel=1e-5
    )


# --- a mixture of experts ------------------------------------------------------------------------------------------


def routed_bank(experts: int = 2) -> Bank:
    bank = golden_bank(0)
    generator = torch.Generator().manual_seed(1)
    routers = {name: torch.randn(experts, a.shape[1], generator=generator) for name, (a, _) in bank.matrices.items()}
    return replace(bank, name="routed", routers=routers)


def test_experts_by_hand() -> None:
    """x = (1, 2): A x = (1, 2, 3, -1); the router gives (ln 3, 0), so shares of 3/4 and 1/4 for two ranks each."""
    plain = torch.nn.Linear(2, 4, bias=False)
    layer = RoutedExperts(plain, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]]))
        layer.router.weight.copy_(torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]))
        found = layer(torch.tensor([[[1.0, 2.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.75, 1.5, 0.75, -0.25]]]))


def test_a_routed_layer_is_the_weighted_sum_of_its_experts_and_so_is_its_gradient() -> None:
    """Against experts written out one by one, B included, with autograd through router, A and B."""
    torch.manual_seed(0)
    experts, rank, inputs, outputs = 3, 6, 5, 4
    layer, b = (
        RoutedExperts(torch.nn.Linear(inputs, rank, bias=False), experts),
        torch.nn.Linear(rank, outputs, bias=False),
    )
    x = torch.randn(2, 7, inputs)
    a, router = (w.detach().clone().requires_grad_() for w in (layer.weight, layer.router.weight))
    shares = torch.softmax(x @ router.T, -1)
    per_expert = zip(a.split(rank // experts), b.weight.detach().split(rank // experts, dim=1), strict=True)
    expected = sum(shares[..., e, None] * (x @ one.T @ other.T) for e, (one, other) in enumerate(per_expert))
    found = b(layer(x))
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, a.grad)
    torch.testing.assert_close(layer.router.weight.grad, router.grad)


@pytest.mark.parametrize("merge_mode", MERGE_MODES)
def test_a_mixture_answers_as_it_was_trained_and_comes_back_as_it_was(merge_mode: str, tmp_path: Path) -> None:
    bank = routed_bank()
    save_bank(bank, tmp_path / "bank")
    again = load_bank(tmp_path / "bank")
    assert same_matrices(again, bank) and again.experts == 2
    assert all(torch.equal(again.routers[name], router) for name, router in bank.routers.items())
    trainable = BankStack(golden_base().model, merge_mode, kind=Experts(2))
    trainable.add_trainable(bank.rank, bank.alpha, initial=bank)
    expected = logits(trainable.model.eval())
    frozen = BankStack(golden_base().model, merge_mode, reuse=True)
    frozen.set_frozen([again])
    torch.testing.assert_close(logits(frozen.model.eval()), expected, rtol=0, atol=1e-5)
    assert not [name for name, parameter in frozen.model.named_parameters() if parameter.requires_grad]
    snapshot = trainable.snapshot("copy", bank.rank, bank.alpha)
    assert same_matrices(snapshot, bank) and snapshot.routers.keys() == bank.routers.keys()
    # Other banks afterwards, and none, leave no trace of it.
    plain = BankStack(golden_base().model, merge_mode)
    plain.set_frozen([golden_bank(1)])
    frozen.set_frozen([golden_bank(1)])
    torch.testing.assert_close(logits(frozen.model.eval()), logits(plain.model), rtol=0, atol=0)
    frozen.set_frozen([])
    torch.testing.assert_close(logits(frozen.model.eval()), logits(golden_base().model), rtol=0, atol=0)


def test_plain_peft_loads_a_mixture_as_the_plain_sum_of_its_experts(tmp_path: Path) -> None:
    save_bank(routed_bank(), tmp_path / "bank")
    save_bank(golden_bank(0), tmp_path / "plain")
    mixture, plain = (
        logits(PeftModel.from_pretrained(golden_base().model, tmp_path / name).eval()) for name in ("bank", "plain")
    )
    torch.testing.assert_close(mixture, plain, rtol=0, atol=0)


def test_what_a_mixture_cannot_do_is_refused(tmp_path: Path) -> None:
    bank = routed_bank()
    with pytest.raises(BankError, match="cannot be summed with others"):
        BankStack(golden_base().model, "merge").set_frozen([bank, golden_bank(1)])
    with pytest.raises(BankError, match="plain LoRA only plain LoRA"):
        BankStack(golden_base().model, "merge").add_trainable(bank.rank, bank.alpha, initial=bank)
    with pytest.raises(BankError, match="the published format cannot represent"):
        export_published(bank, tmp_path / "published", 0, {})
    save_bank(replace(bank, routers=dict(list(bank.routers.items())[1:])), tmp_path / "half")
    with pytest.raises(BankError, match="some of its layers have a router"):
        load_bank(tmp_path / "half")
    broken = {name: torch.full_like(router, torch.nan) for name, router in bank.routers.items()}
    with pytest.raises(BankError, match=r"is not saved: 21 of its 63 matrices .*first model.*\.lora_router"):
        save_bank(replace(bank, routers=broken), tmp_path / "nan")
    save_bank(routed_bank(experts=3), tmp_path / "three")
    with pytest.raises(BankError, match="no router of experts that share rank 4 equally"):
        load_bank(tmp_path / "three")


@pytest.mark.parametrize("merge_mode", MERGE_MODES)
def test_the_live_bank_can_be_switched_off_alone(merge_mode: str) -> None:
    stack = BankStack(golden_base().model, merge_mode)
    stack.set_frozen([golden_bank(0)])
    expected = logits(stack.model)
    stack.add_trainable(4, 8, initial=golden_bank(1))
    both = logits(stack.model.eval())
    with stack.trainable_off():
        torch.testing.assert_close(logits(stack.model), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(stack.model), both, rtol=0, atol=0)
    assert not torch.equal(both, expected)


# --- refused -------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_is_not_plain_tensors_runs_nothing(writer: str, tmp_path: Path) -> None:
    folder, proof = tmp_path / "pathvqa", tmp_path / "proof"
    folder.mkdir()
    (folder / "config.json").write_bytes((GOLDEN / "checkpoints" / "pathvqa" / "config.json").read_bytes())
    if writer == "torch":
        torch.save({"model.layers.0": Trap(proof)}, folder / "cl_lora.bin")
    else:
        (folder / "cl_lora.bin").write_bytes(pickle.dumps({"model.layers.0": Trap(proof)}))
    with pytest.raises(BankError, match=r"cl_lora\.bin: not plain tensors"):
        load_bank(folder)
    assert not proof.exists()


def published_copy(folder: Path) -> Path:
    folder.mkdir()
    for file in (GOLDEN / "checkpoints" / "pathvqa").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", b"hello", b"\x80\x02.", b"\x80\x02]q\x00.", b"PK\x03\x04 cut short", b"(" * 100_000],
)
def test_a_damaged_published_file_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = published_copy(tmp_path / "pathvqa")
    (folder / "cl_lora.bin").write_bytes(content)
    with pytest.raises(BankError, match=r"cl_lora\.bin: not plain tensors") as caught:
        load_bank(folder)
    assert "weights_only" not in str(caught.value)


def test_few_numbers_that_pretend_to_be_many_are_refused(tmp_path: Path) -> None:
    folder = published_copy(tmp_path / "pathvqa")
    stored = torch.load(folder / "cl_lora.bin", weights_only=True)
    key = next(iter(stored))
    torch.save(stored | {key: torch.ones(1, 1).expand(4, 1 << 40)}, folder / "cl_lora.bin")
    with pytest.raises(BankError, match="more numbers than the file holds"):
        load_bank(folder)
    with zipfile.ZipFile(folder / "cl_lora.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(BankError, match="not plain tensors"):
        load_bank(folder)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, r"q_proj\.weight is not a matrix"),
        ({"model.layers.0.self_attn.q_proj.cl_lora_pool.task_0_lora.lora_A": 3}, "is not a matrix"),
        (
            {"model.layers.0.self_attn.q_proj.cl_lora_pool.task_0_lora.lora_A": torch.ones(4, 8)},
            "no pair of matrices of rank",
        ),
        (
            {
                f"model.layers.0.self_attn.q_proj.cl_lora_pool.task_{task}_lora.lora_{half}": torch.ones(4, 4)
                for task in (0, 2)
                for half in "AB"
            },
            r"the banks of 2 tasks, \[0, 2\]",
        ),
        ({}, "empty"),
        ([1, 2], "expected a dictionary"),
    ],
)
def test_published_tensors_that_are_no_bank_are_refused(stored: Any, message: str, tmp_path: Path) -> None:
    folder = published_copy(tmp_path / "pathvqa")
    torch.save(stored, folder / "cl_lora.bin")
    with pytest.raises(BankError, match=message):
        load_bank(folder)


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({key: value}, f"plain LoRA over the unchanged base .* says {key}: ")
            for key, value in [
                *(("use_dora", True), ("use_rslora", True), ("fan_in_fan_out", True), ("lora_bias", True)),
                *(("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 8}), ("bias", "lora_only")),
                *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "corda", "eva", "loftq")),
                *(("init_lora_weights", init) for init in ("lora_ga", "mica", 2)),
                *(("peft_type", "ADALORA"), ("modules_to_save", ["lm_head"]), ("alora_invocation_tokens", [1, 2])),
                *(
                    ("use_qalora", True),
                    ("use_bdlora", {"nblocks": 2}),
                    ("arrow_config", {"k": 1}),
                ),
                *(("layer_replication", [[0, 2]]), ("trainable_token_indices", [5]), ("target_parameters", ["x"])),
                *(("megatron_core", "other"), ("a_key_of_next_year", "on"), ("a_key_of_next_year", 0.5)),
            ]
        ),
        ({"target_modules": ["q_proj"]}, "matrices of .*down_proj, which the adapter's configuration does not name"),
        ({"exclude_modules": ["mlp.up_proj"]}, "matrices of .*up_proj, which the adapter's configuration does not"),
        ({"target_modules": "(["}, "names no layers"),
        ({"r": 3}, "rank 3"),
        ({"r": True}, "rank True"),
        ({"lora_alpha": 10**400}, "a number of 401 digits is too large"),
        ({"lora_alpha": math.nan}, "NaN is not JSON"),
        ({"r": None}, r"adapter_config\.json"),
        ({"lora_alpha": None}, r"adapter_config\.json"),
    ],
)
def test_an_adapter_that_is_no_bank_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_bank(golden_bank(0), tmp_path / "bank")
    edit_json(tmp_path / "bank" / "adapter_config.json", **changes)
    with pytest.raises(BankError, match=message):
        load_bank(tmp_path / "bank")


@pytest.mark.parametrize(
    "harmless",
    [
        {"a_key_of_next_year": empty} | {"peft_version": "9.9", "base_model_name_or_path": "some/model"}
        for empty in (False, "", {}, [], 0)
    ]
    + [{"init_lora_weights": "gaussian"}, {"target_modules": "all-linear"}]
    + [{"target_modules": [linear.rpartition(".")[2] for linear in LINEARS], "exclude_modules": ["vision_tower"]}],
)
def test_keys_that_change_nothing_are_accepted(harmless: dict[str, Any], tmp_path: Path) -> None:
    save_bank(golden_bank(0), tmp_path / "bank")
    edit_json(tmp_path / "bank" / "adapter_config.json", **harmless)
    assert same_matrices(load_bank(tmp_path / "bank"), golden_bank(0))


def respelled(folder: Path, before: str, after: str) -> Path:
    """A saved bank whose layers go by other names."""
    save_bank(golden_bank(0), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {key.replace(before, after, 1): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model.language_model.layers", "model.layers"),
        ("model.language_model.layers", "language_model.model.layers"),
        ("base_model.model.model.language_model.layers", "language_model.model.layers"),
        ("base_model.model.", ""),
        ("lora_A.weight", "lora_A.default.weight"),
    ],
)
def test_known_spellings_of_the_layers_are_the_models(before: str, after: str, tmp_path: Path) -> None:
    assert same_matrices(load_bank(respelled(tmp_path / "bank", before, after)), golden_bank(0))


@pytest.mark.parametrize(
    "after", ["vision_tower.layers", "model.decoder.layers", "model.language_model.layers.\u0660", "x" * 100_000]
)
def test_layers_of_another_model_are_refused(after: str, tmp_path: Path) -> None:
    before = "model.language_model.layers" + ".0" * after.endswith("\u0660")
    folder = respelled(tmp_path / "bank", before, after)
    with pytest.raises(BankError, match="is not a LoRA matrix of a linear layer of the language model") as caught:
        load_bank(folder)
    assert len(str(caught.value)) < 1000


def test_matrices_under_two_spellings_are_refused(tmp_path: Path) -> None:
    folder = respelled(tmp_path / "bank", "base_model.model.", "")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        tensors | {f"base_model.model.{key}": tensor.clone() for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(BankError, match="twice, under different names"):
        load_bank(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("published", [False, True])
def test_a_bank_of_numbers_that_are_none_is_refused(value: float, published: bool, tmp_path: Path) -> None:
    bank = golden_bank(0)
    if published:
        folder = published_copy(tmp_path / "bank")
        tensors = torch.load(folder / "cl_lora.bin", weights_only=True)
    else:
        save_bank(bank, folder := tmp_path / "bank")
        tensors = load_file(folder / "adapter_model.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] = value
    if published:
        torch.save(tensors, folder / "cl_lora.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(BankError, match=r"bank.*holds NaN or infinite numbers"):
        load_bank(folder)


def test_what_was_trained_beside_the_matrices_is_not_dropped(tmp_path: Path) -> None:
    save_bank(golden_bank(0), tmp_path / "bank")
    (tmp_path / "bank" / "non_lora_trainables.bin").write_bytes(b"LLaVA's own script puts the projector here")
    with pytest.raises(BankError, match=r"non_lora_trainables\.bin holds weights that were trained beside"):
        load_bank(tmp_path / "bank")


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        save_bank(golden_bank(0), tmp_path / name)
        (tmp_path / name / name).unlink()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(BankError, match="not a regular file"):
            load_bank(tmp_path / name)


def test_the_configuration_has_only_keys_that_every_peft_since_0_5_knows(tmp_path: Path) -> None:
    """Such a PEFT hands every key to its LoraConfig, which refuses one it does not know."""
    save_bank(golden_bank(0), tmp_path / "bank", dropout=0.1)
    written = json.loads((tmp_path / "bank" / "adapter_config.json").read_text())
    assert set(written) == {
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r"),
        *("target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save"),
        *("init_lora_weights", "layers_to_transform", "layers_pattern"),
    }
    assert (written["peft_type"], written["r"], written["lora_alpha"], written["lora_dropout"]) == ("LORA", 4, 8.0, 0.1)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "bank.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_bank_is_refused(file: str, content: bytes, tmp_path: Path) -> None:
    save_bank(golden_bank(0), tmp_path / "bank")
    (tmp_path / "bank" / file).write_bytes(content)
    with pytest.raises(BankError, match=re.escape(str(tmp_path / "bank"))):
        load_bank(tmp_path / "bank")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"no bank; expected adapter_config\.json"):
        load_bank(tmp_path)


def test_a_matrix_of_another_layer_is_refused(tmp_path: Path) -> None:
    save_bank(golden_bank(0), tmp_path / "bank")
    weights = tmp_path / "bank" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    save_file(tensors, weights)
    with pytest.raises(BankError, match=r"lm_head\.weight is not a LoRA matrix"):
        load_bank(tmp_path / "bank")


def test_banks_that_do_not_fit_the_model_are_refused() -> None:
    bank, stack = golden_bank(0), BankStack(golden_base().model, "merge")
    short = dict(bank.matrices)
    first = next(iter(short))
    del short[first]
    with pytest.raises(BankError, match=f"differ in 1 linear layers, first {re.escape(first)}"):
        stack.set_frozen([Bank("short", bank.rank, bank.alpha, short)])
    a, b = bank.matrices[first]
    wide = {**bank.matrices, first: (torch.ones(bank.rank, a.shape[1] + 1), b)}
    with pytest.raises(BankError, match=f"{re.escape(first)} is"):
        stack.set_frozen([Bank("wide", bank.rank, bank.alpha, wide)])


def test_a_published_run_of_another_rank_is_refused(
    config_file: ConfigWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file()
    assert main(["evaluate", str(config), "lora.rank=3", "--banks", str(GOLDEN / "checkpoints")]) == 1
    assert "set lora.rank and lora.alpha" in capsys.readouterr().err
