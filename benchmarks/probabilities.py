"""What probabilities cost: the time of scoring each answer and the candidates yes and no, beside that of answering.

    python -m benchmarks.probabilities                       # 64 questions, 3 new tokens, 576 positions an image
    python -m benchmarks.probabilities --size 7b --at-once 64 --questions 256

As many questions about an image as in PathVQA's test set (6,761 on 858 images), and one. Image features are given,
so the tower takes no part: with it the share is smaller. Like LLaVA-Med's yes and no, an answer is a word, a space and
the token that ends it, and is itself one of the two candidates. Figures are seconds an answer. Each batch is scored as
soon as it is answered, and the ratio is that of both times to the answers' alone, so other work on the machine slows
both. `identical_text` says whether scoring changed an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.generation import Ids, answered, use_answering_kernels
from benchmarks.harness import finish, language_model, parse
from benchmarks.shared_images import about_images, add_arguments, seconds_an_answer
from mslora_cr.generation.prefix_decoder import Decoder
from mslora_cr.generation.run import scored_once
from mslora_cr.models.vision import detach_tower

PER_IMAGE = {"PathVQA": 7.9, "one": 1.0}
NEW_TOKENS = 3
OTHER = (7, 9, 11)
"""Ids of the candidate that is not the answer: a word, a space, and a token that stands for the one that ends it."""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("probabilities", __doc__, argv, partial(add_arguments, new_tokens=NEW_TOKENS))
    args, ids = setting.args, Ids(setting.size.vocabulary)
    scoring: dict[str, list[float]] = {name: [] for name in PER_IMAGE}
    identical: list[bool] = []

    def answering(name: str, density: float) -> Callable[[], None]:
        model = language_model(setting.size, setting.device)
        detach_tower(model)
        use_answering_kernels(model, setting)
        asked = about_images(args.questions, density, args.patches, model, setting)
        answer = partial(answered, model, asked.prompts, asked.pixels_of, args.at_once, ids, args.new_tokens)
        alone = answer()

        def scored() -> None:
            taken: list[float] = []

            def score(decoder: Decoder, openings: Any, chosen: Sequence[int], given: list[list[int]]) -> None:
                wanted = [[answer, answer, OTHER] for answer in given]
                taken.append(setting.seconds(lambda: scored_once(decoder, openings, chosen, wanted)))

            identical.append(answer(score) == alone)
            scoring[name].append(sum(taken) / args.questions)

        return scored

    both, facts = seconds_an_answer(
        setting, {name: partial(answering, name, density) for name, density in PER_IMAGE.items()}, warm_up=0
    )
    figures = {f"{name}, with probabilities": seconds for name, seconds in both.items()}
    for name, seconds in both.items():
        rounds = zip(seconds, scoring[name], strict=True)
        figures[f"{name}, answers alone"] = [whole - extra for whole, extra in rounds]
    return finish(
        setting,
        figures,
        {f"with_over_without, {name}": (f"{name}, with probabilities", f"{name}, answers alone") for name in PER_IMAGE},
        unit="s an answer",
        extra={"identical_text": all(identical), **facts},
    )


if __name__ == "__main__":
    main()
