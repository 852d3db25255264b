"""k8s/weights.py only lets weights through that have the pinned checksums."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import ModuleType

import pytest

from support.manifests import K8S, load_module

FILES = {"config.json": b"{}", "model.safetensors": b"weights"}
SUMS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@pytest.fixture(scope="module")
def weights() -> ModuleType:
    return load_module(K8S / "weights.py")


class Hub:
    """A fake hub with these files, which records the requests for them."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.requested: list[str] = []

    def __call__(self, model: str, name: str, revision: str, folder: Path) -> None:
        self.requested.append(f"{model} {name} {revision}")
        (folder / name).write_bytes(self.files[name])


def test_files_appear_under_their_revision_once_all_are_verified(
    weights: ModuleType, tmp_path: Path
) -> None:
    hub = Hub(FILES)
    weights.fetch("a/b", "r1", SUMS, tmp_path, hub)
    assert {path.name: path.read_bytes() for path in (tmp_path / "r1").iterdir()} == FILES
    assert hub.requested == ["a/b config.json r1", "a/b model.safetensors r1"]
    assert [path.name for path in tmp_path.iterdir()] == ["r1"]


def test_an_existing_revision_is_not_fetched_again(weights: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "r1").mkdir()
    weights.fetch("a/b", "r1", SUMS, tmp_path, Hub({}))


def test_a_wrong_checksum_is_rejected_and_the_revision_does_not_appear(
    weights: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=r"model\.safetensors of a/b has the checksum"):
        weights.fetch("a/b", "r1", SUMS, tmp_path, Hub({**FILES, "model.safetensors": b"evil"}))
    assert not (tmp_path / "r1").exists()
    assert not (tmp_path / ".r1" / "model.safetensors").exists()
    weights.fetch("a/b", "r1", SUMS, tmp_path, Hub(FILES))  # the next attempt can succeed
    assert (tmp_path / "r1").is_dir()


def test_checksums_are_read_in_sha256sums_format(weights: ModuleType) -> None:
    text = "\n".join(f"  {value}  {name}" for name, value in SUMS.items())
    assert weights.read_sums(text) == SUMS


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("fill-in", id="placeholder"),
        pytest.param("", id="empty"),
        pytest.param(f"{'a' * 63}  config.json", id="checksum too short"),
        pytest.param(f"{'a' * 64}  ../config.json", id="path outside the folder"),
        pytest.param(f"{'a' * 64}  /etc/passwd", id="absolute path"),
    ],
)
def test_malformed_checksums_are_rejected(text: str, weights: ModuleType) -> None:
    with pytest.raises(SystemExit):
        weights.read_sums(text)


def test_waiting_ends_when_the_revision_exists(weights: ModuleType, tmp_path: Path) -> None:
    waiting = threading.Thread(target=weights.wait, args=(tmp_path / "r1", 0.01), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    (tmp_path / "r1").mkdir()
    waiting.join(5)
    assert not waiting.is_alive()
