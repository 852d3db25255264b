"""The command line: configuration from flags and files, and one line if it cannot start."""

from __future__ import annotations

import copy
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import httpx
import pytest
import torch
from transformers import Blip2Config

from blip2_serve import __version__, preflight
from blip2_serve.cli import main
from blip2_serve.cli.commands import given
from blip2_serve.cli.configuration import merged, read_config
from blip2_serve.cli.running import Launch, loaded
from blip2_serve.cli.terminal import greet
from blip2_serve.config import AppConfig
from blip2_serve.errors import StartupError
from blip2_serve.http.keys import KeyFile
from support.server import free_port

COMMAND = Path(sys.executable).parent / "blip2-serve"


class Up(Protocol):
    def __call__(self, *arguments: str, **environment: str) -> str: ...


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Up:
    """Runs `up` in this process, which has loaded torch already; returns its one error line."""

    def run(*arguments: str, **environment: str) -> str:
        place = [] if "--port" in arguments else ["--port", str(free_port())]
        monkeypatch.setattr(sys, "argv", ["blip2-serve", "up", *arguments, *place])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return the_line(end.value.code, printed.out, printed.err)

    return run


def the_line(code: Any, out: str, err: str) -> str:
    assert code == 2, err
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("blip2-serve: ")
    return lines[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a checkpoint that are read before anything is started."""
    folder = tmp_path_factory.mktemp("checkpoint")
    Blip2Config(
        vision_config={"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1},
        qformer_config={"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1},
        text_config={
            "model_type": "opt",
            "hidden_size": 8,
            "word_embed_proj_dim": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "max_position_embeddings": 64,
        },
        num_query_tokens=4,
        image_token_index=5,
    ).save_pretrained(folder)
    size = {"height": 28, "width": 28}
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": size}))
    return folder


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_in_use_is_an_error_that_names_the_flag(
    up: Up, checkpoint: Path, taken_port: int
) -> None:
    line = up("--model", str(checkpoint), "--device", "cpu", "--port", str(taken_port))

    assert str(taken_port) in line
    assert "--port" in line


def test_a_missing_folder_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    """Runs in its own process, to see that libraries print nothing beside the line."""
    folder = tmp_path / "absent"
    done = subprocess.run(
        [COMMAND, "up", "--model", folder, "--port", str(free_port())],
        capture_output=True,
        text=True,
        check=False,
    )
    line = the_line(done.returncode, done.stdout, done.stderr)

    assert str(folder) in line
    assert "hub id" in line


@pytest.mark.parametrize(
    ("config", "told"),
    [
        pytest.param({"model_type": "bert"}, "bert", id="another model"),
        pytest.param(
            {"model_type": "blip-2", "text_config": {"model_type": "t5"}},
            "only OPT",
            id="another language model",
        ),
    ],
)
def test_a_folder_of_another_model_is_an_error_that_names_it(
    up: Up, tmp_path: Path, config: dict[str, object], told: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = up("--model", str(tmp_path))

    assert str(tmp_path) in line
    assert told in line


def test_a_missing_gpu_is_an_error_that_names_the_flag_for_cpus(up: Up, checkpoint: Path) -> None:
    line = up("--model", str(checkpoint), "--device", "cuda")

    assert "CUDA" in line
    assert "--device cpu" in line


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones(up: Up) -> None:
    line = up("--dtype", "float8")

    assert "dtype" in line
    assert "bfloat16" in line


def test_an_unknown_quantization_is_an_error_that_lists_the_known_ones(up: Up) -> None:
    line = up("--quantize", "int4")

    assert "quantize" in line
    assert "int8" in line


@pytest.mark.parametrize(
    ("below", "above", "result"),
    [
        pytest.param({"a": 1, "b": 2}, {"b": 3, "c": 4}, {"a": 1, "b": 3, "c": 4}, id="one level"),
        pytest.param(
            {"a": {"b": {"c": {"d": 1, "e": 2}}, "f": 3}},
            {"a": {"b": {"c": {"d": 4}}}},
            {"a": {"b": {"c": {"d": 4, "e": 2}}, "f": 3}},
            id="four levels",
        ),
        pytest.param({"a": [1, 2]}, {"a": [3]}, {"a": [3]}, id="a list is replaced as a whole"),
        pytest.param({"a": {"b": 1}}, {"a": None}, {"a": None}, id="a value over a mapping"),
        pytest.param({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}, id="a mapping over a value"),
    ],
)
def test_mappings_are_merged_at_every_depth(
    below: dict[str, Any], above: dict[str, Any], result: dict[str, Any]
) -> None:
    before = copy.deepcopy(below)
    assert merged(below, above) == result
    assert below == before


def test_flags_win_over_the_file_and_leave_the_rest_of_it(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "generator: {max_num_seqs: 4}\n"
        "encoder: {max_batch_size: 2}\n"
        "ingress: {feature_cache_entries: 7, images: {max_bytes: 1000, allow_urls: false}}\n"
    )
    flags = {"generator": {"quantize": "int8"}, "ingress": {"images": {"allow_urls": True}}}
    config = read_config(file, flags)

    assert config.generator.quantize == "int8"
    assert config.generator.max_num_seqs == 4
    assert config.encoder.max_batch_size == 2
    assert config.ingress.feature_cache_entries == 7
    assert config.ingress.images.max_bytes == 1000
    assert config.ingress.images.allow_urls


def test_flags_that_are_not_given_leave_no_trace() -> None:
    flags = {"a": None, "b": 0, "c": {"d": {"e": None}}, "f": {"g": "", "h": None}}
    assert given(flags) == {"b": 0, "f": {"g": ""}}


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("- model", id="a list"),
        pytest.param("{model: demo", id="not YAML"),
        pytest.param(None, id="no file"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "config.yaml"
    if text is not None:
        file.write_text(text)

    with pytest.raises(StartupError, match=re.escape(str(file))):
        read_config(file, {})


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("a.example", "http://a.example:8000"),
    ],
)
def test_the_url_of_a_server_can_be_used_on_its_machine(host: str, url: str) -> None:
    assert Launch(AppConfig(), host, 8000).url == url


def test_an_unknown_key_in_the_config_file_is_an_error_that_names_it(
    up: Up, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("generator:\n  max_runing: 4\n")

    assert "generator.max_runing" in up("--config", str(file))


def test_more_positions_than_the_model_has_are_an_error_that_says_how_many_it_has(
    up: Up, checkpoint: Path
) -> None:
    line = up("--model", str(checkpoint), "--device", "cpu", "--max-model-len", "65")

    assert "65" in line
    assert "64" in line


def test_a_host_that_is_not_this_machines_is_an_error_that_names_it(up: Up) -> None:
    assert "192.0.2.1" in up("--host", "192.0.2.1")


def test_a_temporary_folder_that_is_too_long_for_sockets_is_an_error(
    up: Up, tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    line = up(TMPDIR=str(folder))

    assert f"TMPDIR={folder}" in line
    assert "/tmp" in line.removeprefix(str(folder))


def test_a_long_tmpdir_counts_only_where_ray_uses_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 100)))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    preflight.check_temporary_folder()
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(StartupError):
        preflight.check_temporary_folder()


def test_a_file_in_place_of_the_temporary_folder_is_an_error(up: Up, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    assert f"RAY_TMPDIR={file}/ray" in up(RAY_TMPDIR=f"{file}/ray")


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "no-such-host.invalid:6379"])
def test_a_missing_ray_is_an_error_that_names_its_address(
    up: Up, checkpoint: Path, address: str
) -> None:
    assert address in up("--model", str(checkpoint), "--address", address)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blip2_serve", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == __version__


def test_a_key_is_printed_once_and_its_hash_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.yaml"
    arguments = ["keys", "add", "alice", "--file", str(file), "--requests-per-minute", "60"]
    monkeypatch.setattr(sys, "argv", ["blip2-serve", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    found = KeyFile(file).find(capsys.readouterr().out.strip())
    assert found
    assert (found.name, found.requests_per_minute) == ("alice", 60)

    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    assert "same name" in the_line(end.value.code, printed.out, printed.err)


def test_a_file_of_keys_that_cannot_be_read_is_an_error_that_names_it(
    up: Up, tmp_path: Path, checkpoint: Path
) -> None:
    line = up("--api-keys", str(tmp_path / "none.yaml"), "--model", str(checkpoint))

    assert str(tmp_path / "none.yaml") in line


STAGE = {
    "name": "encoder",
    "replicas": {"running": 2, "starting": 1, "stopping": 0},
    "waiting": 3,
    "rate_per_s": 7.25,
    "capacity_per_s": None,
}


def test_while_stages_load_it_says_how_far_they_are() -> None:
    states = {"Encoder": {"RUNNING": 1, "STARTING": 2}, "Generator": {"STARTING": 1}, "Ingress": {}}
    deployments = {
        name: SimpleNamespace(replica_states=replicas) for name, replicas in states.items()
    }
    assert loaded(deployments) == "encoder 1 of 3, generator 0 of 1, ingress 0 of 0"


@pytest.mark.parametrize("keys_file", [None, "keys.yaml"])
def test_how_to_ask_a_server_is_shown_with_the_key_that_it_asks_for(
    keys_file: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert keys_file is None, "it has no key to caption the picture with"
        if request.url.path == "/v1/status":
            return httpx.Response(200, json={"model": "demo", "ready": True, "stages": [STAGE]})
        return httpx.Response(200, json={"data": [{"caption": "a square"}]})

    config = AppConfig.model_validate({"ingress": {"access": {"keys_file": keys_file}}})
    with httpx.Client(transport=httpx.MockTransport(answer), base_url="http://a") as server:
        greet(server, "http://a", config)

    printed = capsys.readouterr().out
    assert ("a square" in printed) is (keys_file is None)
    assert (" 7.2 images/s" in printed) is (keys_file is None)
    assert "open http://a in a browser" in printed
    assert ("Authorization: Bearer $BLIP2_API_KEY" in printed) is (keys_file is not None)


def test_a_server_that_is_busy_at_once_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first clients may be quicker than the greeting."""
    busy = {"error": {"message": "the server is busy"}}
    transport = httpx.MockTransport(lambda _: httpx.Response(429, json=busy))
    with httpx.Client(transport=transport, base_url="http://a") as server:
        greet(server, "http://a", AppConfig())

    assert "is ready: open http://a" in capsys.readouterr().out
