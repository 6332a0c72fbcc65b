"""What a run left on disk, read for its report: evaluation, ledger, logs, banks, answers."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from mslora_cr.data.records import first_problem
from mslora_cr.errors import UserError
from mslora_cr.evaluation.intervals import SAMPLES, Scores, interval, resampled_means
from mslora_cr.evaluation.matrix import TaskStageMatrix
from mslora_cr.evaluation.metrics import score_answers
from mslora_cr.evaluation.score import SCORES, AnswerRecord, read_answers, read_scores

PUBLISHED_SCORES = Path(__file__).with_name("published_scores.yaml")
ROUTED, ROUTING = "routed", "routing.json"
"""Where answers without the task being told go in a results folder, and what the router did there."""
ANALYSIS = "analysis.json"
BANK_WEIGHTS = "adapter_model.safetensors"
"""`banks.WEIGHTS`, named again: to import that loads PEFT and transformers, which triples a report's start."""


class ReportError(UserError):
    """There is nothing to report, or a file of the run cannot be read; the message names it."""


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Cell(_Read):
    """A task's answers at a stage: who answered, where the answers are, and their metrics in percent.

    `intervals` has the ends of each metric's bootstrap interval, `questions` the digest of the file asked from,
    `seconds` how long the last launch answered.
    """

    task: str
    stage: int
    banks: tuple[str, ...]
    answers: str
    questions: str
    rows: int
    seconds: float
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class MatrixIntervals(NamedTuple):
    """Bootstrap intervals of what is read off a task × stage matrix: its figures by name, what each task lost, and the
    average over the tasks learned by each stage."""

    figures: dict[str, tuple[float, float]]
    lost: dict[str, tuple[float, float]]
    stages: dict[int, tuple[float, float]]


