"""The configuration of the ingress: images, chat, admission. See `config.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, IPvAnyNetwork

from blip2_serve.stage_config import (
    HOW_IT_SCALES,
    FrozenConfig,
    InitialOngoingRequests,
    ScalingConfig,
    StageConfig,
)

# A web page's origin as browsers send it: without a path, and without a slash at its end.
Origin = Annotated[str, Field(pattern=r"^(\*|null|[a-z][a-z0-9+.-]*://[^/?#\s*]+)$")]

# A host in lower case, or all below one. IPv6 addresses are written without brackets.
HostPattern = Annotated[str, Field(pattern=r"^(\*\.)?[a-z0-9_:.-]*[a-z0-9]$")]


class ImageLimits(FrozenConfig):
    """Images that clients may send."""

    max_bytes: int = Field(20 << 20, ge=1, description="Largest size of an image file, in bytes.")
    allow_urls: bool = Field(
        False,
        description="Fetch images from https URLs that clients send, if they lead to public "
        "addresses.",
    )
    allow_http: bool = Field(False, description="Fetch images from http URLs as well.")
    allowed_hosts: tuple[HostPattern, ...] = Field(
        (),
        description="Hosts that images are fetched from, such as `images.example.com`, or "
        "`*.example.com` for all below one. Empty: from any host.",
    )
    denied_hosts: tuple[HostPattern, ...] = Field(
        (), description="Hosts that no image is fetched from, whether allowed or not."
    )
    url_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Seconds that fetching an image may take, including the wait for other "
        "downloads.",
    )
    max_downloads: int = Field(
        64, ge=1, description="Images that one ingress replica may download at once."
    )


# What evaluation tools put after a question, for models that answer in sentences.
VQA_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer the question with a single word or phrase.",
    "Answer the question using a single word.",
    "Answer the question with a single word.",
    "Answer the question with a short phrase.",
    "Answer the question with yes or no.",
    "Answer the question briefly.",
    "Answer using a single word or phrase.",
    "Answer with a single word or phrase.",
    "Answer in a single word or phrase.",
    "Answer with a single word.",
    "Answer in one word.",
    "Answer with yes or no.",
    "Answer yes or no.",
    "Answer briefly.",
    "Give a short answer.",
    "Directly provide a short answer to the question.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
    "Short answer:",
    "Answer:",
)


class ChatConfig(FrozenConfig):
    """How chat turns become a prompt: `str.format` templates, by default those of LAVIS."""

    answered: str = Field(
        "Question: {question} Answer: {answer}. ",
        description="Template of an earlier turn: a {question} and its {answer}.",
    )
    asked: str = Field(
        "Question: {question} Answer:", description="Template of the last {question}."
    )
    asked_short: str = Field(
        "Question: {question} Short answer:",
        description='Template of the last {question} in a request with preset "vqa".',
    )
    captioned: str = Field(
        "{answer}. ",
        description="Template of an earlier turn without a question: an image and its {answer}.",
    )
    preamble: str = Field(
        "{text} ",
        description="Template of the {text} of a system or developer message, which comes first.",
    )
    vqa_instructions: tuple[str, ...] = Field(
        VQA_INSTRUCTIONS,
        description="Instructions that are dropped from the end of a question to NAME:vqa.",
    )


class AdmissionConfig(FrozenConfig):
    """Which requests an ingress replica takes on, and which it refuses with status 429."""

    max_wait_s: float = Field(
        2.0,
        gt=0,
        description="Seconds within which the work that was admitted before a request must be done "
        "for the request to be admitted, by what the stages can do.",
    )
    min_requests: int = Field(
        8, ge=1, description="Requests under way below which every further one is admitted."
    )
    initial_requests: int = Field(
        32,
        ge=1,
        description="Most requests under way while nobody knows what the stages can do: at the "
        "start, or while a stage has no replica. While a lost replica is replaced, every request "
        "below this number is admitted.",
    )
    max_held_bytes: int = Field(
        512 << 20,
        ge=1,
        description="Most bytes that the bodies of all requests under way may have.",
    )
    max_total_tokens: int = Field(
        32768,
        ge=1,
        description="Most tokens that one request may ask for: n or num_beams, times max_tokens.",
    )
    body_timeout_s: float = Field(
        30.0, gt=0, description="Seconds within which a request's body must arrive."
    )
    max_slow_bodies: int = Field(
        1024,
        ge=0,
        description="Most requests whose bodies are still arriving after a quarter of a second; "
        "further ones are refused. They do not count as requests under way.",
    )


class AccessConfig(FrozenConfig):
    """Who may use the server: by default, everybody who reaches it."""

    keys_file: str | None = Field(
        None,
        description="File of API keys, on each node that runs the ingress. With it, every route "
        "but `/health` and `/ready` asks for one.",
    )
    metrics_open: bool = Field(False, description="Do not ask for a key for `/metrics`.")
    share_by_address: bool = Field(
        False,
        description="Without keys: while the server is busy, clients of different addresses get "
        "equal shares, as the owners of different keys do.",
    )
    trusted_proxies: tuple[IPvAnyNetwork, ...] = Field(
        (),
        description="Networks of the proxies in front whose `X-Forwarded-For` tells the client's "
        "address, such as `10.0.0.0/8`.",
    )


class IngressScaling(ScalingConfig):
    """The ingress does not measure its capacity, so its ongoing requests decide."""

    initial_ongoing_requests: InitialOngoingRequests = 64.0


class IngressConfig(StageConfig):
    """The stage that speaks HTTP."""

    max_ongoing_requests: int = Field(
        4096,
        ge=1,
        description="Connections with a request that one replica may have at once. Far more than "
        "`admission` lets in: a request that is refused is one of them until it is answered.",
    )
    scaling: IngressScaling = Field(IngressScaling(), description=HOW_IT_SCALES)
    images: ImageLimits = Field(ImageLimits(), description=ImageLimits.__doc__)
    chat: ChatConfig = Field(ChatConfig(), description=ChatConfig.__doc__)
    max_body_bytes: int = Field(
        64 << 20, ge=1, description="Largest size of a request's body, in bytes."
    )
    admission: AdmissionConfig = Field(AdmissionConfig(), description=AdmissionConfig.__doc__)
    access: AccessConfig = Field(AccessConfig(), description=AccessConfig.__doc__)
    cors_origins: tuple[Origin, ...] = Field(
        (),
        description="Origins whose web pages may call the server from a browser, such as "
        '"https://app.example.com"; "*" is any. Default: none.',
    )
    feature_cache_entries: int = Field(
        512,
        ge=0,
        description="Images whose features one replica caches; 0: none, but requests for the same "
        "image at the same time still share its encoding.",
    )
