"""A tuning: trials of a configuration on validation questions, chosen task by task or over other streams.

The causal protocol (the default) never looks ahead. Values for the whole stream are chosen on its first tasks and fixed
from then on (Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019). Values of a later task are chosen
on that task's own validation questions when it is learned. With `--seeds`, whole streams are trained instead, of seeds
and orders that are not reported.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna import Study
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from mslora_cr.config.load import load_config
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.distributed.pool import output_into, spare_imports, worker_pool
from mslora_cr.evaluation.evaluate import evaluate
from mslora_cr.evaluation.results import required_evaluation
from mslora_cr.evaluation.routed import evaluate_routed
from mslora_cr.evaluation.schemas import ROUTED
from mslora_cr.methods.base import method_of
from mslora_cr.runs.lock import LockedError, one_writer
from mslora_cr.stream.orders import task_orders
from mslora_cr.stream.train import train
from mslora_cr.tuning.space import PER_TASK, Space
from mslora_cr.tuning.validation_root import SHARE, make_validation_root, with_own_files
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import write_text
from mslora_cr.utils.logs import set_up
from mslora_cr.utils.progress import progress_bar

log = logging.getLogger(__name__)

FOLDER = "tune"
"""The folder of a tuning in the run folder; the run itself is not touched."""
JOURNAL = "journal.log"
BEST = "best.yaml"
METRIC = "exact match score"


@dataclass(frozen=True)
class Plan:
    """The settings of a tuning.

    Attributes:
        config_file: The configuration that is tuned.
        overrides: Overrides of every trial.
        space: The values to try.
        trials: The budget of each study: the number of finished or pruned trials.
        first: The number of tasks on which the values of the whole stream are chosen.
        seeds: Seeds of whole streams; if there are any, they replace the causal protocol.
        orders: The number of task orders of those streams.
        metric: The name in `metrics.json` of the metric to maximise.
        share: The share of the training records for validation, if a data set has no `val.jsonl`.
        reported: The number of a sweep's first task orders that are reported; `orders` are the ones behind them.
    """

    config_file: Path
    overrides: tuple[str, ...]
    space: Space
    trials: int
    first: int = 2
    seeds: tuple[int, ...] = ()
    orders: int = 1
    metric: str = METRIC
    share: float = SHARE
    reported: int = 1

    @property
    def config(self) -> StreamConfig:
        return load_config(self.config_file, self.overrides)

    @property
    def folder(self) -> Path:
        return self.config.run_dir / FOLDER

    @property
    def tuned_orders(self) -> tuple[tuple[str, ...], ...]:
        """The task orders of whole streams."""
        names = [task.name for task in self.config.tasks]
        return tuple(task_orders(names, self.reported + self.orders)[self.reported :])


@dataclass(frozen=True)
class StudyPart:
    """One study of a tuning.

    Attributes:
        name: Its name in the journal.
        tasks: The tasks of the trials' streams, in order.
        scored: The number of last tasks whose mean validation score is maximised.
        keys: The keys that are tried.
        fixed: Overrides from earlier studies.
        learned: A run folder whose tasks are learned already; None starts from the base model.
        seeds: Each trial is the mean over these; empty means the configuration's own seed.
    """

    name: str
    tasks: tuple[tuple[str, ...], ...]
    scored: int
    keys: tuple[str, ...]
    fixed: tuple[str, ...]
    learned: Path | None = None
    seeds: tuple[int, ...] = ()


def tune(plan: Plan, devices: Sequence[str | None]) -> Path:
    """Run every trial that the budget still has, and write the best configuration.

    Args:
        plan: What to do. The same plan resumes a tuning that was stopped.
        devices: As `pool.devices` gives them; so many trials run at once.

    Returns:
        The file of the best configuration.

    Raises:
        ConfigError: The space has a key that the configuration does not, there are fewer tasks than `first`, or the
            method learns all tasks at once and there are no seeds.
        DataError: A task has no validation questions.
        UserError: Every trial of a study failed.
        LockedError: Another tuning writes there.
    """
    config = plan.config
    if not plan.seeds and method_of(config).all_at_once:
        raise ConfigError(f"method {config.method} learns all tasks at once, later ones too; tune it with --seeds")
    if not plan.seeds and len(config.tasks) < plan.first:
        raise ConfigError(f"--first {plan.first}: the stream has {len(config.tasks)} tasks")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with one_writer(plan.folder):
        make_validation_root(config, plan.folder / "data", plan.share)
        chosen = _streams(plan, devices) if plan.seeds else _causal(plan, devices)
    return _write_best(plan, chosen)


def studies(folder: Path) -> dict[str, list[FrozenTrial]]:
    """Return the trials of a tuning, by study."""
    storage = _storage(folder)
    return {study.study_name: storage.get_all_trials(study._study_id) for study in storage.get_all_studies()}


def best_trial(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the best finished trial; the earliest of equal ones."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return max(finished, key=lambda trial: (trial.value, -trial.number), default=None)


def _causal(plan: Plan, devices: Sequence[str | None]) -> dict[str, Any]:
    """Choose the stream's values on its first tasks, then each later task's values on that task."""
    names = [task.name for task in plan.config.tasks]
    everything = (*plan.space.stream, *(PER_TASK + key for key in plan.space.task))
    part = StudyPart("first", (tuple(names[: plan.first]),), plan.first, everything, ())
    best = _optimize(plan, part, devices)
    chosen = {key: value for key, value in best.params.items() if not key.startswith(PER_TASK)}
    for name in names[: plan.first]:
        chosen |= {_of_task(key, name): best.params[key] for key in best.params if key.startswith(PER_TASK)}
    trained = _trial_folder(plan, part, best)
    for number in range(plan.first, len(names) if plan.space.task else plan.first):
        name, fixed = names[number], tuple(f"{key}={value}" for key, value in chosen.items())
        keys = tuple(PER_TASK + key for key in plan.space.task)
        part = StudyPart(f"{number + 1}-{name}", (tuple(names[: number + 1]),), 1, keys, fixed, trained)
        best = _optimize(plan, part, devices)
        chosen |= {_of_task(key, name): value for key, value in best.params.items()}
        trained = _trial_folder(plan, part, best)
    return chosen


def _streams(plan: Plan, devices: Sequence[str | None]) -> dict[str, Any]:
    """Choose all values over whole streams of other seeds and orders."""
    part = StudyPart(
        "streams", plan.tuned_orders, len(plan.config.tasks), tuple(plan.space.distributions), (), seeds=plan.seeds
    )
    return dict(_optimize(plan, part, devices).params)


def _optimize(plan: Plan, part: StudyPart, devices: Sequence[str | None]) -> FrozenTrial:
    """Run the remaining budget of a study in parallel, and return the best trial."""
    storage = _storage(plan.folder)
    study = optuna.create_study(storage=storage, study_name=part.name, direction="maximize", load_if_exists=True)
    requeue_killed(study)
    done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in study.get_trials())
    with (
        worker_pool(devices) as pool,
        progress_bar(desc=part.name, total=plan.trials, initial=done, unit="trial") as bar,
    ):
        waiting = [pool.submit(_run_trial, plan, part, number) for number in range(done, plan.trials)]
        for future in as_completed(waiting):
            if error := future.result():
                log.warning("%s: a trial failed: %s", part.name, error)
            bar.update()
    best = best_trial(study.get_trials())
    if best is None:
        raise UserError(f"{part.name}: no trial finished; see the logs in {plan.folder / part.name}")
    return best


def requeue_killed(study: Study) -> None:
    """Put the values of trials that a killed launch left behind first in the queue; their folders resume."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params)


