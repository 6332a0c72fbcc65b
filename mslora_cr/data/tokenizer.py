"""The Llama tokenizer as the published code's slow tokenizer works, and any tokenizer that comes with a processor.

transformers converts a `tokenizer.model` to merges ranked by piece id, but SentencePiece merges by score, and in
Mistral's vocabulary runs of spaces have low ids and the lowest score: `two  spaces` would come out as other ids.
So text is encoded by SentencePiece itself where its model is available; transformers decodes, and serves folders that
hold only a `tokenizer.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer

from mslora_cr.data.answers.reasoning import MARKS
from mslora_cr.utils.errors import UserError


class TokenizerError(UserError):
    """The folder holds no usable tokenizer."""


class Tokenizer:
    """Text ↔ ids. Read with `Tokenizer(folder)`; cheap to send to data loader workers."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            TokenizerError: Neither `tokenizer.model` nor `tokenizer.json` exists, or it cannot be read.
        """
        self.folder = folder
        model_file = folder / "tokenizer.model"
        if not model_file.is_file() and not (folder / "tokenizer.json").is_file():
            raise TokenizerError(f"{folder}: neither tokenizer.model nor tokenizer.json exists")
        try:
            self._pieces = SentencePieceProcessor(model_file=str(model_file)) if model_file.is_file() else None
            # By class, not AutoTokenizer: that one chooses by the folder's model_type.
            self._llama = LlamaTokenizer.from_pretrained(folder)
        except (OSError, RuntimeError, ValueError) as error:
            raise TokenizerError(f"{folder}: the tokenizer cannot be read ({error})") from None
        self.bos_token_id: int = self._llama.bos_token_id
        self.eos_token_id: int = self._llama.eos_token_id
        self.pad_token_id: int = (
            self._llama.unk_token_id if self._llama.pad_token_id is None else self._llama.pad_token_id
        )
        self._special = dict(zip(self._llama.all_special_tokens, self._llama.all_special_ids, strict=True))
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def __len__(self) -> int:
        """Return how many pieces the vocabulary has."""
        return len(self._llama)

    @property
    def special(self) -> list[str]:
        """The special tokens, as text spells them."""
        return list(self._special)

    @property
    def eos_token(self) -> str:
        return str(self._llama.eos_token)

    def encode(self, text: str) -> list[int]:
        """Return ids of a text, without `<s>`; special tokens spelled out become their ids, as in the slow one."""
        if self._pieces is None:
            return list(self._llama(text, add_special_tokens=False).input_ids)
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            if part:
                ids += [self._special[part]] if part in self._special else self._pieces.encode(part)
        return ids

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each sequence of ids, special tokens left out, outer white space removed."""
        return [text.strip() for text in self._llama.batch_decode(sequences, skip_special_tokens=True)]

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the vocabulary, or None."""
        number = self._llama.get_vocab().get(piece)
        return None if number is None else int(number)


class ProcessorTokenizer:
    """A processor's tokenizer, for texts without a template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id: int = tokenizer.eos_token_id
        padding = tokenizer.pad_token_id
        self.pad_token_id: int = tokenizer.eos_token_id if padding is None else padding

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each sequence of ids, without outer white space. Special tokens are left out, marks of
        reasoning are not."""
        if not self._special_marks:
            return [text.strip() for text in self._tokenizer.batch_decode(sequences, skip_special_tokens=True)]
        left_out = {*self._tokenizer.all_special_ids} - self._special_marks
        visible = [[token for token in map(int, ids) if token not in left_out] for ids in sequences]
        return [text.strip() for text in self._tokenizer.batch_decode(visible)]

    @cached_property
    def _special_marks(self) -> set[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return {number for number, token in added if token.special and str(token) in MARKS}
