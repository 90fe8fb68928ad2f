"""A generating call from its body to its last byte: whole, or as server-sent events.

Whoever leaves before the end takes the request along: it is aborted within a step.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ...kernels.errors import InputError
from ..strict_json import COMPACT, dumps
from .answers import Answers
from .bodies import IGNORED, NEUTRAL, SAMPLING, ChatBody, CompletionBody, read
from .errors import SERVER, ApiError, api_error, bad
from .record import LOG, Record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive, Scope, Send

    from ..async_engine import AsyncEngine
    from ..output import Delta, Output
    from ..sampling import SamplingParams
    from ..ticket import Stream
    from .asking import Asked
    from .config import ServerConfig
    from .metrics import Metrics

NAMES = frozenset({*IGNORED, *NEUTRAL, *(f.name for f in (*fields(ChatBody), *fields(CompletionBody)))})
"""Of fields: what else stands in a body may be anybody's words, and is not logged."""
PATIENCE = 30.0
"""Seconds after the end of an answer in which a client must have read it."""


def left() -> ApiError:
    """Nobody waits for the answer any more; the number is nginx's."""
    return ApiError(499, "the client left")


def stopped() -> ApiError:
    """The server stops, and has waited long enough."""
    return ApiError(503, "the server is stopping", SERVER)


