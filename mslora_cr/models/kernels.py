"""Fused kernels for the language model's small operations: RMSNorm, rotary positions, SwiGLU.

Liger Kernel (Hsu et al., 2024) makes one pass over the activations where PyTorch makes several. Its cross entropy and
its LLaVA stay off, because only labelled positions reach `lm_head` here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.models.mistral import modeling_mistral
from transformers.models.mistral.modeling_mistral import MistralAttention

from mslora_cr.models.layout import ModelError

_TORCH = {name: vars(modeling_mistral)[name] for name in ("MistralRMSNorm", "MistralMLP")}


def use_kernels(model: PreTrainedModel, kernels: Literal["liger", "torch"]) -> None:
    """Let a newly loaded model compute with these kernels; other models of the process are not affected.

    Raises:
        ModelError: Liger has no kernels for this kind of language model.
        ModuleNotFoundError: Liger is not installed.
    """
    if kernels == "torch":
        return
    kind = model.config.get_text_config().model_type
    if kind != "mistral":
        raise ModelError(f"model.kernels: liger supports Mistral language models, and this is {kind}; set it to torch")
    # It warns about each backend for other hardware that it could not import.
    logging.getLogger("liger_kernel.backends.registry").setLevel(logging.ERROR)
    from liger_kernel.transformers import apply_liger_kernel_to_mistral, liger_rotary_pos_emb

    apply_liger_kernel_to_mistral(
        rope=False,  # Otherwise it would be replaced in the whole process.
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model.get_decoder(),
    )
    for name, module in _TORCH.items():  # Models that are built later start with PyTorch's.
        setattr(modeling_mistral, name, module)
    rotating = _with_rotation(liger_rotary_pos_emb)
    for layer in model.get_decoder().layers:
        layer.self_attn.__class__ = rotating


def _with_rotation(rotate: Callable[..., Any]) -> type[MistralAttention]:
    """Return Mistral's attention with a `forward` that finds another rotation function than the module's."""
    forward = MistralAttention.forward
    ours = FunctionType(
        forward.__code__,
        {**forward.__globals__, modeling_mistral.apply_rotary_pos_emb.__name__: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(MistralAttention.__name__, (MistralAttention,), {"forward": ours})
