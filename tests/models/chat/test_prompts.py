"""Chat templates compared with transformers, and the K+1 branch prompts of a conversation."""

from __future__ import annotations

import copy
import enum
import json
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trimtab.kernels.common.errors import InputError
from trimtab.models.chat.prompts import DEFAULT_SYSTEM, BranchPrompt, render_branches
from trimtab.models.chat.template import ChatTemplate
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.chat_templates import CHATML, DROPS_SYSTEM, GEMMA, MISTRAL, PLAIN, QWEN3, TEMPLATES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BOS, EOS = "<s>", "</s>"

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "<b> & 'é' 東京", "z": 1, "a": [1.5, None, True]},
    }
]
USER_TURN = [{"role": "user", "content": "  Why <b>&</b> 東京?\n"}]
CONVERSATION = [
    *USER_TURN,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo."},
    {"role": "user", "content": "And?"},
]
SYSTEM = [{"role": "system", "content": "Be kind."}]


def make_backend(*specials: str) -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer_backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer_backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer_backend.decoder = decoders.ByteLevel()
    tokenizer_backend.add_special_tokens(list(specials))
    return tokenizer_backend


def tokenizer_adding(single: str) -> Tokenizer:
    """A tokenizer whose post-processor adds the special tokens of `single`, such as "<s> $A </s>"."""
    tokenizer_backend = make_backend(BOS, EOS)
    pairs = [(token, tokenizer_backend.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer_backend.post_processor = processors.TemplateProcessing(single, special_tokens=pairs)
    return Tokenizer(HFTokenizerBackend(tokenizer_backend), BOS, EOS)


PLAIN_TOKENIZER = Tokenizer(HFTokenizerBackend(make_backend(BOS, EOS)), BOS, EOS)


def render_prompts(
    source: str, messages: Sequence[Any], *objectives: str, placement: str = "system", **template_args: Any
) -> list[str]:
    branches = render_branches(
        ChatTemplate(source, BOS, EOS), PLAIN_TOKENIZER, messages, objectives, placement, template_args
    )
    assert [branch.name for branch in branches] == ["base", *objectives]
    assert all(
        PLAIN_TOKENIZER.decode(b.prompt_token_ids, skip_special_tokens=False) == b.prompt for b in branches
    )
    return [branch.prompt for branch in branches]


def user_message(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize(
    "messages", [USER_TURN, CONVERSATION, SYSTEM + USER_TURN, SYSTEM + CONVERSATION, [*USER_TURN, *USER_TURN]]
)
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"enable_thinking": False, "date_string": "1 May 2025"},
    ],
)
def test_rendering_matches_transformers(source: str, messages: list[Any], kwargs: dict[str, Any]) -> None:
    peer = PreTrainedTokenizerFast(tokenizer_object=make_backend(BOS, EOS), bos_token=BOS, eos_token=EOS)
    template_args = {"add_generation_prompt": True, **kwargs}
    template = ChatTemplate(source, BOS, EOS)
    try:
        expected = peer.apply_chat_template(messages, chat_template=source, tokenize=False, **template_args)
    except Exception:  # transformers raises other types
        with pytest.raises(InputError, match="must alternate"):
            template.render(messages, **kwargs)
    else:
        assert template.render(messages, **kwargs) == expected


@pytest.mark.parametrize(
    "arguments", ["", "indent=2", "separators=(',', ':')", "sort_keys=true", "ensure_ascii=true"]
)
def test_tojson_matches_transformers(arguments: str) -> None:
    source = f"{{{{ tools | tojson({arguments}) }}}}"
    peer = PreTrainedTokenizerFast(tokenizer_object=make_backend())
    expected = peer.apply_chat_template(USER_TURN, tools=TOOLS, chat_template=source, tokenize=False)
    assert ChatTemplate(source).render(USER_TURN, tools=TOOLS) == expected
    assert json.loads(expected) == TOOLS


def test_strftime_now_is_the_local_time() -> None:
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(USER_TURN) == datetime.now().strftime(
        "%Y-%m-%d"
    )


def test_variables_set_in_a_generation_block_are_local_to_it() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    peer = PreTrainedTokenizerFast(tokenizer_object=make_backend())
    assert ChatTemplate(source).render(USER_TURN) == peer.apply_chat_template(
        USER_TURN, chat_template=source, tokenize=False
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages.pop() }}",
        "{{ dict.__call__.__globals__ }}",
        "{{ dict.mro() }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{{ namespace(__init__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ (messages | attr('__class__')).mro() }}",
    ],
)
def test_templates_cannot_escape_the_sandbox_or_change_messages(source: str) -> None:
    messages = copy.deepcopy(CONVERSATION)
    with pytest.raises(InputError, match="the chat template cannot render this conversation"):
        ChatTemplate(source).render(messages)
    assert messages == CONVERSATION


