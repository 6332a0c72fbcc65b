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
"""Turns samples into a right-padded batch: `input_ids`, `labels`, `attention_mask` (batch, length) int64,
`record_index` (batch,) int64, and the image inputs of the model."""


@dataclass(frozen=True)
class Prompt:
    """A question's prompt, split after its last image where openings are shared."""

    opening: tuple[int, ...]
    """Ids up to and with the last image's patches; none without an image. Equal ones are one object."""
    rest: tuple[int, ...]
    images: tuple[Path, ...]
    text: str = ""
    """The text as the chat template writes it, for a processor; empty where ids are all that is needed."""

    def __len__(self) -> int:
        return len(self.opening) + len(self.rest)


class LabelCount(NamedTuple):
    """Number of labels and positions of one training sample."""

    labels: int
    """Number of labels before the sample is cut at `max_length`; 0 where the template cannot hold the conversation."""
    learned: int
    """Number of labels that are left after the cut."""
    length: int
    """Number of positions before the cut, images included."""


class TextTokenizer(Protocol):
    """Converts text to ids and back, without what a template adds."""

    @property
    def eos_token_id(self) -> int: ...
    @property
    def pad_token_id(self) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, sequences: Sequence[Sequence[int]], /) -> list[str]: ...


class InputProcessor(Protocol):
    """Turns records into a model's inputs. It is cheap to send to data loader workers, where images are decoded."""

    @property
    def tokenizer(self) -> TextTokenizer: ...
    @property
    def max_length(self) -> int:
        """Positions of a sample at most, `data.max_length`."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""

    @property
    def box_rule(self) -> BoxRule:
        """How the model writes boxes."""

    @property
    def shares_openings(self) -> bool:
        """Whether questions about the same images may share what stands before them: ids and positions that no text
        after them changes."""

    def image_names(self, record: TrainingRecord | TestRecord, /) -> tuple[str, ...]:
        """Return the images of a record that are shown."""

    def image_paths(self, records: Iterable[TrainingRecord | TestRecord], roots: Sequence[Path], /) -> list[Path]:
        """Return every image that some records show, once."""

    def sample(self, index: int, record: TrainingRecord, roots: Sequence[Path], /) -> Any:
        """Encode a conversation with its decoded images, for the collator. `index` is the record's."""

    def length(self, record: TrainingRecord, roots: Sequence[Path], /) -> int:
        """Return the number of positions of a record's sample, images included, without decoding an image."""

    def count_labels(self, record: TrainingRecord, roots: Sequence[Path], /) -> LabelCount:
        """Return how many labels a record's sample has, before and after it is cut, without decoding an image."""

    def padding_sample(self, sample: Any, index: int, /) -> Any:
        """Return the same sample without a label."""

    def collator(self, multiple: int = 1, /) -> Collate:
        """Return the collator; the length of its batches is a multiple of `multiple`."""

    def prompt(self, record: TestRecord, roots: Sequence[Path], /) -> Prompt:
        """Return a question's prompt, without decoding an image."""

    def prompt_length(self, record: TestRecord, roots: Sequence[Path], /) -> int:
        """Return the number of positions of a question's prompt before it is cut, images included, without decoding an
        image."""

    def answer_ids(self, question: str, images: int, answer: str, /) -> tuple[int, ...]:
        """Return the ids of an answer after the prompt of a question about some images, as training encodes them: up to
        and with the token that ends it.

        Raises:
            ValueError: The chat template has no place for them.
        """

    def process_images(self, images: Sequence[Image.Image], /) -> Any:
        """Decode images in the form that `answering_batch`, `asked` and the router take."""

    def load_images(self, names: Sequence[str], roots: Sequence[Path], /) -> Any:
        """Return what the images of files are to the model, as `process_images` does."""

    def answering_batch(self, prompts: Sequence[Prompt], images: Sequence[Any], /) -> dict[str, Tensor]:
        """Return the inputs of a decoder besides the prompts' ids.

        Args:
            images: The images of each prompt, as `load_images` returns them.
        """

    def asked(self, earlier: Sequence[Turn], question: str, images: Any, /) -> tuple[list[int], dict[str, Tensor]]:
        """Return the ids of a prompt that continues earlier turns about the same images, and its `answering_batch`
        alone.

        Raises:
            ValueError: Prompt and images take more positions than are allowed.
        """