class Served:
    """One call under way: its streams, one for each prompt, and the record of it."""

    def __init__(self, asked: Asked, streams: list[Stream], record: Record, answers: Answers) -> None:
        self.asked, self.record, self.answers = asked, record, answers
        self._streams = streams

    async def pieces(self) -> AsyncIterator[tuple[int, Delta]]:
        """The pieces of all answers as they come, each with its choice's index. Raises ApiError."""
        arrived: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

        async def follow(first: int, stream: Stream) -> None:
            try:
                async for delta in stream:
                    arrived.put_nowait((first + delta.index, delta))
            except Exception as error:  # told to whoever waits for the pieces
                arrived.put_nowait((first, error))

        n = self.asked.requests[0].sampling.n
        tasks = [asyncio.create_task(follow(n * at, stream)) for at, stream in enumerate(self._streams)]
        try:
            left = self.asked.answers
            while left:
                index, news = await arrived.get()
                if isinstance(news, Exception):
                    raise api_error(news)
                self.record.saw(index, news)
                left -= news.output is not None
                yield index, news
                if news.output is not None:
                    _require_end(news.output, self.asked.requests[0].sampling, self._streams[index // n])
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    def close(self) -> None:
        """Aborts what is left."""
        for stream in self._streams:
            stream.close()


class Serving:
    """Serves the generating calls of one engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        model: str,
        metrics: Metrics,
        text_of: Callable[[int], str],
    ) -> None:
        self._engine, self._config, self._model = engine, config, model
        self._metrics, self._text_of = metrics, text_of

    async def serve(self, http: HttpRequest, ask: Callable[[dict[str, Any]], Asked]) -> Response:
        """The response to a call; `ask` makes of its body what is asked."""
        kind = "chatcmpl" if "/chat/" in http.url.path else "cmpl"
        client = http.client.host if http.client else ""
        record = Record(
            f"{kind}-{uuid.uuid4().hex}", http.url.path, client, self._metrics, self._config.log_prompts
        )
        try:
            values = await body(http, self._config)
            asked = await asyncio.to_thread(ask, values)
            record.asked(asked, values)
            served = await self._begin(asked, record)
        except (Exception, asyncio.CancelledError) as error:
            return _refused(record, error)
        if asked.stream:
            return EventStream(served, self._config.request_timeout + PATIENCE)
        try:
            return await _unless_gone(http, _whole(served), record)
        except (Exception, asyncio.CancelledError) as error:
            return _refused(record, error)
        finally:
            served.close()

    async def _begin(self, asked: Asked, record: Record) -> Served:
        streams: list[Stream] = []
        try:
            for request in asked.requests:
                streams.append(await self._engine.begin(request, self._config.request_timeout))
        except BaseException as error:
            for stream in streams:
                stream.close()
            if isinstance(error, InputError) and error.field in ("", "branch_token_ids"):
                error.field = "messages" if asked.chat else "prompt"
            raise
        answers = Answers(record.id, int(time.time()), self._model, asked.chat, self._text_of)
        return Served(asked, streams, record, answers)


class EventStream(Response):
    """The pieces of a call as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, served: Served, timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._served, self._timeout = served, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: set[asyncio.Task[Any]] = set()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            sending, leaving = asyncio.create_task(self._send(send)), asyncio.create_task(_gone(receive))
            tasks = {sending, leaving}
            await asyncio.wait(tasks, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            _end(self._served.record, sending.result() if sending.done() else left())
        except (OSError, RuntimeError):  # the connection is closed
            _end(self._served.record, left())
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            _end(self._served.record, stopped())
            await _event(send, stopped().body)
            await _event(send, "[DONE]", more=False)
        finally:
            for task in tasks:
                task.cancel()
            self._served.close()

    async def _send(self, send: Send) -> ApiError | None:
        """Sends all chunks. Returns the error that ended them before their time."""
        failure = None
        try:
            async for chunk in self._chunks():
                await _event(send, chunk)
        except ApiError as error:
            failure = error
            await _event(send, failure.body)
        await _event(send, "[DONE]", more=False)
        return failure

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Raises ApiError, whatever fails."""
        try:
            async for chunk in self._all_chunks():
                yield chunk
        except Exception as error:
            raise _failure(self._served.record, error) from error

    async def _all_chunks(self) -> AsyncIterator[dict[str, Any]]:
        served, answers = self._served, self._served.answers
        with_usage = served.asked.include_usage
        opened: set[int] = set()
        async for index, delta in served.pieces():
            found = [] if index in opened else [answers.opening(index)]
            opened.add(index)
            found.append(answers.piece(index, delta))
            if delta.output is not None and delta.output.error is None:
                found.append(answers.closing(index, delta.output.finish_reason))
            for chunk in found:
                if chunk is not None:
                    yield {**chunk, "usage": None} if with_usage else chunk
        if with_usage:
            yield answers.usage(served.record.prompts, served.record.tokens)


async def body(http: HttpRequest, config: ServerConfig) -> dict[str, Any]:
    """The JSON object of a call's body. Raises ApiError when it is too large, too slow, or none."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind!r}; it must be application/json")
    return read(await received(http, config))


async def received(http: HttpRequest, config: ServerConfig) -> bytes:
    """The bytes of a call's body. Raises ApiError when they are too many or too slow."""
    try:
        return await asyncio.wait_for(_bytes(http, config), config.body_timeout)
    except (TimeoutError, asyncio.TimeoutError) as error:
        message = f"the body did not come within {config.body_timeout:g} s"
        raise ApiError(408, message, "timeout_error") from error
    except ClientDisconnect as error:
        raise left() from error


async def _bytes(http: HttpRequest, config: ServerConfig) -> bytes:
    limit, found = config.max_body_bytes, bytearray()
    async for part in http.stream():
        found += part
        if len(found) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes, the most that this server takes")
    return bytes(found)


async def _whole(served: Served) -> Response:
    async for _ in served.pieces():
        pass
    outputs = [served.record.outputs[index] for index in range(served.asked.answers)]
    found = served.answers.whole(outputs, served.record.prompts)
    response = Response(dumps(found), media_type="application/json")
    served.record.end(200)
    return response


async def _unless_gone(http: HttpRequest, work: Any, record: Record) -> Response:
    """What the work gives; it is cancelled as soon as the client is gone."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_gone(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            response: Response = working.result()
            return response
        _end(record, left())
        return left().response
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _event(send: Send, data: dict[str, Any] | str, more: bool = True) -> None:
    """Sends a server-sent event; after the last there is no more."""
    text = data if isinstance(data, str) else dumps(data, COMPACT)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})


async def _gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _refused(record: Record, error: BaseException) -> Response:
    failure = _failure(record, error)
    _end(record, failure)
    return failure.response


def _failure(record: Record, error: BaseException) -> ApiError:
    """What is told of it; the log says where a defect is."""
    failure = stopped() if isinstance(error, asyncio.CancelledError) else api_error(error)
    if failure.status == 500 and not isinstance(error, ApiError):
        LOG.error("request %s failed", record.id, exc_info=error)
    return failure


def _end(record: Record, failure: ApiError | None) -> None:
    if failure is None:
        record.end(200)
    else:
        param = re.split(r"[.\[]", failure.param or "")[0]
        record.end(failure.status, failure.message, param if param in NAMES or param in SAMPLING else None)


def _require_end(output: Output, sampling: SamplingParams, stream: Stream) -> None:
    """Raises ApiError for an answer that did not come to an end of its own."""
    if output.error is None:
        return
    if output.finish_reason == "abort" and stream.expired:
        raise ApiError(504, output.error, "timeout_error")
    if output.finish_reason == "abort":
        raise ApiError(503, output.error, SERVER)
    if sampling.logit_bias or sampling.min_tokens:  # they may leave no token to choose
        raise bad(output.error, None)
    raise ApiError(500, output.error, SERVER)
