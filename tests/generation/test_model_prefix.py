"""Shared openings of models with a processor of their own: the ids of whole prompts, one by one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mslora_cr.data.input_processor import Prompt
from mslora_cr.data.records import TestRecord
from mslora_cr.generation import exactness
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.copied_prefix import CopyingDecoder
from mslora_cr.generation.cuda_graphs import StaticSteps
from mslora_cr.generation.hf_decoder import PlainDecoder
from mslora_cr.generation.model_prefix import ModelPrefixDecoder
from mslora_cr.generation.prefix_decoder import Stopping
from mslora_cr.generation.run import decoder_of
from mslora_cr.models.load import load_model
from mslora_cr.models.processor_base import ProcessorBase
from tests.conftest import first_in_make_test, once
from tests.helpers.families import FAMILIES, make

EVERY = first_in_make_test(*sorted(FAMILIES, key=lambda family: family not in ("gemma3", "qwen2_5_vl")), first=2)
"""Windows by layer type, and positions in three parts, in `make test`; the others in `make test-all`."""
TEXTS = ("is this a cell?", "what does the picture show?", "left or right?", "is the skin normal or a lesion?", "a?")
NEW_TOKENS = 5


@pytest.fixture(scope="session")
def sharpened(shared_tmp: Path) -> Callable[[str], ProcessorBase]:
    """A family's tiny model with larger weights, so that answers differ by question and image."""
    (shared_tmp / "families").mkdir(exist_ok=True)

    def of(family: str) -> ProcessorBase:
        base = load_model(
            once(shared_tmp / "families" / family, lambda place: make(family, place)), dtype=torch.float32
        )
        assert isinstance(base, ProcessorBase)
        with torch.no_grad():
            for module in base.model.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
                    module.weight.mul_(6)
        return base

    return of


def questions(place: Path) -> list[TestRecord]:
    """Questions about three images, and about two of them together."""
    for width, height in ((40, 50), (110, 45), (30, 90)):
        Image.effect_noise((width, height), 90).convert("RGB").save(place / f"{width}.png")
    images = [["40.png"]] * 4 + [["110.png"]] * 4 + [["30.png"]] + [["40.png", "110.png"]] * 3
    return [
        TestRecord.model_validate(
            {"question_id": 1, "image": paths, "text": TEXTS[number % 5], "gt": "x", "answer_type": "OPEN"}
        )
        for number, paths in enumerate(images)
    ]


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("kind", [ModelPrefixDecoder, CopyingDecoder], ids=["shared", "copied"])
def test_ids_and_scores_are_those_of_whole_prompts(
    family: str,
    kind: type[ModelPrefixDecoder],
    sharpened: Callable[[str], ProcessorBase],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = sharpened(family)
    inputs, records = base.input_processor(4096, True), questions(tmp_path)
    prompts = [inputs.prompt(record, [tmp_path]) for record in records]
    images = [inputs.load_images(record.images, [tmp_path]) for record in records]
    padding = inputs.tokenizer.pad_token_id
    plain = PlainDecoder(base.model, prompts, Stopping(frozenset(inputs.end_ids), padding, NEW_TOKENS))
    continuations = [[(5, 6), (7,)], [(8,)]]
    wanted, scores = [], []
    for number, prompt in enumerate(prompts):
        whole = plain.inputs_on_device(inputs.answering_batch([prompt], [images[number]]))
        wanted += plain.answer(whole, [number])
        scores += plain.log_probabilities(whole, [number], continuations[:1])
    assert len(set(map(tuple, wanted))) > 1, "answers differ"

    monkeypatch.setattr(exactness, "caches_keys_alone", lambda _: kind is ModelPrefixDecoder)
    decoder = decoder_of(inputs, base.model, prompts, NEW_TOKENS)
    assert type(decoder) is kind
    found: dict[int, list[int]] = {}
    groups = grouped(prompts, range(len(prompts)), lambda _: None)
    assert max(len(group.questions) for group in groups) == 4
    for wave in in_waves(groups, prompts, Limits(6, NEW_TOKENS, 1 << 20)):
        first = [group.questions[0] for group in wave.groups]
        batch = inputs.answering_batch([prompts[question] for question in first], [images[q] for q in first])
        openings = decoder.read(wave, batch)
        for part in wave.batches:
            found |= zip(part, decoder.answer(openings, part), strict=True)
            if kind is ModelPrefixDecoder:  # The same in buffers of fixed sizes, as a graph needs them.
                decoder.steps = StaticSteps(record=False)
                assert decoder.answer(openings, part, StaticSteps.BATCHES) == [found[number] for number in part]
                decoder.steps = None
            found_scores = decoder.log_probabilities(openings, part, [continuations[0]] * len(part))
            for question, each in zip(part, found_scores, strict=True):
                for ours, theirs in zip(each, scores[question], strict=True):
                    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-3)
    assert [found[number] for number in range(len(prompts))] == wanted


def test_what_is_inexact_answers_whole_prompts(
    sharpened: Callable[[str], ProcessorBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sharpened("qwen2_5_vl")
    inputs = base.input_processor(4096, True)
    assert exactness.exact_decoder(base.model, inputs) is ModelPrefixDecoder
    read = ModelPrefixDecoder._read

    def shifted(self: ModelPrefixDecoder, *arguments: object) -> object:
        opening = read(self, *arguments)  # type: ignore[arg-type]
        opening.following.add_(1)
        return opening

    monkeypatch.setattr(ModelPrefixDecoder, "_read", shifted)
    other = sharpened("qwen2_5_vl")
    assert exactness.exact_decoder(other.model, inputs) is None
    image = Path("image.png")
    prompts = [Prompt((1, 2), (3, number), (image,)) for number in (4, 5)]
    decoder = decoder_of(inputs, other.model, prompts, NEW_TOKENS)
    assert isinstance(decoder, PlainDecoder)
    assert [prompt.rest for prompt in decoder.prompts] == [(1, 2, 3, 4), (1, 2, 3, 5)]
