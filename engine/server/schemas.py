"""The bodies as OpenAPI describes them, made from the dataclasses that read them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter

from ..methods.base import Method
from ..methods.builtin import METHODS
from ..methods.registry import settings
from ..sampling_params import SamplingParams
from ..utils.fields import types_of
from .protocol import ROLES, SAMPLING, ChatBody, CompletionBody

NULL = {"type": "null"}
OBJECTIVE = {
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
TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ROLES},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": TEXT_PART}]},
        "name": {"type": "string"},
    },
    "additionalProperties": False,
}
PROMPT = {
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


def _described(cls: type, names: Any) -> dict[str, Any]:
    """The properties of a dataclass's fields."""
    hints, known = types_of(cls), {field.name: field for field in fields(cls)}
    return {
        name: {**TypeAdapter(hints[name]).json_schema(), "description": known[name].metadata["help"]}
        for name in names
    }


def _method(cls: type[Method]) -> dict[str, Any]:
    properties = {
        "method": {"const": cls.name},
        "objectives": {"type": "array", "items": OBJECTIVE},
        "trace": {"type": "boolean", "description": "how each token was chosen, at choices[i].trace"},
        **_described(cls, settings(cls)),
    }
    if cls.presets:
        properties["preset"] = {
            "enum": [*cls.presets, None],
            "description": "settings by name, under those that are given",
        }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _body(cls: type, required: str, **special: Any) -> dict[str, Any]:
    properties = _described(cls, [field.name for field in fields(cls)]) | _described(SamplingParams, SAMPLING)
    for name, schema in special.items():
        properties[name] = {**schema, "description": properties[name]["description"]}
    schema = {
        "type": "object",
        "required": [required],
        "properties": properties,
        "additionalProperties": False,
    }
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


STEERING = {"anyOf": [NULL, {"type": "string"}, *map(_method, METHODS)]}
CHAT = _body(
    ChatBody, "messages", messages={"type": "array", "minItems": 1, "items": MESSAGE}, steering=STEERING
)
COMPLETION = _body(CompletionBody, "prompt", prompt=PROMPT, steering=STEERING)
PREVIEW = CHAT
