"""Teaches a vision tower to describe each patch of a picture, hidden ones included.

Masked feature prediction: Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training", CVPR 2022.
The features are histograms of oriented gradients (Dalal and Triggs, CVPR 2005), mean colour, and contrast, of each
quarter of a patch; no label is needed for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mslora_cr.models.llava_med import LlavaMed
from mslora_cr.synthetic.pretraining import Classes, Descent, Seen, TraitClassifiers

ORIENTATIONS = 8
FEATURES = 4 * (ORIENTATIONS + 3 + 1)
"""Of a patch: its four quarters' histogram, colour and contrast."""
MOST_HIDDEN = 0.6
"""The largest share of a picture's patches that are hidden; the share is drawn anew each time, from 0 on."""
LEAST_SEEN = 0.75
"""The least share of a picture's side that a crop shows."""
TINT = 0.1
"""The standard deviation of a crop's gain and shift of each colour."""
LABEL_WEIGHT = 0.2
"""The weight of the coarse labels beside that of the descriptors."""
_STANDARD = 1024  # Pictures from which the descriptors' means and deviations are taken.


def describe_patches(pixels: Tensor, patch: int) -> Tensor:
    """Return (pictures, patches, FEATURES) from (pictures, 3, side, side), for patches of `patch` × `patch` pixels."""
    grey = pixels.mean(1, keepdim=True)
    padded = nn.functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    strength = (across.square() + down.square()).sqrt()
    # Orientation without sign; a gradient counts in the bin that it falls into.
    orientations = ((torch.atan2(down, across) / math.pi) % 1 * ORIENTATIONS).long().clamp(max=ORIENTATIONS - 1)
    histogram = torch.zeros(len(pixels), ORIENTATIONS, *grey.shape[2:]).scatter_(1, orientations, strength)
    quarter = patch // 2
    means = nn.functional.avg_pool2d(torch.cat([histogram, pixels, grey.square()], dim=1), quarter)
    means[:, -1] -= nn.functional.avg_pool2d(grey, quarter).squeeze(1).square()
    return nn.functional.unfold(means, kernel_size=2, stride=2).transpose(1, 2)


def train_tower(base: LlavaMed, pixels: Tensor, seen: Sequence[Seen], classes: Classes, descent: Descent) -> None:
    """Train the vision tower in place, up to the layer that the projector reads, on random crops of pictures.

    It learns to describe every patch, also those that are hidden from it, and to tell the values of each trait apart by
    the mean of the patches. Its parameters are frozen at the end.

    Args:
        pixels: (pictures, 3, side, side), as the tower reads them.
        seen: What is seen in each picture.
        classes: The traits of all kinds.
        descent: The optimisation.
    """
    tower = base.model.model.vision_tower.requires_grad_(True)
    width, patch = tower.config.hidden_size, tower.config.patch_size
    classifiers, describe = TraitClassifiers(width, classes), nn.Linear(width, FEATURES)
    hidden = nn.Parameter(torch.zeros(width))
    targets = classifiers.targets(seen)
    some = describe_patches(pixels[:: max(1, len(pixels) // _STANDARD)].float(), patch).flatten(0, 1)
    mean, deviation = some.mean(0), some.std(0) + 1e-4

    def loss_of(indices: NDArray[np.int64]) -> Tensor:
        views = cropped(pixels[indices].float())
        features = _hidden_states(tower, base.model.config.vision_feature_layer, views, hidden)
        wanted = (describe_patches(views, patch) - mean) / deviation
        described = nn.functional.smooth_l1_loss(describe(features), wanted)
        named: Tensor = classifiers(features.mean(1), targets[indices])
        return described + LABEL_WEIGHT * named

    descent.run([*tower.parameters(), *classifiers.parameters(), *describe.parameters(), hidden], loss_of)
    tower.requires_grad_(False)


def cropped(pixels: Tensor) -> Tensor:
    """Return random crops of the same size, turned by quarters, mirrored, and slightly tinted, by torch's generator."""
    count = len(pixels)
    scale = torch.empty(count, 1, 1).uniform_(LEAST_SEEN, 1)
    shift = (torch.rand(count, 2, 1) * 2 - 1) * (1 - scale)
    turned = torch.diag_embed(torch.randint(2, (count, 2)) * 2.0 - 1)
    swapped = (torch.rand(count, 1, 1) < 0.5).float()
    turned = swapped * turned.flip(-1) + (1 - swapped) * turned
    grid = nn.functional.affine_grid(torch.cat([turned * scale, shift], dim=2), list(pixels.shape), align_corners=False)
    crops = nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    gain, offset = TINT * torch.randn(2, count, 3, 1, 1)
    return crops * (1 + gain) + offset


def _hidden_states(tower: Any, layer: int, pixels: Tensor, hidden: Tensor) -> Tensor:
    """Return (pictures, patches, width) at the layer that the projector reads, with a random share of the patches
    hidden.
    """
    embeddings = tower.embeddings
    tokens = embeddings(pixels)
    positions = embeddings.position_embedding.weight
    share = torch.rand(len(pixels), 1) * MOST_HIDDEN
    is_hidden = torch.rand(tokens.shape[:2]) < share
    is_hidden[:, 0] = False  # The class position is no patch.
    tokens = torch.where(is_hidden[..., None], hidden + positions, tokens)
    states = tower.pre_layrnorm(tokens)
    layers = list(tower.encoder.layers)
    for block in layers[: len(layers) + 1 + layer]:
        states = block(states, attention_mask=None)
    return states[:, 1:]