def ask(plan: Plan, part: StudyPart, number: int) -> tuple[Study, Trial]:
    """Draw the values of a trial. Its number in the budget is the seed: workers that begin at once draw different
    values, and one worker draws the same values in any number of launches."""
    study = optuna.load_study(
        storage=_storage(plan.folder),
        study_name=part.name,
        sampler=optuna.samplers.TPESampler(seed=number),
        pruner=optuna.pruners.MedianPruner(5, 1),
    )
    return study, study.ask({key: plan.space.distributions[key] for key in part.keys})


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for another worker that tries the same values; this one then finds everything done."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(one_writer(folder))
                break
            except LockedError:
                time.sleep(1)
        yield


def _run_trial(plan: Plan, part: StudyPart, number: int) -> str | None:
    """Run one trial in a worker; return the error, if any."""
    set_up()
    spare_imports()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study, trial = ask(plan, part, number)
    folder = _trial_folder(plan, part, trial)
    with _one_at_a_time(folder), output_into(folder / "trial.log"):
        try:
            score = _score(plan, part, trial)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        except Exception as error:  # One bad choice of values must not end the others.
            study.tell(trial, state=TrialState.FAIL)
            return str(error)
        else:
            study.tell(trial, score)
    return None


def _score(plan: Plan, part: StudyPart, trial: Trial) -> float:
    """Train a trial's streams task by task; the mean validation score of the tasks that count."""
    scores, step = [], 0
    for number, order in enumerate(part.tasks):
        for seed in part.seeds or (None,):
            config = _trial_config(plan, part, trial, order, number, seed)
            if part.learned is not None and not config.run_dir.exists():
                shutil.copytree(part.learned / "stream-0", config.run_dir)
            trained = {task.name for task in method_of(config).trained(config)}
            for name in order[-part.scored :]:
                if name in trained:
                    train(config, only=(name,))
                scores.append(_validation_score(config, name, plan.metric))
                trial.report(sum(scores) / len(scores), step)
                step += 1
                if trial.should_prune():
                    raise optuna.TrialPruned
            if part.scored > 1:  # Score what all tasks retain at the end, rather than what each reached.
                scores[-part.scored :] = [_validation_score(config, name, plan.metric, last=True) for name in order]
    return sum(scores) / len(scores)


