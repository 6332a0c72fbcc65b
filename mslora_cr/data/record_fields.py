"""The types of a record's fields, and what they refuse."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainValidator

from mslora_cr.data.answers.options import lettered
from mslora_cr.utils.errors import shorten


def _encodable(text: str) -> str:
    """JSON can spell half a surrogate pair (`"\\ud83d"`), which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("should be text, but contains half of a surrogate pair") from None
    return text


def _identifier(value: Any) -> int | str:
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
        return value
    raise ValueError("should be a string or an integer of 64 bits")


def _as_names(image: Any) -> Any:
    """`image` is a name, a list of names, or (for text-only training records) absent or null."""
    if image is None:
        return ()
    if isinstance(image, str):
        return (image,)
    if isinstance(image, list | tuple):
        return tuple(image)
    raise ValueError("should be a name or a list of names")


def _truths(value: Any) -> Any:
    """`gt` is one answer, or a list of answers that are all accepted."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError("should be a valid string")


def _options(value: Any) -> Any:
    if not value:
        return {}
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        raise ValueError("should be a list of options, or an object of their letters and texts")
    texts = value.values() if isinstance(value, Mapping) else value
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("should hold texts alone, none of them empty")
    return lettered(value)


def _attributes(value: Any) -> Any:
    """Return text and numbers by name; what is null is not known, as if it were not there."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("should be an object of texts and numbers")
    present = {name: held for name, held in value.items() if held is not None}
    for name, held in present.items():
        if isinstance(held, bool) or not isinstance(held, str | int | float):
            raise ValueError(f"should hold texts and numbers alone, but {shorten(name)} is neither")
    return present


Identifier = Annotated[int | str, PlainValidator(_identifier)]
Text = Annotated[str, AfterValidator(_encodable)]
Truths = Annotated[tuple[Text, ...], BeforeValidator(_truths)]
Options = Annotated[dict[Text, Text], BeforeValidator(_options)]
Attributes = Annotated[dict[Text, Text | int | float], BeforeValidator(_attributes)]
Images = Annotated[tuple[Text, ...], BeforeValidator(_as_names)]
