"""Tiny random models of the families that docs/how-to/models.md names, each with its own processor and a tokenizer made here.

`make(family, folder)` writes what `AutoModelForImageTextToText` and `AutoProcessor` load. Templates are those of the
published models, without what a conversation of pictures and words never reaches; the answers are marked in them, so that
transformers' own mask of what an assistant says can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_processing_utils import BaseVideoProcessor

from mslora_cr.banks.bank import Bank
from mslora_cr.models.language import language_linears
from mslora_cr.models.processor_base import _without_video

SIDE, PATCH = 56, 14
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: its text and vision configurations, and the side of an image in pixels."""

    text: dict[str, Any] = field(default_factory=lambda: TEXT)
    vision: dict[str, Any] = field(default_factory=lambda: VISION)
    side: int = SIDE
    window: int = 16
    """The positions that Gemma's layers with a sliding window attend to."""

    @property
    def image_positions(self) -> int:
        """Of an image whose patches are merged two by two."""
        return (self.side // PATCH // 2) ** 2


TINY = Shape()
WORDS = [
    "is",
    "this",
    "a",
    "cell",
    "a",
    "nucleus",
    "or",
    "a",
    "lesion",
    "of",
    "the",
    "skin",
    "what",
    "does",
    "the",
    "picture",
    "show",
    "yes",
    "no",
    "left",
    "right",
    "normal",
]

LLAVA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% if message['role'] == 'user' %}{{ content['text'] + ' ' }}{% else %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% endif %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in "
    "message['content'] | selectattr('type', 'equalto', 'text') %}{% if message['role'] == 'user' %}"
    "{{ content['text'] }} [/INST]{% else %}{% generation %}{{ ' ' + content['text'] + '</s>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif message['role'] == 'user' %}{{ item['text'] | trim + '<end_of_turn>\n' }}{% else %}"
    "{% generation %}{{ item['text'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}{% for line in message['content'] %}"
    "{% if line['type'] == 'image' %}<image>{% elif message['role'] == 'user' %}{{ line['text'] }}<end_of_utterance>\n"
    "{% else %}{% generation %}{{ line['text'] }}<end_of_utterance>{% endgeneration %}\n{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _chatml(image: str) -> str:
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}{{ 'IMAGE' }}{% elif message['role'] == 'user' %}"
        "{{ item['text'] + '<|im_end|>\n' }}{% else %}{% generation %}{{ item['text'] + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ).replace("IMAGE", image)


