"""A lock file of revisions, sizes and digests, so that later downloads get the same files as the first.

The first download of an asset enters all of its files; later ones, on any machine that has the lock file, are compared
with it. A project commits it beside its configurations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mslora_cr.data.records import DataError
from mslora_cr.utils.files import file_digest, write_json
from mslora_cr.utils.strict_json import JsonError, read_object

LOCK = Path("assets.lock.json")
"""Where to look for it: in the working directory, like a project's other files."""
MOST_NAMED = 3
"""The most differing files that a message names."""


def locked_files(lock: Path, name: str) -> dict[str, Any] | None:
    """Return an asset's entry, `{"revision": commit, "files": {name: {"size": …, "sha256": …}}}`; None if it has none.

    Raises:
        DataError: The file is not a lock file.
    """
    if not lock.exists():
        return None
    try:
        entry = read_object(lock)["assets"].get(name)
        if entry is not None:
            _ = (
                entry["revision"],
                {file: (file_entry["size"], file_entry["sha256"]) for file, file_entry in entry["files"].items()},
            )
    except (JsonError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{lock}: not a lock file ({error!r}); restore it, or move it away to lock anew") from None
    return entry


def check_upstream(lock: Path, name: str, commit: str, sizes: Mapping[str, tuple[int, str]]) -> None:
    """Refuse files that differ from the locked ones, before any is fetched.

    Args:
        commit: Its revision.
        sizes: For each file to fetch, its size, and its SHA-256 if the hub states it, else "".

    Raises:
        DataError: The message names the first files that differ.
    """
    entry = locked_files(lock, name)
    if entry is None or entry["revision"] == commit:
        return
    files = entry["files"]
    odd = sorted(sizes.keys() ^ files.keys())
    odd += sorted(
        file
        for file, (size, digest) in sizes.items()
        if file in files and (size != files[file]["size"] or (digest and digest != files[file]["sha256"]))
    )
    if odd:
        raise _changed(lock, name, entry["revision"], odd)


def check_fetched(lock: Path, name: str, folder: Path, files: Iterable[str], update: bool, commit: str) -> None:
    """Compare the files in a folder with the lock file, or enter them if it has none of this asset.

    Args:
        update: Replace the locked entry.

    Raises:
        DataError: A file differs from the locked one.
    """
    fetched = {
        file: {"size": (folder / file).stat().st_size, "sha256": file_digest(folder / file)} for file in sorted(files)
    }
    entry = locked_files(lock, name)
    if entry is not None and not update:
        odd = sorted(file for file in fetched.keys() | entry["files"] if fetched.get(file) != entry["files"].get(file))
        if odd:
            raise _changed(lock, name, entry["revision"], odd)
        return
    content = read_object(lock) if lock.exists() else {"assets": {}}
    content["assets"][name] = {"revision": commit, "files": fetched}
    content["assets"] = dict(sorted(content["assets"].items()))
    write_json(lock, content)


def _changed(lock: Path, name: str, revision: str, odd: list[str]) -> DataError:
    more = f" and {len(odd) - MOST_NAMED} more" if len(odd) > MOST_NAMED else ""
    return DataError(
        f"{name}: {', '.join(odd[:MOST_NAMED])}{more}: not as {lock} records for revision {revision}. Pass --revision "
        f"{revision} for what is locked, or, if you trust what is there now, --update to lock that instead"
    )
