"""HTTP in front of the three stages; the path of one request through them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
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
from blip2_serve.stages.feature_cache import FeatureCache
from blip2_serve.types import Completion, ImageFeatures, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)

WARM_UP_RETRY_S = 1.0


@serve.ingress()
class Ingress:
    """The `Backend` of the routes: first the image's features, then the answer."""

    def __init__(
        self,
        config: AppConfig,
        preprocessor: DeploymentHandle[Any],
        encoder: DeploymentHandle[Any],
        generator: DeploymentHandle[Any],
    ) -> None:
        logs.configure(config.log_format)
        self._config = config
        # Made once: taking a method of a handle makes a new handle, as costly as a small call.
        self._pixels = _method(preprocessor, "pixels")
        self._encode_pixels = _method(encoder, "encode")
        self._generate = _method(generator, "generate")
        self._stream = _method(generator, "stream", stream=True)
        self._recorder = RayRecorder()
        self._features = FeatureCache(
            config.ingress.feature_cache_entries,
            detached_context,
            lambda result: self._recorder.add(metrics.FEATURE_LOOKUPS, result=result),
        )
        if config.ingress.images.allow_urls:
            logger.warning(
                "image URLs are on: any client can make this server fetch https addresses, "
                "including those of its own network"
            )
        self.is_ready = False
        self._warming_up = asyncio.get_running_loop().create_task(self._warm_up())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self, self._config, self._recorder)

    async def features(self, image: bytes) -> ImageFeatures:
        """Returns an image's features: kept, being computed for someone else, or computed now."""
        name = digest(image, PREPROCESSING_VERSION)
        return await self._features.get(name, lambda: self._encode(image, name))

    async def _encode(self, image: bytes, name: str) -> ImageFeatures:
        with stage_errors():
            # The encoder gets a reference: the pixels do not come through here.
            pixels = self._pixels.remote(image)
            features: ImageFeatures = await self._encode_pixels.remote(pixels, name)
            return features

    async def generate(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion:
        """Returns the whole answers."""
        with stage_errors():
            response = self._generate.remote(features, prompt, params)
            try:
                completion: Completion = await response
            except asyncio.CancelledError:
                response.cancel()  # Ray Serve would, if the client had left: not at a deadline
                raise
            return completion

    async def stream(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        """Yields the answers as they come; leaving early cancels the generation."""
        with stage_errors():
            events = self._stream.remote(features, prompt, params)
            finished = False
            try:
                async for event in events:
                    finished = event.last
                    yield event
            finally:
                if not finished:
                    events.cancel()

    async def metrics_urls(self) -> dict[str, str]:
        """Returns the URL of Ray's metrics exporter on each node, by its address and port."""
        nodes = await asyncio.to_thread(ray.nodes)
        places = (
            f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in nodes if n["Alive"]
        )
        return {place: f"http://{place}/metrics" for place in places}

    async def _warm_up(self) -> None:
        """Sends a request through every stage until one succeeds; then the replica is ready."""
        image = DEMO_PICTURE.read_bytes()
        while not self.is_ready:
            try:
                features = await self._encode(image, digest(image, PREPROCESSING_VERSION))
                await self.generate(features, "", SamplingParams(max_tokens=2, ignore_eos=True))
                self.is_ready = True
            except Exception as error:  # the stages may still be starting
                logger.warning("not ready yet: %r", error)
                await asyncio.sleep(WARM_UP_RETRY_S)


def _method(deployment: DeploymentHandle[Any], name: str, *, stream: bool = False) -> Any:
    """The handle of one method. All arguments and results are plain: pickle is enough."""
    return deployment.options(
        method_name=name,
        stream=stream,
        request_serialization="pickle",
        response_serialization="pickle",
    )


@contextmanager
def stage_errors() -> Iterator[None]:
    """Turns what Ray raises when a stage fails into this package's errors."""
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