def _tokenizer(special: Sequence[str], **roles: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words."""
    made = Tokenizer(BPE())
    made.pre_tokenizer, made.decoder = ByteLevel(add_prefix_space=False), Bytes()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=len(special) + 300, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **roles)


def _ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def _text(tokenizer: PreTrainedTokenizerFast, shape: Shape = TINY, **changes: Any) -> dict[str, Any]:
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**shape.text, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **special, **changes}


def _llama_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    special = ("<unk>", "<s>", "</s>", "<pad>", "<image>", *more)
    return _tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def _llava(shape: Shape) -> tuple[Any, Any]:
    tokenizer = _llama_tokenizer()
    size = {"size": {"shortest_edge": shape.side}, "crop_size": {"height": shape.side, "width": shape.side}}
    processor = hf.LlavaProcessor(
        CLIPImageProcessorPil(**size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
    )
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_text(tokenizer, shape)),
        vision_config=hf.CLIPVisionConfig(**shape.vision),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return hf.LlavaForConditionalGeneration(config), processor


def _llava_next(shape: Shape) -> tuple[Any, Any]:
    tokenizer = _llama_tokenizer()
    grids = [[shape.side, 2 * shape.side], [2 * shape.side, shape.side], [2 * shape.side, 2 * shape.side]]
    size = {"size": {"shortest_edge": shape.side}, "crop_size": {"height": shape.side, "width": shape.side}}
    processor = hf.LlavaNextProcessor(
        LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grids),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_NEXT,
    )
    config = hf.LlavaNextConfig(
        text_config=hf.MistralConfig(**_text(tokenizer, shape)),
        vision_config=hf.CLIPVisionConfig(**shape.vision),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
    )
    return hf.LlavaNextForConditionalGeneration(config), processor


def _gemma3(shape: Shape) -> tuple[Any, Any]:
    images = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = _tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", *images.values()),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=images,
    )
    processor = hf.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": shape.side, "width": shape.side}),
        tokenizer,
        GEMMA,
        image_seq_length=shape.image_positions,
    )
    image, start, stop = _ids(tokenizer, *images.values())
    types = ["sliding_attention", "full_attention"] * (shape.text["num_hidden_layers"] // 2)
    text = _text(tokenizer, shape, sliding_window=shape.window, layer_types=types)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**text),
        vision_config=hf.SiglipVisionConfig(**shape.vision),
        mm_tokens_per_image=shape.image_positions,
        image_token_index=image,
        image_token_id=image,
        boi_token_index=start,
        eoi_token_index=stop,
    )
    model = hf.Gemma3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = _ids(tokenizer, "<eos>", "<end_of_turn>")
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0, 0.02)  # zeros show no picture
    return model, processor


def _idefics_tokenizer() -> PreTrainedTokenizerFast:
    grid = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    more = ("<|im_start|>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *grid)
    tokenizer = _llama_tokenizer(*more)
    tokenizer.eos_token = "<end_of_utterance>"
    return tokenizer


def _idefics(shape: Shape, smol: bool) -> tuple[Any, Any]:
    tokenizer = _idefics_tokenizer()
    size = {"size": {"longest_edge": 2 * shape.side}, "max_image_size": {"longest_edge": shape.side}}
    common = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>"), "scale_factor": 2}
    common |= {"text_config": hf.LlamaConfig(**_text(tokenizer, shape)), "pad_token_id": tokenizer.pad_token_id}
    if smol:
        kind: Any = _without_video(hf.SmolVLMProcessor)
        processor = kind(
            SmolVLMImageProcessorPil(**size),
            tokenizer,
            BaseVideoProcessor(),
            image_seq_len=shape.image_positions,
            chat_template=IDEFICS,
        )
        config: Any = hf.SmolVLMConfig(vision_config=hf.SmolVLMVisionConfig(**shape.vision).to_dict(), **common)
        return hf.SmolVLMForConditionalGeneration(config), processor
    processor = hf.Idefics3Processor(
        Idefics3ImageProcessorPil(**size), tokenizer, image_seq_len=shape.image_positions, chat_template=IDEFICS
    )
    config = hf.Idefics3Config(vision_config=hf.Idefics3VisionConfig(**shape.vision).to_dict(), **common)
    return hf.Idefics3ForConditionalGeneration(config), processor


def _qwen(shape: Shape, third: bool) -> tuple[Any, Any]:
    vision = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision)
    tokenizer = _tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    patch = 16 if third else PATCH
    pixels = {
        "patch_size": patch,
        "merge_size": 2,
        "min_pixels": (2 * patch) ** 2,
        "max_pixels": (shape.side // PATCH * patch) ** 2,
    }
    template = _chatml("<|vision_start|><|image_pad|><|vision_end|>")
    kind = _without_video(hf.Qwen3VLProcessor if third else hf.Qwen2_5_VLProcessor)
    processor = kind(Qwen2VLImageProcessorPil(**pixels), tokenizer, BaseVideoProcessor(), chat_template=template)
    start, stop, image, video = _ids(tokenizer, *vision)
    tokens = {"vision_start_token_id": start, "vision_end_token_id": stop, "image_token_id": image}
    tokens["video_token_id"] = video
    eighth = shape.text["head_dim"] // 8
    rope = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [eighth, eighth, 2 * eighth]}
    depth = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": shape.text["hidden_size"],
    }
    depth |= {"patch_size": patch}
    if third:
        rope |= {"mrope_interleaved": True}
        config: Any = hf.Qwen3VLConfig(
            text_config=_text(tokenizer, shape, rope_parameters=rope),
            vision_config={**depth, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            **tokens,
        )
        return hf.Qwen3VLForConditionalGeneration(config), processor
    text = _text(tokenizer, shape, rope_parameters=rope)
    config = hf.Qwen2_5_VLConfig(
        text_config=text, vision_config={**depth, "fullatt_block_indexes": [1], "window_size": 4 * patch}, **tokens
    )
    return hf.Qwen2_5_VLForConditionalGeneration(config), processor


def _internvl(shape: Shape) -> tuple[Any, Any]:
    images = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    images["video_token"] = "<video>"
    tokenizer = _tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *images.values()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=images,
    )
    size = {"size": {"height": shape.side, "width": shape.side}, "min_patches": 1, "max_patches": 4}
    processor = _without_video(hf.InternVLProcessor)(
        GotOcr2ImageProcessorPil(**size),
        tokenizer,
        BaseVideoProcessor(),
        image_seq_length=shape.image_positions,
        chat_template=_chatml("<IMG_CONTEXT>\n"),
    )
    vision = {**shape.vision, "image_size": [shape.side, shape.side], "patch_size": [PATCH, PATCH]}
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**_text(tokenizer, shape)),
        vision_config=hf.InternVLVisionConfig(**vision),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=shape.image_positions,
        downsample_ratio=0.5,
    )
    return hf.InternVLForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[Shape], tuple[Any, Any]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "gemma3": _gemma3,
    "idefics3": partial(_idefics, smol=False),
    "smolvlm": partial(_idefics, smol=True),
    "qwen2_5_vl": partial(_qwen, third=False),
    "qwen3_vl": partial(_qwen, third=True),
    "internvl": _internvl,
}


def make(family: str, folder: Path, shape: Shape = TINY) -> None:
    """Write a model of a family, always the same, with its processor."""
    write(partial(FAMILIES[family], shape), folder)


def write(build: Callable[[], tuple[Any, Any]], folder: Path) -> None:
    """Write what a function makes, always the same: a model and its processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build()
    if model.can_generate():
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        if model.generation_config.eos_token_id is None:
            model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def random_bank(model: Any, seed: int, size: float = 0.1) -> Bank:
    """A bank of rank 4 that changes a model's answers."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator)

    linears = language_linears(model)
    pairs = {
        name: (numbers(4, linear.in_features), numbers(linear.out_features, 4)) for name, linear in linears.items()
    }
    return Bank(f"bank {seed}", 4, 8.0, pairs)
