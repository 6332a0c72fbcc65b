"""Forward and backward passes over a task's samples outside the Trainer's steps, for methods and measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.collator import in_batches
from mslora_cr.data.datasets import ConcatTrainDataset
from mslora_cr.data.input_processor import Collate
from mslora_cr.distributed.comm import all_reduce_sum, rank, world_size
from mslora_cr.losses.penalty import Key, Pair
from mslora_cr.models.base_model import inputs_on
from mslora_cr.models.sparse_mlp import SparseMLP
from mslora_cr.training.inputs import layer_inputs, loss_mask
from mslora_cr.utils.progress import progress_bar

Context = Callable[[], AbstractContextManager[Any]]


class Passes:
    """Passes over a task's training samples through the current model, frozen banks included; they change nothing.

    Call every method of this class on every rank; the result is the same for any number of processes.
    """

    def __init__(
        self,
        stack: BankStack,
        samples: ConcatTrainDataset,
        collator: Collate,
        seed: int,
        to_device: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        autocast: Context = nullcontext,
        sparse_mlp: SparseMLP | None = None,
        release: Callable[[], None] = lambda: None,
        unmerged: Sequence[Bank] = (),
    ) -> None:
        """
        Args:
            stack: The model, with the trainable bank on top.
            seed: Chooses the samples to use.
            to_device: Moves a batch to the model's device; by default that of its first parameter.
            autocast: The context of a forward pass.
            sparse_mlp: The last MLP, if it may skip positions without a label.
            release: Called after a pass; shards what the pass gathered.
            unmerged: Banks that the base's weights do not contain yet, but must in a pass.
        """
        self._stack, self._samples, self._collator, self._seed = stack, samples, collator, seed
        self._to_device = to_device or self._to_base
        self._autocast, self._sparse_mlp, self._release = autocast, sparse_mlp, release
        self._unmerged = unmerged

    @property
    def sample_counts(self) -> list[int]:
        """The number of samples of each of the method's `sources`."""
        return self._samples.counts

    def layer_inputs(self, samples: int, tokens: int) -> dict[str, Tensor]:
        """Return the inputs of each linear layer on the samples; see `training.inputs.layer_inputs`.

        Args:
            samples: The most samples to take.
            tokens: The most positions of each.

        Returns:
            By linear layer's name (in, samples · tokens), float32, on the CPU.
        """
        self._merge()

        def batch_of(index: int) -> dict[str, Tensor]:
            batch = self._batch([index])
            return {name: value for name, value in batch.items() if name != "labels"}

        with self._autocast():
            inputs = layer_inputs(self._stack.model, batch_of, len(self._samples), samples, tokens, self._seed)
        self._release()
        return inputs

    def mean_over_samples(self, of: Callable[[Tensor], Tensor], samples: int, label: str) -> dict[Key, Tensor]:
        """Return the mean of a function of single samples' gradients, on the CPU; ranks share the samples.

        Args:
            of: Maps a matrix's gradient of one sample's cross entropy, summed over its answer's tokens, to a tensor.
            samples: The most samples to take.
            label: The text of the progress bar.
        """
        chosen = self._chosen(samples)
        count, total = len(chosen), dict[Key, Tensor]()
        self._stack.model.eval()
        passes = range(0, count, world_size())
        for start in progress_bar(passes, desc=label, unit="sample", unit_scale=world_size(), disable=rank() != 0):
            mine = start + rank()
            # Every rank takes part in every pass, if necessary with a sample that does not count.
            with self.summed_loss([chosen[min(mine, count - 1)]]) as loss:
                gradients = self.gradients(loss)
            for key, gradient in gradients.items():
                total[key] = total.get(key, 0) + of(gradient) * (mine < count)
        return {key: all_reduce_sum(values / count).cpu() for key, values in total.items()}

    def gradients_at(self, bank: Mapping[str, Pair], samples: int) -> dict[Key, Tensor]:
        """Return the gradient of the mean cross entropy over answers' tokens at a bank, float32; the bank is not kept.

        Ranks do not share the samples: their sums would differ in rounding, and results derived from them much more.

        Args:
            bank: A and B by linear layer.
            samples: The most samples to take.
        """
        self._merge()
        pairs = self._stack.trainable()
        before = {name: (a.detach().cpu().clone(), b.detach().cpu().clone()) for name, (a, b) in pairs.items()}
        totals = {key: torch.zeros_like(matrix, dtype=torch.float32) for key, matrix in self._learning().items()}
        tokens = 0
        self._load(bank)
        self._stack.model.eval()
        for index in self._chosen(samples):
            with self._summed([index]) as (loss, count):
                for key, gradient in self.gradients(loss).items():
                    totals[key] += gradient
            tokens += count
        self._load(before)
        return {key: total / max(tokens, 1) for key, total in totals.items()}

    @torch.no_grad()
    def mean_loss(self, batch_size: int) -> float:
        """Return the cross entropy over the answers' tokens of all samples, averaged; ranks share the samples.

        Args:
            batch_size: Samples to compute at once.
        """
        batches = in_batches(range(len(self._samples)), batch_size)
        total = torch.zeros(2, dtype=torch.float64)
        self._stack.model.eval()
        for start in range(0, len(batches), world_size()):
            mine = start + rank()
            # Every rank takes part in every pass, if only with a batch that does not count.
            with self._summed(batches[min(mine, len(batches) - 1)]) as (loss, tokens):
                total += torch.tensor([loss.item(), tokens], dtype=torch.float64) * (mine < len(batches))
            self._release()
        loss_sum, count = all_reduce_sum(total).tolist()
        return loss_sum / max(count, 1)

    def weights(self) -> dict[str, Tensor]:
        """Return each linear layer's own weight, (out, in), with the banks merged into it."""
        self._merge()
        return self._stack.weights()

    @contextmanager
    def summed_loss(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Yield the cross entropy of samples, summed over their answers' tokens. Its backward pass belongs inside the
        block.
        """
        with self._summed(indices) as (loss, _):
            yield loss

    @contextmanager
    def _summed(self, indices: Sequence[int]) -> Iterator[tuple[Tensor, int]]:
        """Yield the summed cross entropy, and the number of tokens."""
        batch = self._batch(indices)
        keep, targets = loss_mask(batch.pop("labels"))
        with self._sparse_mlp.masked(keep) if self._sparse_mlp else nullcontext():
            with self._autocast():
                output = self._stack.model(**batch, logits_to_keep=keep, use_cache=False)
            yield nn.functional.cross_entropy(output.logits.float(), targets, reduction="sum"), len(targets)

    def gradients(self, loss: Tensor) -> dict[Key, Tensor]:
        """Return the gradients of the trained matrices, float32; no parameter keeps them."""
        learning = self._learning()
        gradients = torch.autograd.grad(loss, list(learning.values()))
        self._release()
        return {key: gradient.float() for key, gradient in zip(learning, gradients, strict=True)}

    def _learning(self) -> dict[Key, nn.Parameter]:
        pairs = self._stack.trainable().items()
        matrices = {(name, half): matrix for name, pair in pairs for half, matrix in enumerate(pair)}
        return {key: matrix for key, matrix in matrices.items() if matrix.requires_grad}

    def _chosen(self, samples: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed)
        return torch.randperm(len(self._samples), generator=generator)[:samples].tolist()

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        batch = self._to_device(self._collator([self._samples[index] for index in indices]))
        del batch["record_index"]
        return batch

    def _to_base(self, batch: dict[str, Any]) -> dict[str, Any]:
        return inputs_on(self._stack.base.device, batch)

    def _merge(self) -> None:
        if self._unmerged:
            self._stack.merge(self._unmerged)
        self._unmerged = ()

    def _load(self, bank: Mapping[str, Pair]) -> None:
        self._stack.load_trainable(Bank("probe", 1, 1.0, dict(bank)))
