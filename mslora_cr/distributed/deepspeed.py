"""DeepSpeed: its configuration, its process group, ZeRO's sharded parameters, and what it keeps for the whole process.

The only file that imports DeepSpeed.
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
    """The ZeRO stage that `training.deepspeed` asks for; 0 without one.

    Raises:
        DistributedError: the file cannot be read, or no launcher has started this process.
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

    On the CPU it would compile a shared-memory collective first, which needs a compiler, adds up in another order than
    gloo, and blocks every later run if it is killed meanwhile.
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
    """Share a model's parameters among the ranks one by one (ZeRO-3), so that no GPU ever holds all of them.

    Args:
        model: on the CPU.
        device: where this rank computes; buffers, which are not shared, go there whole.
        external: for modules that read parameters of modules that they do not call, those parameters.
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
def gather_params(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole, on every rank, to be read; others are so anyway."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def float32_value(parameter: Tensor) -> Tensor:
    """A bank's parameter whole, as the optimizer holds it, float32; one that is not trained, as the model does. To be
    called on every rank.

    DeepSpeed in bfloat16 or float16 trains a float32 copy and rounds it into the model at every step.
    """
    if not parameter.requires_grad:
        with gather_params([parameter]):
            return parameter.detach().to(torch.float32, copy=True)
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach().float()


def reshard(trainer: Trainer) -> None:
    """Shard what a backward pass that the engine did not start has left whole: ZeRO-3 alone leaves anything."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.empty_partition_cache()


def release_trainer(trainer: Trainer) -> None:
    """Take apart what a trainer has left in the process, so that the next task's starts as in a fresh one.

    It and its model are parts of reference cycles: once nothing else refers to them, `free_memory` frees them.
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
    """Empty what ZeRO-3 keeps for the whole process: it would hold every task's model, as long as the process lives."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    FWD_MODULE_STACK.clear()
    # A decorated method caches its results for every module that it was ever given.
    for method in filter(inspect.isfunction, vars(PartitionedParameterCoordinator).values()):
        for inner in inspect.getclosurevars(method).nonlocals.values():
            if hasattr(inner, "cache_clear"):
                inner.cache_clear()
