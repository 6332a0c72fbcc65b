"""JSON files that the package writes and reads again: each has one typed schema and a version."""

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
    """A file that the package wrote is damaged or foreign. The message names it and says how to fix that."""


class NewerError(StateError):
    """A later version of the package wrote this file."""


class Part(BaseModel):
    """An object inside a `StateFile`."""

    model_config = ConfigDict(frozen=True, strict=True, validate_by_name=True, validate_by_alias=True)


class StateFile(Part):
    """The content of a JSON file. Fields added later have defaults, so that older files can still be read."""

    VERSION: ClassVar[int] = 1
    """Increased whenever a reader of the previous version would misread the file."""
    MEND: ClassVar[str]
    """What to do with a damaged file; part of the error message."""

    version: int = Field(default=1, ge=1)
    """The version of the format. Package version 0.1.0 wrote none."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            NewerError: A later version of the package wrote it.
            StateError: It is missing, damaged or of another kind.
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
        """Read the file; return None if it is missing."""
        return cls.read(path) if path.exists() or path.is_symlink() else None

    @classmethod
    def read_if_whole(cls, path: Path) -> Self | None:
        """Read a file that can be made again without loss; return None, with a warning, if it is damaged.

        Raises:
            NewerError: A later version of the package wrote it.
        """
        try:
            return cls.read_if_there(path)
        except NewerError:
            raise
        except StateError as error:
            log.warning("%s. A new one is written", error)
            return None

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all.

        Fields that were never set are left out. Half a surrogate pair, which strict JSON readers reject, is written as
        a question mark.
        """
        given = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        content = {"version": self.VERSION} | {key: value for key, value in given.items() if key != "version"}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_text(path, text.encode("utf-8", errors="replace").decode("utf-8"))
