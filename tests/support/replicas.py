"""Creates replicas without a cluster."""

from __future__ import annotations

from typing import Any


def replica(deployment: Any, *args: Any) -> Any:
    """Creates an instance as Serve does; returns it and the result of `__init__`."""
    cls = deployment.func_or_class
    instance = object.__new__(cls)
    return instance, cls.__init__(instance, *args)
