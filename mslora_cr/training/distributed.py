"""What several processes need: one group, one error, the same facts. The only file that imports DeepSpeed."""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mslora_cr.errors import UserError

TIMEOUT_SECONDS = 1800
"""The longest that a rank waits for another one that is alive, unless `training.ddp_timeout` says otherwise."""
ERROR_KEY = "mslora_cr/first_to_fail"
LAUNCHER_CHECK_SECONDS = 1.0


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
    """
    if setting not in ("auto", "cuda"):
        return torch.device(setting)
    if setting == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start_process_group(use_gpu: bool, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Join the processes that a launcher started; nothing in a run of one process."""
    if world_size() == 1 or torch.distributed.is_initialized():
        return
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would take a GPU that is there
    torch.distributed.init_process_group("nccl" if use_gpu else "gloo", timeout=timedelta(seconds=timeout_seconds))


def wait_for_all() -> None:
    """Let every rank arrive here before any goes on."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def first_rank_first(work: Callable[[], None]) -> None:
    """Let the first rank do something alone, however long it takes, while the others wait."""
    if not torch.distributed.is_initialized():
        work()
        return
    wait_for_all()  # the store's counter below is then the same for all
    store = torch.distributed.distributed_c10d._get_default_store()
    finished = "mslora_cr/first_rank_is_done"
    if rank() == 0:
        work()
        store.set(finished, "1")
    while not store.check([finished]):
        time.sleep(0.1)
    wait_for_all()
    if rank() == 0:
        store.delete_key(finished)


def from_first_rank(value: Any) -> Any:
    """The first rank's value, on every rank."""
    box = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(box)
    return box[0]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, on every rank, in place."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def agree(facts: Mapping[str, Any]) -> None:
    """Let every rank see that all ranks have the same facts.

    Raises:
        DistributedError: on every rank; names the first fact that differs, and where.
    """
    if not torch.distributed.is_initialized():
        return
    everyone: list[dict[str, Any]] = [{} for _ in range(world_size())]
    torch.distributed.all_gather_object(everyone, dict(facts))
    for name in facts:
        for other, theirs in enumerate(everyone):
            if theirs.get(name) != everyone[0].get(name):
                raise DistributedError(
                    f"rank {other} and rank 0 differ in {name}: {theirs.get(name)!r} and {everyone[0].get(name)!r}. "
                    "Every host must see the same files (a shared folder, or equal copies) and the same packages"
                )


# --- errors: the first one is shown, and all processes end ------------------------------------------------------------


@contextmanager
def stopping_together() -> Iterator[None]:
    """Around the work of each process that a launcher started: the first error of any is shown, and all of them end.

    Nothing in a run of one process. A rank whose partner has ended sees its connection break; a rank whose launcher has
    ended notices that by itself.
    """
    if world_size() == 1:
        yield
        return
    _watch_launcher()
    try:
        yield
    except BaseException as error:
        if _first_to_fail():
            _show(error)
        _end_process(130 if isinstance(error, KeyboardInterrupt) else 1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _first_to_fail() -> bool:
    """Whether this process's error is the first among all ranks', hence the one to show."""
    if not torch.distributed.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"  # before the ranks have met, once per host
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        return int(store.compare_set(ERROR_KEY, "", str(rank()))) == rank()
    except (RuntimeError, ValueError):
        return True  # the host of the store is gone, and with it whoever could have shown an error


def _show(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted; the same command goes on from the last checkpoint"
    elif isinstance(error, UserError | OSError):
        message = f"error on rank {rank()}: {error}"
    elif lost_a_process(error):
        message = (
            f"error on rank {rank()}: another process of this run has ended or does not answer, so all stop; the same "
            f"command goes on from the last checkpoint ({str(error).splitlines()[0]})"
        )
    else:
        traceback.print_exception(error)
        message = f"error on rank {rank()}: {error!r}"
    print(f"mslora-cr: {message}", file=sys.stderr)


def lost_a_process(error: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has ended or does not answer."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _watch_launcher() -> None:
    """End this process when its launcher has ended: nobody else would."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LAUNCHER_CHECK_SECONDS)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            ended = "the launcher has ended, so this run stops; the same command goes on from the last checkpoint"
            print(f"mslora-cr: error: {ended}", file=sys.stderr)
        _end_process(1)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def _end_process(status: int) -> None:
    """Leave at once: an orderly end could wait for a collective that never finishes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
            "training.deepspeed needs a launcher, for one process too: torchrun --nproc_per_node 1 -m mslora_cr train …"
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


def shard_again(trainer: Trainer) -> None:
    """Shard what a backward pass that the engine did not start has left whole: ZeRO-3 alone leaves anything."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.empty_partition_cache()


def release(trainer: Trainer) -> None:
    """Take apart what a trainer has left in the process, so that the next task's starts as in a fresh one."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
