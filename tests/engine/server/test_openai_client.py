"""The `openai` client against a server of the demo model."""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from .server_process import ServerProcess

MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "What is rain?"}]
STEERING = {"objectives": [{"text": "Be poetic.", "weight": 0.7}, {"text": "Be brief.", "weight": 0.3}]}


@pytest.fixture(scope="module")
def openai(demo_server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["demo"]
    assert openai.models.retrieve("demo").owned_by == "trimtab"


def test_a_chat_is_answered_and_a_stream_joins_to_the_same(openai: OpenAI) -> None:
    response = openai.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=12, temperature=0)
    assert response.choices[0].finish_reason == "length"
    assert response.usage is not None
    assert (response.usage.completion_tokens, response.object) == (12, "chat.completion")
    stream = openai.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_completion_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == response.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 6
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], response.usage)


def test_steering_is_one_key_and_its_trace_streams(openai: OpenAI) -> None:
    response = openai.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        extra_body={"steering": {**STEERING, "method": "mato", "trace": True, "kl_budget": 0.2}},
    )
    trace = response.choices[0].model_extra["trace"]  # type: ignore[index]
    assert "".join(trace["tokens"]) == response.choices[0].message.content
    assert [len(row) for row in trace["weights"]] == [2] * 8
    assert [len(row) for row in trace["branch_logprobs"]] == [3] * 8
    assert all(kl <= 0.2 + 1e-3 for kl in trace["kl"])
    assert len(response.usage.prompt_tokens_details.model_extra["branches"]) == 2  # type: ignore[union-attr,index]
    stream = openai.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"steering": {**STEERING, "method": "mato", "trace": True, "kl_budget": 0.2}},
    )
    parts = [extra["trace"] for chunk in stream if "trace" in (extra := chunk.choices[0].model_extra or {})]
    for name, values in trace.items():
        assert [value for part in parts for value in part[name]] == values
    plain = openai.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=8, temperature=0, extra_body={"steering": STEERING}
    )
    assert "trace" not in (plain.choices[0].model_extra or {})


def test_log_probabilities_have_openais_shape(openai: OpenAI) -> None:
    chat = openai.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    assert chat.choices[0].logprobs is not None
    tokens = chat.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == chat.choices[0].message.content
    assert all(
        len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in tokens
    )
    assert all(bytes(token.bytes or []).decode() == token.token for token in tokens)
    text = openai.completions.create(model="demo", prompt="Rain is", max_tokens=5, temperature=0, logprobs=2)
    logprobs = text.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == text.choices[0].text
    assert all(len(each) == 2 for each in logprobs.top_logprobs or [])
    assert logprobs.text_offset == [text.choices[0].text.index(t) for t in logprobs.tokens or []]


def test_seed_n_and_stop_are_honoured(openai: OpenAI) -> None:
    first, second = (
        openai.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=9, n=3, seed=7)
        for _ in range(2)
    )
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    stopped = openai.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=40, temperature=0, stop=[" is"]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert " is" not in (stopped.choices[0].message.content or "")


def test_completions_accept_several_prompts(openai: OpenAI) -> None:
    completion = openai.completions.create(
        model="demo", prompt=["Rain is", "Snow is"], max_tokens=6, n=2, seed=1, temperature=0
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[0].text == completion.choices[1].text != completion.choices[2].text
    stream = openai.completions.create(
        model="demo", prompt=["Rain is", "Snow is"], max_tokens=6, temperature=0, stream=True
    )
    texts = {0: "", 1: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [completion.choices[0].text, completion.choices[2].text]


def test_concurrent_async_clients_get_the_answers_of_a_single_one(
    openai: OpenAI, demo_server: ServerProcess
) -> None:
    async def ask(client: AsyncOpenAI, number: int) -> str:
        stream = await client.chat.completions.create(
            model="demo",
            messages=MESSAGES,
            max_tokens=6,
            seed=number,
            stream=True,
            extra_body={"steering": STEERING},
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{demo_server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(8)))

    together = asyncio.run(all_at_once())
    alone = openai.chat.completions.create(
        model="demo", messages=MESSAGES, max_tokens=6, seed=5, extra_body={"steering": STEERING}
    )
    assert together[5] == alone.choices[0].message.content


def test_errors_raise_the_openai_clients_exceptions(openai: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="this server serves 'demo'"):
        openai.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(BadRequestError) as refused:
        openai.chat.completions.create(model="demo", messages=MESSAGES, temperature=-1)
    assert (refused.value.param, refused.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(BadRequestError) as refused:
        openai.completions.create(model="demo", prompt="rain " * 9000, max_tokens=5)
    assert refused.value.code == "context_length_exceeded"
