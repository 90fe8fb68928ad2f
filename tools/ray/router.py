"""Request router of Ray Serve that routes calls by prompt prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.serve.request_router import RequestRouter

from .rendezvous import rank_replicas

if TYPE_CHECKING:
    from ray.serve.request_router import PendingRequest, RunningReplica


class PrefixRouter(RequestRouter):
    """Routes calls with equal keys to the same replicas, see `rank_replicas`; others to the least loaded."""

    def initialize_state(self, slack: int = 0) -> None:
        """Receives `request_router_kwargs` from Ray."""
        self._slack = slack

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas in the order to try."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # otherwise Ray retries without a pause
        key = getattr(pending_request.args[0], "key", b"")
        if not key:
            return [candidate_replicas]  # equal rank: Ray chooses the least loaded
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        queue_lens = self.replica_queue_len_cache
        loads = {name: queue_lens.get(each.replica_id) or 0 for name, each in by_name.items()}
        return [[by_name[name]] for name in rank_replicas(key, loads, self._slack)]
