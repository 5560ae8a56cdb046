"""The OpenAPI 3.1 document, made of the same table that registers the operations."""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Literal

from pydantic import TypeAdapter

from gateway.admin.operations import PREFIX, Match, Operation
from gateway.admin.replay import HEADER as IDEMPOTENCY_KEY
from gateway.admin.schema import NAME_PATTERN, ErrorView, Nothing
from gateway.admin.upload import DIGEST_HEADER
from gateway.names import MAX_VERSION

OPENAPI = "3.1.0"
API_VERSION = "1"

_REFS = "#/components/schemas/{model}"

_WORD = re.compile(r"[a-z]+")

_PARAMETERS: dict[str, dict[str, Any]] = {
    "version": {"type": "integer", "minimum": 1, "maximum": MAX_VERSION},
}
_NAME = {"type": "string", "pattern": NAME_PATTERN}

Mode = Literal["validation", "serialization"]


def describe(operations: Iterable[Operation]) -> dict[str, Any]:
    """The document of all operations."""
    table = list(operations)
    schemas, definitions = _schemas(table)
    paths: dict[str, dict[str, Any]] = {}
    for operation in table:
        methods = paths.setdefault(operation.path, {})
        methods[operation.method.lower()] = _describe(operation, schemas)
    return {
        "openapi": OPENAPI,
        "info": {
            "title": "inference-gateway admin API",
            "version": API_VERSION,
            "description": "Models, versions, labels, routes, rollouts, keys and events.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "gateway_session"},
            },
        },
    }


_Schemas = dict[tuple[int, Mode], dict[str, Any]]


def _schemas(table: list[Operation]) -> tuple[_Schemas, dict[str, Any]]:
    """The schema of each body, query and answer by its identity, and what they refer to."""
    inputs: list[Any] = [kind for each in table for kind in (each.body, each.query)]
    answers = [each.answer for each in table if each.answer is not None]
    wanted: list[tuple[Any, Mode]] = [(kind, "validation") for kind in inputs]
    wanted += [(kind, "serialization") for kind in [*answers, ErrorView]]
    unique = {(id(kind), mode): TypeAdapter(kind) for kind, mode in wanted}
    found, rest = TypeAdapter.json_schemas(
        [(key, mode, adapter) for (key, mode), adapter in unique.items()], ref_template=_REFS
    )
    return {(key, mode): schema for (key, mode), schema in found.items()}, rest["$defs"]


def _describe(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": _identity(operation),
        "summary": operation.summary,
        "tags": [_tag(operation)],
        "parameters": _parameters(operation, schemas),
        "responses": _responses(operation, schemas),
        "security": [{"key": []}, {"session": []}] if operation.role is not None else [],
    }
    if operation.role is not None:
        described["x-role"] = operation.role.value
    if operation.body is not Nothing:
        content = {"application/json": {"schema": schemas[id(operation.body), "validation"]}}
        if operation.is_upload:
            content["application/octet-stream"] = {"schema": {}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _parameters(operation: Operation, schemas: _Schemas) -> list[dict[str, Any]]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _PARAMETERS.get(name, _NAME)}
        for name in operation.parameters
    ]
    if operation.query is not Nothing:
        fields = operation.query.model_json_schema(ref_template=_REFS)["properties"]
        parameters += [
            {"name": name, "in": "query", "required": False, "schema": schema}
            for name, schema in fields.items()
        ]
    if operation.match is not Match.NONE:
        parameters.append(_header("If-Match", operation.match is Match.ALWAYS))
    if operation.replays:
        parameters.append(_header(IDEMPOTENCY_KEY, False))
    if operation.is_upload:
        parameters.append(_header(DIGEST_HEADER, False))
    return parameters


def _header(name: str, is_required: bool) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": is_required, "schema": {"type": "string"}}


def _responses(operation: Operation, schemas: _Schemas) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content["application/json"] = {"schema": schemas[id(operation.answer), "serialization"]}
    if operation.is_stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {}
    for status in operation.statuses:
        responses[str(status)] = {"description": HTTPStatus(status).phrase}
        if content:
            responses[str(status)]["content"] = content
    error = {"application/json": {"schema": schemas[id(ErrorView), "serialization"]}}
    responses["default"] = {"description": "What is wrong, and its code", "content": error}
    return responses


def _identity(operation: Operation) -> str:
    """A name that programs can be made of: of the method and the words of the path."""
    words = _WORD.findall(operation.path.removeprefix(PREFIX))
    return "_".join([operation.method.lower(), *words])


def _tag(operation: Operation) -> str:
    if not operation.path.startswith(PREFIX):
        return "management"
    words = _WORD.findall(operation.path.removeprefix(PREFIX))
    kinds = [word for word in words if word in ("versions", "labels", "route", "rollouts")]
    return str((kinds or words)[0])
