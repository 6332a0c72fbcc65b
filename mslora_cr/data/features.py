"""What a frozen base model makes of images, on disk, one file per image: an image is decoded and encoded only once.

A file's name is the digest of the image's bytes; its folder's name is the digest of everything else that decides the
features: tower, preprocessing, dtype. A file is written under another name and renamed, so that two writers, or a
killed one, leave whole files or none. A bfloat16 file of LLaVA-Med's tower, 577 × 1024 features, takes 1.18 MB.

Other models keep what their `get_image_features` returns for an image, tower and projector included: `pooler_output`,
or `pooler_output.0`, … if it is a list with an entry an image, and `deepstack_features.L.0`, … for a layer. Features of
several images are put together as if they had been computed at once, and are a forward pass's `mm_encoder_outputs`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mslora_cr.data.image_digests import image_file_digest
from mslora_cr.data.images import load_image
from mslora_cr.data.records import DataError
from mslora_cr.utils.files import replacing
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_regular

_BATCH = 16  # The number of images that are encoded at once.


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features. It is cheap to send to data loader workers, which only read."""

    folder: Path

    def path_of(self, image: Path) -> Path:
        """Return the path of an image's features, whether or not the file exists."""
        digest = image_file_digest(image)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, image: Path) -> dict[str, Tensor]:
        """Return an image's features by name, in the model's dtype.

        Raises:
            DataError: There are none, or their file is damaged.
        """
        path = self.path_of(image)
        try:
            return load_file(check_regular(path))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{image}: no features in {path} ({error}); remove that file if it exists and start again, and do "
                "not change images while a run reads them"
            ) from None

    def fill(
        self,
        images: Iterable[Path],
        prepare: Callable[[Image.Image], Any],
        encode: Callable[[Sequence[Any]], Sequence[Mapping[str, Tensor]]],
        workers: int = 0,
        writers: int = 1,
        progress: bool = True,
    ) -> None:
        """Write the features of every image that has none yet; equal images count once.

        Args:
            prepare: Returns the model's inputs for an image; it runs in the workers.
            encode: Returns the features of prepared images, on the CPU.
            writers: How many processes fill the folder, each with as many images.

        Raises:
            DataError: The disk has no room for the features, as far as the first of them tell.
        """
        by_path = {self.path_of(image): image for image in dict.fromkeys(images)}
        missing = [(path, image) for path, image in by_path.items() if not path.is_file()]
        prepared = _Prepared([image for _, image in missing], prepare)
        loader = DataLoader(prepared, batch_size=_BATCH, num_workers=workers, collate_fn=list)
        remaining: Iterator[Path] = iter([path for path, _ in missing])
        with progress_bar(desc="image features", total=len(missing), unit="image", disable=not progress) as bar:
            for batch in loader:
                encoded = encode(batch)
                if not bar.n:
                    size = sum(tensor.nbytes for features in encoded for tensor in features.values()) / len(encoded)
                    self._check_room(size * len(missing) * writers)
                for path, features in zip(islice(remaining, len(batch)), encoded, strict=True):
                    _write(path, save(dict(features)))
                bar.update(len(batch))

    def _check_room(self, size: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(self.folder).free) < size:
            raise DataError(
                f"{self.folder}: images' features take about {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
                "set data.cache_image_features to a folder on another disk, or to null"
            )


class _Prepared(Dataset[Any]):
    def __init__(self, images: Sequence[Path], prepare: Callable[[Image.Image], Any]) -> None:
        self.images, self.prepare = images, prepare

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.prepare(load_image(self.images[index]))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as partial:
        partial.write_bytes(content)


def feature_key(weights: Mapping[str, Tensor], how: Any, processor: Any) -> str:
    """Digest of what decides an image's features, besides the image.

    Args:
        weights: Those of the modules that compute them.
        how: What else decides how they are computed, such as the layer of a tower.
        processor: The image processor.
    """
    digest = hashlib.sha256(repr((how, sorted(processor.to_dict().items(), key=lambda item: item[0]))).encode())
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


# --- features in place of pixels ---

MODEL_INPUT = "mm_encoder_outputs"
"""The argument of a model's forward pass."""
POOLED, LAST, BY_LAYER = "pooler_output", "last_hidden_state", "deepstack_features"
BY_IMAGE = (POOLED, LAST, BY_LAYER)
STATES = ("hidden_states", "attentions")
"""What models do not read of an encoder's output. They read its last states where nothing is pooled (Llama 4). What
they read besides features of each image is the same for every image (Ovis2's `visual_indicator_features`)."""


@dataclass(frozen=True)
class EncodedImage:
    """An image whose features are given."""

    size: tuple[int, int]
    """Width and height."""
    features: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.features.values())


class EncoderOutput(dict[str, Any]):
    """An encoder's output as models read it: by attribute. What it lacks is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "to":  # accelerate moves an object by its `to` if it has one
            raise AttributeError(name)
        return self.get(name)


def flattened(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return an encoder's output for one image as tensors by name, on the CPU."""
    found: dict[str, Tensor] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[name] = value.detach().to("cpu", copy=True).contiguous()
        elif isinstance(value, int):
            found[name] = torch.tensor(value)
        for number, part in enumerate(value if isinstance(value, list | tuple) else ()):
            add(f"{name}.{number}", part)

    left_out = {*STATES, LAST} if output.get(POOLED) is not None else set(STATES)
    for field, value in output.items():
        if field not in left_out:
            add(field, value)
    return found


def together(images: Sequence[Mapping[str, Tensor]]) -> dict[str, EncoderOutput]:
    """Return a model's `mm_encoder_outputs` for several images, one after another, from what is kept of each.

    Raises:
        ValueError: Something beside the features of images differs among them.
    """
    trees = [_nested(flat) for flat in images]
    output = EncoderOutput(
        {name: _joined([of[name] for of in trees], name == BY_LAYER) for name in BY_IMAGE if name in trees[0]}
    )
    for name in [name for name in trees[0] if name not in output]:
        if not all(_equal(of[name], trees[0][name]) for of in trees):
            raise ValueError(f"{name} differs among images")
        output[name] = trees[0][name]
    return {"image": output}


def _equal(one: Any, other: Any) -> bool:
    """Return whether two tensors, or nested lists of tensors, have the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.equal(other)
    lists = isinstance(one, list) and isinstance(other, list)
    return lists and len(one) == len(other) and all(map(_equal, one, other))


def _nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return tensors and lists by field; the inverse of `flattened`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in flat.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = tensor
    return {name: part[""] if "" in part else _list(part) for name, part in parts.items()}


def _list(flat: Mapping[str, Tensor]) -> list[Any]:
    return [value for _, value in sorted(_nested(flat).items(), key=lambda item: int(item[0]))]


def _joined(values: Sequence[Any], by_part: bool) -> Any:
    """Put the same part of several images together.

    Args:
        by_part: Whether the entries of a list are layers or the like, and not images.
    """
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values)) if first.dim() else int(first)
    if by_part or not all(isinstance(part, Tensor) and part.dim() for part in first):
        return [_joined(parts, False) for parts in zip(*values, strict=True)]
    return [part for value in values for part in value]
