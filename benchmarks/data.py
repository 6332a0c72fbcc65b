"""Images per second of one worker, and what the cache of image features saves and takes.

    python -m benchmarks.data                      # 1024 x 1024 pictures, CLIP ViT-L/14-336
    python -m benchmarks.data --size tiny

Pictures are noise over a gradient, as PNG and as JPEG. "features from the cache" is all that remains of an image, once
its features are on disk: hashing its file and reading 577 x 1024 numbers. "tower" is what the model is spared besides.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from benchmarks.harness import finish, parse
from mslora_cr.data.features import FeatureCache
from mslora_cr.data.images import load_image, pad_to_square, preprocess
from mslora_cr.models.vision import TowerFeatures

LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
LARGE |= {"image_size": 336, "patch_size": 14}
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"image_size": 28, "patch_size": 14}
LAYER = -2


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    setting = parse("data", __doc__, argv, _add_arguments)
    shape, side = (TINY, 64) if setting.args.size == "tiny" else (LARGE, setting.args.side)
    config, dtype = CLIPVisionConfig(**shape), torch.bfloat16
    with torch.device(setting.device):
        tower = CLIPVisionModel(config).to(dtype).eval()
    edge = config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=edge)

    features = TowerFeatures(tower, LAYER, processor)

    def encode(prepared: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return features.encode(prepared, setting.device)

    with tempfile.TemporaryDirectory() as folder:
        png, jpeg = _pictures(Path(folder), side)
        cache = FeatureCache(Path(folder) / "features")
        cache.fill([png, jpeg], features.prepare, encode, progress=False)
        image, pixels = load_image(png), preprocess(load_image(png), processor)
        seconds = setting.interleaved(
            {
                "PNG, decoded and preprocessed": lambda: preprocess(load_image(png), processor),
                "JPEG, decoded and preprocessed": lambda: preprocess(load_image(jpeg), processor),
                "PNG, decoded": lambda: load_image(png),
                "JPEG, decoded": lambda: load_image(jpeg),
                "preprocessed": lambda: preprocess(image, processor),
                "resized alone": lambda: pad_to_square(image, (0, 0, 0)).resize((edge, edge), Image.Resampling.BICUBIC),
                "tower": lambda: encode([pixels]),
                "features from the cache": lambda: cache.load(png),
            }
        )
        space = cache.path_of(png).stat().st_size
    return finish(
        setting,
        seconds,
        {
            "png_over_cache": ("PNG, decoded and preprocessed", "features from the cache"),
            "jpeg_over_cache": ("JPEG, decoded and preprocessed", "features from the cache"),
            "tower_over_cache": ("tower", "features from the cache"),
        },
        extra={
            "images_per_second": {name: 1 / sorted(taken)[len(taken) // 2] for name, taken in seconds.items()},
            "pixels_a_side": side,
            "feature_bytes_per_image": space,
            "gigabytes_for_100000_images": round(space * 1e5 / 1e9, 1),
        },
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, default=1024, metavar="N", help="pixels a side of each picture")


def _pictures(folder: Path, side: int) -> tuple[Path, Path]:
    ramp = np.linspace(0, 200, side)[:, None, None] + np.zeros((side, side, 3))
    noise = np.random.default_rng(0).integers(0, 56, (side, side, 3))
    picture = Image.fromarray((ramp + noise).astype(np.uint8))
    picture.save(folder / "picture.png")
    picture.save(folder / "picture.jpg", quality=90)
    return folder / "picture.png", folder / "picture.jpg"


if __name__ == "__main__":
    main()
