"""A bank's layer as one operation: against PEFT's on the same parameters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mslora_cr.banks.fused import FusedLinear, PeftLinear, fused_layers
from mslora_cr.banks.io import load_bank
from mslora_cr.banks.kinds import Experts, PlainLora
from mslora_cr.banks.stack import BankStack
from mslora_cr.cli.main import main
from mslora_cr.config.load import load_config
from mslora_cr.models.llava_med import load
from tests.conftest import GOLDEN, ConfigWriter, bank_bytes, needs_gpu
from tests.helpers.killing import KillPoint, run_until_killed

SEQUENCE = ["pathvqa", "pathvqa_slake-vqarad"]
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")


DEVICES = ("cpu", pytest.param("cuda", marks=(pytest.mark.gpu, needs_gpu)))


def golden_stack(
    merge_mode: str = "concatenate", dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> BankStack:
    """The golden model with a frozen bank and a trainable one, whose scaling is 2."""
    frozen, initial = (load_bank(GOLDEN / "checkpoints" / name) for name in SEQUENCE)
    stack = BankStack(load(GOLDEN / "llava_med_tiny", dtype=dtype, device=device).model, merge_mode)
    stack.set_frozen([frozen])
    stack.add_trainable(initial.rank, 2 * initial.rank, initial=initial, **options)
    stack.model.train()
    return stack


def ids() -> Tensor:
    return torch.randint(10, 32000, (2, 24), generator=torch.Generator().manual_seed(0))


@contextmanager
def as_peft() -> Iterator[None]:
    """Inside, fused layers run PEFT's forward pass."""
    ours = FusedLinear.forward
    FusedLinear.forward = PeftLinear.forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        FusedLinear.forward = ours  # type: ignore[method-assign]


def values_and_gradients(stack: BankStack, autocast: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Of the first decoder layer's projections, for an input that needs a gradient; gradients of inputs come first."""
    attention = stack.base.model.language_model.layers[0].self_attn
    generator = torch.Generator().manual_seed(1)
    width = attention.q_proj.in_features
    weight = attention.q_proj.base_layer.weight
    x = torch.randn(2, 24, width, generator=generator).to(weight.device, weight.dtype).requires_grad_()
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=autocast):
        outputs = [getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
        outputs.append(attention.o_proj(outputs[0]))
    heads = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    trainable = [half for name in LAYERS for half in stack.trainable()[f"model.language_model.layers.0.{name}"]]
    gradients = torch.autograd.grad(outputs, [x, *trainable], heads)
    return outputs, list(gradients)


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("merge_mode", ["merge", "concatenate"])
def test_in_float32_it_is_pefts_layer(merge_mode: str, bias: bool, device: str) -> None:
    stack = golden_stack(merge_mode, device=device)
    for name in ("q_proj", "k_proj", "v_proj") if bias else ():  # as in Qwen2.5-VL and InternVL
        linear = getattr(stack.base.model.language_model.layers[0].self_attn, name).base_layer
        linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, device=device), requires_grad=False)
    assert stack.layer == "fused"
    ours = values_and_gradients(stack)
    with as_peft():
        theirs = values_and_gradients(stack)
    for one, other in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert distance(one, other) <= 1e-6
    layer = stack.base.model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, device=device)
    with stack.trainable_off():
        off = layer(x)
    assert distance(off, layer(x)) > 1e-3  # the bank does something, unless it is off


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("merge_mode", ["merge", "concatenate"])
def test_in_bfloat16_it_is_at_least_as_close_to_float32_as_pefts(merge_mode: str, device: str) -> None:
    stack = golden_stack(merge_mode, torch.bfloat16, device)
    ours = values_and_gradients(stack, autocast=True)
    with as_peft():
        theirs = values_and_gradients(stack, autocast=True)
    for parameter in stack.model.parameters():
        parameter.data = parameter.data.double()
    exact = values_and_gradients(stack)
    for kind in (0, 1):
        assert [tensor.dtype for tensor in ours[kind]] == [tensor.dtype for tensor in theirs[kind]]
        errors = [
            sum(distance(tensor, wanted) for tensor, wanted in zip(found[kind], exact[kind], strict=True))
            for found in (ours, theirs)
        ]
        assert 0 < errors[0] <= errors[1] < 0.2


