"""The kinds of traffic: what each sends, and what it makes of the answers.

A kind is a function of a `Caller`, which sends one request after the other, checks and measures
them. Who calls it and when is not known here: locust's users do, again and again, and arrivals of
an open loop do, once each.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import gevent
import requests

from blip2_serve.client import is_loopback
from load import checks, pictures
from load.checks import Expected, WrongAnswer
from load.pictures import data_url
from load.samples import Sample

TIMEOUT_S = 300.0
CAPTION_TOKENS, ANSWER_TOKENS, LONG_TOKENS = 40, 16, 48
LEAST_TOKENS = 8  # of a stream whose speed means something: a word or two come at once
BURST = 6  # requests for one picture at once

Json = dict[str, Any]


class Sink(Protocol):
    """Where samples go."""

    def __call__(self, sample: Sample) -> None: ...


@dataclass
class _Asked:
    """A request that is being measured."""

    begin: float
    tokens: int = 0
    failure: str = ""


class Caller:
    """Sends requests of one kind, and measures them.

    Latency of the first counts from `due`, when it was to start, whenever it does.
    """

    def __init__(
        self,
        session: requests.Session,
        url: str,
        sink: Sink,
        *,
        seed: int,
        knows_scenes: bool,
        think_s: tuple[float, float] = (0.0, 0.0),
        due: float | None = None,
    ) -> None:
        """`due` in seconds since 1970. Only a server that `knows_scenes` must find the words."""
        self.random = random.Random(seed)
        self.knows_scenes = knows_scenes
        self._session = session
        self._url = url
        self._sink = sink
        self._think_s = think_s
        self._due = due

    def think(self) -> None:
        """As long as a person looks at an answer."""
        gevent.sleep(self.random.uniform(*self._think_s))

    def words(self, right: str) -> str | None:
        return right if self.knows_scenes else None

    def send(self, kind: str, check: Callable[[requests.Response], int], **request: Any) -> bool:
        """POSTs to `path` and measures until `check` has the answer's tokens; whether it is right.

        `check` raises WrongAnswer for a wrong one.
        """
        with self._measured(kind) as asked, self._post(**request) as response:
            asked.tokens = check(response)
        return not asked.failure

    def stream(self, kind: str, expected: Expected, body: Json) -> bool:
        """A streamed chat completion, with what only its reader sees; whether it is right."""
        times: list[float] = []
        answer, usage = "", {}
        with self._measured(kind) as asked:
            for event in self._events({**body, "stream_options": {"include_usage": True}}):
                usage = event.get("usage") or usage
                if piece := _delta(event):
                    times.append(time.time())
                    answer += piece
            checks.text(answer, usage["completion_tokens"], expected)
            asked.tokens = usage["completion_tokens"]
        if asked.failure or not times:
            return not asked.failure
        begin, tokens = asked.begin, asked.tokens
        self._sink(Sample(begin, kind, "ttft", times[0] - begin))
        span = times[-1] - times[0]
        if tokens >= LEAST_TOKENS and span > 0:
            self._sink(Sample(begin, kind, "inter_token", span / (tokens - 1)))
            self._sink(Sample(begin, kind, "tokens_per_s", tokens / (times[-1] - begin)))
        return True

    def hang_up(self, kind: str, body: Json) -> None:
        """Leaves in the middle of a stream, on purpose: right, if it had begun."""
        with self._measured(kind), contextlib.closing(self._events(body)) as events:
            if not any(map(_delta, events)):
                raise WrongAnswer("no text before the end")

    @contextmanager
    def _measured(self, kind: str) -> Iterator[_Asked]:
        """The block's time is the latency of a request that begins now, or was to at `due`."""
        begin, self._due = self._due or time.time(), None
        asked = _Asked(begin)
        try:
            yield asked
        except (WrongAnswer, requests.RequestException, ValueError, LookupError) as error:
            asked.failure = str(error) if isinstance(error, WrongAnswer) else repr(error)
        latency = time.time() - begin
        self._sink(Sample(begin, kind, "latency", latency, asked.tokens, asked.failure))

    def _events(self, body: Json) -> Generator[Json, None, None]:
        """Of a streamed chat completion; closing this leaves it."""
        path, asked = "/v1/chat/completions", {**body, "stream": True}
        with self._post(path, json=asked, stream=True) as response:
            if response.status_code != 200:
                checks.ok(response.status_code, response.content)
            yield from events(response)

    def _post(self, path: str, **request: Any) -> requests.Response:
        return self._session.post(self._url + path, timeout=TIMEOUT_S, **request)


def open_session(host: str) -> requests.Session:
    """Proxies that the environment names are for other machines than this one."""
    session = requests.Session()
    session.trust_env = not is_loopback(host)
    return session


def events(response: requests.Response) -> Iterator[Json]:
    """The JSON of each server-sent event, up to [DONE].

    Raises:
        WrongAnswer: the stream ended without [DONE], or has an error in it.
    """
    for line in response.iter_lines(chunk_size=None):
        field, _, data = line.partition(b":")
        if field != b"data":
            continue  # an empty line ends an event, a line that starts with a colon is a comment
        if data.strip() == b"[DONE]":
            return
        event: Json = json.loads(data)
        if "error" in event:
            raise WrongAnswer(f"an error in the stream: {event['error']}")
        yield event
    raise WrongAnswer("a stream ended without [DONE]")


# -- the kinds -------------------------------------------------------------------------------------


def caption(caller: Caller) -> None:
    """A picture in JSON."""
    expected, picture = _scene(caller)
    body = {"image": data_url(picture), "max_tokens": CAPTION_TOKENS}
    caller.send("caption", _caption_of(expected), path="/v1/caption", json=body)


