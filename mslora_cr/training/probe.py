"""A method's view of a task before training: inputs of the layers, and gradients of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.datasets import ConcatTrainDataset
from mslora_cr.data.input_processor import Collate
from mslora_cr.losses.penalty import Key, Pair
from mslora_cr.training.inputs import layer_inputs, loss_mask


class StartProbe:
    """Passes of a task's samples through the model before it trains, where the model is: under ZeRO-3, on the CPU.

    Frozen banks take part. To be used on every rank.
    """

    def __init__(
        self, stack: BankStack, samples: ConcatTrainDataset, collator: Collate, seed: int, unmerged: Sequence[Bank]
    ) -> None:
        """
        Args:
            stack: with the trainable bank on top.
            seed: chooses the samples that are looked at.
            unmerged: banks that the base's weights do not hold yet, and must for a pass.
        """
        self._stack, self._samples, self._collator, self._seed = stack, samples, collator, seed
        self._unmerged = unmerged

    def inputs(self, samples: int, tokens: int) -> dict[str, Tensor]:
        """Each linear layer's inputs, as `training.inputs.layer_inputs` has them."""

        def batch_of(index: int) -> dict[str, Tensor]:
            return {name: value for name, value in self._batch(index).items() if name != "labels"}

        self._merge()
        return layer_inputs(self._stack.model, batch_of, len(self._samples), samples, tokens, self._seed)

    def gradients(self, bank: Mapping[str, Pair], samples: int) -> dict[Key, Tensor]:
        """The gradient of the mean cross entropy over answer tokens, float32, at a bank, which is then forgotten.

        Ranks do not share the samples: their sums would differ in rounding, and what is made from them much more.

        Args:
            bank: A and B by linear layer.
            samples: how many to take at most.
        """
        self._merge()
        pairs = self._stack.trainable()
        before = {name: (a.detach().cpu().clone(), b.detach().cpu().clone()) for name, (a, b) in pairs.items()}
        parameters = {(name, half): matrix for name, pair in pairs.items() for half, matrix in enumerate(pair)}
        totals = {key: torch.zeros_like(matrix, dtype=torch.float32) for key, matrix in parameters.items()}
        generator = torch.Generator().manual_seed(self._seed)
        chosen, tokens = torch.randperm(len(self._samples), generator=generator)[:samples].tolist(), 0
        self._load(bank)
        self._stack.model.eval()
        for index in chosen:
            batch = self._batch(index)
            keep, targets = loss_mask(batch.pop("labels"))
            logits = self._stack.model(**batch, logits_to_keep=keep, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            for total, gradient in zip(
                totals.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
            ):
                total += gradient
            tokens += len(targets)
        self._load(before)
        return {key: total / max(tokens, 1) for key, total in totals.items()}

    def weights(self) -> dict[str, Tensor]:
        """Each linear layer's own weight, (out, in), with what is merged into it."""
        self._merge()
        return self._stack.weights()

    def _merge(self) -> None:
        if self._unmerged:
            self._stack.merge(self._unmerged)
        self._unmerged = []

    def _batch(self, index: int) -> dict[str, Tensor]:
        batch = self._collator([self._samples[index]])
        del batch["record_index"]
        return {name: value.to(self._stack.base.device) for name, value in batch.items()}

    def _load(self, bank: Mapping[str, Pair]) -> None:
        self._stack.load_trainable(Bank("probe", 1, 1.0, dict(bank)))
