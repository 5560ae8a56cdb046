"""YAML files that people write: read strictly, and what is wrong with one said in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gateway.errors import ConfigurationError

MAX_FILE_BYTES = 1 << 20
"""Longest settings file that is read; a model named by mistake is refused instead of parsed."""

_MAX_SHOWN_CHARS = 80  # of a refused key or value that a message repeats


def shown(value: object) -> str:
    """A value as the file had it, on one line, control characters escaped, of bounded length."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number beyond 64 bits"  # Python refuses to print very long ones
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "…"


# A file's own errors, and what PyYAML raises for a value that contradicts its tag (2024-13-01,
# !!bool maybe) and for lists in lists without end.
_UNREADABLE = (OSError, ValueError, ArithmeticError, AttributeError, LookupError, RecursionError)


def read_yaml(path: Path, where: str) -> dict[Any, Any]:
    """The mapping in a YAML file, empty for an empty file. Errors are one line after ``where``."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError(f"longer than {MAX_FILE_BYTES} bytes")
        text = raw.decode("utf-8")
        for key, line in _duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader)):
            raise ConfigurationError(f"{where}: line {line}: duplicate key {shown(key)}")
        content = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}" if error.problem_mark else "somewhere"
        problem = " ".join(f"{error.context or ''} {error.problem}".split())
        raise ConfigurationError(f"{where}: {place}: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigurationError(f"{where}: line {line}: {error.reason}") from None
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or " ".join(f"{error}".split())
        raise ConfigurationError(f"{where}: cannot be read: {reason}") from None
    if not isinstance(content, dict | None):
        raise ConfigurationError(f"{where}: must be a mapping of keys, got {shown(content)}")
    return content or {}


def _duplicate_keys(root: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Keys that a mapping holds twice, with their lines. `yaml.safe_load` lets the last one win."""
    pending, visited = [root], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in visited:  # an alias, perhaps to one of its own parents
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen = set[tuple[str, str]]()
            for key, value in node.value:
                pending.append(value)
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        yield key.value, key.start_mark.line + 1
                    seen.add((key.tag, key.value))
