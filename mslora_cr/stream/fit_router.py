"""Router statistics for banks that were trained elsewhere, from records or from the statistics of several sites."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from mslora_cr.banks.bank import BankError
from mslora_cr.banks.io import STATISTICS
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.data.tasks import training_records
from mslora_cr.distributed.comm import barrier, get_device, rank
from mslora_cr.methods.base import method_of
from mslora_cr.models.load import base_digest, load_base
from mslora_cr.routing.fit import router_statistics
from mslora_cr.routing.lda import TaskStatistics, combine, load_statistics
from mslora_cr.runs.environment import check_hosts
from mslora_cr.runs.ledger import Ledger
from mslora_cr.runs.lock import launch, one_writer
from mslora_cr.stream.import_export import check_base
from mslora_cr.utils.files import replacing


def fit_router(config: StreamConfig, only: str | None = None) -> list[Path]:
    """Compute router statistics of every task, or of the one named, from its training records, and store them with the
    bank.

    Use it for banks that were trained elsewhere. Returns the files.

    Raises:
        DataError, ModelError, ConfigError: Something cannot be read.
        LockedError: Another launch writes to the run folder.
    """
    with launch(config, config.run_dir):
        tasks = [config.task(only)] if only else config.stream
        records = {task.name: training_records(config, task) for task in tasks}
        check_hosts(config.run_dir, {"the training records": {name: part.digest for name, part in records.items()}})
        base = load_base(config, get_device(config.model.device))
        ledger, paths = Ledger.read(config), []
        examples = method_of(config).router_examples(config)
        for task in tasks:
            statistics = router_statistics(config, task, records[task.name], base, examples)
            paths.append(_save(ledger, task, statistics))
        barrier()
        return paths


def combine_router(config: StreamConfig, name: str, folders: Sequence[Path]) -> Path:
    """Combine the router statistics that several sites keep of one task, and store them with the run's bank.

    Args:
        folders: The task's bank folder of each site (with `router.safetensors` in it), or a site's run folder.

    Returns:
        The file that was written.

    Raises:
        BankError: A site has no statistics, or its bank was trained on another base model.
        ConfigError: The run has no such task.
        LockedError: Another launch writes to the run folder.
    """
    task = config.task(name)
    paths = [folder / "banks" / name if (folder / "banks" / name).is_dir() else folder for folder in folders]
    for path in paths:
        check_base({name: path}, config, base_digest(config))
    sites = [load_statistics(path) for path in paths]
    try:
        statistics = combine(sites)
    except ValueError as error:
        raise BankError(f"{name}: {error}; every site must use the same base model") from None
    with one_writer(config.run_dir):
        return _save(Ledger.read(config), task, statistics)


def _save(ledger: Ledger, task: Task, statistics: TaskStatistics) -> Path:
    """Store a task's statistics with its bank; the first rank writes."""
    path = ledger.bank_folder(task.name) / STATISTICS
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(statistics.tensors(), partial)
        ledger.note_router(task)
    return path
