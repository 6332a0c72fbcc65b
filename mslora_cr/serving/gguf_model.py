"""Writes a base model and LoRA adapters as GGUF files in llama.cpp's layout.

Names of tensors are those of the `gguf` package. llama.cpp rotates the two halves of a Llama head's queries and keys
interleaved, so their rows are permuted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mslora_cr.banks.bank import Bank
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.language import language_model
from mslora_cr.models.layout import ModelError
from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.models.processor_base import end_ids
from mslora_cr.models.transformers_layout import portable_processor
from mslora_cr.serving.gguf_vocabulary import write_vocabulary

if TYPE_CHECKING:
    from gguf import GGUFWriter

Tensors = Iterable[tuple[str, Tensor]]
ARCHITECTURES = {"llava": "llama", "qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl"}
"""transformers' types → llama.cpp's architectures of their text models."""
_TEXTS = ("llama", "mistral", "qwen2_vl_text", "qwen2_5_vl_text")
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def check_layout(model: Any) -> None:
    """Refuse a model whose layout in llama.cpp is not written here.

    Raises:
        ModelError: It is another family, or has another text model or other rotary positions.
    """
    kind, text = model.config.model_type, model.config.get_text_config()
    if kind not in ARCHITECTURES or text.model_type not in _TEXTS:
        raise ModelError(
            f"--format gguf writes LLaVA with a Llama or Mistral text model, Qwen2-VL and Qwen2.5-VL, and this base is "
            f"{kind} with {text.model_type}; export with --format merged, and convert with llama.cpp's own script"
        )
    rope = text.rope_parameters.get("rope_type", "default")
    if rope != "default":
        raise ModelError(f"--format gguf writes plain rotary positions, and this base scales them ({rope})")


def write_text_model(base: BaseModel, name: str, path: Path) -> None:
    """Write the language model, its tokenizer and chat template.

    Raises:
        ModelError: llama.cpp has no name for its tokenizer.
    """
    from gguf import GGUFWriter, LlamaFileType

    model: Any = base.model
    text = model.config.get_text_config()
    writer = GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    writer.add_name(name)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    for describe in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        describe(size)
    if sections := text.rope_parameters.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, 0])
    kind = "ALL_F32" if model.dtype == torch.float32 else f"MOSTLY_{_TYPES[model.dtype]}"
    writer.add_file_type(LlamaFileType[kind])
    write_vocabulary(writer, *_spoken(base, text.vocab_size))
    write_tensors(writer, lambda: _text_tensors(model))


def _spoken(base: BaseModel, rows: int) -> tuple[Any, int, tuple[int, ...], str | None]:
    """Return what `write_vocabulary` takes."""
    if isinstance(base, LlavaMed):
        processor: Any = portable_processor(base)
        template = _with_marked_images(processor.chat_template)
        return processor.tokenizer, rows, (base.tokenizer.eos_token_id,), template
    processor = base.processor  # type: ignore[attr-defined]
    return processor.tokenizer, rows, end_ids(base.model, processor), processor.chat_template


def _with_marked_images(template: str) -> str:
    """Adapt LLaVA-Med's template to llama.cpp, which gives it a text with a marker in place of each image, directly
    before the question: the line break between them comes from here."""
    plain = "{% set text = message['content'] %}{% else %}"
    assert plain in template
    marked = (
        "{% set text = message['content'] %}{% if '<__media' in text %}{% set text = text | replace('__>', '__>\\n') %}"
        "{% endif %}{% else %}"
    )
    return template.replace(plain, marked, 1)


def _text_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    named = _namer(model)
    for name, tensor in language_model(model).state_dict().items():
        yield named(name), _rows_for_llama(model, name, tensor)
    output = model.get_output_embeddings().weight
    if output is not model.get_input_embeddings().weight:  # llama.cpp takes the embedding where there is no output.
        yield "output.weight", output.detach()


def _namer(model: Any) -> Callable[[str], str]:
    """Return a function from a language model's names to llama.cpp's."""
    import gguf

    [architecture] = [
        key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[model.config.model_type]
    ]
    names = gguf.get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)

    def named(name: str) -> str:
        found = names.get_name(f"model.{name}", (".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp has no tensor for {name}")
        return found

    return named


def _rows_for_llama(model: Any, name: str, rows: Tensor) -> Tensor:
    """Permute the rows of a query's or key's weight, bias or B: in each head, from halves to pairs."""
    text, kind = model.config.get_text_config(), name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}.get(kind)
    if heads is None or ARCHITECTURES[model.config.model_type] != "llama":
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_lora(model: Any, bank: Bank, path: Path) -> None:
    """Write a bank as a LoRA adapter in float32."""
    from gguf import GGUFType, GGUFWriter, Keys

    writer = GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(bank.name)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, bank.alpha)
    write_tensors(writer, lambda: _adapter_tensors(model, bank))


def _adapter_tensors(model: Any, bank: Bank) -> Iterator[tuple[str, Tensor]]:
    named = _namer(model)
    for layer, (a, b) in bank.matrices.items():
        name = f"{layer[layer.index('layers.') :]}.weight"
        yield f"{named(name)}.lora_a", a
        yield f"{named(name)}.lora_b", _rows_for_llama(model, name, b)


def write_tensors(writer: GGUFWriter, tensors: Callable[[], Tensors]) -> None:
    """Write the file: its header, then one tensor after the other, so that memory holds no second copy of the model.

    Args:
        tensors: Gives the tensors; it is called twice. Vectors are written in float32, as llama.cpp demands.
    """
    from gguf import GGMLQuantizationType

    for name, tensor in tensors():
        numbers = _numbers(tensor)
        kind = GGMLQuantizationType[_TYPES[torch.float32 if tensor.dim() == 1 else tensor.dtype]]
        writer.add_tensor_info(name, numbers.shape, numbers.dtype, numbers.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        writer.write_tensor_data(_numbers(tensor))
    writer.close()


def _numbers(tensor: Tensor) -> np.ndarray:
    tensor = (tensor.float() if tensor.dim() == 1 else tensor).contiguous()
    # NumPy has no bfloat16; its bits are written as they are.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
