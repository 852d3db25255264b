"""The only module that uses private names of Ray Serve: look here first after an upgrade of Ray.

Ray Serve keeps, in a context variable, which request the running code works for. It has no public
way to read that, nor to start work that outlives the request.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable
from typing import Any

import opentelemetry.context
from ray.serve import context
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle


def request_id() -> str:
    """The id of the request that the running code works for; empty if it works for none."""
    return str(context._get_serve_request_context().request_id)


def detached_context() -> contextvars.Context:
    """A context for a task that may outlive the current request, because others wait for it too.

    When a client leaves, Ray Serve cancels the calls that its request made, which it finds by the
    internal request id. That id is left out here. The public id, the application's name and the
    trace are kept, so log lines and spans still name the request that started the task.
    """
    request = context._get_serve_request_context()
    about: Any = context._RequestContext(request_id=request.request_id, app_name=request.app_name)
    detached = contextvars.Context()
    detached.run(context._serve_request_context.set, about)
    detached.run(opentelemetry.context.attach, opentelemetry.context.get_current())
    return detached


async def broadcast(handle: DeploymentHandle[Any], method: str, *args: Any) -> list[Awaitable[Any]]:
    """Calls a method of every replica; returns what to await for the answer of each.

    Ray Serve's own way to read a broadcast waits for all: a replica that is silent would hide the
    others' answers.
    """
    try:
        results = await handle.broadcast(method, *args)._fetch_replica_results_async()
    except DeploymentUnavailableError:  # there are no replicas
        return []
    return [result.get_async() for result in results]
