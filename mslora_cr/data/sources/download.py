"""`mslora-cr data download` and `mslora-cr model download`: downloads the project's files from the Hugging Face hub.

An interrupted download resumes where it stopped. `download.json` beside the files records the exact commit. The
environment variable HF_ENDPOINT names another endpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mslora_cr.data.images import check_name
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.lock import check_fetched, check_upstream
from mslora_cr.utils.files import resumable, write_json
from mslora_cr.utils.proxies import proxy_advice
from mslora_cr.utils.strict_json import read_object

RECORD = "download.json"


@dataclass(frozen=True)
class Asset:
    """A repository of the hub, and the files of it that are needed."""

    repo: str
    kind: str
    """`model` or `dataset`, as the hub calls it."""
    patterns: tuple[str, ...]
    subfolder: str
    """Its folder below the target folder."""
    license: str


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    size: int
    digest: str
    """SHA-256 for large files, Git's blob id for others."""


ANNOTATIONS = Asset(
    "VentusAislant/MSLoRA_CR",
    "dataset",
    ("*.json", "*.jsonl"),
    ".",
    "as the data sets themselves; see below",
)
WEIGHTS = ("*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin")
MODELS = {
    "llava_med_v1.5": Asset(
        "microsoft/llava-med-v1.5-mistral-7b",
        "model",
        WEIGHTS,
        "llava_med_v1.5",
        "Apache-2.0; for research use",
    ),
    "clip": Asset("openai/clip-vit-large-patch14-336", "model", WEIGHTS, "openai/clip-vit-large-patch14-336", "MIT"),
    "checkpoints": Asset("VentusAislant/MSLoRA_CR", "model", ("finetune_*/*",), ".", "Apache-2.0; for inference"),
}


def download(
    asset: Asset,
    folder: Path,
    revision: str | None = None,
    endpoint: str | None = None,
    lock: Path | None = None,
    update: bool = False,
) -> Path:
    """Fetch an asset into `folder / asset.subfolder`, and return that path. Files already there are not fetched again.

    An interrupted file resumes in its middle, also after a kill; with `snapshot_download` it would
    start from the beginning.

    Args:
        lock: The lock file. The first download enters the files, later ones are compared with it.
        update: Replace the locked digests.

    Raises:
        DataError: No access, no such repository or revision, a broken connection, a damaged file, one in the way
            that another source put there, or one that is not as locked.
    """
    target, name = folder / asset.subfolder, f"{asset.kind}s/{asset.repo}"
    try:
        commit, files = _listing(asset, revision, endpoint)
        if lock and not update:
            expected = {file.name: (file.size, file.digest if len(file.digest) == 64 else "") for file in files}
            check_upstream(lock, name, commit, expected)
        in_place = _read_record(target)
        missing = [file for file in files if not _is_here(file, target, in_place)]
        record = {"repo": asset.repo, "kind": asset.kind, "revision": revision or "main", "commit": commit}
        in_place = {file.name: file.digest for file in files if file not in missing}
        _write_record(target, {**record, "finished": None, "files": in_place})
        for file in missing:
            _fetch(asset, file, commit, target / file.name, endpoint)
            in_place[file.name] = file.digest
            _write_record(target, {**record, "finished": None, "files": in_place})
    except DataError:
        raise
    except Exception as error:  # Errors of the hub, the HTTP library and the system.
        raise DataError(_explain(asset, error, endpoint)) from error
    if lock:
        check_fetched(lock, name, target, [file.name for file in files], update, commit)
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    _write_record(target, {**record, "finished": finished, "files": in_place})
    return target


def _listing(asset: Asset, revision: str | None, endpoint: str | None) -> tuple[str, list[RemoteFile]]:
    """Return the commit that a revision means now, and the needed files at that commit."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    look_up = api.dataset_info if asset.kind == "dataset" else api.model_info
    info = look_up(asset.repo, revision=revision, files_metadata=True)
    names = [file.rfilename for file in info.siblings or ()]
    files = [
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else file.blob_id or "")
        for file in info.siblings or ()
        if _is_wanted(file.rfilename, asset, names)
    ]
    if not files or info.sha is None:
        raise DataError(f"{asset.repo}: contains none of the expected files ({', '.join(asset.patterns)})")
    return info.sha, files


def _is_wanted(name: str, asset: Asset, names: Sequence[str]) -> bool:
    check_name(name)
    if asset.patterns == WEIGHTS and name.endswith(".bin") and any(n.endswith(".safetensors") for n in names):
        return False
    return any(fnmatch(name, pattern) for pattern in asset.patterns)


def _is_here(file: RemoteFile, target: Path, in_place: Mapping[str, str]) -> bool:
    """Return whether a file is in place. A file from another source (our annotations) is never overwritten."""
    path = target / file.name
    if not path.exists():
        return False
    if file.name in in_place:
        return in_place[file.name] == file.digest and path.stat().st_size == file.size
    if path.stat().st_size != file.size or _digest(path, file) != file.digest:
        raise DataError(f"{path}: was not downloaded from the hub and differs from the file there; move it away first")
    return True


def _fetch(asset: Asset, file: RemoteFile, commit: str, path: Path, endpoint: str | None) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(asset.repo, file.name, repo_type=asset.kind, revision=commit, endpoint=endpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    with resumable(path, file.digest[:12]) as stream:
        partial = Path(stream.name)
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=file.name,
        )
    if _digest(partial, file) != file.digest:
        partial.unlink()
        raise DataError(f"{path}: the download is damaged; run the same command again")
    partial.replace(path)


def _digest(path: Path, file: RemoteFile) -> str:
    """Return the digest that the hub computes: SHA-256 for large files, Git's blob ID (SHA-1 with a header) for
    others."""
    header = b"blob %d\0" % path.stat().st_size
    hasher = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _read_record(target: Path) -> dict[str, str]:
    """Return the files that an earlier download put in place, with their digests."""
    try:
        files = read_object(target / RECORD)["files"] if (target / RECORD).exists() else {}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{target / RECORD}: not a record of a download; move it away first") from None
    return dict(files)


def _write_record(target: Path, record: Mapping[str, Any]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / RECORD, record)


def _explain(asset: Asset, error: Exception, endpoint: str | None) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/{'datasets/' if asset.kind == 'dataset' else ''}{asset.repo}"
    if isinstance(error, GatedRepoError):
        return f"{asset.repo}: request access at {page}; then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return f"{asset.repo}: not found, or not open to this account; see {page}"
    if isinstance(error, RevisionNotFoundError):
        return f"{asset.repo}: no such revision; see {page}/commits/main"
    advice = proxy_advice(urlsplit(endpoint or ENDPOINT).hostname or "")
    return f"{asset.repo}: the download stopped ({error}); run the same command again to resume{advice}"
