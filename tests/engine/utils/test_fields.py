"""Every field of the public dataclasses accepts valid values and refuses all others with a one-line error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine import Base, Engine, EngineConfig, Method, Objective, Request, SamplingParams
from trimtab.engine.methods.builtin import METHODS
from trimtab.engine.utils.fields import coerce, validate_types
from trimtab.kernels.common.errors import MAX_REPR, InputError, short_repr

VALUES: dict[str, Any] = {
    "empty": "",
    "x": "x",
    "bytes": b"x",
    "none": None,
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-1": -1,
    "1.5": 1.5,
    "huge": 10**400,
    "unprintable": 10**5000,
    "true": True,
    "np.true": np.True_,
    "complex": 1j,
    "[]": [],
    "[x]": ["x"],
    "{}": {},
    "{x:1}": {"x": 1},
    "array": np.array([[1.0, 2.0], [3.0, 4.0]]),
    "object": object(),
    "class": Objective,
    "function": len,
}
VALID_VALUES: dict[str, str] = {
    "model": "empty x",
    "max_model_len": "none",
    "chat_template": "empty x none",
    "served_model_name": "empty x none",
    "seed": "none -1",
    "temperature": "1.5",
    "stop": "x [] [x]",
    "stop_token_ids": "[]",
    "ignore_eos": "true",
    "logprobs": "none",
    "logit_bias": "{}",
    "repetition_penalty": "1.5",
    "presence_penalty": "-1 1.5",
    "frequency_penalty": "-1 1.5",
    "enable_prefix_caching": "true",
    "enforce_eager": "true",
    "batch_invariant": "true",
    "skip_special_tokens": "true",
    "include_stop_str_in_output": "true",
    "text": "x",
    "weight": "1.5",
    "prompt": "x",
    "trace": "true",
    "chat_template_kwargs": "{} {x:1}",
    "Base.objectives": "[]",
    "ratio": "1.5",
    "mask_top_p": "none",
    "mask_temperature": "1.5",
    "relative_top": "none",
    "kl_budget": "none 1.5",
    "LinearAlignment.kl_budget": "none",  # a budget excludes the mask, which is on by default
    "strength": "-1 1.5",
    "guidance_scale": "-1 1.5",
    "gain": "1.5",
    "control_rate": "1.5",
    "max_gain": "1.5",
    "steering": "[] {} {x:1}",
    "alpha": "1.5",
    "lam": "1.5",
    "eta": "1.5",
    "nu": "1.5",
    "tau": "1.5",
    "beta": "1.5",
    "optimise_weights": "true",
    "optimise_online": "true",
}
"""The labels of the valid values by "Class.field" or field name; all others are refused."""
FIELDS = [
    (cls, field.name)
    for cls in (EngineConfig, SamplingParams, Objective, Request, *METHODS)
    for field in dataclasses.fields(cls)
]


def make_valid(cls: type, name: str, value: Any) -> Any:
    """An instance of `cls` with this field value; its other fields are valid."""
    values: dict[str, Any] = {name: value}
    if cls is Objective:
        values = {"text": "Be kind.", **values}
    elif cls is Request and name != "branch_token_ids":
        values = {"prompt": "Why?", **values}
    elif issubclass(cls, Method) and cls is not Base:
        values = {"objectives": [Objective("Be kind.")], **values}
    return cls(**values)


def refusal_reason(cls: type, name: str, value: Any) -> str | None:
    """The error message for the value; None if it is accepted."""
    try:
        make_valid(cls, name, value)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore::trimtab.SteeringWarning")
@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS])
def test_a_field_accepts_valid_values_and_names_refused_ones(cls: type, name: str) -> None:
    reasons = {label: refusal_reason(cls, name, value) for label, value in VALUES.items()}
    valid = VALID_VALUES.get(f"{cls.__name__}.{name}", VALID_VALUES.get(name, ""))
    assert {label for label, why in reasons.items() if why is None} == set(valid.split())
    for why in filter(None, reasons.values()):
        assert name.removesuffix("s") in why
        assert "\n" not in why


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore::trimtab.SteeringWarning")
@settings(deadline=None, max_examples=500)
@given(st.sampled_from(FIELDS), anything)
def test_any_value_is_either_stored_stably_or_refused_with_an_input_error(
    field: tuple[type, str], value: Any
) -> None:
    cls, name = field
    if refusal_reason(cls, name, value) is None:
        stored = getattr(make_valid(cls, name, value), name)
        assert getattr(make_valid(cls, name, stored), name) == stored


@pytest.mark.parametrize("wrong", VALUES.values(), ids=VALUES)
def test_a_non_request_is_refused_and_does_not_affect_others_in_a_list(tiny: Engine, wrong: Any) -> None:
    request = Request("Why?", sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    first, bad, last = tiny.generate([request, wrong, request])
    assert (bad.finish_reason, bad.token_ids, bad.text) == ("error", [], "")
    assert bad.error == f"a request is {short_repr(wrong)}; it must be of type Request"
    alone = tiny.generate(request)
    assert [first.token_ids, last.token_ids] == [alone.token_ids] * 2
    assert [first.error, last.error] == [None, None]
    with pytest.raises(InputError, match="a request is"):
        tiny.stream(wrong)


@pytest.mark.parametrize("wrong", ["Why?", None, 5, object()])
def test_a_value_that_is_neither_a_request_nor_a_list_is_refused(tiny: Engine, wrong: Any) -> None:
    with pytest.raises(InputError, match=r"^a request is .*; it must be of type Request$"):
        tiny.generate(wrong)


@pytest.mark.parametrize("wrong", ["12", None, 5, [1.5], ["1"], [[1]], [True], {1: 2}])
def test_scoring_refuses_invalid_token_ids(tiny: Engine, wrong: Any) -> None:
    with pytest.raises(InputError, match="token_ids is "):
        tiny.score(wrong)


def test_numpy_token_ids_are_scored(tiny: Engine) -> None:
    assert tiny.score(np.array([5, 6])).equal(tiny.score([5, 6]))


@dataclasses.dataclass(frozen=True)
class CustomFields:
    """Field types that a custom method may have, checked and unchecked."""

    kind: Literal["a", "b"] = "a"
    pair: tuple[int, ...] | None = None
    either: int | str = 0
    unknown: list[int] | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        validate_types(self, " of own")


def test_fields_of_unknown_types_are_not_checked() -> None:
    fields = CustomFields(kind="c", unknown="x", anything=object)
    assert (fields.kind, fields.unknown, fields.anything) == ("c", "x", object)


def test_a_union_accepts_each_of_its_types() -> None:
    assert (CustomFields(either="x").either, CustomFields(either=5).either) == ("x", 5)
    assert (CustomFields(pair=None).pair, CustomFields(pair=[1, 2]).pair) == (None, (1, 2))
    with pytest.raises(InputError, match=r"^either of own is 1\.5; it must be an integer, or a string$"):
        CustomFields(either=1.5)
    with pytest.raises(InputError, match=r"^item 1 of pair of own is 'x'; it must be an integer$"):
        CustomFields(pair=[1, "x"])


def test_an_error_quotes_at_most_one_short_line() -> None:
    class Rude:
        def __repr__(self) -> str:
            raise RuntimeError

    assert short_repr("a\n b") == r"'a\n b'"
    assert short_repr(np.array([[1, 2], [3, 4]])) == "array([[1, 2], [3, 4]])"
    assert short_repr(Rude()) == "a value of type Rude"
    assert short_repr(10**5000) == "a value of type int"
    long = short_repr("x" * 1000)
    assert len(long) == MAX_REPR
    assert long.startswith("'xxx")
    assert long.endswith("x…")


def test_numbers_keep_their_value_and_no_other_type_becomes_a_number() -> None:
    assert coerce("x", 2**53 + 1, int) == 2**53 + 1
    assert coerce("x", np.float64(0.1), float) == 0.1
    assert type(coerce("x", 3, float)) is float
    for wrong in ("3", b"3", 3.0, True, None, 2**64, -(2**63) - 1):
        with pytest.raises(InputError, match=r"^x is "):
            coerce("x", wrong, int)
