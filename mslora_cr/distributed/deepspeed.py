"""DeepSpeed: its configuration, its process group, ZeRO's sharded parameters, and its global state.

Only this file imports DeepSpeed.
"""

from __future__ import annotations

import gc
import inspect
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mslora_cr.distributed.comm import DistributedError
from mslora_cr.utils.strict_json import JsonError, read_object


def zero_stage(deepspeed_config: str | Mapping[str, Any] | None) -> int:
    """Return the ZeRO stage that `training.deepspeed` asks for; 0 without it.

    Raises:
        DistributedError: The file cannot be read, or no launcher started this process.
    """
    if deepspeed_config is None:
        return 0
    content: Any = deepspeed_config
    if isinstance(deepspeed_config, str):
        try:
            content = read_object(Path(deepspeed_config))
        except JsonError as error:
            raise DistributedError(f"training.deepspeed: {error}") from None
    if "RANK" not in os.environ:
        raise DistributedError(
            "training.deepspeed needs a launcher, even for one process: "
            "torchrun --nproc_per_node 1 -m mslora_cr train …"
        )
    return int(content.get("zero_optimization", {}).get("stage", 0))


def prepare_deepspeed(use_gpu: bool) -> None:
    """Let DeepSpeed join the process group.

    On the CPU it would first compile a shared-memory collective, which needs a compiler, sums in another order than
    gloo, and blocks every later run if it is killed.
    """
    import deepspeed

    if not use_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed calls collectives by names that newer torch versions deprecate, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    deepspeed.init_distributed()


def partition(
    model: nn.Module,
    deepspeed_config: Mapping[str, Any],
    device: torch.device,
    external: Mapping[nn.Module, Sequence[nn.Parameter]],
) -> None:
    """Partition a model's parameters over the ranks one by one (ZeRO-3), so that no GPU ever holds all of them.

    Args:
        model: The model, on the CPU.
        device: Where this rank computes. Buffers are not partitioned and go there whole.
        external: Parameters that a module reads from modules which it does not call, by module.
    """
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=dict(deepspeed_config))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    for module, parameters in external.items():
        for parameter in parameters:
            deepspeed.zero.register_external_parameter(module, parameter)


@contextmanager
def gather_params(parameters: Iterable[Tensor], to_write: bool = False) -> Iterator[None]:
    """Gather parameters that ZeRO-3 has sharded, on every rank, to be read inside the block. Other parameters are whole
    anyway.

    Args:
        to_write: Keep what is written into them inside the block; otherwise it is lost.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if to_write else None):
        yield


def float32_value(parameter: Tensor) -> Tensor:
    """Return the full value of a bank's parameter in float32, as the optimizer holds it; for a frozen one, as the model
    holds it.

    Call it on every rank. With bfloat16 or float16, DeepSpeed trains a float32 copy and rounds it into the model at
    every step.
    """
    if not parameter.requires_grad:
        with gather_params([parameter]):
            return parameter.detach().to(torch.float32, copy=True)
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach().float()


def reshard(trainer: Trainer) -> None:
    """Shard again what a backward pass outside the engine has left whole; only ZeRO-3 leaves anything."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.empty_partition_cache()


def release_trainer(trainer: Trainer) -> None:
    """Remove what a trainer has left in the process, so that the next task's trainer starts as in a fresh one.

    The trainer and its model are parts of reference cycles: `free_memory` frees them once nothing else refers to them.
    """
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
        _forget_in_zero3()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()


def free_memory() -> None:
    """Free what nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_in_zero3() -> None:
    """Clear ZeRO-3's process-wide state, which would otherwise hold every task's model as long as the process lives."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    # A decorated method caches its results for every module that it was ever called with.
    for method in filter(inspect.isfunction, vars(PartitionedParameterCoordinator).values()):
        for inner in inspect.getclosurevars(method).nonlocals.values():
            if hasattr(inner, "cache_clear"):
                inner.cache_clear()
