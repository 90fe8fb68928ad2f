"""Run many requests through one engine, with enough in flight to keep its batch full."""

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
    """Yield each item with its output, or the InputError of its request, as it finishes.

    `make_request` is called when an item is submitted. Up to 2 * max_num_seqs requests are in flight. Raises
    BusyError if the engine rejects a request while none is in flight.
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
