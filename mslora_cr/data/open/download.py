"""`mslora-cr data download open`: the archives of the open stream's repositories, at the commits of the catalogue.

A broken transfer is taken up where it stopped, also by the next run of the command. An archive is held against the lock
file, and what is used of it against the catalogue: git's own ids of the files, which no repacking changes.
"""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from mslora_cr.data.open.catalog import OpenSource
from mslora_cr.data.open.layouts import used_files
from mslora_cr.data.records import DataError
from mslora_cr.data.sources.lock import check_fetched, check_upstream
from mslora_cr.data.sources.raw import RawData, blob_ids
from mslora_cr.utils.files import hidden_folder, resumable
from mslora_cr.utils.proxies import proxy_advice

ENDPOINT = "https://github.com"
ATTEMPTS = 5
"""Attempts of one run, for an archive whose transfer breaks off."""
TIMEOUT = 60
"""The longest time without a byte, in seconds."""
MOST_BYTES = 8 << 30
"""The largest archive."""
PIECE = 1 << 20


def check_accepted(
    sources: Sequence[OpenSource], accepted: Iterable[str], accepted_non_commercial: Iterable[str]
) -> None:
    """Check that every licence was accepted by its name; those that forbid commercial use need an option of their own.

    Raises:
        DataError: One was not; the message names it, its data sets, and the options that accept it.
    """
    given = {True: set(accepted), False: set(accepted_non_commercial)}
    lacking = [source for source in sources if licence_name(source) not in given[source.commercial]]
    if not lacking:
        return
    options = []
    for option, commercial in (("--accept", True), ("--accept-non-commercial", False)):
        names = dict.fromkeys(licence_name(source) for source in lacking if source.commercial == commercial)
        options += [f"{option} {' '.join(names)}"] if names else []
    listed = "; ".join(f"{source.name}: {source.license}, see {source.source}" for source in lacking)
    raise DataError(f"licences that are not accepted yet: {listed}. If you accept them, add {' '.join(options)}")


def licence_name(source: OpenSource) -> str:
    """Return a licence's name on the command line: its first word."""
    return source.license.split()[0]


def download_open(
    source: OpenSource,
    folder: Path,
    endpoint: str = ENDPOINT,
    lock: Path | None = None,
    update: bool = False,
    progress: bool = False,
) -> Path:
    """Fetch a source's archive into `folder`; give its path. One that is there already is checked, not fetched.

    Args:
        endpoint: github.com or a mirror of it.
        lock: The lock file. The first download enters the archive, later ones are compared with it.
        update: Replace the locked archive.

    Raises:
        DataError: The transfer broke off too often, or the archive is not what the lock file or the catalogue says.
    """
    name = f"{source.repository.replace('/', '-')}-{source.commit[:12]}.zip"
    archive = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        url = f"{endpoint.rstrip('/')}/{source.repository}/archive/{source.commit}.zip"
        _fetch(url, archive, source, progress)
    if lock:
        asset = f"github/{source.repository}"
        if not update:
            check_upstream(lock, asset, source.commit, {name: (archive.stat().st_size, "")})
        check_fetched(lock, asset, folder, [name], update, source.commit)
    return archive


def content_digest(source: OpenSource, sources: Sequence[Path], work: Path) -> str:
    """Return the SHA-256 of the ids and paths of the files that a source uses, as `content` in the catalogue.

    Args:
        work: A folder for archives inside archives.
    """
    with RawData(sources, work) as raw:
        files = [(path, file) for path, _, file in used_files(source.name, raw)]
        ids = blob_ids([file for _, file in files])
    return hashlib.sha256("".join(f"{ids[file]} {path}\n" for path, file in files).encode()).hexdigest()


def _fetch(url: str, archive: Path, source: OpenSource, progress: bool) -> None:
    """Give the archive its name, once its content matches the catalogue."""
    with resumable(archive, source.commit[:12]) as stream:
        partial = Path(stream.name)
        problem: Exception | None = None
        for _ in range(ATTEMPTS):
            try:
                _transfer(url, stream, source.name, progress)
                break
            except urllib.error.HTTPError as error:
                problem = error
                if error.code < 500:
                    raise DataError(f"{url}: answers {error.code} {error.reason}") from None
            except (OSError, HTTPException) as error:
                problem = error
        else:
            advice = proxy_advice(urlsplit(url).hostname or "")
            raise DataError(
                f"{url}: the download stopped ({problem}); run the same command again to resume{advice}"
            ) from None
    with hidden_folder(archive) as work:
        whole = work / archive.name  # Archives are recognised by their extension.
        partial.replace(whole)
        if content_digest(source, [whole], work / "nested") != source.content:
            raise DataError(f"{url}: holds other files than commit {source.commit}; run the same command again")
        whole.replace(archive)


def _transfer(url: str, stream: BinaryIO, name: str, progress: bool) -> None:
    """Append the missing part to a file. A server that cannot start in the middle sends it from the start."""
    stream.seek(0, 2)
    begun = stream.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:  # The file is complete.
            return
        raise
    with response:
        if response.status != 206:
            begun = 0
            stream.truncate(0)
            stream.seek(0)
        length = response.headers.get("Content-Length")
        total = begun + int(length) if length and length.isdecimal() else None
        with tqdm(total=total, initial=begun, desc=name, unit="B", unit_scale=True, disable=not progress) as bar:
            while piece := response.read(PIECE):
                stream.write(piece)
                bar.update(len(piece))
                if stream.tell() > MOST_BYTES:
                    raise DataError(f"{url}: more than {MOST_BYTES >> 30} GB")
        stream.flush()
        if total is not None and stream.tell() < total:
            raise HTTPException(f"{stream.tell():,} of {total:,} bytes")
