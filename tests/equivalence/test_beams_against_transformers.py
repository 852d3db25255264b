"""A crowd of beam searches, samples and greedy answers in one engine, against transformers.

There is no HTTP here: the language model sees a random image prefix and random prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, GenerationMixin

from blip2_serve.compute.runner import Runner
from blip2_serve.compute.sampler import Sampler
from blip2_serve.engine.engine import Engine, EngineStats
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Request
from blip2_serve.engine.slots import KvSlots
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.types import SamplingParams, TokenEvent
from support.checkpoints import Recipe, write_checkpoint
from support.device import DEVICE

REQUESTS = 200  # for each checkpoint
KV_ROWS = 1500
FEW_ROWS = 400  # the widest request reaches 201; whatever is kept must make room
QUERIES = 8
LONGEST = 16

RECIPES = [
    pytest.param((Recipe("one", seed=1, queries=QUERIES), 1), id="one end token"),
    pytest.param(
        (Recipe("three", seed=2, queries=QUERIES, heads=2, tied=False), 3), id="three end tokens"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On so small a model, more of them wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


@dataclass
class Model:
    """This project's language model, transformers', and end tokens that come often."""

    decoder: OptDecoder
    reference: GenerationMixin
    image_token: int
    eos: list[int] = field(default_factory=list)

    def request(self, name: str, text: list[int], image: int, params: SamplingParams) -> Request:
        prefix = torch.randn(QUERIES, 64, generator=torch.Generator().manual_seed(image)) * 0.5
        prompt = [*[self.image_token] * QUERIES, 2, *text]
        return Request(name, prompt, prefix, f"image {image}", params)

    @torch.inference_mode()
    def generate(self, request: Request) -> list[list[int]]:
        """transformers' n answers, each up to and with its end token."""
        p = request.params
        options: dict[str, Any] = {"num_beams": p.num_beams, "num_return_sequences": p.n}
        if p.num_beams > 1:
            options |= {"length_penalty": p.length_penalty, "early_stopping": p.early_stopping}
        if p.min_tokens:
            options["min_new_tokens"] = p.min_tokens
        ids = torch.tensor([request.prompt])
        answers = self.reference.generate(
            input_ids=ids,  # the repetition penalty looks at them
            inputs_embeds=self._embeddings(request, []),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=p.max_tokens,
            do_sample=False,
            repetition_penalty=p.repetition_penalty,
            eos_token_id=-1 if p.ignore_eos else self.eos,
            pad_token_id=1,
            **options,
        )
        ends = () if p.ignore_eos else self.eos
        return [cut(answer[len(request.prompt) :].tolist(), ends) for answer in answers]

    @torch.inference_mode()
    def logprobs(self, request: Request, tokens: list[int]) -> Tensor:
        """[tokens, vocabulary]: transformers' log-softmax before each of the answer's tokens."""
        logits = self.reference(inputs_embeds=self._embeddings(request, tokens)).logits[0]
        first = len(request.prompt) - 1
        result: Tensor = logits[first : first + len(tokens)].float().log_softmax(-1)
        return result

    def _embeddings(self, request: Request, tokens: list[int]) -> Tensor:
        embed = self.reference.get_input_embeddings()
        embeddings: Tensor = embed(torch.tensor([request.prompt + tokens]))
        embeddings[0, :QUERIES] = request.image
        return embeddings


