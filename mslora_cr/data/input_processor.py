"""The interface by which data sets, collators, decoders and routers turn records into a base model's inputs.

`LlavaMedInputs` follows LLaVA-Med's published protocol; `ChatTemplateInputs` uses the processor and chat template that
come with any other model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from mslora_cr.data.answers.boxes import BoxRule
from mslora_cr.data.prompts import Turn
from mslora_cr.data.records import TestRecord, TrainingRecord

Collate = Callable[[Sequence[Any]], dict[str, Tensor]]
"""Samples → a right-padded batch: `input_ids`, `labels`, `attention_mask` (batch, length) int64, `record_index`
(batch,) int64, and what the model takes of images."""


@dataclass(frozen=True)
class Prompt:
    """A question's prompt, split after its last image where openings are shared."""

    opening: tuple[int, ...]
    """Ids up to the last image's patches, them included; none without an image. Equal ones are one object."""
    rest: tuple[int, ...]
    images: tuple[Path, ...]
    text: str = ""
    """As the chat template has it, for a processor; empty where ids are all that is needed."""

    def __len__(self) -> int:
        return len(self.opening) + len(self.rest)


class LabelCount(NamedTuple):
    """Of one training sample, in positions."""

    labels: int
    """Before it is cut at `max_length`; 0 where the template cannot hold the conversation."""
    learned: int
    """Those that are left after the cut."""
    length: int
    """Before it is cut, images included."""


class TextTokenizer(Protocol):
    """Text ↔ ids, without what a template adds."""

    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, sequences: Sequence[Sequence[int]], /) -> list[str]: ...


class InputProcessor(Protocol):
    """Cheap to send to data loader workers, where images are decoded."""

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def max_length(self) -> int:
        """Positions of a sample, `data.max_length`."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        ...

    @property
    def box_rule(self) -> BoxRule:
        """How the model writes boxes."""
        ...

    @property
    def shares_openings(self) -> bool:
        """Whether questions about the same images may share what stands before them: ids and positions that no text
        behind them changes."""
        ...

    def image_names(self, record: TrainingRecord | TestRecord, /) -> tuple[str, ...]:
        """The images of a record that are shown."""
        ...

    def image_paths(self, records: Iterable[TrainingRecord | TestRecord], roots: Sequence[Path], /) -> list[Path]:
        """Every image that some records show, once."""
        ...

    def sample(self, index: int, record: TrainingRecord, roots: Sequence[Path], /) -> Any:
        """A conversation with its images, decoded; the collator takes it. `index`: the record's."""
        ...

    def length(self, record: TrainingRecord, roots: Sequence[Path], /) -> int:
        """Positions of its sample, images included; none is decoded."""
        ...

    def count_labels(self, record: TrainingRecord, roots: Sequence[Path], /) -> LabelCount:
        """How many labels its sample has, before and after it is cut; no image is decoded."""
        ...

    def padding_sample(self, sample: Any, index: int, /) -> Any:
        """The same sample without a label."""
        ...

    def collator(self, multiple: int = 1, /) -> Collate:
        """Its batches are as long as a multiple of this."""
        ...

    def prompt(self, record: TestRecord, roots: Sequence[Path], /) -> Prompt:
        """A question's prompt; no image is decoded."""
        ...

    def prompt_length(self, record: TestRecord, roots: Sequence[Path], /) -> int:
        """Positions of a question's prompt before it is cut, images included; none is decoded."""
        ...

    def answer_ids(self, question: str, images: int, answer: str, /) -> tuple[int, ...]:
        """Ids of an answer behind the prompt of a question about some images, as training encodes them: up to and with
        the token that ends it.

        Raises:
            ValueError: the chat template has no place for them.
        """
        ...

    def process_images(self, images: Sequence[Image.Image], /) -> Any:
        """Decoded images as `answering_batch`, `asked` and the router take them."""
        ...

    def load_images(self, names: Sequence[str], roots: Sequence[Path], /) -> Any:
        """Of image files, as `process_images`."""
        ...

    def answering_batch(self, prompts: Sequence[Prompt], images: Sequence[Any], /) -> dict[str, Tensor]:
        """The inputs of a decoder besides the prompts' ids.

        Args:
            images: those of each, as `load_images` gives them.
        """
        ...

    def asked(self, earlier: Sequence[Turn], question: str, images: Any, /) -> tuple[list[int], dict[str, Tensor]]:
        """Ids of a prompt that goes on from earlier turns about the same images, and its `answering_batch` alone.

        Raises:
            ValueError: prompt and images take more positions than there may be.
        """
        ...
