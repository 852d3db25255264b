"""The overlay dev-cpu: its serveConfigV2, deployed on nodes as large as its pods."""

from __future__ import annotations

import httpx
from ray.autoscaler._private.kuberay.autoscaling_config import _get_ray_resources_from_group_spec

from blip2_serve.demo import scenes
from support.cluster import ray_nodes
from support.images import data_url
from support.manifests import build, ray_environment, ray_service, serve_config

SCENE = scenes.sample(9_001)


def test_the_application_of_its_serve_config_captions_a_picture() -> None:
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
        body = {"image": data_url(SCENE.image)}
        answer = httpx.post(f"{nodes.url}/v1/caption", json=body, timeout=60)
    assert answer.status_code == httpx.codes.OK, answer.text
    assert answer.json()["data"][0]["caption"] == SCENE.caption
