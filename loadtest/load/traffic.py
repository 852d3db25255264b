"""The kinds of traffic: what each sends, and how it checks the answers.

A kind is a function that sends requests through a `Caller`, which measures them. locust's users
repeat a kind; the arrivals of an open loop run it once each.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gevent
import requests

from blip2_serve.client import is_loopback, key_headers
from loadtest import answers
from loadtest.answers import DONE, Expected, WrongAnswer, piece
from loadtest.load import pictures
from loadtest.load.pictures import data_url
from loadtest.load.samples import Sample

TIMEOUT_S = 300.0
CAPTION_TOKENS, ANSWER_TOKENS, LONG_TOKENS = 40, 16, 48
MIN_TIMED_TOKENS = 8  # fewer tokens arrive almost at once, and give no meaningful speed
MAX_TRIES = 10  # of a request that is refused
BURST = 6  # simultaneous requests for one picture
CHAT = "/v1/chat/completions"

Json = dict[str, Any]
Check = Callable[[requests.Response], int]  # returns the answer's tokens, or raises WrongAnswer


@dataclass
class _Pending:
    """A request that is being measured."""

    start: float
    tokens: int = 0
    failure: str = ""


class Caller:
    """Sends requests of one kind and measures them."""

    def __init__(
        self,
        kind: str,
        session: requests.Session,
        url: str,
        sink: Callable[[Sample], None],
        *,
        seed: int,
        knows_scenes: bool,
        think_s: tuple[float, float] = (0.0, 0.0),
        due: float | None = None,
    ) -> None:
        """The first latency counts from `due` (seconds since 1970), whenever it is really sent.

        Captions are compared with the scene's own only if the server `knows_scenes`.
        """
        self.random = random.Random(seed)
        self.knows_scenes = knows_scenes
        self._kind, self._session, self._url, self._sink = kind, session, url, sink
        self._think_s, self._due = think_s, due

    def think(self) -> None:
        """Pauses as a person does who reads an answer."""
        gevent.sleep(self.random.uniform(*self._think_s))

    def words(self, right: str) -> str | None:
        return right if self.knows_scenes else None

    def send(self, check: Check, **request: Any) -> bool:
        """POSTs `request` (requests' arguments) and measures until `check` has passed.

        Returns whether the answer is right.
        """
        with self._measured() as pending, self._post(**request) as response:
            pending.tokens = check(response)
        return not pending.failure

    def insist(self, check: Check, **request: Any) -> None:
        """As `send`, but comes back when a refusal says so; the latency counts all tries."""
        with self._measured() as pending:
            for _ in range(MAX_TRIES):
                with self._post(**request) as response:
                    wait = response.headers.get("Retry-After")
                    if response.status_code not in answers.REFUSALS or wait is None:
                        pending.tokens = check(response)
                        return
                gevent.sleep(float(wait))
            raise WrongAnswer(f"refused {MAX_TRIES} times")

    def ask(self, messages: list[Json], expected: Expected) -> bool:
        """Sends a chat completion. Returns whether the answer is right."""

        def check(response: requests.Response) -> int:
            answers.ok(response.status_code, response.content)
            return answers.chat(response.json(), expected)

        body = {"messages": messages, "max_tokens": expected.max_tokens}
        return self.send(check, path=CHAT, json=body)

    def stream(self, expected: Expected, body: Json) -> bool:
        """Streams a chat completion, and also measures the time of its texts.

        Returns whether the answer is right.
        """
        times: list[float] = []
        answer = ""
        usage: Json = {}
        with self._measured() as pending:
            for event in self._events({**body, "stream_options": {"include_usage": True}}):
                usage = event.get("usage") or usage
                if new := piece(event, "delta"):
                    times.append(time.time())
                    answer += new
            answers.text(answer, usage["completion_tokens"], expected)
            pending.tokens = usage["completion_tokens"]
        if pending.failure or not times:
            return not pending.failure
        start, tokens, span = pending.start, pending.tokens, times[-1] - times[0]
        self._sink(Sample(start, self._kind, "ttft", times[0] - start))
        if tokens >= MIN_TIMED_TOKENS and span > 0:
            self._sink(Sample(start, self._kind, "inter_token", span / (tokens - 1)))
            self._sink(Sample(start, self._kind, "tokens_per_s", tokens / (times[-1] - start)))
        return True

    def hang_up(self, body: Json) -> None:
        """Leaves a stream after its first text, which makes it a success."""
        with self._measured(), contextlib.closing(self._events(body)) as events:
            if not any(piece(event, "delta") for event in events):
                raise WrongAnswer("the stream ended before its first text")

    @contextmanager
    def _measured(self) -> Iterator[_Pending]:
        """Records the block's time as a latency, and its errors as failures."""
        start, self._due = self._due or time.time(), None
        pending = _Pending(start)
        try:
            yield pending
        except WrongAnswer as error:
            pending.failure = str(error)
        except (requests.RequestException, ValueError, LookupError) as error:
            pending.failure = repr(error)
        latency = time.time() - start
        self._sink(Sample(start, self._kind, "latency", latency, pending.tokens, pending.failure))

    def _events(self, body: Json) -> Generator[Json, None, None]:
        """The events of a streamed chat completion. Close the generator to hang up.

        Raises:
            WrongAnswer: an error, or a stream that ends without [DONE].
        """
        with self._post(CHAT, json={**body, "stream": True}, stream=True) as response:
            if response.status_code != 200:
                answers.ok(response.status_code, response.content)
            for line in response.iter_lines(chunk_size=None):
                event = answers.event(line)
                if event is DONE:
                    return
                if event is not None:
                    yield event
        raise WrongAnswer("the stream ended without [DONE]")

    def _post(self, path: str, **request: Any) -> requests.Response:
        return self._session.post(self._url + path, timeout=TIMEOUT_S, **request)


def open_session(host: str) -> requests.Session:
    """A session that reaches loopback addresses directly, whatever proxies the environment sets.

    It sends the environment's API key, if there is one.
    """
    session = requests.Session()
    session.trust_env = not is_loopback(host)
    session.headers.update(key_headers())
    return session


# -- the kinds -------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Caller], None]] = {}


def kind(run: Callable[[Caller], None]) -> Callable[[Caller], None]:
    """Adds a function to KINDS under its name, with blanks for underscores."""
    KINDS[run.__name__.replace("_", " ")] = run
    return run


@kind
def caption(caller: Caller) -> None:
    """Sends a picture in JSON."""
    expected, picture = _scene(caller)
    caller.send(_is_caption(expected), path="/v1/caption", json=_caption_body(picture))


@kind
def insistent_caption(caller: Caller) -> None:
    """Sends a picture in JSON, again and again when Retry-After says so."""
    expected, picture = _scene(caller)
    caller.insist(_is_caption(expected), path="/v1/caption", json=_caption_body(picture))


@kind
def upload(caller: Caller) -> None:
    """Uploads a picture as a file."""
    expected, picture = _scene(caller)
    _upload(caller, expected, ("picture.png", picture, "image/png"))


@kind
def question(caller: Caller) -> None:
    """Asks one question with a short answer."""
    number = caller.random.randrange(pictures.SCENES)
    asked, right = caller.random.choice(pictures.scene(number).questions)
    messages = [_user(asked, _picture(caller, number))]
    caller.ask(messages, Expected(ANSWER_TOKENS, words=caller.words(right)))


@kind
def chat(caller: Caller) -> None:
    """Asks several questions about one picture; each request repeats the chat so far."""
    for messages, expected in _turns(caller):
        if not caller.ask(messages, expected):
            return
        caller.think()


@kind
def streaming_chat(caller: Caller) -> None:
    """Does the same with streamed answers."""
    for messages, expected in _turns(caller):
        body = {"messages": messages, "max_tokens": expected.max_tokens}
        if not caller.stream(expected, body):
            return
        caller.think()


@kind
def long_stream(caller: Caller) -> None:
    """Streams a fixed number of tokens, whatever they say: the source of inter-token times."""
    caller.stream(Expected(LONG_TOKENS, exactly=True), _long_answer(caller))


@kind
def photograph(caller: Caller) -> None:
    """Uploads a picture of some megabytes."""
    drawn = pictures.photograph(caller.random.randrange(pictures.PHOTOGRAPHS))
    file = ("photograph.jpg", pictures.unseen(drawn, caller.random), "image/jpeg")
    _upload(caller, Expected(CAPTION_TOKENS), file)


@kind
def same_image(caller: Caller) -> None:
    """Sends one new picture in several requests at once, which should cost a single encode."""
    expected, picture = _scene(caller)
    request = {"path": "/v1/caption", "json": _caption_body(picture)}
    check = _is_caption(expected)
    gevent.joinall([gevent.spawn(caller.send, check, **request) for _ in range(BURST)])


@kind
def bad_input(caller: Caller) -> None:
    """Sends what must be refused with a 4xx that says why; anything else is a failure."""
    good = data_url(pictures.png(0))
    path, wrong = caller.random.choice(
        (
            ("/v1/caption", {"image": "data:image/png;base64,AAAA"}),
            ("/v1/caption", {"image": good, "max_tokens": 0}),
            ("/v1/caption", {"image": good, "no_such_parameter": 1}),
            (CHAT, {"messages": []}),
            (CHAT, {"messages": [{"role": "user", "content": "no picture"}]}),
        )
    )

    def check(response: requests.Response) -> int:
        answers.refusal(response.status_code, response.json())
        return 0

    caller.send(check, path=path, json=wrong)


@kind
def hang_up(caller: Caller) -> None:
    """Disconnects in the middle of an answer."""
    caller.hang_up(_long_answer(caller))


# -- their parts -----------------------------------------------------------------------------------


def _picture(caller: Caller, number: int) -> bytes:
    return pictures.unseen(pictures.png(number), caller.random)


def _scene(caller: Caller) -> tuple[Expected, bytes]:
    """A picture and its expected caption."""
    number = caller.random.randrange(pictures.SCENES)
    expected = Expected(CAPTION_TOKENS, words=caller.words(pictures.scene(number).caption))
    return expected, _picture(caller, number)


def _turns(caller: Caller) -> Iterator[tuple[list[Json], Expected]]:
    number = caller.random.randrange(pictures.SCENES)
    messages: list[Json] = []
    for asked, right in pictures.scene(number).chat:
        messages.append(_user(asked, None if messages else _picture(caller, number)))
        yield messages, Expected(ANSWER_TOKENS, words=caller.words(right))
        # The next turn follows the right answer, whatever the server said.
        messages.append({"role": "assistant", "content": right})


def _long_answer(caller: Caller) -> Json:
    number = caller.random.randrange(pictures.SCENES)
    messages = [_user("what is it?", _picture(caller, number))]
    return {"messages": messages, "max_tokens": LONG_TOKENS, "ignore_eos": True}


def _caption_body(picture: bytes) -> Json:
    return {"image": data_url(picture), "max_tokens": CAPTION_TOKENS}


def _upload(caller: Caller, expected: Expected, file: tuple[str, bytes, str]) -> None:
    request = {"files": {"image": file}, "data": {"max_tokens": str(CAPTION_TOKENS)}}
    caller.send(_is_caption(expected), path="/v1/caption", **request)


def _is_caption(expected: Expected) -> Check:
    def check(response: requests.Response) -> int:
        answers.ok(response.status_code, response.content)
        return answers.caption(response.json(), expected)

    return check


def _user(text: str, picture: bytes | None) -> Json:
    parts: list[Json] = [{"type": "text", "text": text}]
    if picture is not None:
        parts.insert(0, {"type": "image_url", "image_url": {"url": data_url(picture)}})
    return {"role": "user", "content": parts}
