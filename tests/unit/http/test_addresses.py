"""Which client a request comes from: proxies are believed only as far as they are trusted."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest

from blip2_serve.haproxy_config import PEER
from blip2_serve.http.addresses import client_of

CLIENT, PROXY, BALANCER = "203.0.113.9", "10.0.0.1", "10.0.0.2"
TRUSTED = [ip_network("10.0.0.0/8")]


def scope(client: str | None, *forwarded: str, **headers: str) -> Any:
    lines = [("x-forwarded-for", value) for value in forwarded]
    lines += [(name.replace("_", "-"), value) for name, value in headers.items()]
    raw = [(name.encode(), value.encode()) for name, value in lines]
    return {"type": "http", "headers": raw, "client": client and (client, 1234)}


@pytest.mark.parametrize(
    ("request_of", "expected"),
    [
        pytest.param(scope(CLIENT), CLIENT, id="connects itself"),
        pytest.param(scope(CLIENT, "198.51.100.1"), CLIENT, id="lies about where it comes from"),
        pytest.param(scope(CLIENT, BALANCER), CLIENT, id="claims to be a proxy's client"),
        pytest.param(scope(PROXY, CLIENT), CLIENT, id="by a proxy"),
        pytest.param(scope(PROXY, f"{CLIENT}, {BALANCER}"), CLIENT, id="by two proxies"),
        pytest.param(scope(PROXY, CLIENT, BALANCER), CLIENT, id="by two proxies, in two headers"),
        pytest.param(scope(PROXY, f"198.51.100.1, {CLIENT}"), CLIENT, id="lies to a proxy"),
        pytest.param(scope(PROXY, f"10.9.9.9,{CLIENT}"), CLIENT, id="lies that it is a proxy"),
        pytest.param(scope(PROXY, f"{CLIENT}, unknown"), PROXY, id="a proxy that hides it"),
        pytest.param(scope(PROXY), PROXY, id="a proxy itself"),
        pytest.param(scope(f"::ffff:{CLIENT}"), CLIENT, id="IPv4 in IPv6"),
        pytest.param(scope("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64", id="IPv6: its subnet"),
        pytest.param(scope(None), "", id="nobody tells"),
    ],
)
def test_the_client_is_the_last_one_that_is_no_trusted_proxy(
    request_of: Any, expected: str
) -> None:
    if expected and "/" not in expected:
        expected += "/32"
    assert client_of(request_of, TRUSTED) == expected


def test_without_trusted_proxies_what_they_say_does_not_count() -> None:
    assert client_of(scope(PROXY, CLIENT), []) == f"{PROXY}/32"


def test_behind_haproxy_only_haproxy_tells_who_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = scope("127.0.0.1", **{PEER.replace("-", "_"): CLIENT})
    assert client_of(behind, TRUSTED) == "127.0.0.1/32"
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert client_of(behind, TRUSTED) == f"{CLIENT}/32"
    assert client_of(scope("127.0.0.1"), TRUSTED) == ""
