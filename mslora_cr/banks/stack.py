"""Banks in a model: frozen ones merged into the base, and a trainable one on top, in training.

A step costs the same however many frozen banks there are. They are either merged into the base weights, summed in
float32 from the pristine base and rounded once, or concatenated into one frozen adapter.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.banks.bank import Bank, BankError, concatenated
from mslora_cr.banks.fit import check_fits
from mslora_cr.banks.fused import FusedLinear, fuse, fused_layers
from mslora_cr.banks.io import lora_config
from mslora_cr.banks.kinds import GatherFn, PlainLora, kind_of, lora_layers
from mslora_cr.models.language import adapter_targets, language_linears
from mslora_cr.utils.precision import ieee_float32

TRAINABLE, FROZEN = "live", "frozen"
"""The adapters' names in the model. DeepSpeed writes them into checkpoints inside a task, so they stay as they are."""
COPIES_SHARE = 0.4
"""Of a GPU's free memory that pristine weights may take; answering needs the rest."""


class BankStack:
    """A base model with banks merged into it and, in training, one trainable bank on top.

    Attributes:
        model: what to call: the base model itself, or the PEFT model around it.
        base: the base model.
    """

    def __init__(
        self, base: PreTrainedModel, merge_mode: str, reuse: bool = False, kind: PlainLora | None = None
    ) -> None:
        """
        Args:
            base: the frozen base model.
            merge_mode: `merge` or `concatenate`.
            reuse: keep the pristine weights, so that `set_frozen` can be called again with other banks.
            kind: of the trainable bank; plain LoRA by default.
        """
        self.model: PreTrainedModel | PeftModel = base
        self.merge_mode = merge_mode
        self.base = base
        self._linears = language_linears(base)
        self._kind = kind or PlainLora()
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
        routed = any(bank.depends_on_input for bank in banks)
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
        device = _place_for_copies([linear.weight for linear in self._linears.values()])
        for name, linear in self._linears.items():
            weight = linear.weight
            if not weight.is_floating_point():
                raise BankError("a quantised base cannot be merged into; set lora.fold=concatenate")
            if self._pristine is not None:
                if name not in self._pristine:
                    self._pristine[name] = weight.detach().to(device, copy=True)
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
        model = self._with_adapter(self._lora_config(rank, rank), FROZEN)
        matrices = {name: concatenated(name, banks) for name in self._linears}
        kind = kind_of(banks[0])
        kind.install(model, FROZEN, FROZEN)
        with torch.no_grad():
            kind.load(model, FROZEN, replace(banks[0], matrices=matrices))
        model.requires_grad_(False)
        return model

    def continue_from(self, previous: Bank) -> Bank | None:
        """Freeze what the kind keeps of the previous task's bank, and return what the trainable bank starts as, if any.

        Raises:
            BankError: the bank does not fit the model.
        """
        self._check(previous)
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

    def add_trainable(self, rank: int, alpha: float, dropout: float = 0.0, initial: Bank | None = None) -> None:
        """Put the trainable bank on top: float32, A Kaiming-uniform and B zero unless `initial` is given.

        Afterwards its numbers are the only trainable parameters of the model.

        Args:
            rank: of the bank.
            alpha: of the bank.
            dropout: probability, of the adapter's input.
            initial: the bank whose numbers it starts with.
        """
        config = self._lora_config(rank, alpha, dropout)
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(TRAINABLE, config)
            # set_adapter takes a list only on the tuner, and makes each adapter of a trainable list trainable.
            self.model.base_model.set_adapter([FROZEN, TRAINABLE], inference_mode=True)
            self.model.set_requires_grad(TRAINABLE, True)
        else:
            self.model = self._with_adapter(config, TRAINABLE)
        self._kind.install(self.model, TRAINABLE, FROZEN)
        if initial is not None:
            self._check(initial)
            self.load_trainable(initial)
        if (adapted := self.trainable().keys()) != self._linears.keys():
            odd = sorted(adapted ^ self._linears.keys())
            raise BankError(f"PEFT does not adapt the layers that a bank holds in {self.architecture}; first {odd[0]}")
        unfrozen = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        adapter = {id(parameter) for parameter in self.trainable_parameters()}
        assert unfrozen == adapter, "something besides the new bank is trainable"

    def weights(self) -> dict[str, Tensor]:
        """The linear layers' own weights, (out, in), with what is merged into them."""
        return {name: linear.weight for name, linear in self._linears.items()}

    def trainable(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The trainable bank's parameters: linear layer's name → (A, B)."""
        return {
            name: (layer.lora_A[TRAINABLE].weight, layer.lora_B[TRAINABLE].weight)
            for name, layer in lora_layers(self.model)
        }

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, beside A and B too."""
        everything = itertools.chain.from_iterable(self.trainable().values())
        extra = self._kind.extra_parameters(self.model, TRAINABLE, FROZEN)
        return [parameter for parameter in [*everything, *extra] if parameter.requires_grad]

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
        """Copy a bank's numbers into the trainable one, and a checkpoint's `extra_state` where there is any."""
        self._kind.load(self.model, TRAINABLE, bank)
        self._kind.load_extra_state(self.model, FROZEN, extra_state or {})

    def snapshot(
        self,
        name: str,
        rank: int,
        alpha: float,
        metadata: dict[str, Any] | None = None,
        gather_fn: GatherFn = Tensor.detach,
    ) -> Bank:
        """The trainable bank as it is now, copied to the CPU.

        Args:
            name: of the bank.
            rank: of the bank.
            alpha: of the bank.
            metadata: what is noted in `bank.json`.
            gather_fn: gives a parameter's whole value.
        """
        matrices, routers = self._kind.read(self.model, TRAINABLE, gather_fn)
        return Bank(name, rank, alpha, matrices, metadata or {}, routers)

    def extra_state(self, gather_fn: GatherFn = Tensor.detach) -> dict[str, Tensor]:
        """What is trained besides the bank of `snapshot`, float32 on the CPU; empty for most kinds.

        Args:
            gather_fn: gives a parameter's whole value.
        """
        return self._kind.extra_state(self.model, FROZEN, gather_fn)

    def stored(self, bank: Bank, extra_state: Mapping[str, Tensor]) -> Bank:
        """The bank to store of the task, from its `snapshot` and `extra_state`."""
        return self._kind.stored(bank, extra_state)


def _place_for_copies(weights: Sequence[Tensor]) -> torch.device:
    """Beside the weights where they take little of what is free there, else the CPU."""
    device = weights[0].device
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    needed = sum(weight.nbytes for weight in weights)
    return device if needed <= COPIES_SHARE * free else torch.device("cpu")


def merge_banks(model: PreTrainedModel, banks: Sequence[Bank]) -> None:
    """Add the sum of banks to a base model's weights, in float32 with one rounding, for good.

    Raises:
        BankError: a bank does not fit the model, or is a mixture of experts, which depends on its input.
    """
    if any(bank.depends_on_input for bank in banks):
        raise BankError("a bank with routers depends on its input and cannot be merged into weights")
    BankStack(model, "merge").set_frozen(banks)
