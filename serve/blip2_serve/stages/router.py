"""The request router of the stages: it sends a call where the caller's `StageClient` wants it."""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from blip2_serve.stages.calls import attempt_of


class CallRouter(RequestRouter):
    """Serve's routers know nothing of a replica that has stalled; the `StageClient` does.

    Serve makes one for each caller of a stage, in the caller's process. Calls without an attempt,
    such as those of a test, go to any replica.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        call = pending_request and pending_request.kwargs.get("call")
        attempt = attempt_of(call.id) if call else None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
        if pending_request is None or attempt is None:
            return [random.sample(candidate_replicas, k=min(2, len(candidate_replicas)))]
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        chosen = attempt.choose(list(replicas))
        pending_request.kwargs["call"] = attempt.call
        return [[replicas[chosen]]] if chosen else []
