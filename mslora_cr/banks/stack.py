"""Banks in a model: frozen ones merged into the base, and in training a trainable one on top.

A step costs the same for any number of frozen banks. They are either merged into the base weights, summed in float32
from the pristine base and rounded once, or concatenated into one frozen adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.banks.bank import Bank, BankError, concatenated
from mslora_cr.banks.fit import check_fits
from mslora_cr.banks.io import lora_config
from mslora_cr.banks.kinds import GatherFn, PlainLora, copied, kind_of, lora_layers
from mslora_cr.banks.projector import Projector
from mslora_cr.models.language import adapter_targets, language_linears
from mslora_cr.utils.precision import ieee_float32

if TYPE_CHECKING:  # PEFT takes seconds to import, and banks that are merged do not need it.
    from peft import LoraConfig, PeftModel

TRAINABLE, FROZEN = "live", "frozen"
"""The adapters' names in the model. DeepSpeed writes them into checkpoints inside a task, so they must not change."""
COPIES_SHARE = 0.4
"""The share of a GPU's free memory that pristine weights may take; answering needs the rest."""


class BankStack:
    """A base model with banks merged into it and, in training, one trainable bank on top.

    Attributes:
        model: The model to call: the base model itself, or the PEFT model around it.
        base: The base model.
        projector: The base model's projector.
    """

    def __init__(
        self, base: PreTrainedModel, merge_mode: str, reuse: bool = False, kind: PlainLora | None = None
    ) -> None:
        """
        Args:
            merge_mode: `merge` or `concatenate`.
            reuse: Keep the pristine weights, so that `set_frozen` can be called again with other banks.
            kind: The kind of the trainable bank; plain LoRA by default.
        """
        self.model: PreTrainedModel | PeftModel = base
        self.merge_mode = merge_mode
        self.base = base
        self.projector = Projector(base)
        self._linears = language_linears(base)
        self._kind = kind or PlainLora()
        self._pristine: dict[str, Tensor] | None = {} if reuse and merge_mode == "merge" else None

    def set_frozen(self, banks: Sequence[Bank], merge: bool = True) -> None:
        """Make exactly these banks the active frozen ones.

        Args:
            merge: False leaves the base's weights unchanged, because another process's weights will replace them.

        Raises:
            BankError: A bank does not fit the model, or one that answers alone is not alone.
        """
        for bank in banks:
            self._check(bank)
        self.projector.place(banks)
        routed = any(bank.depends_on_input for bank in banks)
        if routed and len(banks) > 1:
            raise BankError("a bank with routers cannot be summed with others")
        if self.merge_mode == "merge" and merge:
            self.merge([] if routed else banks)
        if self.merge_mode == "concatenate" or routed or self._peft is not None:
            self._concatenate(banks if self.merge_mode == "concatenate" or routed else [])

    @property
    def _peft(self) -> PeftModel | None:
        return None if self.model is self.base else cast("PeftModel", self.model)

    @property
    def architecture(self) -> str:
        """The class of the base model."""
        return type(self.base).__name__

    def _check(self, bank: Bank) -> None:
        check_fits(bank, self._linears, self.architecture)
        self.projector.check(bank)

    @torch.no_grad()
    def merge(self, banks: Sequence[Bank]) -> None:
        """Add banks that fit to the base's weights, and do nothing else; for a `set_frozen` with `merge=False`."""
        if not banks and not self._pristine:
            return
        homes = _devices_for_copies([linear.weight for linear in self._linears.values()])
        for name, linear in self._linears.items():
            weight = linear.weight
            if not weight.is_floating_point():
                raise BankError("banks cannot be merged into a quantised base; set lora.fold=concatenate")
            if self._pristine is not None:
                if name not in self._pristine:
                    self._pristine[name] = weight.detach().to(homes[weight.device], copy=True)
                weight = self._pristine[name]
            total = weight.to(linear.weight.device, torch.float32, copy=True)
            if banks:
                a, b = concatenated(name, banks)
                with ieee_float32():
                    total.addmm_(b.to(total.device), a.to(total.device))
            linear.weight.copy_(total)

    def _concatenate(self, banks: Sequence[Bank]) -> None:
        if self._peft is not None:
            self.model = self._peft.unload()
            self._linears = language_linears(self.base)
        if not banks:
            return
        try:
            self.model = self._with_frozen(banks)
        except BaseException:  # If memory ran out, the next set starts from the base model alone.
            for name, linear in self._linears.items():
                self.base.set_submodule(name, linear)
            vars(self.base).pop("peft_config", None)
            raise

    def _with_frozen(self, banks: Sequence[Bank]) -> PeftModel:
        rank = sum(bank.rank for bank in banks)
        model = self._with_adapter(self._lora_config(rank, rank), FROZEN)
        matrices = {name: concatenated(name, banks) for name in self._linears}
        kind = kind_of(banks[0])
        kind.install(model, FROZEN, FROZEN)
        with torch.no_grad():
            kind.load(model, FROZEN, replace(banks[0], matrices=matrices))
        model.requires_grad_(False)
        return model

    def continue_from(self, previous: Bank) -> Bank | None:
        """Freeze what the kind keeps of the previous task's bank, and return the bank from which the trainable one
        starts, if any.

        Raises:
            BankError: The bank does not fit the model.
        """
        self._check(previous)
        self.projector.load(previous.projector)
        frozen = self._kind.frozen_part(previous)
        if frozen is None:
            return previous
        self._concatenate([frozen])
        self._kind.install_frozen(self.model, FROZEN)
        return None

    def _lora_config(self, rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig:
        config = lora_config(self._linears, rank, alpha, dropout)
        config.target_modules = adapter_targets(self.base, self._linears)
        return config

    def _with_adapter(self, config: LoraConfig, name: str) -> PeftModel:
        from peft import get_peft_model

        from mslora_cr.banks.fused import FusedLinear, fuse

        if all(linear.weight.is_floating_point() for linear in self._linears.values()):
            config._register_custom_module({nn.Linear: FusedLinear})
        model = get_peft_model(self.base, config, adapter_name=name)
        fuse(model)
        return model

    @property
    def layer(self) -> str:
        """The implementation of the banks' layers: `fused`, one operation each, or `peft`."""
        from mslora_cr.banks.fused import fused_layers

        return "fused" if fused_layers(self.model) else "peft"

    def external_parameters(self) -> dict[nn.Module, list[nn.Parameter]]:
        """Return, for ZeRO-3, layers that read parameters of modules that they do not call, and those parameters."""
        from mslora_cr.banks.fused import fused_layers

        return {layer: list(layer.parameters_read()) for layer in fused_layers(self.model)}

    def add_trainable(
        self,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        initial: Bank | None = None,
        projector_learning_rate: float | None = None,
    ) -> None:
        """Put the trainable bank on top: float32, with A Kaiming-uniform and B zero unless `initial` is given.

        Afterwards its numbers are the only trainable parameters of the model.

        Args:
            dropout: The dropout probability of the adapter's input.
            initial: The bank whose numbers it starts with.
            projector_learning_rate: Train the base model's projector with it, at this rate.
        """
        config = self._lora_config(rank, alpha, dropout)
        if (peft := self._peft) is not None:
            peft.add_adapter(TRAINABLE, config)
            # set_adapter takes a list only on the tuner, and makes each adapter of a trainable list trainable.
            peft.base_model.set_adapter([FROZEN, TRAINABLE], inference_mode=True)
            peft.set_requires_grad(TRAINABLE, True)
        else:
            self.model = self._with_adapter(config, TRAINABLE)
        self._kind.install(self.model, TRAINABLE, FROZEN)
        if projector_learning_rate is not None:
            self.projector.train(projector_learning_rate)
        if initial is not None:
            self._check(initial)
            self.load_trainable(initial)
        if (adapted := self.trainable().keys()) != self._linears.keys():
            odd = sorted(adapted ^ self._linears.keys())
            raise BankError(f"PEFT does not adapt the layers that a bank holds in {self.architecture}; first {odd[0]}")
        unfrozen = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        adapter = {id(parameter) for parameter in self.trainable_parameters()}
        assert unfrozen == adapter, "parameters other than the new bank's are trainable"

    def weights(self) -> dict[str, Tensor]:
        """Return the linear layers' own weights, (out, in), with the banks that are merged into them."""
        return {name: linear.weight for name, linear in self._linears.items()}

    def trainable(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the trainable bank's parameters: linear layer's name → (A, B)."""
        return {
            name: (layer.lora_A[TRAINABLE].weight, layer.lora_B[TRAINABLE].weight)
            for name, layer in lora_layers(self.model)
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return everything that is trained, beyond A and B too; the projector last."""
        everything = itertools.chain.from_iterable(self.trainable().values())
        extra = self._kind.extra_parameters(self.model, TRAINABLE, FROZEN)
        trained = [*everything, *extra, *self.projector.trained.values()]
        return [parameter for parameter in trained if parameter.requires_grad]

    def train_only(self, halves: Collection[int]) -> None:
        """Train these matrices of the trainable bank, 0 for A and 1 for B, and freeze the others."""
        for pair in self.trainable().values():
            for half, parameter in enumerate(pair):
                parameter.requires_grad_(half in halves)

    @contextmanager
    def trainable_off(self) -> Iterator[None]:
        """Switch the trainable bank off inside the block; frozen banks stay active.

        It is scaled by zero: every layer still runs, so ZeRO-3 gathers the same parameters in the same order.
        """
        layers = [layer for _, layer in lora_layers(self.model)]
        for layer in layers:
            layer.set_scale(TRAINABLE, 0)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_scale(TRAINABLE, 1)

    @torch.no_grad()
    def load_trainable(self, bank: Bank, extra_state: Mapping[str, Tensor] | None = None) -> None:
        """Copy a bank's numbers into the trainable one, and a checkpoint's `extra_state` if there is any."""
        self._kind.load(self.model, TRAINABLE, bank)
        self.projector.load(bank.projector)
        self._kind.load_extra_state(self.model, FROZEN, extra_state or {})

    def snapshot(
        self,
        name: str,
        rank: int,
        alpha: float,
        metadata: dict[str, Any] | None = None,
        gather_fn: GatherFn = Tensor.detach,
    ) -> Bank:
        """Copy the trainable bank to the CPU.

        Args:
            gather_fn: Returns a parameter's whole value.
        """
        matrices, routers = self._kind.read(self.model, TRAINABLE, gather_fn)
        projector = {key: copied(parameter, gather_fn) for key, parameter in self.projector.trained.items()}
        return Bank(name, rank, alpha, matrices, metadata or {}, routers, projector)

    def extra_state(self, gather_fn: GatherFn = Tensor.detach) -> dict[str, Tensor]:
        """Return the trained tensors that are not part of `snapshot`, float32 on the CPU; empty for most kinds.

        Args:
            gather_fn: Returns a parameter's whole value.
        """
        return self._kind.extra_state(self.model, FROZEN, gather_fn)

    def stored(self, bank: Bank, extra_state: Mapping[str, Tensor]) -> Bank:
        """Return the bank to store for the task, from its `snapshot` and `extra_state`."""
        return self._kind.stored(bank, extra_state)


def _devices_for_copies(weights: Sequence[Tensor]) -> dict[torch.device, torch.device]:
    """Return, for each device of the weights, the one for their copies: itself if they take little of its free memory,
    otherwise the CPU."""
    homes = {device: device for device in {weight.device for weight in weights}}
    for device in homes:
        needed = sum(weight.nbytes for weight in weights if weight.device == device)
        if device.type == "cuda" and needed > COPIES_SHARE * torch.cuda.mem_get_info(device)[0]:
            homes[device] = torch.device("cpu")
    return homes


def merge_banks(model: PreTrainedModel, banks: Sequence[Bank]) -> None:
    """Add the sum of banks permanently to a base model's weights, in float32 with one rounding.

    Raises:
        BankError: A bank does not fit the model, or is a mixture of experts, which depends on its input.
    """
    if any(bank.depends_on_input for bank in banks):
        raise BankError("a bank with routers depends on its input and cannot be merged into weights")
    BankStack(model, "merge").set_frozen(banks)
