"""Many requests through one engine, as many at once as keep its batch full."""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TYPE_CHECKING, TypeVar

from ...kernels.common.errors import BusyError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ...engine.async_engine import AsyncEngine
    from ...engine.outputs import Output
    from ...engine.request import Request

Asked = TypeVar("Asked")


def decoded(
    engine: AsyncEngine, asked: Iterable[Asked], request: Callable[[Asked], Request]
) -> Iterator[tuple[Asked, Output | InputError]]:
    """What becomes of each as it is known: its output, or why it cannot be decoded.

    `request` makes what is decoded, when its turn comes. Twice what fits the engine is under way. Raises
    BusyError where a request has no room though nothing runs.
    """
    running: dict[Future[Output], Asked] = {}
    width, waiting = 2 * engine.config.max_num_seqs, deque(asked)
    while waiting or running:
        if waiting and len(running) < width:
            one = waiting.popleft()
            try:
                running[engine.submit(request(one))] = one
                continue
            except InputError as error:
                yield one, error
                continue
            except BusyError:
                if not running:
                    raise
                waiting.appendleft(one)
        for ended in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(ended), ended.result()
