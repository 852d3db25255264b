"""The page at /metrics: merges the nodes' pages, drops foreign metrics, marks missing nodes."""

from __future__ import annotations

import asyncio
import itertools
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from blip2_serve.observe.metrics_page import MetricsPage, render

ONE = """\
# HELP ray_blip2_requests_total HTTP requests answered.
# TYPE ray_blip2_requests_total counter
ray_blip2_requests_total{route="/v1/caption",WorkerId="a"} 3.0
# HELP ray_blip2_queue_time_seconds Waiting.
# TYPE ray_blip2_queue_time_seconds histogram
ray_blip2_queue_time_seconds_bucket{le="0.1",stage="encoder"} 1.0
ray_blip2_queue_time_seconds_bucket{le="+Inf",stage="encoder"} 2.0
ray_blip2_queue_time_seconds_count{stage="encoder"} 2.0
ray_blip2_queue_time_seconds_sum{stage="encoder"} 1.5
# HELP ray_node_cpu_count CPUs.
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count 2.0
# HELP ray_serve_deployment_replica_healthy Tracks healthy replicas.
# TYPE ray_serve_deployment_replica_healthy gauge
ray_serve_deployment_replica_healthy{deployment="Encoder"} 1.0
"""
OTHER = """\
# HELP ray_blip2_requests_total HTTP requests answered.
# TYPE ray_blip2_requests_total counter
ray_blip2_requests_total{route="/v1/caption",WorkerId="b"} 4.0
"""


def samples(page: str) -> dict[str, float]:
    """Values by name and sorted labels."""
    return {
        f"{s.name}{sorted(s.labels.items())}": s.value
        for family in parse(page)
        for s in family.samples
    }


def test_the_pages_of_all_nodes_are_merged() -> None:
    page = render({"a": ONE, "b": OTHER})
    found = samples(page)

    assert found["ray_blip2_requests_total[('WorkerId', 'a'), ('route', '/v1/caption')]"] == 3
    assert found["ray_blip2_requests_total[('WorkerId', 'b'), ('route', '/v1/caption')]"] == 4
    assert found["ray_blip2_queue_time_seconds_bucket[('le', '+Inf'), ('stage', 'encoder')]"] == 2
    assert found["ray_serve_deployment_replica_healthy[('deployment', 'Encoder')]"] == 1
    assert page.count("# TYPE ray_blip2_requests_total counter") == 1


def test_metrics_of_ray_itself_are_left_out() -> None:
    page = render({"a": ONE})

    assert "ray_node_cpu_count" not in page


def test_a_node_that_did_not_answer_is_marked_as_down() -> None:
    page = render({"a": ONE, "b": None})
    found = samples(page)

    assert found["ray_blip2_node_up[('node', 'a')]"] == 1
    assert found["ray_blip2_node_up[('node', 'b')]"] == 0


def test_each_family_is_in_one_piece_under_one_header() -> None:
    renamed = OTHER.replace("answered", "that were answered")
    more = OTHER + ONE
    lines = [line for line in render({"a": ONE, "b": renamed, "c": more}).splitlines() if line]
    families = [
        line.split(" ")[2] if line[0] == "#" else re.split("[{ ]", line)[0] for line in lines
    ]
    stems = [re.sub("_(bucket|count|sum)$", "", name) for name in families]
    pieces = [name for name, _ in itertools.groupby(stems)]

    assert len(set(pieces)) == len(pieces) == 4
    assert len([line for line in lines if line.startswith("# HELP")]) == 4
    assert len([line for line in lines if line.startswith("ray_blip2_requests_total{")]) == 4


def test_odd_characters_in_labels_split_no_line() -> None:
    odd = 'ray_serve_x{a="\x85\u2028{} # HELP"} 1.0'
    page = f"# HELP ray_serve_x Odd.\n# TYPE ray_serve_x gauge\n{odd}\n"

    assert f"{odd}\n" in render({"a": page})


class Exporter(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/silent":
            self.server.released.wait()  # type: ignore[attr-defined]
        self.send_response(500 if self.path == "/broken" else 200)
        self.end_headers()
        if self.path == "/good":
            self.wfile.write(ONE.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def exporter() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Exporter)
    server.released = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()
    thread.join()


async def test_silent_broken_and_missing_nodes_delay_nobody(exporter: str) -> None:
    nodes = {"good": f"{exporter}/good", "broken": f"{exporter}/broken"}
    nodes |= {"silent": f"{exporter}/silent", "gone": "http://127.0.0.1:9/metrics"}
    page = await asyncio.wait_for(MetricsPage().page(nodes, within_s=1), 10)
    found = samples(page)

    answered = {node: found[f"ray_blip2_node_up[('node', '{node}')]"] for node in nodes}
    assert answered == {"good": 1, "broken": 0, "silent": 0, "gone": 0}
    assert found["ray_serve_deployment_replica_healthy[('deployment', 'Encoder')]"] == 1
