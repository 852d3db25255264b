"""The captions route over a fake backend."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from blip2_serve.config import AppConfig
from blip2_serve.errors import (
    InvalidImage,
    Overloaded,
)
from blip2_serve.http.downloads import Downloader
from blip2_serve.types import SamplingParams
from support.fake_backend import (
    PROMPT_TOKENS,
    TEXT,
    TOKEN_IDS,
    FakeBackend,
    client_of,
    data_url,
    error_of,
    post,
)


async def test_one_image_is_captioned(client: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = {"image": data_url(b"one"), "prompt": "a photo of"}
    answer = (await post(client, "/v1/caption", body)).json()

    assert backend.prompts == ["a photo of"]
    assert answer == {
        "object": "caption.list",
        "model": "demo",
        "data": [{"index": 0, "caption": f"one:{TEXT}".strip(), "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": PROMPT_TOKENS,
            "completion_tokens": len(TOKEN_IDS),
            "total_tokens": PROMPT_TOKENS + len(TOKEN_IDS),
        },
    }


async def test_captions_come_with_token_ids_on_request(client: httpx.AsyncClient) -> None:
    body = {"image": data_url(b"one"), "return_token_ids": True}
    answer = (await post(client, "/v1/caption", body)).json()

    assert answer["data"][0]["token_ids"] == list(TOKEN_IDS)


async def test_of_n_captions_the_best_comes_first(client: httpx.AsyncClient) -> None:
    body = {"images": [data_url(b"one"), data_url(b"two")], "n": 2, "num_beams": 3}
    answer = (await post(client, "/v1/caption", body)).json()

    for item, name in zip(answer["data"], ("one", "two"), strict=True):
        best = f"{name}:{TEXT}".strip()
        assert item["caption"] == best
        assert item["captions"][0] == best
        assert item["captions"][1].startswith(best)
        assert item["captions"][1].endswith("1")
        assert len(item["captions"]) == 2
    assert answer["usage"]["prompt_tokens"] == 2 * PROMPT_TOKENS
    assert answer["usage"]["completion_tokens"] == 2 * 2 * len(TOKEN_IDS)


async def test_each_image_gets_a_result_or_an_error_in_order(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures[b"broken"] = InvalidImage("not an image")
    images = [data_url(b"one"), data_url(b"broken"), "not a URL", data_url(b"two")]
    response = await post(client, "/v1/caption", {"images": images, "prompt": "a photo of"})

    answer = response.json()
    assert response.status_code == 200
    assert [item["index"] for item in answer["data"]] == [0, 1, 2, 3]
    assert answer["data"][0]["caption"].startswith("one:")
    assert answer["data"][1]["error"]["message"] == "not an image"
    assert answer["data"][1]["error"]["code"] == "invalid_image"
    assert "data URL" in answer["data"][2]["error"]["message"]
    assert answer["data"][3]["caption"].startswith("two:")
    assert answer["usage"]["prompt_tokens"] == 2 * PROMPT_TOKENS
    assert backend.prompts == ["a photo of", "a photo of"]


async def test_if_every_image_fails_the_first_error_sets_the_status(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures = {b"one": Overloaded("busy"), b"two": InvalidImage("not an image")}
    response = await post(client, "/v1/caption", {"images": [data_url(b"one"), data_url(b"two")]})

    assert response.status_code == 429
    assert error_of(response)["code"] == "overloaded"


async def test_form_fields_are_parameters_of_an_upload(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    fields = {
        "prompt": "a photo of",
        "max_tokens": "5",
        "temperature": "0.5",
        "seed": "3",
        "stop": ["\n", "."],
        "return_token_ids": "true",
    }
    files = [("image", ("1.png", b"one")), ("image", ("2.png", b"two"))]
    response = await client.post("/v1/caption", files=files, data=fields)

    assert response.status_code == 200, response.text
    items = response.json()["data"]
    assert [item["caption"].partition(":")[0] for item in items] == ["one", "two"]
    assert items[0]["token_ids"] == list(TOKEN_IDS)
    expected = SamplingParams(max_tokens=5, temperature=0.5, seed=3, stop=("\n", "."))
    assert backend.params == [expected, expected]
    assert backend.prompts == ["a photo of", "a photo of"]


@pytest.mark.parametrize(
    "field",
    [
        pytest.param({"n": "1"}, id="one choice"),
        pytest.param({"num_beams": "1"}, id="one beam"),
        pytest.param({"length_penalty": "1"}, id="length penalty 1"),
        pytest.param({"length_penalty": "1.0"}, id="length penalty 1.0"),
        pytest.param({"early_stopping": "false"}, id="no early stopping"),
        pytest.param({"num_beams": "3", "early_stopping": "true"}, id="early stopping"),
        pytest.param({"num_beams": "3", "early_stopping": "never"}, id="early stopping never"),
        pytest.param({"num_beams": "3", "length_penalty": "-0.5"}, id="a length penalty"),
        pytest.param({"num_beams": "3", "n": "2"}, id="two answers of three beams"),
        pytest.param({"preset": "caption"}, id="a preset"),
        pytest.param({"top_p": "0.9", "n": "2"}, id="top_p without a temperature"),
        pytest.param({"frequency_penalty": "0.5"}, id="a frequency penalty"),
        pytest.param({"stop": ""}, id="an empty stop string"),
    ],
)
async def test_an_upload_accepts_the_parameters_of_json(
    client: httpx.AsyncClient, field: dict[str, str]
) -> None:
    files = [("image", ("1.png", b"one"))]
    response = await client.post("/v1/caption", files=files, data=field)

    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        pytest.param([], {"prompt": "a"}, "image", id="no file"),
        pytest.param([("image", ("1.png", b""))], {}, "image", id="an empty file"),
        pytest.param([("photo", ("1.png", b"one"))], {}, "photo", id="a file under another name"),
        pytest.param([("image", ("1.png", b"one"))], {"beams": "1"}, "beams", id="unknown field"),
        pytest.param([("image", ("1.png", b"one"))], {"n": "17"}, "n", id="too many answers"),
        pytest.param(
            [("image", ("1.png", b"one"))],
            {"num_beams": "2", "early_stopping": "maybe"},
            "early_stopping",
            id="unknown early stopping",
        ),
        pytest.param(
            [("image", ("1.png", b"one"))], {"max_tokens": "many"}, "max_tokens", id="not a number"
        ),
    ],
)
async def test_an_invalid_upload_is_a_400_that_names_the_field(
    client: httpx.AsyncClient,
    files: list[tuple[str, tuple[str, bytes]]],
    fields: dict[str, str],
    param: str,
) -> None:
    parts: list[tuple[str, Any]] = [*files, *((k, (None, v)) for k, v in fields.items())]
    response = await client.post("/v1/caption", files=parts)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_the_media_type_is_case_insensitive(client: httpx.AsyncClient) -> None:
    request = client.build_request("POST", "/v1/caption", files={"image": b"one"})
    media_type, boundary = request.headers["content-type"].split(";")
    request.headers["content-type"] = f"{media_type.title()};{boundary}"
    response = await client.send(request)

    assert request.headers["content-type"].startswith("Multipart/Form-Data")
    assert response.status_code == 200
    assert response.json()["data"][0]["caption"].startswith("one:")


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
async def test_a_malformed_upload_is_a_400(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(
        "/v1/caption", content=b"garbage", headers={"content-type": content_type}
    )

    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        pytest.param({}, "image", id="no image"),
        pytest.param({"images": []}, "images", id="an empty list of images"),
        pytest.param({"images": ["x"] * 65}, "images", id="too many images"),
        pytest.param({"image": "x", "images": ["x"]}, "image", id="both image and images"),
        pytest.param({"image": "x", "stream": True}, "stream", id="stream"),
        pytest.param({"image": "x", "logprobs": 1}, "logprobs", id="logprobs"),
    ],
)
async def test_an_invalid_caption_request_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    response = await post(client, "/v1/caption", body)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_at_most_four_images_of_a_request_are_downloaded_at_once(
    monkeypatch: pytest.MonkeyPatch, backend: FakeBackend
) -> None:
    now = most = 0

    async def get(_: Downloader, __: str, ___: str) -> bytes:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return b"one"

    monkeypatch.setattr(Downloader, "get", get)
    config = AppConfig.model_validate({"ingress": {"images": {"allow_urls": True}}})
    urls = [f"https://example.com/{number}" for number in range(10)]
    async with client_of(backend, config) as client:
        answer = (await post(client, "/v1/caption", {"images": urls})).json()

    assert len(answer["data"]) == 10
    assert most == 4


async def test_an_unexpected_failure_of_one_caption_cancels_the_others(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.failures[b"two"] = KeyError("unexpected")
    backend.held[b"one"] = asyncio.Event()  # never set
    body = {"images": [data_url(b"one"), data_url(b"two")]}
    async with asyncio.timeout(10):
        response = await post(client, "/v1/caption", body)

    assert response.status_code == 500
    assert backend.abandoned == [b"one"]