def cut(tokens: list[int], ends: list[int] | tuple[int, ...]) -> list[int]:
    """The tokens up to and with the first end token."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


@dataclass
class Run:
    """What readers were handed while all requests went through one engine."""

    events: dict[str, list[TokenEvent]]
    stats: EngineStats

    def answers(self, request: Request) -> list[TokenEvent]:
        """All events of each answer as one."""
        merged: dict[int, TokenEvent] = {}
        for event in self.events[request.id]:
            merged[event.index] = merged[event.index] + event if event.index in merged else event
        assert sorted(merged) == list(range(request.params.n))
        return [merged[index] for index in sorted(merged)]

    def tokens(self, request: Request) -> list[list[int]]:
        return [[*answer.token_ids] for answer in self.answers(request)]


def run(
    model: Model,
    requests: list[Request],
    prefix_caching: bool = True,
    seed: int = 0,
    rows: int = KV_ROWS,
) -> Run:
    """Requests arrive at random times, in a random order."""
    rng = Random(seed)
    scheduler = Scheduler(
        KvSlots(rows),
        max_num_seqs=24,
        max_waiting=1000,
        max_num_batched_tokens=64,
        prefix_caching=prefix_caching,
    )
    engine = Engine(
        # On a GPU, there are more and longer sequences than steps are recorded for.
        Runner(model.decoder, rows, sequences=20, longest=30),
        scheduler,
        Sampler(tuple(model.eos)),
        decode=decode,
        eos_token_ids=tuple(model.eos),
    )
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    to_come = rng.sample(requests, len(requests))
    while to_come or engine.has_work:
        for request in [to_come.pop() for _ in range(min(rng.randint(0, 2), len(to_come)))]:
            engine.add(again(request))
        if engine.has_work:
            for name, event in engine.step().events:
                events[name].append(event)
            engine.check_integrity()
    engine.check_idle()
    return Run(events, engine.stats())


def again(request: Request) -> Request:
    """The same request, not yet run."""
    return Request(request.id, request.prompt, request.image, request.digest, request.params)


def random_params(rng: Random, stops: list[int]) -> SamplingParams:
    params = SamplingParams(
        max_tokens=rng.randint(1, LONGEST),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
        ignore_eos=rng.random() < 0.15,
        stop=rng.choice([(), (), (), tuple(f"<{token}>" for token in stops)]),
        top_logprobs=rng.choice([None, None, 0, 3]),
    )
    if not params.ignore_eos:
        assert params.max_tokens is not None
        params = replace(params, min_tokens=rng.choice([0, 0, rng.randint(0, params.max_tokens)]))
    kind = rng.choice(["greedy", "sampled", "beams", "beams", "beams"])
    if kind == "greedy":
        return params
    if kind == "sampled":
        return replace(params, temperature=1.0, seed=rng.randrange(1000), n=rng.randint(1, 4))
    beams = rng.choice([2, 3, 4, 5, 5, 8])
    return replace(
        params,
        num_beams=beams,
        n=rng.choice([1, 1, rng.randint(1, beams)]),
        length_penalty=rng.choice([1.0, 0.0, -1.0, 2.0]),
        early_stopping=rng.choice([False, True, "never"]),
    )


@dataclass
class Crowd:
    """All requests, and what came of them in flight together."""

    model: Model
    requests: list[Request]
    run: Run

    def deterministic(self) -> list[Request]:
        return [r for r in self.requests if r.params.temperature == 0]

    def beams(self) -> list[Request]:
        return [r for r in self.requests if r.params.num_beams > 1]

    def sampled(self) -> list[Request]:
        return [r for r in self.requests if r.params.temperature > 0]


def make_requests(model: Model, stops: list[int]) -> list[Request]:
    """Prompts begin alike, and a few images come again and again."""
    rng = Random(3)
    beginning = [rng.randrange(3, 300) for _ in range(12)]

    def text() -> list[int]:
        return beginning[: rng.randint(0, 12)] + [rng.randrange(3, 300) for _ in range(4)]

    return [
        model.request(str(i), text(), rng.randrange(4), random_params(rng, stops))
        for i in range(REQUESTS)
    ]


def tokens_that_come_often(model: Model, count: int) -> list[int]:
    """The tokens that most answers contain, though seldom first; no end tokens."""
    params = SamplingParams(max_tokens=LONGEST, num_beams=3, n=3)
    rng = Random(4)
    probes = [
        model.request(str(i), [rng.randrange(3, 300) for _ in range(6)], i % 4, params)
        for i in range(16)
    ]
    made = run(model, probes)
    answers = [answer for probe in probes for answer in made.tokens(probe)]
    inside = Counter(t for answer in answers for t in {*answer[1:]} - {*model.eos})
    first = Counter(answer[0] for answer in answers)
    return [token for token, _ in (inside - first - first).most_common(count)]


@pytest.fixture(scope="module", params=RECIPES)
def crowd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    recipe, ends = request.param
    folder = write_checkpoint(tmp_path_factory.mktemp(recipe.name), recipe)
    checkpoint = open_checkpoint(str(folder))
    whole = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = Model(
        OptDecoder.load(checkpoint, DEVICE, torch.float32),
        whole.language_model,
        checkpoint.config.image_token_index,
    )
    model.eos = tokens_that_come_often(model, ends)
    requests = make_requests(model, tokens_that_come_often(model, 4))
    return Crowd(model, requests, run(model, requests))


def test_answers_are_those_of_transformers_in_their_order(crowd: Crowd) -> None:
    asked = crowd.deterministic()
    seen = {r.id: crowd.run.tokens(r) for r in asked}
    assert seen == {r.id: [cut_at_stop(r, a) for a in crowd.model.generate(r)] for r in asked}


def cut_at_stop(request: Request, answer: list[int]) -> list[int]:
    """Stop strings are single tokens here; they do not count before min_tokens."""
    stops = [int(stop[1:-1]) for stop in request.params.stop]
    early = max(0, request.params.min_tokens - 1)
    return answer[:early] + cut(answer[early:], stops)


def test_answers_end_in_every_way(crowd: Crowd) -> None:
    """Or the comparison would mean little."""
    answers = [(r, answer) for r in crowd.beams() for answer in crowd.run.answers(r)]
    ends = Counter(how_it_ended(crowd.model, r, answer) for r, answer in answers)
    assert ends["end token, early"] > len(answers) / 4
    assert ends["limit"] > len(answers) / 8
    assert ends["stop string"] > len(answers) / 50
    by_token = Counter(a.token_ids[-1] for _, a in answers if a.finish_reason == "stop")
    assert all(by_token[end] > len(answers) / 50 for end in crowd.model.eos)


def how_it_ended(model: Model, request: Request, answer: TokenEvent) -> str:
    if answer.finish_reason == "length":
        assert len(answer.token_ids) == request.params.max_tokens
        return "limit"
    if answer.token_ids[-1] not in model.eos or request.params.ignore_eos:
        return "stop string"
    early = len(answer.token_ids) < (request.params.max_tokens or 0) - 2
    return "end token, early" if early else "end token"


def test_the_text_is_that_of_the_tokens(crowd: Crowd) -> None:
    for request in crowd.requests:
        for answer in crowd.run.answers(request):
            ended = answer.finish_reason == "stop"
            assert answer.text == decode([*answer.token_ids[: -1 if ended else None]])


def test_a_single_answer_of_beams_is_streamed_before_its_end(crowd: Crowd) -> None:
    """What was handed out is never withdrawn: all events together are transformers' answer."""
    events = [crowd.run.events[r.id] for r in crowd.beams() if r.params.n == 1]
    assert sum(len(of_one) > 2 for of_one in events) > len(events) / 12
    assert all(event.token_ids for of_one in events for event in of_one)


