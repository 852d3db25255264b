"""Whatever a route raises, as an answer in OpenAI's error shape."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from blip2_serve.errors import Blip2ServeError, InvalidRequest, RequestTooLarge
from blip2_serve.http.measure import note_error
from blip2_serve.http.validation import explain
from blip2_serve.observe.metrics import Recorder

logger = logging.getLogger(__name__)


def add_error_handlers(app: FastAPI, recorder: Recorder) -> None:
    """Answers every exception with its JSON body, and counts it."""

    async def answer(_: Request, error: Exception) -> Response:
        known = to_known_error(error)
        note_error(recorder, known)
        headers = known.headers()
        if isinstance(error, HTTPException):
            headers |= error.headers or {}  # such as Allow, of a 405
        return JSONResponse(known.body(), status_code=known.status, headers=headers)

    for kind in (Exception, Blip2ServeError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, answer)


def report_broken_stream(error: Exception, recorder: Recorder) -> Blip2ServeError:
    """What to send the client as the last event of a stream that broke; counts it.

    Logs what is unexpected: once the headers are sent, no error handler sees it.
    """
    known = to_known_error(error)
    if known is not error:
        logger.error("a streamed answer broke", exc_info=error)
    note_error(recorder, known)
    return known


def to_known_error(error: Exception) -> Blip2ServeError:
    """An error with a status, and with a message that is safe to show."""
    if isinstance(error, Blip2ServeError):
        return error
    if isinstance(error, RequestValidationError):
        return explain(error.errors(), error.body)
    if isinstance(error.__cause__, Blip2ServeError):  # FastAPI wraps what reading a body raises
        return error.__cause__
    if isinstance(error, HTTPException):
        kind = RequestTooLarge if error.status_code == 413 else InvalidRequest
        known: Blip2ServeError = kind(str(error.detail))
        known.status = error.status_code
        return known
    return Blip2ServeError("internal error; see the server's log for details")
