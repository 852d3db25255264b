"""The network policies: what they let through, and that nothing else gets through."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from support.manifests import OVERLAYS, Object, Pod, build, matches, of_kind, pods

OPERATOR = Pod("KubeRay's operator", {"app.kubernetes.io/name": "kuberay-operator"}, {})
PROMETHEUS = Pod("Prometheus", {"app.kubernetes.io/name": "prometheus"}, {})
STRANGER = Pod("somebody else's pod", {"app": "x"}, {})
NAMESPACE = {"kubernetes.io/metadata.name": "blip2"}
ELSEWHERE = {"kubernetes.io/metadata.name": "elsewhere"}
INTERNET, METADATA, API = "93.184.216.34", "169.254.169.254", "10.96.0.1"


def allowed(objects: list[Object], source: Pod | str, target: Pod | str, port: int) -> bool:
    """Whether a TCP connection is let through; an address stands for what is no pod."""
    return _one_way(objects, "Egress", source, target, port) and _one_way(
        objects, "Ingress", target, source, port
    )


def _one_way(
    objects: list[Object], direction: str, pod: Pod | str, peer: Pod | str, port: int
) -> bool:
    if isinstance(pod, str) or pod in (OPERATOR, PROMETHEUS, STRANGER):
        return True  # not of this namespace: its policies are others' matter
    rules, peers = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    applying = [
        policy["spec"]
        for policy in of_kind(objects, "NetworkPolicy")
        if direction in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], pod.labels)
    ]
    assert applying, f"nothing closes {pod.name}"
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
        kept_out = entry["ipBlock"].get("except", [])
        return inside and not any(address in ipaddress.ip_network(n) for n in kept_out)
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
        pytest.param("generate", "headgroup", 6379, id="a worker joins the head"),
        pytest.param("preprocess", "generate", 31234, id="a stage calls another at any port"),
        pytest.param("headgroup", "encode", 10002, id="the head starts replicas"),
        pytest.param("headgroup", "redis", 6379, id="the head keeps its state in Redis"),
        pytest.param("headgroup", API, 443, id="the autoscaler asks Kubernetes for pods"),
        pytest.param("blip2-weights", INTERNET, 443, id="the job fetches weights"),
        pytest.param(STRANGER, "preprocess", 8000, id="anybody sends requests"),
        pytest.param(OPERATOR, "headgroup", 8265, id="the operator deploys the application"),
        pytest.param(PROMETHEUS, "encode", 8080, id="Prometheus reads Ray's metrics"),
        pytest.param(PROMETHEUS, "preprocess", 9101, id="Prometheus reads HAProxy's metrics"),
        pytest.param("locust-worker", "preprocess", 8000, id="locust sends requests"),
        pytest.param("locust-worker", "locust-master", 5557, id="locust's workers join its master"),
    ],
)
def test_what_has_to_get_through_does(source: Pod | str, target: Pod | str, port: int) -> None:
    assert allowed(all_objects(), *_resolved(source, target), port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        pytest.param(STRANGER, "headgroup", 8265, id="a stranger submits jobs"),
        pytest.param(STRANGER, "headgroup", 10001, id="a stranger connects a Ray client"),
        pytest.param(STRANGER, "generate", 30000, id="a stranger goes past HAProxy"),
        pytest.param(STRANGER, "preprocess", 8404, id="a stranger reads HAProxy's page"),
        pytest.param(STRANGER, "redis", 6379, id="a stranger reads Redis"),
        pytest.param("generate", "redis", 6379, id="a worker reads Redis"),
        pytest.param("locust-worker", "headgroup", 8265, id="locust submits jobs"),
        pytest.param("generate", API, 443, id="a worker talks to Kubernetes"),
        pytest.param("generate", INTERNET, 443, id="a worker talks to the internet"),
        pytest.param("preprocess", INTERNET, 443, id="an image URL is fetched"),
        pytest.param("headgroup", INTERNET, 443, id="the head talks to the internet"),
        pytest.param("blip2-weights", METADATA, 443, id="the job asks the cloud for credentials"),
        pytest.param("redis", INTERNET, 443, id="Redis talks to the internet"),
        pytest.param(PROMETHEUS, "headgroup", 8265, id="Prometheus submits jobs"),
    ],
)
def test_what_must_not_get_through_does_not(
    source: Pod | str, target: Pod | str, port: int
) -> None:
    assert not allowed(all_objects(), *_resolved(source, target), port)


def _resolved(*names: Pod | str) -> list[Pod | str]:
    """Parts of pods' names as those pods; addresses and pods as they are."""
    resolved: list[Pod | str] = []
    for name in names:
        is_pod = isinstance(name, str) and name not in (INTERNET, METADATA, API)
        resolved.append(pod_of(all_objects(), str(name)) if is_pod else name)
    return resolved


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_one_policy_alone_closes_everything(overlay: str) -> None:
    (closed,) = (o for o in build(overlay) if o["metadata"]["name"] == "default-deny")
    for pod in pods(build(overlay)):
        assert not allowed([closed], pod, INTERNET, 443)
        assert not allowed([closed], STRANGER, pod, 8000)


def test_image_urls_are_fetched_where_that_component_is_added_and_from_public_addresses() -> None:
    objects = build("prod") + build("components/image-urls")
    source = pod_of(objects, "preprocess")
    assert allowed(objects, source, INTERNET, 443)
    assert not allowed(objects, source, INTERNET, 22)
    for address in (METADATA, API, "192.168.1.1", "127.0.0.1", "100.100.100.200"):
        assert not allowed(objects, source, address, 443)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_policy_is_about_pods_that_there_are(overlay: str) -> None:
    objects = build(overlay)
    for policy in of_kind(objects, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        assert any(matches(selector, pod.labels) for pod in pods(objects)), policy["metadata"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_may_ask_for_names(overlay: str) -> None:
    objects = build(overlay)
    (policy,) = (p for p in of_kind(objects, "NetworkPolicy") if p["metadata"]["name"] == "dns")
    assert policy["spec"]["podSelector"] == {}
    (rule,) = policy["spec"]["egress"]
    assert {(p["protocol"], p["port"]) for p in rule["ports"]} == {("UDP", 53), ("TCP", 53)}
