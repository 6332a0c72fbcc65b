"""Answers from shared openings are those that `generate` gives to whole prompts, one by one. In float32."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks.baselines import generated
from mslora_cr.banks.bank import Bank
from mslora_cr.banks.per_sample import PerSampleAdapters, QuestionBanks, whole_banks
from mslora_cr.data.datasets import EvalDataset
from mslora_cr.data.input_processor import Prompt
from mslora_cr.data.llava_med_inputs import LlavaMedInputs
from mslora_cr.data.records import TestRecords
from mslora_cr.generation.batching import Group, Limits, grouped, in_waves, padding_of, shared_out
from mslora_cr.generation.cuda_graphs import Shape, StaticRows, StaticSteps
from mslora_cr.generation.prefix_decoder import Decoder, Stopping
from mslora_cr.generation.run import scored_batches
from mslora_cr.models.language import language_linears
from mslora_cr.models.llava_med import LlavaMed, load
from mslora_cr.serving.alone import answer_and_probability
from tests.conftest import GOLDEN

IMAGES = sorted(f"images/{path.name}" for path in (GOLDEN / "images").glob("*.png"))
WORDS = [
    "is",
    "there",
    "any",
    "sign",
    "of",
    "disease",
    "in",
    "the",
    "left",
    "lung",
    "or",
    "none",
    "what",
    "colour",
    "shows",
    "this",
    "stain",
]
NEW_TOKENS = 10


@dataclass(frozen=True)
class Ends:
    eos_token_id: int
    pad_token_id: int = 0


@pytest.fixture(scope="module")
def base() -> LlavaMed:
    return load(GOLDEN / "llava_med_tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def questions(base: LlavaMed, tmp_path_factory: pytest.TempPathFactory) -> EvalDataset:
    """Five about one image, some about lists of two or three, one alone; of 1 to 20 words."""
    generator = torch.Generator().manual_seed(0)
    image_lists = [IMAGES[:1]] * 5 + [IMAGES[1:3]] * 3 + [IMAGES[2:3]] + [IMAGES[:3]] * 2 + [[IMAGES[3]]] * 2
    rows = []
    for number, images in enumerate(image_lists):
        count = int(torch.randint(1, 20, (), generator=generator))
        words = [WORDS[int(place)] for place in torch.randint(len(WORDS), (count,), generator=generator)]
        rows.append({"question_id": number, "image": images, "text": " ".join(words), "gt": "", "answer_type": "OPEN"})
    path = tmp_path_factory.mktemp("questions") / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    input_processor = LlavaMedInputs(
        base.tokenizer, base.image_processor, base.image_token_id, base.patches, all_images=True
    )
    return EvalDataset(TestRecords(path), [GOLDEN], input_processor)


@pytest.fixture(scope="module")
def one_by_one(base: LlavaMed, questions: EvalDataset) -> Callable[[Ends], list[list[int]]]:
    """What `generate` makes of each whole prompt; computed once for each sliding window."""
    endless: dict[int | None, list[list[int]]] = {}

    def answers(ends: Ends) -> list[list[int]]:
        window = base.model.config.text_config.sliding_window
        if window not in endless:
            endless[window] = []
            for index, prompt in enumerate(questions.prompts()):
                ids = [prompt.opening + prompt.rest]
                endless[window] += generated(base.model, ids, questions.load_images(index), Ends(-1), NEW_TOKENS)
        eos = ends.eos_token_id
        return [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in endless[window]]

    return answers


def shared(
    base: LlavaMed,
    questions: EvalDataset,
    ends: Ends,
    limits: Limits,
    mixed: QuestionBanks | None = None,
    steps: StaticSteps | None = None,
) -> list[list[int]]:
    prompts = questions.prompts()
    decoder = Decoder(base.model, prompts, Stopping.of(ends, NEW_TOKENS), mixed)
    decoder.steps = steps
    banks = mixed.of if mixed is not None else lambda _: ()
    waves = in_waves(grouped(prompts, range(len(prompts)), banks), prompts, limits)
    found: dict[int, list[int]] = {}
    for batch in scored_batches(decoder, questions, waves):
        found.update(zip(batch.questions, batch.ids, strict=True))
    return [found[index] for index in range(len(prompts))]


@pytest.mark.parametrize("images", [0, 2])
def test_a_prompt_alone_and_its_ids_as_they_come(base: LlavaMed, questions: EvalDataset, images: int) -> None:
    ids = [1] + [base.image_token_id] * (images * base.patches) + [44, 301, 17]
    pixels = torch.randn(images, 3, 56, 56, generator=torch.Generator().manual_seed(1)) if images else None
    expected = generated(base.model, [ids], pixels, Ends(-1), NEW_TOKENS)[0]
    steps: list[int] = []
    input_processor = replace(questions.input_processor, tokenizer=Ends(-1))
    inputs = {"pixel_values": pixels} if images else {}
    found, _ = answer_and_probability(
        input_processor, base.model, ids, inputs, NEW_TOKENS, lambda _, token: steps.append(token)
    )
    assert found == steps == expected


def often(answers: Sequence[Sequence[int]]) -> int:
    """An id that ends some answers early and some late."""
    places: dict[int, set[int]] = {}
    for answer in answers:
        for place, token in enumerate(answer):
            places.setdefault(token, set()).add(place)
    return max(places, key=lambda token: len(places[token]))


Reference = Callable[[Ends], list[list[int]]]


@pytest.mark.parametrize(("size", "window"), [(1, None), (3, None), (16, None), (3, 20)])
def test_answers_are_those_of_whole_prompts(
    base: LlavaMed,
    questions: EvalDataset,
    one_by_one: Reference,
    size: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base.model.config.text_config, "sliding_window", window)
    limits = Limits(size, NEW_TOKENS, size * 120)
    endless = one_by_one(Ends(-1))
    assert shared(base, questions, Ends(-1), limits) == endless
    ends = Ends(often(endless))
    expected = one_by_one(ends)
    assert shared(base, questions, ends, limits) == expected
    assert len({len(answer) for answer in expected}) > 1  # rows left their batches at different times
    assert len(set(map(tuple, endless))) > 5  # not one answer for all


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """The shapes of the buffers that were made."""
    shapes: list[Shape] = []
    make = StaticRows.__init__
    monkeypatch.setattr(
        StaticRows, "__init__", lambda self, shape, like: shapes.append(shape) or make(self, shape, like)
    )
    return shapes


@pytest.mark.parametrize("size", [3, 16])
def test_static_buffers_change_no_answer(
    base: LlavaMed, questions: EvalDataset, one_by_one: Reference, size: int, made: list[Shape]
) -> None:
    """Shapes rounded up, one after another in the same buffers: what CUDA records and replays."""
    limits = Limits(size, NEW_TOKENS, size * 120)
    endless = one_by_one(Ends(-1))
    for ends in (Ends(-1), Ends(often(endless))):
        expected = one_by_one(ends)
        assert shared(base, questions, ends, limits, steps=StaticSteps(record=False)) == expected
    batches = -(-len(endless) // size)
    assert 0 < len(made) < 2 * batches or size == 16  # several batches in the same buffers
    assert all(shape == shape.rounded() for shape in made)


def test_buffers_are_made_only_where_enough_batches_wait(
    base: LlavaMed, questions: EvalDataset, made: list[Shape]
) -> None:
    prompts = questions.prompts()
    decoder = Decoder(base.model, prompts, Stopping.of(Ends(-1), NEW_TOKENS))
    decoder.steps = StaticSteps(record=False)
    [wave] = in_waves(grouped(prompts, [0, 1], lambda _: None), prompts, Limits(1, NEW_TOKENS, 1))
    openings = decoder.read(wave, {"pixel_values": questions.load_images(0)})
    decoder.answer(openings, wave.batches[0], waiting=1)
    assert made == []
    decoder.answer(openings, wave.batches[0], waiting=2)
    decoder.answer(openings, wave.batches[1], waiting=1)  # they are there by now
    assert len(made) == 1


@pytest.mark.parametrize("static", [False, True])
def test_each_row_gets_its_own_banks(
    base: LlavaMed, questions: EvalDataset, one_by_one: Reference, static: bool
) -> None:
    """Questions of one image that other banks answer share no opening with the rest."""
    generator = torch.Generator().manual_seed(2)

    def bank(name: str) -> Bank:
        shapes = {layer: linear.weight.shape for layer, linear in language_linears(base.model).items()}
        matrices = {
            layer: (torch.randn(2, columns, generator=generator) * 0.3, torch.randn(rows, 2, generator=generator) * 0.3)
            for layer, (rows, columns) in shapes.items()
        }
        return Bank(name, 2, 2, matrices)

    adapters = PerSampleAdapters(base.model, [bank("one"), bank("two")])
    try:
        count = len(questions)
        mixed = QuestionBanks(adapters, whole_banks([[(), (0,), (0, 1)][number % 3] for number in range(count)], 2))
        expected = []
        for index, prompt in enumerate(questions.prompts()):
            mixed.choose([index])
            pixels = questions.load_images(index)
            expected += generated(base.model, [prompt.opening + prompt.rest], pixels, Ends(-1), NEW_TOKENS)
        steps = StaticSteps(record=False) if static else None
        assert shared(base, questions, Ends(-1), Limits(4, NEW_TOKENS, 480), mixed, steps) == expected
    finally:
        adapters.remove()
    assert expected != one_by_one(Ends(-1))


def test_every_image_is_seen_once(base: LlavaMed, questions: EvalDataset) -> None:
    seen = []
    hook = base.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])),
        with_kwargs=True,
    )
    shared(base, questions, Ends(-1), Limits(4, NEW_TOKENS, 480))
    hook.remove()
    assert sum(seen) == 1 + 2 + 1 + 3 + 1  # by sets of images; 5 * 1 + 3 * 2 + 1 + 2 * 3 + 2 * 1 for whole prompts


def test_cached_features_take_the_images_place(base: LlavaMed, questions: EvalDataset, tmp_path: Path) -> None:
    """Openings are computed from features as from pixels."""
    from mslora_cr.models.cached_features import CachedFeatures

    expected = shared(base, questions, Ends(-1), Limits(4, NEW_TOKENS, 480))
    loaded = load(GOLDEN / "llava_med_tiny", dtype=torch.float32)
    features = CachedFeatures(tmp_path / "features", loaded.given_features(), torch.device("cpu"))
    features.fill([path for prompt in questions.prompts() for path in prompt.images], workers=0)
    processor = replace(questions.input_processor, features=features.cache)
    cached = EvalDataset(questions.records, questions.roots, processor)
    assert shared(loaded, cached, Ends(-1), Limits(4, NEW_TOKENS, 480)) == expected


# --- what is computed together -------------------------------------------------------------------------------------


def prompts_of(*shapes: tuple[str, int, int]) -> list[Prompt]:
    """From (image, positions of the opening, of the rest)."""
    return [Prompt((1,) * opening, (2,) * rest, (Path(image),) if image else ()) for image, opening, rest in shapes]


def test_questions_are_grouped_by_images_and_banks() -> None:
    prompts = prompts_of(("a", 9, 2), ("b", 9, 3), ("a", 9, 4), ("", 0, 5), ("", 0, 5), ("b", 9, 1), ("a", 9, 0))
    banks = [(0,), (0,), (0,), (0,), (0,), (0, 1), (0,)]
    assert grouped(prompts, range(7), banks.__getitem__) == [
        Group((2, 0), 9, 4, whole=False),
        Group((1,), 12, 0, whole=True),  # not with question 5, which other banks answer
        Group((3,), 5, 0, whole=True),
        Group((4,), 5, 0, whole=True),
        Group((5,), 10, 0, whole=True),
        Group((6,), 9, 0, whole=True),  # cut at its image's end: there is nothing to compute behind it
    ]
    assert grouped(prompts, [0], banks.__getitem__) == [Group((0,), 11, 0, whole=True)]


def test_a_large_group_is_cut_for_the_ranks_to_share() -> None:
    prompts = prompts_of(*[("a", 9, rest) for rest in (1, 2, 3, 4, 5)])
    groups = grouped(prompts, range(5), lambda _: None, most=3)
    assert [group.questions for group in groups] == [(4, 3, 2), (1, 0)]
    shares = shared_out(groups, 3, new_tokens=2)
    assert sorted(len(share) for share in shares) == [0, 1, 1]


def test_batches_are_filled_over_images_within_the_limits() -> None:
    prompts = prompts_of(*[(name, 100, 4) for name in "aaabbbcccdddd"], ("e", 50, 1))
    groups = grouped(prompts, range(14), lambda _: None)
    waves = in_waves(groups, prompts, Limits(4, 10, 400))
    # Three openings and a batch's questions and answers fit; batches of four run over images.
    assert [[len(batch) for batch in wave.batches] for wave in waves] == [[4, 4, 1], [4], [1]]
    assert sorted(question for wave in waves for batch in wave.batches for question in batch) == list(range(14))
    assert [len(wave.groups) for wave in waves] == [3, 1, 1]
    assert padding_of(waves, prompts) == 0


def test_long_questions_behind_shared_openings_come_in_smaller_batches() -> None:
    prompts = prompts_of(*[("a", 100, 1000)] * 9)
    [wave] = in_waves(grouped(prompts, range(9), lambda _: None), prompts, Limits(64, 10, 100000))
    assert [len(batch) for batch in wave.batches] == [4, 4, 1]


def test_padding_is_counted_once_for_each_opening() -> None:
    prompts = prompts_of(("a", 10, 1), ("a", 10, 3), ("b", 8, 2), ("b", 8, 2))
    waves = in_waves(grouped(prompts, range(4), lambda _: None), prompts, Limits(4, 2, 1000))
    assert padding_of(waves, prompts) == pytest.approx(1 - (18 + 8) / (20 + 12))
