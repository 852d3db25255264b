"""How to generate: the fields that all routes have, and what they mean.

Descriptions appear on /docs and in the documentation, so each stands alone.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.presets import PRESETS, Preset
from blip2_serve.http.validation import Strict
from blip2_serve.types import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_CHOICES = 16
MAX_BEAMS = 8
MAX_BIASES = 1024

_INT32 = 1 << 31
_INT64 = 1 << 63

# The temperature of a request that asks for samples but names none, as at OpenAI.
SAMPLING_TEMPERATURE = 1.0

# Fields that go into SamplingParams as they are.
_PASSED_ON = {
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "ignore_eos",
    "n",
    "num_beams",
    "length_penalty",
    "early_stopping",
}

StopString = Annotated[str, StringConstraints(max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class GenerationFields(Strict):
    """How to generate: the fields of all routes, in JSON and multipart bodies alike."""

    # Whether a request without a temperature can ask for samples.
    samples_by_default: ClassVar[bool] = True

    model: str | None = Field(
        None,
        description="Name of the served model, as listed by `/v1/models`: `NAME`, or "
        "`NAME:caption` or `NAME:vqa` for a preset. May be left out; any other name is an error.",
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Maximum number of tokens to generate, cut to what the prompt leaves of the "
        "model's context and of the KV cache. Defaults to the server's limit.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="OpenAI's newer name for `max_tokens`. Send only one of the two."
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        description="Minimum number of tokens to generate: before that, neither the "
        "end-of-sequence token nor a `stop` string ends the answer. Must not exceed `max_tokens`.",
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Sampling temperature, 0 to 2. Higher values make answers more random; 0 "
        "always takes the likeliest token. Defaults to 0, or to 1 where the request asks for "
        "samples otherwise: see the rules below.",
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Samples only from the likeliest tokens whose probabilities add up to "
        "`top_p`. 1 keeps every token, 0 only the likeliest. No effect at `temperature` 0.",
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="Samples only from the `top_k` likeliest tokens. 0 and -1 keep every token. "
        "No effect at `temperature` 0.",
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Samples only from tokens at least `min_p` times as likely as the likeliest "
        "one. 0 keeps every token. No effect at `temperature` 0; does not ask for samples by "
        "itself.",
    )
    seed: int | None = Field(
        None,
        ge=-_INT64,
        lt=_INT64,
        description="Seed for sampling, a signed 64-bit integer. The same request with the same "
        "seed gets the same answer, whatever else the server is doing.",
    )
    stop: StopString | list[StopString] | None = Field(
        None,
        description=f"Ends the answer before the first of these strings. Up to {MAX_STOP_STRINGS} "
        f"strings of up to {MAX_STOP_LENGTH} characters; empty ones are left out.",
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Lowers the logit of a token by this much for each time it occurs in the "
        "answer so far, -2 to 2. Negative values raise it.",
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Lowers the logits of tokens that occur in the answer so far by this much, "
        "-2 to 2. Negative values raise them.",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=10,
        description="Makes tokens that occur in the prompt or the answer so far less likely if "
        "above 1, more likely if below 1. Same as in transformers; 0.01 to 10.",
    )
    logit_bias: dict[TokenId, Bias] | None = Field(
        None,
        max_length=MAX_BIASES,
        description="Adds to the logits of tokens, before the temperature: an object of token "
        f"ids, as strings, with numbers from -100 to 100; up to {MAX_BIASES}.",
    )
    ignore_eos: bool | None = Field(
        None,
        description="Whether to generate past the end-of-sequence token, up to `max_tokens`.",
    )
    return_token_ids: bool | None = Field(
        None,
        description="Whether to return the ids of the generated tokens as `token_ids`, next to "
        "the text.",
    )
    n: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description=f"Number of answers, 1 to {MAX_CHOICES}: the best of `num_beams` in a beam "
        "search, which must have at least `n`; samples if `temperature` is above 0; otherwise "
        "equal answers, computed once.",
    )
    best_of: int | None = Field(
        None, ge=1, description="Number of answers to choose from. Must be equal to `n`."
    )
    num_beams: int | None = Field(
        None,
        ge=1,
        le=MAX_BEAMS,
        description=f"Number of beams for beam search, 1 to {MAX_BEAMS}. 1 means no beam search. "
        "More than 1 needs `temperature` 0.",
    )
    length_penalty: float | None = Field(
        None,
        ge=-10,
        le=10,
        description="Exponent of the length by which beam search divides the score of an answer, "
        "-10 to 10. Higher values lead to longer answers. Needs `num_beams` above 1.",
    )
    early_stopping: bool | Literal["never"] | None = Field(
        None,
        description="When beam search ends, as in transformers: with `true` once there are "
        "`num_beams` finished answers, with `false` once better ones are unlikely, with "
        '`"never"` once better ones are impossible. Needs `num_beams` above 1.',
    )
    priority: int | None = Field(
        None,
        ge=-_INT32,
        lt=_INT32,
        description="Requests of a lower number go first while the server is busy, as in vLLM. "
        "Defaults to 0; a lower one needs an API key that allows it. One above 0 is refused "
        "earlier.",
    )
    preset: Preset | None = Field(
        None,
        description="Settings of LAVIS, BLIP-2's reference code. `caption`: 5 beams, 8 to 30 "
        "tokens and, without a prompt or a question, the prompt `a photo of`. `vqa`: 5 beams, 1 to "
        "10 tokens, length penalty 0 and, in a chat, a prompt that asks for a short answer. Other "
        "fields of the request override the preset's.",
    )

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed")
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> GenerationFields:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens differ; send only one of them",
                "max_completion_tokens",
            )
        return self

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_tokens is not None else self.max_completion_tokens

    @property
    def limit_name(self) -> str:
        """The field that `token_limit` comes from."""
        only_newer = self.max_tokens is None and self.max_completion_tokens is not None
        return "max_completion_tokens" if only_newer else "max_tokens"

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens to list at each place; None: no log-probabilities."""
        return None

    def sampling_params(self) -> SamplingParams:
        """The preset's parameters, or the defaults, with the request's own fields on top.

        Draws a seed if the request has none.

        Raises:
            InvalidRequest: the parameters contradict each other.
        """
        preset = PRESETS[self.preset] if self.preset else SamplingParams()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        params = replace(
            preset,
            max_tokens=self.token_limit or preset.max_tokens,
            top_k=max(self.top_k or 0, 0),
            seed=secrets.randbelow(_INT64) if self.seed is None else self.seed,
            stop=tuple(filter(None, stops)),
            logit_bias=tuple((self.logit_bias or {}).items()),
            top_logprobs=self.logprobs_wanted,
            **self.model_dump(include=_PASSED_ON, exclude_none=True),
        )
        if self.min_tokens is None and params.max_tokens is not None:
            # A limit below the preset's minimum lowers the minimum.
            params = replace(params, min_tokens=min(params.min_tokens, params.max_tokens))
        if self._asks_for_samples(params):
            params = replace(params, temperature=SAMPLING_TEMPERATURE)
        self._check(params)
        if params.temperature == 0 or params.top_p == 0:  # nothing is drawn
            params = replace(params, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0)
        return params

    def _asks_for_samples(self, params: SamplingParams) -> bool:
        """Whether a request without a temperature is to be sampled, as at OpenAI."""
        free = self.temperature is None and self.preset is None and params.num_beams == 1
        narrowing = params.top_p < 1 or params.top_k > 0 or params.n > 1
        return self.samples_by_default and free and narrowing

    def _check(self, params: SamplingParams) -> None:
        sampled, beams = params.temperature > 0, params.num_beams > 1
        if params.min_p > 0 and not sampled and self.temperature is None:
            raise InvalidRequest("min_p needs a temperature; without one nothing is drawn", "min_p")
        if sampled and beams:
            raise InvalidRequest(
                "temperature must be 0 with num_beams > 1; beam search does not sample",
                "temperature",
            )
        if beams and params.n > params.num_beams:
            raise InvalidRequest(f"n must not exceed num_beams ({params.num_beams})", "n")
        if self.best_of not in (None, params.n):
            raise InvalidRequest(
                f"best_of must be equal to n ({params.n}): every answer is returned", "best_of"
            )
        if not beams and (self.early_stopping or self.length_penalty not in (None, 1)):
            name = "early_stopping" if self.early_stopping else "length_penalty"
            raise InvalidRequest(f"{name} needs num_beams > 1", name)
        if params.max_tokens is not None and params.min_tokens > params.max_tokens:
            raise InvalidRequest(
                f"min_tokens must not exceed {self.limit_name} ({params.max_tokens})", "min_tokens"
            )
