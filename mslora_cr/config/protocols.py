"""Settings of how a stream presents a task: few shots, mixed boundaries, several sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from mslora_cr.utils.errors import nearest


class TaskProtocol(BaseModel):
    """How a stream presents a task."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    samples: Annotated[int, Field(ge=1)] | None = None
    """Few shots: train on this many of the task's records. `seed` draws them, so that fewer are a part of more."""
    mixed: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A boundary that is not sharp: this share of the next task's training records, drawn by `seed`, is trained on with
    this task and not with the next one. The last task has no next one."""
    same_as: str | None = None
    """The same task at another site: the name of the task of the first site. Reports give scores and forgetting by
    site."""
    extend: bool = False
    """With `same_as`: start this site's bank as a copy of the bank of the site before it. Methods that sum banks or
    continue one build on that bank without it."""
    reuse: bool = False
    """With `same_as`: train nothing; a copy of the bank of the site before it answers. Of a method that continues one
    bank this is the latest one."""

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved configuration names what departs from the usual protocol; digests from before there was any hold."""
        usual = {key: field.default for key, field in TaskProtocol.model_fields.items()}
        return {key: value for key, value in write(self).items() if key not in usual or value != usual[key]}


def check_protocols(tasks: Mapping[str, TaskProtocol]) -> None:
    """Refuse sites that do not fit together.

    Args:
        tasks: The stream's, by name.

    Raises:
        ValueError: `same_as` names no first site, `extend` or `reuse` stands alone, or both are set.
    """
    sites = {name for name, task in tasks.items() if task.same_as is None}
    for name, task in tasks.items():
        if task.same_as is not None and task.same_as not in sites:
            near = nearest(task.same_as, sites)
            raise ValueError(f"tasks.{name}.same_as: {task.same_as!r} is no first site in the stream{near}")
        if task.extend and task.same_as is None:
            raise ValueError(f"tasks.{name}.extend: needs same_as, the task whose bank is extended")
        if task.reuse and (task.same_as is None or task.extend):
            raise ValueError(f"tasks.{name}.reuse: needs same_as, the task whose bank is reused, and no extend")
