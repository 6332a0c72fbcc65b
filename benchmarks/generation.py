"""Greedy answers by the batch with folded banks, against one question at a time with unfolded ones.

    python -m benchmarks.generation                # 64 questions of mixed length, 24 new tokens, 8 banks
    python -m benchmarks.generation --size 7b --batches 1 16 64

Ours sorts the questions by length, as evaluation does, and answers with 8 banks merged and, beside it, concatenated, by
batches of 16 (evaluation's default), 64 and 32.
The baseline is PEFT with 8 banks active. All must give the same ids; `identical_text` says whether they did.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.baselines import peft_all_active
from benchmarks.harness import finish, language_model, parse, random_banks
from mslora_cr.banks.stack import BankStack
from mslora_cr.data.collator import QuestionCollator
from mslora_cr.data.datasets import Sample
from mslora_cr.evaluation.generate import greedy

BANKS = 8
SHORTEST, LONGEST = 8, 64
"""Tokens of a question, drawn evenly: most of the published test questions are one sentence."""

Answers = dict[int, list[int]]
"""Question → new ids."""


@dataclass(frozen=True)
class Ids:
    """What `greedy` needs of a tokenizer. No word of the vocabulary ends an answer: each is as long as asked for."""

    eos_token_id: int
    pad_token_id: int = 0


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("generation", __doc__, argv, _add_arguments)
    args = setting.args
    banks = random_banks(setting.size, BANKS)
    questions = _questions(args.questions, setting.size.vocabulary)
    answers: dict[str, Answers] = {}

    def answering(name: str, model: Any, batch: int) -> Callable[[], None]:
        return lambda: answers.update(
            {name: _answer(model, questions, batch, Ids(setting.size.vocabulary), args.new_tokens)}
        )

    folded = {fold: BankStack(language_model(setting.size, setting.device), fold) for fold in ("merge", "concatenate")}
    for stack in folded.values():
        stack.set_frozen(banks)
        stack.model.eval()
    unfolded = peft_all_active(language_model(setting.size, setting.device), banks, train_last=False).eval()
    models = {"one by one, unfolded": (unfolded, 1), "one by one, merged": (folded["merge"].model, 1)}
    models |= {f"merged, batch {batch}": (folded["merge"].model, batch) for batch in args.batches}
    models |= {f"concatenated, batch {args.batches[-1]}": (folded["concatenate"].model, args.batches[-1])}
    with torch.inference_mode():
        seconds = setting.interleaved({name: answering(name, *which) for name, which in models.items()}, warm_up=0)
    ours, baseline = f"merged, batch {args.batches[-1]}", "one by one, unfolded"
    return finish(
        setting,
        seconds,
        {
            "answers_per_second_over_baseline": (baseline, ours),
            "concatenated_over_baseline": (baseline, f"concatenated, batch {args.batches[-1]}"),
            "folding_alone_over_baseline": (baseline, "one by one, merged"),
        },
        extra={
            "identical_text": answers[ours] == answers[baseline],
            "identical_answers": {
                name: sum(ids == answers[baseline][index] for index, ids in answers[name].items()) for name in models
            },
            "answers_per_second": {
                name: len(questions) / sorted(taken)[len(taken) // 2] for name, taken in seconds.items()
            },
            "questions": len(questions),
            "question_tokens": sum(len(question["input_ids"]) for question in questions),
            "new_tokens": args.new_tokens,
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--questions", type=int, default=64, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=24, metavar="N")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[16, 64, 32], metavar="N", help="at once; the last is compared"
    )


def _questions(count: int, vocabulary: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [
        Sample(
            index=index,
            input_ids=torch.randint(4, vocabulary, (length,), generator=generator).tolist(),
            labels=[],
            pixel_values=torch.empty(0, 3, 1, 1),
        )
        for index, length in enumerate(lengths)
    ]


def _answer(model: Any, questions: Sequence[Sample], batch: int, ids: Ids, new_tokens: int) -> Answers:
    collate = QuestionCollator(ids.pad_token_id)
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index]["input_ids"]))
    answers: Answers = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = collate([questions[index] for index in chosen])
        del inputs["record_index"]
        new = greedy(model, inputs, ids, new_tokens)  # type: ignore[arg-type]
        answers |= dict(zip(chosen, new, strict=True))
    return answers


if __name__ == "__main__":
    main()
