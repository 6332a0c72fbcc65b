"""Exports a run's banks for other programs: PEFT adapters, merged models, GGUF files, published checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from mslora_cr import __version__
from mslora_cr.banks.bank import Bank, BankError, sum_banks
from mslora_cr.banks.io import write_adapter
from mslora_cr.banks.stack import BankStack
from mslora_cr.config.schema import ConfigError, StreamConfig
from mslora_cr.models.base_model import BaseModel
from mslora_cr.models.load import base_digest, load_base
from mslora_cr.models.save import class_of, deciding_settings, exported_targets, writer_of
from mslora_cr.runs.ledger import finished_banks
from mslora_cr.serving.gguf_model import check_layout, write_lora, write_text_model
from mslora_cr.serving.gguf_projector import check_projector, write_projector
from mslora_cr.serving.selection import RunBanks
from mslora_cr.stream.import_export import export_banks
from mslora_cr.utils.files import replacing_folder, write_json
from mslora_cr.utils.strict_json import read_object

log = logging.getLogger(__name__)

Format = Literal["peft", "merged", "gguf", "published"]
RECORD = "export.json"
"""What an exported folder was made from."""
BASE = "base"
"""The exported base model's folder, next to the adapters."""
ALL = "model"
"""The folder of a model that answers every task."""
GGUF_MODEL, GGUF_PROJECTOR, GGUF_ADAPTER = "model.gguf", "mmproj.gguf", "adapter.gguf"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `--max-lora-rank`."""


def export(
    config: StreamConfig,
    output: Path,
    kind: Format,
    task: str | None = None,
    stage: int | None = None,
    base: str | None = None,
) -> Iterator[Path]:
    """Write the banks that answer each task, or one task, after a stage; yields each folder once it is written whole.

    Args:
        output: The parent of the folders. A folder of an earlier export is replaced; the base model's stays if it is of
            the same weights.
        stage: The last trained stage by default; not for `published`, which holds the whole sequence.
        base: For `peft`, the base model that the adapters name; by default it is written to `output/base`.

    Raises:
        ConfigError, BankError, ModelError: Before anything is written, if there is nothing to export or the format
            cannot hold it.
    """
    if kind == "published":
        if task is not None or stage is not None:
            raise ConfigError("a published run holds the banks of all tasks; leave --task and --stage out")
        yield from export_banks(finished_banks(config), config, output)
        return
    chosen, stage = plan_export(config, kind, task, stage)
    if config.model.quantization:
        log.warning(
            "the banks were trained beside a %s base, and what is exported has, or names, the base in %s: answers "
            "differ, so evaluate again without model.quantization",
            config.model.quantization,
            config.model.dtype,
        )
    if kind == "merged":
        yield from _merged(config, output, chosen, stage)
    elif kind == "gguf":
        yield from _gguf(config, output, chosen, stage)
    else:
        yield from _adapters(config, output, chosen, stage, base)


def plan_export(
    config: StreamConfig, kind: Format, task: str | None, stage: int | None
) -> tuple[dict[str, list[Bank]], int]:
    """Return the folders that `export` would write, each with the banks that go into it, and the stage.

    Raises:
        ConfigError, BankError: As `export`.
    """
    run = RunBanks(config, finished_banks(config))
    stage = run.stage(stage)
    chosen = {name: run.answering(None if name == ALL else name, stage) for name in _names(run, task, stage)}
    for name, banks in chosen.items():
        if any(bank.depends_on_input for bank in banks):
            raise BankError(
                f"{name}: its bank depends on the input, as a mixture of experts does; neither PEFT nor merged weights "
                "hold it"
            )
        if kind in ("peft", "gguf") and not banks:
            raise BankError(f"{name}: no bank answers at stage {stage}; there is no adapter to write")
    return chosen, stage


def _names(run: RunBanks, task: str | None, stage: int) -> Sequence[str]:
    if task is not None:
        return [run.config.task(task).name]
    if stage == 0 or not run.needs_task:
        return [ALL]
    return [member.name for member in run.config.stream if member.index < stage and member.name in run.banks]


def _merged(config: StreamConfig, output: Path, chosen: dict[str, list[Bank]], stage: int) -> Iterator[Path]:
    model = _plain_base(config)
    stack, weights = BankStack(model.model, "merge", reuse=True), base_digest(config)
    write = writer_of(model, Path(config.model.path))
    for name, banks in chosen.items():
        stack.set_frozen(banks)
        yield _write_model(write, output / name, _record(config, weights, name, stage, banks))


def _adapters(
    config: StreamConfig, output: Path, chosen: dict[str, list[Bank]], stage: int, base: str | None
) -> Iterator[Path]:
    weights, base_folder = base_digest(config), output / BASE
    if base is not None and (settings := deciding_settings(Path(config.model.path))):
        log.warning(
            "%s: a program that takes the base model's own generation_config.json answers otherwise than evaluate: it "
            "has %s. Ask without these settings (vLLM: --generation-config vllm), or export without --base",
            base,
            ", ".join(settings),
        )
    if base is None and not _holds_base(base_folder, weights, "config.json"):
        write = writer_of(_plain_base(config), Path(config.model.path))
        yield _write_model(write, base_folder, _record(config, weights, None, 0, []))
    for name, banks in chosen.items():
        folder = output / name
        with _replaced(folder) as staging:
            _write_adapter(sum_banks(banks, name), staging, base or str(base_folder.resolve()), Path(config.model.path))
            write_json(staging / RECORD, _record(config, weights, name, stage, banks))
        yield folder


def _gguf(config: StreamConfig, output: Path, chosen: dict[str, list[Bank]], stage: int) -> Iterator[Path]:
    import gguf  # noqa: F401  (it is missing before the model is read, not after)

    base, weights, folder = _plain_base(config), base_digest(config), output / BASE
    if not _holds_base(folder, weights, GGUF_MODEL):
        with _replaced(folder) as staging:
            write_gguf_base(base, staging)
            write_json(staging / RECORD, _record(config, weights, None, 0, []))
        yield folder
    for name, banks in chosen.items():
        bank = sum_banks(banks, name)
        with _replaced(output / name) as staging:
            write_lora(base.model, bank, staging / GGUF_ADAPTER)
            if bank.projector:
                write_projector(base, bank.projector, name, staging / GGUF_PROJECTOR)
            write_json(staging / RECORD, _record(config, weights, name, stage, banks))
        yield output / name


def write_gguf_base(base: BaseModel, folder: Path) -> None:
    """Write a base model's text model, and its tower with the projector, into an existing folder.

    Raises:
        ModelError: llama.cpp has no layout for it.
    """
    check_layout(base.model)
    check_projector(base.model)
    write_text_model(base, BASE, folder / GGUF_MODEL)
    write_projector(base, {}, BASE, folder / GGUF_PROJECTOR)


def _holds_base(folder: Path, weights: str, file: str) -> bool:
    """Whether an earlier export of the same weights, in the format that has this file, is in the folder."""
    return read_record(folder).get("base_weights") == weights and (folder / file).is_file()


def _write_adapter(bank: Bank, folder: Path, base: str, model: Path) -> None:
    settings: dict[str, Any] = {"base_model_name_or_path": base, "inference_mode": True}
    # By this, and only without a `task_type`, `AutoPeftModel` finds the base model's class: AutoModelForCausalLM, which
    # a task type would lead to, knows no images.
    kind, module = class_of(model)
    # Without names, `target_modules` is an expression that only transformers 4.52 and newer match: under an older one,
    # which names layers otherwise, PEFT refuses the adapter instead of leaving it at zero.
    if (named := exported_targets(model, bank.matrices)) is not None:
        settings["target_modules"] = named
    settings |= {"auto_mapping": {"base_model_class": kind, "parent_library": module}}
    write_adapter(bank, folder, changed=settings)


def _write_model(write: Callable[[Path], None], folder: Path, record: dict[str, Any]) -> Path:
    with _replaced(folder) as staging:
        write(staging)
        write_json(staging / RECORD, record)
    return folder


def _plain_base(config: StreamConfig) -> BaseModel:
    """Return the base model in its own dtype on the CPU: a quantised one holds no weights to merge into or to write."""
    plain = config.model.model_copy(update={"quantization": None})
    return load_base(config.model_copy(update={"model": plain}), "cpu")


def _record(config: StreamConfig, weights: str, task: str | None, stage: int, banks: Sequence[Bank]) -> dict[str, Any]:
    return {
        "run": config.run,
        "method": config.method,
        "task": task,
        "stage": stage,
        "banks": {bank.name: bank.digest for bank in banks},
        "rank": sum(bank.rank for bank in banks),
        "base_weights": weights,
        "version": __version__,
        **({"trained_beside": f"the base in {quantization}"} if (quantization := config.model.quantization) else {}),
    }


def read_record(folder: Path) -> dict[str, Any]:
    """Return the stamp of an exported folder; empty if it has none."""
    path = folder / RECORD
    return read_object(path) if path.is_file() else {}


def _replaced(folder: Path) -> AbstractContextManager[Path]:
    """Do what `replacing_folder` does."""
    if folder.exists() and not (folder / RECORD).is_file():
        raise ConfigError(f"{folder} is there and not an export of this program; choose another --output")
    return replacing_folder(folder)


def max_lora_rank(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM that an adapter fits into; None if it fits into none."""
    return next((most for most in VLLM_RANKS if most >= rank), None)