class Evaluation(_Read):
    """`evaluation.json` of a results folder."""

    run: str
    method: str
    banks_by: str
    tasks: tuple[str, ...]
    modalities: dict[str, str]
    published: dict[str, str | None]
    stages: tuple[int, ...]
    cells: tuple[Cell, ...]
    environment: dict[str, Any]

    def matrix(self, metric: str) -> TaskStageMatrix | None:
        """The task × stage matrix of a metric, over the evaluated tasks that have it; None without such."""
        scores = {(cell.task, cell.stage): cell.metrics[metric] for cell in self.cells if metric in cell.metrics}
        tasks = tuple(task for task in self.tasks if any(task == known for known, _ in scores))
        return TaskStageMatrix(self.tasks, tasks, scores) if tasks else None

    def own_cell(self, task: str) -> Cell | None:
        """A task's cell at its own stage."""
        own = self.tasks.index(task) + 1
        return next((cell for cell in self.cells if (cell.task, cell.stage) == (task, own)), None)

    def last_cell(self, task: str) -> Cell | None:
        """A task's cell after the last stage."""
        return next((cell for cell in self.cells if (cell.task, cell.stage) == (task, len(self.tasks))), None)

    def bank_numbers(self, cell: Cell) -> str:
        """Who answered: `1–3` or `2, 5`, the places of banks in the stream; `none` for the base alone; names if they
        are others."""
        if not set(cell.banks) <= set(self.tasks):
            return ", ".join(cell.banks)
        places = sorted(self.tasks.index(bank) + 1 for bank in cell.banks)
        if len(places) > 1 and places == list(range(places[0], places[-1] + 1)):
            return f"{places[0]}–{places[-1]}"
        return ", ".join(map(str, places)) or "none"

    def scores(self, results_dir: Path, *metrics: str) -> list[dict[tuple[str, int], Scores]]:
        """For each metric, by task and stage, the scores in [0, 1] of the questions that have it, in their order.

        Raises:
            DataError: the scores of a cell are gone.
        """
        places = {(cell.task, cell.stage): (results_dir / cell.answers).with_name(SCORES) for cell in self.cells}
        columns = {place: read_scores(place)[1] for place in set(places.values())}
        found = []
        for metric in metrics:
            known = {place: own[metric][~np.isnan(own[metric])] for place, own in columns.items() if own}
            found.append({key: known[place] for key, place in places.items() if len(known.get(place, ()))})
        return found

    def matrix_intervals(self, results_dir: Path, metric: str) -> MatrixIntervals:
        """The bootstrap intervals of what the metric's matrix gives, where that is known.

        Questions are resampled within each task, the same ones at all its stages; tasks stay as they are.

        Raises:
            ReportError: a task has scores of more questions at one stage than at another.
            DataError: the scores of a cell are gone.
        """
        matrix = self.matrix(metric)
        if matrix is None:
            return MatrixIntervals({}, {}, {})
        figures = [name for name, value in matrix.summary().items() if value is not None]
        lost = matrix.lost()
        stages = [stage for stage, _ in matrix.stage_averages()]
        [scores] = self.scores(results_dir, metric)
        redrawn = self._redrawn(matrix, scores)
        return MatrixIntervals(
            figures={name: interval([getattr(drawn, name)() for drawn in redrawn]) for name in figures},
            lost={task: interval([drawn.forgetting_of(task) for drawn in redrawn]) for task in lost},
            stages={stage: interval([drawn.stage_average(stage) for drawn in redrawn]) for stage in stages},
        )

    def _redrawn(self, matrix: TaskStageMatrix, scores: Mapping[tuple[str, int], Scores]) -> list[TaskStageMatrix]:
        """This matrix recomputed from resampled questions, `SAMPLES` times."""
        drawn: dict[tuple[str, int], Scores] = {}
        for number, task in enumerate(matrix.tasks):
            own = {key: column for key, column in scores.items() if key[0] == task}
            counts = {stage: len(column) for (_, stage), column in own.items()}
            if len(set(counts.values())) > 1:
                told = ", ".join(f"{count} at stage {stage}" for stage, count in counts.items())
                raise ReportError(
                    f"{task} has scores of different questions ({told}); evaluate it again at all these stages"
                )
            means = resampled_means(np.column_stack(list(own.values())), stream=number)
            drawn |= dict(zip(own, 100 * means.T, strict=True))
        return [
            TaskStageMatrix(matrix.stream, matrix.tasks, {key: float(means[sample]) for key, means in drawn.items()})
            for sample in range(SAMPLES)
        ]

    def same_banks_since_learned(self) -> bool:
        """Whether every task is answered by the same banks at all its evaluated stages from its own on.

        False if no task has several such stages. Frozen banks then give the same answers at all those stages,
        and there can be no forgetting.
        """
        since: dict[str, list[tuple[str, ...]]] = {task: [] for task in self.tasks}
        for cell in self.cells:
            if cell.stage > self.tasks.index(cell.task):
                since[cell.task].append(cell.banks)
        several = any(len(banks) > 1 for banks in since.values())
        return several and all(len(set(banks)) <= 1 for banks in since.values())


class StageRouting(_Read):
    """What the router took the questions for after a stage.

    Attributes:
        learned: the tasks it knows. confusion: by a question's task, how many were taken for each of `learned`.
        questions: how many are of learned tasks. accuracy: how many of those it knew, in percent.
    """

    stage: int
    learned: tuple[str, ...]
    confusion: dict[str, tuple[int, ...]]
    questions: int
    accuracy: float | None
    interval: tuple[float, float] | None


class Routing(_Read):
    """`routing.json` of a results folder."""

    stages: tuple[StageRouting, ...]


class TaskEntry(_Read):
    """A finished task in the ledger. How an imported bank was trained is not known: no loss, no steps, no seconds."""

    digest: str
    steps: int
    train_loss: float | None
    seconds: float
    finished: str


class RunLedger(_Read):
    """`ledger.json` of a run folder."""

    run: str
    method: str
    config_digest: str
    versions: dict[str, str]
    git: dict[str, Any] | None
    hardware: dict[str, Any]
    tasks: dict[str, TaskEntry]

    @property
    def seconds(self) -> float:
        """What training all tasks took."""
        return sum(entry.seconds for entry in self.tasks.values())


class PublishedRun(_Read):
    """Published scores of a run by task: `exact`, `closed`, `f1`, in percent, where the task has them.

    `method` is the name that its method has here.
    """

    run: str
    method: str
    title: str
    scores: dict[str, dict[str, float]]


