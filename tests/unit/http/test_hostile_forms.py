"""Multipart bodies that were made to cost a server memory or time, or to write somewhere else."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from support.fake_backend import FakeBackend, error_of

DISPOSITION = b'Content-Disposition: form-data; name="image"; filename="a"'
END = b"--x--\r\n"


def part(head: bytes = DISPOSITION, body: bytes = b"one") -> bytes:
    return b"--x\r\n" + head + b"\r\n\r\n" + body + b"\r\n"


def named(name: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="image"; filename="%b"' % name


async def upload(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    return await client.post("/v1/caption", content=body, headers=headers)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(b"../../../tmp/blip2-mark", id="CVE-2026-7302"),
        pytest.param(b"/tmp/blip2-mark", id="an absolute path"),
        pytest.param(b"..\\\\blip2-mark", id="backslashes"),
        pytest.param(b"a.php%00.png", id="an escape"),
        pytest.param("ü\u202egnp.exe".encode(), id="not ASCII"),
        pytest.param(b"", id="empty"),
    ],
)
async def test_the_name_of_a_file_means_nothing(
    client: httpx.AsyncClient, name: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    response = await upload(client, part(named(name)) + END)

    assert response.status_code == 200
    assert [*tmp_path.iterdir()] == []
    assert not Path("/tmp/blip2-mark").exists()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(part(DISPOSITION + b"\r\nX: " + b"a" * 2_000_000) + END, id="a long header"),
        pytest.param(part(named(b"a" * 2_000_000)) + END, id="a long name"),
        pytest.param(part(DISPOSITION + b"\r\nX: a" * 200_000) + END, id="CVE-2026-42561"),
        pytest.param(part() * 30_000 + END, id="many files"),
        pytest.param(part(b'Content-Disposition: form-data; name="a"') * 30_000, id="many fields"),
        pytest.param(
            part(b'Content-Disposition: form-data; name="prompt"', b"a" * 2_000_000), id="long text"
        ),
        pytest.param(part(named(b'\\"' * 200_000)) + END, id="many escapes in a name"),
        pytest.param(b"--x\r\n" * 500_000, id="nothing but boundaries"),
        pytest.param(b"\r\n" * 2_000_000, id="nothing but lines"),
        pytest.param(b"a" * 2_000_000 + part() + END, id="a long preamble"),
        pytest.param(b"--x\r\n" + DISPOSITION, id="half a header"),
        pytest.param(b"--x\r\n\r\n\r\none\r\n--x--\r\n", id="a part without headers"),
        pytest.param(END, id="no part"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_a_hostile_form_is_a_400(
    client: httpx.AsyncClient, backend: FakeBackend, body: bytes
) -> None:
    response = await upload(client, body)

    assert response.status_code == 400
    assert len(error_of(response)["message"]) < 100
    assert backend.encoded == []


async def test_a_file_above_a_megabyte_goes_to_the_disk_and_back(
    client: httpx.AsyncClient, backend: FakeBackend
) -> None:
    """Starlette CVE-2025-54121: writing it there held up everybody else."""
    response = await upload(client, part(body=b"a" * 2_000_000) + END)

    assert response.status_code == 200
    assert backend.encoded == [b"a" * 2_000_000]
