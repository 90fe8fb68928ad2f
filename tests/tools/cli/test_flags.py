"""Command-line flags generated from dataclass fields, and their parsing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from trimtab.engine.config import EngineConfig
from trimtab.engine.methods.base import Method
from trimtab.engine.methods.builtin import METHODS
from trimtab.engine.methods.objective import Objective
from trimtab.engine.sampling_params import SamplingParams
from trimtab.engine.utils.fields import config_field
from trimtab.kernels.common.errors import InputError
from trimtab.tools.cli import common_args, flags, method_args
from trimtab.tools.cli.parser import Parser

OBJECTIVES = [Objective("Be brief."), Objective("Be kind.")]

SAMPLING = SamplingParams(
    n=2,
    max_tokens=9,
    min_tokens=1,
    temperature=0.5,
    top_k=7,
    top_p=0.9,
    min_p=0.1,
    seed=-3,
    stop=("-END", "a=b"),
    stop_token_ids=(5, 6),
    ignore_eos=True,
    logprobs=4,
    logit_bias={3: -100.0, 4: 2.5},
    repetition_penalty=1.5,
    presence_penalty=-1.0,
    frequency_penalty=0.5,
    skip_special_tokens=False,
    include_stop_str_in_output=True,
)
CONFIG = EngineConfig(
    model="folder",
    dtype="float32",
    device="cpu",
    max_model_len=100,
    max_num_seqs=3,
    max_num_batched_tokens=99,
    kv_cache_memory="5MiB",
    block_size=32,
    chat_template="{{ x }}",
)
OTHER_TEXTS = {"placement": "user", "accumulate": "ema", "utility": "reward"}


def make_parser(*adders: Any) -> Parser:
    parser = Parser("trimtab test", "A test.")
    for add in adders:
        add(parser)
    return parser


def flag_names(parser: Parser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def to_arguments(values: dict[str, Any]) -> list[str]:
    """The command line for these field values; flag and value are separate arguments."""
    words: list[str] = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple):
            words += [word for item in value for word in (flag, str(item))]
        elif isinstance(value, dict):
            words += [word for key, item in value.items() for word in (flag, f"{key}={item}")]
        else:
            words += [flag, "none" if value is None else str(value)]
    return words


def non_default_values(cls: type[Method]) -> dict[str, Any]:
    """A non-default value for each field of a method."""
    values: dict[str, Any] = {}
    for name, kind in flags.infer_flag_types(cls, method_args.FIELDS_WITHOUT_FLAG).items():
        default = next(flags.get_default(f) for f in dataclasses.fields(cls) if f.name == name)
        if kind.value_type is bool:
            values[name] = not default
        elif kind.value_type is str:
            values[name] = OTHER_TEXTS[name]
        else:
            values[name] = kind.value_type((default or 1) * 0.5)
    return values


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, *METHODS])
def test_every_field_is_a_flag_of_the_same_name(cls: type) -> None:
    options = flag_names(
        make_parser(method_args.add_method_flags, common_args.add_sampling, common_args.add_model)
    )
    names = {f.name for f in dataclasses.fields(cls)} - {"objectives"}
    assert {"--" + name.replace("_", "-") for name in names} <= options


def test_every_flag_has_a_line_of_help() -> None:
    parser = make_parser(method_args.add_method_flags, common_args.add_sampling, common_args.add_model)
    assert [a.option_strings for a in parser._actions if not a.help] == []


def test_sampling_params_round_trip_through_flags() -> None:
    assert vars(SAMPLING) != vars(SamplingParams())
    assert not [
        f.name for f in dataclasses.fields(SAMPLING) if getattr(SAMPLING, f.name) == flags.get_default(f)
    ]
    args = make_parser(common_args.add_sampling).parse_argv(to_arguments(vars(SAMPLING)))
    assert common_args.sampling_params(args) == SAMPLING


def test_the_engine_config_round_trips_through_flags() -> None:
    args = make_parser(common_args.add_sampling, common_args.add_model).parse_argv(
        [*to_arguments(vars(CONFIG))]
    )
    assert common_args.engine_config(args) == CONFIG


@pytest.mark.parametrize("cls", METHODS)
def test_a_method_round_trips_through_flags(cls: type[Method]) -> None:
    values = non_default_values(cls)
    if cls.name == "linear-alignment":
        values["mask_top_p"] = None  # a mask excludes a trust region
    if cls.name == "mato":
        values.pop("optimise_online")  # without the loop its strength is 1, which a trust region allows
    if cls.name == "context-steering":
        values["strength"] = 3.0
    if cls.name == "guidance":
        values["guidance_scale"] = 2.5
    args = make_parser(method_args.add_method_flags).parse_argv(["--method", cls.name, *to_arguments(values)])
    objectives = [] if cls.objective_arity == "none" else OBJECTIVES
    assert method_args.method_from_args(args, objectives).build(objectives) == cls(
        tuple(objectives), **values
    )


def test_without_flags_the_dataclass_defaults_apply() -> None:
    args = make_parser(
        method_args.add_method_flags, common_args.add_sampling, common_args.add_model
    ).parse_argv([])
    assert common_args.sampling_params(args) == SamplingParams()
    assert common_args.engine_config(args) == EngineConfig()
    assert method_args.method_from_args(args, []).settings == {}


def test_one_seed_flag_seeds_both_the_engine_and_the_request() -> None:
    args = make_parser(common_args.add_sampling, common_args.add_model).parse_argv(["--seed", "7"])
    assert (common_args.sampling_params(args).seed, common_args.engine_config(args).seed) == (7, 7)


def test_none_resets_an_optional_field() -> None:
    args = make_parser(method_args.add_method_flags).parse_argv(
        ["--method", "linear-alignment", "--mask-top-p", "none"]
    )
    assert method_args.method_from_args(args, OBJECTIVES).settings == {"mask_top_p": None}


def test_none_is_refused_for_a_field_that_is_not_optional() -> None:
    args = make_parser(common_args.add_sampling).parse_argv(["--max-tokens", "none"])
    with pytest.raises(InputError, match=r"^--max-tokens is 'none'; it must be an integer$"):
        common_args.sampling_params(args)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-tokens", "1.5"], "--max-tokens is '1.5'; it must be an integer"),
        (["--temperature", "warm"], "--temperature is 'warm'; it must be a number"),
        (["--seed", "x"], "--seed is 'x'; it must be an integer, or none"),
        (["--logit-bias", "5"], "--logit-bias is '5'; it must be ID=BIAS, such as 42=-100"),
        (["--logit-bias", "a=1"], "--logit-bias is 'a'; it must be an integer"),
        (["--logit-bias", "5=1", "--logit-bias", "05=2"], "--logit-bias has 5 twice; each id may occur once"),
        (["--stop-token-ids", "END"], "--stop-token-ids is 'END'; it must be an integer"),
        (["--temperature", "-1"], "temperature is -1.0; it must be a finite number ≥ 0 and at most 1000"),
        (
            ["--temperature", "-1e-3"],
            "temperature is -0.001; it must be a finite number ≥ 0 and at most 1000",
        ),
        (["--temperature", "-inf"], "temperature is -inf; it must be a finite number ≥ 0 and at most 1000"),
    ],
)
def test_an_invalid_value_is_refused_with_its_flag(words: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        common_args.sampling_params(make_parser(common_args.add_sampling).parse_argv(words))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "words",
    [
        ["--temp", "1"],
        ["--temperature"],
        ["--temperature", "--seed", "1"],
        ["--ignore-eos=yes"],
        ["--stop", "--"],
        ["--stop=--"],
        ["extra"],
    ],
)
def test_invalid_arguments_are_one_line_that_points_to_help(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+; see trimtab test --help$"):
        make_parser(common_args.add_sampling).parse_argv(words)


def test_a_switch_takes_no_value() -> None:
    message = r"^--no-ignore-eos takes no value, but was given 'yes'; see trimtab test --help$"
    with pytest.raises(InputError, match=message):
        make_parser(common_args.add_sampling).parse_argv(["--no-ignore-eos=yes"])


def test_a_value_may_start_with_a_dash() -> None:
    args = make_parser(method_args.add_method_flags, common_args.add_sampling).parse_argv(
        ["--prefer", "-x=1", "--stop", "x=--", "--stop", "--end"]
    )
    assert args.prefer == ["-x=1"]
    assert args.stop == ["x=--", "--end"]


def test_arguments_after_two_dashes_are_not_flags() -> None:
    parser = make_parser(common_args.add_prompt, common_args.add_sampling)
    assert parser.parse_argv(["--top-k", "3", "--", "--top-k"]).prompt == "--top-k"


def test_a_flag_takes_the_first_type_of_a_union() -> None:
    assert flags.infer_flag_types(EngineConfig)["kv_cache_memory"] == flags.FlagType(str)
    assert flags.infer_flag_types(EngineConfig)["seed"] == flags.FlagType(int, optional=True)


def test_a_field_of_an_unknown_type_cannot_become_a_flag() -> None:
    @dataclass(frozen=True)
    class Odd:
        thing: complex = config_field(1j, "a type without a flag")

    with pytest.raises(TypeError, match="cannot make a flag for a field of type"):
        make_parser(lambda values: flags.add_fields(values, "odd", Odd))
