r"""Turns conversations into token IDs and label masks, in LLaVA-Med's Mistral-instruct template.

The template is `[INST] <image>\nquestion [/INST] answer </s>`, one such round after the other, after a single `<s>`.
Every chunk of text between two images is tokenised separately, as in LLaVA, so a chunk can start with a lone space
piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mslora_cr.data.answers.boxes import BoxRule, filled
from mslora_cr.data.records import IMAGE, TrainingRecord
from mslora_cr.data.tokenizer import Tokenizer

IGNORE_INDEX = -100
"""Label of positions that carry no loss; the value PyTorch's cross entropy ignores."""
IMAGE_INDEX = -200
"""Represents one whole image in IDs that are not yet expanded to its patches."""

_OPEN, _CLOSE = "[INST] ", " [/INST]"


class Turn(Protocol):
    """One utterance, such as a record's turn."""

    @property
    def speaker(self) -> str: ...
    @property
    def text(self) -> str: ...


class Message(NamedTuple):
    """A `Turn` that does not come from a record."""

    speaker: str
    text: str


def filled_turns(record: TrainingRecord, rule: BoxRule) -> list[Message]:
    """Return a conversation with its boxes as the model writes them."""
    texts = filled([turn.text for turn in record.turns], record, rule)
    return [Message(turn.speaker, text) for turn, text in zip(record.turns, texts, strict=True)]


class Encoded(NamedTuple):
    """Ids with `IMAGE_INDEX` for each image, and labels with `IGNORE_INDEX` outside the answers; equally long."""

    input_ids: list[int]
    labels: list[int]


def question_text(text: str, images: int) -> str:
    """Return the human's text with its image marks moved to the front, one `<image>` line for each of `images`."""
    return "\n".join([IMAGE] * images + [text.replace(IMAGE, "").strip()]).strip()


def generation_prompt(question: str, images: int = 1) -> str:
    """Return the prompt of a question, opened by `images` `<image>` marks."""
    return f"{_OPEN}{question_text(question, images)}{_CLOSE}"


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return token IDs of a prompt, starting with `<s>`, with `IMAGE_INDEX` in place of every `<image>`."""
    chunks = [_text_ids(tokenizer, chunk) for chunk in prompt.split(IMAGE)]
    ids = [tokenizer.bos_token_id, *chunks[0]]
    for chunk in chunks[1:]:
        ids += [IMAGE_INDEX, *chunk]
    return ids


def encode_next_prompt(tokenizer: Tokenizer, earlier: Sequence[Turn], question: str, images: int) -> list[int]:
    """Return IDs of a prompt that continues earlier questions and their answers, as training would encode the whole.

    Args:
        earlier: Questions and answers in turn; may be empty.
        images: The number of images of the conversation's first question.
    """
    if not earlier:
        return encode_prompt(tokenizer, generation_prompt(question, images))
    prompt = f"{_OPEN}{question_text(question, 0)}{_CLOSE}"
    return [*encode_conversation(tokenizer, earlier, images).input_ids, *encode_prompt(tokenizer, prompt)[1:]]


def encode_conversation(tokenizer: Tokenizer, turns: Sequence[Turn], images: int) -> Encoded:
    """Return IDs and labels of a training conversation; labels cover the answers and the `</s>` after each.

    A conversation that the template cannot represent unambiguously (`[/INST]` inside a text, a question without an
    answer) is masked as a whole, as in the published code, so that it adds nothing to the loss.
    """
    input_ids, labels = [tokenizer.bos_token_id], [IGNORE_INDEX]
    rounds, clean = _rounds(turns, images)
    for question, answer in rounds:
        # The trailing space of "[/INST] " becomes the first piece of the answer: the answer's labels begin one earlier.
        prefix = encode_prompt(tokenizer, f"{question} ")[1:-1]
        ids = [*encode_prompt(tokenizer, f"{question} {answer} ")[1:], tokenizer.eos_token_id]
        clean = clean and tokenizer.eos_token not in question + answer
        clean = clean and (question + " " + answer + " ").count(_CLOSE.strip() + " ") == 1
        input_ids += ids
        labels += [IGNORE_INDEX] * len(prefix) + ids[len(prefix) :]
    return Encoded(input_ids, labels if clean else [IGNORE_INDEX] * len(input_ids))


def _rounds(turns: Sequence[Turn], images: int) -> tuple[list[tuple[str, str]], bool]:
    """Return (question in its template, answer) pairs, and whether the turns alternated to the end.

    An answer before the first question is dropped, as in the published code. The first question has the images.
    """
    turns = turns[1:] if turns and turns[0].speaker != "human" else turns
    speakers = [turn.speaker for turn in turns]
    rounds = []
    for index in range(0, len(turns) - 1, 2):
        question = question_text(turns[index].text, images) if index == 0 else turns[index].text
        rounds.append((f"{_OPEN}{question}{_CLOSE}", turns[index + 1].text))
    return rounds, speakers == ["human", "gpt"] * len(rounds)


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    if "\0" in text:
        raise ValueError("the text contains a NUL character, whose piece represents image patches; remove it")
    return tokenizer.encode(text)


def expand_images(encoded: Encoded, image_token_id: int, patches: int, max_length: int) -> Encoded:
    """Replace each `IMAGE_INDEX` by `patches` placeholders, then cut at `max_length` positions.

    Raises:
        ValueError: The cut would go through an image.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for token, label in zip(*encoded, strict=True):
        if token != IMAGE_INDEX:
            input_ids.append(token)
            labels.append(label)
            continue
        input_ids += [image_token_id] * patches
        labels += [IGNORE_INDEX] * patches
        if len(input_ids) > max_length:
            raise ValueError(
                f"an image ends at position {len(input_ids)}, past data.max_length = {max_length}; raise it, or use "
                "data.images=first"
            )
    return Encoded(input_ids[:max_length], labels[:max_length])
