"""Writes a loaded LLaVA-Med as a folder that transformers, PEFT and vLLM load without this project.

The folder has weights under names that every transformers since 4.36 and vLLM read, tokenizer, processor, chat template
and generation settings. Our own code tokenises with SentencePiece and expands images itself; the folder's tokenizer and
processor give the same ids and the same pixels, which is checked when they are written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as ReplaceText
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaTokenizer, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mslora_cr.data.prompts import IMAGE_INDEX, encode_prompt, generation_prompt
from mslora_cr.models.layout import ModelError
from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.utils.strict_json import read_object

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}{% set images = 0 %}{% set text = message['content'] %}{% else %}"
    "{% set images = message['content'] | selectattr('type', 'in', ['image', 'image_url']) | list | length %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') %}"
    "{% endif %}[INST] {% for _ in range(images) %}{{ 'IMAGE_TOKEN\\n' }}{% endfor %}{{ text | trim }} [/INST]"
    "{% elif message['role'] == 'assistant' %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% set text = message['content'] | map(attribute='text') | join('\\n') %}{% endif %}"
    " {{ text | trim }} {{ eos_token }}"
    "{% else %}{{ raise_exception('the model knows the roles user and assistant only') }}{% endif %}{% endfor %}"
)
"""LLaVA-Med's Mistral-instruct template, as in `data.prompts`; images come before their message."""
PROBES = ("Is this a cell?", "two  spaces,   three", "µm²: 1.5 × 10⁻³ α-SMA ✓ 細胞", " a\ttab\n\nand lines ", "")
"""Questions on which the written tokenizer is compared with our own."""
NAMES = (
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower.vision_model."),  # transformers 5 drops `vision_model`, but vLLM needs it.
)


def save_transformers_layout(base: LlavaMed, processor: LlavaProcessor, folder: Path, shard_size: str = "5GB") -> None:
    """Write a model with everything that prepares its inputs. Banks merged into its weights are written with them.

    Args:
        folder: An empty folder.
    """
    save_torch_state_dict(
        dict(_renamed(base.model.state_dict())), folder, max_shard_size=shard_size, metadata={"format": "pt"}
    )
    _save_config(base, folder)
    base.model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # Loaders that do not know processor_config.json read this.
    settings = folder / "tokenizer_config.json"
    config = read_object(settings)
    # transformers 4 knows them in this form: the class's name, special tokens by their role, and no third input.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["extra_special_tokens"] = {"image_token": processor.image_token}
    config["model_input_names"] = ["input_ids", "attention_mask"]
    settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _drop_image_processor(folder / "processor_config.json")


def _drop_image_processor(path: Path) -> None:
    """Leave out what preprocessor_config.json contains: transformers 4.51 accepts no settings of parts here."""
    settings = read_object(path)
    settings.pop("image_processor", None)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def portable_processor(base: LlavaMed) -> LlavaProcessor:
    """Return the image processor, tokenizer and chat template for transformers alone.

    Raises:
        ModelError: The tokenizer cannot be written so that it gives the same ids.
    """
    tokenizer = portable_tokenizer(base)
    return LlavaProcessor(
        image_processor=_image_processor(base),
        tokenizer=tokenizer,
        patch_size=base.model.config.vision_config.patch_size,
        vision_feature_select_strategy=base.model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # The tower's class position, which the strategy removes again.
        image_token=tokenizer.image_token,
        chat_template=CHAT_TEMPLATE.replace("IMAGE_TOKEN", tokenizer.image_token),
    )


def portable_tokenizer(base: LlavaMed) -> PreTrainedTokenizerFast:
    """Return a tokenizer for transformers alone. The image's piece becomes a special token under its existing id, so
    that the vocabulary, and with it the model's embeddings, keep their length.

    Raises:
        ModelError: It would give other ids than ours.
    """
    ours = base.tokenizer
    source = ours.folder / "tokenizer.model"
    fast = _from_sentencepiece(source) if source.is_file() else _from_llama(ours.folder)
    image = fast.id_to_token(base.image_token_id)
    assert image is not None, "the image's piece is in the vocabulary"
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in (*ours.special, image)])
    bos = fast.id_to_token(ours.bos_token_id)
    fast.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ours.bos_token_id)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token=bos,
        eos_token=ours.eos_token,
        unk_token=fast.id_to_token(0),
        pad_token=fast.id_to_token(ours.pad_token_id),
        extra_special_tokens={"image_token": image},
        padding_side="left",  # Generation of a batch needs padding on the left.
        clean_up_tokenization_spaces=False,
        model_max_length=base.model.config.text_config.max_position_embeddings,
    )
    _check(tokenizer, base, image)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerFast, base: LlavaMed, image: str) -> None:
    if len(tokenizer) != len(base.tokenizer):
        raise ModelError(f"the tokenizer would grow from {len(base.tokenizer)} to {len(tokenizer)} pieces")
    for probe in PROBES:
        prompt = generation_prompt(probe)
        wanted = [
            base.image_token_id if piece == IMAGE_INDEX else piece for piece in encode_prompt(base.tokenizer, prompt)
        ]
        ids = tokenizer(prompt.replace("<image>", image)).input_ids
        if ids != wanted:
            raise ModelError(f"the tokenizer cannot be written for transformers: {probe!r} gives {ids}, not {wanted}")


def _from_sentencepiece(file: Path) -> FastTokenizer:
    """Return merges for a BPE. SentencePiece merges the pair of the piece with the highest score, so merges are
    ranked by score."""
    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(number): number for number in range(len(pieces))}
    # Tokens that stand for themselves are left out: bytes, <unk>, <s> and </s> are never results of a merge.
    merged = [
        number
        for number in range(len(pieces))
        if not (pieces.is_byte(number) or pieces.is_control(number) or number == 0)
    ]
    merged.sort(key=lambda number: (-pieces.get_score(number), number))
    merges = [pair for number in merged for pair in _splits(pieces.id_to_piece(number), vocabulary)]
    fast = FastTokenizer(BPE(vocabulary, merges, unk_token=pieces.id_to_piece(0), fuse_unk=True, byte_fallback=True))
    fast.normalizer = Normalizers([Prepend("▁"), ReplaceText(" ", "▁")])
    fast.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    return fast


def _splits(piece: str, vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    yield from sorted(
        (pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary),
        key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
    )


def _from_llama(folder: Path) -> FastTokenizer:
    fast: FastTokenizer = LlamaTokenizer.from_pretrained(folder).backend_tokenizer
    return fast


def _image_processor(base: LlavaMed) -> LlavaImageProcessorPil:
    processor = base.image_processor
    keys = ("image_mean", "image_std", "size", "crop_size", "resample", "rescale_factor")
    settings = processor.to_dict()
    return LlavaImageProcessorPil(**{key: settings[key] for key in keys}, do_pad=True)


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        for ours, theirs in NAMES:
            if name.startswith(ours):
                yield theirs + name.removeprefix(ours), tensor.contiguous()
                break
        else:
            raise AssertionError(f"{name} has no name in transformers' layout")


def _save_config(base: LlavaMed, folder: Path) -> None:
    base.model.config.save_pretrained(folder)
    path = folder / "config.json"
    config: dict[str, Any] = read_object(path)
    config["architectures"] = [type(base.model).__name__]  # Only `save_pretrained` of a model adds them.
    config["image_seq_length"] = base.patches
    config["vision_config"].pop("_name_or_path", None)  # This is a path of the machine that wrote it.
    text = config["text_config"]
    # transformers 4 looks here; its default is another file.
    text["rope_theta"] = text["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
