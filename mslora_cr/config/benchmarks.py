"""Names of public benchmarks' scorers, and the files of annotations that a data set may name."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

Benchmark = Literal[
    "scienceqa",
    "textvqa",
    "imagenet",
    "gqa",
    "exact",
    "grounding",
    "ocrvqa",
    "captions",
    "ai2d",
    "pvqa",
    "sci",
    "finvis",
]
"""`exact` scores VizWiz and VQAv2 of CoIN and four tasks of UCIT; `captions` scores UCIT's other two; the last four are
the scorers of MLLM-CL's domains (`eval_ai2d.py` and so on)."""


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError("expected the name of a file below the data set's folder, with '/' and without '..'")
    return name


AnnotationFile = Annotated[str, AfterValidator(_inside)]
"""Relative to the data set's folder."""


class Annotations(BaseModel):
    """Where the annotations of a data set are, and whose scorer they are for."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    train: AnnotationFile = "train.json"
    """The training records, a JSON list of conversations."""
    test: AnnotationFile = "test.jsonl"
    """The questions: JSON lines or, in a file that ends in `.json`, a list as public benchmarks write it."""
    benchmark: Benchmark | None = None
    """The public benchmark's scorer that is applied besides: metrics `benchmark` and `benchmark corrected`."""
    references: AnnotationFile | None = None
    """More true answers: ten a question for `textvqa`, a COCO file of captions for `captions`."""

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved configuration says where the files are only where that is not the usual place."""
        usual = {key: field.default for key, field in Annotations.model_fields.items()}
        return {key: value for key, value in write(self).items() if key not in usual or value != usual[key]}
