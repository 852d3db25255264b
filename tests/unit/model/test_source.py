"""Each stage downloads only the files it needs from the hub, here a small local server."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blip2_serve.model.source import DEMO_FOLDER
from support.background import serving

MODEL = "Salesforce/blip2-opt-2.7b-coco"
COMMIT = hashlib.sha1(b"").hexdigest()
CONFIGURATION = {"config.json", "generation_config.json", "processor_config.json"}
WEIGHTS = {
    "safetensors": {"model.safetensors"},
    "bin": {"pytorch_model-00001-of-00001.bin"},
}
OTHERS = {"README.md", "flax_model.msgpack"}


class Hub(http.server.ThreadingHTTPServer):
    """Serves one repository with the hub's protocol and records the files downloaded from it."""

    def __init__(self, files: set[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = sorted(files)
        self.downloaded: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        api = f"/api/models/{MODEL}"
        if self.path.startswith(f"{api}/tree/"):
            files = [{"type": "file", "path": n, "size": 2, "oid": ""} for n in self.server.files]
            self._answer(json.dumps(files).encode())
            return
        if self.path.startswith(api):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._answer(json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode())
            return
        name = self.path.rpartition("/")[2]
        if self.command == "GET" and "/resolve/" in self.path:
            self.server.downloaded.add(name)
        path = DEMO_FOLDER / name
        self._answer(path.read_bytes() if path.exists() else b"{}")

    do_HEAD = do_GET  # noqa: N815 (the base class's name)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("etag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("x-repo-commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=WEIGHTS)
def hub(request: Any) -> Iterator[Hub]:
    weights: set[str] = WEIGHTS[request.param]
    hub = Hub(CONFIGURATION | weights | OTHERS)
    with serving(hub):
        yield hub


def run(code: str, hub: Hub, folder: Path) -> None:
    """Runs the code in its own process, because the hub client reads its URL at import."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "http"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "NO_PROXY": "*"}
    subprocess.run([sys.executable, "-c", code, MODEL], env=environment, check=True)


PREPROCESSOR = """
import asyncio, sys
from blip2_serve.config import AppConfig
from blip2_serve.stages.preprocessor import Preprocessor
preprocessor = object.__new__(Preprocessor)
asyncio.run(preprocessor.__init__(AppConfig(model=sys.argv[1])))
"""


@pytest.mark.slow
def test_a_preprocessor_downloads_no_weights(hub: Hub, tmp_path: Path) -> None:
    run(PREPROCESSOR, hub, tmp_path)
    assert hub.downloaded == CONFIGURATION


def test_weights_are_downloaded_in_one_format(hub: Hub, tmp_path: Path) -> None:
    code = "import sys; from blip2_serve.model.source import find_folder; find_folder(sys.argv[1])"
    run(code, hub, tmp_path)
    assert hub.downloaded == {*hub.files} - OTHERS
