"""Starts the processes of a run together. The first error of any process is printed and ends all of them."""

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

import psutil
import torch
from torch.distributed import PrefixStore, TCPStore

from mslora_cr.config.load import training_fields
from mslora_cr.config.schema import StreamConfig
from mslora_cr.distributed.comm import DistributedError, barrier, get_device, rank, world_size
from mslora_cr.utils.errors import UserError

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 1800
"""The longest wait of a rank for another live one, unless `training.ddp_timeout` is set."""
SILENCE_SECONDS = 120
"""A rank without a sign of life for so long counts as lost, with its host; sooner if `ddp_timeout` is shorter."""
STORE_TIMEOUT = timedelta(seconds=300)
"""The timeout of the TCPStore itself."""
MEETING_SECONDS = 20
"""The time after which a rank reports that it still waits for the others to join."""
WATCH_SECONDS = 1
"""The interval at which a rank checks its launcher and the other ranks."""
GRACE_SECONDS = 5
"""The time that a failing rank has to report why, before the others end."""


def start_processes(config: StreamConfig) -> None:
    """Join the processes that a launcher started; do nothing in a run of one process.

    Raises:
        ConfigError: The `training` section is wrong, which has their timeout.
    """
    if world_size() > 1:
        timeout = training_fields(config).get("ddp_timeout", TIMEOUT_SECONDS)
        start_process_group(get_device(config.model.device).type == "cuda", timeout)


def start_process_group(use_gpu: bool, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Join the processes that a launcher started; do nothing in a run of one process.

    Raises:
        DistributedError: The environment has only a part of a launcher's variables.
    """
    if world_size() == 1 or torch.distributed.is_initialized():
        return
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT", *(["LOCAL_RANK"] if use_gpu else []))
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise DistributedError(
            f"the environment has WORLD_SIZE={world_size()}, but not {', '.join(missing)}: unset WORLD_SIZE to run one "
            "process, or start all of them with scripts/launch.sh or torchrun"
        )
    with _saying_who_is_waited_for():
        _join_process_group(use_gpu, timeout_seconds)


@contextmanager
def _saying_who_is_waited_for() -> Iterator[None]:
    """Report, while the ranks join, after a while that some are missing, as when a launcher left variables behind."""
    missing = (
        f"waits for {world_size() - 1} other processes, as the environment has WORLD_SIZE={world_size()}; if no "
        "launcher has started them, unset that variable"
    )
    timer = threading.Timer(MEETING_SECONDS, log.error, [missing])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _join_process_group(use_gpu: bool, timeout_seconds: float) -> None:
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # Otherwise DeepSpeed would use an available GPU.
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
    """Connect to the run's store under a prefix for this purpose and this attempt.

    Under `torchrun --max-restarts` one store serves all attempts, and holds addresses of processes that are gone.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"mslora_cr/{attempt}/{purpose}", TCPStore(*address, is_master=False, timeout=timeout))


def run_on_rank0(work: Callable[[], None]) -> None:
    """Let the first rank do something alone, however long it takes, while the others wait."""
    if _peers is None:
        work()
        return
    barrier()  # All ranks then use the same key below.
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
    """Wrap the work of each process of a launch: the first error of any process is shown, and all of them end.

    In a run of one process this does nothing. A rank whose partner ended sees its connection break; a thread notices
    that the launcher ended or another host does not answer.
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
            time.sleep(3 * WATCH_SECONDS)  # If the launcher ended, the thread reports it and stops this process here.
        if _first_to_fail():
            _show(error)
        _end_process(130 if isinstance(error, KeyboardInterrupt) else 1)
    if _peers is not None:
        _peers.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class PeerMonitor:
    """Watches the other ranks through this rank's own connection to the run's store."""

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
        """Send signs of life, and listen for those of the next rank: the ranks form a ring."""
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
                return  # The store is gone with its host: from now on there is silence.

    def silent(self) -> bool:
        return not self._finished.is_set() and time.monotonic() - self._heard > self._silence_seconds

    def first_to_fail(self) -> bool:
        """Return whether this rank was the first to fail; only its error is shown."""
        try:
            return int(self.store.compare_set("failed", "", str(rank()))) == rank()
        except (RuntimeError, ValueError):
            return True  # The host of the store is gone, and with it whoever could have shown an error.

    def finish(self) -> None:
        self._finished.set()
        self._listener.join()  # A thread inside the store would abort the process when Python ends.
        with suppress(RuntimeError, ValueError):
            self.store.set(f"alive/{rank()}", "finished")


_peers: PeerMonitor | None = None


def _first_to_fail() -> bool:
    if _peers is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"  # Before the ranks have met, each host shows the error once.
    return _peers.first_to_fail()


def _show(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        message = "interrupted; the same command resumes from the last checkpoint"
    elif isinstance(error, UserError | OSError):
        message = f"error on rank {rank()}: {error}"
    elif lost_a_process(error):
        message = (
            f"error on rank {rank()}: another process of this run ended or does not answer, so all stop; the same "
            f"command resumes from the last checkpoint ({str(error).splitlines()[0]})"
        )
    else:
        traceback.print_exception(error)
        message = f"error on rank {rank()}: {error!r}"
    log.error("%s", message)


def lost_a_process(error: BaseException) -> bool:
    """Return whether an error is one that a rank sees when another rank ended or does not answer."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Broken pipe")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _launchers() -> list[int]:
    """Return the processes that this one depends on: its parent, and DeepSpeed's runner above it."""
    parent = os.getppid()
    with suppress(psutil.Error):
        process = psutil.Process(parent)
        if "deepspeed.launcher.launch" in process.cmdline():
            return [parent, process.ppid()]
    return [parent]


def _watch(launchers: list[int]) -> None:
    """End this process when its launcher ended, or another rank failed or is lost; nobody else would."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    # The ranks on this host, as torchrun and DeepSpeed's launcher tell them.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size())))
    first_here = rank() - local_rank
    again = "so this run stops; the same command resumes from the last checkpoint"
    while True:
        time.sleep(WATCH_SECONDS)
        failed = None if _peers is None else _peers.failed
        if _launchers() != launchers:
            if local_rank > 0:  # DeepSpeed's inner launcher would kill the first rank before it can report why.
                time.sleep(1.5 * WATCH_SECONDS)
            _stop_for(f"the launcher ended, {again}", show=local_rank == 0)
        elif failed not in (None, rank()):
            time.sleep(GRACE_SECONDS)
            elsewhere = failed not in range(first_here, first_here + here)
            _stop_for(f"rank {failed} failed, and its host shows why, {again}", show=elsewhere and local_rank == 0)
        elif _peers is not None and _peers.silent():
            lost = f"rank {_peers.neighbour} gives no sign of life: its host or the network is lost"
            _stop_for(f"{lost}, {again}", show=True)


def _stop_for(reason: str, show: bool) -> None:
    if show:
        log.error("error: %s", reason)
    _end_process(1)


def _end_process(status: int) -> None:
    """Exit at once: an orderly shutdown could wait for a collective that never finishes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
