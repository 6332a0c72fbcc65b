"""What a frozen base model makes of images, on disk, one file per image: an image is decoded and encoded only once.

A file's name is the digest of the image's bytes; its folder's name is the digest of everything else that decides the
features: tower, preprocessing, dtype. A file is written under another name and renamed, so that two writers, or a
killed one, leave whole files or none. A bfloat16 file of LLaVA-Med's tower, 577 × 1024 features, takes 1.18 MB.
"""

from __future__ import annotations

import hashlib
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
        progress: bool = True,
    ) -> None:
        """Write the features of every image that has none yet; equal images count once.

        Args:
            prepare: Returns the model's inputs for an image; it runs in the workers.
            encode: Returns the features of prepared images, on the CPU.
        """
        by_path = {self.path_of(image): image for image in dict.fromkeys(images)}
        missing = [(path, image) for path, image in by_path.items() if not path.is_file()]
        prepared = _Prepared([image for _, image in missing], prepare)
        loader = DataLoader(prepared, batch_size=_BATCH, num_workers=workers, collate_fn=list)
        remaining: Iterator[Path] = iter([path for path, _ in missing])
        with progress_bar(desc="image features", total=len(missing), unit="image", disable=not progress) as bar:
            for batch in loader:
                for path, features in zip(islice(remaining, len(batch)), encode(batch), strict=True):
                    _write(path, save(dict(features)))
                bar.update(len(batch))


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
