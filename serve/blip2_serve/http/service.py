"""What every route shares: the backend behind it and one way to call the model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from blip2_serve.config import AppConfig
from blip2_serve.errors import InvalidRequest, ModelNotFound
from blip2_serve.http import deadline, gate
from blip2_serve.http.admission import Admission
from blip2_serve.http.images import ImageReader
from blip2_serve.http.measure import StreamTimer, note_admitted, note_encoded
from blip2_serve.http.presets import Preset, names_of, within
from blip2_serve.http.refusals import Capacity
from blip2_serve.http.schema_generation import GenerationFields
from blip2_serve.http.stream import TokenStream
from blip2_serve.observe import metrics
from blip2_serve.observe.metrics import Recorder
from blip2_serve.types import (
    Completion,
    ImageFeatures,
    SamplingParams,
    StageStatus,
    TokenEvent,
)


class Backend(Protocol):
    """Computes the answers. Every failure it foresees is a `Blip2ServeError`."""

    async def unready(self) -> str | None:
        """Why requests would not be answered now; None: they would be."""

    async def status(self) -> list[StageStatus]:
        """What the ingress and each stage are doing now, in the order of a request's way.

        Raises:
            Unavailable: nobody knows at the moment.
        """

    def capacity(self) -> Capacity:
        """What the stages can do for this ingress replica."""

    def holds(self, image: bytes, owner: str) -> bool:
        """Whether the features of an image file are there, or on their way."""

    def refused(self) -> None:
        """Takes note of a request that was not admitted."""

    def ingress_replicas(self) -> int:
        """How many replicas like this one take requests; 0 while nobody knows."""

    async def features(self, image: bytes, owner: str) -> ImageFeatures:
        """The features of an image file in any accepted format, computed for this owner of a key.

        What is kept for one owner, another one must not notice by how fast it comes.

        Raises:
            InvalidImage: the file cannot be decoded.
        """

    async def generate(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> Completion:
        """The whole answer, all `params.n` choices of it."""

    def stream(
        self, features: ImageFeatures, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[TokenEvent, None]:
        """The answer token by token. Closing the generator stops the work."""

    async def metrics_urls(self) -> dict[str, str]:
        """The URL of each node's own metrics page, by the node's name."""


@dataclass(frozen=True)
class ModelCall:
    """What every route reduces its request to.

    `names` maps "image", "prompt" and "max_tokens" to the names of the request's own fields, where
    they differ, so that an error names a field that the client knows.
    """

    image: bytes
    prompt: str
    params: SamplingParams
    names: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0


@dataclass(frozen=True)
class Asked:
    """What a request asks of the model by its fields `model` and `preset` and its parameters.

    `alias` says that the preset is part of the model's name: the client expects its prompt, too.
    """

    model: str
    preset: Preset | None
    alias: bool
    params: SamplingParams
    priority: int


class Service:
    """The backend, the configuration and the image reader of one ingress replica."""

    def __init__(self, backend: Backend, config: AppConfig, recorder: Recorder) -> None:
        self.backend = backend
        self.config = config
        self.recorder = recorder
        self.images = ImageReader(config.ingress.images)
        self.names = names_of(config.model_name)
        self.admission = Admission(
            config.ingress.admission, backend.capacity, recorder, backend.refused
        )

    def check_model(self, name: str | None) -> None:
        """Accepts the served model's names, and None for a request that names no model.

        Raises:
            ModelNotFound: `name` is another model.
        """
        if name is not None and name not in self.names:
            raise ModelNotFound(
                f"model {name!r} does not exist on this server; use {self.config.model_name!r}",
                "model",
            )

    def asked(self, request: GenerationFields) -> Asked:
        """The model's name, the preset and the parameters of a request.

        Under an alias, `max_tokens` only lowers the preset's limit, and a `temperature` above 0
        samples instead of searching with beams: its clients send both without knowing the preset.

        Raises:
            ModelNotFound: the request names another model.
            InvalidRequest: the parameters contradict each other or the alias.
        """
        self.check_model(request.model)
        name = request.model or self.config.model_name
        preset = self.names[name]
        if preset is None:
            params = self._within_limits(request.sampling_params(), request)
            return Asked(name, request.preset, False, params, request.priority or 0)
        if request.preset not in (None, preset):
            raise InvalidRequest(f"preset contradicts model {name!r}; leave it out", "preset")
        implied: dict[str, Any] = {"preset": preset}
        if request.temperature and request.num_beams is None:
            implied["num_beams"] = 1
        params = within(request.model_copy(update=implied).sampling_params(), preset)
        params = self._within_limits(params, request)
        return Asked(name, preset, True, params, request.priority or 0)

    def _within_limits(self, params: SamplingParams, request: GenerationFields) -> SamplingParams:
        limit = self.config.ingress.admission.max_total_tokens
        most = params.max_tokens or self.config.generator.default_max_tokens
        answers = max(params.n, params.num_beams)
        if answers > 1 and answers * most > limit:
            raise InvalidRequest(
                f"{answers} answers or beams of {most} tokens are too many: a request may ask for "
                f"{limit} tokens",
                request.limit_name,
            )
        return params

    def plan(self, params: SamplingParams, images: int, priority: int) -> None:
        """Settles whether the request is admitted, before any stage is called for it.

        `images`: how many have to be encoded, with an answer about each; 0 asks for one answer
        about an image whose features are held. A request that is not planned is by its first call.

        Raises:
            Overloaded: the server is too busy.
        """
        if ticket := gate.ticket():
            answers = self.admission.answers(params, self.config.generator.default_max_tokens)
            caller = gate.caller()
            priority = max(priority, caller.priority if caller else 0)
            ticket.plan(images, max(1, images) * answers, deadline.time_left(), priority)
            self.recorder.add(metrics.ADMITTED)

    async def complete(self, call: ModelCall) -> Completion:
        """Computes a whole answer.

        Raises:
            Blip2ServeError: an InvalidRequest names its field as `call.names` has it.
        """
        with _naming_fields(call):
            features = await self._features(call)
            params, copies = _computed(call.params)
            completion = await self.backend.generate(features, call.prompt, params)
            tokens = completion.completion_tokens
            self._answered(tokens, params.n)
            _charge(completion.prompt_tokens + tokens)
            return replace(completion, choices=completion.choices * copies)

    async def stream(self, call: ModelCall) -> TokenStream:
        """Starts an answer and waits for its first token. The caller closes the stream.

        Raises:
            Blip2ServeError: as for `complete`, for all that fails before the first token.
        """
        with _naming_fields(call):
            features = await self._features(call)
            params, copies = _computed(call.params)
            events = self._learning(self.backend.stream(features, call.prompt, params), params.n)
            if copies > 1:
                events = _copied(events, copies)
            return await TokenStream.start(events, StreamTimer(self.recorder))

    async def _learning(
        self, events: AsyncGenerator[TokenEvent, None], answers: int
    ) -> AsyncGenerator[TokenEvent, None]:
        prompt = tokens = 0
        try:
            async with aclosing(events):
                async for event in events:
                    prompt, tokens = event.prompt_tokens, tokens + len(event.token_ids)
                    yield event
            self._answered(tokens, answers)
        finally:  # also those that nobody waited for
            _charge(prompt + tokens)

    def _answered(self, tokens: int, answers: int) -> None:
        if ticket := gate.ticket():
            ticket.answered(tokens, answers)

    async def _features(self, call: ModelCall) -> ImageFeatures:
        ticket, caller = gate.ticket(), gate.caller()
        owner = caller.name if caller else ""
        if ticket and not ticket.planned:
            images = 0 if self.backend.holds(call.image, owner) else 1
            self.plan(call.params, images, call.priority)
        if ticket:
            await ticket.turn()
        note_admitted()
        try:
            features = await self.backend.features(call.image, owner)
        except InvalidRequest as error:
            raise error.about("image") from error  # the stages know no field names
        note_encoded(features.encode_s)
        if ticket:
            ticket.encoded()
        return features


def _charge(tokens: int) -> None:
    """Charges the owner of the request's API key, if it has one."""
    if caller := gate.caller():
        caller.used(tokens)


def _computed(params: SamplingParams) -> tuple[SamplingParams, int]:
    """What to compute, and how many copies of it are the answers."""
    return (replace(params, n=1), params.n) if params.is_greedy else (params, 1)


async def _copied(
    events: AsyncGenerator[TokenEvent, None], count: int
) -> AsyncGenerator[TokenEvent, None]:
    """The events of `count` equal answers, of one answer's events."""
    async with aclosing(events):
        async for event in events:
            for index in range(count):
                yield replace(event, index=index, last=event.last and index == count - 1)


@contextmanager
def _naming_fields(call: ModelCall) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        raise error.about(call.names.get(error.param or "", error.param)) from error
