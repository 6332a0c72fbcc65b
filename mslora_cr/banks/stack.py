"""Banks in a model: frozen ones merged into the base, and a trainable one on top, in training.

A step costs the same however many frozen banks there are. They are either merged into the base weights, summed in
float32 from the pristine base and rounded once, or concatenated into one frozen adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.banks.bank import Bank, BankError, concatenated
from mslora_cr.banks.directions import coupled, decoupled, magnitudes_of, scale_parts
from mslora_cr.banks.experts import copy_routers, route, routers_of
from mslora_cr.banks.fit import check_fits
from mslora_cr.banks.fused import FusedLinear, fuse, fused_layers
from mslora_cr.banks.io import PEFT_PREFIX, lora_config
from mslora_cr.models.language import language_linears
from mslora_cr.utils.precision import ieee_float32

TRAINABLE = "live"
FROZEN = "frozen"
COPIES_SHARE = 0.4
"""Of a GPU's free memory that pristine weights may take; answering needs the rest."""


class BankStack:
    """A base model with banks merged into it and, in training, one trainable bank on top.

    Attributes:
        model: what to call: the base model itself, or the PEFT model around it.
        base: the base model.
    """

    def __init__(self, base: PreTrainedModel, merge_mode: str, reuse: bool = False) -> None:
        """
        Args:
            base: the frozen base model.
            fold: `merge` or `concatenate`.
            reuse: keep the pristine weights, so that `set_frozen` can be called again with other banks.
        """
        self.model: PreTrainedModel | PeftModel = base
        self.merge_mode = merge_mode
        self.base = base
        self._linears = language_linears(base)
        self._directions: Bank | None = None
        self._pristine: dict[str, Tensor] | None = {} if reuse and merge_mode == "merge" else None

    def set_frozen(self, banks: Sequence[Bank], merge: bool = True) -> None:
        """Make exactly these the banks that take part, frozen.

        Args:
            merge: false leaves the base's weights as they are, where those of another process will take their place.

        Raises:
            BankError: a bank does not fit the model.
        """
        for bank in banks:
            self._check(bank)
        routed = any(bank.routers for bank in banks)
        if routed and len(banks) > 1:
            raise BankError("a bank with routers cannot be summed with others")
        if self.merge_mode == "merge" and merge:
            self.merge([] if routed else banks)
        if self.merge_mode == "concatenate" or routed or isinstance(self.model, PeftModel):
            self._concatenate(banks if self.merge_mode == "concatenate" or routed else [])

    @property
    def architecture(self) -> str:
        """The class of the base model."""
        return type(self.base).__name__

    def _check(self, bank: Bank) -> None:
        check_fits(bank, self._linears, self.architecture)

    @torch.no_grad()
    def merge(self, banks: Sequence[Bank]) -> None:
        """Add banks that fit to the base's weights, and nothing else; for `set_frozen` that has left it."""
        if not banks and not self._pristine:
            return
        place = _place_for_copies([linear.weight for linear in self._linears.values()])
        for name, linear in self._linears.items():
            weight = linear.weight
            if not weight.is_floating_point():
                raise BankError("a quantised base cannot be merged into; set lora.fold=concatenate")
            if self._pristine is not None:
                if name not in self._pristine:
                    self._pristine[name] = weight.detach().to(place, copy=True)
                weight = self._pristine[name]
            total = weight.to(linear.weight.device, torch.float32, copy=True)
            if banks:
                a, b = concatenated(name, banks)
                with ieee_float32():
                    total.addmm_(b.to(total.device), a.to(total.device))
            linear.weight.copy_(total)

    def _concatenate(self, banks: Sequence[Bank]) -> None:
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
            self._linears = language_linears(self.base)
        if not banks:
            return
        try:
            self.model = self._with_frozen(banks)
        except BaseException:  # out of memory: the next set begins from the base model alone
            for name, linear in self._linears.items():
                self.base.set_submodule(name, linear)
            vars(self.base).pop("peft_config", None)
            raise

    def _with_frozen(self, banks: Sequence[Bank]) -> PeftModel:
        rank = sum(bank.rank for bank in banks)
        model = self._with_adapter(lora_config(self._linears, rank, rank), FROZEN)
        matrices = {name: concatenated(name, banks) for name in self._linears}
        _copy_into(model, FROZEN, matrices)
        if banks[0].routers:
            route(model, FROZEN, banks[0].experts)
            copy_routers(model, FROZEN, banks[0].routers)
        model.requires_grad_(False)
        return model

    def set_directions(self, bank: Bank, part: int) -> None:
        """Make this bank's parts of a rank `part` take part, frozen in direction, with magnitudes that are trained."""
        self._check(bank)
        self._directions, magnitudes = decoupled(bank, part)
        self._concatenate([self._directions])
        scale_parts(self.model, FROZEN, magnitudes)

    def magnitudes(self, value: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
        """Of the directions by linear layer, (parts,) float32 on the CPU; empty without any.

        Args:
            value: as `snapshot`'s.
        """
        return {
            name: value(own).to("cpu", torch.float32, copy=True)
            for name, own in magnitudes_of(self.model, FROZEN).items()
        }

    def with_directions(self, bank: Bank, magnitudes: Mapping[str, Tensor]) -> Bank:
        """A bank, and in front of it the directions with these magnitudes; the bank itself where there are none."""
        return bank if self._directions is None else coupled(self._directions, magnitudes, bank)

    def _with_adapter(self, config: LoraConfig, name: str) -> PeftModel:
        if all(linear.weight.is_floating_point() for linear in self._linears.values()):
            config._register_custom_module({nn.Linear: FusedLinear})
        model = get_peft_model(self.base, config, adapter_name=name)
        fuse(model)
        return model

    @property
    def layer(self) -> str:
        """How the banks' layers compute: `fused`, one operation each, or `peft`."""
        return "fused" if fused_layers(self.model) else "peft"

    def external_parameters(self) -> dict[nn.Module, list[nn.Parameter]]:
        """Layers that read parameters of modules that they do not call, and those parameters, for ZeRO-3."""
        return {layer: list(layer.parameters_read()) for layer in fused_layers(self.model)}

    def add_trainable(
        self, rank: int, alpha: float, dropout: float = 0.0, initial: Bank | None = None, experts: int = 1
    ) -> None:
        """Put the trainable bank on top: float32, A Kaiming-uniform and B zero unless `initial` is given.

        Args:
            experts: with more than one, the bank is a mixture of them, with routers.

        Afterwards the trainable matrices are the only trainable parameters of the model.
        """
        config = lora_config(self._linears, rank, alpha, dropout)
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(TRAINABLE, config)
            # set_adapter takes a list only on the tuner, and makes each adapter of a trainable list trainable.
            self.model.base_model.set_adapter([FROZEN, TRAINABLE], inference_mode=True)
            self.model.set_requires_grad(TRAINABLE, True)
            for magnitudes in magnitudes_of(self.model, FROZEN).values():
                magnitudes.requires_grad_(True)
        else:
            self.model = self._with_adapter(config, TRAINABLE)
        if experts > 1:
            route(self.model, TRAINABLE, experts)
        if initial is not None:
            self._check(initial)
            self.load_trainable(initial)
        unfrozen = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        adapter = {id(parameter) for parameter in self.trainable_parameters()}
        assert unfrozen == adapter, "something besides the new bank is trainable"

    def weights(self) -> dict[str, Tensor]:
        """The linear layers' own weights, (out, in), with what is merged into them."""
        return {name: linear.weight for name, linear in self._linears.items()}

    def trainable(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The trainable bank's parameters: linear layer's name → (A, B)."""
        return {
            name.removeprefix(PEFT_PREFIX): (module.lora_A[TRAINABLE].weight, module.lora_B[TRAINABLE].weight)
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, routers and magnitudes too."""
        routers = nn.ModuleList(routers_of(self.model, TRAINABLE).values())
        everything = [*itertools.chain.from_iterable(self.trainable().values()), *routers.parameters()]
        everything += magnitudes_of(self.model, FROZEN).values()
        return [parameter for parameter in everything if parameter.requires_grad]

    def train_only(self, halves: Collection[int]) -> None:
        """Let these matrices of the trainable bank learn, 0 for A and 1 for B, and keep the others as they are."""
        for pair in self.trainable().values():
            for half, parameter in enumerate(pair):
                parameter.requires_grad_(half in halves)

    @contextmanager
    def trainable_off(self) -> Iterator[None]:
        """Inside, the trainable bank adds nothing; frozen ones do.

        It is scaled by zero: every layer still runs, so ZeRO-3 gathers the same parameters in the same order.
        """
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.set_scale(TRAINABLE, 0)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_scale(TRAINABLE, 1)

    @torch.no_grad()
    def load_trainable(self, bank: Bank, magnitudes: Mapping[str, Tensor] | None = None) -> None:
        """Copy a bank's numbers into the trainable one, and magnitudes into those of the directions."""
        _copy_into(self.model, TRAINABLE, bank.matrices)
        copy_routers(self.model, TRAINABLE, bank.routers)
        for name, own in (magnitudes or {}).items():
            magnitudes_of(self.model, FROZEN)[name].copy_(own)

    def snapshot(
        self,
        name: str,
        rank: int,
        alpha: float,
        metadata: dict[str, Any] | None = None,
        value: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> Bank:
        """The trainable bank as it is now, copied to the CPU.

        Args:
            value: a parameter's whole value; under DeepSpeed the model holds a part or a rounded copy of it.
        """

        def copied(parameter: Tensor) -> Tensor:
            return value(parameter).to("cpu", torch.float32, copy=True)

        matrices = {module: (copied(a), copied(b)) for module, (a, b) in self.trainable().items()}
        routers = {module: copied(router.weight) for module, router in routers_of(self.model, TRAINABLE).items()}
        return Bank(name, rank, alpha, matrices, metadata or {}, routers)


def _place_for_copies(weights: Sequence[Tensor]) -> torch.device:
    """Beside the weights where they take little of what is free there, else the CPU."""
    device = weights[0].device
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(weight.nbytes for weight in weights)
    return device if needed <= COPIES_SHARE * free else torch.device("cpu")


@torch.no_grad()
def _copy_into(model: nn.Module, adapter: str, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = matrices[name.removeprefix(PEFT_PREFIX)]
            module.lora_A[adapter].weight.copy_(a)
            module.lora_B[adapter].weight.copy_(b)


def merge_banks(model: PreTrainedModel, banks: Sequence[Bank]) -> None:
    """Add the sum of banks to a base model's weights, in float32 with one rounding, for good.

    Raises:
        BankError: a bank does not fit the model, or is a mixture of experts, which depends on its input.
    """
    if any(bank.routers for bank in banks):
        raise BankError("a bank with routers depends on its input and cannot be merged into weights")
    BankStack(model, "merge").set_frozen(banks)
