"""What several processes need: one group, one error, the same facts. The only file that imports DeepSpeed."""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mslora_cr.errors import UserError

TIMEOUT_SECONDS = 1800
"""The longest that a rank waits for another one that is alive, unless `training.ddp_timeout` says otherwise."""
SILENCE_SECONDS = 120
"""After so long without a sign of life a rank counts as lost, with its host; sooner if `ddp_timeout` is shorter."""
SHARED_FOLDER_SECONDS = 60
"""How late a shared file system may show one host what another has written."""
WATCH_SECONDS = 1
"""How often a rank looks whether its launcher and the others are still there."""
GRACE_SECONDS = 5
"""What a rank that fails has to say why, before the others end."""


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
    global _others
    _others = _Others(min(SILENCE_SECONDS, timeout_seconds))


def wait_for_all() -> None:
    """Let every rank arrive here before any goes on."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def first_rank_first(work: Callable[[], None]) -> None:
    """Let the first rank do something alone, however long it takes, while the others wait."""
    if _others is None:
        work()
        return
    wait_for_all()  # the store's key below is then the same for all
    finished = "first_rank_is_done"
    if rank() == 0:
        work()
        _others.store.set(finished, "1")
    while not _others.store.check([finished]):
        time.sleep(0.1)
    wait_for_all()
    if rank() == 0:
        _others.store.delete_key(finished)


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
            f"{folder} is not one folder for all: what rank 0 writes there does not appear on rank {unseen[0]}. Put "
            "output_dir and results_dir on a file system that all hosts share"
        )


# --- errors: the first one is shown, and all processes end ------------------------------------------------------------


@contextmanager
def stopping_together() -> Iterator[None]:
    """Around the work of each process that a launcher started: the first error of any is shown, and all of them end.

    Nothing in a run of one process. A rank whose partner has ended sees its connection break; that the launcher has
    ended, or another host does not answer, is noticed by a thread.
    """
    if world_size() == 1:
        yield
        return
    threading.Thread(target=_watch, args=(_launchers(),), name="watch", daemon=True).start()
    try:
        yield
        wait_for_all()
    except BaseException as error:
        if lost_a_process(error):
            time.sleep(2 * WATCH_SECONDS)  # if that was the launcher's end, the thread says so and stops here
        if _first_to_fail():
            _show(error)
        _end_process(130 if isinstance(error, KeyboardInterrupt) else 1)
    if _others is not None:
        _others.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Others:
    """The other ranks, as this one hears of them through a connection of its own to the run's store."""

    def __init__(self, silence_seconds: float) -> None:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"mslora_cr/{attempt}", TCPStore(*place, is_master=False))
        self.neighbour = (rank() + 1) % world_size()
        self.failed: int | None = None
        self._silence_seconds = silence_seconds
        self._heard = time.monotonic()
        self._finished = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="listen", daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        """Give signs of life, and listen for the next rank's: the ranks form a ring."""
        sign, last = 0, b""
        while not self._finished.wait(min(2.0, self._silence_seconds / 5)):
            try:
                sign += 1
                self.store.set(f"alive/{rank()}", str(sign))
                if self.store.check(["failed"]):
                    self.failed = int(self.store.get("failed"))
                if self.store.check([f"alive/{self.neighbour}"]):
                    word = self.store.get(f"alive/{self.neighbour}")
                    if word != last or word == b"finished":
                        last, self._heard = word, time.monotonic()
            except (RuntimeError, ValueError):
                return  # the store has gone with its host: silence from now on

    def silent(self) -> bool:
        return not self._finished.is_set() and time.monotonic() - self._heard > self._silence_seconds

    def first_to_fail(self) -> bool:
        """Whether this rank's error is the first among all ranks', hence the one to show."""
        try:
            return int(self.store.compare_set("failed", "", str(rank()))) == rank()
        except (RuntimeError, ValueError):
            return True  # the host of the store is gone, and with it whoever could have shown an error

    def finish(self) -> None:
        self._finished.set()
        self._listener.join()  # a thread that is inside the store when Python ends would abort the process
        with suppress(RuntimeError, ValueError):
            self.store.set(f"alive/{rank()}", "finished")


_others: _Others | None = None


def _first_to_fail() -> bool:
    if _others is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # before the ranks have met, once per host
    return _others.first_to_fail()


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


def _launchers() -> list[int]:
    """The processes without which this one must not go on: its parent, and DeepSpeed's runner above that."""
    parent = os.getppid()
    with suppress(psutil.Error):
        process = psutil.Process(parent)
        if "deepspeed.launcher.launch" in process.cmdline():
            return [parent, process.ppid()]
    return [parent]


def _watch(launchers: list[int]) -> None:
    """End this process when its launcher has ended, or another rank has failed or is lost: nobody else would."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # Ranks on this host, as torchrun and as DeepSpeed's launcher say it.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size())))
    first_here = rank() - local_rank
    again = "so this run stops; the same command goes on from the last checkpoint"
    while True:
        time.sleep(WATCH_SECONDS)
        failed = None if _others is None else _others.failed
        if _launchers() != launchers:
            _stop_for(f"the launcher has ended, {again}", show=local_rank == 0)
        elif failed not in (None, rank()):
            time.sleep(GRACE_SECONDS)
            elsewhere = failed not in range(first_here, first_here + here)
            _stop_for(f"rank {failed} has failed, and its host shows why, {again}", show=elsewhere and local_rank == 0)
        elif _others is not None and _others.silent():
            lost = f"rank {_others.neighbour} gives no sign of life, its host or the network is lost"
            _stop_for(f"{lost}, {again}", show=True)


def _stop_for(reason: str, show: bool) -> None:
    if show:
        print(f"mslora-cr: error: {reason}", file=sys.stderr)
    _end_process(1)


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
    """Take apart what a trainer has left in the process, so that the next task's starts as in a fresh one."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()
        _forget_in_zero3()
    trainer.accelerator.free_memory()
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
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
