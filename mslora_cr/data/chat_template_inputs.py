"""Turns records into the inputs of any image-text model by the model's own processor and chat template: transformers'
`AutoProcessor`.

Ids, label mask and images are those that the processor makes of a whole conversation; nothing here knows a model.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor

from mslora_cr.data.answers.boxes import BoxRule, filled, rule_of
from mslora_cr.data.answers.reasoning import MARKS
from mslora_cr.data.chat import Chat, Span, aligned, messages_of, render, training_chat
from mslora_cr.data.features import MODEL_INPUT, EncodedImage, FeatureCache, together
from mslora_cr.data.images import image_size, load_image, paths_of, resolve_image
from mslora_cr.data.input_processor import Collate, LabelCount, Prompt
from mslora_cr.data.prompts import IGNORE_INDEX, Message, Turn, filled_turns
from mslora_cr.data.records import IMAGE, TestRecord, TrainingRecord, shown_images
from mslora_cr.data.tokenizer import ProcessorTokenizer

Size = tuple[int, int]
"""Width and height."""
SplitIds = tuple[tuple[int, ...], tuple[int, ...]]
"""Ids up to the last image, and the ids after it."""
Picture = Image.Image | EncodedImage


def takes_answers_apart(processor: Any) -> bool:
    """Return whether a processor takes the answer apart from its prompt, and marks it: the prompt's tokens then see
    each other, and the answer's those before them (PaliGemma)."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


class NoImageError(ValueError):
    """A processor takes no conversation without an image."""


class ChatSample(TypedDict):
    """A conversation that is not yet tokenised. `index` is the record's position in its file."""

    index: int
    text: str
    answers: tuple[Span, ...]
    images: Sequence[Picture]


