"""References between objects are consistent: names, ports, selectors, times and sizes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from blip2_serve.app import SHUTDOWN_MARGIN_S
from blip2_serve.config import AppConfig
from blip2_serve.environment import of_haproxy, of_server
from support.manifests import (
    K8S,
    OVERLAYS,
    Object,
    Pod,
    build,
    build_folder,
    matches,
    name_of,
    of_kind,
    pods,
    ray_environment,
    ray_service,
    serve_config,
)

LOADTEST = K8S.parent / "loadtest"
BUILT = (*OVERLAYS, "loadtest")
IN_EVERY_NAMESPACE = {"kube-root-ca.crt": {"ca.crt"}}


def values_of(thing: Any, key: str) -> Iterator[Any]:
    """Yields every value of this key, at any depth."""
    if isinstance(thing, dict):
        for name, value in thing.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(thing, list):
        for value in thing:
            yield from values_of(value, key)


@pytest.mark.parametrize("overlay", BUILT)
def test_containers_mount_all_volumes_of_their_pod(overlay: str) -> None:
    for pod in pods(build(overlay)):
        mounted = {
            mount["name"] for mount in values_of(pod.containers, "volumeMounts") for mount in mount
        }
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])}
        claimed = {"data"} if pod.name.startswith("StatefulSet") else set()
        assert mounted == volumes | claimed, pod.name


@pytest.mark.parametrize("overlay", BUILT)
def test_referenced_configmaps_claims_and_accounts_exist(overlay: str) -> None:
    objects = build(overlay)
    configmaps = {name_of(o): set(o["data"]) for o in of_kind(objects, "ConfigMap")}
    configmaps |= IN_EVERY_NAMESPACE
    claims = {name_of(o) for o in of_kind(objects, "PersistentVolumeClaim")}
    accounts = {name_of(o) for o in of_kind(objects, "ServiceAccount")}
    used = {"configmaps": 0, "accounts": 0}
    for pod in pods(objects):
        for reference in values_of(pod.spec, "configMapRef"):
            assert reference["name"] in configmaps, pod.name
            used["configmaps"] += 1
        for volume in values_of(pod.spec, "configMap"):
            keys = {item["key"] for item in volume["items"]}
            assert keys <= configmaps[volume["name"]], pod.name
        for claim in values_of(pod.spec, "persistentVolumeClaim"):
            assert claim["claimName"] in claims, pod.name
        if account := pod.spec.get("serviceAccountName"):
            assert account in accounts, pod.name
            used["accounts"] += 1
    assert used["accounts"]
    assert used["configmaps"] or overlay == "loadtest"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_readme_documents_every_secret(overlay: str) -> None:
    readme = (K8S / "README.md").read_text()
    objects = build(overlay)
    secrets = {(r["name"], r["key"]) for r in values_of(objects, "secretKeyRef")}
    for options in values_of(objects, "authOptions"):
        if "secretName" in options:
            secrets.add((options["secretName"], "auth_token"))
    for name, key in secrets:
        assert re.search(rf"create secret generic {name} [^\n]*--from-literal={key}=", readme), name
    for ingress in of_kind(objects, "Ingress"):
        for tls in ingress["spec"]["tls"]:
            assert f"create secret tls {tls['secretName']}" in readme


@pytest.mark.parametrize("overlay", BUILT)
def test_services_match_the_ports_of_their_pods(overlay: str) -> None:
    objects = build(overlay)
    for service in of_kind(objects, "Service"):
        selected = [
            p
            for p in pods(objects)
            if matches({"matchLabels": service["spec"]["selector"]}, p.labels)
        ]
        assert selected, name_of(service)
        for port in service["spec"]["ports"]:
            assert all(pod.ports[port["targetPort"]] == port["port"] for pod in selected)


def test_the_ingress_uses_kuberays_service() -> None:
    objects = build("prod")
    (ingress,) = of_kind(objects, "Ingress")
    (backend,) = values_of(ingress, "backend")
    service = ray_service(objects)
    assert backend["service"]["name"] == f"{name_of(service)}-serve-svc"
    # KubeRay copies that service's port from the head container's port named "serve".
    (head,) = (pod for pod in pods(objects) if pod.labels.get("ray.io/node-type") == "head")
    assert head.ports[backend["service"]["port"]["name"]] == 8000


def test_locust_uses_kuberays_service() -> None:
    service = name_of(ray_service(build("prod")))
    settings = {e["name"]: e.get("value") for e in next(values_of(build("loadtest"), "env"))}
    assert settings["LOCUST_HOST"] == f"http://{service}-serve-svc:8000"
    workers = next(j for j in of_kind(build("loadtest"), "Job") if "worker" in name_of(j))
    assert settings["LOCUST_EXPECT_WORKERS"] == str(workers["spec"]["parallelism"])


def test_locust_pods_share_settings_and_an_existing_scenario() -> None:
    master, worker = values_of(build("loadtest"), "env")
    assert master == worker
    (scenario,) = (e["value"] for e in master if e["name"] == "LOADTEST_SCENARIO")
    assert (LOADTEST / "scenarios" / f"{scenario}.yaml").exists()
    locustfile = (LOADTEST / "locustfile.py").read_text()
    variables = set(re.findall(r'env_var="(\w+)"', locustfile))
    own = {e["name"] for e in master if not e["name"].startswith("LOCUST_")}
    assert own <= variables


def test_prometheus_finds_every_ray_pod_and_its_ports() -> None:
    objects = build("prod")
    (monitor,) = of_kind(objects, "PodMonitor")
    selected = [p for p in pods(objects) if matches(monitor["spec"]["selector"], p.labels)]
    assert len(selected) == 4
    ports = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    assert [[pod.ports[port] for port in ports] for pod in selected] == [[8080, 9101]] * 4


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_pods_keep_the_label_that_kuberays_services_select(overlay: str) -> None:
    for pod in pods(build(overlay)):
        if "ray.io/cluster" in pod.labels:
            assert pod.labels["app.kubernetes.io/name"] == "kuberay"


@pytest.mark.parametrize("overlay", ["prod", "prod-incremental"])
def test_disruption_budgets_allow_draining_a_node(overlay: str) -> None:
    objects = build(overlay)
    groups = {
        group["groupName"]: group["minReplicas"]
        for group in ray_service(objects)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    budgets = of_kind(objects, "PodDisruptionBudget")
    assert {name_of(budget) for budget in budgets} == set(groups)
    for budget in budgets:
        selected = [p for p in pods(objects) if matches(budget["spec"]["selector"], p.labels)]
        assert [pod.labels["ray.io/group"] for pod in selected] == [name_of(budget)]
        # Kubernetes allows nothing else for pods that a custom resource owns.
        assert isinstance(budget["spec"]["minAvailable"], int)
        assert budget["spec"]["minAvailable"] < groups[name_of(budget)]
    assert not any(
        matches(budget["spec"]["selector"], pod.labels)
        for budget in build_budgets("gpu") + build_budgets("dev-cpu")
        for pod in pods(objects)
    )


def build_budgets(overlay: str) -> list[Object]:
    return of_kind(build(overlay), "PodDisruptionBudget")


def test_pods_of_each_group_in_prod_are_spread() -> None:
    workers = [p for p in pods(build("prod")) if p.labels.get("ray.io/node-type") == "worker"]
    assert len(workers) == 3
    for pod in workers:
        spread = pod.spec["topologySpreadConstraints"]
        assert {s["topologyKey"] for s in spread} == {
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        }
        assert all(matches(s["labelSelector"], pod.labels) for s in spread)


@pytest.mark.parametrize("overlay", ["gpu", "prod"])
def test_only_pods_with_gpus_go_to_gpu_nodes(overlay: str) -> None:
    workers = [p for p in pods(build(overlay)) if p.labels.get("ray.io/node-type") == "worker"]
    for pod in workers:
        has_gpu = "nvidia.com/gpu" in pod.spec["containers"][0]["resources"]["limits"]
        assert has_gpu == (pod.labels["ray.io/group"] != "preprocess")
        tolerated = {toleration["key"] for toleration in pod.spec.get("tolerations", [])}
        assert tolerated == ({"nvidia.com/gpu"} if has_gpu else set())
        products = [*values_of(pod.spec.get("affinity", {}), "values")]
        assert bool(products and products[0]) == has_gpu


# -- times and sizes -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_shutdown_timeouts_exceed_the_request_timeout(overlay: str) -> None:
    objects, config = build(overlay), serve_config(overlay)
    service = ray_service(objects)["spec"]
    (application,) = config["applications"]
    request = AppConfig.model_validate(application["args"]).request_timeout_s
    assert config["http_options"]["request_timeout_s"] == request
    assert "deployments" not in application  # whose timeouts would replace those of `app.build`
    assert request < service["rayClusterDeletionDelaySeconds"]
    ray_pods = [pod for pod in pods(objects) if "ray.io/cluster" in pod.labels]
    assert len(ray_pods) > 1
    for pod in ray_pods:
        drain = drain_s(objects, pod)
        assert request + SHUTDOWN_MARGIN_S < drain
        assert drain < pod.spec["terminationGracePeriodSeconds"]
        assert not [*values_of(pod.spec, "preStop")]  # `ray stop` would cut off running requests


def drain_s(objects: list[Object], pod: Pod) -> float:
    """Seconds that a Ray pod may drain: its own, or those of all nodes."""
    own = {entry["name"]: entry.get("value") for entry in pod.spec["containers"][0].get("env", [])}
    name = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    return float(own.get(name) or ray_environment(objects)[name])


@pytest.mark.parametrize("overlay", ["dev-cpu", "gpu"])
def test_a_pod_that_nothing_stands_in_for_drains_for_half_a_minute(overlay: str) -> None:
    objects = build(overlay)
    workers = [p for p in pods(objects) if p.labels.get("ray.io/node-type") == "worker"]
    assert workers
    assert {drain_s(objects, pod) for pod in workers} == {30}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_upgrade_takes_gpus_twice_for_three_minutes_at_most(overlay: str) -> None:
    objects = build(overlay)
    delay = ray_service(objects)["spec"]["rayClusterDeletionDelaySeconds"]
    workers = [p for p in pods(objects) if p.labels.get("ray.io/node-type") == "worker"]
    assert all(delay + drain_s(objects, pod) <= 180 for pod in workers)


def test_the_ingress_allows_the_applications_sizes_and_timeouts() -> None:
    (ingress,) = of_kind(build("prod"), "Ingress")
    annotations = ingress["metadata"]["annotations"]
    largest = AppConfig().ingress.max_body_bytes
    request = serve_config("prod")["http_options"]["request_timeout_s"]
    sizes = [v for k, v in annotations.items() if "body-size" in k]
    assert [int(size.removesuffix("m")) << 20 for size in sizes] == [largest] * 2
    timeouts = [v for k, v in annotations.items() if "timeout" in k]
    assert len(timeouts) == 4
    assert all(int(timeout.removesuffix("s")) > request for timeout in timeouts)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_haproxy_is_set_up_as_on_one_machine(overlay: str) -> None:
    folder = Path("/f")
    here = of_haproxy(folder, folder / "haproxy", range(20_000, 20_100)).defaults
    there = ray_environment(build(overlay))
    shared = {name for name in here if name.startswith("RAY_SERVE_HAPROXY_") and name in there}
    assert len(shared) == 3  # ports and paths are one machine's
    assert {name: here[name] for name in shared} == {name: there[name] for name in shared}
    assert (
        there["RAY_worker_niceness"]
        == of_server(AppConfig(), local=True, folder=folder).defaults["RAY_worker_niceness"]
    )
    assert there["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == there["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_messages_between_stages_may_be_as_large_as_requests(overlay: str) -> None:
    config = AppConfig.model_validate(serve_config(overlay)["applications"][0]["args"])
    limit = int(ray_environment(build(overlay))["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])
    assert limit > max(config.ingress.max_body_bytes, config.ingress.images.max_bytes)


# -- rights ----------------------------------------------------------------------------------------


def security_violations(pod: Pod) -> list[str]:
    """Lists violations of the Pod Security Standard "restricted" and of this project's rules."""
    own = pod.spec.get("securityContext", {})
    violations = [key for key in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(key)]
    violations += [v["name"] for v in pod.spec.get("volumes", []) if "hostPath" in v]
    if not own.get("runAsNonRoot") or not own.get("runAsUser"):
        violations.append("may run as root")
    if own.get("seccompProfile") != {"type": "RuntimeDefault"}:
        violations.append("no seccomp profile")
    for container in pod.containers:
        context = container.get("securityContext", {})
        if (
            context.get("allowPrivilegeEscalation") is not False
            or context.get("capabilities") != {"drop": ["ALL"]}
            or context.get("readOnlyRootFilesystem") is not True
            or context.keys() & {"privileged", "runAsUser", "seccompProfile"}
        ):
            violations.append(f"{container['name']}: {context}")
        if not container["resources"].get("requests") or not container["resources"].get("limits"):
            violations.append(f"{container['name']} has no requests or no limits")
    return violations


