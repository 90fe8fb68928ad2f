"""Flags come from dataclass fields and lead back to them."""

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
from trimtab.engine.utils.fields import option
from trimtab.kernels.common.errors import InputError
from trimtab.tools.cli import common_args, flags, method_args
from trimtab.tools.cli.parser import Parser

WISHES = [Objective("Be brief."), Objective("Be kind.")]

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


def parser(*adders: Any) -> Parser:
    made = Parser("trimtab test", "A test.")
    for add in adders:
        add(made)
    return made


def options_of(made: Parser) -> set[str]:
    return {option for action in made._actions for option in action.option_strings}


def written(values: dict[str, Any]) -> list[str]:
    """The command line that gives these field values, flag and value as separate words."""
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


def different(cls: type[Method]) -> dict[str, Any]:
    """A value for each field of a method that is not its default."""
    values: dict[str, Any] = {}
    for name, kind in flags.kinds(cls, method_args.UNFLAGGED).items():
        default = next(flags.default_of(f) for f in dataclasses.fields(cls) if f.name == name)
        if kind.item is bool:
            values[name] = not default
        elif kind.item is str:
            values[name] = OTHER_TEXTS[name]
        else:
            values[name] = kind.item((default or 1) * 0.5)
    return values


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, *METHODS])
def test_every_field_is_a_flag_of_the_same_name(cls: type) -> None:
    options = options_of(parser(method_args.add_flags, common_args.add_sampling, common_args.add_model))
    names = {f.name for f in dataclasses.fields(cls)} - {"objectives"}
    assert {"--" + name.replace("_", "-") for name in names} <= options


def test_every_flag_has_a_line_of_help() -> None:
    made = parser(method_args.add_flags, common_args.add_sampling, common_args.add_model)
    assert [a.option_strings for a in made._actions if not a.help] == []


def test_sampling_given_as_flags_comes_back_the_same() -> None:
    assert vars(SAMPLING) != vars(SamplingParams())
    assert not [
        f.name for f in dataclasses.fields(SAMPLING) if getattr(SAMPLING, f.name) == flags.default_of(f)
    ]
    args = parser(common_args.add_sampling).read(written(vars(SAMPLING)))
    assert common_args.sampling(args) == SAMPLING


def test_config_given_as_flags_comes_back_the_same() -> None:
    args = parser(common_args.add_sampling, common_args.add_model).read([*written(vars(CONFIG))])
    assert common_args.config(args) == CONFIG


@pytest.mark.parametrize("cls", METHODS)
def test_a_method_given_as_flags_comes_back_the_same(cls: type[Method]) -> None:
    values = different(cls)
    if cls.name == "linear-alignment":
        values["mask_top_p"] = None  # it refuses a mask together with a trust region
    if cls.name == "mato":
        values.pop("optimise_online")  # without the loop its strength is 1, which a trust region permits
    if cls.name == "context-steering":
        values["strength"] = 3.0
    if cls.name == "guidance":
        values["guidance_scale"] = 2.5
    args = parser(method_args.add_flags).read(["--method", cls.name, *written(values)])
    wishes = [] if cls.wishes == "none" else WISHES
    assert method_args.choice(args, wishes).build(wishes) == cls(tuple(wishes), **values)


def test_no_flags_give_the_dataclasses_own_defaults() -> None:
    args = parser(method_args.add_flags, common_args.add_sampling, common_args.add_model).read([])
    assert common_args.sampling(args) == SamplingParams()
    assert common_args.config(args) == EngineConfig()
    assert method_args.choice(args, []).values == {}


def test_one_seed_flag_seeds_both_the_engine_and_the_request() -> None:
    args = parser(common_args.add_sampling, common_args.add_model).read(["--seed", "7"])
    assert (common_args.sampling(args).seed, common_args.config(args).seed) == (7, 7)


def test_none_resets_an_optional_field() -> None:
    args = parser(method_args.add_flags).read(["--method", "linear-alignment", "--mask-top-p", "none"])
    assert method_args.choice(args, WISHES).values == {"mask_top_p": None}


def test_none_is_no_value_where_a_field_is_not_optional() -> None:
    args = parser(common_args.add_sampling).read(["--max-tokens", "none"])
    with pytest.raises(InputError, match=r"^--max-tokens is 'none'; it must be a whole number$"):
        common_args.sampling(args)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--max-tokens", "1.5"], "--max-tokens is '1.5'; it must be a whole number"),
        (["--temperature", "warm"], "--temperature is 'warm'; it must be a number"),
        (["--seed", "x"], "--seed is 'x'; it must be a whole number, or none"),
        (["--logit-bias", "5"], "--logit-bias is '5'; it must be ID=BIAS, such as 42=-100"),
        (["--logit-bias", "a=1"], "--logit-bias is 'a'; it must be a whole number"),
        (["--logit-bias", "5=1", "--logit-bias", "05=2"], "--logit-bias has 5 twice; once is enough"),
        (["--stop-token-ids", "END"], "--stop-token-ids is 'END'; it must be a whole number"),
        (["--temperature", "-1"], "temperature is -1.0; it must be a finite number ≥ 0 and at most 1000"),
        (
            ["--temperature", "-1e-3"],
            "temperature is -0.001; it must be a finite number ≥ 0 and at most 1000",
        ),
        (["--temperature", "-inf"], "temperature is -inf; it must be a finite number ≥ 0 and at most 1000"),
    ],
)
def test_a_value_that_cannot_be_is_named_in_a_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        common_args.sampling(parser(common_args.add_sampling).read(words))
    assert str(caught.value) == sentence


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
def test_argparse_mistakes_are_a_sentence_that_points_to_help(words: list[str]) -> None:
    with pytest.raises(InputError, match=r"^[^\n]+; see trimtab test --help$"):
        parser(common_args.add_sampling).read(words)


def test_a_switch_takes_no_value() -> None:
    said = r"^--no-ignore-eos takes no value, but was given 'yes'; see trimtab test --help$"
    with pytest.raises(InputError, match=said):
        parser(common_args.add_sampling).read(["--no-ignore-eos=yes"])


def test_a_value_may_start_with_a_dash() -> None:
    args = parser(method_args.add_flags, common_args.add_sampling).read(
        ["--prefer", "-x=1", "--stop", "x=--", "--stop", "--end"]
    )
    assert args.prefer == ["-x=1"]
    assert args.stop == ["x=--", "--end"]


def test_words_after_two_dashes_are_no_flags() -> None:
    made = parser(common_args.add_prompt, common_args.add_sampling)
    assert made.read(["--top-k", "3", "--", "--top-k"]).prompt == "--top-k"


def test_a_flag_takes_the_first_type_of_a_union() -> None:
    assert flags.kinds(EngineConfig)["kv_cache_memory"] == flags.Kind(str)
    assert flags.kinds(EngineConfig)["seed"] == flags.Kind(int, optional=True)


def test_a_field_of_an_unknown_type_cannot_become_a_flag() -> None:
    @dataclass(frozen=True)
    class Odd:
        thing: complex = option(1j, "no flag can say this")

    with pytest.raises(TypeError, match="no flag can be made for a field of type"):
        parser(lambda made: flags.add_fields(made, "odd", Odd))
