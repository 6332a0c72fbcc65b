"""Random models of a family with a processor of its own, and questions about images for them."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mslora_cr.data.chat import messages_of, render
from mslora_cr.data.input_processor import Prompt
from mslora_cr.data.records import Turn
from mslora_cr.generation.batching import Limits, grouped, in_waves
from mslora_cr.generation.exactness import exact_decoder
from mslora_cr.generation.hf_decoder import PlainDecoder
from mslora_cr.generation.prefix_decoder import Stopping
from mslora_cr.models.load import load_model
from tests.helpers.families import WORDS, Shape, make

WIDE = Shape(
    text={
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": 8192,
    },
    vision={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 448,
        "patch_size": 14,
    },
    side=448,
    window=512,
)
"""An image of 448 pixels takes 256 positions where patches are merged two by two."""


@dataclass(frozen=True)
class Asked:
    """Prompts, and the images of each."""

    prompts: list[Prompt]
    images: list[list[Image.Image]]


class Family:
    """A random model of a family, loaded as evaluation loads one."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        with tempfile.TemporaryDirectory() as folder:
            make(name, Path(folder), WIDE)
            self.base: Any = load_model(Path(folder), dtype=dtype, device=device)
        self.inputs: Any = self.base.input_processor(8192, True)
        self.exact = exact_decoder(self.base.model, self.inputs)

    def questions(self, count: int, density: float, tokens: tuple[int, int], slices: int = 1) -> Asked:
        """Questions of so many words, `density` of them about each image, or about each volume of so many slices, which
        are a quarter as wide."""
        generator = torch.Generator().manual_seed(4)
        lengths = torch.randint(tokens[0], tokens[1] // 2, (count,), generator=generator).tolist()
        side, seen = WIDE.side if slices == 1 else WIDE.side // 4, range(int((count - 1) / density) + 1)
        images = [[_noise(side, generator) for _ in range(slices)] for _ in seen]
        prompts = []
        for number, length in enumerate(lengths):
            text = " ".join(WORDS[int(torch.randint(len(WORDS), (), generator=generator))] for _ in range(length))
            question = Turn.model_validate({"from": "human", "value": text})
            rendered = render(self.inputs.processor, messages_of([question], slices), to_answer=True)
            picture = int(number / density)
            opening, rest = self.inputs.split_ids(rendered, [image.size for image in images[picture]])
            paths = tuple(Path(f"image {picture}, {part}") for part in range(slices))
            prompts.append(Prompt(opening, rest, paths, rendered))
        return Asked(prompts, [images[int(number / density)] for number in range(count)])

    def answers(self, asked: Asked, shared: bool, batch: int, new_tokens: int) -> dict[int, list[int]]:
        """The new ids of every question; no token ends an answer.

        Args:
            shared: as evaluation answers; else whole prompts, by `generate`.
        """
        never = Stopping(
            frozenset([self.base.model.get_input_embeddings().num_embeddings]),
            self.inputs.tokenizer.pad_token_id,
            new_tokens,
        )
        decoder: Any = (self.exact if shared and self.exact else PlainDecoder)(self.base.model, asked.prompts, never)
        longest = max(map(len, decoder.prompts))
        limits = Limits(batch, new_tokens, batch * (longest + new_tokens))
        waves = in_waves(grouped(decoder.prompts, range(len(asked.prompts)), lambda _: None), decoder.prompts, limits)
        waiting = sum(len(wave.batches) for wave in waves)
        found: dict[int, list[int]] = {}
        for wave in waves:
            first = [group.questions[0] for group in wave.groups]
            images = [asked.images[question] for question in first]
            openings = decoder.read(wave, self.inputs.answering_batch([decoder.prompts[q] for q in first], images))
            for chosen in wave.batches:
                found |= dict(zip(chosen, decoder.answer(openings, chosen, waiting), strict=True))
                waiting -= 1
        return found


def _noise(side: int, generator: torch.Generator) -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (side, side, 3), generator=generator, dtype=torch.uint8).numpy())
