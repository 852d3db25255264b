"""Every overlay builds, and the objects are what Kubernetes and the operators take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from support.manifests import K8S, OVERLAYS, Object, build, name_of, pods, validator

BUILT = (*OVERLAYS, "loadtest")
KUBERNETES = "1.36"
CUSTOM = ("ray.io/", "monitoring.coreos.com/")


def is_custom(thing: Object) -> bool:
    return thing["apiVersion"].startswith(CUSTOM)


@pytest.mark.parametrize("overlay", BUILT)
def test_core_objects_follow_kubernetes_schemas(overlay: str) -> None:
    objects = [thing for thing in build(overlay) if not is_custom(thing)]
    assert objects
    for thing in objects:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_custom_resources_follow_their_schemas(overlay: str) -> None:
    validate = validator()
    crds = validate.load_crds(Path(validate.__file__).parent)
    objects = [thing for thing in build(overlay) if is_custom(thing)]
    assert objects
    for thing in objects:
        assert [*validate.errors(thing, crds, KUBERNETES)] == [], thing["kind"]


@pytest.mark.parametrize("overlay", BUILT)
def test_no_two_objects_have_one_name(overlay: str) -> None:
    names = [(thing["kind"], name_of(thing)) for thing in build(overlay)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("overlay", BUILT)
def test_everything_is_in_the_namespace(overlay: str) -> None:
    others = [thing for thing in build(overlay) if thing["kind"] != "Namespace"]
    assert {thing["metadata"]["namespace"] for thing in others} == {"blip2"}


@pytest.mark.parametrize(
    ("overlay", "apis"),
    [
        pytest.param("dev-cpu", {"ray.io/v1"}, id="dev-cpu needs KubeRay only"),
        pytest.param("gpu", {"ray.io/v1"}, id="gpu needs KubeRay only"),
        pytest.param(
            "prod", {"ray.io/v1", "monitoring.coreos.com/v1"}, id="prod Prometheus' operator, too"
        ),
    ],
)
def test_no_other_custom_resources_are_needed(overlay: str, apis: set[str]) -> None:
    built_in = ("v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1")
    assert {thing["apiVersion"] for thing in build(overlay)} - set(built_in) == apis


def settings(overlay: str) -> tuple[str, Any]:
    folder = K8S / "loadtest" if overlay == "loadtest" else K8S / "overlays" / overlay
    text = (folder / "settings.yaml").read_text()
    return text, yaml.safe_load(text)["spec"]


@pytest.mark.parametrize("overlay", ["dev-cpu", "gpu", "prod", "loadtest"])
def test_the_image_in_settings_is_that_of_every_pod(overlay: str) -> None:
    _, values = settings(overlay)
    images = {container["image"] for pod in pods(build(overlay)) for container in pod.containers}
    assert images - {"redis:7.4-bookworm"} == {values["image"]}


@pytest.mark.parametrize("overlay", ["gpu", "prod"])
def test_the_sizes_in_settings_are_those_of_the_worker_groups(overlay: str) -> None:
    _, values = settings(overlay)
    (service,) = (thing for thing in build(overlay) if thing["kind"] == "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert {group["groupName"] for group in groups} == set(values["workers"])
    for group in groups:
        wanted = values["workers"][group["groupName"]]
        container = group["template"]["spec"]["containers"][0]
        assert container["resources"] == {"requests": wanted["size"], "limits": wanted["size"]}
        assert 0 < group["minReplicas"] <= group["maxReplicas"]
        assert group["minReplicas"] == wanted["minReplicas"]
        assert group["maxReplicas"] == wanted["maxReplicas"]


@pytest.mark.parametrize("overlay", ["gpu", "prod"])
def test_the_weights_in_settings_are_those_that_are_fetched_and_served(overlay: str) -> None:
    text, values = settings(overlay)
    wanted = {k.upper(): v for k, v in values["weights"].items() if not k.startswith("storage")}
    fetching = [c for pod in pods(build(overlay)) for c in pod.containers if c["name"] == "weights"]
    assert fetching
    for container in fetching:
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert {name: given[name] for name in wanted} == wanted
    assert f"model: /weights/{values['weights']['revision']}\n" in text
