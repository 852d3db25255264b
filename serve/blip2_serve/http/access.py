"""Who may use the server, and how much: decided before anything of a request is read or counted.

Without a file of keys, everybody may. With one, every route asks for a key but those that probes
use, and the page for people, which asks for it. A route is known by the path that the router will
see, never by the Host or the raw URL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from blip2_serve.errors import RateLimited, Unauthorized
from blip2_serve.http.addresses import client_of
from blip2_serve.http.keys import Key, KeyFile
from blip2_serve.http.page import FILES as PAGE_FILES
from blip2_serve.ingress_config import AccessConfig

OPEN = ("/health", "/ready", "/")
METRICS = "/metrics"
MINUTE_S = 60.0


class Access:
    """The callers of one ingress replica.

    Args:
        config: Where the keys are.
        replicas: How many ingress replicas share the limits of a key.
        clock: Returns seconds.

    Raises:
        StartupError: the keys cannot be read.
    """

    def __init__(
        self,
        config: AccessConfig,
        replicas: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = KeyFile(Path(config.keys_file), clock) if config.keys_file else None
        self._open = (*OPEN, METRICS) if config.metrics_open else OPEN
        self._by_address = config.share_by_address
        self._trusted = config.trusted_proxies
        self._replicas = replicas
        self._clock = clock
        self._callers: dict[str, Caller] = {}  # by name: what they used outlives a changed file

    def caller(self, scope: Scope) -> Caller | None:
        """Whose request it is; None: anybody's.

        Raises:
            Unauthorized: it needs a key, and has none or another one.
        """
        if self._keys is None or self._is_open(scope):
            return None
        sent = Headers(scope=scope).getlist("authorization")
        scheme, _, secret = (sent[0] if len(sent) == 1 else "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthorized(
                'this server asks for an API key: send the header "Authorization: Bearer KEY"'
            )
        key = self._keys.find(secret.strip())
        if key is None:
            raise Unauthorized("the API key is not known to this server")
        caller = self._callers.setdefault(key.name, Caller(key.name, self._clock))
        caller.obey(key, max(1, self._replicas()))
        return caller

    def _is_open(self, scope: Scope) -> bool:
        path = _path(scope)
        return path in self._open or path.startswith(f"{PAGE_FILES}/") or _is_preflight(scope)

    def tenant(self, scope: Scope, caller: Caller | None) -> str:
        """With whom the request shares what it gets of a busy server."""
        if caller:
            return caller.name
        return client_of(scope, self._trusted) if self._by_address else ""


class Caller:
    """What the owner of a key is using, and may use, of one ingress replica."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.name = name
        self._requests = _Bucket(clock)
        self._tokens = _Bucket(clock)
        self.priority = 0  # the most urgent one that its requests may have
        self._running = 0
        self._most: float | None = None

    def obey(self, key: Key, replicas: int) -> None:
        """Takes over the limits of the key, of which each replica grants its share."""
        self._requests.limit(key.requests_per_minute, replicas)
        self._tokens.limit(key.tokens_per_minute, replicas)
        self.priority = key.priority
        self._most = key.max_concurrent and max(1.0, key.max_concurrent / replicas)

    def check(self) -> None:
        """
        Raises:
            RateLimited: one more request would be too many.
        """
        if self._most is not None and self._running + 1 > self._most:
            raise RateLimited("this API key has too many requests under way", retry_after_s=1.0)
        for bucket, what in ((self._tokens, "tokens"), (self._requests, "requests")):
            if wait_s := bucket.wait_s():
                raise RateLimited(
                    f"this API key has used up its {what} per minute", retry_after_s=wait_s
                )

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts one request, which runs as long as the context."""
        self._requests.take(1)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def used(self, tokens: int) -> None:
        """Charges the tokens of an answered request."""
        self._tokens.take(tokens)


class _Bucket:
    """An amount per minute, of which a minute's worth can be saved up and one overdrawn."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._per_minute: float | None = None  # no limit
        self._spent = 0.0
        self._at = clock()

    def limit(self, per_minute: float | None, replicas: int) -> None:
        self._settle()
        self._per_minute = per_minute and per_minute / replicas

    def wait_s(self) -> float:
        """Seconds until there is one left; 0: there is."""
        self._settle()
        if self._per_minute is None:
            return 0.0
        missing = self._spent + 1 - max(1.0, self._per_minute)
        return max(0.0, missing / self._per_minute * MINUTE_S)

    def take(self, amount: float) -> None:
        self._settle()
        self._spent += amount

    def _settle(self) -> None:
        now = self._clock()
        if self._per_minute is None:
            self._spent = 0.0
        else:
            back = (now - self._at) / MINUTE_S * self._per_minute
            self._spent = max(0.0, self._spent - back)
        self._at = now


def _path(scope: Scope) -> str:
    """The path as the router sees it: without where the application is mounted."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root) else path


def _is_preflight(scope: Scope) -> bool:
    """A browser's question before a request from another origin, which comes without the key."""
    asks = Headers(scope=scope).get("access-control-request-method")
    return scope["method"] == "OPTIONS" and asks is not None