def test_the_last_event_of_a_request_says_so(crowd: Crowd) -> None:
    for events in crowd.run.events.values():
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize(
    ("prefix_caching", "rows"),
    [
        pytest.param(False, KV_ROWS, id="nothing is kept"),
        pytest.param(True, FEW_ROWS, id="what is kept must make room"),
    ],
)
def test_the_company_and_what_is_reused_change_no_answer(
    crowd: Crowd, prefix_caching: bool, rows: int
) -> None:
    """Other arrivals, other prefix_caching: the same tokens, those that were drawn included."""
    other = run(crowd.model, crowd.requests, prefix_caching, seed=1, rows=rows)
    assert {r.id: other.tokens(r) for r in crowd.requests} == {
        r.id: crowd.run.tokens(r) for r in crowd.requests
    }
    prompts = sum(len(r.prompt) for r in crowd.requests)
    assert crowd.run.stats.cached_tokens > prompts / 4
    assert (other.stats.cached_tokens > 0) is prefix_caching


def test_a_request_alone_gets_the_answers_that_it_gets_in_a_crowd(crowd: Crowd) -> None:
    for request in [*crowd.sampled()[:15], *crowd.beams()[:15]]:
        assert run(crowd.model, [request]).tokens(request) == crowd.run.tokens(request)


def test_samples_of_one_request_differ_and_another_seed_draws_others(crowd: Crowd) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, n=6, seed=5, ignore_eos=True)
    requests = [
        crowd.model.request(f"{seed}", [5, 6, 7], 0, replace(params, seed=seed)) for seed in (5, 6)
    ]
    together = run(crowd.model, requests)
    samples = [tuple(tokens) for r in requests for tokens in together.tokens(r)]
    assert len({*samples}) == len(samples) == 12
    # The first n samples do not depend on n.
    fewer = crowd.model.request("5", [5, 6, 7], 0, replace(params, n=2))
    assert run(crowd.model, [fewer]).tokens(fewer) == together.tokens(requests[0])[:2]


@pytest.mark.parametrize("kind", ["greedy", "sampled", "beams"])
def test_log_probabilities_are_those_of_transformers_raw_logits(crowd: Crowd, kind: str) -> None:
    of_kind = {
        "greedy": [r for r in crowd.deterministic() if r.params.num_beams == 1],
        "sampled": crowd.sampled(),
        "beams": crowd.beams(),
    }[kind]
    asked = [r for r in of_kind if r.params.top_logprobs is not None]
    assert len(asked) > 10
    for request in asked:
        for answer in crowd.run.answers(request):
            tokens = [*answer.token_ids]
            assert [logprob.token_id for logprob in answer.logprobs] == tokens
            wanted = crowd.model.logprobs(request, tokens)
            of_tokens = wanted[range(len(tokens)), tokens].tolist()
            assert [o.logprob for o in answer.logprobs] == pytest.approx(of_tokens, abs=1e-4)
            best = wanted.topk(request.params.top_logprobs or 0)
            tops = [[top.logprob for top in logprob.top] for logprob in answer.logprobs]
            for seen, expected in zip(tops, best.values.tolist(), strict=True):
                assert seen == pytest.approx(expected, abs=1e-4)
            for row, logprob in zip(wanted, answer.logprobs, strict=True):
                for top in logprob.top:
                    assert top.logprob == pytest.approx(row[top.token_id].item(), abs=1e-4)


def test_without_being_asked_no_log_probabilities_come(crowd: Crowd) -> None:
    for request in crowd.requests:
        if request.params.top_logprobs is None:
            assert not any(event.logprobs for event in crowd.run.events[request.id])
