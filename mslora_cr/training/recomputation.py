"""Chooses the decoder layers whose activations are recomputed in the backward pass (gradient checkpointing).

Recomputing a layer repeats its forward pass and changes no number, so only as many are recomputed as memory requires:
the first ones, of a given number or of one found by measuring a step before the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mslora_cr.distributed.comm import all_gather_object, rank
from mslora_cr.distributed.deepspeed import free_memory

log = logging.getLogger(__name__)

Setting = bool | int | Literal["auto"]
"""`training.gradient_checkpointing`: all layers, none, the first so many, or as many as memory requires."""
USABLE = 0.92
"""The share of the device's memory to use: the allocator cannot fill every gap."""
RESERVED_BYTES = 12
"""Per trained number, for what the first measurement misses: AdamW's two moments and the penalty's gradient."""
STEPS_OF_RETREAT = 8
"""After this many failures, all layers are recomputed."""


class Memory(NamedTuple):
    """Bytes on one device."""

    peak: int
    """The peak of a forward and backward pass with every layer recomputed, in bytes."""
    layer: int
    """The bytes that one layer's stored activations add."""
    room: int
    """The bytes that this process can use in total."""


def layers_to_recompute(layers: int, memory: Memory, reserved: int) -> int:
    """Return the fewest layers, of so many, with which everything fits in addition to `reserved` bytes."""
    spare = memory.room - memory.peak - reserved
    return max(0, layers - max(0, spare // max(1, memory.layer)))


class Recomputation(TrainerCallback):
    """Makes the first `count` decoder layers recompute.

    transformers prepares the layers when training begins, if its own argument is true; this class says which of them.
    """

    def __init__(self, layers: Sequence[nn.Module], setting: Setting, least: int = 0) -> None:
        """
        Args:
            least: The fewest layers that `auto` recomputes, because memory ran out with fewer.
        """
        self._layers = list(layers)
        self.setting = setting
        self.layers = len(self._layers)
        self.undecided = setting == "auto"
        self._least = min(least, self.layers)
        everything = setting is True or setting == "auto"
        self.count = self.layers if everything else min(int(setting), self.layers)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.use(self.count)

    def use(self, count: int) -> None:
        """Recompute the first `count` layers from now on."""
        self.count = count
        for number, layer in enumerate(self._layers):
            layer.gradient_checkpointing = number < count  # type: ignore[assignment]

    def measure(
        self,
        device: torch.device,
        forward: Callable[[], AbstractContextManager[Tensor]],
        backward: Callable[[Tensor], object],
    ) -> Memory:
        """Measure the GPU memory of a forward and backward pass, changing no parameter and no random state.

        Args:
            device: The GPU.
            forward: Returns the loss of the largest batch; used inside the context.
            backward: Takes the loss, and returns or drops the gradients.
        """
        # The last layer's MLP sees few positions, so the layer before it stands for all.
        held, peak, everything = [], 0, self.layers
        for count in (max(0, everything - 2), everything - 1, everything):
            self.use(count)
            free_memory()
            torch.cuda.reset_peak_memory_stats(device)
            with torch.random.fork_rng([device]), forward() as loss:
                held.append(torch.cuda.memory_allocated(device))
                backward(loss)
            peak = torch.cuda.max_memory_allocated(device)
            del loss
        free_memory()
        free, _ = torch.cuda.mem_get_info(device)
        room = int(USABLE * (free + torch.cuda.memory_reserved(device)))
        return Memory(peak, held[0] - held[1], room)

    def decide(
        self,
        run: str,
        device: torch.device,
        forward: Callable[[], AbstractContextManager[Tensor]],
        backward: Callable[[Tensor], object],
        trained: int,
        apart: bool,
    ) -> None:
        """Choose, before the first step, how many layers to recompute: the same number on every rank.

        Args:
            run: Names the run in the log.
            apart: Whether no rank waits for another in these passes, so that one may fail by itself.

        Raises:
            torch.OutOfMemoryError: Not even the measurement fits, and the ranks are not apart.
        """
        self.undecided = False
        count, reason = 0, "only a GPU's memory is measured"
        if self._least:
            count, reason = self._least, "memory ran out with fewer"
        if device.type == "cuda" and self._least < self.layers:
            try:
                memory = self.measure(device, forward, backward)
                fewest = layers_to_recompute(self.layers, memory, RESERVED_BYTES * trained)
                layer, peak, room = (size / 1e9 for size in (memory.layer, memory.peak, memory.room))
                reason = f"{layer:.2f} GB for each layer that is stored, {peak:.1f} GB without any, {room:.1f} GB there"
            except torch.OutOfMemoryError:
                if not apart:
                    self.use(max(self.count, self.layers - 1))  # The next launch then measures nothing.
                    raise
                fewest, reason = self.layers, "memory ran out with fewer"
            free_memory()  # A failed pass releases its memory only after the `except`.
            count = max(count, fewest)
        self.use(max(all_gather_object(count)))
        if rank() == 0:
            chosen = f"the activations of {self.count} of {self.layers} decoder layers are recomputed"
            log.info("%s: %s: %s", run, chosen, reason)

    def retrying(self, parameters: Sequence[Tensor], micro_batch: Callable[[], Tensor]) -> Tensor:
        """Run a micro-batch; if memory runs out, run it again with more layers recomputed, with the same numbers.

        Only for a process on its own: others would wait for it in the middle of their backward pass.

        Raises:
            torch.OutOfMemoryError: The setting is not `auto`, or all layers are recomputed already.
        """
        if self.setting != "auto":
            return micro_batch()
        while True:
            random = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
            earlier = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                parameter.grad = None  # Half a backward pass must not be added to those of earlier micro-batches.
            try:
                loss = micro_batch()
                failed = False
            except torch.OutOfMemoryError:
                if self.count == self.layers:
                    raise
                failed = True
            for parameter, gradient in zip(parameters, earlier, strict=True):
                if failed:
                    parameter.grad = gradient
                elif gradient is not None:
                    assert parameter.grad is not None, "every micro-batch uses every matrix"
                    parameter.grad = gradient.add_(parameter.grad)
            if not failed:
                return loss
            # Only here, after the `except`, the failed pass has released its memory.
            free_memory()
            torch.set_rng_state(random[0])
            if random[1] is not None:
                torch.cuda.set_rng_state(random[1])
            more = -(-self.layers // STEPS_OF_RETREAT)
            self.use(min(self.layers, self.count + more))
            log.warning("memory ran out; the activations of %d decoder layers are recomputed from here on", self.count)