@dataclass(frozen=True)
class ChatTemplateInputs:
    """The `InputProcessor` of a model with a processor."""

    processor: Any
    end_ids: tuple[int, ...]
    """Return the ids that end an answer."""
    max_length: int = 2048
    all_images: bool = False
    features: FeatureCache | None = None
    """The store of images' features, if the model takes them instead of pixels."""
    _openings: dict[tuple[str, tuple[Size, ...]], tuple[int, ...] | None] = field(default_factory=dict)
    """Return the ids up to the last image, by the text up to there and the images' sizes; None where the processor's
    ids after the image differ from those of the text after it."""

    @cached_property
    def tokenizer(self) -> ProcessorTokenizer:
        return ProcessorTokenizer(self.processor.tokenizer)

    @property
    def shares_openings(self) -> bool:
        return False

    def image_names(self, record: TrainingRecord | TestRecord) -> tuple[str, ...]:
        """As `shown_images`."""
        return shown_images(record, self.all_images)

    def image_paths(self, records: Iterable[TrainingRecord | TestRecord], roots: Sequence[Path]) -> list[Path]:
        """As `paths_of`."""
        return paths_of([self.image_names(record) for record in records], roots)

    def load_images(self, names: Sequence[str], roots: Sequence[Path]) -> list[Picture]:
        """Decode the images, in RGB; or read their features, where these are cached."""
        paths = [resolve_image(name, roots) for name in names]
        if self.features is not None:
            return [EncodedImage(image_size(path), self.features.load(path)) for path in paths]
        return [load_image(path) for path in paths]

    def process_images(self, images: Sequence[Image.Image]) -> list[Picture]:
        return list(images)

    # --- training ---

    def sample(self, index: int, record: TrainingRecord, roots: Sequence[Path]) -> ChatSample:
        chat = self._chat(record)
        images = self.load_images(self.image_names(record), roots)
        self._check_cut(*self._conversation(chat, [image.size for image in images]))
        return ChatSample(index=index, text=chat.text, answers=chat.answers, images=images)

    def length(self, record: TrainingRecord, roots: Sequence[Path]) -> int:
        sizes = [image_size(resolve_image(name, roots)) for name in self.image_names(record)]
        opening, rest = self._conversation(self._chat(record), sizes)
        self._check_cut(opening, rest)
        return min(len(opening) + len(rest), self.max_length)

    def count_labels(self, record: TrainingRecord, roots: Sequence[Path]) -> LabelCount:
        chat = self._chat(record)
        sizes = [image_size(resolve_image(name, roots)) for name in self.image_names(record)]
        opening, rest = self._conversation(chat, sizes)
        self._check_cut(opening, rest)
        ids = [*opening, *rest]
        labels = self._learned(ChatSample(index=0, text=chat.text, answers=chat.answers, images=[]), ids)
        return LabelCount(len(labels), sum(position < self.max_length for position in labels), len(ids))

    def padding_sample(self, sample: ChatSample, index: int) -> ChatSample:
        return {**sample, "index": index, "answers": ()}

    def collator(self, multiple: int = 1) -> Collate:
        return partial(self.batch, multiple=multiple)

    def batch(self, samples: Sequence[ChatSample], multiple: int = 1) -> dict[str, Tensor]:
        """Build a right-padded batch, cut at `max_length`; a token has a label wherever a part of an answer is in it.

        Raises:
            ValueError: The processor rewrites a conversation, so that its answers are not found in its ids.
        """
        texts, answers = zip(*(self._parts(sample["text"], sample["answers"]) for sample in samples), strict=True)
        options: dict[str, Any] = {"pad_to_multiple_of": multiple} if multiple > 1 else {}
        options |= {"suffix": list(answers)} if self._answers_apart else {}
        inputs = self._processed(texts, [sample["images"] for sample in samples], "right", **options)
        labels = torch.full_like(inputs["input_ids"], IGNORE_INDEX)
        for row, sample in enumerate(samples):
            ids = inputs["input_ids"][row, : int(inputs["attention_mask"][row].sum())]
            learned = torch.tensor(self._learned(sample, ids.tolist()), dtype=torch.long)
            labels[row, learned] = ids[learned]
        full = inputs["input_ids"].shape
        cut = {
            name: value[:, : self.max_length] if name in BY_POSITION and value.shape[:2] == full else value
            for name, value in {**inputs, "labels": labels}.items()
        }
        return {**cut, "record_index": torch.tensor([sample["index"] for sample in samples])}

    def _learned(self, sample: ChatSample, ids: Sequence[int]) -> list[int]:
        """Return the positions of a sample's answers in the processor's ids.

        The text is tokenised once more with its placeholders; what stands between them is searched for in `ids`. An
        answer that the processor takes apart ends them.
        """
        if self._answers_apart:
            answer = self._parts(sample["text"], sample["answers"])[1] + self.processor.tokenizer.eos_token
            ending = self.tokenizer.encode(answer)
            if list(ids[len(ids) - len(ending) :]) != ending:
                raise ValueError(f"{type(self.processor).__name__} does not end a conversation with its answer")
            return list(range(len(ids) - len(ending), len(ids))) if sample["answers"] else []
        text = self._tokenized(sample["text"], return_offsets_mapping=True)
        inside = [
            any(first < stop and last > start for start, stop in sample["answers"])
            for first, last in text["offset_mapping"]
        ]
        bos = self.processor.tokenizer.bos_token_id
        added = int(bos is not None and text["input_ids"][:1] != [bos] == list(ids[:1]))  # by the processor itself
        pairs = aligned(text["input_ids"], ids[added:], self._image_id)
        moved = {position: added + index for position, index in pairs}
        learned = [moved[position] for position, answer in enumerate(inside) if answer and position in moved]
        if len(learned) != sum(inside):
            raise ValueError(
                f"{type(self.processor).__name__} rewrites the conversation, so that the tokens of its answers "
                "cannot be found; this model cannot be trained"
            )
        return learned

    @cached_property
    def _answers_apart(self) -> bool:
        return takes_answers_apart(self.processor)

    def _parts(self, text: str, answers: Sequence[Span]) -> tuple[str, str]:
        """Return a conversation's text, and its answer without the token that ends it if the processor takes it apart.

        Raises:
            ValueError: Such a conversation has several answers.
        """
        if not (self._answers_apart and answers):
            return text, ""
        if len(answers) > 1 or answers[0][1] != len(text):
            raise ValueError(
                f"{type(self.processor).__name__} takes conversations of one question and its answer alone"
            )
        return text[: answers[0][0]], text[answers[0][0] :].removesuffix(self.processor.tokenizer.eos_token)

    def _conversation(self, chat: Chat, sizes: Sequence[Size]) -> SplitIds:
        """As `split_ids`, for a conversation with its answers."""
        text, answer = self._parts(chat.text, chat.answers)
        if not self._answers_apart:
            return self.split_ids(text, sizes)
        return (), self._whole(text, sizes, suffix=[answer])

    # --- answering ---

    def prompt(self, record: TestRecord, roots: Sequence[Path]) -> Prompt:
        text, images = self._question(record, roots)
        opening, rest = self._fitting(text, [image_size(path) for path in images])
        return Prompt(opening, rest, images, text)

    def prompt_length(self, record: TestRecord, roots: Sequence[Path]) -> int:
        text, images = self._question(record, roots)
        opening, rest = self.split_ids(text, [image_size(path) for path in images])
        return len(opening) + len(rest)

    def _question(self, record: TestRecord, roots: Sequence[Path]) -> tuple[str, tuple[Path, ...]]:
        """Return a question's prompt and its images."""
        [question] = filled([record.question], record, self.box_rule)
        self._check_text([question])
        images = tuple(resolve_image(name, roots) for name in self.image_names(record))
        messages = messages_of([Message("human", question)], len(images))
        return render(self.processor, messages, to_answer=True), images

    def asked(
        self, earlier: Sequence[Turn], question: str, images: list[Picture]
    ) -> tuple[list[int], dict[str, Tensor]]:
        self._check_text([question])
        text = render(self.processor, messages_of([*earlier, Message("human", question)], len(images)), to_answer=True)
        self._fitting(text, [image.size for image in images])
        inputs = self._processed([text], [images], "left")
        return inputs["input_ids"][0].tolist(), inputs

    def _fitting(self, text: str, sizes: Sequence[Size]) -> SplitIds:
        opening, rest = self.split_ids(text, sizes)
        if (length := len(opening) + len(rest)) > self.max_length:
            raise ValueError(f"it takes {length} positions, more than data.max_length = {self.max_length}")
        return opening, rest

    def answer_ids(self, question: str, images: int, answer: str) -> tuple[int, ...]:
        self._check_text([question, answer])
        messages = messages_of([Message("human", question), Message("gpt", answer)], images)
        text, [(start, stop)] = self._training_chat(messages)
        if self._answers_apart:
            return tuple(self.tokenizer.encode(text[start:stop]))
        prompt, whole = (
            self.processor.tokenizer(part, add_special_tokens=False).input_ids for part in (text[:start], text[:stop])
        )
        if whole[: len(prompt)] == prompt:
            return tuple(whole[len(prompt) :])
        # The answer's first letters joined the prompt's last token, which the model is given as it is.
        return tuple(self.tokenizer.encode(text[start:stop]))

    def answering_batch(self, prompts: Sequence[Prompt], images: Sequence[Sequence[Picture]]) -> dict[str, Any]:
        """Build a left-padded batch of whole prompts, with their ids: the processor makes both."""
        return self._processed([prompt.text for prompt in prompts], images, "left")

    # --- the processor ---

    def _chat(self, record: TrainingRecord) -> Chat:
        turns = filled_turns(record, self.box_rule)
        self._check_text(turn.text for turn in turns)
        return self._training_chat(messages_of(turns, len(self.image_names(record))))

    @cached_property
    def box_rule(self) -> BoxRule:
        return rule_of(self.processor)

    def _training_chat(self, messages: Sequence[dict[str, Any]]) -> Chat:
        ends = self.processor.tokenizer.convert_ids_to_tokens(list(self.end_ids))
        return training_chat(self.processor, messages, ends, self.processor.tokenizer.eos_token)

    def _check_text(self, texts: Iterable[str]) -> None:
        """Refuse text that would not be read as text. `<image>` is the records' own marker, and never text."""
        for text in texts:
            if token := self._control_tokens.search(text.replace(IMAGE, "")):
                raise ValueError(f"the text spells out {token[0]!r}, which the model takes for a control token")

    @cached_property
    def _control_tokens(self) -> re.Pattern[str]:
        added = [token for token in self.processor.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = [str(token) for token in added if str(token) not in MARKS]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    def _processed(
        self, texts: Sequence[str], images: Sequence[Sequence[Picture]], padding_side: str, **options: Any
    ) -> dict[str, Any]:
        """Run the processor on a batch; `images` has the images of each text. Features take the place of pixels, and
        blank images of their sizes give the ids.

        Raises:
            NoImageError: No text has an image, and the processor needs one.
        """
        try:
            inputs = self.processor(
                text=list(texts),
                images=[list(map(_pixels, of_prompt)) for of_prompt in images] if any(images) else None,
                add_special_tokens=self._adds_special(texts[0]),
                padding=True,
                padding_side=padding_side,
                return_tensors="pt",
                **options,
            )
        except ValueError as error:
            if any(images):
                raise
            kind = type(self.processor).__name__
            raise NoImageError(f"{kind} takes no conversation without an image ({error})") from None
        inputs.pop("labels", None)  # Some processors label every token.
        given = [image.features for of_prompt in images for image in of_prompt if isinstance(image, EncodedImage)]
        if given:
            return {n: value for n, value in inputs.items() if not value.is_floating_point()} | {
                MODEL_INPUT: together(given)
            }
        # Some give numbers of 16 bits, which only a model of these reads.
        return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}

    def split_ids(self, text: str, sizes: Sequence[Size]) -> SplitIds:
        """Return the ids of a text with images of these sizes, as the processor gives them: up to the last image with
        everything that stands for it, and after it. Blank images stand in for the real ones. All ids count as after the
        image where the text cannot be cut."""
        if (placeholders := text.count(self.image_token)) != len(sizes):
            raise ValueError(f"the model's chat template has {placeholders} places for {len(sizes)} images")
        if not sizes:
            return (), self._whole(text, sizes)
        rest = self._behind_images(text)
        key = text[: text.rindex(self.image_token)], tuple(sizes)
        whole = None
        if key not in self._openings:
            whole = self._whole(text, sizes)
            self._openings[key] = whole[: -len(rest)] if rest and whole[-len(rest) :] == rest else None
        opening = self._openings[key]
        return (opening, rest) if opening is not None else ((), whole or self._whole(text, sizes))

    def _whole(self, text: str, sizes: Sequence[Size], **options: Any) -> tuple[int, ...]:
        inputs = self._processed([text], [[Image.new("RGB", size) for size in sizes]], "right", **options)
        return tuple(inputs["input_ids"][0].tolist())

    def _behind_images(self, text: str) -> tuple[int, ...]:
        ids = self._tokenized(text)["input_ids"]
        last = max((index for index, token in enumerate(ids) if token == self._image_id), default=len(ids) - 1)
        return tuple(ids[last + 1 :])

    def _tokenized(self, text: str, **options: Any) -> Any:
        return self.processor.tokenizer(text, add_special_tokens=self._adds_special(text), **options)

    @cached_property
    def image_token(self) -> str:
        """Return the text that the chat template writes for an image.

        Raises:
            ValueError: Neither processor nor tokenizer names one.
        """
        owners = (self.processor, self.processor.tokenizer)
        # Where a processor has both, templates write the placeholder.
        named = ((owner, name) for name in ("image_placeholder_token", "image_token") for owner in owners)
        token = next((value for owner, name in named if (value := getattr(owner, name, None))), None)
        if token is None:
            raise ValueError(f"{type(self.processor).__name__} names no token that stands for an image")
        return str(token)

    @cached_property
    def _image_id(self) -> int | None:
        ids = self.processor.tokenizer(self.image_token, add_special_tokens=False).input_ids
        return ids[0] if len(ids) == 1 else None

    def _adds_special(self, text: str) -> bool:
        """Return whether the tokenizer adds its special tokens: it does not where the template has written the first of
        them."""
        bos = self.processor.tokenizer.bos_token
        return not (bos and text.startswith(bos))

    def _check_cut(self, opening: Sequence[int], rest: Sequence[int]) -> None:
        if len(opening) > self.max_length:
            raise ValueError(
                f"an image ends past data.max_length = {self.max_length}, of {len(opening) + len(rest)} positions; "
                "raise it, or use data.images=first"
            )


def _pixels(image: Picture) -> Image.Image:
    return image if isinstance(image, Image.Image) else Image.new("RGB", image.size)


BY_POSITION = (
    *("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"),
    "cross_attention_mask",
)
"""The outputs of processors that have a row's positions as their second dimension."""
