"""Environment variables: whose values win, who gets which, what a replica makes of them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle, serve

from blip2_serve import environment
from blip2_serve.config import AppConfig
from blip2_serve.environment import Variables, applied, of_haproxy, of_server, short_hops
from blip2_serve.stages.encoder import Encoder
from blip2_serve.stages.generator import Generator

FOLDER = Path("/f")


def test_the_operators_values_win_over_defaults_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_A", "operator's")
    monkeypatch.setenv("OWN_B", "operator's")
    monkeypatch.delenv("OWN_C", raising=False)
    before = dict(os.environ)
    with applied(Variables({"OWN_A": "ours", "OWN_C": "ours"}, {"OWN_B": "ours"})):
        assert [os.environ[f"OWN_{name}"] for name in "ABC"] == ["operator's", "ours", "ours"]
    assert dict(os.environ) == before


def test_the_environment_is_as_before_after_a_failure() -> None:
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), applied(Variables({"OWN_A": "ours"})):
        raise ZeroDivisionError
    assert dict(os.environ) == before


def test_stages_use_no_proxy_whatever_the_operator_has_set() -> None:
    assert of_server(AppConfig(), local=False, folder=FOLDER).overrides == {"grpc_proxy": ""}
    assert of_server(AppConfig(), local=True, folder=FOLDER).overrides["grpc_proxy"] == ""
    assert environment.REPLICA["grpc_proxy"] == ""


def test_a_local_ray_asks_for_a_token_and_one_that_runs_already_goes_by_its_own_rules() -> None:
    local, foreign = (
        of_server(AppConfig(), local=local, folder=FOLDER).defaults for local in (True, False)
    )
    assert local["RAY_AUTH_MODE"] == "token"
    assert foreign["RAY_AUTH_MODE"] == "disabled"
    assert local.items() >= short_hops(AppConfig()).items()
    assert "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH" in local.keys() - foreign.keys()
    assert not foreign.keys() & short_hops(AppConfig()).keys()


def test_the_operators_haproxy_is_started_by_way_of_the_command_of_the_server() -> None:
    variables = of_haproxy(FOLDER, Path("/f/haproxy"), range(20_000, 20_100))
    assert variables.overrides == {"RAY_SERVE_HAPROXY_BINARY_PATH": "/f/haproxy"}
    assert "20000" not in variables.defaults.values()  # the claim on the ports


def test_only_replicas_of_a_server_on_one_machine_listen_on_loopback() -> None:
    local, foreign = (
        of_server(AppConfig(), local=local, folder=FOLDER).overrides for local in (True, False)
    )
    assert environment.LOOPBACK_ONLY in local.keys() - foreign.keys()


def test_a_message_may_hold_the_largest_body_and_the_largest_image() -> None:
    def limit(**ingress: Any) -> int:
        config = AppConfig.model_validate({"ingress": ingress})
        return int(short_hops(config)["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])

    assert limit() > 64 << 20
    assert limit(images={"max_bytes": 100 << 20}) > 100 << 20


# What a replica does before it computes: Ray unpickles the class of its stage.
COMPUTES = """
import pickle, sys
pickle.loads(bytes.fromhex(sys.argv[1]))
import torch
torch.set_num_threads(2)
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
"""

needs_intel_openmp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="Intel's OpenMP exists for Linux on x86 only",
)


def stderr_of(code: str, *args: str, **more: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | environment.REPLICA | more,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stderr


@pytest.mark.slow
@needs_intel_openmp
@pytest.mark.parametrize("stage", [Encoder, Generator])
def test_a_replica_computes_with_the_openmp_that_gives_way(stage: Any) -> None:
    pickled = cloudpickle.dumps(serve.deployment(stage).func_or_class).hex()
    # With KMP_VERSION, Intel's OpenMP prints its name as soon as it is used.
    printed = stderr_of(COMPUTES, pickled, KMP_VERSION="1", KMP_SETTINGS="1")
    assert "Intel(R) OMP" in printed
    assert "KMP_BLOCKTIME=100us" in printed


def test_a_process_that_is_no_replica_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_intel_openmp", lambda: pytest.fail("it was looked for"))
    monkeypatch.delenv("BLIP2_SERVE_REPLICA", raising=False)
    environment.prepare_replica()


def test_threads_sleep_where_there_is_no_openmp_that_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment, "_intel_openmp", lambda: None)
    monkeypatch.setenv("BLIP2_SERVE_REPLICA", "1")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment.prepare_replica()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_nothing_of_the_building_machine_is_sent_to_the_nodes() -> None:
    assert not any("/" in value for value in environment.REPLICA.values())
    assert "LD_PRELOAD" not in environment.REPLICA  # a user's own stays


@needs_intel_openmp
def test_the_openmp_of_a_folder_with_a_blank_is_loaded(tmp_path: Path) -> None:
    library = environment._intel_openmp()
    assert library is not None
    copy = tmp_path / "my dir" / library.name
    copy.parent.mkdir()
    shutil.copy(library, copy)
    code = f"""
from pathlib import Path
from blip2_serve import environment
environment._intel_openmp = lambda: Path({str(copy)!r})
environment.prepare_replica()
assert {str(copy)!r} in open("/proc/self/maps").read()
"""
    assert stderr_of(code) == ""
