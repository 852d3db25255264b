"""All errors that this package raises on purpose.

    Blip2ServeError                 500  server_error
    ├── InvalidRequest              400  invalid_request_error
    │   ├── InvalidImage            400    code invalid_image
    │   └── ContextLengthExceeded   400    code context_length_exceeded
    ├── Unauthorized                401  invalid_request_error, code invalid_api_key
    ├── ModelNotFound               404  invalid_request_error, code model_not_found
    ├── RequestTooLarge             413  invalid_request_error, code request_too_large
    ├── TimedOut                    408  server_error, code timeout
    ├── Overloaded                  429  rate_limit_error, code overloaded
    ├── RateLimited                 429  rate_limit_error, code rate_limit_exceeded
    ├── Quarantined                 500  server_error, code quarantined
    ├── Unavailable                 503  server_error, code unavailable
    │   └── WrongCheckpoint         503
    └── StartupError                 --  the server cannot start; the message says what to do

A class has an HTTP status and OpenAI's error type and code. An instance has a message and, if one
field of the request is at fault, that field's name. Errors can be pickled.
"""

from __future__ import annotations

import copy
import math
from typing import Self


class Blip2ServeError(Exception):
    """Base class of all errors here, and an internal error itself.

    `message` is meant for the client; `param` names the field at fault. After `retry_after_s`
    seconds the client may try again.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    # What clients that repeat failed requests by themselves should do; None: as they like.
    should_retry: bool | None = None
    retry_after_s: float | None = None

    def __init__(
        self, message: str, param: str | None = None, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

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

    def headers(self) -> dict[str, str]:
        """The headers of an error response. OpenAI's clients obey both."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        return headers

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


class Unauthorized(Blip2ServeError):
    """The request needs an API key, and has none or one that is not known."""

    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


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
    should_retry = False


class Overloaded(Blip2ServeError):
    """The server is busy; the same request may succeed later."""

    status = 429
    type = "rate_limit_error"
    code = "overloaded"
    retry_after_s = 1.0


class RateLimited(Blip2ServeError):
    """The caller has used up what its API key may use; the server may be idle."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class Quarantined(Blip2ServeError):
    """Replicas died while they worked on this content, so it is refused."""

    code = "quarantined"
    should_retry = False


class Unavailable(Blip2ServeError):
    """A stage is not there; the same request may succeed later."""

    status = 503
    code = "unavailable"


class WrongCheckpoint(Unavailable):
    """The image features come from another checkpoint than the language model."""


class StartupError(Blip2ServeError):
    """A flag, path, checkpoint or device is wrong. Shown to the operator without a traceback."""