def test_namespace_and_dict_are_available_to_templates() -> None:
    source = "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.a = ns.a + 1 %}"
    source += "{{ ns.a }}{{ ns.self }}{{ dict(b=3).b }}"
    assert ChatTemplate(source).render(USER_TURN) == "223"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('No \n such thing.') }}", "No such thing"),
        ("{{ messages[0].missing.deep }}", "has no attribute 'missing'"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ nothing | tojson }}", "not JSON serializable"),
    ],
)
def test_a_failing_template_is_a_one_line_error_with_the_reason(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        ChatTemplate(source).render(USER_TURN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a\n{% if %}", r"line 2 of the chat template is not valid Jinja: Expected an expression"),
        (
            "{% for m in messages %}",
            "line 1 of the chat template is not valid Jinja: Unexpected end of template",
        ),
        ("\n\n{{ x | nofilter }}", "line 3 .*No filter named 'nofilter'"),
        ("{% break %}", "not valid Jinja: SyntaxError"),
    ],
)
def test_a_malformed_template_is_refused_with_line_and_reason(source: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        ChatTemplate(source)
    assert "\n" not in str(caught.value)


class Role(str, enum.Enum):
    USER = "user"


def test_str_and_int_subclasses_are_rendered_as_plain_values() -> None:
    colour = enum.IntEnum("Colour", "RED")
    source = "{{ messages[0].role }} {{ tools[0].x }} {{ flag }}"
    messages = [{"role": Role.USER, "content": "x"}]
    assert ChatTemplate(source).render(messages, tools=({"x": colour.RED},), flag=True) == "user 1 True"


def test_the_error_for_a_non_json_value_names_its_path() -> None:
    with pytest.raises(InputError, match=r"chat_template_kwargs\['tools'\]\[1\] is <object"):
        ChatTemplate(PLAIN).render(USER_TURN, tools=[1, object()])


def write_folder(folder: Path, jinja: str | None = None, config: Any = None) -> Path:
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    return folder


@pytest.mark.parametrize(
    ("jinja", "config", "expected"),
    [
        ("file é", "config", "file é"),
        (None, "config", "config"),
        (
            None,
            [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}],
            "plain",
        ),
        (None, [{"name": "tool_use", "template": "tools"}], None),
        (None, None, None),
    ],
)
def test_the_jinja_file_takes_precedence_over_the_config(
    tmp_path: Path, jinja: str | None, config: Any, expected: str | None
) -> None:
    template = ChatTemplate.from_folder(write_folder(tmp_path, jinja, config), PLAIN_TOKENIZER)
    assert (template.render(USER_TURN) if template else None) == expected


def test_an_empty_folder_has_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path, PLAIN_TOKENIZER) is None


@pytest.mark.parametrize("as_file", [False, True])
def test_an_override_is_a_template_or_its_path(tmp_path: Path, as_file: bool) -> None:
    text = "{{ bos_token }}" + "long " * 200 + "{{ eos_token }}"
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    template = ChatTemplate.from_folder(
        write_folder(tmp_path, "file"), PLAIN_TOKENIZER, str(path) if as_file else text
    )
    assert template is not None
    assert template.render(USER_TURN) == BOS + "long " * 200 + EOS


@pytest.mark.parametrize("override", ["nowhere.jinja", "", "a\0b"])
def test_an_override_that_is_neither_template_nor_file_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(InputError, match="must be a Jinja template or the path of one"):
        ChatTemplate.from_folder(tmp_path, PLAIN_TOKENIZER, override)


