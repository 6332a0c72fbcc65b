"""Uploads adapters or merged models to the Hugging Face hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from mslora_cr.config.schema import StreamConfig
from mslora_cr.data.sources.download import RECORD as DOWNLOAD
from mslora_cr.evaluation.results import read_evaluation
from mslora_cr.runs.ledger import Ledger
from mslora_cr.serving.card import Card, Uploaded
from mslora_cr.serving.export import export, plan_export
from mslora_cr.utils.errors import UserError
from mslora_cr.utils.files import hidden_folder, write_text
from mslora_cr.utils.proxies import proxy_advice
from mslora_cr.utils.strict_json import read_object

CARD = "model_card.md"


class PushError(UserError):
    """Nothing was uploaded, or not everything."""


def write_card(
    config: StreamConfig, repo: str, kind: Uploaded, task: str | None, stage: int | None, base: str | None
) -> Path:
    """Write only the card, as `model_card.md` in the run folder.

    Raises:
        ConfigError, BankError: As `export`.
        PushError: The repository's or the base model's name is missing or wrong.
    """
    path = config.run_dir / CARD
    write_text(path, _card(config, repo, kind, task, stage, base).text())
    return path


def push(
    config: StreamConfig,
    repo: str,
    kind: Uploaded = "peft",
    task: str | None = None,
    stage: int | None = None,
    base: str | None = None,
    public: bool = False,
    endpoint: str | None = None,
) -> str:
    """Export a run, and upload it with its card; return the repository's address.

    The account is that of `HF_TOKEN` in the environment, or of `hf auth login`.

    Args:
        repo: `owner/name`. A new repository is private unless `public`; an existing one keeps its visibility.
        kind: As `export`.
        task: As `export`.
        stage: As `export`.
        base: The base model's name on the hub; by default where `mslora-cr model download` fetched it.
        public: Make a new repository public.

    Raises:
        ConfigError, BankError, ModelError: Before anything is uploaded.
        PushError: Names are missing or wrong, or the hub refuses.
    """
    card = _card(config, repo, kind, task, stage, base)
    with hidden_folder(config.run_dir / "push") as staging:
        whole = staging / "repository"
        for folder in export(config, staging / "exported", kind, task, stage, card.base if kind == "peft" else None):
            target = whole / card.folders[folder.name]
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
        (whole / "README.md").write_text(card.text(), encoding="utf-8")
        return _upload(whole, repo, public, f"{config.run}: {kind}", endpoint)


def _upload(folder: Path, repo: str, public: bool, message: str, endpoint: str | None) -> str:
    try:
        api = HfApi(endpoint=endpoint)
        address = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # Errors of the hub, the HTTP library and the system.
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise PushError(
                f"{repo}: the hub does not let this account write there (HTTP {status}); log in with `hf auth login` "
                "or set HF_TOKEN to a token that may write"
            ) from None
        advice = proxy_advice(urlsplit(endpoint or ENDPOINT).hostname or "")
        raise PushError(f"{repo}: the upload stopped ({error}); run the same command again{advice}") from error
    return str(address)


def _card(
    config: StreamConfig, repo: str, kind: Uploaded, task: str | None, stage: int | None, base: str | None
) -> Card:
    _check_name(repo, "REPO")
    chosen, _ = plan_export(config, kind, task, stage)
    return Card(
        config=config,
        repo=repo,
        kind=kind,
        base=_base(config, base),
        folders={name: name if len(chosen) > 1 else "" for name in chosen},
        banks={name: [bank.name for bank in banks] for name, banks in chosen.items()},
        ledger=Ledger.read(config).content,
        evaluation=read_evaluation(config.results_run_dir),
    )


def _base(config: StreamConfig, base: str | None) -> str:
    record = Path(config.model.path) / DOWNLOAD
    if base is None and record.is_file():
        base = read_object(record).get("repo")
    if base is None:
        raise PushError(
            f"{config.model.path} does not say which model of the hub it is; name it with --base OWNER/NAME"
        )
    _check_name(base, "--base")
    return base


def _check_name(name: str, what: str) -> None:
    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError(f"{name!r} is not of the form owner/name")
    except HFValidationError as error:
        raise PushError(f"{what}: {error}") from None
