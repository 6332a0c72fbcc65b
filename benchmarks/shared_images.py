"""Greedy answers about images that several questions share, against whole prompts.

    python -m benchmarks.shared_images                       # 64 questions, 24 new tokens, 576 positions an image
    python -m benchmarks.shared_images --size 7b --at-once 64 --questions 256
    python -m benchmarks.shared_images --family qwen2_5_vl      # a model with a processor of its own
    python -m benchmarks.shared_images --slices 40 --patches 16 --questions 20 --repetitions 1     # about a volume

As many questions about an image as in PathVQA's test set (6,761 on 858 images), in those of SLAKE and VQA-RAD together
(1,512 on 299), and one. The images' features are given, so the tower takes no part. `before` answers whole prompts,
padded on the left, through transformers' `generate`, as this project did; `after` is what evaluation does now. Figures
are seconds an answer. Both must give the same ids in float32; `identical_text` says whether they did.

With `--slices` every prompt has so many images, the slices of a volume, and 20 questions ask about each volume.

With `--family` the model is a random one of that family, 256 wide and 4 layers deep, and its tower and projector take
part: `before` is what `generate` takes for whole prompts, `after` what evaluation does where the model's scores behind
an opening are those of whole prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import generated
from benchmarks.family import Family
from benchmarks.generation import Answers, Ids, answered, use_answering_kernels
from benchmarks.harness import Setting, finish, language_model, parse
from mslora_cr.data.collator import in_batches
from mslora_cr.data.input_processor import Prompt
from mslora_cr.models.vision import detach_tower
from tests.helpers.families import FAMILIES

BEHIND = 8, 40
"""Tokens behind an image, drawn evenly."""
PER_IMAGE = {"PathVQA": 7.9, "SLAKE and VQA-RAD": 5.1, "one": 1.0}
PER_VOLUME = {"volume": 20.0}
IMAGE_TOKEN = 3


@dataclass(frozen=True)
class Questions:
    """Prompts, and the features of their images."""

    prompts: list[Prompt]
    features: dict[Path, Tensor]

    def pixels_of(self, questions: Sequence[int]) -> Tensor | None:
        images = [image for question in questions for image in self.prompts[question].images]
        return torch.stack([self.features[image] for image in images]) if images else None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("shared_images", __doc__, argv, add_arguments)
    args, ids = setting.args, Ids(setting.size.vocabulary)
    per_image = PER_IMAGE if args.slices == 1 else PER_VOLUME
    answers: dict[str, Answers] = {}
    shares: list[float] = []
    family = Family(args.family, setting.device) if args.family else None

    def answering(name: str, density: float, way: Callable[..., Answers]) -> Callable[[], None]:
        if family is not None:
            asked_of_family = family.questions(args.questions, density, BEHIND, args.slices)
            shares.extend(len(prompt.opening) / len(prompt) for prompt in asked_of_family.prompts)
            return lambda: answers.update(
                {name: family.answers(asked_of_family, way is _after, args.at_once, args.new_tokens)}
            )
        model = language_model(setting.size, setting.device)
        detach_tower(model)
        if way is _after:
            use_answering_kernels(model, setting)
        asked = about_images(args.questions, density, args.patches, model, setting, args.slices)
        return lambda: answers.update({name: way(model, asked, args.at_once, ids, args.new_tokens)})

    variants = {
        f"{name}, {when}": partial(answering, f"{name}, {when}", density, way)
        for name, density in per_image.items()
        for when, way in (("before", _before), ("after", _after))
    }
    each, facts = seconds_an_answer(setting, variants, warm_up=0)
    ratios = {name: (f"{name}, before", f"{name}, after") for name in per_image}
    identical = {
        name: sum(answers[after][index] == ids for index, ids in answers[before].items())
        for name, (before, after) in ratios.items()
        if before in answers and after in answers
    }
    return finish(
        setting,
        each,
        {f"after_over_before, {name}": pair for name, pair in ratios.items()},
        unit="s an answer",
        extra={
            "identical_text": all(count == args.questions for count in identical.values()),
            "identical_answers": identical,
            "answers_per_second": {name: 1 / median(values) for name, values in each.items()},
            "opening_share_of_prompt": min(shares, default=None),
            **facts,
        },
    )


def seconds_an_answer(
    setting: Setting, variants: Mapping[str, Callable[[], Callable[[], Any]]], warm_up: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds an answer of each variant, round by round, and the facts that are noted beside them."""
    args = setting.args
    with torch.inference_mode():
        taken, too_large = setting.measured(variants, warm_up=warm_up)
    each = {name: [value / args.questions for value in values] for name, values in taken.items()}
    return each, {"questions": args.questions, "new_tokens": args.new_tokens, "out_of_memory": too_large}


def add_arguments(parser: argparse.ArgumentParser, new_tokens: int = 24) -> None:
    parser.add_argument("--questions", type=int, default=64, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=new_tokens, metavar="N")
    parser.add_argument("--patches", type=int, default=576, metavar="N", help="positions of an image")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="images of a prompt (default: 1)")
    parser.add_argument("--family", choices=FAMILIES, help="a model with a processor of its own, instead of LLaVA-Med")
    parser.add_argument("--at-once", type=int, default=16, metavar="N", help="questions in a batch")


def about_images(count: int, density: float, patches: int, model: Any, setting: Setting, slices: int = 1) -> Questions:
    """Questions, `density` of them about each image, or about each volume of so many slices."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(BEHIND[0], BEHIND[1] + 1, (count,), generator=generator).tolist()
    opening = (1, 5, 6, *[IMAGE_TOKEN] * (patches * slices))
    seen = [tuple(Path(f"image {int(number / density)}, {part}") for part in range(slices)) for number in range(count)]
    prompts = [
        Prompt(opening, _words(length, setting.size.vocabulary, generator), images)
        for length, images in zip(lengths, seen, strict=True)
    ]
    width = model.config.vision_config.hidden_size
    each = dict.fromkeys(image for images in seen for image in images)
    features = {image: torch.randn(patches + 1, width, generator=generator) for image in each}
    return Questions(prompts, features)


def _words(count: int, vocabulary: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(IMAGE_TOKEN + 1, vocabulary, (count,), generator=generator).tolist())


def _before(model: Any, questions: Questions, batch: int, ids: Ids, new_tokens: int) -> Answers:
    """Whole prompts, the longest first."""
    order = sorted(range(len(questions.prompts)), key=lambda index: -len(questions.prompts[index]))
    answers: Answers = {}
    for chosen in in_batches(order, batch):
        prompts = [questions.prompts[index].opening + questions.prompts[index].rest for index in chosen]
        answers |= zip(chosen, generated(model, prompts, questions.pixels_of(chosen), ids, new_tokens), strict=True)
    return answers


def _after(model: Any, questions: Questions, batch: int, ids: Ids, new_tokens: int) -> Answers:
    """As evaluation answers."""
    return answered(model, questions.prompts, questions.pixels_of, batch, ids, new_tokens)


if __name__ == "__main__":
    main()
