"""Answers questions in batches: decodes their images, reads their openings once, generates their answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch.utils.data import DataLoader, Dataset

from mslora_cr.banks.per_sample import QuestionBanks
from mslora_cr.data.chat_template_inputs import ChatTemplateInputs
from mslora_cr.data.input_processor import InputProcessor, Prompt
from mslora_cr.data.records import TestRecord
from mslora_cr.distributed.comm import all_gather_object, rank, world_size
from mslora_cr.generation.batching import Limits, Wave, grouped, in_waves, shared_out
from mslora_cr.generation.branches import Continuations
from mslora_cr.generation.exactness import exact_decoder
from mslora_cr.generation.hf_decoder import PlainDecoder
from mslora_cr.generation.prefix_decoder import Decoder, Stopping
from mslora_cr.models.language import base_of
from mslora_cr.models.split import is_split


@dataclass(frozen=True)
class Decoding:
    """How answers are generated, and the model that is named as their author."""

    max_new_tokens: int
    batch_size: int
    model_id: str
    workers: int = 0

    def limits(self, prompts: Sequence[Prompt]) -> Limits:
        """Return the most positions held at once: those of the longest `batch_size` prompts with their answers."""
        longest = max(map(len, prompts), default=0)
        return Limits(self.batch_size, self.max_new_tokens, self.batch_size * (longest + self.max_new_tokens))


class ScoredBatch(NamedTuple):
    """A batch of answered questions.

    Attributes:
        questions: Their indices.
        ids: The new ids of each, up to and including the one that ends it.
        scores: For each, the log-probability of every token of every requested continuation.
    """

    questions: Sequence[int]
    ids: list[list[int]]
    scores: list[list[list[float]]] | None


class Questions(Protocol):
    """The questions to answer, from one task's file or from several."""

    @property
    def input_processor(self) -> InputProcessor: ...
    @property
    def records(self) -> Iterable[TestRecord]: ...
    def __len__(self) -> int: ...
    def prompts(self) -> list[Prompt]: ...
    def load_images(self, index: int, /) -> Any: ...


def decoder_of(
    input_processor: InputProcessor,
    model: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    mixed: QuestionBanks | None = None,
    together: bool = False,
) -> Decoder | PlainDecoder:
    """Return the decoder for a model: from shared openings if some are shared and the scores are those of whole
    prompts.

    Args:
        together: Whether all ranks compute the same answers step by step (`Stopping`).
    """
    if input_processor.shares_openings:
        return Decoder(model, prompts, Stopping.of(input_processor.tokenizer, max_new_tokens, together), mixed)
    shared = len({(prompt.images, prompt.opening) for prompt in prompts}) < len(prompts)
    exact = None
    if shared and isinstance(input_processor, ChatTemplateInputs) and not is_split(base_of(model)):
        exact = exact_decoder(base_of(model), input_processor, mixed)
    padding = input_processor.tokenizer.pad_token_id
    stopping = Stopping(frozenset(input_processor.end_ids), padding, max_new_tokens, together)
    return (exact or PlainDecoder)(model, prompts, stopping, mixed)


def waves_of_rank(
    decoder: Any,
    decoding: Decoding,
    questions: Sequence[int],
    banks: Callable[[int], Hashable] = lambda question: None,
) -> list[Wave]:
    """Return this rank's share of some questions, in the waves in which they are computed; all of them, in the same
    waves on every rank, if ranks answer together.

    Args:
        decoding: How they are answered.
        questions: Their places, the same on every rank.
        banks: Tells the banks of a question from those of another; by default all have the same.
    """
    prompts, together = decoder.prompts, decoder.stopping.together
    ranks, this_rank = (1, 0) if together else (world_size(), rank())
    limits = decoding.limits(prompts)
    groups = grouped(prompts, questions, banks, most=max(1, -(-len(questions) // ranks)))
    fit = decoder.positions_that_fit() or limits.positions
    fitting = replace(limits, positions=min(limits.positions, *(all_gather_object(fit) if together else [fit])))
    share = shared_out(groups, ranks, limits.new_tokens)[this_rank]
    return in_waves(share, prompts, fitting, *([decoder.mixed.projector] if decoder.mixed is not None else []))


def scored_batches(
    decoder: Any,
    samples: Questions,
    waves: Sequence[Wave],
    continuations: Callable[[int, Sequence[int]], Continuations] | None = None,
    workers: int = 0,
) -> Iterator[ScoredBatch]:
    """Yield the batches of some waves as they are answered.

    Args:
        continuations: The continuations to score after a question that got these new ids; None scores nothing.
    """
    inputs: DataLoader[Any] = DataLoader(_Inputs(samples, decoder.prompts, waves), batch_size=None, num_workers=workers)
    waiting = sum(len(wave.batches) for wave in waves)
    for wave, of_wave in zip(waves, inputs, strict=True):
        openings = decoder.read(wave, of_wave)
        for batch in wave.batches:
            ids = decoder.answer(openings, batch, waiting)
            scores = None
            if continuations is not None:
                wanted = [continuations(*answered) for answered in zip(batch, ids, strict=True)]
                scores = scored_once(decoder, openings, batch, wanted)
            yield ScoredBatch(batch, ids, scores)
            waiting -= 1


def scored_once(
    decoder: Any, openings: Any, batch: Sequence[int], wanted: Sequence[Continuations]
) -> list[list[list[float]]]:
    """As `log_probabilities`; a continuation that is wanted twice, such as an answer that is a candidate, is read
    once."""
    texts = [[tuple(tokens) for tokens in several] for several in wanted]
    once = [list(dict.fromkeys(several)) for several in texts]
    scores = decoder.log_probabilities(openings, batch, once)
    by_pair = [dict(zip(*pair, strict=True)) for pair in zip(once, scores, strict=True)]
    return [[of[tokens] for tokens in several] for of, several in zip(by_pair, texts, strict=True)]


class _Inputs(Dataset[Any]):
    """The decoder's inputs of each wave; each image is decoded once."""

    def __init__(self, samples: Questions, prompts: Sequence[Prompt], waves: Sequence[Wave]) -> None:
        self.samples, self.prompts, self.waves = samples, prompts, waves

    def __len__(self) -> int:
        return len(self.waves)

    def __getitem__(self, number: int) -> Any:
        first = [group.questions[0] for group in self.waves[number].groups]
        images = [self.samples.load_images(question) for question in first]
        return self.samples.input_processor.answering_batch([self.prompts[question] for question in first], images)
