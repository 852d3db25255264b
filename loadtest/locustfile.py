"""Users who ask for captions of drawn pictures, one after the other.

    locust -f loadtest/locustfile.py -H http://127.0.0.1:8000

Every answer is checked: a status of 200 with an empty caption counts as a failure.
"""

from __future__ import annotations

import base64
import io
import itertools
import random

from locust import HttpUser, between, task

from blip2_serve.demo import scenes

PICTURES = 64  # different ones, so that most requests find their image encoded after a while


def _data_url(seed: int) -> str:
    file = io.BytesIO()
    scenes.sample(seed).image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


URLS = [_data_url(seed) for seed in range(PICTURES)]
_users = itertools.count()


class Captioner(HttpUser):
    """Looks at a picture for a moment, then asks for the next one's caption."""

    wait_time = between(0.1, 0.5)

    def on_start(self) -> None:
        self._random = random.Random(next(_users))

    @task
    def caption(self) -> None:
        body = {"image": self._random.choice(URLS), "max_tokens": 40}
        with self.client.post("/v1/caption", json=body, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
                return
            captions = [item.get("caption") for item in response.json()["data"]]
            if not (len(captions) == 1 and captions[0]):
                response.failure(f"no caption in {response.text[:200]}")
