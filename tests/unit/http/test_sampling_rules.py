"""Which requests are sampled, at which temperature, and which are greedy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.errors import InvalidRequest
from blip2_serve.http.schema import CaptionFields, ChatRequest, GenerateRequest
from blip2_serve.types import SamplingParams

USER = {"role": "user", "content": "what is it?"}


def chat(**fields: Any) -> SamplingParams:
    body = {"messages": [USER], "seed": 0, **fields}
    return ChatRequest.model_validate(body).sampling_params()


def generate(**fields: Any) -> SamplingParams:
    return GenerateRequest.model_validate({"image": "x", "seed": 0, **fields}).sampling_params()


def caption(**fields: Any) -> SamplingParams:
    return CaptionFields.model_validate({"seed": 0, **fields}).sampling_params()


@pytest.mark.parametrize("route", [chat, generate])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({}, SamplingParams(), id="greedy by default"),
        pytest.param({"seed": 5}, SamplingParams(seed=5), id="a seed alone"),
        pytest.param({"top_p": 1, "top_k": 0, "n": 1}, SamplingParams(), id="neutral values"),
        pytest.param({"top_k": -1, "min_p": 0}, SamplingParams(), id="other neutral values"),
        pytest.param({"top_p": 0.9}, SamplingParams(temperature=1, top_p=0.9), id="top_p"),
        pytest.param({"top_k": 5}, SamplingParams(temperature=1, top_k=5), id="top_k"),
        pytest.param({"n": 2}, SamplingParams(temperature=1, n=2), id="n"),
        pytest.param(
            {"n": 2, "min_p": 0.1}, SamplingParams(temperature=1, n=2, min_p=0.1), id="n and min_p"
        ),
        pytest.param({"top_p": 0}, SamplingParams(), id="top_p 0"),
        pytest.param({"top_p": 0, "n": 3}, SamplingParams(n=3), id="top_p 0, three answers"),
        pytest.param({"temperature": 0.7, "top_p": 0}, SamplingParams(), id="top_p 0, warm"),
        pytest.param({"temperature": 0, "top_p": 0.9}, SamplingParams(), id="temperature 0, top_p"),
        pytest.param({"temperature": 0, "top_k": 5}, SamplingParams(), id="temperature 0, top_k"),
        pytest.param({"temperature": 0, "min_p": 0.5}, SamplingParams(), id="temperature 0, min_p"),
        pytest.param({"temperature": 0, "n": 3}, SamplingParams(n=3), id="temperature 0, n"),
        pytest.param({"temperature": 0.3}, SamplingParams(temperature=0.3), id="a temperature"),
        pytest.param(
            {"num_beams": 3, "top_p": 0.9, "top_k": 5},
            SamplingParams(num_beams=3),
            id="beams, as transformers without do_sample",
        ),
        pytest.param(
            {"preset": "vqa", "num_beams": 1, "top_p": 0.9},
            SamplingParams(max_tokens=10, min_tokens=1, length_penalty=0),
            id="a preset without beams",
        ),
        pytest.param(
            {"preset": "vqa", "num_beams": 1, "n": 2},
            SamplingParams(max_tokens=10, min_tokens=1, length_penalty=0, n=2),
            id="two answers of a preset without beams",
        ),
        pytest.param(
            {"frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"7": 3, "12": -100}},
            SamplingParams(
                frequency_penalty=0.5, presence_penalty=-1, logit_bias=((7, 3), (12, -100))
            ),
            id="penalties and biases do not ask for samples",
        ),
    ],
)
def test_what_a_request_asks_for(route: Any, fields: dict[str, Any], expected: Any) -> None:
    assert route(**fields) == expected


@pytest.mark.parametrize("fields", [{"top_p": 0.9}, {"top_k": 5}, {"n": 2}, {}])
def test_captions_stay_greedy_without_a_temperature(fields: dict[str, Any]) -> None:
    assert caption(**fields) == SamplingParams(n=fields.get("n", 1))
    assert caption(**fields, temperature=0.5).temperature == 0.5


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        pytest.param("", (), id="an empty string"),
        pytest.param([""], (), id="a list of an empty string"),
        pytest.param(["", ".", ""], (".",), id="among others"),
        pytest.param(None, (), id="null"),
        pytest.param([], (), id="an empty list"),
        pytest.param("\n", ("\n",), id="a string"),
        pytest.param([str(i) for i in range(16)], tuple(map(str, range(16))), id="sixteen"),
    ],
)
def test_empty_stop_strings_stop_nothing(stop: Any, expected: tuple[str, ...]) -> None:
    assert generate(stop=stop).stop == expected


def test_max_completion_tokens_is_a_limit_on_every_route() -> None:
    for route in (chat, generate, caption):
        assert route(max_completion_tokens=2048).max_tokens == 2048
        with pytest.raises(InvalidRequest):
            route(max_completion_tokens=5, max_tokens=6)


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


requests = st.fixed_dictionaries(
    {},
    optional={
        "temperature": maybe(st.sampled_from([0, 0.0, 0.5, 1, 2])),
        "top_p": maybe(st.sampled_from([0, 1e-9, 0.5, 1])),
        "top_k": maybe(st.integers(-1, 3)),
        "min_p": maybe(st.sampled_from([0, 0.5, 1])),
        "n": maybe(st.integers(1, 4)),
        "num_beams": maybe(st.integers(1, 4)),
        "preset": maybe(st.sampled_from(["caption", "vqa"])),
        "seed": maybe(st.integers(0, 3)),
        "stop": maybe(st.sampled_from(["", ".", ["", "."], []])),
        "frequency_penalty": maybe(st.sampled_from([0, 1, -2])),
        "logit_bias": maybe(st.sampled_from([{}, {"3": 1}])),
        "best_of": maybe(st.integers(1, 4)),
    },
)


def outcome(route: Any, fields: dict[str, Any]) -> SamplingParams | str | None:
    """The parameters, or the field that is refused."""
    try:
        params: SamplingParams = route(**{"seed": 0, **fields})
    except InvalidRequest as error:
        return error.param
    return params


@given(requests)
def test_every_combination_follows_the_rules(fields: dict[str, Any]) -> None:
    made = outcome(chat, fields)
    given = {name: value for name, value in fields.items() if value is not None}
    temperature, top_p = given.get("temperature"), given.get("top_p", 1)
    n, top_k = given.get("n", 1), given.get("top_k", 0)
    beams = given.get("num_beams", 5 if "preset" in given else 1)
    asks = top_p < 1 or top_k > 0 or n > 1
    if temperature is None and beams == 1 and "preset" not in given and asks:
        temperature = 1
    if not isinstance(made, SamplingParams):
        wrong = {
            "temperature": beams > 1 and bool(temperature),
            "n": 1 < beams < n,
            "best_of": given.get("best_of", n) != n,
            "min_p": temperature is None and given.get("min_p", 0) > 0,
        }
        assert made is not None
        assert wrong[made]
        return
    assert made.n == n
    assert made.num_beams == beams
    assert made.stop in ((), (".",))
    if temperature and top_p > 0:
        assert (made.temperature, made.top_p, made.top_k) == (temperature, top_p, max(top_k, 0))
        assert not made.is_greedy
    else:
        drawing = (made.temperature, made.top_p, made.top_k, made.min_p)
        assert drawing == (0, 1, 0, 0)
        assert made.is_greedy == (beams == 1)


@given(requests)
def test_null_is_the_same_as_absent_and_routes_agree(fields: dict[str, Any]) -> None:
    given = {name: value for name, value in fields.items() if value is not None}
    given.setdefault("seed", 0)
    assert outcome(chat, {**fields, "seed": given["seed"]}) == outcome(chat, given)
    assert outcome(chat, given) == outcome(generate, given)
    if "temperature" in given:
        assert outcome(caption, given) == outcome(chat, given)
    else:
        made = outcome(caption, given)
        assert not isinstance(made, SamplingParams) or made.temperature == 0
