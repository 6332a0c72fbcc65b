"""Fused kernels for the language model's small operations: RMSNorm, rotary positions, SwiGLU.

Liger Kernel (Hsu et al., 2024) does in one pass over the activations what PyTorch does in several. Its cross entropy
and its LLaVA stay off: only labelled positions reach `lm_head` here.
"""

from __future__ import annotations

from typing import Literal

from transformers import LlavaForConditionalGeneration
from transformers.models.mistral import modeling_mistral

from mslora_cr.models.layout import ModelError

_TORCH_ROTATION = modeling_mistral.apply_rotary_pos_emb
_TORCH_MODULES = {name: vars(modeling_mistral)[name] for name in ("MistralRMSNorm", "MistralMLP")}


def use_kernels(model: LlavaForConditionalGeneration, kernels: Literal["liger", "torch"]) -> None:
    """Let a model compute with these kernels, from now on.

    The rotation is the process's: the model that was given last decides it.

    Raises:
        ModelError: the language model is of a kind that has none here.
        ModuleNotFoundError: Liger is not installed.
    """
    modeling_mistral.apply_rotary_pos_emb = _TORCH_ROTATION
    if kernels == "torch":
        return
    kind = model.config.text_config.model_type
    if kind != "mistral":
        raise ModelError(f"model.kernels: liger is for a Mistral language model, and this is {kind}; set it to torch")
    from liger_kernel.transformers import apply_liger_kernel_to_mistral

    apply_liger_kernel_to_mistral(
        rope=True,
        rms_norm=True,
        swiglu=True,
        cross_entropy=False,
        fused_linear_cross_entropy=False,
        model=model.model.language_model,
    )
    for name, module in _TORCH_MODULES.items():  # models that are built later start as PyTorch's
        setattr(modeling_mistral, name, module)
