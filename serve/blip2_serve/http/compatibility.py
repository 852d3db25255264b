"""OpenAI's parameters that have no effect here, on every route.

A parameter that cannot change a text answer is accepted at every value that OpenAI accepts. One
that can is accepted only where it asks for nothing, and otherwise refused with the reason.
Parameters that are names of OpenAI's enumerations are any string: OpenAI adds values every year.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError

from blip2_serve.http.validation import Strict


def because(reason: str) -> WrapValidator:
    """Answers every value that a field refuses with the same reason."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("refused", "{reason}", {"reason": reason}) from None

    return WrapValidator(check)


_IGNORED = "Has no effect; accepted because OpenAI's clients send it."
_NO_TOOLS = "this model cannot call tools or functions; leave {} out"
_EMPTY = Field(max_length=0)

ShortText = Annotated[str, StringConstraints(max_length=64)]


class OpenAIFields(Strict):
    """What OpenAI's chat completions or completions have and this server has no use for."""

    user: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    metadata: dict[str, str] | None = Field(None, description=_IGNORED)
    store: bool | None = Field(None, description=_IGNORED)
    service_tier: ShortText | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    prompt_cache_retention: ShortText | None = Field(None, description=_IGNORED)
    prompt_cache_options: dict[str, ShortText] | None = Field(None, description=_IGNORED)
    reasoning_effort: ShortText | None = Field(None, description=_IGNORED)
    verbosity: ShortText | None = Field(None, description=_IGNORED)
    prediction: dict[str, str | list[dict[str, Any]]] | None = Field(None, description=_IGNORED)
    parallel_tool_calls: bool | None = Field(None, description=_IGNORED)
    tools: Annotated[list[Any], _EMPTY, because(_NO_TOOLS.format("tools"))] | None = Field(
        None, description="Tools the model may call. It cannot: only an empty list is accepted."
    )
    tool_choice: (
        Annotated[Literal["none", "auto"], because(_NO_TOOLS.format("tool_choice"))] | None
    ) = Field(None, description="Whether to call tools. Has no effect, as there are none.")
    functions: Annotated[list[Any], _EMPTY, because(_NO_TOOLS.format("functions"))] | None = Field(
        None, description="OpenAI's older name for `tools`."
    )
    function_call: (
        Annotated[Literal["none", "auto"], because(_NO_TOOLS.format("function_call"))] | None
    ) = Field(None, description="OpenAI's older name for `tool_choice`.")
    response_format: (
        Annotated[
            dict[Literal["type"], Literal["text"]],
            Field(min_length=1),
            because(
                "this model cannot be held to JSON or a schema; leave response_format out, or "
                'send {"type": "text"}'
            ),
        ]
        | None
    ) = Field(None, description='Format of the answer: only `{"type": "text"}` is accepted.')
    modalities: (
        Annotated[
            list[Literal["text"]],
            because('this model answers with text only; leave modalities out, or send ["text"]'),
        ]
        | None
    ) = Field(None, description="Kinds of output: only text is accepted.")
    audio: Annotated[None, because("this model cannot speak; leave audio out")] = Field(
        None, description="Voice of the answer. There is none: only null is accepted."
    )
    web_search_options: Annotated[
        None, because("this server does not search the web; leave web_search_options out")
    ] = Field(None, description="Options of a web search. There is none: only null is accepted.")
    moderation: Annotated[
        None, because("this server moderates neither images nor answers; leave moderation out")
    ] = Field(None, description="Options of moderation. There is none: only null is accepted.")
    echo: (
        Annotated[Literal[False], because("the prompt is never part of the answer; leave echo out")]
        | None
    ) = Field(None, description="Whether to repeat the prompt: only `false` is accepted.")
    suffix: (
        Annotated[
            str, _EMPTY, because("this model cannot insert text before a suffix; leave suffix out")
        ]
        | None
    ) = Field(None, description="Text after the answer: only an empty one is accepted.")
