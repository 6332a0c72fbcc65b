"""What is learned of a conversation, compared with TRL's `assistant_only_loss` in every family that both have.

TRL calls `apply_chat_template(..., return_assistant_tokens_mask=True)` with a template of its own in which the answers are
marked (`SFTTrainer` and its collator of images). Its templates are read from its package; its code is not run.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mslora_cr.data.images import load_image
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.data.records import TrainingRecord
from mslora_cr.models.load import load_model
from mslora_cr.models.processor_base import ProcessorBase
from tests.helpers.families import make
from tests.helpers.real_data import TEST_DATA, real

ENDS = {
    "gemma3": "<end_of_turn>",
    "idefics3": "<end_of_utterance>",
    "llava_next": "</s>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
"""What ends an answer in the families that TRL has templates for, and so the last that is learned of it here."""
ALSO_LEARNED = dict.fromkeys(ENDS, "\n") | {"llava_next": ""}
"""What TRL learns behind it."""
TEXTS = ("is this a cell?", "yes it is", "what does the other picture show?", "a lesion, right")


@pytest.mark.parametrize("family", ENDS)
def test_ids_are_those_of_trl_and_masks_but_for_the_line_break_behind_an_answer(family: str, tmp_path: Path) -> None:
    """A conversation of one turn and one of two, an image in each question, in one batch."""
    templates = real(TEST_DATA / "trl" / "chat_templates")
    make(family, tmp_path / "model")
    base = load_model(tmp_path / "model", dtype=torch.float32)
    assert isinstance(base, ProcessorBase)
    processor, input_processor = base.processor, base.input_processor(2048, True)
    if family == "idefics3":
        processor.tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})  # TRL's template begins with it
    processor.chat_template = (templates / f"{family}.jinja").read_text(encoding="utf-8")
    images = ["small.png", "wide.png"]
    for name, size in zip(images, ((40, 50), (110, 45)), strict=True):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / name)

    turns = [
        {"from": ("human", "gpt")[index % 2], "value": text if index % 2 else f"<image>\n{text}"}
        for index, text in enumerate(TEXTS)
    ]
    records = [
        TrainingRecord.model_validate({"id": count, "image": images[:count], "conversations": turns[: 2 * count]})
        for count in (1, 2)
    ]
    ours = input_processor.batch(
        [input_processor.sample(index, record, [tmp_path]) for index, record in enumerate(records)]
    )

    image_parts = [{"type": "image", "image": load_image(tmp_path / name)} for name in images]
    messages = [
        {
            "role": ("user", "assistant")[index % 2],
            "content": [*([] if index % 2 else [image_parts[index // 2]]), {"type": "text", "text": text}],
        }
        for index, text in enumerate(TEXTS)
    ]
    theirs = processor.apply_chat_template(
        [messages[:2], messages],
        chat_template=(templates / f"{family}_training.jinja").read_text(encoding="utf-8"),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right", "add_special_tokens": False},
    )

    masks = theirs.pop("assistant_masks") * theirs["attention_mask"]
    assert ours.keys() == {*theirs.keys(), "labels", "record_index"}
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    more = ALSO_LEARNED[family]
    for row, ids in enumerate(ours["input_ids"]):
        learned = spans(ours["labels"][row] != IGNORE_INDEX)
        assert len(learned) == row + 1
        assert spans(masks[row] == 1) == [(start, stop + len(more)) for start, stop in learned]
        for index, (start, stop) in enumerate(learned):
            answer = processor.tokenizer.decode(ids[start:stop])
            assert answer.strip() == TEXTS[2 * index + 1] + ENDS[family]
            assert processor.tokenizer.decode(ids[stop : stop + len(more)]) == more


def spans(inside: torch.Tensor) -> list[tuple[int, int]]:
    """First position of every run, and the one behind its last."""
    edge = torch.zeros(1, dtype=torch.int64)
    steps = torch.diff(inside.long(), prepend=edge, append=edge)
    starts, stops = (torch.nonzero(steps == step)[:, 0].tolist() for step in (1, -1))
    return list(zip(starts, stops, strict=True))
