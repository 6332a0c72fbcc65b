"""Pretrains the tiny LLaVA-Med of the embedded stream.

The data are drawn pictures of every kind, described in plain visual words by someone who sees shapes and knows no
medicine. The stream's pictures, questions and answers play no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from mslora_cr.data.collator import Sample, TrainingCollator
from mslora_cr.data.images import preprocess
from mslora_cr.data.prompts import IGNORE_INDEX, encode_conversation, expand_images
from mslora_cr.data.records import Turn
from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.synthetic.images import TRAITS, Traits, draw
from mslora_cr.synthetic.stream import all_texts, sample_traits
from mslora_cr.utils.progress import progress_bar

ALBUM_SIZE = 3600
LEARNING_RATE = 2e-3
TOWER_BATCH, LANGUAGE_BATCH = 64, 32
MAX_LENGTH = 2048

Classes = Mapping[str, Mapping[str, Sequence[str]]]
"""The traits of each kind of picture, and the values of each trait."""


class Seen(NamedTuple):
    """What is seen in a picture: its kind, its traits, and these in plain words."""

    kind: str
    traits: Traits
    words: Mapping[str, str]
    """By trait, a description of its value."""
    nouns: Mapping[str, Sequence[str]]
    """By trait, the words of a question that ask for it."""


LossOf = Callable[[NDArray[np.int64]], Tensor]
"""Computes the loss on a batch, given its places in the album."""

_WORDS: dict[str, dict[str, dict[str, str]]] = {
    "chest": {
        "opacity": {
            "none": "two black fields",
            "left": "white cloud on one side",
            "right": "white cloud on the other",
        },
        "heart": {"normal": "narrow middle shape", "enlarged": "wide middle shape"},
        "effusion": {"no": "black down to the bottom", "yes": "white bottom"},
    },
    "brain": {
        "lesion": {
            "none": "no bright ball",
            "left": "bright ball on one side",
            "right": "bright ball on the other",
        },
        "ventricles": {"normal": "thin black middle", "dilated": "fat black middle"},
    },
    "tissue": {
        "cells": {"sparse": "few dots", "dense": "many dots"},
        "nuclei": {"small": "tiny dots", "large": "big dots"},
        "glands": {"no": "no white holes", "yes": "round white holes"},
    },
    "slide": {
        "growth": {"flat": "smooth oval", "papillary": "star with fingers"},
        "stain": {"pale": "pink", "dark": "violet"},
        "bleeding": {"no": "one colour", "yes": "red stains"},
    },
    "skin": {
        "tone": {"light": "beige ground", "dark": "brown ground"},
        "rash": {
            "plaque": "red area with white flakes",
            "spots": "scattered red points",
            "mole": "black area",
            "depigmented": "white area",
        },
    },
    "dermoscopy": {
        "lesion": {
            "nevus": "brown disc",
            "melanoma": "black ragged shape with blue",
            "keratosis": "yellow disc with white points",
            "carcinoma": "rose disc with grey points",
            "vascular": "red disc",
        },
    },
}
# Where to look for each trait: nouns that anyone knows who has leafed through an atlas.
_NOUNS: dict[str, dict[str, tuple[str, ...]]] = {
    "chest": {"opacity": ("lung", "lungs"), "heart": ("heart",), "effusion": ("pleural",)},
    "brain": {"lesion": ("brain",), "ventricles": ("ventricles",)},
    "tissue": {"cells": ("cellular", "cellularity"), "nuclei": ("nuclei",), "glands": ("glands",)},
    "slide": {"growth": ("growth",), "stain": ("grade",), "bleeding": ("hemorrhage",)},
    "skin": {"tone": ("skin type",), "rash": ("condition",)},
    "dermoscopy": {"lesion": ("lesion",)},
}


def pretrain(base: LlavaMed, seed: int, steps: int, progress: bool) -> None:
    """Train ``base`` in place, in the order of the real one: first the tower on pictures, ``steps`` steps, then,
    with the tower frozen, projector and language model on descriptions, as many. All weights are frozen at the end."""
    rng = np.random.default_rng([seed, 1])
    pixels, seen = drawn_album(base, rng, progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _train_tower(base, pixels, seen, Descent("tiny model: tower", len(seen), TOWER_BATCH, steps, rng, progress))
    language = Descent("tiny model: language", len(seen), LANGUAGE_BATCH, steps, rng, progress)
    train_language(base, pixels, seen, fillers(all_texts(), seen), language)


def pretraining_texts() -> Iterator[str]:
    """Return every description that pretraining can give of one trait, for the tokenizer to spell well."""
    for kind in _WORDS.values():
        for values in kind.values():
            yield from values.values()


def drawn_album(base: LlavaMed, rng: np.random.Generator, progress: bool) -> tuple[Tensor, list[Seen]]:
    """Return pictures of all kinds in turn, as the tower reads them: (pictures, 3, height, width)."""
    pixels: list[Tensor] = []
    seen: list[Seen] = []
    kinds = list(TRAITS) * (ALBUM_SIZE // len(TRAITS))
    for kind in progress_bar(kinds, desc="pictures for the tiny model", unit="image", disable=not progress):
        traits = sample_traits(kind, rng)
        pixels.append(preprocess(draw(kind, traits, rng).convert("RGB"), base.image_processor))
        words = {trait: _WORDS[kind][trait][value] for trait, value in traits.items()}
        seen.append(Seen(kind, traits, words, _NOUNS[kind]))
    return torch.stack(pixels), seen


class Descent:
    """Run AdamW with a one-cycle learning rate over random batches of the album."""

    def __init__(
        self,
        name: str,
        album: int,
        batch: int,
        steps: int,
        rng: np.random.Generator,
        progress: bool,
        rate: float = LEARNING_RATE,
    ) -> None:
        """
        Args:
            name: The text of the progress bar.
            album: The number of pictures.
            batch: The number of pictures of a batch.
            steps: The number of batches.
            rng: Draws the batches.
            progress: Show the bar.
            rate: The highest learning rate.
        """
        self.name, self.album, self.batch, self.steps = name, album, batch, steps
        self.rng, self.progress, self.rate = rng, progress, rate

    def run(self, parameters: Iterable[nn.Parameter], loss_of: LossOf) -> None:
        trained = list(parameters)
        optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
        schedule = OneCycleLR(optimizer, max_lr=self.rate, total_steps=self.steps)
        bar = progress_bar(range(self.steps), desc=self.name, unit="step", disable=not self.progress)
        for _ in bar:
            loss = loss_of(self.rng.integers(self.album, size=self.batch))
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


class TraitClassifiers(nn.Module):
    """Linear classifiers, one per trait, that tell a trait's values apart by features of pictures."""

    def __init__(self, width: int, classes: Classes) -> None:
        super().__init__()
        self._traits = [(kind, name, values) for kind in classes for name, values in classes[kind].items()]
        self._layers = nn.ModuleList([nn.Linear(width, len(values)) for _, _, values in self._traits])

    def targets(self, seen: Iterable[Seen]) -> Tensor:
        """Return (pictures, traits) int64: the place of each value, IGNORE_INDEX where a picture does not have the
        trait.
        """
        return torch.tensor(
            [
                [
                    values.index(one.traits[name]) if one.kind == kind and name in one.traits else IGNORE_INDEX
                    for kind, name, values in self._traits
                ]
                for one in seen
            ]
        )

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of all traits, summed over them and averaged over pictures, from (pictures,
        width)."""
        losses = [
            nn.functional.cross_entropy(layer(features), target, ignore_index=IGNORE_INDEX, reduction="sum")
            for layer, target in zip(self._layers, targets.T, strict=True)
        ]
        return torch.stack(losses).sum() / len(features)


def _train_tower(base: LlavaMed, pixels: Tensor, seen: Sequence[Seen], descent: Descent) -> None:
    """Teach the tower to tell the values of each trait apart by the mean of its patch features.

    The linear classifiers that judge it, one per trait, are discarded.
    """
    tower = base.model.model.vision_tower.requires_grad_(True)
    layer = base.model.config.vision_feature_layer
    classifiers = TraitClassifiers(tower.config.hidden_size, TRAITS)
    targets = classifiers.targets(seen)

    def loss_of(indices: NDArray[np.int64]) -> Tensor:
        features = tower(pixels[indices], output_hidden_states=True).hidden_states[layer][:, 1:].mean(1)
        loss: Tensor = classifiers(features, targets[indices])
        return loss

    descent.run([*tower.parameters(), *classifiers.parameters()], loss_of)
    tower.requires_grad_(False)


def train_language(
    base: LlavaMed, pixels: Tensor, seen: Sequence[Seen], fillers: Sequence[str], descent: Descent
) -> None:
    """Teach projector and language model to answer with descriptions.

    Word vectors and head stay as they are: pretraining uses few words, and all others must remain equally easy to say.

    Args:
        base: The model; all of its weights are frozen at the end.
        pixels: (pictures, 3, height, width), as the tower reads them.
        seen: What is seen in each picture.
        fillers: Words that ask for nothing.
        descent: The optimisation.
    """
    collate = TrainingCollator(base.tokenizer.pad_token_id)
    album = [_samples(base, one, image, fillers, descent.rng) for one, image in zip(seen, pixels, strict=True)]
    language = base.model.model.language_model
    trained = nn.ModuleList([base.model.model.multi_modal_projector, language.layers, language.norm])

    def loss_of(indices: NDArray[np.int64]) -> Tensor:
        batch = collate([album[index][descent.rng.integers(len(album[index]))] for index in indices])
        del batch["record_index"]
        loss: Tensor = base.model(**batch).loss
        return loss

    descent.run(trained.requires_grad_(True).parameters(), loss_of)
    trained.requires_grad_(False)


def _samples(
    base: LlavaMed, seen: Seen, pixels: Tensor, fillers: Sequence[str], rng: np.random.Generator
) -> list[Sample]:
    samples = []
    for question, answer in _descriptions(seen, fillers, rng):
        turns = [
            Turn.model_validate({"from": speaker, "value": text})
            for speaker, text in (("human", question), ("gpt", answer))
        ]
        encoded = encode_conversation(base.tokenizer, turns, images=1)
        ids, labels = expand_images(encoded, base.image_token_id, base.patches, MAX_LENGTH)
        samples.append(Sample(index=0, input_ids=ids, labels=labels, pixel_values=pixels[None]))
    return samples


def _descriptions(seen: Seen, fillers: Sequence[str], rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Return (question, answer) pairs about one picture; the question is a bag of words.

    Words that name a trait are answered with what is seen of it, any others with all that is seen, in any order. So the
    language model learns to take in the whole picture, and to let a noun guide it.
    """
    for _ in range(2):
        yield _question([], fillers, rng), ", ".join(seen.words[trait] for trait in rng.permutation(list(seen.words)))
    for trait, text in seen.words.items():
        for noun in seen.nouns[trait]:
            yield _question([noun], fillers, rng), text


def _question(nouns: Sequence[str], fillers: Sequence[str], rng: np.random.Generator) -> str:
    chosen = [str(word) for word in rng.choice(fillers, size=rng.integers(2, 8))]
    return " ".join(rng.permutation([*chosen, *nouns])) + "?"


def fillers(texts: Iterable[str], seen: Iterable[Seen]) -> list[str]:
    """Return the words of a stream's texts without the nouns of the album, sorted."""
    words = {word for text in texts for word in text.rstrip("?.").split()}
    nouns = {noun for one in seen for names in one.nouns.values() for noun in names}
    return sorted(words - {word for noun in nouns for word in noun.split()})
