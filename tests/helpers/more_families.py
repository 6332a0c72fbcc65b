"""Further families' tiny random models: each of a kind that the eight of `families` are not.

Several lengths of one image, processors that rewrite text, cross attention, fused experts, features of no image token,
parts for video and sound, inner models of other names, forward passes without `logits_to_keep`, recurrent layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as hf
from transformers.video_processing_utils import BaseVideoProcessor

from mslora_cr.models.processor_base import _without_video
from tests.helpers.families import IDEFICS, PATCH, SIDE, VISION, _chatml, _ids, _text, _tokenizer, write

ROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}


def _of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)


def _llava_onevision() -> tuple[Any, Any]:
    tok = _tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    grids = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    ip = _of("llava_onevision.image_processing_pil_llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grids
    )
    p = _without_video(hf.LlavaOnevisionProcessor)(
        ip,
        tok,
        BaseVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_chatml("<image>\n"),
    )
    c = hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**_text(tok)),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=_ids(tok, "<image>")[0],
        video_token_index=_ids(tok, "<video>")[0],
        image_grid_pinpoints=grids,
    )
    return hf.LlavaOnevisionForConditionalGeneration(c), p


def _paligemma() -> tuple[Any, Any]:
    tok = _tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<image>"),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    ip = _of("siglip.image_processing_pil_siglip", "SiglipImageProcessorPil")(size={"height": SIDE, "width": SIDE})
    ip.image_seq_length = 16
    p = hf.PaliGemmaProcessor(ip, tok)  # Its published folders have no chat template.
    c = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**{**_text(tok), "vocab_size": len(tok)}),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        image_token_index=_ids(tok, "<image>")[0],
        projection_dim=32,
        hidden_size=32,
    )
    return hf.PaliGemmaForConditionalGeneration(c), p


def _mllama() -> tuple[Any, Any]:
    tok = _tokenizer(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|eot_id|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|pad|>",
            "<|python_tag|>",
        ),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|pad|>",
    )
    # <|image|> is the row behind the vocabulary, as in Llama 3.2 Vision
    tok.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    ip = _of("mllama.image_processing_pil_mllama", "MllamaImageProcessorPil")(
        size={"height": SIDE, "width": SIDE}, max_image_tiles=4
    )
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>"
        "{% elif m['role'] == 'user' %}{{ c['text'] + '<|eot_id|>' }}{% else %}{% generation %}{{ c['text'] + '<|eot_id|>' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    p = hf.MllamaProcessor(ip, tok, chat_template=template)
    n = _ids(tok, "<|image|>")[0]
    text = {**_text(tok), "vocab_size": n, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    text.pop("head_dim")
    c = hf.MllamaConfig(
        text_config=hf.MllamaTextConfig(**text, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        vision_config=hf.MllamaVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=4,
            intermediate_size=48,
            image_size=SIDE,
            patch_size=PATCH,
            intermediate_layers_indices=[0],
            vision_output_dim=64,
            max_num_tiles=4,
            supported_aspect_ratios=[[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        ),
        image_token_index=n,
    )
    return hf.MllamaForConditionalGeneration(c), p


def _glm(config, model, processor, ipm, ipn, text):
    vis = ["<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|video|>"]
    tok = _tokenizer(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", *vis),
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    ip = _of(ipm, ipn)(patch_size=PATCH, merge_size=2, size={"shortest_edge": 28**2 * 2, "longest_edge": 56**2 * 2})
    template = (
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% elif m['role'] == 'user' %}{{ c['text'] }}"
        "{% else %}{% generation %}{{ c['text'] }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    p = _without_video(processor)(ip, tok, BaseVideoProcessor(), chat_template=template)
    b, e, i, vb, ve, v = _ids(tok, *vis)
    c = config(
        text_config=_text(tok, rope_parameters=dict(ROPE, partial_rotary_factor=1.0), **text),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            "out_hidden_size": 32,
            "intermediate_size": 48,
        },
        image_token_id=i,
        video_token_id=v,
        image_start_token_id=b,
        image_end_token_id=e,
        video_start_token_id=vb,
        video_end_token_id=ve,
    )
    m = model(c)
    m.generation_config.eos_token_id = _ids(tok, "<|endoftext|>", "<|user|>")
    return m, p


def _glm4v_moe() -> tuple[Any, Any]:
    return _glm(
        hf.Glm4vMoeConfig,
        hf.Glm4vMoeForConditionalGeneration,
        hf.Glm4vProcessor,
        "glm4v.image_processing_pil_glm4v",
        "Glm4vImageProcessorPil",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    )


def _ovis2() -> tuple[Any, Any]:
    sp = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<IMG_ATOM>",
        "<IMG_START>",
        "<IMG_GRID>",
        "<IMG_COL>",
        "<IMG_ROW>",
        "<IMG_END>",
    ]
    tok = _tokenizer(sp, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ip = _of("ovis2.image_processing_pil_ovis2", "Ovis2ImageProcessorPil")(
        size={"height": SIDE, "width": SIDE}, max_patches=4, min_patches=1, crop_to_patches=True
    )
    p = hf.Ovis2Processor(ip, tok, image_seq_length=4, chat_template=_chatml("<image>\n"))
    text = hf.Qwen2Config(**_text(tok))
    c = hf.Ovis2Config(
        text_config=text,
        vision_config={**VISION, "hidden_stride": 2, "vocab_size": 37, "num_visual_indicator_tokens": 5},
        image_token_id=_ids(tok, "<IMG_ATOM>")[0],
        visual_indicator_token_ids=_ids(tok, "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        vocab_size=len(tok),
        hidden_size=32,
    )
    return hf.Ovis2ForConditionalGeneration(c), p


def _idefics2() -> tuple[Any, Any]:
    tok = _tokenizer(
        ("<unk>", "<s>", "</s>", "<pad>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        bos_token="<s>",
        eos_token="<end_of_utterance>",
        pad_token="<pad>",
    )
    ip = _of("idefics2.image_processing_pil_idefics2", "Idefics2ImageProcessorPil")(
        do_image_splitting=False, size={"shortest_edge": 28, "longest_edge": SIDE}
    )
    p = hf.Idefics2Processor(ip, tok, image_seq_len=4, chat_template=IDEFICS.replace("<|im_start|>", ""))
    c = (
        hf.Idefics2Config(
            text_config=hf.MistralConfig(**_text(tok)),
            vision_config=hf.Idefics2VisionConfig(**VISION),
            image_token_id=_ids(tok, "<image>")[0],
            perceiver_config=hf.Idefics2PerceiverConfig(
                hidden_size=32,
                resampler_n_latents=4,
                resampler_depth=1,
                resampler_n_heads=2,
                resampler_head_dim=16,
                num_key_value_heads=2,
            ),
        )
        if hasattr(hf, "Idefics2PerceiverConfig")
        else None
    )
    return hf.Idefics2ForConditionalGeneration(c), p


def _janus() -> tuple[Any, Any]:
    ex = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tok = _tokenizer(
        ("<pad>", "<bos>", "<eos>", *ex.values()),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=ex,
    )
    ip = _of("janus.image_processing_pil_janus", "JanusImageProcessorPil")(
        size={"height": SIDE, "width": SIDE}, min_size=14
    )
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}User: {% else %}Assistant: {% endif %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image_placeholder>\n{% elif m['role'] == 'user' %}{{ c['text'] + '\n\n' }}"
        "{% else %}{% generation %}{{ c['text'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    p = hf.JanusProcessor(ip, tok, chat_template=template, num_image_tokens=16)
    v = {k: x for k, x in VISION.items() if k != "intermediate_size"}
    c = hf.JanusConfig(
        text_config=hf.LlamaConfig(**_text(tok)),
        vision_config=hf.JanusVisionConfig(**v, projection_dim=32, num_image_tokens=16, mlp_ratio=2.0),
        vq_config=hf.JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=16,
            latent_channels=8,
            base_channels=32,
            channel_multiplier=[1, 1],
            num_res_blocks=1,
            num_patches=4,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        image_token_id=_ids(tok, "<image_placeholder>")[0],
    )
    return hf.JanusForConditionalGeneration(c), p


def _gemma4() -> tuple[Any, Any]:
    im = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    tok = _tokenizer(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|video|>", *im.values()),
        bos_token="<bos>",
        eos_token="<turn|>",
        pad_token="<pad>",
        extra_special_tokens=im,
    )
    ip = _of("gemma4.image_processing_pil_gemma4", "Gemma4ImageProcessorPil")(
        patch_size=16, pooling_kernel_size=2, max_soft_tokens=70
    )
    fe = hf.Gemma4AudioFeatureExtractor() if hasattr(hf, "Gemma4AudioFeatureExtractor") else None
    template = (
        "{{ bos_token }}{% for m in messages %}<|turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{% for c in m['content'] %}{% if c['type'] == 'image' %}<|image|>{% elif m['role'] == 'user' %}{{ c['text'] | trim + '<turn|>\n' }}"
        "{% else %}{% generation %}{{ c['text'] | trim + '<turn|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
    )
    p = _without_video(hf.Gemma4Processor)(
        fe, ip, tok, BaseVideoProcessor(), chat_template=template, image_seq_length=70
    )
    i, b, e, a, ba, ea = _ids(tok, *im.values())
    text = _text(
        tok,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        vocab_size_per_layer_input=len(tok),
        hidden_size_per_layer_input=8,
    )
    c = hf.Gemma4Config(
        text_config=hf.Gemma4TextConfig(**text),
        vision_config=hf.Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            patch_size=16,
            pooling_kernel_size=2,
            position_embedding_size=256,
        ),
        audio_config=None,
        image_token_id=i,
        boi_token_id=b,
        eoi_token_id=e,
        audio_token_id=a,
        boa_token_id=ba,
        eoa_token_index=ea,
        video_token_id=_ids(tok, "<|video|>")[0],
    )
    return hf.Gemma4ForConditionalGeneration(c), p


def _ernie4_5_vl_moe() -> tuple[Any, Any]:
    ex = {
        "image_token": "<|IMAGE_PLACEHOLDER|>",
        "image_end_token": "<|IMAGE_END|>",
        "image_start_token": "<|IMAGE_START|>",
        "video_token": "<|video@placeholder|>",
        "video_end_token": "<|VIDEO_END|>",
        "video_start_token": "<|VIDEO_START|>",
    }
    tok = _tokenizer(
        ("<pad>", "<s>", "</s>", *ex.values()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=ex,
    )
    ip = _of("ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe", "Ernie4_5_VLMoeImageProcessorPil")(
        patch_size=PATCH, merge_size=2, size={"shortest_edge": 28**2, "longest_edge": 56**2}
    )
    template = (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}User: {% for c in m['content'] %}{% if c['type'] == 'image' %}Picture:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{% else %}{{ c['text'] + '\n' }}{% endif %}{% endfor %}"
        "{% else %}Assistant: {% generation %}{{ m['content'][0]['text'] + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
    )
    video = BaseVideoProcessor()
    video.font = ""  # `save_pretrained` looks for one
    p = _without_video(hf.Ernie4_5_VLMoeProcessor)(ip, tok, video, chat_template=template)
    i, ie, is_, v, ve, vs = _ids(tok, *ex.values())
    c = hf.Ernie4_5_VLMoeConfig(
        text_config=_text(
            tok,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            moe_intermediate_size=[16, 16],
            moe_k=2,
            moe_num_experts=4,
            moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"],
        ),
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": PATCH, "intermediate_size": 48},
        image_start_token_id=is_,
        image_end_token_id=ie,
        image_token_id=i,
        video_start_token_id=vs,
        video_end_token_id=ve,
        video_token_id=v,
    )
    return hf.Ernie4_5_VLMoeForConditionalGeneration(c), p


def _blip2() -> tuple[Any, Any]:
    tok = _tokenizer(("<pad>", "</s>", "<image>"), bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    p = hf.Blip2Processor(BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}), tok, num_query_tokens=4)
    p.chat_template = "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% elif m['role'] == 'user' %}{{ 'Question: ' + c['text'] + ' Answer:' }}{% else %}{% generation %}{{ ' ' + c['text'] + '</s>' }}{% endgeneration %}{% endif %}{% endfor %}{% endfor %}"
    c = hf.Blip2Config(
        text_config=hf.OPTConfig(
            vocab_size=len(tok),
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=512,
            word_embed_proj_dim=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        ).to_dict()
        | {"model_type": "opt"},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        qformer_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "encoder_hidden_size": 32,
            "vocab_size": len(tok),
        },
        num_query_tokens=4,
        image_token_index=_ids(tok, "<image>")[0],
    )
    return hf.Blip2ForConditionalGeneration(c), p


def _video_llama_3() -> tuple[Any, Any]:
    tok = _tokenizer(
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    ip = _of("video_llama_3.image_processing_pil_video_llama_3", "VideoLlama3ImageProcessorPil")(
        patch_size=PATCH, merge_size=1, size={"shortest_edge": 28**2, "longest_edge": 56**2}
    )
    p = _without_video(hf.VideoLlama3Processor)(ip, tok, BaseVideoProcessor(), chat_template=_chatml("<image>\n"))
    c = hf.VideoLlama3Config(
        text_config=_text(tok, model_type="qwen2"),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_size": PATCH,
        },
        image_token_id=_ids(tok, "<image>")[0],
        video_token_id=_ids(tok, "<video>")[0],
    )
    return hf.VideoLlama3ForConditionalGeneration(c), p


MORE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gemma4": _gemma4,
    "glm4v_moe": _glm4v_moe,
    "janus": _janus,
    "mllama": _mllama,
    "llava_onevision": _llava_onevision,
    "ovis2": _ovis2,
    "idefics2": _idefics2,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "video_llama_3": _video_llama_3,
    "paligemma": _paligemma,
}
COPIED = ("mllama",)
"""Those of them that keep more than keys and values of text, so that openings are copied."""
REFUSED: dict[str, tuple[Callable[[], tuple[Any, Any]], str]] = {
    "blip2": (_blip2, "takes no question without an image"),
}
"""With what is said of each."""


def make_more(family: str, folder: Path) -> None:
    """Write a model of one of these families, always the same, with its processor."""
    write(MORE[family] if family in MORE else REFUSED[family][0], folder)
