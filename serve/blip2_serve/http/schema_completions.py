"""The body of /v1/completions: that of /v1/generate, in the forms that clients know."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.schema import GenerateRequest
from blip2_serve.http.validation import Strict

_OneUrl = Annotated[list[str], Field(min_length=1, max_length=1)]


def _one_prompt(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    items = [item for entry in value for item in (entry if isinstance(entry, list) else [entry])]
    if any(isinstance(item, int) for item in items):
        raise ValueError("token ids are not accepted; send the prompt as text")
    if len(value) != 1:
        raise ValueError(f"{len(value)} prompts in one request; send one prompt per request")
    return value[0]


class Media(Strict):
    image: str | _OneUrl = Field(description="URL of the image, or a list with this one URL.")

    @property
    def urls(self) -> list[str]:
        return [self.image] if isinstance(self.image, str) else self.image


class CompletionRequest(GenerateRequest):
    image: str = Field(
        "",
        description="Data URL of an image file (`data:image/jpeg;base64,...`), or an https URL if "
        "the server allows them. Required, in this form or another.",
    )
    image_urls: _OneUrl | None = Field(None, description="The same as `image`: `[URL]`.")
    media_urls: Media | None = Field(None, description='The same as `image`: `{"image": [URL]}`.')
    multi_modal_data: Media | None = Field(
        None, description='The same as `image`, as in vLLM\'s `LLM.generate`: `{"image": URL}`.'
    )
    prompt: Annotated[
        str | None, BeforeValidator(_one_prompt, json_schema_input_type=str | list[str] | None)
    ] = Field(
        None,
        description="Text for the model to continue, used exactly as sent: one string, alone or "
        "in a list. Without a prompt, the answer is a caption.",
    )
    _image_field: str = PrivateAttr("image")

    @model_validator(mode="after")
    def _one_image(self) -> CompletionRequest:
        forms = {
            "image": [self.image] if self.image else [],
            "image_urls": self.image_urls or [],
            "media_urls": self.media_urls.urls if self.media_urls else [],
            "multi_modal_data": self.multi_modal_data.urls if self.multi_modal_data else [],
        }
        given = {name: urls for name, urls in forms.items() if urls}
        if not given:
            raise InvalidRequest(
                'image is required: a data URL ("data:image/jpeg;base64,..."); with OpenAI\'s '
                'client, send it as extra_body={"image": ...}',
                "image",
            )
        if len(given) > 1:
            raise InvalidRequest(f"send one image: {' or '.join(given)}", [*given][1])
        ((self._image_field, (self.image,)),) = given.items()
        return self

    @property
    def image_field(self) -> str:
        """The field that `image` comes from."""
        return self._image_field
