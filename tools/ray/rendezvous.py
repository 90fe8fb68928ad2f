"""Rank replicas for a call: prefer those with its prefix in the cache, unless they are overloaded."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def rank_replicas(key: bytes, loads: Mapping[str, int], slack: int) -> list[str]:
    """The replicas in the order to try for a call with `key`; `loads` are their running calls.

    Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded load: each key has its own order of
    replicas, and replicas with more than `slack` calls above the least loaded come last. So calls with one
    key go to few replicas, all gateways compute the same order without communication, and adding or removing
    a replica moves only its own keys.
    """
    max_load = min(loads.values(), default=0) + slack
    return sorted(loads, key=lambda replica: (loads[replica] > max_load, _hash_weight(key, replica)))


def _hash_weight(key: bytes, replica: str) -> bytes:
    return blake2b(key + replica.encode(), digest_size=8).digest()
