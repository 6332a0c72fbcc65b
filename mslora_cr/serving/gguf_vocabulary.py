"""Writes a tokenizer into a GGUF file, in llama.cpp's two layouts of BPE: SentencePiece's, and over bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mslora_cr.models.layout import ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORD.replace("DIGITS", r"\p{N}"): "qwen2",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|" + _WORD.replace("DIGITS", r"\p{N}{1,3}"): "llama-bpe",
}
"""llama.cpp's names of the expressions by which byte-level tokenizers split a text into words."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def write_vocabulary(
    writer: GGUFWriter, tokenizer: Any, rows: int, end_ids: Sequence[int], template: str | None
) -> None:
    """Write pieces, merges, special tokens and the chat template.

    Args:
        tokenizer: transformers' fast tokenizer.
        rows: The number of the embedding's rows; rows without a piece get unused ones.
        end_ids: The ids that end an answer.

    Raises:
        ModelError: llama.cpp has no name for this kind of tokenizer.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe, vocabulary = state["model"], tokenizer.get_vocab()
    if bpe["type"] != "BPE":
        raise ModelError(f"llama.cpp reads BPE tokenizers, and this one is {bpe['type']}; export with --format merged")
    pieces = [f"[PAD{row}]" for row in range(rows)]
    for piece, row in vocabulary.items():
        pieces[row] = piece
    writer.add_tokenizer_model("llama" if bpe.get("byte_fallback") else "gpt2")
    writer.add_tokenizer_pre("default" if bpe.get("byte_fallback") else _split_name(state["pre_tokenizer"]))
    writer.add_token_list(pieces)
    writer.add_token_types(_types(pieces, vocabulary, state["added_tokens"], bpe.get("unk_token")))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
    if bpe.get("byte_fallback"):
        writer.add_token_scores(_scores(pieces, merges))
        writer.add_add_space_prefix("▁" in json.dumps(state["normalizer"], ensure_ascii=False) or _prepends(state))
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    _write_special(writer, tokenizer, end_ids, "bos_token" in (template or ""))
    if template:
        writer.add_chat_template(template)


def _write_special(writer: GGUFWriter, tokenizer: Any, end_ids: Sequence[int], begun: bool) -> None:
    """Write the ids of special tokens. llama.cpp knows two tokens that end an answer, `eos` and `eot`.

    Args:
        begun: Whether the chat template writes the first token; some programs would add a second one.
    """
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(not begun and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    for identify, end in zip((writer.add_eos_token_id, writer.add_eot_token_id), end_ids, strict=False):
        identify(end)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)


def _types(
    pieces: Sequence[str], known: Mapping[str, int], added: Sequence[Mapping[str, Any]], unknown: str | None
) -> list[int]:
    from gguf import TokenType

    special = {token["content"]: token["special"] for token in added}

    def kind(piece: str) -> TokenType:
        if piece not in known:
            return TokenType.UNUSED
        if _BYTE.fullmatch(piece):  # Even LLaVA-Med's image token: llama.cpp needs a piece for every byte.
            return TokenType.BYTE
        if piece == unknown:
            return TokenType.UNKNOWN
        if piece in special:
            return TokenType.CONTROL if special[piece] else TokenType.USER_DEFINED
        return TokenType.NORMAL

    return [int(kind(piece)) for piece in pieces]


def _scores(pieces: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """Return scores by which llama.cpp merges in the order of the merges: it makes the piece of highest score first."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault("".join(merge), rank)
    return [-float(first.get(piece, len(merges))) for piece in pieces]


def _prepends(state: Mapping[str, Any]) -> bool:
    return (state["pre_tokenizer"] or {}).get("prepend_scheme", "never") != "never"


def _split_name(splitter: Mapping[str, Any] | None) -> str:
    """Return llama.cpp's name of how a byte-level tokenizer splits a text into words."""
    steps = (splitter or {}).get("pretokenizers", [splitter or {}])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if not patterns and steps[-1].get("type") == "ByteLevel" and steps[-1].get("use_regex", True):
        return "gpt-2"
    name = _SPLITS.get(patterns[0]) if len(patterns) == 1 else None
    if name is None:
        raise ModelError(
            "llama.cpp's name of how this tokenizer splits words is not known here; export with --format merged, and "
            "convert with llama.cpp's own script"
        )
    return name
