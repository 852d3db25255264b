"""Every server gets the same questions, and no picture is sent twice."""

from __future__ import annotations

import base64
import io
import random
from itertools import islice

from PIL import Image

from loadtest.bench.workload import MAX_TOKENS, MIN_TOKENS, Request, Workload, lengths


def test_no_picture_is_sent_twice_whatever_the_series_and_the_stock() -> None:
    workload = Workload(seed=1)
    workload.prepare(3)

    sent = [
        request.picture
        for series in [(0, 1), (0, 8), (0, 1)]
        for request in islice(workload.requests(*series), 4)
    ]

    assert len(set(sent)) == 12
    assert workload.made_late == 9


def test_equal_seeds_send_the_same_bytes() -> None:
    first, second = (list(islice(Workload(seed=1).requests(0), 3)) for _ in range(2))

    assert first == second
    assert first != list(islice(Workload(seed=2).requests(0), 3))


def test_a_series_repeats_its_questions_with_other_pictures() -> None:
    workload = Workload(seed=1)

    first, second = (list(islice(workload.requests(2, 8), 3)) for _ in range(2))

    assert [(r.question, r.max_tokens) for r in first] == [
        (r.question, r.max_tokens) for r in second
    ]


def test_pictures_are_as_large_as_photographs() -> None:
    for request in islice(Workload(seed=1).requests(0), 5):
        data = base64.b64decode(request.picture.removeprefix("data:image/jpeg;base64,"))
        assert 50_000 < len(data) < 120_000
        assert Image.open(io.BytesIO(data)).size == (640, 480)


def test_lengths_are_uniform_and_stratified() -> None:
    drawn = list(islice(lengths(random.Random(1)), 4900))

    assert set(drawn) == set(range(MIN_TOKENS, MAX_TOKENS + 1))
    mean = (MIN_TOKENS + MAX_TOKENS) / 2
    assert all(abs(sum(drawn[i : i + 7]) / 7 - mean) <= 3 for i in range(0, 4900, 7))


def test_a_stream_requests_its_usage() -> None:
    request = next(Workload(seed=1).requests(0))

    assert request.body("m", stream=True)["stream_options"] == {"include_usage": True}
    assert "stream" not in request.body("m", stream=False)


def test_a_chat_sends_its_picture_with_the_first_question() -> None:
    request = Request("and now?", "data:,", 8, earlier=(("what is it?", "a dog"),))

    first, answer, question = request.body("m", stream=False)["messages"]

    assert [part["type"] for part in first["content"]] == ["image_url", "text"]
    assert first["content"][1]["text"] == "what is it?"
    assert answer == {"role": "assistant", "content": "a dog"}
    assert question == {"role": "user", "content": "and now?"}


def test_further_fields_override_the_body_and_n_multiplies_the_tokens() -> None:
    request = Request("what is it?", "data:,", 8, more={"n": 3, "temperature": 1})

    body = request.body("m", stream=False)

    assert (body["n"], body["temperature"], body["max_tokens"]) == (3, 1, 8)
    assert request.tokens == 24
