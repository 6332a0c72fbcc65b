"""The task × stage matrix of a stream, and what continual learning reads off it.

``R[i,k]`` is the score of task i after stage k, in percent: the model that has learned the first k tasks of
the stream. Stages and tasks count from 1, so task i is learned at stage i; T is the last stage, and stage 0 is
the base model without a bank (zero shot). The averages run over the N tasks that have the score at all (an
open-ended task has no closed accuracy), which need not be all T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from mslora_cr.utils.errors import UserError


class MissingCellError(UserError):
    """A figure needs a cell of the task × stage matrix that was not evaluated."""


@dataclass(frozen=True)
class TaskStageMatrix:
    """Scores of the tasks of a stream after its stages; cells may be missing.

    Attributes:
        stream: the names of all T tasks in the order in which they are learned.
        tasks: the names of the N tasks that have the score, at least one, in the same order.
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
        """The stage that learns a task."""
        return self.stream.index(task) + 1

    def cell(self, task: str, stage: int) -> float:
        """``R[task, stage]``.

        Raises:
            MissingCellError: it was not evaluated.
        """
        if (task, stage) not in self.scores:
            stages = "seen" if stage >= self.learned_at(task) else "all"
            raise MissingCellError(
                f"task {task!r} was not evaluated at stage {stage}; evaluate with `--stages {stages}`"
            )
        return self.scores[task, stage]

    def own_stage_average(self) -> float:
        """``(1/N) Σ_i R[i,i]``: every task scored at its own stage, in percent.

        This is all that the published evaluation measures.

        Raises:
            MissingCellError: a task was not evaluated at its own stage.
        """
        return fmean(self.cell(task, self.learned_at(task)) for task in self.tasks)

    def final_average(self) -> float:
        """``(1/N) Σ_i R[i,T]``: the mean score after the last stage, in percent.

        Source: ACC of Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.

        Raises:
            MissingCellError: a task was not evaluated at the last stage.
        """
        return fmean(self.cell(task, self.last) for task in self.tasks)

    def stage_average(self, stage: int) -> float:
        """``A_k = mean_{i<=k} R[i,k]``: the mean score over the tasks learned by stage k, in percent.

        Raises:
            MissingCellError: a learned task was not evaluated at this stage.
            ValueError: no task that has the score is learned yet.
        """
        learned = [task for task in self.tasks if self.learned_at(task) <= stage]
        if not learned:
            raise ValueError(f"no task that has this score is learned by stage {stage}")
        return fmean(self.cell(task, stage) for task in learned)

    def stage_averages(self) -> list[tuple[int, float]]:
        """(k, A_k) for the stages k, from the first task that has the score on, whose cells are all there."""
        stages = range(self.learned_at(self.tasks[0]), self.last + 1)
        averages = ((stage, _or_none(partial(self.stage_average, stage))) for stage in stages)
        return [(stage, average) for stage, average in averages if average is not None]

    def average_incremental_accuracy(self) -> float:
        """``mean_k A_k``: the mean over the stages of `stage_average`, in percent.

        Stages before the first task that has the score are left out. Source: Rebuffi et al., "iCaRL:
        Incremental Classifier and Representation Learning", CVPR 2017.

        Raises:
            MissingCellError: a task was not evaluated at its own or a later stage.
        """
        stages = range(self.learned_at(self.tasks[0]), self.last + 1)
        return fmean(self.stage_average(stage) for stage in stages)

    def forgetting_of(self, task: str) -> float:
        """``f_i = max_{i<=k<T} R[i,k] - R[i,T]``: what a task lost since it was known best, in points.

        Negative if the task ends better than it ever was before; 0 for the task learned last. Source:
        Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018; their maximum also covers the
        stages before the task was learned, where there is nothing to forget yet.

        Raises:
            MissingCellError: the task was not evaluated at its own or a later stage.
        """
        earlier = range(self.learned_at(task), self.last)
        if not earlier:
            return 0.0
        return max(self.cell(task, stage) for stage in earlier) - self.cell(task, self.last)

    def lost(self) -> dict[str, float]:
        """`forgetting_of` each task before the last stage whose cells are all there."""
        found = {task: _or_none(partial(self.forgetting_of, task)) for task in self._before_last()}
        return {task: value for task, value in found.items() if value is not None}

    def forgetting(self) -> float:
        """The mean of `forgetting_of` over the tasks before the last stage, in points; 0 if there are none.

        Source and raises: as `forgetting_of`.
        """
        return _mean_or_zero([self.forgetting_of(task) for task in self._before_last()])

    def backward_transfer(self) -> float:
        """The mean of ``R[i,T] - R[i,i]`` over the tasks before the last stage, in points; 0 without such.

        Negative if later tasks harmed earlier ones. Source: Lopez-Paz and Ranzato, NeurIPS 2017.

        Raises:
            MissingCellError: a task was not evaluated at its own or at the last stage.
        """
        return _mean_or_zero(
            [self.cell(task, self.last) - self.cell(task, self.learned_at(task)) for task in self._before_last()]
        )

    def forward_transfer(self) -> float:
        """The mean of ``R[i,i-1] - R[i,0]`` over the tasks after the first stage, in points; 0 without such.

        What the stages before a task do for it, against zero shot. Source: Lopez-Paz and Ranzato, NeurIPS 2017,
        whose b_i, here R[i,0], is the score of a model initialised at random.

        Raises:
            MissingCellError: a task was not evaluated at the stage before its own, or at stage 0.
        """
        later = [task for task in self.tasks if self.learned_at(task) > 1]
        return _mean_or_zero([self.cell(task, self.learned_at(task) - 1) - self.cell(task, 0) for task in later])

    def summary(self) -> dict[str, float | None]:
        """Every figure by name; None where a cell is missing."""
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

    def _before_last(self) -> list[str]:
        return [task for task in self.tasks if self.learned_at(task) < self.last]


def _or_none(figure: Callable[[], float]) -> float | None:
    try:
        return figure()
    except MissingCellError:
        return None


def _mean_or_zero(values: list[float]) -> float:
    return fmean(values) if values else 0.0
