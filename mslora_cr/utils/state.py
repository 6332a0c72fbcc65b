"""The JSON files that the package writes and reads again: each has one typed schema and a version."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mslora_cr.utils.errors import UserError, first_problem, shorten
from mslora_cr.utils.files import write_text
from mslora_cr.utils.strict_json import JsonError, decode_json, read_bytes

log = logging.getLogger(__name__)


class StateError(UserError):
    """A file that the package wrote is damaged or foreign; the message names it and says how to fix that."""


class NewerError(StateError):
    """A file is of a later version of the package."""


class Part(BaseModel):
    """An object inside a `StateFile`."""

    model_config = ConfigDict(frozen=True, strict=True, validate_by_name=True, validate_by_alias=True)


class StateFile(Part):
    """The content of a JSON file. A field added later has a default, so that files without it are still read."""

    VERSION: ClassVar[int] = 1
    """Rises when a reader of the version before would misread the file."""
    MEND: ClassVar[str]
    """Advice for a damaged file."""

    version: int = Field(default=1, ge=1)
    """Version 0.1.0 of the package wrote none."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """
        Raises:
            NewerError: it is of a later version. StateError: it is missing, damaged or no such file.
        """
        try:
            data = read_bytes(path)
            content = decode_json(data)
        except JsonError as error:
            problem = str(error).removeprefix(f"{path}: ")
            raise StateError(f"{path} is damaged: {problem}; {cls.MEND}") from None
        if not isinstance(content, dict):
            raise StateError(f"{path}: expected an object ({{…}}), found {shorten(content)}; {cls.MEND}")
        version = content.get("version", 1)
        if isinstance(version, int) and version > cls.VERSION:
            raise NewerError(
                f"{path} was written by a later version of mslora-cr (its format is {shorten(version)}, this version "
                f"reads up to {cls.VERSION}); upgrade mslora-cr"
            )
        try:
            return cls.model_validate_json(data.removeprefix(b"\xef\xbb\xbf"))
        except ValidationError as error:
            raise StateError(f"{path}: {first_problem(error)}; {cls.MEND}") from None

    @classmethod
    def read_if_there(cls, path: Path) -> Self | None:
        """As `read`, or None if there is no such file."""
        return cls.read(path) if path.exists() or path.is_symlink() else None

    @classmethod
    def read_if_whole(cls, path: Path) -> Self | None:
        """As `read_if_there`, for a file that is made again without loss: None, with a warning, if it is damaged.

        Raises:
            NewerError: it is of a later version.
        """
        try:
            return cls.read_if_there(path)
        except NewerError:
            raise
        except StateError as error:
            log.warning("%s. It is made again", error)
            return None

    def write(self, path: Path) -> None:
        """Write it, whole or not at all. Fields that were never given are left out; half a surrogate pair, which no
        strict reader of JSON takes back, is written as a question mark."""
        given = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        content = {"version": self.VERSION} | {key: value for key, value in given.items() if key != "version"}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_text(path, text.encode("utf-8", errors="replace").decode("utf-8"))
