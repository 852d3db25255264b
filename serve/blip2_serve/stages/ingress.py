"""HTTP in front of the three stages; the path of one request through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from blip2_serve.concurrency import gather
from blip2_serve.config import AppConfig
from blip2_serve.errors import Unavailable
from blip2_serve.http import deadline, proxy
from blip2_serve.http.admission import Admission
from blip2_serve.http.api import create_app
from blip2_serve.http.images import digest
from blip2_serve.http.refusals import Capacity
from blip2_serve.model.processor import PREPROCESSING_VERSION
from blip2_serve.model.source import DEMO_PICTURE
from blip2_serve.observe import logs, metrics
from blip2_serve.observe.recorder import RayRecorder
from blip2_serve.serve_internals import detached_context
from blip2_serve.stages.calls import StageClient, Work, calls_under_way
from blip2_serve.stages.feature_cache import FeatureCache
from blip2_serve.stages.progress import Progress
from blip2_serve.types import (
    Completion,
    ImageFeatures,
    SamplingParams,
    StageStatus,
    TokenEvent,
)

logger = logging.getLogger(__name__)

WARM_UP_RETRY_S = 1.0
STATUS_WITHIN_S = 5.0


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
        self._recorder = RayRecorder()
        self._preprocessor = StageClient("preprocessor", preprocessor, self._recorder)
        self._encoder = StageClient("encoder", encoder, self._recorder)
        self._generator = StageClient("generator", generator, self._recorder)
        self._features = FeatureCache(
            config.ingress.feature_cache_entries,
            detached_context,
            lambda result: self._recorder.add(metrics.FEATURE_LOOKUPS, result=result),
        )
        # A stage that may scale to zero is not asked: that would keep it from it.
        self._always_there = [
            client
            for client, stage in (
                (self._preprocessor, config.preprocessor),
                (self._encoder, config.encoder),
                (self._generator, config.generator),
            )
            if not stage.may_be_at_zero
        ]
        self._stages = (self._preprocessor, self._encoder, self._generator)
        self._asking: asyncio.Task[Any] | None = None  # the controller
        self._warm = False
        self._warming_up = asyncio.get_running_loop().create_task(self._warm_up())

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self, self._config, self._recorder)
        proxy.install(app.state.door)
        self._admission: Admission = app.state.admission
        return app

    async def stats(self) -> dict[str, Any]:
        """What the requests under way hold in this replica; all 0 when there are none."""
        return {
            **self._admission.stats(),
            "encodings": self._features.under_way,
            "calls": calls_under_way(),
            "suspects": sum(stage.replicas.suspects for stage in self._stages),
        }

    async def features(self, image: bytes, owner: str) -> ImageFeatures:
        """Returns an image's features: kept, being computed for another request, or computed now.

        By their name, which has the owner in it, all later stages keep what they know of it.
        """
        name = digest(image, PREPROCESSING_VERSION, owner)
        features = await self._features.get(name, lambda: self._encode(image, name))
        if self._generator.replicas.serve(features.fingerprint):
            return features
        self._features.forget(name)  # the checkpoint has been replaced
        return await self._features.get(name, lambda: self._encode(image, name))

    def holds(self, image: bytes, owner: str) -> bool:
        """Whether an image's features are kept for this owner, or being computed."""
        return digest(image, PREPROCESSING_VERSION, owner) in self._features

    def capacity(self) -> Capacity:
        """What the stages can do for this ingress replica."""
        stages = [client.replicas for client in self._stages]
        decoded, encoded, answers = [stage.capacity() for stage in stages]
        images = None if decoded is None or encoded is None else 1 / (1 / decoded + 1 / encoded)
        return Capacity(images, answers, any(stage.is_mending for stage in stages))

    def refused(self) -> None:
        """A request could not be admitted; the stages' autoscaling should know."""
        for stage in self._stages:
            stage.refused()

    def ingress_replicas(self) -> int:
        """How many replicas like this one have called the generator lately; 0: nobody knows."""
        return self._generator.replicas.callers

    async def _encode(self, image: bytes, name: str) -> ImageFeatures:
        work = Work(name)
        pixels = await self._preprocessor.call("pixels", image, work=work)
        began = time.perf_counter()
        features: ImageFeatures = await self._encoder.call("encode", pixels, name, work=work)
        return replace(features, encode_s=time.perf_counter() - began)

    async def generate(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion:
        """Returns the whole answers."""
        work = _work(features, prompt, params)
        completion: Completion = await self._generator.call(
            "generate", features, prompt, params, work=work
        )
        return completion

    async def stream(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        """Yields the answers as they come; leaving early cancels the generation."""
        work, progress = _work(features, prompt, params), Progress(params.n)
        events = self._generator.stream(
            "stream", features, prompt, params, resume=progress.begin, work=work
        )
        async with aclosing(events):
            async for event in events:
                yield progress.add(event)

    async def unready(self) -> str | None:
        """Why requests would not be answered now; None: they would be."""
        if not self._warm:
            return "the stages are still loading or warming up"
        answers = await asyncio.gather(*(client.replicas.answer() for client in self._always_there))
        asked = zip(self._always_there, answers, strict=True)
        silent = [client.stage for client, is_there in asked if not is_there]
        return f"no replica answers of: {', '.join(silent)}" if silent else None

    async def status(self) -> list[StageStatus]:
        """The ingress and the stages: replicas as Ray Serve counts them, and what waits in them."""
        deployments = await self._deployments()
        doing = await gather(client.replicas.doing() for client in self._stages)
        found = [_status("ingress", deployments["Ingress"])]
        for client, done in zip(self._stages, doing, strict=True):
            waiting, rate = done or (None, None)
            known = _status(client.stage, deployments[client.stage.capitalize()])
            capacity = client.replicas.capacity()
            capacity = capacity and capacity * client.replicas.callers
            found.append(replace(known, waiting=waiting, rate_per_s=rate, capacity_per_s=capacity))
        return found

    async def _deployments(self) -> dict[str, Any]:
        """What Ray Serve's controller knows of each. One question at a time: it blocks a thread."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(serve.status))
        try:
            async with asyncio.timeout(STATUS_WITHIN_S):
                status = await asyncio.shield(self._asking)
        except TimeoutError:
            raise Unavailable("Ray Serve's controller does not answer; try again later") from None
        application = status.applications[serve.get_replica_context().app_name]
        found: dict[str, Any] = application.deployments
        return found

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
        while not self._warm:
            try:
                features = await self._encode(image, digest(image, PREPROCESSING_VERSION))
                await self.generate(features, "", SamplingParams(max_tokens=2, ignore_eos=True))
                self._warm = True
            except Exception as error:  # the stages may still be starting
                logger.warning("not ready yet: %r", error)
                await asyncio.sleep(WARM_UP_RETRY_S)


def _status(stage: str, deployment: Any) -> StageStatus:
    """The replicas of a deployment, as Ray Serve's status has it."""
    count = dict(deployment.replica_states)
    running, stopping = count.pop("RUNNING", 0), count.pop("STOPPING", 0)
    return StageStatus(stage, running, sum(count.values()), stopping)


def _work(features: ImageFeatures, prompt: str, params: SamplingParams) -> Work:
    # The same content has another seed each time that the client sends none.
    key = f"{features.digest} {hash((prompt, replace(params, seed=0)))}"
    size = float(params.max_tokens or 0) * max(params.n, params.num_beams)
    return Work(key, size, deadline.current(), features.fingerprint)
