"""Strict checks of requests; an error names the field as the client wrote it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from blip2_serve.errors import InvalidRequest

# Of messages, and of parts of a message: more than any chat that fits into the model.
MOST_ITEMS = 1024
FEW = Field(max_length=MOST_ITEMS)


class Strict(BaseModel):
    """Base of everything in a request: refuses unknown fields, NaN and infinity."""

    # Any constraint on strings makes pydantic refuse those that are not valid Unicode (half a
    # surrogate pair), which no tokenizer accepts.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, str_min_length=0)


def explain(errors: Sequence[Any], body: Any) -> InvalidRequest:
    """Explains the most specific of pydantic's errors.

    `body` is the parsed request, or None if it is not at hand or not JSON.
    """
    if not errors:
        return InvalidRequest("the request is invalid")
    located = [(_path(error, body), error) for error in errors]
    # What is too long is said, and not that it could have been something else.
    path, error = max(located, key=lambda pair: (pair[1]["type"] == "too_long", len(pair[0])))
    field = str(path[0]) if path else None
    name = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    kind = error["type"]
    if kind == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return InvalidRequest(f"the body is not valid JSON: {reason}")
    if kind == "extra_forbidden":
        return InvalidRequest(f"unknown parameter {name}", field)
    if kind == "missing":
        return InvalidRequest(f"{name or 'a JSON body'} is required", field)
    if not path and kind in ("model_type", "model_attributes_type"):
        return InvalidRequest("the body must be a JSON object")
    message = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = message[:1].lower() + message[1:]
    return InvalidRequest(f"{name}: {message}" if name else message, field)


def _path(error: Any, body: Any) -> list[str | int]:
    """The error's location without what pydantic adds: "body" and the names of union members."""
    path: list[str | int] = []
    here = body
    location = [part for i, part in enumerate(error["loc"]) if (i, part) != (0, "body")]
    if body is None:
        return location
    tagged = False
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if isinstance(here, dict) and not tagged and part in (here.get("role"), here.get("type")):
            tagged = True  # the union member this object chose, not one of its fields
            continue
        in_mapping = isinstance(here, dict) and part in here
        in_list = isinstance(here, list) and isinstance(part, int) and part < len(here)
        if in_mapping or in_list:
            here, tagged = here[part], False
        elif not (last and error["type"] == "missing"):
            continue
        path.append(part)
    return path
