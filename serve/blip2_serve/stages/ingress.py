"""HTTP in front of the three stages; the path of one request through them."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from blip2_serve.config import AppConfig
from blip2_serve.errors import Blip2ServeError, Overloaded, Unavailable
from blip2_serve.http.api import create_app
from blip2_serve.http.images import digest
from blip2_serve.model.processor import PREPROCESSING_VERSION
from blip2_serve.model.source import DEMO_PICTURE
from blip2_serve.observe import logs, metrics
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.serve_internals import detached_context
from blip2_serve.types import Completion, ImageFeatures, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)

WARM_UP_RETRY_S = 1.0

Computation = Callable[[], Awaitable[ImageFeatures]]


@serve.deployment
@serve.ingress()
class Ingress:
    """The `Backend` of the routes: prefix (kept, computed once), then the answer."""

    def __init__(
        self,
        config: AppConfig,
        preprocessor: DeploymentHandle[Any],
        encoder: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
    ) -> None:
        logs.configure(config.log_format)
        self._config = config
        # Made once: a handle's method is a new handle each time, and costs as much as a small call.
        self._pixels = _method(preprocessor, "pixels")
        self._encode_pixels = _method(encoder, "encode")
        self._generate = _method(generator, "generate")
        self._stream = _method(generator, "stream", stream=True)
        self._recorder = RayRecorder()
        self._prefixes = FeatureCache(
            config.ingress.feature_cache_entries,
            lambda result: self._recorder.add(metrics.FEATURE_LOOKUPS, result=result),
        )
        if config.ingress.images.allow_urls:
            logger.warning(
                "image URLs are on: any client can make this server fetch https addresses, those "
                "of its own network included"
            )
        self.is_ready = False
        self._warming_up = asyncio.get_running_loop().create_task(self._warm_up())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._config, self._recorder)

    async def features(self, image: bytes) -> ImageFeatures:
        """The image's prefix: from the cache, from an encode under way, or encoded now."""
        name = digest(image, PREPROCESSING_VERSION)
        return await self._prefixes.get(name, lambda: self._encode(image, name))

    async def _encode(self, image: bytes, name: str) -> ImageFeatures:
        with stage_errors():
            pixels = self._pixels.remote(image)
            prefix: ImageFeatures = await self._encode_pixels.remote(pixels, name)
            return prefix

    async def generate(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion:
        with stage_errors():
            completion: Completion = await self._generate.remote(prefix, prompt, params)
            return completion

    async def stream(
        self, prefix: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        with stage_errors():
            events = self._stream.remote(prefix, prompt, params)
            finished = False
            try:
                async for event in events:
                    finished = event.last
                    yield event
            finally:
                if not finished:
                    events.cancel()

    async def metrics_urls(self) -> dict[str, str]:
        """Of each node, where Ray exports its metrics."""
        nodes = await asyncio.to_thread(ray.nodes)
        places = (
            f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in nodes if n["Alive"]
        )
        return {place: f"http://{place}/metrics" for place in places}

    async def _warm_up(self) -> None:
        """Sends one request through every stage, until it succeeds: then the replica is ready."""
        image = DEMO_PICTURE.read_bytes()
        while not self.is_ready:
            try:
                prefix = await self._encode(image, digest(image, PREPROCESSING_VERSION))
                await self.generate(prefix, "", SamplingParams(max_tokens=2, ignore_eos=True))
                self.is_ready = True
            except Exception as error:  # whatever it is, the stages may come up later
                logger.warning("not ready yet: %r", error)
                await asyncio.sleep(WARM_UP_RETRY_S)


def _method(deployment: DeploymentHandle[Any], name: str, *, stream: bool = False) -> Any:
    """The handle of one method. What travels here is plain: it needs no cloudpickle."""
    return deployment.options(
        method_name=name,
        stream=stream,
        request_serialization="pickle",
        response_serialization="pickle",
    )


class FeatureCache:
    """The last used prefixes by digest; a digest asked for twice at once is computed once."""

    def __init__(self, entries: int, count: Callable[[str], None] = lambda _: None) -> None:
        """`count` is told the result of each look: "hit", "joined" or "miss"."""
        self._entries = entries
        self._count = count
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._under_way: dict[str, asyncio.Task[ImageFeatures]] = {}

    async def get(self, name: str, compute: Computation) -> ImageFeatures:
        """The prefix of that name, computed if need be; errors reach everyone who waits."""
        if name in self._kept:
            self._kept.move_to_end(name)
            self._count("hit")
            return self._kept[name]
        task = self._under_way.get(name)
        self._count("joined" if task else "miss")
        if task is None:
            task = asyncio.create_task(self._run(name, compute), context=detached_context())
            task.add_done_callback(_retrieve)
            self._under_way[name] = task
        return await asyncio.shield(task)

    async def _run(self, name: str, compute: Computation) -> ImageFeatures:
        try:
            prefix = await compute()
        finally:
            del self._under_way[name]
        self._kept[name] = prefix
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)
        return prefix


def _retrieve(task: asyncio.Task[ImageFeatures]) -> None:
    """Takes note of a failure, or asyncio would log one whose clients have all left."""
    if not task.cancelled():
        task.exception()


@contextmanager
def stage_errors() -> Iterator[None]:
    """What Ray raises when a stage fails, as this package's errors."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, Blip2ServeError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise Overloaded("too many requests are queued; try again later") from error
    except (RayActorError, DeploymentUnavailableError) as error:
        raise Unavailable("a replica was lost while it worked on this; try again") from error
