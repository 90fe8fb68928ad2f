"""The model families that run, and their lookup by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..kernels.common.errors import InputError, short_repr
from .architectures.architecture import SEQUENCE_CLASSIFICATION, Architecture
from .architectures.granite import GRANITE
from .architectures.llama import LLAMA
from .architectures.mistral import MISTRAL
from .architectures.qwen2 import QWEN2
from .architectures.qwen3 import QWEN3

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURES: tuple[Architecture, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE)

MAX_NAME = 60
"""Characters that an error shows of an unknown name, beside those of all that run."""


def find_architecture(data: Mapping[str, Any]) -> tuple[str, Architecture]:
    """The architecture's name and family in a config.json: of `architectures`, or else of `model_type`.

    Raises InputError for one that is not listed here.
    """
    model_type = data.get("model_type")
    by_model_type = {family.model_type: family.name for family in ARCHITECTURES}
    value = data.get("architectures") or by_model_type.get(str(model_type), model_type)
    name = value[0] if isinstance(value, list) else value
    for family in ARCHITECTURES:
        if name in family.names:
            return name, family
    if str(name).endswith(SEQUENCE_CLASSIFICATION):
        expected = ", ".join(name for family in ARCHITECTURES for name in family.names[1:])
    else:
        causal_lms = ", ".join(family.name for family in ARCHITECTURES)
        expected = f"{causal_lms}, or for reward models one ending in {SEQUENCE_CLASSIFICATION}"
    raise InputError(
        f"architecture {short_repr(name, MAX_NAME)} is not supported; expected one of {expected}"
    )


def find_gguf_architecture(name: object) -> Architecture:
    """The family with this general.architecture. Raises InputError where there is none."""
    by_name = {family.gguf.name: family for family in ARCHITECTURES if family.gguf}
    if not isinstance(name, str) or name not in by_name:
        raise InputError(
            f"the GGUF file's general.architecture is {short_repr(name)}; "
            f"expected one of {', '.join(by_name)}"
        )
    return by_name[name]