def upload(caller: Caller) -> None:
    """A picture as a file."""
    expected, picture = _scene(caller)
    caller.send(
        "upload",
        _caption_of(expected),
        path="/v1/caption",
        files={"image": ("picture.png", picture, "image/png")},
        data={"max_tokens": str(CAPTION_TOKENS)},
    )


def question(caller: Caller) -> None:
    """One question, and its short answer."""
    number = caller.random.randrange(pictures.SCENES)
    asked, right = caller.random.choice(pictures.scene(number).questions)
    messages = [_user(asked, _picture(caller, number))]
    _ask(caller, "question", messages, Expected(ANSWER_TOKENS, words=caller.words(right)))


def chat(caller: Caller) -> None:
    """Several turns about one picture; each sends all that was said before."""
    for messages, expected in _turns(caller):
        if not _ask(caller, "chat", messages, expected):
            return
        caller.think()


def streaming_chat(caller: Caller) -> None:
    """The same, read as it is written."""
    for messages, expected in _turns(caller):
        body = {"messages": messages, "max_tokens": expected.max_tokens}
        if not caller.stream("streaming chat", expected, body):
            return
        caller.think()


def long_stream(caller: Caller) -> None:
    """As many tokens as are asked for, whatever they say: what inter-token times are taken from."""
    number = caller.random.randrange(pictures.SCENES)
    body = {
        "messages": [_user("what is it?", _picture(caller, number))],
        "max_tokens": LONG_TOKENS,
        "ignore_eos": True,
    }
    caller.stream("long stream", Expected(LONG_TOKENS, exactly=True), body)


def photograph(caller: Caller) -> None:
    """A picture of some megabytes."""
    drawn = pictures.photograph(caller.random.randrange(pictures.PHOTOGRAPHS))
    data = pictures.unseen(drawn, caller.random)
    caller.send(
        "photograph",
        _caption_of(Expected(CAPTION_TOKENS)),
        path="/v1/caption",
        files={"image": ("photograph.jpg", data, "image/jpeg")},
        data={"max_tokens": str(CAPTION_TOKENS)},
    )


def same_image(caller: Caller) -> None:
    """A picture that nobody has sent before, in several requests at once: one encode is enough."""
    expected, picture = _scene(caller)
    body = {"image": data_url(picture), "max_tokens": CAPTION_TOKENS}
    check = _caption_of(expected)
    gevent.joinall(
        [
            gevent.spawn(caller.send, "same image", check, path="/v1/caption", json=body)
            for _ in range(BURST)
        ]
    )


def bad_input(caller: Caller) -> None:
    """Something that must be refused with a 4xx that says why; anything else is a failure."""
    good = data_url(pictures.png(0))
    path, wrong = caller.random.choice(
        (
            ("/v1/caption", {"image": "data:image/png;base64,AAAA"}),
            ("/v1/caption", {"image": good, "max_tokens": 0}),
            ("/v1/caption", {"image": good, "no_such_parameter": 1}),
            ("/v1/chat/completions", {"messages": []}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "no picture"}]}),
        )
    )

    def check(response: requests.Response) -> int:
        checks.refusal(response.status_code, response.json())
        return 0

    caller.send("bad input", check, path=path, json=wrong)


def hang_up(caller: Caller) -> None:
    """A client that leaves while it is answered."""
    number = caller.random.randrange(pictures.SCENES)
    messages = [_user("what is it?", _picture(caller, number))]
    body = {"messages": messages, "max_tokens": LONG_TOKENS, "ignore_eos": True}
    caller.hang_up("hang-up", body)


Kind = Callable[[Caller], None]
KINDS: dict[str, Kind] = {
    "caption": caption,
    "upload": upload,
    "question": question,
    "chat": chat,
    "streaming chat": streaming_chat,
    "long stream": long_stream,
    "photograph": photograph,
    "same image": same_image,
    "bad input": bad_input,
    "hang-up": hang_up,
}


# -- their parts -----------------------------------------------------------------------------------


def _picture(caller: Caller, number: int) -> bytes:
    return pictures.unseen(pictures.png(number), caller.random)


def _scene(caller: Caller) -> tuple[Expected, bytes]:
    """A picture, and the caption that it should get."""
    number = caller.random.randrange(pictures.SCENES)
    expected = Expected(CAPTION_TOKENS, words=caller.words(pictures.scene(number).caption))
    return expected, _picture(caller, number)


def _turns(caller: Caller) -> Iterator[tuple[list[Json], Expected]]:
    number = caller.random.randrange(pictures.SCENES)
    messages: list[Json] = []
    for asked, right in pictures.scene(number).chat:
        messages.append(_user(asked, None if messages else _picture(caller, number)))
        yield messages, Expected(ANSWER_TOKENS, words=caller.words(right))
        # The right answer stands for what a person would go on with.
        messages.append({"role": "assistant", "content": right})


def _ask(caller: Caller, kind: str, messages: list[Json], expected: Expected) -> bool:
    def check(response: requests.Response) -> int:
        checks.ok(response.status_code, response.content)
        return checks.chat(response.json(), expected)[1]

    body = {"messages": messages, "max_tokens": expected.max_tokens}
    return caller.send(kind, check, path="/v1/chat/completions", json=body)


def _caption_of(expected: Expected) -> Callable[[requests.Response], int]:
    def check(response: requests.Response) -> int:
        checks.ok(response.status_code, response.content)
        return checks.caption(response.json(), expected)

    return check


def _user(text: str, picture: bytes | None) -> Json:
    parts: list[Json] = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
    return {"role": "user", "content": parts}


def _delta(event: Json) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
