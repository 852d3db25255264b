"""A web whose names lead where an attacker likes, served by this process over TLS."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpcore
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PUBLIC = "93.184.216.34"


@dataclass(frozen=True)
class Asked:
    """A request that arrived, with the name of its TLS connection; empty without TLS."""

    path: str
    headers: dict[str, str]  # names in lower case
    server_name: str


# The path of a request -> (status, headers, pieces of the body)
Answer = tuple[int, dict[str, str], Iterable[bytes]]
Site = Callable[[str], Answer]


def image(body: bytes = b"picture", **headers: str) -> Answer:
    return 200, {"Content-Type": "image/png", **headers}, [body]


def redirect(to: str, **headers: str) -> Answer:
    return 302, {"Location": to, **headers}, []


@dataclass
class Web:
    """Names, their addresses at each further look, and all that arrived.

    It is the `Resolve` of a network, and the network below that: connections to any address arrive
    at one server, which notes the address.
    """

    names: dict[str, list[Sequence[str]]] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    _ports: dict[int, int] = field(default_factory=dict)  # of the world -> of this machine

    async def resolve(self, host: str, _: int) -> Sequence[str]:
        """Numeric hosts are themselves; a name has its next answer, of which the last one stays."""
        if host not in self.names:
            return [host]
        answers = self.names[host]
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def network(self) -> httpcore.AsyncNetworkBackend:
        return _Wire(self)


class _Wire(httpcore.AnyIOBackend):
    """Like a socket, it looks a name up itself."""

    def __init__(self, web: Web) -> None:
        self._web = web

    async def connect_tcp(self, host: str, port: int, *args: Any, **more: Any) -> Any:
        (address, *_) = await self._web.resolve(host, port)
        self._web.connected.append(address)
        return await super().connect_tcp("127.0.0.1", self._web._ports[port], *args, **more)


@asynccontextmanager
async def serving(
    site: Site, folder: Path, *names: str
) -> AsyncIterator[tuple[Web, ssl.SSLContext]]:
    """Serves a site by https, with a certificate for these names, and by http.

    Yields also what clients need to trust it.
    """
    web = Web()
    server_side, client_side = _contexts(folder, names)
    seen: dict[Any, str] = {}

    def note_name(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        seen[connection] = name or ""

    server_side.sni_callback = note_name  # type: ignore[assignment]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            path = first.split()[1]
            name = seen.get(writer.get_extra_info("ssl_object"), "")
            web.asked.append(Asked(path, headers, name))
            status, own, body = site(path)
            rest = "".join(f"{key}: {value}\r\n" for key, value in own.items())
            writer.write(f"HTTP/1.1 {status} .\r\nConnection: close\r\n{rest}\r\n".encode())
            for piece in body:
                writer.write(piece)
                await writer.drain()
        except (OSError, EOFError, asyncio.CancelledError):  # the client, or the test, has left
            pass
        finally:
            writer.close()

    async with (
        await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_side) as secure,
        await asyncio.start_server(serve, "127.0.0.1", 0) as plain,
    ):
        for port, server in ((443, secure), (80, plain)):
            web._ports[port] = server.sockets[0].getsockname()[1]
        yield web, client_side


def _contexts(folder: Path, names: Iterable[str]) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's and the client's, of a certificate that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(pem))
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(file)
    return server_side, ssl.create_default_context(cafile=str(file))
