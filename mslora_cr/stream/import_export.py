"""Imports and exports the banks of a whole stream: published runs (`<run>/<a_b_c>/cl_lora.bin`), or a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from mslora_cr.banks.bank import Bank, BankError
from mslora_cr.banks.io import CONFIG, METADATA, STATISTICS, TASK_STATE, load_bank, save_bank
from mslora_cr.banks.kinds import kind_of
from mslora_cr.banks.published import BASE_DIGEST, PUBLISHED_WEIGHTS, export_published
from mslora_cr.config.run_files import BANK_WEIGHTS, LEDGER
from mslora_cr.config.schema import StreamConfig, Task
from mslora_cr.methods.base import method_of
from mslora_cr.models.family import family_of
from mslora_cr.models.layout import ModelError, read_config
from mslora_cr.models.load import base_digest
from mslora_cr.models.shapes import language_linear_shapes
from mslora_cr.runs.differences import with_former_defaults
from mslora_cr.runs.entries import Imported, RunLedger
from mslora_cr.runs.ledger import Ledger, bank_shape
from mslora_cr.runs.lock import one_writer
from mslora_cr.stream.recorded import builds_on_earlier, record_answering
from mslora_cr.utils.files import file_digest
from mslora_cr.utils.regular import check_regular
from mslora_cr.utils.state import StateError
from mslora_cr.utils.strict_json import read_object

_SPELLINGS = ("finetune_lora_MSLoRA", "finetune_MSLoRA")


def load_banks(folder: Path, config: StreamConfig) -> dict[str, Bank]:
    """Return the banks of the configuration's tasks, by task, from a folder.

    The folder is a published run, a folder of published runs (either spelling of the run's name), or a run folder of
    this project. The banks may end before the stream does.

    Raises:
        BankError: There is no bank, a bank is missing although a later one is there, or one has another rank or alpha.
    """
    sources = _bank_folders(folder, config, whole=method_of(config).keeps_frozen_adapters)
    banks = {name: _load(source, name, config) for name, source in sources.items()}
    check_base(sources, config, base_digest(config))
    return banks


def check_base(sources: Mapping[str, Path], config: StreamConfig, base: str) -> None:
    """Refuse banks that were certainly trained on another base model than the configuration's.

    Three places tell: the ledger of a run folder and the `config.json` of an exported bank, which have the digest of
    the weights, and PEFT's `base_model_name_or_path`, if that is a folder of the same layout.

    Args:
        sources: The banks' folders by task.
        base: The digest of its base model.
    """
    for name, source in sources.items():
        trained_on = _trained_on(source, name, config)
        if trained_on not in (None, base):
            raise BankError(
                f"{source}: was trained on a base model of other content than that in {config.model.path}, and only "
                "works with that one; set model.path and model.vision_tower to those it was trained with"
            )


def _trained_on(source: Path, name: str, config: StreamConfig) -> str | None:
    """Return the digest of the base model that a stored bank was trained on; None if it is unknown."""
    try:
        if (source / PUBLISHED_WEIGHTS).is_file():
            return read_object(source / "config.json").get(BASE_DIGEST)
        path = source.parent.parent / LEDGER
        ledger = RunLedger.read_if_there(path)
        trained = read_object(source / METADATA).get("base_model") if (source / METADATA).is_file() else None
        if ledger is None and isinstance(trained, dict) and isinstance(trained.get("digest"), str):
            return str(trained["digest"])
        if ledger is not None:
            entry = ledger.tasks.get(name)
            if entry and entry.digest != file_digest(source / BANK_WEIGHTS):
                raise BankError(f"{source / BANK_WEIGHTS} is not what {path} records; restore it")
            return entry.model_digest if entry else None
        named = read_object(source / CONFIG).get("base_model_name_or_path")
    except (BankError, StateError):
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise BankError(f"{source}: the record of its base model cannot be read ({error!r})") from None
    if not isinstance(named, str) or not named or not Path(named).is_dir():
        return None
    folder, configured = Path(named), Path(config.model.path)
    try:
        if read_config(folder)["model_type"] != read_config(configured)["model_type"]:
            return None  # This is the other layout, perhaps of the same weights, converted.
        return base_digest(config.model_copy(update={"model": config.model.model_copy(update={"path": named})}))
    except ModelError:
        return None


def _bank_folders(folder: Path, config: StreamConfig, whole: bool) -> dict[str, Path]:
    """Return the folders of the banks, by task. With `whole`, they must start at the first task and have no gap."""
    trained = method_of(config).trained(config)
    if not trained:
        raise BankError(f"{folder}: method {config.method} has no banks")
    candidates = {task.name: _bank_folder(folder, config, task) for task in trained}
    sources = {name: source for name, source in candidates.items() if source is not None}
    if not sources:
        tried = _published_name(config, trained[0])
        raise BankError(f"{folder}: no bank of this stream; looked for {tried}/{PUBLISHED_WEIGHTS} and banks/NAME")
    missing = next((task for task in trained[: len(sources)] if task.name not in sources), None)
    if whole and missing is not None:
        raise BankError(
            f"{folder}: the sequence of banks has a gap: {_published_name(config, missing)} is missing, though "
            f"{_published_name(config, config.task([*sources][-1]))} is there"
        )
    return sources


def _load(source: Path, name: str, config: StreamConfig) -> Bank:
    bank = load_bank(source)
    rank, alpha = bank_shape(config, config.task(name))
    if (bank.rank, bank.alpha) != (rank, alpha):
        raise BankError(
            f"{source}: rank {bank.rank} and alpha {bank.alpha:g}, but the configuration says rank {rank} and alpha "
            f"{alpha:g}; set lora.rank and lora.alpha"
        )
    return replace(bank, name=name)


def _published_name(config: StreamConfig, task: Task) -> str:
    """Return a task's folder in a published run: the names of the tasks learned by then, or only its own for
    independent banks.
    """
    members = config.stream[: task.index + 1] if builds_on_earlier(config) else [task]
    return "_".join(member.name for member in members)


def _bank_folder(folder: Path, config: StreamConfig, task: Task) -> Path | None:
    roots = [folder, folder / config.run]
    for ours, theirs in (_SPELLINGS, _SPELLINGS[::-1]):
        if config.run.startswith(ours):
            roots.append(folder / config.run.replace(ours, theirs, 1))
    if folder.is_dir() and len(inside := [path for path in folder.iterdir() if path.is_dir()]) == 1:
        roots += inside  # It was exported under another name of the run.
    for root in roots:
        if (root / _published_name(config, task) / PUBLISHED_WEIGHTS).is_file():
            return root / _published_name(config, task)
        if (root / "banks" / task.name / BANK_WEIGHTS).is_file():
            return root / "banks" / task.name
    return None


def export_banks(banks: Mapping[str, Bank], config: StreamConfig, output: Path) -> Iterator[Path]:
    """Write banks as a published run below `output`; yield each folder once it is written.

    Raises:
        BankError: There is no bank, or one that the published format cannot represent.
        ModelError: The base model's configuration cannot be read.
    """
    if not banks:
        raise BankError(f"no task of this run is trained yet in {config.run_dir}; train one first")
    base, digest = read_config(Path(config.model.path)), base_digest(config)
    if not family_of(Path(config.model.path)).published_banks:
        raise BankError(
            f"{config.model.path} is not LLaVA-Med, and published checkpoints can only hold banks of LLaVA-Med; use "
            "`mslora-cr export --format peft`"
        )
    for task in config.stream:
        if task.name in banks:
            folder = output / config.run / _published_name(config, task)
            export_published(banks[task.name], folder, task.index, base, digest)
            yield folder


def import_banks(folder: Path, config: StreamConfig) -> list[str]:
    """Enter the banks of a folder, as `load_banks` reads it, into the configuration's run as finished tasks.

    Training continues after them, and whatever reads the run folder finds them. Returns the tasks that were not there
    yet.

    Raises:
        BankError: As `load_banks`; or the banks belong to another base model or method; or a task is there with another
            bank; or the method's task state is missing. Nothing is written then.
        ConfigError: Another configuration made the run folder.
        ModelError: The base model cannot be read.
        LockedError: Another launch writes to the run folder.
    """
    config = with_former_defaults(config)
    with one_writer(config.run_dir):
        method, ledger = method_of(config), Ledger.read(config)
        sources = _bank_folders(folder, config, whole=method.keeps_frozen_adapters or method.init_from_previous)
        banks = {name: _load(source, name, config) for name, source in sources.items()}
        shapes = language_linear_shapes(Path(config.model.path))
        model_digest = base_digest(config)
        check_base(sources, config, model_digest)
        for name, bank in banks.items():
            _check_usable(bank, sources[name], config, shapes)
        missing = [name for name in banks if not _is_there(banks[name], ledger)]
        ledger.check_same_configuration(config, model_digest, force=False, advice="Import into another `run`")
        ledger.open(config, model_digest, force=False)
        for name in missing:
            _enter(banks[name], sources[name], config, ledger)
        return missing


def _check_usable(bank: Bank, source: Path, config: StreamConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse banks that training, evaluation or analysis of the run would refuse after the import."""
    method = method_of(config)
    bank_shapes = {name: (b.shape[0], a.shape[1]) for name, (a, b) in bank.matrices.items()}
    for name in sorted(bank_shapes.keys() | shapes.keys()):
        if bank_shapes.get(name) != shapes.get(name):
            here, there = (
                " × ".join(map(str, shape_of.get(name) or ())) or "not there" for shape_of in (bank_shapes, shapes)
            )
            raise BankError(
                f"{source}: its layers are not those of the base model {config.model.path}: {name} is {here}, the "
                f"model's {there}"
            )
    kind = method.adapter(config)
    if not kind.holds(bank):
        raise BankError(
            f"{source}: its bank is {kind_of(bank).description}, but method {config.method} trains {kind.description}"
        )
    if bank.projector and (method.keeps_frozen_adapters or method.mixes_banks):
        raise BankError(
            f"{source}: its bank was trained together with the projector and answers alone, but method {config.method} "
            "sums banks; import it into a run of another method, such as each"
        )
    if method.has_task_state and not (source / TASK_STATE).is_file():
        raise BankError(
            f"{source}: method {config.method} stores more of a task than its bank, so a bank alone cannot be "
            "imported; "
            f"import from the run folder that trained it, which has {TASK_STATE}"
        )


def _is_there(bank: Bank, ledger: Ledger) -> bool:
    """Return whether the run has this very bank; refuse another bank of that task."""
    if not ledger.done(bank.name):
        return False
    folder = ledger.bank_folder(bank.name)
    if load_bank(folder).digest != bank.digest:
        raise BankError(f"{folder}: task {bank.name!r} is finished with another bank; import into another `run`")
    return True


def _enter(bank: Bank, bank_folder: Path, config: StreamConfig, ledger: Ledger) -> None:
    """Save a bank in the run folder and enter it in the ledger, which then does not know how it was trained."""
    task, folder = config.task(bank.name), ledger.bank_folder(bank.name)
    file = bank_folder / (PUBLISHED_WEIGHTS if (bank_folder / PUBLISHED_WEIGHTS).is_file() else BANK_WEIGHTS)
    source = {"path": str(file.resolve()), "sha256": file_digest(file)}
    # The source's statistics, or those that `bank fit-router` has put there before.
    routers = [load_file(origin / STATISTICS) for origin in (bank_folder, folder) if (origin / STATISTICS).is_file()]
    # Another method's statistics have no questions for this method's router.
    if method_of(config).router_examples(config):
        routers = [statistics for statistics in routers if "examples" in statistics]
    extra = {STATISTICS: routers[0]} if routers else {}
    if method_of(config).has_task_state:
        extra[TASK_STATE] = load_file(check_regular(bank_folder / TASK_STATE))
    described = {**bank.metadata, "modality": task.modality, "index": task.index, "imported": source}
    digest = save_bank(replace(bank, metadata=described), folder, config.lora.dropout, extra)
    imported = Imported(path=source["path"], sha256=source["sha256"])
    ledger.enter(config, task, digest, steps=0, train_loss=None, seconds=0.0, imported=imported)
    record_answering(config, ledger)