class Products(TorchDispatchMode):
    """Collects the shapes of matrix products, and the dtypes of what is as large as the activations."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.products, self.dtypes, self.passes = size, [], set(), []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and func.__name__.split(".")[0] in ("mm", "addmm_"):
            self.products.append(tuple(found.shape))
        elif isinstance(found, Tensor) and found.numel() >= self.size and not func.is_view:
            self.passes.append(func.__name__)
        if isinstance(found, Tensor) and found.numel() >= self.size:
            self.dtypes.add(found.dtype)
        return found


def test_layers_that_read_the_same_input_share_a_product_and_nothing_else_passes_over_it() -> None:
    stack = golden_stack("merge", torch.bfloat16)
    attention = stack.base.model.language_model.layers[0].self_attn
    positions, width, rank = 48, attention.q_proj.in_features, stack.trainable_parameters()[0].shape[0]
    x = torch.randn(positions, width, dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    smallest = attention.k_proj.out_features
    with hooks, torch.autocast("cpu", torch.bfloat16), Products(positions * smallest) as seen:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(attention, name)(x)
    outputs = [getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj")]
    expected = [(positions, 3 * rank), *((positions, size) for size in outputs for _ in range(2))]
    assert seen.products == expected
    assert seen.dtypes == {torch.bfloat16} and seen.passes == []
    assert saved == {
        **{x.untyped_storage().data_ptr(): 2 * positions * width},
        **{place: size for place, size in saved.items() if size == 2 * positions * 3 * rank},
    }
    assert len(saved) == 2


def test_a_layer_called_alone_or_twice_makes_a_product_of_its_own() -> None:
    stack = golden_stack()
    attention = stack.base.model.language_model.layers[0].self_attn
    first, second = (torch.randn(5, attention.q_proj.in_features) for _ in range(2))
    for x, name in [(first, "q_proj"), (second, "k_proj"), (first, "k_proj"), (first, "k_proj"), (second, "v_proj")]:
        layer = getattr(attention, name)
        torch.testing.assert_close(layer(x), PeftLinear.forward(layer, x))


@pytest.mark.parametrize("device", DEVICES)
def test_checkpointing_changes_nothing_to_the_bit(device: str) -> None:
    stack = golden_stack(device=device)
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            stack.model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = stack.model(input_ids=ids().to(device), labels=ids().to(device)).loss
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, stack.trainable_parameters()))
    assert torch.equal(*losses)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- where PEFT's layer stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dropout"), [(PlainLora(), 0.1), (Experts(2), 0.0)], ids=["dropout", "routers"])
def test_dropout_and_routers_keep_pefts_layer(kind: PlainLora, dropout: float) -> None:
    stack = BankStack(load(GOLDEN / "llava_med_tiny", dtype=torch.float32).model, "merge", kind=kind)
    stack.add_trainable(4, 8, dropout)
    stack.model.train()
    assert stack.layer == "peft" and fused_layers(stack.model) == []
    torch.manual_seed(0)
    ours = stack.model(input_ids=ids()).logits
    torch.manual_seed(0)
    with as_peft():
        assert torch.equal(stack.model(input_ids=ids()).logits, ours)


def test_a_quantised_base_keeps_pefts_layer() -> None:
    pytest.importorskip("bitsandbytes")
    stack = BankStack(load(GOLDEN / "llava_med_tiny", dtype=torch.float32, quantization="4bit").model, "concatenate")
    stack.add_trainable(4, 8)
    assert stack.layer == "peft"
    assert not any(isinstance(module, FusedLinear) for module in stack.model.modules())


def test_answers_with_concatenated_banks_keep_their_exactness() -> None:
    """A float32 adapter beside a bfloat16 base answers as it always has."""
    stack = BankStack(load(GOLDEN / "llava_med_tiny", dtype=torch.bfloat16).model, "concatenate")
    stack.set_frozen([load_bank(GOLDEN / "checkpoints" / SEQUENCE[0])])
    with torch.inference_mode():
        ours = stack.model.eval()(input_ids=ids()).logits
        with as_peft():
            assert torch.equal(stack.model(input_ids=ids()).logits, ours)


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_run_ends_in_the_same_bank_and_the_ledger_names_the_layer(
    config_file: ConfigWriter, trained_config: Any, tmp_path: Any
) -> None:
    settings = ["tasks=[pathvqa]", "lora.dropout=0"]
    whole = config_file(run="whole")
    assert main(["train", str(whole), *settings]) == 0
    command = ["train", str(config_file()), *settings]
    point = KillPoint("mslora_cr.training.checkpoints:replace_folder", after=True)
    run_until_killed(command, point, tmp_path / "output")
    run = load_config(tmp_path / "run.yaml").run_dir
    assert (run / "work" / "pathvqa" / "checkpoint-2").is_dir()
    assert main(command) == 0
    assert bank_bytes(run) == bank_bytes(run.with_name("whole"))
    assert '"bank_layer": "fused"' in (run / "ledger.json").read_text()
    # Its configuration has dropout.
    assert '"bank_layer": "peft"' in (trained_config.parent / "checkpoints" / "tiny" / "ledger.json").read_text()
