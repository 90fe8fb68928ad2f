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

Item = TypeVar("Item")


def generate_many(
    engine: AsyncEngine, items: Iterable[Item], make_request: Callable[[Item], Request]
) -> Iterator[tuple[Item, Output | InputError]]:
    """What becomes of each as it is known: its output, or why it cannot be decoded.

    `make_request` makes what is decoded, when its turn comes. Twice what fits the engine is under way. Raises
    BusyError where a request has no room though nothing runs.
    """
    in_flight: dict[Future[Output], Item] = {}
    max_in_flight, queue = 2 * engine.config.max_num_seqs, deque(items)
    while queue or in_flight:
        if queue and len(in_flight) < max_in_flight:
            item = queue.popleft()
            try:
                in_flight[engine.submit(make_request(item))] = item
                continue
            except InputError as error:
                yield item, error
                continue
            except BusyError:
                if not in_flight:
                    raise
                queue.appendleft(item)
        for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
            yield in_flight.pop(future), future.result()
