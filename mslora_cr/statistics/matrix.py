"""The task × stage matrix of a stream, and the figures of continual learning computed from it.

``R[i,k]`` is the score of task i after stage k, in percent: the model that has learned the first k tasks of the stream.
Stages and tasks count from 1, so task i is learned at stage i; T is the last stage, and stage 0 is the base model
without a bank (zero shot). Averages run over the N tasks that have the score, which may be fewer than T: an open-ended
task has no closed accuracy. Every figure but forgetting is a weighted sum of cells, and intervals are computed from its
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum
from statistics import fmean

from mslora_cr.utils.errors import UserError

Weights = Mapping[tuple[str, int], float]
"""Weights of cells, by task and stage."""


class MissingCellError(UserError):
    """A figure needs a cell of the task × stage matrix that was not evaluated."""


@dataclass(frozen=True)
class TaskStageMatrix:
    """Scores of the tasks of a stream after its stages; cells may be missing.

    Attributes:
        stream: The names of all T tasks in the order in which they are learned.
        tasks: The names of the N tasks that have the score, at least one, in the same order.
        scores: R, in percent, by task name and stage (0..T).

    Raises:
        ValueError: `tasks` is empty or not a subsequence of `stream`, or a score is outside the matrix.
    """

    stream: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: Mapping[tuple[str, int], float]

    def __post_init__(self) -> None:
        if not self.tasks or tuple(task for task in self.stream if task in self.tasks) != self.tasks:
            raise ValueError(f"tasks {self.tasks} must be some of the stream {self.stream}, in its order")
        for task, stage in self.scores:
            if task not in self.tasks or not 0 <= stage <= self.last:
                raise ValueError(f"score of task {task!r} at stage {stage} is outside the matrix")

    @property
    def last(self) -> int:
        """T, the last stage."""
        return len(self.stream)

    def learned_at(self, task: str) -> int:
        """Return the stage that learns a task."""
        return self.stream.index(task) + 1

    def cell(self, task: str, stage: int) -> float:
        """Return ``R[task, stage]``.

        Raises:
            MissingCellError: It was not evaluated.
        """
        if (task, stage) not in self.scores:
            stages = "seen" if stage >= self.learned_at(task) else "all"
            raise MissingCellError(
                f"task {task!r} was not evaluated at stage {stage}; evaluate with `--stages {stages}`"
            )
        return self.scores[task, stage]

    def own_stage_average(self) -> float:
        """Return ``(1/N) Σ_i R[i,i]``: every task scored at its own stage, in percent.

        This is all that the published evaluation measures.

        Raises:
            MissingCellError: A task was not evaluated at its own stage.
        """
        return self._sum(self.own_stage_weights())

    def own_stage_weights(self) -> Weights:
        return {(task, self.learned_at(task)): 1 / len(self.tasks) for task in self.tasks}

    def final_average(self) -> float:
        """Return ``(1/N) Σ_i R[i,T]``: the mean score after the last stage, in percent.

        Source: ACC of Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.

        Raises:
            MissingCellError: A task was not evaluated at the last stage.
        """
        return self._sum(self.stage_weights(self.last))

    def stage_average(self, stage: int) -> float:
        """Return ``A_k = mean_{i<=k} R[i,k]``: the mean score over the tasks learned by stage k, in percent.

        Raises:
            MissingCellError: A learned task was not evaluated at this stage.
            ValueError: No task that has the score is learned yet.
        """
        return self._sum(self.stage_weights(stage))

    def stage_weights(self, stage: int) -> Weights:
        learned = [task for task in self.tasks if self.learned_at(task) <= stage]
        if not learned:
            raise ValueError(f"no task that has this score is learned by stage {stage}")
        return {(task, stage): 1 / len(learned) for task in learned}

    def stage_averages(self) -> list[tuple[int, float]]:
        """Return (k, A_k) for the stages k that have all their cells, from the first task that has the score."""
        averages = ((stage, _or_none(partial(self.stage_average, stage))) for stage in self._stages())
        return [(stage, average) for stage, average in averages if average is not None]

    def average_incremental_accuracy(self) -> float:
        """Return ``mean_k A_k``: the mean over the stages of `stage_average`, in percent.

        Stages before the first task that has the score are left out. Source: Rebuffi et al., "iCaRL:
        Incremental Classifier and Representation Learning", CVPR 2017.

        Raises:
            MissingCellError: A task was not evaluated at its own or a later stage.
        """
        return self._sum(self.incremental_weights())

    def incremental_weights(self) -> Weights:
        stages = self._stages()
        return {cell: weight / len(stages) for stage in stages for cell, weight in self.stage_weights(stage).items()}

    def forgetting_of(self, task: str) -> float:
        """Return ``f_i = max_{i<=k<T} R[i,k] - R[i,T]``: what a task lost since its best stage, in points.

        It is negative if the task ends better than at any stage before, and 0 for the task learned last. Source:
        Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018. Their maximum also covers the stages
        before the task was learned, when there is nothing to forget yet.

        Raises:
            MissingCellError: The task was not evaluated at its own or a later stage.
        """
        earlier = range(self.learned_at(task), self.last)
        if not earlier:
            return 0.0
        return max(self.cell(task, stage) for stage in earlier) - self.cell(task, self.last)

    def life_of(self, task: str) -> tuple[float | None, float | None, float | None, float | None]:
        """Return the score of a task at the stage before its own, at its own and after the last, and what it forgot
        (`forgetting_of`); None where a cell is missing."""
        stage_of_task = self.learned_at(task)
        before, learned, last = (
            self.scores.get((task, stage)) for stage in (stage_of_task - 1, stage_of_task, self.last)
        )
        return before, learned, last, _or_none(partial(self.forgetting_of, task))

    def forgetting(self) -> float:
        """Return the mean of `forgetting_of` over the tasks before the last stage, in points; 0 if there are none.

        It has no interval: the maximum of noisy scores lies above the true one, and more so with more stages and fewer
        questions; a bootstrap repeats that bias. For inference use `backward_transfer`. Source and errors: as
        `forgetting_of`.
        """
        lost = [self.forgetting_of(task) for task in self._before_last()]
        return fmean(lost) if lost else 0.0

    def backward_transfer(self) -> float:
        """Return the mean of ``R[i,T] - R[i,i]`` over the tasks before the last stage, in points; 0 if there are none.

        It is negative if later tasks harmed earlier ones. Source: Lopez-Paz and Ranzato, NeurIPS 2017.

        Raises:
            MissingCellError: A task was not evaluated at its own or at the last stage.
        """
        return self._sum(self.backward_weights(self._before_last()))

    def backward_weights(self, tasks: Sequence[str]) -> Weights:
        """Return the weights of the backward transfer of some tasks before the last stage."""
        gained = {(task, self.last): 1 / len(tasks) for task in tasks}
        return gained | {(task, self.learned_at(task)): -1 / len(tasks) for task in tasks}

    def transfer(self) -> dict[str, float]:
        """Return ``R[i,T] - R[i,i]`` in points, of each task before the last stage that has both cells."""
        changes = {task: _or_none(partial(self._sum, self.backward_weights([task]))) for task in self._before_last()}
        return {task: value for task, value in changes.items() if value is not None}

    def forward_transfer(self) -> float:
        """Return the mean of ``R[i,i-1] - R[i,0]`` over the tasks after the first stage, in points; 0 if there are
        none.

        It measures how much the stages before a task help it, compared with zero shot. Source: Lopez-Paz and Ranzato,
        NeurIPS 2017, whose b_i, here R[i,0], is the score of a model initialised at random.

        Raises:
            MissingCellError: A task was not evaluated at the stage before its own, or at stage 0.
        """
        return self._sum(self.forward_weights())

    def forward_weights(self) -> Weights:
        later = [task for task in self.tasks if self.learned_at(task) > 1]
        gained = {(task, self.learned_at(task) - 1): 1 / len(later) for task in later}
        return gained | {(task, 0): -1 / len(later) for task in later}

    def linear(self) -> dict[str, Weights]:
        """Return the weights by name of every figure of `summary` except forgetting, which is a maximum, no sum."""
        return {
            "own_stage_average": self.own_stage_weights(),
            "final_average": self.stage_weights(self.last),
            "average_incremental_accuracy": self.incremental_weights(),
            "backward_transfer": self.backward_weights(self._before_last()),
            "forward_transfer": self.forward_weights(),
        }

    def summary(self) -> dict[str, float | None]:
        """Return every figure by name; None where a cell is missing."""
        return {
            figure.__name__: _or_none(figure)
            for figure in (
                self.own_stage_average,
                self.final_average,
                self.average_incremental_accuracy,
                self.forgetting,
                self.backward_transfer,
                self.forward_transfer,
            )
        }

    def _sum(self, weights: Weights) -> float:
        return fsum(weight * self.cell(*cell) for cell, weight in weights.items())

    def _stages(self) -> range:
        return range(self.learned_at(self.tasks[0]), self.last + 1)

    def _before_last(self) -> list[str]:
        return [task for task in self.tasks if self.learned_at(task) < self.last]


def _or_none(figure: Callable[[], float]) -> float | None:
    try:
        return figure()
    except MissingCellError:
        return None
