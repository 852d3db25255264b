"""Whose address a request comes from, as far as proxies that are trusted tell."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.datastructures import Headers
from starlette.types import Scope

from blip2_serve.haproxy_config import PEER

Network = IPv4Network | IPv6Network

FORWARDED = "x-forwarded-for"
OF_ONE_CLIENT = 64  # bits of an IPv6 address: networks give whole subnets to one machine


def client_of(scope: Scope, trusted: Sequence[Network]) -> str:
    """The address of a request's client; "" if nobody tells it. IPv6 addresses go by their subnet.

    That is who connected to the server. If it is a trusted proxy, it is the last address in
    X-Forwarded-For that is not one: the client may have written those before.
    """
    headers = Headers(scope=scope)
    if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        last = headers.get(PEER, "")
    else:
        last = (scope.get("client") or ("",))[0]
    forwarded = ",".join(headers.getlist(FORWARDED)).split(",")
    hops = [last, *reversed([hop.strip() for hop in forwarded])]
    client = ""
    for hop in hops:
        try:
            address = ip_address(hop)
        except ValueError:
            break
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        subnet = OF_ONE_CLIENT if address.version == 6 else address.max_prefixlen
        client = str(ip_network((address, subnet), strict=False))
        if not any(address in network for network in trusted):
            break
    return client
