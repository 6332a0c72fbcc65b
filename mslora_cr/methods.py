"""What sets the methods apart: which banks a task trains on top of, what it starts from, which banks answer."""

from __future__ import annotations

from dataclasses import dataclass

from mslora_cr.config import MethodName


@dataclass(frozen=True)
class Method:
    """A way to learn a stream. Tasks and stages count from 1."""

    folds_earlier: bool
    """Earlier banks take part, frozen, while a task trains."""
    continues: bool
    """A task's bank starts as a copy of the one before it."""
    penalties: bool
    """The contrastive and the orthogonality term shape a bank."""

    def banks(self, task: int, stage: int, banks_by: str) -> list[int]:
        """The banks that answer a task at a stage.

        `prefix` takes, as published, the banks up to the task's own where they are learned by that stage; `all` takes
        every bank that the stage has.
        """
        if self.continues:
            return [stage]
        if not self.folds_earlier:
            return [task] if task <= stage else []
        return list(range(1, (min(task, stage) if banks_by == "prefix" else stage) + 1))


METHODS: dict[MethodName, Method] = {
    "mslora_cr": Method(folds_earlier=True, continues=False, penalties=True),
    "each": Method(folds_earlier=False, continues=False, penalties=False),
    "sequential": Method(folds_earlier=False, continues=True, penalties=False),
}
