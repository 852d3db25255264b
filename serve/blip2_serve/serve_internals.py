"""The only module that uses private names of Ray and Serve: look here first after an upgrade.

Ray Serve keeps, in a context variable, which request the running code works for. It has no public
way to read that, nor to start work that outlives the request. Nor can it be told where replicas
listen for each other, or to tell how many requests are under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import opentelemetry.context
import ray
from ray._private import ray_logging, services
from ray.serve import context
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_NAMESPACE
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


@contextlib.contextmanager
def own_internal_id() -> Iterator[None]:
    """Within the block, calls to other deployments get internal request ids of their own.

    Otherwise they have that of the request that makes them. Ray Serve 2.60 finds a call that waits
    for a replica by that id: of two calls of one request to one stage, it would lose the second.
    Nor does Ray Serve cancel such a call when the client leaves: the caller has to.
    """
    nameless: Any = replace(context._get_serve_request_context(), _internal_request_id="")
    token = context._serve_request_context.set(nameless)
    try:
        yield
    finally:
        context._serve_request_context.reset(token)


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


async def check_health(handle: DeploymentHandle[Any], replica: str) -> None:
    """Runs the health check of one replica, by its unique id.

    A replica that is to stop finishes its requests first. Meanwhile handles no longer know it.

    Raises:
        Exception: it is not healthy, or no longer there.
    """
    name = ReplicaID(replica, handle.deployment_id).to_full_id_str()
    actor: Any = await asyncio.to_thread(ray.get_actor, name, SERVE_NAMESPACE)
    await actor.check_health.remote()


def listen_on_loopback() -> None:
    """Lets the replica of this process listen for other replicas on loopback only.

    To be called before the replica is initialized. Ray Serve would listen on all addresses.
    """
    from ray.serve._private import replica

    module: Any = replica
    add_port = module.add_port_to_grpc_server
    module.add_port_to_grpc_server = lambda server, _: add_port(server, "127.0.0.1:0")


@contextlib.contextmanager
def ray_in_its_own_session() -> Iterator[None]:
    """Within the block, `ray.init` starts Ray's processes in sessions of their own.

    A terminal, a supervisor or a container's runtime may send SIGTERM to all processes of a group.
    Ray's would exit at once, and what is under way would fail before it is finished.
    """

    class InOwnSession(services.ConsolePopen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, start_new_session=True, **kwargs)

    with mock.patch.object(services, "ConsolePopen", InOwnSession):
        yield


def hide_worker_lines(part: str) -> None:
    """Keeps lines of Ray's workers that contain `part` from this process's output."""
    dispatcher: Any = ray_logging.global_worker_stdstream_dispatcher
    emit = dispatcher.emit

    def emit_others(batch: dict[str, Any]) -> None:
        if others := [line for line in batch["lines"] if part not in line]:
            emit({**batch, "lines": others})

    dispatcher.emit = emit_others


def ongoing_requests(application: str, deployment: str) -> int:
    """How many requests the replicas of a deployment work on; a lost replica counts as idle."""
    prefix = f"SERVE_REPLICA::{application}#{deployment}#"
    found = ray.util.list_named_actors(all_namespaces=True)
    count = 0
    for actor in found:
        if actor["name"].startswith(prefix):
            with contextlib.suppress(Exception):
                replica: Any = ray.get_actor(actor["name"], actor["namespace"])
                count += ray.get(replica.get_num_ongoing_requests.remote(), timeout=5)
    return count
