"""Log-probabilities of answers and candidates are those that a forward pass over each whole text gives. In float32."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mslora_cr.banks.bank import Bank
from mslora_cr.banks.per_sample import PerSampleAdapters, QuestionBanks, whole_banks
from mslora_cr.data.datasets import EvalDataset
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.records import TestRecords
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.cuda_graphs import StaticSteps
from mslora_cr.generation.prefix_decoder import Decoder
from mslora_cr.generation.run import decoder_of, scored_batches
from mslora_cr.models.language import language_linears
from mslora_cr.models.llava_med import LlavaMed, load
from mslora_cr.models.load import load_model
from mslora_cr.serving.alone import answer_and_probability
from tests.conftest import GOLDEN, first_in_make_test
from tests.helpers.families import FAMILIES, make

IMAGES = sorted(f"images/{path.name}" for path in (GOLDEN / "images").glob("*.png"))
QUESTIONS = ["is this a cell?", "is there a lesion of the skin or none?", "what does the picture show?", "normal?"]
CANDIDATES = [["yes", "no"], ["left", "no lesion", "no lesion of the skin"], [], ["normal"]]
NEW_TOKENS = 6
TOLERANCE = 1e-5


def asked(folder: Path, repeats: int) -> TestRecords:
    """Each question about the first image and, `repeats` times, about images of its own."""
    rows = [
        {"question_id": f"{text} {place}", "image": [image], "text": text, "gt": "", "answer_type": "CLOSED"}
        for place, image in enumerate([IMAGES[0], *IMAGES[1 : 1 + repeats]])
        for text in (QUESTIONS if place == 0 else QUESTIONS[place - 1 : place])
    ]
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TestRecords(path)


def scored(
    base: object, samples: EvalDataset, batch: int, mixed: QuestionBanks | None = None, buffers: bool = False
) -> tuple[dict[int, list[list[int]]], dict[int, list[list[float]]]]:
    """By question, its answer's ids and its candidates', and the log-probability of each."""
    prompts, prepare = samples.prompts(), samples.input_processor
    decoder = decoder_of(prepare, base, prompts, NEW_TOKENS, mixed)
    if buffers:
        assert isinstance(decoder, Decoder)
        decoder.steps = StaticSteps(record=False)  # of fixed sizes, as a GPU's graph needs them
    banks = mixed.of if mixed is not None else lambda _: ()
    limits = Limits(batch, NEW_TOKENS, batch * (max(map(len, prompts)) + NEW_TOKENS))
    waves = in_waves(grouped(prompts, range(len(prompts)), banks), prompts, limits)
    wanted: dict[int, list[list[int]]] = {}

    def continuations(question: int, ids: Sequence[int]) -> list[list[int]]:
        record = samples.records[question]
        candidates = CANDIDATES[QUESTIONS.index(record.text)]
        wanted[question] = [list(ids), *(list(prepare.answer_ids(record.text, 1, text)) for text in candidates)]
        return wanted[question]

    found: dict[int, list[list[float]]] = {}
    for part in scored_batches(decoder, samples, waves, continuations):
        assert part.scores is not None
        found.update(zip(part.questions, part.scores, strict=True))
    return wanted, found


@pytest.fixture(scope="module")
def base() -> LlavaMed:
    return load(GOLDEN / "llava_med_tiny", dtype=torch.float32)


@torch.no_grad()
def brute_force(base: LlavaMed, samples: EvalDataset, question: int, tokens: Sequence[int]) -> list[float]:
    prompt = samples.prompts()[question]
    ids = torch.tensor([[*prompt.opening, *prompt.rest, *tokens]])
    logits = base.model(input_ids=ids, pixel_values=samples.load_images(question)).logits[0].log_softmax(-1)
    start = len(prompt) - 1
    return [float(logits[start + place, token]) for place, token in enumerate(tokens)]


@pytest.mark.parametrize(("batch", "window"), [(1, None), (3, None), (16, None), (3, 20)])
def test_each_is_that_of_one_forward_pass(
    base: LlavaMed, batch: int, window: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base.model.config.text_config, "sliding_window", window)
    prepare = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    samples = EvalDataset(asked(tmp_path, repeats=3), [GOLDEN], prepare)
    wanted, found = scored(base.model, samples, batch, buffers=window is None)
    assert len(found) == 7
    for question, several in wanted.items():
        assert [len(scores) for scores in found[question]] == [len(tokens) for tokens in several]
        for tokens, scores in zip(several, found[question], strict=True):
            assert scores == pytest.approx(brute_force(base, samples, question, tokens), abs=TOLERANCE)


def test_the_answer_and_what_continuations_share_is_read_once(
    base: LlavaMed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After answering, yes and no take two positions each, a tree one for each different beginning, the answer none."""
    prepare = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    samples = EvalDataset(asked(tmp_path, repeats=0), [GOLDEN], prepare)
    decoder = decoder_of(prepare, base.model, samples.prompts(), NEW_TOKENS)
    prompts = decoder.prompts
    [wave] = in_waves(grouped(prompts, range(4), lambda _: ()), prompts, Limits(4, NEW_TOKENS, 1000))
    pixels = prepare.answering_batch(prompts[:1], [samples.load_images(0)])
    openings = decoder.read(wave, pixels)
    answers = decoder.answer(openings, wave.batches[0])
    read: list[tuple[int, ...]] = []
    forward = base.model.forward
    monkeypatch.setattr(
        base.model, "forward", lambda **given: read.append(tuple(given["input_ids"].shape)) or forward(**given)
    )
    [yes, no] = [list(prepare.answer_ids("normal?", 1, text)) for text in ("yes", "no")]
    assert len(yes) == len(no) == 3 and yes[1:] == no[1:], "a word, a space and the end of the text"
    others = [[answer, yes, no] for answer in answers]
    decoder.log_probabilities(openings, wave.batches[0], others)
    decoder.log_probabilities(openings, wave.batches[0], [[answer] for answer in answers])
    tree = [[(7, 8, 9), (7, 8, 5, 9), (7, 6, 9), answer] for answer in answers]
    decoder.log_probabilities(openings, wave.batches[0], tree)
    assert read == [(4, 4), (4, 4)]


