"""Records → inputs of any image-text model, by its own processor and chat template: transformers' `AutoProcessor`.

Ids, label mask and images are those that the processor makes of a whole conversation; nothing here knows a model.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from mslora_cr.data.chat import Chat, Span, messages_of, render, training_chat
from mslora_cr.data.images import image_size, load_image, paths_of, resolve_image
from mslora_cr.data.input_processor import Collate, Prompt
from mslora_cr.data.prompts import IGNORE_INDEX, Message, Turn
from mslora_cr.data.records import IMAGE, TestRecord, TestRecords, TrainingRecord, TrainingRecords, shown_images

Size = tuple[int, int]
"""Width and height."""


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
        """Ids of a text, no special token added."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """The text of each sequence of ids, special tokens left out, outer white space removed."""
        return [text.strip() for text in self._tokenizer.batch_decode(sequences, skip_special_tokens=True)]


class ChatSample(TypedDict):
    """A conversation, not yet tokenised. `index` is the record's position in its file."""

    index: int
    text: str
    answers: tuple[Span, ...]
    images: list[Image.Image]


@dataclass(frozen=True)
class ChatTemplateInputs:
    """The `InputProcessor` of a model with a processor."""

    processor: Any
    end_ids: tuple[int, ...]
    """Ids that end an answer."""
    max_length: int = 2048
    all_images: bool = False
    _replacements: dict[Size, str] = field(default_factory=dict)
    """What stands for an image of a size, as far as any was asked for."""

    @cached_property
    def tokenizer(self) -> ProcessorTokenizer:
        return ProcessorTokenizer(self.processor.tokenizer)

    @property
    def shares_openings(self) -> bool:
        return False

    def image_names(self, record: TrainingRecord | TestRecord) -> tuple[str, ...]:
        """As `shown_images`."""
        return shown_images(record, self.all_images)

    def image_paths(self, records: TrainingRecords | TestRecords, roots: Sequence[Path]) -> list[Path]:
        """As `paths_of`."""
        return paths_of([self.image_names(record) for record in records], roots)

    def load_images(self, names: Sequence[str], roots: Sequence[Path]) -> list[Image.Image]:
        """Decoded, in RGB."""
        return [load_image(resolve_image(name, roots)) for name in names]

    def process_images(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        return list(images)

    # --- training ---

    def sample(self, index: int, record: TrainingRecord, roots: Sequence[Path]) -> ChatSample:
        chat = self._chat(record)
        images = self.load_images(self.image_names(record), roots)
        self._check_cut(self._ids(chat.text, [image.size for image in images]))
        return ChatSample(index=index, text=chat.text, answers=chat.answers, images=images)

    def length(self, record: TrainingRecord, roots: Sequence[Path]) -> int:
        sizes = [image_size(resolve_image(name, roots)) for name in self.image_names(record)]
        ids = self._ids(self._chat(record).text, sizes)
        self._check_cut(ids)
        return min(len(ids), self.max_length)

    def padding_sample(self, sample: ChatSample, index: int) -> ChatSample:
        return {**sample, "index": index, "answers": ()}

    def collator(self, multiple: int = 1) -> Collate:
        return partial(self.batch, multiple=multiple)

    def batch(self, samples: Sequence[ChatSample], multiple: int = 1) -> dict[str, Tensor]:
        """A right-padded batch, cut at `max_length`; a label wherever a token has a part of an answer."""
        texts, images = [sample["text"] for sample in samples], [sample["images"] for sample in samples]
        marks: dict[str, Any] = {"return_offsets_mapping": True, "return_text_replacement_offsets": True}
        marks |= {"pad_to_multiple_of": multiple} if multiple > 1 else {}
        inputs = self._processed(texts, images, "right", **marks)
        offsets, moved = inputs.pop("offset_mapping"), inputs.pop("text_replacement_offsets", None)
        labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        for row, sample in enumerate(samples):
            replaced = moved[row] if moved is not None and len(moved) else []
            for start, stop in _moved(sample["answers"], replaced):
                part = (offsets[row, :, 0] < stop) & (offsets[row, :, 1] > start)
                labels[row, part] = inputs["input_ids"][row, part]
        full = inputs["input_ids"].shape
        cut = {
            name: value[:, : self.max_length] if name in _BY_POSITION and value.shape == full else value
            for name, value in {**inputs, "labels": labels}.items()
        }
        return {**cut, "record_index": torch.tensor([sample["index"] for sample in samples])}

    # --- answering ---

    def prompt(self, record: TestRecord, roots: Sequence[Path]) -> Prompt:
        self._check_text([record.question])
        images = tuple(resolve_image(name, roots) for name in self.image_names(record))
        text = render(self.processor, messages_of([Message("human", record.question)], len(images)), to_answer=True)
        return Prompt((), tuple(self._fitting(text, [image_size(path) for path in images])), images, text)

    def asked(
        self, earlier: Sequence[Turn], question: str, images: list[Image.Image]
    ) -> tuple[list[int], dict[str, Tensor]]:
        self._check_text([question])
        text = render(self.processor, messages_of([*earlier, Message("human", question)], len(images)), to_answer=True)
        self._fitting(text, [image.size for image in images])
        inputs = self._processed([text], [images], "left")
        return inputs["input_ids"][0].tolist(), inputs

    def _fitting(self, text: str, sizes: Sequence[Size]) -> list[int]:
        ids = self._ids(text, sizes)
        if len(ids) > self.max_length:
            raise ValueError(f"it takes {len(ids)} positions, more than data.max_length = {self.max_length}")
        return ids

    def answer_ids(self, question: str, images: int, answer: str) -> tuple[int, ...]:
        self._check_text([question, answer])
        messages = messages_of([Message("human", question), Message("gpt", answer)], images)
        text, [(start, stop)] = self._training_chat(messages)
        prompt, whole = (
            self.processor.tokenizer(part, add_special_tokens=False).input_ids for part in (text[:start], text[:stop])
        )
        if whole[: len(prompt)] == prompt:
            return tuple(whole[len(prompt) :])
        # The answer's first letters joined the prompt's last token, which the model is given as it is.
        return tuple(self.tokenizer.encode(text[start:stop]))

    def answering_batch(self, prompts: Sequence[Prompt], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """A left-padded batch of whole prompts, their ids included: the processor makes both."""
        return self._processed([prompt.text for prompt in prompts], images, "left")

    # --- the processor ---

    def _chat(self, record: TrainingRecord) -> Chat:
        self._check_text(turn.text for turn in record.turns)
        return self._training_chat(messages_of(record.turns, len(self.image_names(record))))

    def _training_chat(self, messages: Sequence[dict[str, Any]]) -> Chat:
        ends = self.processor.tokenizer.convert_ids_to_tokens(list(self.end_ids))
        return training_chat(self.processor, messages, ends, self.processor.tokenizer.eos_token)

    def _check_text(self, texts: Iterable[str]) -> None:
        """Refuse what would not be read as text; `<image>` is the records' own mark, and never text."""
        for text in texts:
            if token := self._control_tokens.search(text.replace(IMAGE, "")):
                raise ValueError(f"the text spells out {token[0]!r}, which the model takes for a control token")

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        tokens = [str(token) for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def _processed(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], padding_side: str, **options: Any
    ) -> dict[str, Any]:
        """What the processor makes of a batch; `images` of each text."""
        inputs = self.processor(
            text=list(texts),
            images=[list(own) for own in images] if any(images) else None,
            add_special_tokens=self._adds_special(texts[0]),
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
            **options,
        )
        return dict(inputs)

    def _ids(self, text: str, sizes: Sequence[Size]) -> list[int]:
        """Ids of a text with images of these sizes, as the processor gives them; no image is needed."""
        first, *parts = text.split(self.processor.image_token)
        if len(parts) != len(sizes):
            raise ValueError(f"the model's chat template has {len(parts)} places for {len(sizes)} images")
        expanded = first + "".join(self._replacement(size) + part for size, part in zip(sizes, parts, strict=True))
        return list(self.processor.tokenizer(expanded, add_special_tokens=self._adds_special(text)).input_ids)

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer adds its special tokens: not where the template has written the first of them."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _replacement(self, size: Size) -> str:
        """The text that stands for an image of a size: found by handing the processor a blank one."""
        if size not in self._replacements:
            inputs = self.processor(
                text=[self.processor.image_token],
                images=[[Image.new("RGB", size)]],
                return_text_replacement_offsets=True,
                return_tensors="pt",
            )
            self._replacements[size] = inputs["text_replacement_offsets"][0][0]["replacement"]
        return self._replacements[size]

    def _check_cut(self, ids: Sequence[int]) -> None:
        beyond = set(ids[self.max_length :])
        if beyond & set(self.processor.image_token_ids):
            raise ValueError(
                f"an image ends past data.max_length = {self.max_length}, of {len(ids)} positions; raise it, or use "
                "data.images=first"
            )


_BY_POSITION = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")


def _moved(spans: Sequence[Span], replaced: Sequence[dict[str, Any]]) -> list[Span]:
    """Spans of a text once its placeholders have been replaced by what stands for their images."""
    ends = [part["span"][1] for part in replaced]
    gained = [0, *(part["new_span"][1] - part["span"][1] for part in replaced)]

    def move(position: int) -> int:
        return position + gained[bisect_right(ends, position)]

    return [(move(start), move(stop)) for start, stop in spans]
