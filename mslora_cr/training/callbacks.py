"""Callbacks of the Trainer."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mslora_cr.utils.files import append_to, replacing
from mslora_cr.utils.progress import progress_bar
from mslora_cr.utils.strict_json import JsonError, decode_json

log = logging.getLogger(__name__)

VALIDATION = "eval_"
"""How the names of logged validation figures begin, as the Trainer's and the trackers' do."""
VALIDATION_LOSS = f"{VALIDATION}loss"
PRINTED_SCORES = ("exact match score", "close accuracy", "f1 score")
"""Validation scores on the console."""


class TowerOutsideGraph(TrainerCallback):
    """Keeps the vision tower out of the graph under gradient checkpointing.

    transformers then makes the output of every embedding require a gradient, the tower's too, so the tower would be
    recomputed and differentiated. Non-reentrant checkpointing, the only kind allowed here, does not need that.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.disable_input_require_grads()


class JsonLinesCallback(TrainerCallback):
    """Writes every logged record of a task as a line of JSON. A resumed task continues its file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop what a killed run logged after the checkpoint from which this one starts."""
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoints = []
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n")[:-1]:
                try:
                    checkpoints += [line] if decode_json(line)["step"] <= state.global_step else []
                except (JsonError, LookupError, TypeError):
                    break  # This line was being written when the run was killed.
        with replacing(self.path) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in checkpoints))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs and {"loss", VALIDATION_LOSS} & logs.keys():
            with append_to(self.path) as file:
                file.write(json.dumps({"step": state.global_step, **logs}).encode() + b"\n")


class ConsoleCallback(TrainerCallback):
    """Shows the steps of a task with its last loss and the time left: a bar, or lines where there is no terminal.

    It replaces transformers' own, which writes every logged record as a dictionary of texts.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero or args.disable_tqdm:
            return
        self._bar = progress_bar(desc=self._task, total=state.max_steps, initial=state.global_step, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4g}", refresh=False)
        if state.is_world_process_zero and logs and VALIDATION_LOSS in logs:
            figures = {name.removeprefix(VALIDATION): value for name, value in logs.items() if name != "epoch"}
            scores = "".join(f", {name} {value:.1f}" for name, value in figures.items() if name in PRINTED_SCORES)
            log.info("%s: validation at step %s: loss %.4f%s", self._task, state.global_step, figures["loss"], scores)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
