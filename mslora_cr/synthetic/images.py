"""Drawn pictures of the embedded stream: radiographs, brain slices, stained tissue, slides, skin, dermoscopy.

A picture is drawn from named traits (``{"opacity": "left", "heart": "enlarged"}``); everything else about it
(size, position, contrast, texture, noise) comes from the generator and is independent of the traits.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Traits = dict[str, str]
Pixels = NDArray[np.float64]

SIDES = (80, 112)  # shortest and longest side of a picture, in pixels

#: Every trait of every kind of picture with its possible values.
TRAITS: dict[str, dict[str, tuple[str, ...]]] = {
    "chest": {
        "opacity": ("none", "left", "right"),
        "heart": ("normal", "enlarged"),
        "effusion": ("no", "yes"),
    },
    "brain": {"lesion": ("none", "left", "right"), "ventricles": ("normal", "dilated")},
    "tissue": {"cells": ("sparse", "dense"), "nuclei": ("small", "large"), "glands": ("no", "yes")},
    "slide": {"growth": ("flat", "papillary"), "stain": ("pale", "dark"), "bleeding": ("no", "yes")},
    "skin": {"tone": ("light", "dark"), "rash": ("plaque", "spots", "mole", "depigmented")},
    "dermoscopy": {"lesion": ("nevus", "melanoma", "keratosis", "carcinoma", "vascular")},
}


def draw(kind: str, traits: Traits, rng: np.random.Generator) -> Image.Image:
    """Draw one picture of ``kind`` that shows ``traits``: mode L for radiology, RGB otherwise, sides within
    ``SIDES``."""
    width, height = (int(side) for side in rng.integers(SIDES[0], SIDES[1] + 1, size=2))
    return _PAINTERS[kind](traits, rng, width, height)


def _grid(width: int, height: int, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Return x and y of every pixel, each from about -1 to 1, slightly shifted and scaled."""
    zoom, shift_x, shift_y = rng.uniform(0.92, 1.08), rng.uniform(-0.06, 0.06), rng.uniform(-0.06, 0.06)
    y, x = np.mgrid[0:height, 0:width]
    return (2 * x / width - 1 - shift_x) / zoom, (2 * y / height - 1 - shift_y) / zoom


def _blob(x: Pixels, y: Pixels, centre: tuple[float, float], radii: tuple[float, float], edge: float) -> Pixels:
    """Draw a soft ellipse: 1 inside, 0 outside; ``edge`` is the width of the transition relative to the radius."""
    distance = np.hypot((x - centre[0]) / radii[0], (y - centre[1]) / radii[1])
    return 1 / (1 + np.exp((distance - 1) / (edge / 4)))


def _clouds(width: int, height: int, rng: np.random.Generator, cells: int = 6) -> Pixels:
    """Draw smooth random texture around 0, about ``cells`` cells across, with a standard deviation near 0.3."""
    coarse = Image.fromarray(rng.normal(128, 40, size=(cells, cells)).clip(0, 255).astype(np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64) / 128 - 1


def _grey(pixels: Pixels, rng: np.random.Generator) -> Image.Image:
    noisy = pixels * rng.uniform(0.9, 1.1) + rng.normal(0, 0.02, size=pixels.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8))


def _rgb(pixels: Pixels, rng: np.random.Generator) -> Image.Image:
    """Return colours of shape (height, width, 3) in 0..1, with camera noise."""
    noisy = pixels * rng.uniform(0.94, 1.06) + rng.normal(0, 0.015, size=pixels.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8))


def _mix(below: Pixels, colour: tuple[float, float, float], cover: Pixels) -> Pixels:
    """Lay ``colour`` over ``below`` where ``cover`` (height, width; 0..1) says so."""
    return below + cover[..., None] * (np.asarray(colour) - below)


# A chest seen from the front: the patient's left is on the right of the picture.
_SIDE = {"left": 1.0, "right": -1.0}


