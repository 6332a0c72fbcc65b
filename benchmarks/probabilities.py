"""What probabilities cost: greedy answers with and without scoring each answer and the candidates yes and no.

    python -m benchmarks.probabilities                       # 64 questions, 2 new tokens, 576 positions an image
    python -m benchmarks.probabilities --size 7b --at-once 64 --questions 256

As many questions about an image as in PathVQA's test set (6,761 on 858 images), and one. Image features are given,
so the tower takes no part: with it the share is smaller. An answer is a word and the token that ends it, and is itself
one of the two candidates, as yes and no are. Figures are seconds an answer; the ratio is paired. `identical_text` says
whether scoring changed an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.generation import Answers, Ids, answered, use_answering_kernels
from benchmarks.harness import finish, language_model, parse
from benchmarks.shared_images import about_images, add_arguments, seconds_an_answer
from mslora_cr.models.vision import detach_tower

PER_IMAGE = {"PathVQA": 7.9, "one": 1.0}
NEW_TOKENS = 2
OTHER = (7, 9)
"""Ids of the candidate that is not the answer: a word, and a token that stands for the one that ends it."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("probabilities", __doc__, argv, partial(add_arguments, new_tokens=NEW_TOKENS))
    args, ids = setting.args, Ids(setting.size.vocabulary)
    answers: dict[str, Answers] = {}

    def answering(name: str, density: float, scored: bool) -> Callable[[], None]:
        model = language_model(setting.size, setting.device)
        detach_tower(model)
        use_answering_kernels(model, setting)
        asked = about_images(args.questions, density, args.patches, model, setting)
        others = OTHER if scored else None
        answer = partial(answered, model, asked.prompts, asked.pixels_of, args.at_once, ids, args.new_tokens, others)
        return lambda: answers.update({name: answer()})

    variants = {
        f"{name}, {when}": partial(answering, f"{name}, {when}", density, scored)
        for name, density in PER_IMAGE.items()
        for when, scored in (("answers alone", False), ("with probabilities", True))
    }
    each, facts = seconds_an_answer(setting, variants, warm_up=1)
    pairs = {name: (f"{name}, with probabilities", f"{name}, answers alone") for name in PER_IMAGE}
    return finish(
        setting,
        each,
        {f"with_over_without, {name}": pair for name, pair in pairs.items()},
        unit="s an answer",
        extra={"identical_text": all(answers.get(one) == answers.get(other) for one, other in pairs.values()), **facts},
    )


if __name__ == "__main__":
    main()
