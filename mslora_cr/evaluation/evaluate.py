"""Answer and score tasks at stages of a run: the diagonal as published, or the whole task × stage matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.datasets import EvalDataset, Preprocessing
from mslora_cr.data.records import TestRecords
from mslora_cr.distributed.comm import barrier, get_device, rank
from mslora_cr.evaluation.cells import Cell, Stages, cells
from mslora_cr.evaluation.files import ANSWERS
from mslora_cr.evaluation.generate import answer_once, answer_questions, fingerprint_of
from mslora_cr.evaluation.metrics import Scores
from mslora_cr.evaluation.results import EVALUATION
from mslora_cr.evaluation.results import Cell as Row
from mslora_cr.evaluation.score import score_file
from mslora_cr.evaluation.summary import cell_row, decoding, fingerprint_fields, question_digests, write_summary
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.runs.lock import one_writer
from mslora_cr.runs.session import (
    CachedTower,
    cached_tower,
    check_hosts,
    load_base,
    preprocessing,
    start_processes,
    task_folder,
    task_image_roots,
)


def evaluate(
    config: StreamConfig,
    stages: Stages = "own",
    only: str | None = None,
    banks: Mapping[str, Bank] | None = None,
) -> Path:
    """Answer and score every learned task, or only the one named; returns the path of `evaluation.json`.

    Args:
        banks: the banks by task, where they do not come from the run folder's ledger.

    Raises:
        ConfigError, DataError, ModelError, BankError, LockedError: before anything is answered.
    """
    if config.evaluation.banks_by == "routed":
        raise ConfigError("evaluation.banks_by is routed, which evaluate_routed answers")
    start_processes(config)
    with one_writer(config.results_run_dir):
        return _evaluate(config, stages, only, banks)


def _evaluate(config: StreamConfig, stages: Stages, only: str | None, banks: Mapping[str, Bank] | None) -> Path:
    chain = dict(banks) if banks is not None else finished_banks(config)
    learned = [task.index + 1 for task in config.stream if task.name in chain]
    wanted = [cell for cell in cells(config, stages, learned) if only in (None, cell.task.name)]
    if only is not None:
        config.task(only)
    if not learned and not wanted:
        raise BankError(f"no task of this run is trained yet in {config.run_dir}; train one first")
    if not wanted:
        raise BankError(f"the banks in {config.run_dir} do not reach the stages asked for ({stages}); train the rest")
    by_number = {task.index + 1: chain[task.name] for task in config.stream if task.name in chain}
    names = {task.name for task in config.stream if task in [cell.task for cell in wanted]}
    records = {name: TestRecords(task_folder(config, config.task(name)) / "test.jsonl") for name in sorted(names)}
    switches = len({cell.banks for cell in wanted}) > 1
    session, questions = _Session(config, by_number, switches), question_digests(config, records)
    fingerprints = {
        cell.place: session.fingerprint(cell.banks, questions.get(cell.task.name))
        for cell in cells(config, "all", learned)
    }
    facts = {
        f"the questions, banks or settings of {cell.task.name} at stage {cell.stage}": fingerprints[cell.place]
        for cell in wanted
    }
    check_hosts(config.results_run_dir, facts)
    # Cells that the same banks answer are adjacent, so that a stage is merged once.
    rows = {
        cell.place: session.answer(cell, records[cell.task.name], fingerprints[cell.place])
        for cell in _by_banks(wanted)
    }
    path = config.results_run_dir / EVALUATION
    if rank() == 0:
        possible = {place: [fingerprint] for place, fingerprint in fingerprints.items()}
        write_summary(config, path, [row for cell in wanted if (row := rows[cell.place])], possible)
    barrier()
    return path


def _by_banks(wanted: Sequence[Cell]) -> list[Cell]:
    return sorted(wanted, key=lambda cell: cell.banks)


class _Session:
    """The base model, loaded when the first question needs it, with the banks that take part now."""

    def __init__(self, config: StreamConfig, banks: Mapping[int, Bank], switches: bool) -> None:
        """
        Args:
            switches: several sets of banks answer, one after another; the base's weights are kept for that.
        """
        self.config, self.banks, self.switches = config, banks, switches
        self._fingerprint_fields = fingerprint_fields(config)
        self._loaded: tuple[BankStack, Preprocessing, CachedTower | None] | None = None
        self._folded: tuple[int, ...] | None = None
        self._scored: dict[Path, Scores] = {}

    def answer(self, cell: Cell, records: TestRecords, fingerprint: str) -> Row | None:
        """Answer and score a cell, unless that was done before; on the first rank its row of `evaluation.json`."""
        stamp = answer_once(cell.folder, fingerprint, len(records), lambda: self._answer(cell, records, fingerprint))
        if rank() != 0:
            return None
        if cell.folder not in self._scored:  # a folder may hold several stages' cells
            self._scored[cell.folder] = score_file(cell.folder / ANSWERS, cell.folder, records)
        names = [self.banks[number].name for number in cell.banks]
        scores, root = self._scored[cell.folder], self.config.results_run_dir
        return cell_row(cell.task, cell.stage, names, cell.folder, root, stamp, records, scores)

    def _answer(self, cell: Cell, records: TestRecords, fingerprint: str) -> dict[str, float]:
        stack, prepare, tower = self._model()
        if self._folded != cell.banks:
            stack.set_frozen([self.banks[number] for number in cell.banks])
            stack.model.eval()
            self._folded = cell.banks
        roots = task_image_roots(self.config, cell.task)
        if tower is not None:
            tower.fill(prepare.image_paths(records, roots), decoding(self.config).workers)
        samples = EvalDataset(records, roots, prepare)
        label = f"{cell.task.name} with {'+'.join(self.banks[number].name for number in cell.banks) or 'no bank'}"
        return answer_questions(stack.model, samples, cell.folder, decoding(self.config), fingerprint, label)

    def _model(self) -> tuple[BankStack, Preprocessing, CachedTower | None]:
        if self._loaded is None:
            base = load_base(self.config, get_device(self.config.model.device))
            tower = cached_tower(self.config, base)
            stack = BankStack(base.model, self.config.lora.fold, reuse=self.switches)
            self._loaded = (stack, preprocessing(self.config, base, tower), tower)
        return self._loaded

    def fingerprint(self, banks: Sequence[int], questions: str | None) -> str:
        """What decides a cell's answers; of questions that are not there, it is no answer's fingerprint."""
        return fingerprint_of(
            {
                **self._fingerprint_fields,
                "banks": [self.banks[number].digest for number in banks],
                "scalings": [self.banks[number].scaling for number in banks],
                "questions": questions,
                "fold": self.config.lora.fold,
            }
        )
