"""The overlay dev-cpu: its serveConfigV2, deployed and changed on nodes as large as its pods."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

from blip2_serve.demo import scenes
from support.cluster import RayNodes, ray_nodes
from support.images import data_url
from support.manifests import build, ray_environment, ray_service, serve_config
from support.server import wait_until

pytestmark = pytest.mark.long
SCENE = scenes.sample(9_001)
REPLACED_WITHIN_S = 180


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    objects = build("dev-cpu")
    environment = ray_environment(objects)
    # HAProxy's script is in the image, and its ports may be taken here: see `make image-test`.
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"):
        del environment[name]
    (group,) = ray_service(objects)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = _get_ray_resources_from_group_spec(group, False)
    pools = {name: amount for name, amount in pod.items() if name not in ("CPU", "memory")}
    with ray_nodes(environment) as nodes:
        nodes.add(pod["CPU"], pools)
        nodes.deploy(serve_config("dev-cpu"))
        nodes.until_ready()
        yield nodes


def test_the_application_of_its_serve_config_captions_a_picture(nodes: RayNodes) -> None:
    assert ask(nodes) == SCENE.caption


@pytest.mark.soak
def test_it_answers_while_serve_is_changed(nodes: RayNodes) -> None:
    wait_until(lambda: len(running(nodes)) == 5)
    before = running(nodes)
    changed = serve_config("dev-cpu")
    changed["applications"][0]["args"]["generator"]["stream_events_per_s"] = 400
    nodes.deploy(changed)
    answers = []

    def replaced() -> bool:
        answers.append(ask(nodes))
        return not before & running(nodes)

    # It ends only if the pod has room for new replicas beside the old ones.
    wait_until(replaced, REPLACED_WITHIN_S)
    wait_until(lambda: len(running(nodes)) == len(before))
    answers.append(ask(nodes))
    assert {*answers} == {SCENE.caption}


def ask(nodes: RayNodes) -> str:
    """The caption, or the error."""
    body = {"image": data_url(SCENE.image)}
    answer = httpx.post(f"{nodes.url}/v1/caption", json=body, timeout=60)
    if not answer.is_success:
        return f"{answer.status_code} {answer.text}"
    caption: str = answer.json()["data"][0]["caption"]
    return caption


def running(nodes: RayNodes) -> set[int]:
    """The processes of all replicas."""
    stages = ("Ingress", "Preprocessor", "Encoder", "Generator")
    return {replica["pid"] for stage in stages for replica in nodes.replicas(stage)}
