"""Base models of further kinds: what they learn is what records say, and what cannot be a base is refused at once."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.io import load_bank, save_bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.prompts import IGNORE_INDEX
from mslora_cr.data.records import TestRecord, TrainingRecord
from mslora_cr.generation.copied_prefix import CopyingDecoder
from mslora_cr.generation.exactness import exact_decoder
from mslora_cr.generation.hf_decoder import PlainDecoder
from mslora_cr.generation.model_prefix import ModelPrefixDecoder
from mslora_cr.generation.prefix_decoder import Stopping
from mslora_cr.models.describe import summary
from mslora_cr.models.inspect import inspect
from mslora_cr.models.language import fused_experts, language_linears
from mslora_cr.models.layout import ModelError
from mslora_cr.models.load import load_model
from mslora_cr.models.processor_base import ProcessorBase
from mslora_cr.training.inputs import loss_mask
from tests.conftest import first_in_make_test
from tests.helpers.more_families import COPIED, MORE, REFUSED, make_more

EVERY = first_in_make_test(*(family for family in MORE if family != "paligemma"), first=2)


def record(images: list[str], *texts: str) -> TrainingRecord:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return TrainingRecord.model_validate({"id": 1, "image": images, "conversations": turns})


@pytest.mark.parametrize("family", EVERY)
def test_a_family_is_trained_on_its_answers_and_answers_exactly(family: str, tmp_path: Path) -> None:
    make_more(family, tmp_path / "model")
    base = load_model(tmp_path / "model", dtype=torch.float32)
    assert isinstance(base, ProcessorBase)
    for width, height in ((40, 50), (110, 45)):
        Image.effect_noise((width, height), 60).convert("RGB").save(tmp_path / f"{width}.png")
    inputs = base.input_processor(2048, True)
    records = [
        record(["40.png"], "<image>\nis this a cell?", "yes it is"),
        record(["110.png", "40.png"], "<image><image>\nwhat is it?", "a lesion", "left?", "no, right"),
        record([], "is the skin normal?", "no"),
    ]
    for one in records:
        batch = inputs.batch([inputs.sample(0, one, [tmp_path])])
        assert inputs.length(one, [tmp_path]) == batch.pop("attention_mask").sum()
        labels = batch["labels"][0]
        said = inputs.processor.tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=True)
        wanted = "".join(turn.text for turn in one.turns if turn.speaker == "gpt")
        assert said.replace(" ", "") == wanted.replace(" ", "")
    batch = inputs.batch([inputs.sample(index, one, [tmp_path]) for index, one in enumerate(records)])
    keep, targets = loss_mask(batch.pop("labels"))
    del batch["record_index"]
    with torch.no_grad():
        labelled = base.model(**batch, logits_to_keep=keep, labels=targets, shift_labels=targets, use_cache=False)
        whole = base.model(**batch, use_cache=False).logits[keep]
    torch.testing.assert_close(labelled.loss, torch.nn.functional.cross_entropy(whole, targets), rtol=1e-4, atol=1e-5)
    image = Image.open(tmp_path / "40.png").convert("RGB")
    features = base.image_encoder.features([[image], []], torch.device("cpu"))
    assert features[0].std() > 0 and not features[1].any()
    assert exact_decoder(base.model, inputs) is (CopyingDecoder if family in COPIED else ModelPrefixDecoder)


def test_an_answer_that_a_prefix_model_learns_is_the_one_that_it_scores(tmp_path: Path) -> None:
    """PaliGemma's question is read in both directions, and only its answer token by token."""
    make_more("paligemma", tmp_path)
    base = load_model(tmp_path, dtype=torch.float32)
    assert isinstance(base, ProcessorBase)
    for name, linear in language_linears(base.model).items():
        linear.weight.mul_(8 if name.endswith(("q_proj", "k_proj")) else 2)  # so that a wrong position shows
    Image.effect_noise((40, 50), 60).convert("RGB").save(tmp_path / "a.png")
    inputs = base.input_processor(2048, True)
    question, answer = "is this a cell?", "yes it is"
    one = record(["a.png"], f"<image>\n{question}", answer)
    batch = inputs.batch([inputs.sample(0, one, [tmp_path])])
    assert inputs.length(one, [tmp_path]) == batch["attention_mask"].sum()
    keep, targets = loss_mask(batch.pop("labels"))
    assert inputs.processor.tokenizer.decode(targets) == f"{answer}<eos>"
    assert inputs.count_labels(one, [tmp_path]).learned == len(targets)
    del batch["record_index"]
    with torch.no_grad():
        learned = base.model(**batch, logits_to_keep=keep, labels=targets, shift_labels=targets, use_cache=False).loss
    asked = TestRecord.model_validate(
        {"question_id": 1, "image": ["a.png"], "text": question, "gt": [answer], "answer_type": "OPEN"}
    )
    prompt = inputs.prompt(asked, [tmp_path])
    decoder = PlainDecoder(base.model, [prompt], Stopping(frozenset(inputs.end_ids), inputs.tokenizer.pad_token_id, 4))
    images = [inputs.load_images(["a.png"], [tmp_path])]
    read = decoder.inputs_on_device(inputs.answering_batch([prompt], images))
    fresh = decoder.log_probabilities(read, [0], [[inputs.answer_ids(question, 1, answer)]])
    decoder.answer(read, [0])
    answered = decoder.log_probabilities(read, [0], [[inputs.answer_ids(question, 1, answer)]])
    for scores in (fresh, answered):
        torch.testing.assert_close(torch.tensor(scores[0][0]).sum(), -learned * len(targets), rtol=0, atol=2e-5)
    for refused, why in (
        (record([], question, answer), "without an image"),
        (record(["a.png"], f"<image>\n{question}", answer, "left?", "no"), "one question"),
    ):
        with pytest.raises(ValueError, match=why):
            inputs.length(refused, [tmp_path])


@pytest.mark.parametrize("family", first_in_make_test("glm4v_moe", "ernie4_5_vl_moe"))
def test_a_mixtures_bank_is_read_as_it_was_saved(family: str, tmp_path: Path) -> None:
    make_more(family, tmp_path / "model")
    base = load_model(tmp_path / "model", dtype=torch.float32)
    linears = language_linears(base.model)
    assert fused_experts(base.model) and not any("expert" in name and "shared" not in name for name in linears)
    stack = BankStack(base.model, "merge")
    stack.add_trainable(4, 8.0)
    bank = stack.snapshot("task", 4, 8.0, {"base_model": {"architecture": stack.architecture}})
    save_bank(bank, tmp_path / "bank", 0.0, {})
    read = load_bank(tmp_path / "bank")
    assert isinstance(read, Bank) and read.matrices.keys() == linears.keys()
    assert all(read.matrices[name][0].equal(a) for name, (a, _) in bank.matrices.items())


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_a_base_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    make_more(family, tmp_path)
    for attempt in (load_model, inspect, summary):
        with pytest.raises(ModelError, match=REFUSED[family][1]) as caught:
            attempt(tmp_path)
        assert "\n" not in str(caught.value)
