"""Router statistics for banks that were trained elsewhere."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from mslora_cr.banks.io import STATISTICS
from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.tasks import training_records
from mslora_cr.distributed.comm import barrier, get_device, rank
from mslora_cr.distributed.launch import start_processes
from mslora_cr.methods.base import method_of
from mslora_cr.models.load import load_base
from mslora_cr.routing.fit import router_statistics
from mslora_cr.runs.environment import check_hosts
from mslora_cr.runs.ledger import Ledger
from mslora_cr.runs.lock import one_writer
from mslora_cr.utils.files import replacing


def fit_router(config: StreamConfig, only: str | None = None) -> list[Path]:
    """Make what a router needs to know of every task, or of the one named, from its training records, and put it with
    the bank. For banks that were trained elsewhere. Returns the files.

    Raises:
        DataError, ModelError, ConfigError: something cannot be read. LockedError: another launch writes there.
    """
    start_processes(config)
    with one_writer(config.run_dir):
        return _fit_router(config, only)


def _fit_router(config: StreamConfig, only: str | None) -> list[Path]:
    tasks = [config.task(only)] if only else config.stream
    records = {task.name: training_records(config, task) for task in tasks}
    check_hosts(config.run_dir, {"the training records": {name: part.digest for name, part in records.items()}})
    base = load_base(config, get_device(config.model.device))
    ledger, paths = Ledger.read(config), []
    examples = method_of(config).router_examples(config)
    for task in tasks:
        statistics = router_statistics(config, task, records[task.name], base, examples)
        path = ledger.bank_folder(task.name) / STATISTICS
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                save_file(statistics.tensors(), partial)
            ledger.note_router(task)
        paths.append(path)
    barrier()
    return paths