def _validation_score(config: StreamConfig, task: str, metric: str, last: bool = False) -> float:
    """Return a task's score on its validation questions, in percent: at its own stage, or after the last."""
    if config.evaluation.banks_by == "routed":
        evaluate_routed(config, "seen")
        folder = config.results_run_dir / ROUTED
    else:
        evaluate(config, "final" if last else "own", None if last else task)
        folder = config.results_run_dir
    evaluation = required_evaluation(folder)
    cell = evaluation.last_cell(task) if last else evaluation.own_cell(task)
    if cell is None or metric not in cell.metrics:
        there = ", ".join(cell.metrics) if cell else "none"
        raise UserError(f"{task} has no {metric!r} on its validation questions; there are {there}")
    return cell.metrics[metric]


def _trial_config(
    plan: Plan, part: StudyPart, trial: Trial, order: Sequence[str], number: int, seed: int | None
) -> StreamConfig:
    folder = _trial_folder(plan, part, trial)
    name = f"stream-{number}" if seed is None else f"stream-{number}-seed{seed}"
    newest = order[-1]
    values = [
        f"{_of_task(key, newest) if part.learned is not None and key.startswith(PER_TASK) else key}={value}"
        for key, value in trial.params.items()
    ]
    folders = [f"run={name}", f"output_dir={folder}", f"results_dir={folder / 'results'}"]
    of_seed = [] if seed is None else [f"seed={seed}"]
    root = f"data.root={plan.folder / 'data'}"
    tasks = f"tasks=[{','.join(order)}]"
    fixed = [item for item in part.fixed if not item.startswith("tasks.") or item.split(".")[1] in order]
    trial_config = load_config(plan.config_file, [*plan.overrides, tasks, *fixed, *values, *folders, *of_seed, root])
    return with_own_files(trial_config)


def _trial_folder(plan: Plan, part: StudyPart, trial: Trial | FrozenTrial) -> Path:
    """Return the folder of a trial, named after its values, so that a killed trial resumes."""
    values = "-".join(str(value).replace("/", "_") for _, value in sorted(trial.params.items()))
    return plan.folder / part.name / values[:150]


def _write_best(plan: Plan, chosen: Mapping[str, Any]) -> Path:
    """Write the chosen values as a complete configuration, from which training needs nothing else."""
    overrides = [*plan.overrides, *(f"{key}={value}" for key, value in chosen.items())]
    config = load_config(plan.config_file, overrides)
    content = config.model_dump(mode="json")
    content["run"] = f"{config.run}-tuned"
    protocol = f"causal, first {plan.first}"
    if plan.seeds:
        orders = "; ".join(" → ".join(order) for order in plan.tuned_orders)
        protocol = f"seeds {', '.join(map(str, plan.seeds))} and orders {orders}: report others"
    header = (
        f"# Chosen by `mslora-cr tune` on validation questions ({plan.metric}; {protocol}; "
        f"{plan.trials} trials a study).\n"
    )
    path = plan.folder / BEST
    write_text(path, header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return path


def _of_task(key: str, task: str) -> str:
    return f"tasks.{task}.{key.removeprefix(PER_TASK)}"


def _storage(folder: Path) -> JournalStorage:
    folder.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