def test_a_template_in_the_config_must_be_a_string(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is 3; it must be a string"):
        ChatTemplate.from_folder(write_folder(tmp_path, config=3), PLAIN_TOKENIZER)


def test_errors_truncate_long_templates_and_values(tmp_path: Path) -> None:
    long = "x" * 10**5
    for refused in (
        lambda: ChatTemplate.from_folder(tmp_path, PLAIN_TOKENIZER, long),
        lambda: ChatTemplate.from_folder(write_folder(tmp_path, config={"default": long}), PLAIN_TOKENIZER),
        lambda: ChatTemplate("{{ x }}").render(USER_TURN, x=long.encode()),
        lambda: ChatTemplate("{{ x }}").render(USER_TURN, x={long: b"y"}),
    ):
        with pytest.raises(InputError, match=r"must be a|must be JSON values") as refusal:
            refused()
        assert len(str(refusal.value)) < 400 + len(str(tmp_path))


def test_objectives_are_appended_to_the_shared_system_text() -> None:
    base, short, kind = render_prompts(CHATML, [user_message("Hi")], "Be short.", "Be kind.")
    assert base.startswith(
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert base.endswith("<|im_start|>assistant\n")
    assert short == base.replace(DEFAULT_SYSTEM, f"{DEFAULT_SYSTEM} Be short.")
    assert kind == base.replace(DEFAULT_SYSTEM, f"{DEFAULT_SYSTEM} Be kind.")


def test_branches_share_the_system_text_of_the_conversation() -> None:
    messages = [{"role": "system", "content": "You are Bob."}, user_message("Hi")]
    assert render_prompts(PLAIN, messages, "W") == [
        "system: You are Bob.\nuser: Hi\n",
        "system: You are Bob. W\nuser: Hi\n",
    ]


def test_placement_user_appends_objectives_to_the_last_user_turn() -> None:
    messages = [
        user_message("One"),
        {"role": "assistant", "content": "Two"},
        user_message("Three"),
        {"role": "assistant", "content": "F"},
    ]
    base, steered = render_prompts(PLAIN, messages, "W", placement="user")
    assert base == f"system: {DEFAULT_SYSTEM}\nuser: One\nassistant: Two\nuser: Three\nassistant: F\n"
    assert steered == base.replace("Three", "Three W")


@pytest.mark.parametrize("source", [GEMMA, DROPS_SYSTEM, MISTRAL])
@pytest.mark.parametrize("system", [None, "You are Bob."])
def test_an_unsupported_system_text_is_prepended_to_the_first_user_turn(
    source: str, system: str | None
) -> None:
    system_messages = [{"role": "system", "content": system}] if system else []
    turns = [user_message("One"), {"role": "assistant", "content": "Two"}, user_message("Three")]
    text = system or DEFAULT_SYSTEM

    def folded(opening: str, last: str) -> str:
        return ChatTemplate(source, BOS, EOS).render(
            [user_message(f"{opening}\n\nOne"), turns[1], user_message(last)]
        )

    assert render_prompts(source, system_messages + turns, "W") == [
        folded(text, "Three"),
        folded(f"{text} W", "Three"),
    ]
    by_user = render_prompts(source, system_messages + turns, "W", placement="user")
    assert by_user == [folded(text, "Three"), folded(text, "Three W")]


def test_one_user_turn_can_have_the_folded_system_text_and_an_objective() -> None:
    text = f"user: {DEFAULT_SYSTEM}\n\nHi"
    assert render_prompts(DROPS_SYSTEM, [user_message("Hi")], "W", placement="user") == [
        f"{text}\n",
        f"{text} W\n",
    ]


def test_a_dropped_system_text_is_detected_if_the_user_text_is_equal() -> None:
    base, _ = render_prompts(DROPS_SYSTEM, [user_message(DEFAULT_SYSTEM)], "W")
    assert base == f"user: {DEFAULT_SYSTEM}\n\n{DEFAULT_SYSTEM}\n"


def test_a_rewritten_system_text_is_not_treated_as_dropped() -> None:
    source = "{{ messages[0].content | trim | tojson }}|{{ messages[1].content }}"
    messages = [{"role": "system", "content": ' Say "hi"\n'}, user_message("Hi")]
    assert render_prompts(source, messages) == ['"Say \\"hi\\""|Hi']


def test_a_system_message_in_the_middle_keeps_its_position() -> None:
    messages = [user_message("One"), {"role": "system", "content": "S"}, user_message("Two")]
    assert render_prompts(PLAIN, messages, "W")[1] == "user: One\nsystem: S W\nuser: Two\n"
    assert render_prompts(DROPS_SYSTEM, messages, "W")[1] == "user: S W\n\nOne\nuser: Two\n"


def test_template_arguments_reach_every_branch() -> None:
    off = render_prompts(QWEN3, CONVERSATION, "W", enable_thinking=False)
    assert all(text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") for text in off)


def test_the_input_messages_are_not_modified() -> None:
    messages = [user_message([{"type": "text", "text": "a"}])]
    before = copy.deepcopy(messages)
    render_prompts(GEMMA, messages, "W", placement="user")
    assert messages == before


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]
    assert render_prompts(PLAIN, [user_message(parts)])[0].endswith("user: One two\n")


def test_an_assistant_turn_of_tool_calls_needs_no_content() -> None:
    source = "{% for m in messages %}{{ m.content or m.tool_calls | tojson }}|{% endfor %}"
    messages = [user_message("Hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
    assert render_prompts(source, messages) == [f'{DEFAULT_SYSTEM}|Hi|[{{"id": 1}}]|']


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"content": "x"}], r"messages\[0\] is \{'content': 'x'\}; it must be an object with role"),
        ([user_message("x"), "y"], r"messages\[1\] is 'y'"),
        ([user_message(None)], r"content of messages\[0\] is None"),
        ([user_message("x"), {"role": "assistant"}], r"content of messages\[1\] is None"),
        (
            [user_message([{"type": "image_url", "image_url": "u"}])],
            r"messages\[0\] contains a part 'image_url'",
        ),
        ([user_message(["x"])], r"messages\[0\] contains a part 'x'"),
        ([user_message([{"type": "text", "text": 3}])], r"messages\[0\] contains a part 'text'"),
        ([user_message(7)], r"content of messages\[0\] is 7"),
        ([{"role": "assistant", "content": "x"}], "must have at least one message with role 'user'"),
        ([], "must have at least one message with role 'user'"),
    ],
)
def test_the_error_for_an_invalid_message_names_its_index(messages: list[Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        render_prompts(PLAIN, messages)


def test_a_conversation_that_the_template_rejects_is_refused_with_its_reason() -> None:
    with pytest.raises(InputError, match="Roles must alternate"):
        render_prompts(MISTRAL, [user_message("One"), user_message("Two")])


def test_the_error_for_a_missing_template_names_the_alternatives() -> None:
    with pytest.raises(InputError, match=r"no chat template; give chat_template, or branch_token_ids"):
        render_branches(None, PLAIN_TOKENIZER, USER_TURN, ["W"], "system", {})


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(InputError, match="placement is 'both'"):
        render_prompts(PLAIN, USER_TURN, placement="both")


def test_template_arguments_cannot_replace_the_conversation() -> None:
    with pytest.raises(InputError, match="chat_template_kwargs contains 'messages'"):
        render_branches(
            ChatTemplate(PLAIN), PLAIN_TOKENIZER, USER_TURN, [], "system", {"messages": CONVERSATION}
        )


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A", "$A </s>"])
@pytest.mark.parametrize("source", [PLAIN, "{{ bos_token }}" + PLAIN])
def test_bos_is_added_once_where_configured_and_eos_never(single: str, source: str) -> None:
    tokenizer = tokenizer_adding(single)
    (base,) = render_branches(ChatTemplate(source, BOS, EOS), tokenizer, USER_TURN, [], "system", {})
    bos, eos = tokenizer.encode(BOS + EOS)
    expected_bos = single.startswith(BOS) or source.startswith("{{ bos")
    assert base.prompt_token_ids.count(bos) == expected_bos
    assert (base.prompt_token_ids[0] == bos) == expected_bos
    assert eos not in base.prompt_token_ids
    assert base == BranchPrompt(
        "base",
        base.prompt,
        [bos] * (expected_bos and not base.prompt.startswith(BOS)) + tokenizer.encode(base.prompt),
    )


def test_bos_is_not_added_twice_if_bos_token_is_empty() -> None:
    tokenizer = tokenizer_adding("<s> $A")
    tokenizer.bos_token = ""
    (base,) = render_branches(ChatTemplate(BOS + PLAIN), tokenizer, USER_TURN, [], "system", {})
    assert base.prompt_token_ids == tokenizer.encode(base.prompt)


def test_the_default_system_text_of_the_demo_template_is_replaced(demo_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(demo_folder)
    template = ChatTemplate.from_folder(demo_folder, tokenizer)
    base, steered = render_branches(template, tokenizer, [user_message("Hi")], ["Be short."], "system", {})
    turns = "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert base.prompt == f"<|im_start|>system\n{DEFAULT_SYSTEM}{turns}"
    assert steered.prompt == f"<|im_start|>system\n{DEFAULT_SYSTEM} Be short.{turns}"
    assert base.prompt_token_ids[0] == 1
    assert tokenizer.decode(steered.prompt_token_ids, skip_special_tokens=False) == steered.prompt
