"""Types of the JSON values in request bodies, as the OpenAPI document describes them.

Most are `SkipValidation`: they only describe a value, which the dataclass or function that uses it checks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, SkipValidation, create_model, with_config
from typing_extensions import NotRequired, TypedDict

from ..methods.base import Method
from ..methods.builtin import METHODS
from ..methods.registry import setting_names
from ..utils.fields import field_types

ONLY_THESE_KEYS = ConfigDict(extra="forbid")
NonEmptyText = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
PromptJson = SkipValidation[
    NonEmptyText
    | Annotated[list[NonEmptyText], Field(min_length=1)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1)]
]
Role = Literal["system", "user", "assistant"]


class TextPart(TypedDict):
    type: Literal["text"]
    text: str


@with_config(ONLY_THESE_KEYS)
class MessageJson(TypedDict):
    role: Role
    content: str | list[TextPart]
    name: NotRequired[str]


@with_config(ONLY_THESE_KEYS)
class ObjectiveJson(TypedDict):
    text: NonEmptyText
    weight: NotRequired[Annotated[float, Field(ge=0, json_schema_extra={"default": 1})]]


def describe_fields(cls: type, names: Collection[str], **defaults: Any) -> dict[str, Any]:
    """Pydantic fields for fields of a dataclass, which validates them itself. `defaults` replace its own."""
    described_as: Any = SkipValidation
    hints, described = field_types(cls), {}
    for field in fields(cls):
        if field.name in names:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            info = Field(defaults.get(field.name, default), description=field.metadata["help"])
            described[field.name] = (described_as[hints[field.name]], info)
    return described


def _describe_method(cls: type[Method]) -> type[BaseModel]:
    help = "return the steering trace of each token, at choices[i].trace"
    keys: dict[str, Any] = {
        "method": (Literal[cls.name], Field(default_factory=str)),  # the default depends on the objectives
        "objectives": (list[NonEmptyText | ObjectiveJson], []),
        "trace": (bool, Field(False, description=help)),
        **describe_fields(cls, setting_names(cls)),
    }
    if cls.presets:
        presets = (*cls.presets, None)
        help = "named settings; explicit settings override them"
        keys["preset"] = (Literal[presets], Field(None, description=help))
    return create_model(cls.__name__, __config__=ONLY_THESE_KEYS, **keys)


if TYPE_CHECKING:
    SteeringJson = Any
else:
    STEERING_TYPES = (None, str, *map(_describe_method, METHODS))
    SteeringJson = SkipValidation[Union[STEERING_TYPES]]  # noqa: UP007


def body_openapi(cls: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a request body, without references, which FastAPI would not resolve."""
    schema = cls.model_json_schema()
    schema = _inline(schema, schema.pop("$defs"))
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in schema.items()}