def _chest(traits: Traits, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    x, y = _grid(width, height, rng)
    body = 0.62 * _blob(x, y, (0, 0.35), (0.98, 1.35), 0.15) + 0.05
    lungs = np.maximum(*(_blob(x, y, (0.45 * side, -0.05), (0.36, 0.7), 0.2) for side in _SIDE.values()))
    picture = body - 0.45 * lungs
    ribs = np.sin(9 * (y + 0.35 * np.abs(x)) + rng.uniform(0, 6)) ** 8
    picture += 0.07 * ribs * lungs + 0.1 * _blob(x, y, (0, 0), (0.09, 1.2), 0.4)
    heart = 0.5 if traits["heart"] == "enlarged" else 0.24
    picture += 0.4 * _blob(x, y, (0.14, 0.32), (heart, 0.3), 0.2) * lungs
    if traits["opacity"] != "none":
        centre = (_SIDE[traits["opacity"]] * rng.uniform(0.42, 0.52), rng.uniform(-0.45, -0.1))
        cloud = _blob(x, y, centre, (rng.uniform(0.22, 0.3), rng.uniform(0.24, 0.36)), 0.7)
        picture += 0.5 * cloud * (1 + 0.5 * _clouds(width, height, rng))
    if traits["effusion"] == "yes":
        picture += 0.42 * lungs / (1 + np.exp(-(y - 0.38 - 0.15 * np.abs(x)) * 25))
    return _grey(picture + 0.04 * _clouds(width, height, rng), rng)


def _brain(traits: Traits, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    x, y = _grid(width, height, rng)
    skull, inside = _blob(x, y, (0, 0), (0.78, 0.92), 0.06), _blob(x, y, (0, 0), (0.66, 0.8), 0.08)
    gyri = _clouds(width, height, rng, cells=14)
    picture = 0.75 * (skull - inside) + inside * (0.42 + 0.12 * gyri)
    size = 0.24 if traits["ventricles"] == "dilated" else 0.09
    for side in _SIDE.values():
        picture -= 0.38 * _blob(x, y, (side * (0.05 + size * 0.7), -0.02), (size, 0.14 + size), 0.3)
    if traits["lesion"] != "none":
        centre = (_SIDE[traits["lesion"]] * rng.uniform(0.34, 0.44), rng.uniform(-0.4, 0.4))
        picture += 0.5 * _blob(x, y, centre, (rng.uniform(0.18, 0.24), rng.uniform(0.18, 0.24)), 0.4)
    return _grey(picture, rng)


_LARGE_NUCLEUS = 5.0  # radius in pixels


def _tissue(traits: Traits, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw haematoxylin and eosin: pink ground, violet nuclei, glands as pale lumina in a ring of nuclei."""
    hue = rng.uniform(-0.03, 0.03)
    ground = np.zeros((height, width, 3)) + np.asarray((0.90 + hue, 0.66 + hue, 0.80 - hue))
    ground = _mix(ground, (0.80, 0.48, 0.68), 0.5 + 0.6 * _clouds(width, height, rng, cells=12))
    picture = Image.fromarray((ground.clip(0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    radius = _LARGE_NUCLEUS if traits["nuclei"] == "large" else 1.6
    covered = 0.36 if traits["cells"] == "dense" else 0.10  # share of the area that nuclei take
    for _ in range(int(covered * width * height / (np.pi * radius**2))):
        _nucleus(pen, rng.uniform(0, width), rng.uniform(0, height), radius, rng)
    if traits["glands"] == "yes":
        for quarter in rng.choice(4, size=2, replace=False):
            centre_x = width * (0.28 + 0.44 * (quarter % 2) + rng.uniform(-0.05, 0.05))
            centre_y = height * (0.28 + 0.44 * (quarter // 2) + rng.uniform(-0.05, 0.05))
            _gland(pen, centre_x, centre_y, rng.uniform(12, 16), radius, rng)
    return _rgb(np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float64) / 255, rng)


def _nucleus(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, rng: np.random.Generator) -> None:
    """Small nuclei are dark all over; large ones are paler, with a dark nucleolus."""
    a, b = radius * rng.uniform(0.8, 1.25), radius * rng.uniform(0.8, 1.25)
    shade = int(rng.integers(-18, 19))
    dark = (88 + shade, 48 + shade, 130 + shade)
    if radius < _LARGE_NUCLEUS:
        pen.ellipse((x - a, y - b, x + a, y + b), fill=dark)
    else:
        pen.ellipse((x - a, y - b, x + a, y + b), fill=(132 + shade, 104 + shade, 186 + shade), outline=dark)
        pen.ellipse((x - 1.6, y - 1.6, x + 1.6, y + 1.6), fill=(60, 24, 96))


def _gland(pen: ImageDraw.ImageDraw, x: float, y: float, size: float, radius: float, rng: np.random.Generator) -> None:
    pen.ellipse((x - size, y - size, x + size, y + size), fill=(248, 240, 246))
    for angle in np.arange(0, 2 * np.pi, 2.4 * radius / size):
        _nucleus(pen, x + size * np.cos(angle), y + size * np.sin(angle), radius, rng)


def _slide(traits: Traits, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw the thumbnail of a whole slide: stained tissue on white glass."""
    x, y = _grid(width, height, rng)
    if traits["growth"] == "papillary":  # fingers around a stalk
        turn, fingers = rng.uniform(0, 6), int(rng.integers(6, 9))
        reach = 0.62 + 0.28 * np.cos(fingers * np.arctan2(y, x) + turn)
        shape = 1 / (1 + np.exp((np.hypot(x, y) - reach) * 22))
    else:  # one broad band
        slope = rng.uniform(-0.15, 0.15)
        shape = _blob(x, y + slope * x, (0, 0), (0.9, rng.uniform(0.36, 0.46)), 0.2)
    colour = (0.50, 0.24, 0.58) if traits["stain"] == "dark" else (0.92, 0.66, 0.80)
    picture = _mix(np.full((height, width, 3), 0.96), colour, shape * (0.9 + 0.25 * _clouds(width, height, rng, 14)))
    if traits["bleeding"] == "yes":
        for _ in range(3):
            centre = (rng.uniform(-0.4, 0.4), rng.uniform(-0.25, 0.25))
            picture = _mix(picture, (0.78, 0.06, 0.08), 0.9 * _blob(x, y, centre, (0.15, 0.13), 0.4))
    return _rgb(picture, rng)


_TONES = {"light": (0.93, 0.76, 0.67), "dark": (0.50, 0.33, 0.25)}


def _skin(traits: Traits, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw a clinical photograph of a skin condition."""
    x, y = _grid(width, height, rng)
    tone = np.asarray(_TONES[traits["tone"]]) * rng.uniform(0.93, 1.07)
    picture = np.zeros((height, width, 3)) + tone
    picture *= 1 + 0.06 * _clouds(width, height, rng, cells=20)[..., None]
    centre = (rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3))
    wobble = 1 + 0.25 * _clouds(width, height, rng, cells=5)
    if traits["rash"] == "plaque":  # red with silvery scales
        patch = _blob(x * wobble, y * wobble, centre, (0.55, 0.48), 0.2)
        scales = (_clouds(width, height, rng, cells=22) > 0.3) * 0.8
        picture = _mix(_mix(picture, (0.72, 0.22, 0.22), 0.85 * patch), (0.93, 0.88, 0.86), patch * scales)
    elif traits["rash"] == "spots":  # many small red papules
        for _ in range(int(rng.integers(14, 20))):
            spot = _blob(x, y, (rng.uniform(-0.85, 0.85), rng.uniform(-0.85, 0.85)), (0.09, 0.09), 0.6)
            picture = _mix(picture, (0.80, 0.16, 0.16), 0.9 * spot)
    elif traits["rash"] == "mole":  # one dark, uneven lesion
        picture = _mix(picture, (0.13, 0.07, 0.07), _blob(x * wobble, y * wobble, centre, (0.36, 0.3), 0.15))
    else:  # depigmented: chalk-white patches
        for _ in range(2):
            middle = (rng.uniform(-0.45, 0.45), rng.uniform(-0.45, 0.45))
            picture = _mix(picture, (0.99, 0.95, 0.93), _blob(x * wobble, y * wobble, middle, (0.42, 0.36), 0.15))
    return _rgb(picture, rng)


# Colour of the lesion, half its width, how ragged its edge is.
_LESIONS = {
    "nevus": ((0.50, 0.30, 0.18), 0.42, 0.05),
    "melanoma": ((0.16, 0.09, 0.09), 0.60, 0.6),
    "keratosis": ((0.72, 0.54, 0.34), 0.55, 0.2),
    "carcinoma": ((0.90, 0.52, 0.54), 0.48, 0.2),
    "vascular": ((0.66, 0.04, 0.14), 0.36, 0.05),
}


def _dermoscopy(traits: Traits, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draw a lesion through a dermatoscope: the round dark rim of the optics, and a few hairs."""
    x, y = _grid(width, height, rng)
    picture = np.zeros((height, width, 3)) + np.asarray((0.90, 0.72, 0.66)) * rng.uniform(0.95, 1.05)
    colour, size, ragged = _LESIONS[traits["lesion"]]
    wobble = 1 + ragged * _clouds(width, height, rng, cells=5)
    cover = _blob(x * wobble, y * wobble, (rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)), (size, size * 0.9), 0.2)
    picture = _mix(picture, colour, 0.95 * cover)
    if traits["lesion"] == "melanoma":  # blue-white veil
        veil = _blob(x, y, (rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)), (0.24, 0.2), 0.5)
        picture = _mix(picture, (0.42, 0.48, 0.66), 0.8 * veil)
    if traits["lesion"] in ("keratosis", "carcinoma"):  # pale cysts, grey-blue globules
        speck = (0.97, 0.93, 0.80) if traits["lesion"] == "keratosis" else (0.38, 0.40, 0.52)
        for _ in range(7):
            at = (rng.uniform(-0.35, 0.35), rng.uniform(-0.35, 0.35))
            picture = _mix(picture, speck, 0.85 * _blob(x, y, at, (0.07, 0.07), 0.5))
    picture = _hairs(picture, rng)
    rim = 1 - _blob(x, y, (0, 0), (1.12, 1.12), 0.12)
    return _rgb(_mix(picture, (0.04, 0.03, 0.03), rim), rng)


def _hairs(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    picture = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(0, 4))):
        start, end = rng.uniform(0, 1, size=2) * picture.size, rng.uniform(0, 1, size=2) * picture.size
        pen.line([*start, *end], fill=(70, 50, 42), width=1)
    return np.asarray(picture, dtype=np.float64) / 255


_PAINTERS: dict[str, Callable[[Traits, np.random.Generator, int, int], Image.Image]] = {
    "chest": _chest,
    "brain": _brain,
    "tissue": _tissue,
    "slide": _slide,
    "skin": _skin,
    "dermoscopy": _dermoscopy,
}
