"""What a setting may be, and the one line that says what is wrong with it: for both kinds of settings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from typing import Annotated, Any

from pydantic import ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from gateway.yamlfile import shown


def _unknown_key(keys: Collection[object], known: Collection[str]) -> str | None:
    """Names the first key that is not known, and the one that was probably meant."""
    for key in keys:
        if key not in known:
            return f"unknown key {shown(key)}{_did_you_mean(key, known)}"
    return None


def _did_you_mean(key: object, known: Collection[str], spell: Callable[[str], str] = str) -> str:
    name = key.lower().replace("-", "_") if isinstance(key, str) else ""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {spell(close[0])!r}?)" if close else ""


def _between(low: int, high: int, kind: str = "a whole number") -> WrapValidator:
    """A number from ``low`` to ``high``. Refuses NaN, and YAML's true, which Python takes for 1."""

    def check(value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        try:
            number = None if isinstance(value, bool) else parse(value)
        except ValidationError:
            number = None
        if number is None:
            raise ValueError(f"must be {kind} between {low} and {high}, got {shown(value)}")
        if not low <= number <= high:
            raise ValueError(f"must be between {low} and {high}, got {shown(number)}")
        return number

    return WrapValidator(check)


def _must(hold: Callable[[Any], object], expected: str) -> Callable[[Any], Any]:
    """Refuses a value for which ``hold`` is false, saying in words what was ``expected``."""

    def check(value: Any) -> Any:
        if not hold(value):
            raise ValueError(f"must be {expected}, got {shown(value)}")
        return value

    return check


_MemoryBytes = Annotated[int, _between(1 << 20, 1 << 50)]


_EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}
"""What pydantic's types of error expect, in words; literals bring their own."""


def _explain(error: ValidationError) -> str:
    """The first problem as one line: the dotted path of the setting and what it must be."""
    problem = error.errors(include_url=False)[0]
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "value_error":
        text = str(context["error"])
    elif kind == "missing":
        where = "" if len(problem["loc"]) > 1 else ": set it by flag, environment or settings file"
        text = f"is required{where}"
    elif expected := context.get("expected", _EXPECTED.get(kind)):
        text = f"must be {expected}, got {shown(value)}"
    else:
        text = " ".join(problem["msg"].split())
    path = ".".join(str(step) for step in problem["loc"])
    return f"{path}: {text}" if path else text