class Example(NamedTuple):
    """An answered question, and whether the answer counts as a hit."""

    question: str
    answer: str
    truth: str
    hit: bool


class Similarity(NamedTuple):
    """``values[t][i]``: how alike banks t and i are, in (0, 1]; symmetric, 1 on the diagonal."""

    banks: tuple[str, ...]
    values: list[list[float]]


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a run; `missing` says in words what is not there.

    Attributes:
        results_dir: where it was read from. tasks: names in stream order.
        modalities: by task; empty if the run is not evaluated.
        logs: by task, one mapping for each logged step.
        config: the text of `config.yaml`, or None.
    """

    name: str
    method: str
    results_dir: Path
    tasks: tuple[str, ...]
    modalities: dict[str, str]
    evaluation: Evaluation | None
    routing: Routing | None
    analysis: dict[str, Any] | None
    ledger: RunLedger | None
    logs: dict[str, list[dict[str, float]]]
    similarity: Similarity | None
    examples: dict[str, list[Example]]
    config: str | None
    missing: list[str]


def read_run(run_dir: Path, results_dir: Path) -> RunRecord:
    """Read whatever a run left in its run folder and its results folder.

    Raises:
        ReportError: neither a ledger nor an evaluation exists, or a file is malformed.
        DataError: an answer file is malformed.
    """
    evaluation, ledger = read_evaluation(results_dir), read_ledger(run_dir)
    known = evaluation or ledger
    if known is None:
        raise ReportError(
            f"nothing to report: no {run_dir / 'ledger.json'} and no {results_dir / 'evaluation.json'}; "
            "train the run first, then evaluate it"
        )
    tasks = tuple(known.tasks)
    logs = {task: read_log(path) for task in tasks if (path := run_dir / "logs" / f"{task}.jsonl").is_file()}
    banks = {task: path for task in tasks if (path := run_dir / "banks" / task / BANK_WEIGHTS).is_file()}
    answers = _answer_files(evaluation, results_dir) if evaluation else {}
    config = run_dir / "config.yaml"
    return RunRecord(
        name=known.run,
        method=known.method,
        results_dir=results_dir,
        tasks=tasks,
        modalities=evaluation.modalities if evaluation else {},
        evaluation=evaluation,
        routing=_load(results_dir / ROUTED / ROUTING, Routing),
        analysis=_read_analysis(results_dir / ANALYSIS),
        ledger=ledger,
        logs=logs,
        similarity=bank_similarity(banks) if len(banks) > 1 else None,
        examples={task: pick_examples(read_answers(path)) for task, path in answers.items()},
        config=config.read_text(encoding="utf-8") if config.is_file() else None,
        missing=_missing(tasks, evaluation, ledger, logs, banks, answers),
    )


def read_evaluation(results_dir: Path) -> Evaluation | None:
    """`evaluation.json`, or None if the run is not evaluated.

    Raises:
        ReportError: it is malformed.
    """
    return _load(results_dir / "evaluation.json", Evaluation)


def required_evaluation(results_dir: Path) -> Evaluation:
    """`evaluation.json`.

    Raises:
        ReportError: the run is not evaluated, or it is malformed.
    """
    evaluation = read_evaluation(results_dir)
    if evaluation is None:
        raise ReportError(f"there is no {results_dir / 'evaluation.json'}; evaluate that run first")
    return evaluation


def read_ledger(run_dir: Path) -> RunLedger | None:
    """`ledger.json`, or None if nothing was trained.

    Raises:
        ReportError: it is malformed.
    """
    return _load(run_dir / "ledger.json", RunLedger)


def read_log(path: Path) -> list[dict[str, float]]:
    """The logged steps of a task in order; of a step that a resumed run logged again, the later one counts.

    A last line that is cut off, as a killed run leaves it, is passed over.

    Raises:
        ReportError: another line is not a JSON object with a step; the message names file and line.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    steps: dict[int, dict[str, float]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            steps[entry["step"]] = entry
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                continue
            raise ReportError(f"{path}: line {number}: expected a JSON object with a 'step'") from None
    return [steps[step] for step in sorted(steps)]


def bank_similarity(weights: Mapping[str, Path]) -> Similarity:
    """``s_ti = (1/K) Σ_k exp(-‖W_t^k - W_i^k‖_F)`` for every two banks t, i.

    The K matrices W^k of a bank are A and B of each layer. Matrices are read one by one, so that banks of any
    size fit. Source: Zhang et al., "Contrastive Regularization over LoRA for Multimodal Biomedical Image
    Incremental Learning", ACM MM 2025.

    Raises:
        ReportError: a bank cannot be read, or the banks do not hold the same matrices.
    """
    try:
        files = {name: safe_open(path, framework="pt") for name, path in weights.items()}
    except (OSError, SafetensorError) as error:
        raise ReportError(f"a bank cannot be read: {error}") from None
    shapes = {name: _shapes(file) for name, file in files.items()}
    first = next(iter(shapes.values()))
    for name, own in shapes.items():
        if own != first:
            raise ReportError(
                f"{weights[name]} does not hold matrices of the same names and shapes as the first bank's"
            )
    total = torch.zeros(len(files), len(files), dtype=torch.float64)
    for key in first:
        stacked = torch.stack([file.get_tensor(key).double().flatten() for file in files.values()])
        total += torch.exp(-torch.cdist(stacked, stacked, compute_mode="donot_use_mm_for_euclid_dist"))
    return Similarity(tuple(weights), (total / len(first)).tolist())


def _shapes(file: safe_open) -> dict[str, list[int]]:
    """Of A and B of each layer; a mixture's routers are left out."""
    keys = file.keys()
    return {key: file.get_slice(key).get_shape() for key in keys if not key.endswith(".lora_router.weight")}


def load_published_scores(path: Path = PUBLISHED_SCORES) -> dict[str, PublishedRun]:
    """The published runs by kind: `each`, `mslora_cr_ortho`, `mslora_cr_ortho_6task`."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {kind: PublishedRun.model_validate(run) for kind, run in content.items()}


Model = TypeVar("Model", bound=_Read)


def _load(path: Path, model: type[Model]) -> Model | None:
    if not path.is_file():
        return None
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ReportError(f"{path}: {first_problem(error)}") from None


def _read_analysis(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}); `mslora-cr analyze` rewrites it") from None


def _answer_files(evaluation: Evaluation, results_dir: Path) -> dict[str, Path]:
    """The answers of each task at its own stage, where they are still there."""
    cells = {task: cell for task in evaluation.tasks if (cell := evaluation.own_cell(task))}
    paths = {task: results_dir / cell.answers for task, cell in cells.items()}
    return {task: path for task, path in paths.items() if path.is_file()}


def pick_examples(answers: Sequence[AnswerRecord], of_each: int = 2) -> list[Example]:
    """Up to `of_each` right and as many wrong answers, the same at every call, right ones first."""
    found: dict[bool, list[Example]] = {True: [], False: []}
    for answer in random.Random(0).sample(answers, len(answers)):
        if all(len(examples) == of_each for examples in found.values()):
            break
        hit = score_answers([answer]).rows[0].hit
        if len(found[hit]) < of_each:
            found[hit].append(Example(answer.prompt, str(answer.text), str(answer.gt), hit))
    return found[True] + found[False]


def _missing(
    tasks: Sequence[str],
    evaluation: Evaluation | None,
    ledger: RunLedger | None,
    logs: Mapping[str, Any],
    banks: Mapping[str, Any],
    answers: Mapping[str, Any],
) -> list[str]:
    missing = []
    if ledger is None:
        missing.append("no ledger.json in the run folder: what made the banks is not known")
    if evaluation is None:
        missing.append("the run is not evaluated yet: no scores, no answers")
    parts = {"training log": logs, "bank": banks} | ({"answers at the own stage": answers} if evaluation else {})
    for kind, present in parts.items():
        absent = [task for task in tasks if task not in present]
        missing += [f"no {kind} of {', '.join(absent)}"] if absent else []
    return missing
