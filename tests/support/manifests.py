"""Builds the manifests in k8s/ with kustomize, and derives the pods that result from them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("dev-cpu", "gpu", "prod", "prod-incremental")

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod in the cluster, with the labels and containers that KubeRay adds."""

    name: str
    labels: dict[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {
            port["name"]: port["containerPort"]
            for container in self.containers
            for port in container.get("ports", [])
        }


def build(overlay: str) -> list[Object]:
    """Builds the objects of an overlay, given its name, or of another folder in k8s/."""
    folder = K8S / "overlays" / overlay if overlay in OVERLAYS else K8S / overlay
    return copy.deepcopy(build_folder(folder))


@functools.cache
def build_folder(folder: Path) -> list[Object]:
    """Builds the objects of a folder with a kustomization."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed, which builds the overlays")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [*yaml.safe_load_all(done.stdout)]


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [found for found in objects if found["kind"] == kind]


def ray_service(objects: list[Object]) -> Object:
    (service,) = of_kind(objects, "RayService")
    return service


def serve_config(overlay: str) -> Object:
    """Returns the overlay's serveConfigV2, parsed."""
    config: Object = yaml.safe_load(ray_service(build(overlay))["spec"]["serveConfigV2"])
    return config


def ray_environment(objects: list[Object]) -> dict[str, str]:
    """Returns the environment of Ray's pods."""
    (found,) = (o for o in of_kind(objects, "ConfigMap") if "ray-environment" in name_of(o))
    environment: dict[str, str] = found["data"]
    return environment


def name_of(thing: Object) -> str:
    name: str = thing["metadata"]["name"]
    return name


def pods(objects: list[Object]) -> list[Pod]:
    """Returns one pod of each kind that the objects create."""
    found = []
    for thing in objects:
        if thing["kind"] in ("Job", "StatefulSet", "Deployment"):
            template = thing["spec"]["template"]
            labels = template["metadata"]["labels"]
            found.append(Pod(f"{thing['kind']} {name_of(thing)}", labels, template["spec"]))
        elif thing["kind"] == "RayService":
            found.extend(_ray_pods(thing))
    return found


def _ray_pods(service: Object) -> list[Pod]:
    cluster = service["spec"]["rayClusterConfig"]
    groups = [{**cluster["headGroupSpec"], "groupName": "headgroup"}, *cluster["workerGroupSpecs"]]
    found = []
    for group in groups:
        is_head = group["groupName"] == "headgroup"
        labels = {
            "app.kubernetes.io/name": "kuberay",
            **group["template"]["metadata"]["labels"],
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": "head" if is_head else "worker",
            "ray.io/group": group["groupName"],
            "ray.io/cluster": f"{name_of(service)}-abcde",
        }
        spec = copy.deepcopy(group["template"]["spec"])
        if is_head and cluster.get("enableInTreeAutoscaling"):
            image = spec["containers"][0]["image"]
            autoscaler = {"name": "autoscaler", "image": image, **cluster["autoscalerOptions"]}
            spec["containers"].append(autoscaler)
        found.append(Pod(f"RayService {group['groupName']}", labels, spec))
    return found


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector matches these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", []):
        is_in = labels.get(rule["key"]) in rule["values"]
        if rule["operator"] not in ("In", "NotIn") or is_in != (rule["operator"] == "In"):
            return False
    return True


def validator() -> ModuleType:
    """Loads a validator of custom resources from beside this checkout; its folder has schemas."""
    script = ROOT.parent / "shared" / "k8s" / "validate.py"
    if not script.exists():
        pytest.skip(f"there is no {script} to validate custom resources with")
    return load_module(script)


def load_module(script: Path) -> ModuleType:
    """Imports a script that is in no package."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
