"""API keys: a file with the hash and the limits of each.

    - name: alice
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      requests_per_minute: 60

A key is random and long, so its plain hash cannot be reversed. The file is read again when it has
changed; while it cannot be read, the keys stay as they were.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from blip2_serve.errors import StartupError
from blip2_serve.http.validation import explain
from blip2_serve.stage_config import FrozenConfig

logger = logging.getLogger(__name__)

PREFIX = "blip2-"  # so that tools which look for leaked secrets can know a key
LOOK_EVERY_S = 1.0

Limit = Annotated[float | None, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class Key(FrozenConfig):
    """What the file has of one key; a limit that is missing is none."""

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None  # of prompts and answers
    max_concurrent: int | None = Field(None, ge=1)  # requests
    priority: int = 0  # the most urgent one that its requests may have


_KEYS = TypeAdapter(tuple[Key, ...])


def hash_of(secret: str) -> str:
    """The hash of a key, as the file has it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def parse(text: str) -> tuple[Key, ...]:
    """The keys in a file's text.

    Raises:
        ValueError: it is not such a file; the message says where, and quotes nothing of it.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError("it is not YAML") from None
    try:
        keys = _KEYS.validate_python(values or ())
    except ValidationError as error:
        raise ValueError(str(explain(error.errors(include_input=False), None))) from None
    for field in ("name", "sha256"):
        if len({getattr(key, field) for key in keys}) < len(keys):
            raise ValueError(f"two keys have the same {field}")
    return keys


def add_key(file: Path, name: str, **limits: float | None) -> str:
    """Makes a key, adds its hash to a file, and returns the key. Only you can read a new file.

    Raises:
        StartupError: the file cannot be read or written, or has a key of that name already.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        text = file.read_text() if file.exists() else ""
        parse(text)
        key = Key.model_validate({"name": name, "sha256": hash_of(secret), **limits})
        entry = yaml.safe_dump([key.model_dump(exclude_defaults=True)], sort_keys=False)
        text = f"{text.rstrip()}\n{entry}" if text.strip() else entry
        parse(text)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            new.write(text)  # beside it: a server never reads half a file
        if file.exists():  # its group may be the server's
            shutil.copymode(file, new.name)
        os.replace(new.name, file)
    except ValidationError as error:
        raise StartupError(str(explain(error.errors(include_input=False), None))) from None
    except (OSError, ValueError) as error:
        raise StartupError(f"cannot add a key to {file}: {error}") from None
    return secret


class KeyFile:
    """The keys of a file, as of now.

    Raises:
        StartupError: the file cannot be read at first, or is wrong.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._looked = clock()
        self._read_at: tuple[int, ...] | None = None  # what `stat` said then
        self._keys: Mapping[bytes, Key] = {}
        try:
            self._read()
        except (OSError, ValueError) as error:
            raise StartupError(f"cannot read the API keys in {file}: {error}") from None

    def find(self, secret: str) -> Key | None:
        """The key with this secret. How long it takes does not depend on the secret."""
        self._look()
        asked, found = hash_of(secret).encode(), None
        for digest, key in self._keys.items():
            if hmac.compare_digest(digest, asked):
                found = key
        return found

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        try:
            self._read()
        except (OSError, ValueError) as error:
            logger.error("the API keys stay as they were: cannot read %s: %s", self._file, error)

    def _read(self) -> None:
        status = os.stat(self._file)
        version = (status.st_mtime_ns, status.st_size, status.st_ino)
        if version == self._read_at:
            return
        self._read_at = version  # also if it is wrong: that is said once
        self._keys = {key.sha256.encode(): key for key in parse(self._file.read_text())}
