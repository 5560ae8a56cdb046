"""From bytes to what was asked, and from views to JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from gateway.errors import InvalidRequest
from gateway.names import NAME

_Model = TypeVar("_Model", bound=BaseModel)

# Kinds of pydantic's errors whose text may repeat what came.
_IN_WORDS = {
    "json_invalid": "malformed JSON",
    "json_type": "must be JSON",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "dataclass_type": "must be a JSON object",
    "missing": "is required",
    "union_tag_invalid": "is of no known kind",
}


def to_json(document: Any) -> bytes:
    """The JSON text of views, records and plain values. Numbers that are not finite become null."""
    return orjson.dumps(document, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def parse_body(model: type[_Model], body: bytes) -> _Model:
    """A JSON body. No body at all is an empty object.

    Raises:
        InvalidRequest: it is no JSON, or names a field that is not known or wrong.
    """
    try:
        return model.model_validate_json(body or b"{}", strict=True)
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from None


def parse_query(model: type[_Model], query: Mapping[str, str]) -> _Model:
    """The query of a target. InvalidRequest as for `parse_body`."""
    try:
        return model.model_validate(dict(query))
    except ValidationError as error:
        raise InvalidRequest(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    """The first problem in one line: the path of the field and what it must be, nothing that came."""
    problem = error.errors(include_url=False, include_input=False)[0]
    kind, steps = problem["type"], list(problem["loc"])
    if kind == "extra_forbidden":
        unknown = steps.pop()
        known = isinstance(unknown, str) and NAME.fullmatch(unknown)
        text = f"unknown field {unknown!r}" if known else "unknown field"
    elif kind == "value_error":
        text = str(problem["ctx"]["error"])
    else:
        text = _IN_WORDS.get(kind, problem["msg"])
    path = ".".join(str(step) for step in steps)
    return f"{path}: {text}" if path else text
