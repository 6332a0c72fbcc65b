"""Starts the processes of a run together; the first error of any process is printed and ends all of them."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import psutil
import torch
from torch.distributed import PrefixStore, TCPStore

from mslora_cr.config.load import training_fields
from mslora_cr.config.schema import StreamConfig
from mslora_cr.distributed.comm import barrier, get_device, rank, world_size
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 1800
"""The longest that a rank waits for another one that is alive, unless `training.ddp_timeout` says otherwise."""
SILENCE_SECONDS = 120
"""After so long without a sign of life a rank counts as lost, with its host; sooner if `ddp_timeout` is shorter."""
STORE_TIMEOUT = timedelta(seconds=300)
"""TCPStore's own."""
WATCH_SECONDS = 1
"""How often a rank looks whether its launcher and the others are still there."""
GRACE_SECONDS = 5
"""What a rank that fails has to say why, before the others end."""


def start_processes(config: StreamConfig) -> dict[str, Any]:
    """Join the processes that a launcher started, and return the checked `training` section.

    Raises:
        ConfigError: that section is wrong.
    """
    fields = training_fields(config)
    use_gpu = get_device(config.model.device).type == "cuda"
    start_process_group(use_gpu, fields.get("ddp_timeout", TIMEOUT_SECONDS))
    return fields


def start_process_group(use_gpu: bool, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Join the processes that a launcher started; nothing in a run of one process."""
    if world_size() == 1 or torch.distributed.is_initialized():
        return
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would otherwise use an available GPU
    backend, timeout = "nccl" if use_gpu else "gloo", timedelta(seconds=timeout_seconds)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = _store_of_this_attempt("ranks", timeout)
        torch.distributed.init_process_group(
            backend, timeout=timeout, store=store, rank=rank(), world_size=world_size()
        )
    else:
        torch.distributed.init_process_group(backend, timeout=timeout)
    global _peers
    _peers = PeerMonitor(min(SILENCE_SECONDS, timeout_seconds))


def _store_of_this_attempt(purpose: str, timeout: timedelta = STORE_TIMEOUT) -> PrefixStore:
    """A connection to the run's store, apart from those of other purposes, and from what earlier attempts left there:
    under `torchrun --max-restarts` one store serves all attempts, and has the addresses of processes that are gone."""
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"mslora_cr/{attempt}/{purpose}", TCPStore(*address, is_master=False, timeout=timeout))


def run_on_rank0(work: Callable[[], None]) -> None:
    """Let the first rank do something alone, however long it takes, while the others wait."""
    if _peers is None:
        work()
        return
    barrier()  # the store's key below is then the same for all
    finished = "first_rank_is_done"
    if rank() == 0:
        work()
        _peers.store.set(finished, "1")
    while not _peers.store.check([finished]):
        time.sleep(0.1)
    barrier()
    if rank() == 0:
        _peers.store.delete_key(finished)


@contextmanager
def abort_together() -> Iterator[None]:
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
        barrier()
    except BaseException as error:
        if lost_a_process(error):
            time.sleep(3 * WATCH_SECONDS)  # if that was the launcher's end, the thread says so and stops here
        if _first_to_fail():
            _show(error)
        _end_process(130 if isinstance(error, KeyboardInterrupt) else 1)
    if _peers is not None:
        _peers.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class PeerMonitor:
    """The other ranks, as seen through this rank's own connection to the run's store."""

    def __init__(self, silence_seconds: float) -> None:
        self.store = _store_of_this_attempt("peers")
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


_peers: PeerMonitor | None = None


def _first_to_fail() -> bool:
    if _peers is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # before the ranks have met, once per host
    return _peers.first_to_fail()


def _show(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted; the same command resumes from the last checkpoint"
    elif isinstance(error, UserError | OSError):
        message = f"error on rank {rank()}: {error}"
    elif lost_a_process(error):
        message = (
            f"error on rank {rank()}: another process of this run has ended or does not answer, so all stop; the same "
            f"command resumes from the last checkpoint ({str(error).splitlines()[0]})"
        )
    else:
        traceback.print_exception(error)
        message = f"error on rank {rank()}: {error!r}"
    log.error("%s", message)


def lost_a_process(error: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has ended or does not answer."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _launchers() -> list[int]:
    """The processes without which this one must not continue: its parent, and DeepSpeed's runner above that."""
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
    again = "so this run stops; the same command resumes from the last checkpoint"
    while True:
        time.sleep(WATCH_SECONDS)
        failed = None if _peers is None else _peers.failed
        if _launchers() != launchers:
            if local_rank > 0:  # DeepSpeed's lower launcher would kill the first rank before it has said why
                time.sleep(1.5 * WATCH_SECONDS)
            _stop_for(f"the launcher has ended, {again}", show=local_rank == 0)
        elif failed not in (None, rank()):
            time.sleep(GRACE_SECONDS)
            elsewhere = failed not in range(first_here, first_here + here)
            _stop_for(f"rank {failed} has failed, and its host shows why, {again}", show=elsewhere and local_rank == 0)
        elif _peers is not None and _peers.silent():
            lost = f"rank {_peers.neighbour} gives no sign of life, its host or the network is lost"
            _stop_for(f"{lost}, {again}", show=True)


def _stop_for(reason: str, show: bool) -> None:
    if show:
        log.error("error: %s", reason)
    _end_process(1)


def _end_process(status: int) -> None:
    """Leave at once: an orderly end could wait for a collective that never finishes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