@pytest.mark.parametrize("overlay", BUILT)
def test_every_pod_meets_restricted_pod_security(overlay: str) -> None:
    objects = build(overlay)
    for namespace in of_kind(objects, "Namespace"):
        labels = namespace["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert {pod.name: security_violations(pod) for pod in pods(objects)} == {
        pod.name: [] for pod in pods(objects)
    }


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ("dev-cpu", set()),
        ("gpu", {"autoscaler"}),
        ("prod", {"autoscaler"}),
        ("prod-incremental", {"autoscaler"}),
        ("loadtest", set()),
    ],
)
def test_only_the_autoscaler_has_a_token_for_kubernetes(overlay: str, expected: set[str]) -> None:
    objects = build(overlay)
    for account in of_kind(objects, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert not of_kind(objects, "Role") + of_kind(objects, "ClusterRole")
    holders = set()
    for pod in pods(objects):
        assert pod.spec["automountServiceAccountToken"] is False, pod.name
        tokens = {v["name"] for v in pod.spec.get("volumes", []) if "projected" in v}
        for container in pod.containers:
            if tokens & {mount["name"] for mount in container.get("volumeMounts", [])}:
                holders.add(container["name"])
    assert holders == expected


@pytest.mark.parametrize("overlay", ["gpu", "prod", "prod-incremental"])
def test_the_autoscaler_is_v2_and_pods_are_not_restarted(overlay: str) -> None:
    cluster = ray_service(build(overlay))["spec"]["rayClusterConfig"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert all(
        "restartPolicy" not in p.spec for p in pods(build(overlay)) if "ray.io/group" in p.labels
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_requires_a_token(overlay: str) -> None:
    options = ray_service(build(overlay))["spec"]["rayClusterConfig"]["authOptions"]
    assert options["mode"] == "token"


def test_upgrades_switch_clusters_at_once_or_in_steps() -> None:
    strategies = [
        ray_service(build(o))["spec"]["upgradeStrategy"] for o in ("prod", "prod-incremental")
    ]
    assert strategies[0] == {"type": "NewCluster"}
    assert strategies[1]["type"] == "NewClusterWithIncrementalUpgrade"
    options = strategies[1]["clusterUpgradeOptions"]
    assert options["gatewayClassName"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    # KubeRay only accepts this strategy if the cluster can grow and shrink.
    cluster = ray_service(build("prod-incremental"))["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_api_keys_component_mounts_them_where_the_readme_says(
    overlay: str, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(K8S, tmp_path / "k8s"))
    file = copy / "overlays" / overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text())
    kustomization.setdefault("components", []).append("../../components/api-keys")
    file.write_text(yaml.safe_dump(kustomization))

    groups = [p for p in pods(build_folder(file.parent)) if "ray.io/group" in p.labels]
    (ingress,) = (p for p in groups if p.labels["ray.io/group"] in ("all", "preprocess"))
    (volume,) = (v for v in ingress.spec["volumes"] if "secret" in v)
    (mounts,) = values_of(ingress.spec["containers"], "volumeMounts")
    (mount,) = (m for m in mounts if m["name"] == volume["name"])
    assert mount["readOnly"]
    assert not [v for p in groups if p is not ingress for v in p.spec["volumes"] if "secret" in v]
    readme = " ".join((K8S / "README.md").read_text().split())
    name = volume["secret"]["secretName"]
    assert f"create secret generic {name} --from-file=keys.yaml" in readme
    assert f"access: {{keys_file: {mount['mountPath']}/keys.yaml}}" in readme
