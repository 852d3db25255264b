"""Replicas without a cluster."""

from __future__ import annotations

from typing import Any


def replica(deployment: Any, *args: Any) -> Any:
    """An instance as Serve makes it, and what its `__init__` returned: a coroutine, or None."""
    cls = deployment.func_or_class
    instance = object.__new__(cls)
    return instance, cls.__init__(instance, *args)
