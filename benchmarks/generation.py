"""Greedy answers by the batch with merged banks, against one question at a time with unmerged ones.

    python -m benchmarks.generation                # 64 questions of mixed length, 24 new tokens, 8 banks
    python -m benchmarks.generation --size 7b --prompt-tokens 600 660 --batches 16 64

Ours sorts the questions by length, as evaluation does, and answers with 8 banks merged and, beside it, concatenated, by
batches of 16 (evaluation's default), 64 and 32.
The baseline is PEFT with 8 banks active. All must give the same ids; `identical_text` says whether they did. Figures
are seconds a question. At 7B the baseline takes a quarter of a second a token, so what goes one by one answers a few of
the questions there; `questions_answered` says how many each variant has had.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import peft_all_active
from benchmarks.harness import Setting, finish, language_model, parse, random_banks
from mslora_cr.banks.bank import Bank
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.input_processor import Prompt
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.prefix_decoder import Decoder, Stopping
from mslora_cr.models.kernels import use_kernels
from mslora_cr.utils.kernels import chosen_kernels

BANKS = 8
SHORTEST, LONGEST = 8, 64
"""Tokens of a question, drawn evenly: most of the published test questions are one sentence."""

FEW = 4
"""Questions that are answered one by one at 7B."""

Answers = dict[int, list[int]]
"""Question → new ids."""


@dataclass(frozen=True)
class Ids:
    """What decoding needs of a tokenizer. No word of the vocabulary ends an answer: each is as long as asked for."""

    eos_token_id: int
    pad_token_id: int = 0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("generation", __doc__, argv, _add_arguments)
    args = setting.args
    if args.baseline_questions is None:
        args.baseline_questions = FEW if setting.args.size == "7b" else args.questions
    banks = random_banks(setting.size, BANKS)
    questions = _questions(args.questions, setting.size.vocabulary, *args.prompt_tokens)
    few = questions[: args.baseline_questions]
    answers: dict[str, Answers] = {}

    def answering(name: str, merge_mode: str, batch: int, asked: Sequence[Prompt]) -> Callable[[], None]:
        model = _model(setting, merge_mode, banks)
        return lambda: answers.update(
            {name: answered(model, asked, _no_images, batch, Ids(setting.size.vocabulary), args.new_tokens)}
        )

    baseline, last = "one by one, unmerged", args.batches[-1]
    variants: dict[str, tuple[str, int, Sequence[Prompt]]] = {
        baseline: ("unmerged", 1, few),
        "one by one, merged": ("merge", 1, few),
        **{f"merged, batch {batch}": ("merge", batch, questions) for batch in args.batches},
        f"concatenated, batch {last}": ("concatenate", last, questions),
    }
    with torch.inference_mode():
        taken, too_large = setting.measured(
            {name: partial(answering, name, *variant) for name, variant in variants.items()}, warm_up=0
        )
    seconds = {name: [value / len(variants[name][2]) for value in values] for name, values in taken.items()}
    ours = f"merged, batch {last}"
    return finish(
        setting,
        seconds,
        {
            "answers_per_second_over_baseline": (baseline, ours),
            "concatenated_over_baseline": (baseline, f"concatenated, batch {last}"),
            "folding_alone_over_baseline": (baseline, "one by one, merged"),
        },
        unit="s a question",
        extra={
            "identical_text": all(answers[ours][index] == ids for index, ids in answers[baseline].items()),
            "identical_answers": {
                name: sum(found[index] == ids for index, ids in answers[baseline].items())
                for name, found in answers.items()
            },
            "answers_per_second": {name: 1 / median(values) for name, values in seconds.items()},
            "questions_answered": {name: len(variants[name][2]) for name in seconds},
            "question_tokens": sum(map(len, questions)),
            "new_tokens": args.new_tokens,
            "out_of_memory": too_large,
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, default=64, metavar="N")
    parser.add_argument(
        "--baseline-questions",
        type=int,
        metavar="N",
        help=f"how many of them are answered one by one (default: all; at 7b {FEW})",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        nargs=2,
        default=(SHORTEST, LONGEST),
        metavar=("LEAST", "MOST"),
        help=f"of a question, drawn evenly (default: {SHORTEST} {LONGEST}; with an image 600 660)",
    )
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 64, 32], metavar="N", help="at once; the last is compared"
    )


def _model(setting: Setting, merge_mode: str, banks: Sequence[Bank]) -> Any:
    """A model that answers with these banks, `unmerged`, or merged in this way."""
    base = language_model(setting.size, setting.device)
    if merge_mode == "unmerged":
        return peft_all_active(base, banks, train_last=False).eval()
    use_answering_kernels(base, setting)
    stack = BankStack(base, merge_mode)
    stack.set_frozen(banks)
    return stack.model.eval()


def use_answering_kernels(model: Any, setting: Setting) -> None:
    """As evaluation does where `model.kernels` is auto."""
    use_kernels(model, "torch" if setting.size.dtype == "float32" else chosen_kernels("auto", setting.device.type))


def _questions(count: int, vocabulary: int, shortest: int, longest: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [
        Prompt((), tuple(torch.randint(4, vocabulary, (length,), generator=generator).tolist()), ())
        for length in lengths
    ]


def _no_images(questions: Sequence[int]) -> None:
    """The images of questions that have none."""


def answered(
    model: Any,
    prompts: Sequence[Prompt],
    pixels_of: Callable[[Sequence[int]], Tensor | None],
    batch: int,
    ids: Ids,
    new_tokens: int,
    after_batch: Callable[[Decoder, Any, Sequence[int], list[list[int]]], None] | None = None,
) -> Answers:
    """Answers as evaluation gives them, in batches of so many questions.

    Args:
        pixels_of: returns the images of some questions; None where they have none.
        after_batch: called with the decoder, the openings, and a batch's questions and answers.
    """
    limits = Limits(batch, new_tokens, batch * (max(map(len, prompts)) + new_tokens))
    decoder = Decoder(model, prompts, Stopping.of(ids, new_tokens))
    waves = in_waves(grouped(prompts, range(len(prompts)), lambda _: None), prompts, limits)
    waiting = sum(len(wave.batches) for wave in waves)
    answers: Answers = {}
    for wave in waves:
        pixels = pixels_of([group.questions[0] for group in wave.groups])
        openings = decoder.read(wave, {} if pixels is None else {"pixel_values": pixels})
        for chosen in wave.batches:
            given = decoder.answer(openings, chosen, waiting)
            if after_batch is not None:
                after_batch(decoder, openings, chosen, given)
            answers |= zip(chosen, given, strict=True)
            waiting -= 1
    return answers


if __name__ == "__main__":
    main()
