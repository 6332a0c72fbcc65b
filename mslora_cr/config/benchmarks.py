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
"""A path relative to the data set's folder."""


class Annotations(BaseModel):
    """A data set's annotation files, and the scorer for them."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    train: AnnotationFile = "train.json"
    """The training records, a JSON list of conversations."""
    test: AnnotationFile = "test.jsonl"
    """The questions: JSON lines or, in a file that ends in `.json`, a list as public benchmarks write it."""
    benchmark: Benchmark | None = None
    """A public benchmark's scorer, applied in addition: metrics `benchmark` and `benchmark corrected`."""
    references: AnnotationFile | None = None
    """A file of further true answers: ten per question for `textvqa`, a COCO file of captions for `captions`."""

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the usual file names out of a saved configuration."""
        usual = {key: field.default for key, field in Annotations.model_fields.items()}
        return {key: value for key, value in write(self).items() if key not in usual or value != usual[key]}
