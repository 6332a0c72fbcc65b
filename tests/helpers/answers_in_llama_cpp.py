"""Answers prompts with llama-cpp-python alone, from GGUF files: `python answers_in_llama_cpp.py CASES.json FOUND.json`.

A case names a model's file, perhaps an adapter's, and either a prompt, the number of tokens and the ids that end an answer,
or a projector's file and an image. FOUND.json has, for each case, the ids of prompt and answer, or the image's features. Keys
and values are kept in float32; llama.cpp's default is float16.
"""

import ctypes
import json
import sys
from pathlib import Path

from llama_cpp import GGML_TYPE_F32, Llama, llama_model_n_embd, mtmd_cpp


def generated(model, prompt, tokens, ends):
    ids = model.tokenize(prompt.encode(), add_bos=False, special=True)
    answer = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        answer.append(token)
        if len(answer) == tokens or token in ends:
            break
    return [ids, answer]


def features(model, projector, image):
    """What the language model reads at each position of an image."""
    settings = mtmd_cpp.mtmd_context_params_default()
    settings.use_gpu, settings.n_threads = False, 1
    context = mtmd_cpp.mtmd_init_from_file(projector.encode(), model.model, settings)
    data = Path(image).read_bytes()
    buffer = (ctypes.c_uint8 * len(data)).from_buffer(bytearray(data))
    picture = mtmd_cpp.mtmd_helper_bitmap_init_from_buf(context, buffer, len(data), False)
    text, chunks = mtmd_cpp.mtmd_input_text(), mtmd_cpp.mtmd_input_chunks_init()
    text.text = mtmd_cpp.mtmd_default_marker()
    text.text_len = len(text.text)
    pictures = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(picture)
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), pictures, 1) == 0
    for number in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, number)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
            width, length = llama_model_n_embd(model.model), mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            numbers = mtmd_cpp.mtmd_get_output_embd(context)
            return [numbers[row * width : (row + 1) * width] for row in range(length)]


found = []
for case in json.loads(Path(sys.argv[1]).read_text()):
    model = Llama(
        case["model"],
        lora_path=case.get("adapter"),
        n_ctx=512,
        n_threads=1,
        n_threads_batch=1,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    if "image" in case:
        found.append(features(model, case["projector"], case["image"]))
    else:
        found.append(generated(model, case["prompt"], case["tokens"], case["ends"]))
Path(sys.argv[2]).write_text(json.dumps(found))
