"""The life cycle of a bank: add, freeze, fold, save, load; the published `cl_lora.bin` in and out.

A bank is one PEFT LoRA adapter over every linear layer of the language model. In memory the bank in training is the
adapter `live`; frozen banks are folded, so that a step costs the same however many there are: either merged into the
base weights, summed in float32 from the pristine base and rounded once, or concatenated into one frozen adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mslora_cr.errors import UserError
from mslora_cr.llava_med import LANGUAGE_LINEARS, linear_name, published_linear_name

LIVE = "live"
FROZEN = "frozen"
WEIGHTS, CONFIG, METADATA = "adapter_model.safetensors", "adapter_config.json", "bank.json"
MEMORY = "memory.safetensors"
"""What a method keeps of a task beside its bank."""
STATISTICS = "router.safetensors"
"""What tells the task's questions from those of others."""
PUBLISHED_WEIGHTS = "cl_lora.bin"
ROUTER = "lora_router.weight"
_PEFT_PREFIX = "base_model.model."
_PUBLISHED_KEY = re.compile(r"(model\.layers\.\d+\.\w+\.\w+)\.cl_lora_pool\.task_(\d+)_lora\.lora_([AB])")

Matrices = dict[str, tuple[Tensor, Tensor]]
"""Linear layer's name in transformers' model → (A of shape (rank, in), B of shape (out, rank))."""


class BankError(UserError):
    """A bank cannot be read, or does not fit the model or the other banks."""


@dataclass(frozen=True)
class Bank:
    """A task's LoRA: float32 matrices on the CPU. Adds ``alpha / rank · B A`` to each linear layer's weight.

    With routers it is a mixture of experts, equal slices of the rank: ``alpha / rank · B (g(x) ⊙ A x)``, each slice
    times its expert's share in ``g(x) = softmax(router x)``. That depends on the input, so it cannot be folded.
    """

    name: str
    rank: int
    alpha: float
    matrices: Matrices
    metadata: dict[str, Any] = field(default_factory=dict)
    routers: dict[str, Tensor] = field(default_factory=dict)
    """By linear layer, (experts, in); empty for plain LoRA."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def tensors(self) -> list[Tensor]:
        """All its numbers."""
        return [*(matrix for pair in self.matrices.values() for matrix in pair), *self.routers.values()]

    @property
    def experts(self) -> int:
        return next((len(router) for router in self.routers.values()), 1)


# --- on disk -------------------------------------------------------------------------------------------------------


def save_bank(
    bank: Bank, folder: Path, dropout: float = 0.0, beside: Mapping[str, Mapping[str, Tensor]] | None = None
) -> str:
    """Write a bank as a PEFT adapter with `bank.json` beside it, and return the SHA-256 of its weights.

    The folder appears whole or not at all: it is written under a temporary name and renamed.

    Args:
        beside: what else is kept of the task, by the name of its safetensors file; empty ones are not written.
    """
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    lora_config(bank.rank, bank.alpha, dropout).save_pretrained(str(staging))
    tensors = {}
    for name, (a, b) in bank.matrices.items():
        tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"] = b.contiguous()
    for name, router in bank.routers.items():
        tensors[f"{_PEFT_PREFIX}{name}.{ROUTER}"] = router.contiguous()
    save_file(tensors, staging / WEIGHTS, {"format": "pt"})
    for name, kept in (beside or {}).items():
        if kept:
            save_file(dict(kept), staging / name)
    digest = file_digest(staging / WEIGHTS)
    described = {**bank.metadata, "name": bank.name, "rank": bank.rank, "alpha": bank.alpha, "sha256": digest}
    (staging / METADATA).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    publish_folder(staging, folder)
    return digest


def publish_folder(staging: Path, folder: Path) -> None:
    """Flush a finished folder to disk and give it its name, replacing an older one of that name."""
    for file in sorted(staging.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
    if folder.exists():
        shutil.rmtree(folder)
    staging.rename(folder)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_bank(path: Path) -> Bank:
    """Read a bank: a PEFT adapter's folder, a published checkpoint's folder, or its `cl_lora.bin` itself.

    Raises:
        BankError: nothing readable is there, or it is no bank over the language model's linear layers.
    """
    if path.name == PUBLISHED_WEIGHTS or (path / PUBLISHED_WEIGHTS).is_file():
        return _load_published(path.parent if path.name == PUBLISHED_WEIGHTS else path)
    try:
        config = _read_object(path / CONFIG)
        rank, alpha = _shape(config["r"], config["lora_alpha"])
        tensors = load_file(path / WEIGHTS)
        metadata = _read_object(path / METADATA) if (path / METADATA).is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BankError(
            f"{path}: no bank; expected {CONFIG} and {WEIGHTS}, or {PUBLISHED_WEIGHTS} ({error!r})"
        ) from None
    if config.get("use_rslora") or config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise BankError(f"{path}: only plain LoRA of one rank is a bank (no rsLoRA, DoRA or patterns)")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(_PEFT_PREFIX) + r"(.+)\.lora_(A|B|router)\.weight", key)
        if match is None:
            raise BankError(f"{path}/{WEIGHTS}: {key} is no LoRA matrix")
        halves.setdefault(match[1], {})[match[2]] = tensor
    return _bank(path, metadata.get("name", path.name), rank, alpha, halves, metadata)


def _shape(rank: Any, alpha: Any) -> tuple[int, float]:
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"rank {rank!r} and alpha {alpha!r} are not those of a bank")
    return rank, float(alpha)


def _read_object(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds {type(content).__name__}, not an object")
    return content


def _load_published(folder: Path) -> Bank:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = config["mslora_cfg"]
        rank, alpha = _shape(settings["lora_rank"], settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BankError(f"{folder}/config.json: lora_rank and lora_alpha not found in mslora_cfg ({error!r})") from None
    try:
        stored = torch.load(folder / PUBLISHED_WEIGHTS, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise BankError(f"{folder / PUBLISHED_WEIGHTS}: not plain tensors, so it is not opened ({error})") from None
    if not isinstance(stored, dict):
        raise BankError(
            f"{folder / PUBLISHED_WEIGHTS}: expected a dictionary of tensors, found {type(stored).__name__}"
        )
    return published_bank(folder / PUBLISHED_WEIGHTS, folder.name, rank, alpha, stored)


def published_bank(place: Path, name: str, rank: int, alpha: float, stored: Mapping[Any, Any]) -> Bank:
    """A bank from tensors under the published keys; `place` is named in errors.

    Raises:
        BankError: a key or tensor is not of a published bank.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        match = _PUBLISHED_KEY.fullmatch(str(key))
        module = linear_name(match[1]) if match else None
        if match is None or module is None or not isinstance(tensor, Tensor):
            raise BankError(f"{place}: {key} is no matrix of a published bank")
        halves.setdefault(module, {})[match[3]] = tensor
    return _bank(place, name, rank, alpha, halves, {})


