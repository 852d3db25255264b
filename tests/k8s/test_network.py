"""The network policies allow the connections that are needed, and no others."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from support.manifests import OVERLAYS, Object, Pod, build, matches, of_kind, pods

OPERATOR = Pod("KubeRay's operator", {"app.kubernetes.io/name": "kuberay-operator"}, {})
PROMETHEUS = Pod("Prometheus", {"app.kubernetes.io/name": "prometheus"}, {})
STRANGER = Pod("an unrelated pod", {"app": "x"}, {})
NAMESPACE = {"kubernetes.io/metadata.name": "blip2"}
ELSEWHERE = {"kubernetes.io/metadata.name": "elsewhere"}
INTERNET, METADATA, API = "93.184.216.34", "169.254.169.254", "10.96.0.1"


def allowed(objects: list[Object], source: Pod | str, target: Pod | str, port: int) -> bool:
    """Whether a TCP connection is allowed; an IP address stands for anything but a pod."""
    return _one_way(objects, "Egress", source, target, port) and _one_way(
        objects, "Ingress", target, source, port
    )


def _one_way(
    objects: list[Object], direction: str, pod: Pod | str, peer: Pod | str, port: int
) -> bool:
    if isinstance(pod, str) or pod in (OPERATOR, PROMETHEUS, STRANGER):
        return True  # outside this namespace, whose policies do not apply to it
    rules, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    applying = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    assert applying, f"no policy applies to {pod.name}"
    return any(
        (peers not in rule or any(_is_peer(entry, peer) for entry in rule[peers]))
        and (
            "ports" not in rule
            or any(p["port"] == port and p["protocol"] == "TCP" for p in rule["ports"])
        )
        for spec in applying
        for rule in spec.get(rules, [])
    )


def _is_peer(entry: dict[str, Any], peer: Pod | str) -> bool:
    if isinstance(peer, str):
        if "ipBlock" not in entry:
            return False
        address = ipaddress.ip_address(peer)
        inside = address in ipaddress.ip_network(entry["ipBlock"]["cidr"])
        excluded = entry["ipBlock"].get("except", [])
        return inside and not any(address in ipaddress.ip_network(n) for n in excluded)
    if "podSelector" not in entry and "namespaceSelector" not in entry:
        return False
    foreign = peer in (OPERATOR, PROMETHEUS, STRANGER)
    if "namespaceSelector" in entry:
        if not matches(entry["namespaceSelector"], ELSEWHERE if foreign else NAMESPACE):
            return False
    elif foreign:
        return False
    return matches(entry.get("podSelector", {}), peer.labels)


def pod_of(objects: list[Object], name: str) -> Pod:
    (found,) = (pod for pod in pods(objects) if name in pod.name)
    return found


def all_objects() -> list[Object]:
    return build("prod") + build("loadtest")


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        pytest.param("generate", "headgroup", 6379, id="worker to head"),
        pytest.param("preprocess", "generate", 31234, id="stage to stage, any port"),
        pytest.param("headgroup", "encode", 10002, id="head to worker"),
        pytest.param("headgroup", "redis", 6379, id="head to Redis"),
        pytest.param("headgroup", API, 443, id="autoscaler to Kubernetes"),
        pytest.param("blip2-weights", INTERNET, 443, id="weights job to the internet"),
        pytest.param(STRANGER, "preprocess", 8000, id="any pod to HTTP"),
        pytest.param(OPERATOR, "headgroup", 8265, id="operator to dashboard"),
        pytest.param(PROMETHEUS, "encode", 8080, id="Prometheus to Ray's metrics"),
        pytest.param(PROMETHEUS, "preprocess", 9101, id="Prometheus to HAProxy's metrics"),
        pytest.param("locust-worker", "preprocess", 8000, id="locust to HTTP"),
        pytest.param("locust-worker", "locust-master", 5557, id="locust worker to master"),
    ],
)
def test_needed_connections_are_allowed(source: Pod | str, target: Pod | str, port: int) -> None:
    assert allowed(all_objects(), *_resolve(source, target), port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        pytest.param(STRANGER, "headgroup", 8265, id="unrelated pod to dashboard"),
        pytest.param(STRANGER, "headgroup", 10001, id="unrelated pod to Ray client"),
        pytest.param(STRANGER, "generate", 30000, id="unrelated pod past HAProxy"),
        pytest.param(STRANGER, "preprocess", 8404, id="unrelated pod to HAProxy's page"),
        pytest.param(STRANGER, "redis", 6379, id="unrelated pod to Redis"),
        pytest.param("generate", "redis", 6379, id="worker to Redis"),
        pytest.param("locust-worker", "headgroup", 8265, id="locust to dashboard"),
        pytest.param("generate", API, 443, id="worker to Kubernetes"),
        pytest.param("generate", INTERNET, 443, id="worker to the internet"),
        pytest.param("preprocess", INTERNET, 443, id="ingress to the internet"),
        pytest.param("headgroup", INTERNET, 443, id="head to the internet"),
        pytest.param("blip2-weights", METADATA, 443, id="weights job to cloud metadata"),
        pytest.param("redis", INTERNET, 443, id="Redis to the internet"),
        pytest.param(PROMETHEUS, "headgroup", 8265, id="Prometheus to dashboard"),
    ],
)
def test_other_connections_are_blocked(source: Pod | str, target: Pod | str, port: int) -> None:
    assert not allowed(all_objects(), *_resolve(source, target), port)


def _resolve(*names: Pod | str) -> list[Pod | str]:
    """Replaces parts of pods' names by the pods; leaves addresses and pods as they are."""
    resolved: list[Pod | str] = []
    for name in names:
        is_pod = isinstance(name, str) and name not in (INTERNET, METADATA, API)
        resolved.append(pod_of(all_objects(), str(name)) if is_pod else name)
    return resolved


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_default_policy_blocks_everything(overlay: str) -> None:
    (default,) = (o for o in build(overlay) if o["metadata"]["name"] == "default-deny")
    for pod in pods(build(overlay)):
        assert not allowed([default], pod, INTERNET, 443)
        assert not allowed([default], STRANGER, pod, 8000)


def test_the_image_urls_component_allows_https_to_public_addresses() -> None:
    objects = build("prod") + build("components/image-urls")
    source = pod_of(objects, "preprocess")
    assert allowed(objects, source, INTERNET, 443)
    assert not allowed(objects, source, INTERNET, 22)
    for address in (METADATA, API, "192.168.1.1", "127.0.0.1", "100.100.100.200"):
        assert not allowed(objects, source, address, 443)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_policy_selects_a_pod(overlay: str) -> None:
    objects = build(overlay)
    for policy in of_kind(objects, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        assert any(matches(selector, pod.labels) for pod in pods(objects)), policy["metadata"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_may_use_dns(overlay: str) -> None:
    objects = build(overlay)
    (policy,) = (p for p in of_kind(objects, "NetworkPolicy") if p["metadata"]["name"] == "dns")
    assert policy["spec"]["podSelector"] == {}
    (rule,) = policy["spec"]["egress"]
    assert {(p["protocol"], p["port"]) for p in rule["ports"]} == {("UDP", 53), ("TCP", 53)}
