"""Decoding steps in buffers at fixed addresses, so that CUDA can record one as a graph and replay it.

A step of a large model is thousands of kernel launches, which take longer than the arithmetic of a few rows. A recorded
step is launched at once (Ng, "Accelerating PyTorch with CUDA Graphs", 2021). Shapes are rounded up, so that few are
recorded; real rows never see the unused part of a buffer. Recording takes about as long as three steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from mslora_cr.data.collator import rounded_up
from mslora_cr.generation.attention import SharedCache
from mslora_cr.generation.decode_state import Rows

_LOG = logging.getLogger(__name__)

POSITIONS = 64
"""On a GPU, numbers of positions are rounded up to a multiple of this."""

Step = Callable[[Rows], None]
"""Computes one new token for each row, in place."""


@dataclass(frozen=True)
class Shape:
    """The size of a batch's buffers."""

    rows: int
    openings: int
    members: int
    """The most rows of an opening."""
    before: int
    """Positions of openings."""
    suffix: int
    """Positions of a row's suffix."""

    @classmethod
    def of(cls, rows: Rows) -> Shape:
        openings, members = rows.cache.members.shape
        return cls(len(rows.ids), openings, members, rows.before, rows.suffix)

    def rounded(self) -> Shape:
        """Rounded up to powers of two, and positions to multiples of `POSITIONS`."""
        rows, openings, members = (1 << (size - 1).bit_length() for size in (self.rows, self.openings, self.members))
        before, suffix = (rounded_up(size, POSITIONS) for size in (self.before, self.suffix))
        return Shape(rows, openings, members, before, suffix)

    def holds(self, other: Shape) -> bool:
        return all(ours >= theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True))


class StaticRows:
    """Buffers for batches of up to some shape, and a step in them."""

    def __init__(self, shape: Shape, like: Rows) -> None:
        """
        Args:
            like: A batch of the model; the buffers take its dtypes, heads and device.
        """
        self.shape = shape
        cache = like.cache
        device = like.ids.device

        def indices(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.long, device=device)

        self.rows = Rows(
            ids=indices(shape.rows, 1),
            scores=torch.zeros(shape.rows, 1, device=device),
            positions=indices(shape.rows, 1),
            visible=torch.zeros(shape.rows, shape.before + shape.suffix, dtype=torch.bool, device=device),
            cache=SharedCache(
                [
                    (
                        keys.new_zeros(shape.openings, keys.shape[1], shape.before, keys.shape[3]),
                        values.new_zeros(shape.openings, values.shape[1], shape.before, values.shape[3]),
                    )
                    for keys, values in cache.openings
                ],
                [
                    (
                        keys.new_zeros(shape.rows, keys.shape[1], shape.suffix, keys.shape[3]),
                        values.new_zeros(shape.rows, values.shape[1], shape.suffix, values.shape[3]),
                    )
                    for keys, values in cache.suffixes
                ],
                indices(shape.rows),
                indices(shape.rows),
                indices(shape.openings, shape.members),
                indices(1),
            ),
        )
        self._graph: torch.cuda.CUDAGraph | None = None

    def record(self, step: Step) -> None:
        """Record a step as a CUDA graph. Call it before anything is loaded, since it runs in the buffers.

        Raises:
            RuntimeError: CUDA cannot record the step, or replaying it gives other tokens.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # Libraries initialise themselves in the first steps, which a graph must not record.
        with torch.cuda.stream(side):
            expected = self.after_two(lambda: step(self.rows))
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (collectives, data loaders) may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step(self.rows)
        if not torch.equal(self.after_two(graph.replay), expected):
            raise RuntimeError("the model keeps something of a step outside its tensors")
        self._graph = graph

    def after_two(self, step: Callable[[], None]) -> Tensor:
        """Return each row's token and position, (rows, 2), after two steps in empty buffers."""
        for state in (self.rows.ids, self.rows.positions, self.rows.visible, self.rows.cache.slots):
            state.zero_()
        for _ in range(2):
            step()
        return torch.cat([self.rows.ids, self.rows.positions], dim=1)

    def load(self, rows: Rows) -> None:
        """Copy a batch into the buffers. Values that earlier batches left beside it are finite and invisible."""
        ours, theirs = self.rows.cache, rows.cache
        count, (openings, members) = len(rows.ids), theirs.members.shape
        start = self.shape.before - rows.before
        for buffer, tensor in (
            (self.rows.ids, rows.ids),
            (self.rows.scores, rows.scores),
            (self.rows.positions, rows.positions),
            (ours.group, theirs.group),
            (ours.index_in_group, theirs.index_in_group),
        ):
            buffer.zero_()
            buffer[:count] = tensor
        self.rows.visible.zero_()
        self.rows.visible[:count, start : self.shape.before + rows.suffix] = rows.visible
        ours.members.zero_()
        ours.members[:openings, :members] = theirs.members
        ours.slots.copy_(theirs.slots)
        for buffers, tensors in zip(ours.openings, theirs.openings, strict=True):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer[:openings, :, start:] = tensor
        for buffers, tensors in zip(ours.suffixes, theirs.suffixes, strict=True):
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer[:count, :, : rows.suffix] = tensor

    def step(self, step: Step) -> None:
        """Replay the recorded step, or compute it if none is recorded."""
        if self._graph is not None:
            self._graph.replay()
        else:
            step(self.rows)


class StaticSteps:
    """The buffers in use: one shape at a time, and only while enough batches wait to pay for recording."""

    BATCHES = 2
    """The fewest batches that are worth recording a step for."""

    def __init__(self, record: bool) -> None:
        """
        Args:
            record: Record steps as CUDA graphs; otherwise only the buffers are used.
        """
        self.recording = record
        self.replayed = 0
        """The number of batches that a recorded step answered."""
        self._works = True
        self._static: StaticRows | None = None

    def for_rows(self, rows: Rows, step: Step, waiting: int, choose: Callable[[int], None]) -> StaticRows | None:
        """Return the buffers for a batch, not yet loaded; None if the batch is answered without them.

        Args:
            step: The step to record.
            waiting: The number of batches still to be answered, this one included.
            choose: Called with the number of rows of a step.
        """
        shape = Shape.of(rows)
        if self._static is None or not self._static.shape.holds(shape):
            if not self._works or waiting < self.BATCHES:
                return None
            self._static = None  # Free the old buffers' memory first.
            buffers = StaticRows(shape.rounded(), rows)
            choose(buffers.shape.rows)
            if self.recording and not self._recorded(buffers, step):
                return None
            self._static = buffers
        choose(self._static.shape.rows)
        self.replayed += self.recording
        return self._static

    def _recorded(self, buffers: StaticRows, step: Step) -> bool:
        try:
            buffers.record(step)
        except RuntimeError as error:  # A graph cannot record such a layer.
            _LOG.warning("answers are given step by step, since CUDA cannot record one: %s", error)
            self._works = False
        return self._works


def padded(questions: Sequence[int], rows: int) -> list[int]:
    """Return questions padded to a larger number of rows."""
    return [*questions, *[questions[0]] * (rows - len(questions))]
