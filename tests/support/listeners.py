"""Speaks to the ports of a server as an attacker would who reaches them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import grpc
import psutil
from ray.core.generated import (
    core_worker_pb2,
    core_worker_pb2_grpc,
    gcs_service_pb2,
    gcs_service_pb2_grpc,
    node_manager_pb2,
    node_manager_pb2_grpc,
    reporter_pb2,
    reporter_pb2_grpc,
)
from ray.serve.generated import serve_pb2, serve_pb2_grpc

WITHIN_S = 10
# Ray's own services, by who has them: a stub, and a method that changes nothing.
SERVICES = {
    "GCS": (
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub,
        "GetAllNodeInfo",
        gcs_service_pb2.GetAllNodeInfoRequest(),
    ),
    "raylet": (
        node_manager_pb2_grpc.NodeManagerServiceStub,
        "GetNodeStats",
        node_manager_pb2.GetNodeStatsRequest(),
    ),
    "worker": (
        core_worker_pb2_grpc.CoreWorkerServiceStub,
        "GetCoreWorkerStats",
        core_worker_pb2.GetCoreWorkerStatsRequest(),
    ),
    "agent": (
        reporter_pb2_grpc.ReporterServiceStub,
        "GetTraceback",
        reporter_pb2.GetTracebackRequest(),
    ),
}
TOKEN_FILE = Path.home() / ".ray" / "auth_token"


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def ports(processes: list[psutil.Process]) -> dict[int, str]:
    """The TCP ports on which processes listen, each with the name of the process."""
    found = {}
    for process in processes:
        try:
            connections = process.net_connections("tcp")
            name = process.name()
        except psutil.NoSuchProcess:
            continue
        found |= {c.laddr.port: name for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def ask_ray(port: int, token: str | None) -> dict[str, str]:
    """What a port answers to a harmless call of each of SERVICES that it has."""
    answers = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name, (stub, method, request) in SERVICES.items():
            code = _code(getattr(stub(channel), method), request, token)
            if code not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE):
                answers[name] = code.name
    return answers


def send_pickles(port: int, mark: Path, token: str | None) -> None:
    """Calls a replica, as Ray Serve does, with a pickle for everything that it takes."""
    payload = pickle.dumps(Mark(mark))
    request = serve_pb2.ASGIRequest(
        pickled_request_metadata=payload, request_args=payload, request_kwargs=payload
    )
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        _code(serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest, request, token)


def _code(method: Any, request: Any, token: str | None) -> grpc.StatusCode:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        method(request, timeout=WITHIN_S, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
