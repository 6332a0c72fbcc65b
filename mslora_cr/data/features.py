"""The frozen tower's features on disk, one file per image, so that an image is decoded and encoded only once.

A file's name is the digest of the image's bytes; its folder's name is the digest of everything else that decides the
features: tower, preprocessing, dtype. A file is written under another name and renamed, so that two writers, or a
killed one, leave whole files or none. A bfloat16 file of LLaVA-Med's tower, 577 × 1024 features, takes 1.18 MB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mslora_cr.data.image_digests import image_file_digest
from mslora_cr.data.images import load_image, preprocess
from mslora_cr.data.records import DataError
from mslora_cr.utils.files import replacing
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.regular import check_regular

_NAME = "features"
_BATCH = 16  # The number of images that the tower encodes at once.


@dataclass(frozen=True)
class FeatureCache:
    """A folder of features. It is cheap to send to data loader workers, which only read."""

    folder: Path

    def path_of(self, image: Path) -> Path:
        """Return the path of an image's features, whether or not the file exists."""
        digest = image_file_digest(image)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def load(self, image: Path) -> Tensor:
        """Return (positions, width), in the tower's dtype.

        Raises:
            DataError: There are none, or their file is damaged.
        """
        path = self.path_of(image)
        try:
            return load_file(check_regular(path))[_NAME]
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"{image}: no features in {path} ({error}); remove that file if it exists and start again, and do "
                "not change images while a run reads them"
            ) from None

    def fill(
        self,
        images: Iterable[Path],
        processor: Any,
        encode: Callable[[Tensor], Tensor],
        workers: int = 0,
        progress: bool = True,
    ) -> None:
        """Write the features of every image that has none yet; equal images count once.

        Args:
            encode: Maps pixels (n, 3, height, width), float32, to features (n, positions, width), on any device.
        """
        by_path = {self.path_of(image): image for image in dict.fromkeys(images)}
        missing = [(path, image) for path, image in by_path.items() if not path.is_file()]
        loader = DataLoader(_Pixels([image for _, image in missing], processor), batch_size=_BATCH, num_workers=workers)
        remaining: Iterator[Path] = iter([path for path, _ in missing])
        with progress_bar(desc="image features", total=len(missing), unit="image", disable=not progress) as bar:
            for pixels in loader:
                for path, features in zip(islice(remaining, len(pixels)), encode(pixels).cpu(), strict=True):
                    _write(path, save({_NAME: features.contiguous()}))
                bar.update(len(pixels))


class _Pixels(Dataset[Tensor]):
    def __init__(self, images: Sequence[Path], processor: Any) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return preprocess(load_image(self.images[index]), self.processor)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as partial:
        partial.write_bytes(content)


def feature_key(tower: torch.nn.Module, layer: int, processor: Any) -> str:
    """Digest of what decides an image's features, besides the image: tower, dtype, layer, preprocessing."""
    digest = hashlib.sha256(repr((layer, sorted(processor.to_dict().items(), key=lambda item: item[0]))).encode())
    for name, tensor in tower.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
