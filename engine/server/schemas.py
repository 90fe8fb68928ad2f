"""OpenAPI schemas of the request bodies, generated from their dataclasses."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from ..methods.base import Method
from ..methods.builtin import METHODS
from ..methods.registry import setting_names
from ..sampling_params import SamplingParams
from ..utils.fields import field_types
from .protocol import ROLES, SAMPLING_FIELDS, ChatCompletionRequest, CompletionRequest

NULL_SCHEMA = {"type": "null"}
OBJECTIVE_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {
            "type": "object",
            "required": ["text"],
            "additionalProperties": False,
            "properties": {
                "text": {"type": "string", "minLength": 1},
                "weight": {"type": "number", "minimum": 0, "default": 1},
            },
        },
    ]
}
TEXT_PART_SCHEMA = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
MESSAGE_SCHEMA = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ROLES},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART_SCHEMA}]},
        "name": {"type": "string"},
    },
    "additionalProperties": False,
}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}


def _field_schemas(cls: type, names: Any) -> dict[str, Any]:
    """JSON schema properties of the named dataclass fields."""
    hints, fields_by_name = field_types(cls), {field.name: field for field in fields(cls)}
    return {
        name: {**TypeAdapter(hints[name]).json_schema(), "description": fields_by_name[name].metadata["help"]}
        for name in names
    }


def _method_schema(cls: type[Method]) -> dict[str, Any]:
    properties = {
        "method": {"const": cls.name},
        "objectives": {"type": "array", "items": OBJECTIVE_SCHEMA},
        "trace": {
            "type": "boolean",
            "description": "return the steering trace of each token, at choices[i].trace",
        },
        **_field_schemas(cls, setting_names(cls)),
    }
    if cls.presets:
        properties["preset"] = {
            "enum": [*cls.presets, None],
            "description": "named settings; explicit settings override them",
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _body_openapi(cls: type, required: str, **overrides: Any) -> dict[str, Any]:
    properties = _field_schemas(cls, [field.name for field in fields(cls)]) | _field_schemas(
        SamplingParams, SAMPLING_FIELDS
    )
    for name, schema in overrides.items():
        properties[name] = {**schema, "description": properties[name]["description"]}
    schema = {
        "type": "object",
        "required": [required],
        "properties": properties,
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


STEERING_SCHEMA = {"anyOf": [NULL_SCHEMA, {"type": "string"}, *map(_method_schema, METHODS)]}
CHAT_OPENAPI = _body_openapi(
    ChatCompletionRequest,
    "messages",
    messages={"type": "array", "minItems": 1, "items": MESSAGE_SCHEMA},
    steering=STEERING_SCHEMA,
)
COMPLETION_OPENAPI = _body_openapi(
    CompletionRequest, "prompt", prompt=PROMPT_SCHEMA, steering=STEERING_SCHEMA
)
PREVIEW_OPENAPI = CHAT_OPENAPI
