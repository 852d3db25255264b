"""Creates replicas without a cluster."""

from __future__ import annotations

from typing import Any


def replica(cls: Any, *args: Any) -> Any:
    """Creates an instance as Serve does; returns it and the result of `__init__`."""
    instance = object.__new__(cls)
    return instance, cls.__init__(instance, *args)
