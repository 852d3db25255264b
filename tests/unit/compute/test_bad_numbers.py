"""A decoder that computes NaN for some tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from blip2_serve.compute.base import Device
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.sequence import Request
from blip2_serve.types import TokenEvent
from support.device import DEVICE
from support.shipped import Ahead, Model

BAD = 100  # the token whose embedding is NaN
DEVICES = pytest.mark.parametrize("device", [Device(DEVICE), Ahead(DEVICE)], ids=["now", "ahead"])


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model()
    decoder = model.decoder
    decoder.lm_head.weight = nn.Parameter(decoder.lm_head.weight.clone(), requires_grad=False)
    decoder.embed_tokens.weight[BAD] = torch.nan
    return model


def finish(engine: Engine) -> tuple[dict[str, list[TokenEvent]], set[str]]:
    """The events of each request, and those that failed."""
    events: dict[str, list[TokenEvent]] = {}
    failed = set()
    while engine.has_work:
        result = engine.step()
        for name, event in result.events:
            events.setdefault(name, []).append(event)
        failed |= {name for name, _ in result.failures}
        engine.check_integrity()
    engine.check_idle()
    return events, failed


def bad(model: Model, at: int, **params: Any) -> Request:
    request = model.request(f"bad at {at}", **params)
    request.prompt.insert(at, BAD)
    return request


@DEVICES
@pytest.mark.parametrize(
    "params",
    [{}, {"n": 2, "temperature": 1.0, "top_p": 0.9, "top_logprobs": 2}, {"num_beams": 2}],
    ids=["greedy", "samples", "beams"],
)
def test_a_request_without_numbers_leaves_others_and_their_slots_alone(
    model: Model, device: Device, params: dict[str, Any]
) -> None:
    alone = finish_one(model, device)
    engine = model.engine(device)
    length = len(model.request("a").prompt)
    engine.add(model.request("good"))
    engine.add(bad(model, length - 1, **params))
    events, failed = finish(engine)
    assert failed == {f"bad at {length - 1}"}
    assert tokens(events["good"]) == alone
    engine.add(bad(model, 12, **params))
    assert finish(engine) == ({}, {"bad at 12"})
    assert engine.without_numbers == 1
    # All slots that it wrote are free, and in no prefix: others use them.
    engine.add(model.request("again"))
    again = model.request("longer")
    again.prompt += [5] * 60
    engine.add(again)
    events, failed = finish(engine)
    assert not failed
    assert tokens(events["again"]) == alone


@DEVICES
def test_numbers_may_be_lost_within_an_answer(model: Model, device: Device) -> None:
    engine = model.engine(device)
    engine.add(model.request("good"))
    engine.add(model.request("bad", logit_bias=((BAD, 1000.0),)))
    events, failed = finish(engine)
    assert failed == {"bad"}
    assert tokens(events["bad"]) == [BAD]
    assert len(tokens(events["good"])) == 14


def finish_one(model: Model, device: Device) -> list[int]:
    engine = model.engine(device)
    engine.add(model.request("alone"))
    return tokens(finish(engine)[0]["alone"])


def tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]
