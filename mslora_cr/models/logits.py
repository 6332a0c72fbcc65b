"""Gives every model the same forward pass: `logits_to_keep`, and the loss of the logits that are kept.

Most models of transformers compute `lm_head` only at the positions of `logits_to_keep`, and their loss with
`loss_function`, which takes shifted labels. Models that lack either get it here, so that no other code needs to ask.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether a model's own forward pass takes `logits_to_keep` and shifted labels."""
    forward = inspect.unwrap(type(model).forward)
    return "logits_to_keep" in inspect.signature(forward).parameters and "loss_function" in forward.__code__.co_names


def take_logits_to_keep(model: PreTrainedModel) -> None:
    """Let a model without them take `logits_to_keep`, `labels` and `shift_labels`.

    The instance's `forward` is replaced, since PEFT calls `forward` itself, past every hook.
    """
    if keeps_logits(model):
        return
    plain, head = model.forward, model.get_output_embeddings()

    @functools.wraps(plain)
    def forward(*args: Any, logits_to_keep: Tensor | int = 0, labels: Tensor | None = None, **options: Any) -> Any:
        of_loss = {name: options.pop(name) for name in ("shift_labels", "num_items_in_batch") if name in options}
        handle = head.register_forward_pre_hook(
            lambda _, inputs: (_last_positions(inputs[0], logits_to_keep), *inputs[1:])
        )
        try:
            output = plain(*args, **options)
        finally:
            handle.remove()
        if labels is not None:
            output["loss"] = ForCausalLMLoss(output.logits, labels, output.logits.shape[-1], **of_loss)
        return output

    signature, added = (
        inspect.signature(plain),
        inspect.signature(forward, follow_wrapped=False).parameters["logits_to_keep"],
    )
    parameters = [*signature.parameters.values(), *([] if added.name in signature.parameters else [added])]
    parameters.sort(key=lambda parameter: parameter.kind)
    vars(forward)["__signature__"] = signature.replace(parameters=parameters)
    model.forward = forward


def _last_positions(hidden: Tensor, keep: Tensor | int) -> Tensor:
    return hidden[:, -keep:] if isinstance(keep, int) and keep else hidden if isinstance(keep, int) else hidden[keep]
