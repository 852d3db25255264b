"""All errors that this package raises on purpose.

    Blip2ServeError                 500  server_error
    ├── InvalidRequest              400  invalid_request_error
    │   ├── InvalidImage            400    code invalid_image
    │   └── ContextLengthExceeded   400    code context_length_exceeded
    ├── ModelNotFound               404  invalid_request_error, code model_not_found
    ├── RequestTooLarge             413  invalid_request_error, code request_too_large
    ├── TimedOut                    408  server_error, code timeout
    ├── Unavailable                 503  server_error, code unavailable
    │   └── Overloaded              503  server_error, code overloaded
    └── StartupError                 --  the server cannot start; the message says what to do

A class has an HTTP status and OpenAI's error type and code. An instance has a message and, if one
field of the request is at fault, that field's name. Errors can be pickled.
"""

from __future__ import annotations

import copy
from typing import Self


class Blip2ServeError(Exception):
    """Base class of all errors here, and an internal error itself.

    `message` is meant for the client; `param` names the field at fault.
    """

    status = 500
    type = "server_error"
    code: str | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message

    def about(self, param: str | None) -> Self:
        """A copy of this error that names another field.

        A copy, because several requests may share one error of work that they shared.
        """
        error = copy.copy(self)
        error.param = param
        return error

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of an error response, as OpenAI's API has it."""
        return {"error": self.details()}

    def details(self) -> dict[str, str | None]:
        """What `body` has under "error"."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class InvalidRequest(Blip2ServeError):
    """The client must change the request: a field is unknown, wrong or contradicts another."""

    status = 400
    type = "invalid_request_error"


class InvalidImage(InvalidRequest):
    """The image cannot be fetched or decoded. `kind` says why in one word, for metrics."""

    code = "invalid_image"

    def __init__(self, message: str, param: str | None = None, kind: str = "broken") -> None:
        super().__init__(message, param)
        self.args = (message, param, kind)  # pickle calls the class with these
        self.kind = kind


class ContextLengthExceeded(InvalidRequest):
    """Image and prompt leave no room for an answer in the model's context or the KV slots."""

    code = "context_length_exceeded"


class ModelNotFound(Blip2ServeError):
    """The request names a model other than the served one."""

    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestTooLarge(Blip2ServeError):
    """The request body exceeds the size limit."""

    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class TimedOut(Blip2ServeError):
    """The time that the client or the operator gives a request is over."""

    status = 408
    code = "timeout"


class Unavailable(Blip2ServeError):
    """A stage is not ready or has been lost; the same request may succeed later."""

    status = 503
    code = "unavailable"


class Overloaded(Unavailable):
    """A queue is full; the same request may succeed later."""

    code = "overloaded"


class StartupError(Blip2ServeError):
    """A flag, path, checkpoint or device is wrong. Shown to the operator without a traceback."""
