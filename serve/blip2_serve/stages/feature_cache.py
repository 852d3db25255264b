"""The ingress's cache of image features. Needs no Ray."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable

from blip2_serve.types import ImageFeatures


class FeatureCache:
    """Keeps the most recently used image features and computes an image only once at a time.

    Args:
        entries: how many images' features to keep; 0 keeps none.
        new_context: makes the context that a computation runs in. It must not be the context of
            the request that starts it: others may wait for the same result after it has left.
        on_lookup: called with the result of each lookup: "hit", "joined" (a computation under way)
            or "miss".
    """

    def __init__(
        self,
        entries: int,
        new_context: Callable[[], contextvars.Context] = contextvars.Context,
        on_lookup: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._entries = entries
        self._new_context = new_context
        self._on_lookup = on_lookup
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._under_way: dict[str, asyncio.Task[ImageFeatures]] = {}
        self._waiting: Counter[asyncio.Task[ImageFeatures]] = Counter()  # callers

    async def get(
        self, digest: str, compute: Callable[[], Awaitable[ImageFeatures]]
    ) -> ImageFeatures:
        """Returns the features of an image, computing them if need be.

        A computation is cancelled when the last caller that waits for it is. What it raises
        reaches every caller that waits for it, and is not kept.
        """
        if digest in self._kept:
            self._kept.move_to_end(digest)
            self._on_lookup("hit")
            return self._kept[digest]
        task = self._under_way.get(digest)
        self._on_lookup("joined" if task else "miss")
        if task is None:
            task = asyncio.create_task(self._run(digest, compute), context=self._new_context())
            task.add_done_callback(_retrieve)
            self._under_way[digest] = task
        self._waiting[task] += 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting[task] -= 1
            if not self._waiting[task]:
                del self._waiting[task]
                if not task.done():
                    self._under_way.pop(digest, None)
                    task.cancel()

    def __contains__(self, digest: str) -> bool:
        """Whether an image's features are kept, or being computed."""
        return digest in self._kept or digest in self._under_way

    @property
    def under_way(self) -> int:
        """How many images are being computed."""
        return len(self._under_way)

    def forget(self, digest: str) -> None:
        """Drops an image's features, if they are kept."""
        self._kept.pop(digest, None)

    async def _run(
        self, digest: str, compute: Callable[[], Awaitable[ImageFeatures]]
    ) -> ImageFeatures:
        try:
            features = await compute()
        finally:
            if self._under_way.get(digest) is asyncio.current_task():
                del self._under_way[digest]
        self._kept[digest] = features
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)
        return features


def _retrieve(task: asyncio.Task[ImageFeatures]) -> None:
    """Retrieves a failure, so that asyncio does not log one whose callers have all left."""
    if not task.cancelled():
        task.exception()
