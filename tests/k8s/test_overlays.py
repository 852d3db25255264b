"""Every overlay builds, and its objects follow the schemas of Kubernetes and the operators."""

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
def test_core_objects_follow_the_schemas_of_kubernetes(overlay: str) -> None:
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
def test_object_names_are_unique(overlay: str) -> None:
    names = [(thing["kind"], name_of(thing)) for thing in build(overlay)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("overlay", BUILT)
def test_everything_is_in_the_namespace(overlay: str) -> None:
    others = [thing for thing in build(overlay) if thing["kind"] != "Namespace"]
    assert {thing["metadata"]["namespace"] for thing in others} == {"blip2"}


@pytest.mark.parametrize(
    ("overlay", "apis"),
    [
        pytest.param("dev-cpu", {"ray.io/v1"}, id="dev-cpu needs KubeRay"),
        pytest.param("gpu", {"ray.io/v1"}, id="gpu needs KubeRay"),
        pytest.param(
            "prod",
            {"ray.io/v1", "monitoring.coreos.com/v1"},
            id="prod needs KubeRay and the Prometheus operator",
        ),
    ],
)
def test_only_documented_custom_resources_are_needed(overlay: str, apis: set[str]) -> None:
    built_in = ("v1", "apps/v1", "batch/v1", "policy/v1", "networking.k8s.io/v1")
    assert {thing["apiVersion"] for thing in build(overlay)} - set(built_in) == apis


def settings(overlay: str) -> tuple[str, Any]:
    folder = K8S / "loadtest" if overlay == "loadtest" else K8S / "overlays" / overlay
    text = (folder / "settings.yaml").read_text()
    return text, yaml.safe_load(text)["spec"]


@pytest.mark.parametrize("overlay", ["dev-cpu", "gpu", "prod", "loadtest"])
def test_every_pod_has_the_image_in_settings(overlay: str) -> None:
    _, values = settings(overlay)
    images = {container["image"] for pod in pods(build(overlay)) for container in pod.containers}
    assert images - {"redis:7.4-bookworm"} == {values["image"]}


@pytest.mark.parametrize("overlay", ["gpu", "prod"])
def test_worker_groups_have_the_sizes_in_settings(overlay: str) -> None:
    _, values = settings(overlay)
    (service,) = (thing for thing in build(overlay) if thing["kind"] == "RayService")
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert {group["groupName"] for group in groups} == set(values["workers"])
    for group in groups:
        expected = values["workers"][group["groupName"]]
        container = group["template"]["spec"]["containers"][0]
        assert container["resources"] == {"requests": expected["size"], "limits": expected["size"]}
        assert 0 < group["minReplicas"] <= group["maxReplicas"]
        assert group["minReplicas"] == expected["minReplicas"]
        assert group["maxReplicas"] == expected["maxReplicas"]


@pytest.mark.parametrize("overlay", ["gpu", "prod"])
def test_the_weights_in_settings_are_fetched_and_served(overlay: str) -> None:
    text, values = settings(overlay)
    expected = {k.upper(): v for k, v in values["weights"].items() if not k.startswith("storage")}
    fetching = [c for pod in pods(build(overlay)) for c in pod.containers if c["name"] == "weights"]
    assert fetching
    for container in fetching:
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert {name: given[name] for name in expected} == expected
    assert f"model: /weights/{values['weights']['revision']}\n" in text
