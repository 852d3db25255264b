"""HEAD over a real connection."""

from __future__ import annotations

import http.client

import httpx

from support.server import App


def test_curl_i_gets_the_headers_and_the_connection_stays_usable(demo: App) -> None:
    """After parbaked #564. A body that nobody expects would be read as the next answer."""
    url = httpx.URL(demo.url)
    connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
    for path in ("/health", "/ready", "/v1/models", "/v1/models/demo:vqa", "/metrics"):
        answers = []
        for method in ("HEAD", "GET"):
            connection.request(method, url.path + path)
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        assert [status for status, _ in answers] == [200, 200]
        assert answers[0][1] == b""
        assert answers[1][1] != b""
    connection.close()