def test_each_row_is_scored_with_its_own_banks(base: LlavaMed, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = {layer: linear.weight.shape for layer, linear in language_linears(base.model).items()}
    matrices = {
        layer: (torch.randn(2, columns, generator=generator) * 0.3, torch.randn(rows, 2, generator=generator) * 0.3)
        for layer, (rows, columns) in shapes.items()
    }
    prepare = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    samples = EvalDataset(asked(tmp_path, repeats=2), [GOLDEN], prepare)
    adapters = PerSampleAdapters(base.model, [Bank("one", 2, 2, matrices)])
    try:
        mixed = QuestionBanks(adapters, whole_banks([[0] if place % 2 else [] for place in range(len(samples))], 1))
        wanted, found = scored(base.model, samples, 4, mixed)
        for question, several in wanted.items():
            mixed.choose([question])
            for tokens, scores in zip(several, found[question], strict=True):
                assert scores == pytest.approx(brute_force(base, samples, question, tokens), abs=TOLERANCE)
    finally:
        adapters.remove()


def test_an_answer_alone_comes_with_its_probability(base: LlavaMed, tmp_path: Path) -> None:
    prepare = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    samples = EvalDataset(asked(tmp_path, repeats=0), [GOLDEN], prepare)
    ids, inputs = prepare.asked([], QUESTIONS[0], samples.load_images(0))
    answer, confidence = answer_and_probability(prepare, base.model, ids, inputs, NEW_TOKENS)
    assert confidence == pytest.approx(math.exp(sum(brute_force(base, samples, 0, answer))), rel=1e-4)


@pytest.mark.parametrize("family", first_in_make_test(*FAMILIES))
def test_models_with_processors(family: str, tmp_path: Path) -> None:
    """Against the processor's own batch of prompt and continuation, one at a time."""
    make(family, tmp_path / "model")
    base = load_model(tmp_path / "model", dtype=torch.float32)
    samples = EvalDataset(asked(tmp_path, repeats=2), [GOLDEN], base.input_processor(2048, False))
    wanted, found = scored(base.model, samples, 3)
    prompts = samples.prompts()
    for question, several in wanted.items():
        inputs = samples.input_processor.answering_batch([prompts[question]], [samples.load_images(question)])
        length = inputs["input_ids"].shape[1]
        for tokens, scores in zip(several, found[question], strict=True):
            whole = {"input_ids": torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)}
            whole["attention_mask"] = torch.ones_like(whole["input_ids"])
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    whole[name] = torch.nn.functional.pad(inputs[name], (0, len(tokens)))
            with torch.no_grad():
                logits = base.model(**{**inputs, **whole}).logits[0].log_softmax(-1)
            expected = [float(logits[length - 1 + place, token]) for place, token in enumerate(tokens)]
            assert scores == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("family", first_in_make_test(*FAMILIES))
def test_a_candidate_is_encoded_as_training_encodes_an_answer(family: str, tmp_path: Path) -> None:
    make(family, tmp_path / "model")
    prepare = load_model(tmp_path / "model", dtype=torch.float32).input_processor(2048, False)
    ids = list(prepare.answer_ids("is this a cell?", 1, "no lesion"))
    assert ids[-1] in prepare.end_ids
    assert prepare.tokenizer.decode([ids]) == ["no lesion"]


def test_a_candidate_of_llava_med_continues_the_prompt(base: LlavaMed, tmp_path: Path) -> None:
    """Prompt and candidate together are the ids of a training conversation."""
    from mslora_cr.data.prompts import Message, encode_conversation, encode_prompt, generation_prompt

    prepare = LlavaMedInputs(base.tokenizer, base.image_processor, base.image_token_id, base.patches)
    prompt = encode_prompt(base.tokenizer, generation_prompt("is this a cell?", 1))
    turns = [Message("human", "is this a cell?"), Message("gpt", "no")]
    together = [*prompt, *prepare.answer_ids("is this a cell?", 1, "no")]
    assert together == encode_conversation(base.tokenizer, turns, 1).input_ids
