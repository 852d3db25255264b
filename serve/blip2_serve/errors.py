"""Every error this package raises on purpose.

    Blip2ServeError                 500  server_error
    ├── InvalidRequest              400  invalid_request_error
    │   ├── InvalidImage            400    code invalid_image
    │   └── ContextLengthExceeded   400    code context_length_exceeded
    ├── ModelNotFound               404  invalid_request_error, code model_not_found
    ├── RequestTooLarge             413  invalid_request_error, code request_too_large
    ├── Unavailable                 503  server_error, code unavailable
    │   └── Overloaded              503  server_error, code overloaded
    └── StartupError                 --  the server cannot start; the message says what to do

A class knows its HTTP status and its OpenAI error type and code; an instance knows its message and,
where one field of the request is at fault, that field's name. All of them survive pickling.
"""

from __future__ import annotations

import copy
from typing import Self


class Blip2ServeError(Exception):
    """Base of all: `message` is written for the client, `param` names the field at fault."""

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
        """The same error of another field.

        A copy: several requests may have been given the one error of the work that they shared.
        """
        error = copy.copy(self)
        error.param = param
        return error

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of an OpenAI error answer."""
        return {"error": self.details()}

    def details(self) -> dict[str, str | None]:
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class InvalidRequest(Blip2ServeError):
    status = 400
    type = "invalid_request_error"


class InvalidImage(InvalidRequest):
    """`kind` is for metrics: what is wrong with the image, in a word."""

    code = "invalid_image"

    def __init__(self, message: str, param: str | None = None, kind: str = "broken") -> None:
        super().__init__(message, param)
        self.args = (message, param, kind)  # what pickle calls the class with
        self.kind = kind


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class ModelNotFound(Blip2ServeError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class RequestTooLarge(Blip2ServeError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class Unavailable(Blip2ServeError):
    status = 503
    code = "unavailable"


class Overloaded(Unavailable):
    code = "overloaded"


class StartupError(Blip2ServeError):
    """Wrong flag, path, checkpoint or device: one line for the operator, no traceback."""
