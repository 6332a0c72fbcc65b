"""Records with reasoning under chat templates that open, add or strip thoughts."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mslora_cr.data.answers.reasoning import final_answer
from mslora_cr.data.chat import messages_of, render, training_chat
from mslora_cr.data.prompts import Message
from mslora_cr.data.tokenizer import ProcessorTokenizer
from tests.helpers.real_data import TEST_DATA, real

STRIPPING = (
    "{% for message in messages %}{{ '<' + message.role + '>' }}{% for part in message.content %}"
    "{{ part.text.split('</think>')[-1].strip() }}{% endfor %}{% if message.role == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant><think>\\n' }}{% endif %}"
)
"""As DeepSeek-R1's: every thought is dropped, also the last answer's, and the prompt opens one."""
ENDS = ["<|im_end|>", "</s>", "<|user|>"]


def template(name: str) -> str:
    return (real(TEST_DATA / "trl" / "chat_templates") / f"{name}.jinja").read_text(encoding="utf-8")


def processor_with(chat_template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), bos_token="<s>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.mark.parametrize(
    ("name", "texts", "learned"),
    [
        ("stripping", ["<think>why</think>\nB"], ["why</think>\nB</s>"]),
        ("stripping", ["B"], ["\n</think>\n\nB</s>"]),
        ("stripping", ["A", "<think>why</think>B"], ["A</s>", "why</think>B</s>"]),
        ("stripping", ["<think>w</think>A", "<think>why</think>B"], ["why</think>B</s>"]),
        ("qwen3_5_think", ["<think>why</think>B"], ["why\n</think>\n\nB<|im_end|>"]),
        ("qwen3_5_think", ["A", "B"], ["A<|im_end|>", "\n</think>\n\nB<|im_end|>"]),
        ("qwen3_5_nothink", ["<think>why</think>B"], ["<think>why</think>B<|im_end|>"]),
        ("qwen3_5_nothink", ["B"], ["B<|im_end|>"]),
        ("glm4moe", ["<think>why</think>B"], ["\n<think>why</think>\nB</s>"]),
        ("glm4moe", ["<think>w</think>A", "<think>why</think>B"], ["\n<think>why</think>\nB</s>"]),
        ("qwen3_vl", ["<think>w</think>A", "<answer>B</answer>"], ["<think>w</think>A<|im_end|>", "<answer>B</answer><|im_end|>"]),
    ],
)  # fmt: skip
def test_what_is_learned_is_generated_behind_the_prompt(name: str, texts: list[str], learned: list[str]) -> None:
    processor = processor_with(STRIPPING if name == "stripping" else template(name))
    turns = [turn for text in texts for turn in (Message("human", "q"), Message("gpt", text))]
    messages = messages_of(turns, 0)
    chat = training_chat(processor, messages, ENDS, "</s>")
    assert [chat.text[start:stop] for start, stop in chat.answers] == learned
    prompt = render(processor, messages[:-1], to_answer=True)
    assert chat.text.startswith(prompt) and chat.answers[-1][0] == len(prompt)
    answer = learned[-1].removesuffix("</s>").removesuffix("<|im_end|>")
    assert final_answer(answer).text.strip() == final_answer(texts[-1]).text


@pytest.mark.parametrize(
    "given",
    [
        STRIPPING.replace(".strip()", "|upper"),
        STRIPPING.replace("<think>\\n", "").replace(
            "{{ part.text", "{{ '' if message.role == 'assistant' else part.text"
        ),
        "{% for message in messages if message.role == 'user' %}{{ message.content[0].text }}{% endfor %}",
    ],
    ids=["changed", "dropped", "turn dropped"],
)
def test_a_template_that_does_not_write_answers_as_they_are_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="the conversation has no question"):
        render(processor_with(given), messages_of([Message("gpt", "b")], 0))
    with pytest.raises(ValueError, match="leaves out or changes an answer"):
        training_chat(processor_with(given), messages_of([Message("human", "q"), Message("gpt", "b")], 0), [], "</s>")


def test_marks_of_reasoning_are_text_though_a_tokenizer_calls_them_special() -> None:
    tokenizer = processor_with(STRIPPING)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<image>"]})
    tokenizer.add_tokens(["a", "b"])
    ids = tokenizer.convert_tokens_to_ids(["<think>", "a", "</think>", "<image>", "b"])
    assert final_answer(*ProcessorTokenizer(tokenizer).decode([ids])).text == "b"
