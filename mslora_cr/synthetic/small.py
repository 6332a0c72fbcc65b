"""Makes a small base model that has seen real pictures, for streams of real pictures on a CPU: `mslora-cr model make`.

The order is that of the tiny model: first the tower, on real and on drawn pictures (`descriptors.py`); then, with the
tower frozen, projector and language model on descriptions. Of the stream it knows words alone: its tokenizer spells
those of the training questions and answers, and questions of pretraining are bags of the former. It sees none of the
stream's pictures, and no answer beside a question.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.data.records import TrainingRecords
from mslora_cr.data.sources.raw import RawData
from mslora_cr.data.tasks import training_file
from mslora_cr.models.llava_med import LlavaMed, load
from mslora_cr.synthetic.atlas import CLASSES, AtlasFile, atlas_album, atlas_digest, atlas_files, atlas_texts
from mslora_cr.synthetic.descriptors import train_tower
from mslora_cr.synthetic.images import TRAITS
from mslora_cr.synthetic.model import SMALL, write_random_model, write_weights
from mslora_cr.synthetic.pretraining import (
    LANGUAGE_BATCH,
    LEARNING_RATE,
    TOWER_BATCH,
    Descent,
    Seen,
    drawn_album,
    fillers,
    pretraining_texts,
    train_language,
)
from mslora_cr.synthetic.stream import build_once
from mslora_cr.utils.files import hidden_folder

TOWER_STEPS, LANGUAGE_STEPS = 600, 1000
TOWER_RATE = 1e-3


def make_small_llava(
    config: StreamConfig,
    raw: Sequence[Path],
    tower_steps: int = TOWER_STEPS,
    language_steps: int = LANGUAGE_STEPS,
    progress: bool = True,
) -> Path:
    """Write the base model of a stream, and its tower beside it; return the model's folder, `model.path`.

    A complete model made with the same arguments, pictures and words is left unchanged; one made with others is
    replaced. The trained tower is kept in a folder beside it, so that an interrupted call resumes behind it.

    Args:
        config: The stream: the words of its training records, the folder of the model, and the seed.
        raw: Clones or archives of `atlas.REPOSITORIES`, or folders that hold them.
        tower_steps: Batches of the tower.
        language_steps: Batches of projector and language model.
        progress: Show bars.

    Raises:
        ConfigError: `model.path` has another name than such a model's.
        DataError: Pictures or training records are missing, or the model's folder holds something else.
    """
    folder = Path(config.model.path)
    if folder.name != SMALL.model_folder:
        raise ConfigError(f"model.path: the folder of such a model is named {SMALL.model_folder}, not {folder.name}")
    questions, answers = _texts(config)
    with hidden_folder(folder.parent) as work, RawData(raw, work / "raw") as data:
        files = atlas_files(data)
        made_from = {
            "seed": config.seed,
            "tower_steps": tower_steps,
            "pictures": atlas_digest(files),
            "words": hashlib.sha256("\n".join([*questions, *answers]).encode()).hexdigest(),
        }
        seen = _Album(files, config.seed, progress)

        def build_tower(target: Path) -> None:
            write_random_model(SMALL, [*questions, *answers, *pretraining_texts(), *atlas_texts()], config.seed, target)
            base = load(target / SMALL.model_folder, dtype=torch.float32)
            descent = seen.descent(base, "tower", TOWER_BATCH, tower_steps, TOWER_RATE)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                train_tower(base, *seen.of(base), {**TRAITS, **CLASSES}, descent)
            write_weights(SMALL, base.model, target)

        def build(target: Path) -> None:
            base = load(tower / SMALL.model_folder, dtype=torch.float32)
            pixels, pictures = seen.of(base)
            descent = seen.descent(base, "language", LANGUAGE_BATCH, language_steps, LEARNING_RATE)
            train_language(base, pixels, pictures, fillers(questions, pictures), descent)
            shutil.copytree(tower / SMALL.model_folder, target / SMALL.model_folder)  # The tokenizer.
            write_weights(SMALL, base.model, target)

        tower = folder.parent.with_name(f"{folder.parent.name}-tower")
        build_once(tower, "tower of a small LLaVA", made_from, build_tower)
        build_once(folder.parent, "small LLaVA", {**made_from, "language_steps": language_steps}, build)
    return folder


class _Album:
    """The real and the drawn pictures, prepared when they are first needed."""

    def __init__(self, files: Sequence[AtlasFile], seed: int, progress: bool) -> None:
        self._files, self._seed, self._progress = files, seed, progress
        self._prepared: tuple[Tensor, list[Seen]] | None = None

    def of(self, base: LlavaMed) -> tuple[Tensor, list[Seen]]:
        """Return the pictures as the tower of `base` reads them, (pictures, 3, side, side), and what is seen in
        each."""
        if self._prepared is None:
            drawn, drawn_seen = drawn_album(base, np.random.default_rng([self._seed, 1]), self._progress)
            real, real_seen = atlas_album(base, self._files, self._progress)
            self._prepared = torch.cat([drawn, real]), [*drawn_seen, *real_seen]
        return self._prepared

    def descent(self, base: LlavaMed, name: str, batch: int, steps: int, rate: float) -> Descent:
        rng = np.random.default_rng([self._seed, 2])
        return Descent(f"small model: {name}", len(self.of(base)[1]), batch, steps, rng, self._progress, rate)


def _texts(config: StreamConfig) -> tuple[list[str], list[str]]:
    """Return the different questions and the different answers of all training records, each sorted, so that nothing
    tells which answer belongs to which question."""
    questions, answers = set[str](), set[str]()
    for task in config.stream:
        for record in TrainingRecords(training_file(config, task)):
            for turn in record.turns:
                (questions if turn.speaker == "human" else answers).add(turn.text.replace("<image>", "").strip())
    return sorted(questions), sorted(answers)
