"""What several processes need: one group, one error, the same facts. The only file that imports DeepSpeed."""

from __future__ import annotations

import gc
import inspect
import json
import os
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mslora_cr.config import ConfigError
from mslora_cr.errors import UserError

SHARED_FOLDER_SECONDS = 60
"""How late a shared file system may show one host what another has written."""


class DistributedError(UserError):
    """The processes of a run do not fit together."""


def rank() -> int:
    """This process's number among those that a launcher started; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(setting: str) -> torch.device:
    """Where this process's model goes.

    Args:
        setting: `model.device`; `auto` is this process's own GPU, or the CPU where there is none.

    Raises:
        ConfigError: there is no GPU, and one is asked for.
    """
    available = torch.cuda.is_available()
    if setting == "cuda" and not available:
        raise ConfigError(
            "model.device is cuda, and PyTorch sees no GPU; check nvidia-smi, CUDA_VISIBLE_DEVICES and that "
            "torch.version.cuda is not None, or set model.device=auto"
        )
    if setting == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def wait_for_all() -> None:
    """Let every rank arrive here before any continues."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank."""
    box = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box)
    return box[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, on the CPU of every rank."""
    if not torch.distributed.is_initialized():
        return tensor
    total = tensor.cuda() if torch.distributed.get_backend() == "nccl" else tensor.clone()
    torch.distributed.all_reduce(total)
    return total.cpu()


def from_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def agree(facts: Mapping[str, Any]) -> None:
    """Let every rank see that all ranks have the same facts.

    Raises:
        DistributedError: on every rank; names the first fact that differs, and where.
    """
    everyone = from_all_ranks(dict(facts))
    for name in facts:
        for other, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise DistributedError(
                    f"rank {other} and rank 0 differ in {name}: {theirs.get(name)!r} and {everyone[0].get(name)!r}. "
                    "Every host must see the same files (a shared folder, or equal copies) and the same packages"
                )


def must_be_shared(folder: Path) -> None:
    """Let every rank see that a folder is one and the same wherever ranks run.

    Raises:
        DistributedError: on every rank; the first rank's mark does not appear on another.
    """
    if not torch.distributed.is_initialized():
        return
    mark = Path(from_first_rank(str(folder / f".seen-by-all-{uuid.uuid4().hex}")))
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    wait_for_all()
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    unseen = [other for other, sees in enumerate(from_all_ranks(seen)) if not sees]
    if rank() == 0:
        mark.unlink()
    if unseen:
        raise DistributedError(
            f"{folder} is not shared: what rank 0 writes there does not appear on rank {unseen[0]}. Put "
            "output_dir and results_dir on a file system that all hosts share"
        )


# --- DeepSpeed -----------------------------------------------------------------------------------------------------


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
            content = json.loads(Path(deepspeed_config).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DistributedError(f"training.deepspeed: {deepspeed_config} cannot be read as JSON ({error})") from None
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


def partition(model: nn.Module, deepspeed_config: Mapping[str, Any]) -> None:
    """Share a model's parameters among the ranks one by one (ZeRO-3), so that no GPU ever holds all of them."""
    import deepspeed

    deepspeed.zero.Init(module=model, config_dict_or_path=dict(deepspeed_config))


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 has sharded are whole, on every rank, to be read; others are so anyway."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def float32_value(parameter: Tensor) -> Tensor:
    """A trainable parameter whole, as the optimizer holds it, float32. To be called on every rank.

    DeepSpeed in bfloat16 or float16 trains a float32 copy and rounds it into the model at every step.
    """
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach().float()


def shard_again(trainer: Trainer) -> None:
    """Shard what a backward pass that the engine did not start has left whole: ZeRO-3 alone leaves anything."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.empty_partition_cache()


def release(trainer: Trainer) -> None:
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