def _bank(
    path: Path,
    name: str,
    rank: int,
    alpha: float,
    halves: Mapping[str, Mapping[str, Tensor]],
    metadata: dict[str, Any],
) -> Bank:
    matrices: Matrices = {}
    routers = {}
    for module, pair in sorted(halves.items(), key=lambda item: _natural(item[0])):
        a, b = pair.get("A"), pair.get("B")
        if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise BankError(f"{path}: {module} has no pair of matrices of rank {rank}")
        matrices[module] = (a.float(), b.float())
        router = pair.get("router")
        if router is not None:
            if router.dim() != 2 or router.shape[1] != a.shape[1] or rank % router.shape[0]:
                raise BankError(f"{path}: {module} has no router of experts that share rank {rank} equally")
            routers[module] = router.float()
    if not matrices:
        raise BankError(f"{path}: the bank is empty")
    if routers.keys() - matrices.keys() or (routers and len(routers) < len(matrices)):
        raise BankError(f"{path}: some of its layers have a router, and some have none")
    return Bank(name, rank, float(alpha), matrices, metadata, routers)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def export_published(bank: Bank, folder: Path, index: int, base_config: Mapping[str, Any]) -> None:
    """Write a bank as the published code does: `cl_lora.bin` and `config.json`.

    Args:
        index: the task's position in the stream, from 0; it stands in every key.
        base_config: the base model's `config.json`, to which `mslora_cfg` is added.

    Raises:
        BankError: the bank has routers, for which the published format has no place.
    """
    if bank.routers:
        raise BankError(f"bank {bank.name!r} is a mixture of experts, which the published format cannot hold")
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {}
    for module, pair in bank.matrices.items():
        for letter, tensor in zip("AB", pair, strict=True):
            key = f"{published_linear_name(module)}.cl_lora_pool.task_{index}_lora.lora_{letter}"
            tensors[key] = tensor.clone()
    torch.save(tensors, staging / PUBLISHED_WEIGHTS)
    settings = {"max_task": index + 1, "lora_rank": bank.rank, "lora_alpha": bank.alpha, "lora_dropout": 0.0}
    config = {**base_config, "max_task": index + 1, "mslora_cfg": settings}
    (staging / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    publish_folder(staging, folder)


# --- in the model --------------------------------------------------------------------------------------------------


def lora_config(rank: int, alpha: float, dropout: float = 0.0) -> LoraConfig:
    """PEFT's configuration of a bank: every linear layer of the language model, nothing else."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LANGUAGE_LINEARS, bias="none")


def language_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that banks adapt, by their name in transformers' model, with or without PEFT around them."""
    found = {}
    for name, module in model.named_modules():
        name = name.removeprefix(_PEFT_PREFIX)
        if re.fullmatch(LANGUAGE_LINEARS, name):
            found[name] = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return found


class RoutedExperts(nn.Linear):
    """PEFT's A of a mixture of experts: ``g(x) ⊙ A x``, so that B of it is the experts' weighted sum.

    The router is a module of its own, so that ZeRO-3 gathers it when it is called.
    """

    def __init__(self, plain: nn.Linear, experts: int) -> None:
        weight = plain.weight
        super().__init__(plain.in_features, plain.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        self.weight = weight
        self.router = nn.Linear(plain.in_features, experts, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in) → (…, rank)."""
        shares = self.router(input).softmax(-1)
        return super().forward(input) * shares.repeat_interleave(self.out_features // self.router.out_features, -1)


class BankStack:
    """A base model with banks folded into it and, in training, one live bank on top.

    Attributes:
        model: what to call: the base model itself, or the PEFT model around it.
    """

    def __init__(self, base: PreTrainedModel, fold: str, reuse: bool = False) -> None:
        """
        Args:
            base: the frozen base model.
            fold: `merge` or `concatenate`.
            reuse: keep the pristine weights, so that `freeze` can be called again with other banks.
        """
        self.model: PreTrainedModel | PeftModel = base
        self.fold = fold
        self._base = base
        self._linears = language_linears(base)
        self._pristine: dict[str, Tensor] | None = {} if reuse and fold == "merge" else None

    def freeze(self, banks: Sequence[Bank]) -> None:
        """Make exactly these the banks that take part, frozen.

        Raises:
            BankError: a bank does not fit the model.
        """
        for bank in banks:
            self._check(bank)
        routed = any(bank.routers for bank in banks)
        if routed and len(banks) > 1:
            raise BankError("a bank with routers stands alone; it cannot be summed with others")
        if self.fold == "merge":
            self._merge([] if routed else banks)
        if self.fold == "concatenate" or routed or isinstance(self.model, PeftModel):
            self._concatenate(banks if self.fold == "concatenate" or routed else [])

    def _check(self, bank: Bank) -> None:
        if set(bank.matrices) != set(self._linears):
            odd = sorted(set(bank.matrices) ^ set(self._linears))
            raise BankError(f"bank {bank.name!r} and the model differ in {len(odd)} linear layers, first {odd[0]}")
        for name, (a, b) in bank.matrices.items():
            linear = self._linears[name]
            if (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
                raise BankError(
                    f"bank {bank.name!r}: {name} is {b.shape[0]} × {a.shape[1]}, the model's "
                    f"{linear.out_features} × {linear.in_features}"
                )

    @torch.no_grad()
    def _merge(self, banks: Sequence[Bank]) -> None:
        if not banks and not self._pristine:
            return
        for name, linear in self._linears.items():
            weight = linear.weight
            if not weight.is_floating_point():
                raise BankError("a quantised base cannot be merged into; set lora.fold=concatenate")
            if self._pristine is not None:
                if name not in self._pristine:  # on the CPU: a GPU that holds the model once need not hold it twice
                    self._pristine[name] = weight.detach().to("cpu", copy=True)
                weight = self._pristine[name]
            total = weight.to(linear.weight.device, torch.float32, copy=True)
            if banks:
                a, b = concatenated(name, banks)
                total.addmm_(b.to(total.device), a.to(total.device))
            linear.weight.copy_(total)

    def _concatenate(self, banks: Sequence[Bank]) -> None:
        if isinstance(self.model, PeftModel):
            self.model = self.model.unload()
            self._linears = language_linears(self._base)
        if not banks:
            return
        rank = sum(bank.rank for bank in banks)
        model = get_peft_model(self._base, lora_config(rank, rank), adapter_name=FROZEN)
        matrices = {name: concatenated(name, banks) for name in self._linears}
        _copy_into(model, FROZEN, matrices)
        if banks[0].routers:
            _route(model, FROZEN, banks[0].experts)
            _copy_routers(model, FROZEN, banks[0].routers)
        model.requires_grad_(False)
        self.model = model

    def add_live(
        self, rank: int, alpha: float, dropout: float = 0.0, initial: Bank | None = None, experts: int = 1
    ) -> None:
        """Put the trainable bank on top: float32, A Kaiming-uniform and B zero unless `initial` is given.

        Args:
            experts: with more than one, the bank is a mixture of them, with routers.

        Afterwards the live matrices are the only trainable parameters of the model.
        """
        config = lora_config(rank, alpha, dropout)
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(LIVE, config)
            # set_adapter takes a list only on the tuner, and makes each adapter of a trainable list trainable.
            self.model.base_model.set_adapter([FROZEN, LIVE], inference_mode=True)
            self.model.set_requires_grad(LIVE, True)
        else:
            self.model = get_peft_model(self._base, config, adapter_name=LIVE)
        if experts > 1:
            _route(self.model, LIVE, experts)
        if initial is not None:
            self._check(initial)
            self.load_live(initial)
        trainable = {id(parameter) for parameter in self.model.parameters() if parameter.requires_grad}
        live = {id(parameter) for parameter in self.live_parameters()}
        assert trainable == live, "something besides the live bank is trainable"

    def live(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """The live bank's parameters: linear layer's name → (A, B)."""
        return {
            name.removeprefix(_PEFT_PREFIX): (module.lora_A[LIVE].weight, module.lora_B[LIVE].weight)
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def live_parameters(self) -> list[nn.Parameter]:
        """Everything that is trained, routers too."""
        routers = nn.ModuleList(_routers(self.model, LIVE).values())
        return [*(parameter for pair in self.live().values() for parameter in pair), *routers.parameters()]

    @contextmanager
    def live_off(self) -> Iterator[None]:
        """Inside, the live bank adds nothing; frozen ones do.

        It is scaled by zero: every layer still runs, so ZeRO-3 gathers the same parameters in the same order.
        """
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in layers:
            layer.set_scale(LIVE, 0)
        try:
            yield
        finally:
            for layer in layers:
                layer.set_scale(LIVE, 1)

    @torch.no_grad()
    def load_live(self, bank: Bank) -> None:
        """Copy a bank's numbers into the live one."""
        _copy_into(self.model, LIVE, bank.matrices)
        _copy_routers(self.model, LIVE, bank.routers)

    def snapshot(
        self,
        name: str,
        rank: int,
        alpha: float,
        metadata: dict[str, Any] | None = None,
        value: Callable[[Tensor], Tensor] = Tensor.detach,
    ) -> Bank:
        """The live bank as it is now, copied to the CPU.

        Args:
            value: a parameter's whole value; under DeepSpeed the model holds a part or a rounded copy of it.
        """

        def copied(parameter: Tensor) -> Tensor:
            return value(parameter).to("cpu", torch.float32, copy=True)

        matrices = {module: (copied(a), copied(b)) for module, (a, b) in self.live().items()}
        routers = {module: copied(router.weight) for module, router in _routers(self.model, LIVE).items()}
        return Bank(name, rank, alpha, matrices, metadata or {}, routers)


def concatenated(name: str, banks: Iterable[Bank]) -> tuple[Tensor, Tensor]:
    """Scaled A matrices on top of each other, B matrices side by side: B A is the sum of the banks' updates."""
    pairs = [(bank.scaling * bank.matrices[name][0], bank.matrices[name][1]) for bank in banks]
    return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


@torch.no_grad()
def _copy_into(model: nn.Module, adapter: str, matrices: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = matrices[name.removeprefix(_PEFT_PREFIX)]
            module.lora_A[adapter].weight.copy_(a)
            module.lora_B[adapter].weight.copy_(b)


def _route(model: nn.Module, adapter: str, experts: int) -> None:
    """Turn an adapter into a mixture of experts, its routers uniform at random as PyTorch makes a linear layer."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_A[adapter] = RoutedExperts(module.lora_A[adapter], experts)


def _routers(model: nn.Module, adapter: str) -> dict[str, nn.Linear]:
    return {
        name.removeprefix(_PEFT_PREFIX): module.lora_A[adapter].router
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.lora_A[adapter], RoutedExperts)
    }


@torch.no_grad()
def _copy_routers(model: nn.Module, adapter: str, routers: Mapping[str, Tensor]) -> None:
    own = _routers(model, adapter)
    if {name: router.weight.shape for name, router in own.items()} != {name: r.shape for name, r in routers.items()}:
        raise BankError("a mixture goes on from one of as many experts, and plain LoRA from plain LoRA")
    for name, router in own.items():
        router.weight.copy_(routers[name])
