"""The template: golden ids and labels, and what cannot be held by it."""

import json
from typing import NamedTuple

import pytest

from mslora_cr.data.prompts import (
    IGNORE_INDEX,
    IMAGE_INDEX,
    Encoded,
    encode_conversation,
    encode_prompt,
    expand_images,
    generation_prompt,
    question_text,
)
from mslora_cr.data.records import TrainingRecords
from mslora_cr.data.tokenizer import Tokenizer
from tests.conftest import GOLDEN


class Said(NamedTuple):
    speaker: str
    text: str


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "llava_med_tiny")


GOLDEN_IDS = json.loads((GOLDEN / "tokenization.json").read_text())
RECORDS = {record.id: record for record in TrainingRecords(GOLDEN / "conversations.json")}


def test_golden_covers_the_awkward_records() -> None:
    assert [item["id"] for item in GOLDEN_IDS["supervised"]] == list(RECORDS)
    assert {"a-multi", "a-image-last", "a-gpt-first", "a-unicode", "a-spaces", "a-text-only", "a-inst-in-answer"} < {
        *RECORDS
    }


@pytest.mark.parametrize("golden", GOLDEN_IDS["supervised"], ids=lambda item: item["id"])
def test_ids_and_labels_of_a_conversation_are_the_golden_ones(golden: dict, tokenizer: Tokenizer) -> None:
    record = RECORDS[golden["id"]]
    encoded = encode_conversation(tokenizer, record.turns, len(record.images))
    assert encoded.input_ids == golden["input_ids"]
    assert encoded.labels == golden["labels"]


@pytest.mark.parametrize("golden", GOLDEN_IDS["prompts"], ids=lambda item: item["id"])
def test_generation_prompts_are_the_golden_ones(golden: dict, tokenizer: Tokenizer) -> None:
    record = RECORDS[golden["id"]]
    prompt = generation_prompt(record.turns[0].text)  # the published evaluation always shows an image
    assert prompt == golden["prompt"]
    assert encode_prompt(tokenizer, prompt) == golden["input_ids"]


def test_the_image_comes_first_wherever_its_mark_stood() -> None:
    assert question_text("What is <image> this?", 1) == "<image>\nWhat is  this?"
    assert question_text("What is this?\n<image>", 1) == question_text("What is this?", 1) == "<image>\nWhat is this?"
    assert question_text("<image>\nWhich?", 2) == "<image>\n<image>\nWhich?"
    assert question_text("Which?", 0) == "Which?"


def test_labels_cover_the_answers_of_every_round_and_nothing_else(tokenizer: Tokenizer) -> None:
    turns = [Said("human", "<image>\nOne?"), Said("gpt", "First."), Said("human", "Two?"), Said("gpt", "Second.")]
    encoded = encode_conversation(tokenizer, turns, 1)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids.count(tokenizer.eos_token_id) == 2
    learned = [token for token, label in zip(*encoded, strict=True) if label != IGNORE_INDEX]
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(*encoded, strict=True))
    ends = [index for index, token in enumerate(learned) if token == tokenizer.eos_token_id]
    texts = tokenizer.decode([learned[: ends[0]], learned[ends[0] + 1 :]])
    assert texts == ["First.", "Second."]


ASK, SAY = Said("human", "<image>\nIs it?"), Said("gpt", "yes")
UNCLEAR = {
    "the answer closes the question": [ASK, Said("gpt", "no [/INST] yes")],
    "the question closes itself": [Said("human", "<image>\nIs [/INST] it?"), SAY],
    "the answer ends the text": [ASK, Said("gpt", "yes</s>no")],
    "a question without an answer": [ASK, SAY, Said("human", "And?")],
    "two questions": [ASK, ASK],
    "two answers": [ASK, SAY, SAY, SAY],
    "only an answer": [SAY],
}


@pytest.mark.parametrize("turns", UNCLEAR.values(), ids=UNCLEAR)
def test_what_the_template_cannot_hold_adds_nothing_to_the_loss(turns: list[Said], tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(tokenizer, turns, 1)
    assert set(encoded.labels) == {IGNORE_INDEX}
    assert len(encoded.labels) == len(encoded.input_ids)


def test_a_nul_character_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="NUL character"):
        encode_prompt(tokenizer, "What is\0this?")
    with pytest.raises(ValueError, match="NUL character"):
        encode_conversation(tokenizer, [ASK, Said("gpt", "a\0b")], 1)


def test_an_image_becomes_its_patches_and_the_end_is_cut() -> None:
    encoded = Encoded([1, IMAGE_INDEX, 7, 8, 9], [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 8, 9])
    whole = expand_images(encoded, image_token_id=3, patches=4, max_length=100)
    assert whole == ([1, 3, 3, 3, 3, 7, 8, 9], [IGNORE_INDEX] * 6 + [8, 9])
    cut = expand_images(encoded, 3, 4, max_length=7)
    assert cut == ([1, 3, 3, 3, 3, 7, 8], [IGNORE_INDEX] * 6 + [8])
    assert expand_images(encoded, 3, 4, max_length=5).input_ids == [1, 3, 3, 3, 3]
    with pytest.raises(ValueError, match=r"an image ends at position 5, past data\.max_length = 4"):
        expand_images(encoded, 3, 4, max_length=4)
