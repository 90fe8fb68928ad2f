"""Which replica a call should go to: one that knows how its prompts begin, unless others have less to do."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def rank_replicas(key: bytes, loads: Mapping[str, int], slack: int) -> list[str]:
    """The replicas in the order in which a call of `key` is offered to them; `loads` are their calls.

    Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded load: each key has an order of its own, and
    who has more than `slack` calls above the idlest comes last. So calls of one key meet at few replicas,
    everybody finds the same order without asking, and a replica that comes or goes moves only its own keys.
    """
    max_load = min(loads.values(), default=0) + slack
    return sorted(loads, key=lambda replica: (loads[replica] > max_load, _hash_weight(key, replica)))


def _hash_weight(key: bytes, replica: str) -> bytes:
    return blake2b(key + replica.encode(), digest_size=8).digest()
