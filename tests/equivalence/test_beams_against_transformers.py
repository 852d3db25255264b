"""Beam searches, samples and greedy answers, run concurrently in one engine, match transformers.

The engine gets random image features and random prompts, without HTTP.
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

from blip2_serve.compute.devices import open_device
from blip2_serve.compute.runner import Runner
from blip2_serve.compute.sampler import Sampler
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Request
from blip2_serve.engine.slots import KvSlots
from blip2_serve.engine.step import EngineStats
from blip2_serve.model.checkpoint import open_checkpoint
from blip2_serve.model.decoder import OptDecoder
from blip2_serve.types import SamplingParams, TokenEvent
from support.checkpoints import Recipe, write_checkpoint
from support.device import DEVICE
from support.penalties import OpenAIPenalties

REQUESTS = 200  # per checkpoint
KV_SLOTS = 1500
FEW_SLOTS = 400  # enough for any request, which needs at most 201, but only with evictions
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
    """Uses one thread: with more, they spend their time waiting on so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decode(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


@dataclass
class Model:
    """This project's decoder and transformers', and end tokens that are frequent in answers."""

    decoder: OptDecoder
    reference: GenerationMixin
    image_token: int
    eos: list[int] = field(default_factory=list)

    def request(self, name: str, text: list[int], image: int, params: SamplingParams) -> Request:
        features = torch.randn(QUERIES, 64, generator=torch.Generator().manual_seed(image)) * 0.5
        prompt = [*[self.image_token] * QUERIES, 2, *text]
        return Request(name, prompt, features, f"image {image}", params)

    @torch.inference_mode()
    def generate(self, request: Request) -> list[list[int]]:
        """Returns transformers' n answers, each up to and including its end token."""
        p = request.params
        options: dict[str, Any] = {"num_beams": p.num_beams, "num_return_sequences": p.n}
        if p.num_beams > 1:
            options |= {"length_penalty": p.length_penalty, "early_stopping": p.early_stopping}
        if p.min_tokens:
            options["min_new_tokens"] = p.min_tokens
        ids = torch.tensor([request.prompt])
        answers = self.reference.generate(
            input_ids=ids,  # for the repetition penalty
            inputs_embeds=self._embeddings(request, []),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=p.max_tokens,
            do_sample=False,
            repetition_penalty=p.repetition_penalty,
            eos_token_id=-1 if p.ignore_eos else self.eos,
            pad_token_id=1,
            logits_processor=[OpenAIPenalties(p, len(request.prompt))],
            **options,
        )
        ends = () if p.ignore_eos else self.eos
        return [cut(answer[len(request.prompt) :].tolist(), ends) for answer in answers]

    @torch.inference_mode()
    def logprobs(self, request: Request, tokens: list[int]) -> Tensor:
        """Returns transformers' log-probabilities at each token of the answer.

        The result is float32 [tokens, vocabulary].
        """
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
    """Returns the tokens up to and including the first end token."""
    at = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


@dataclass
class Run:
    """The events of all requests of one run, and the engine's stats at its end."""

    events: dict[str, list[TokenEvent]]
    stats: EngineStats

    def answers(self, request: Request) -> list[TokenEvent]:
        """Returns each answer of a request, with its events merged into one."""
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
    slots: int = KV_SLOTS,
) -> Run:
    """Runs all requests in one engine; they arrive at random times, in random order."""
    rng = Random(seed)
    scheduler = Scheduler(
        KvSlots(slots),
        max_num_seqs=24,
        max_waiting=1000,
        max_num_batched_tokens=64,
        prefix_caching=prefix_caching,
    )
    device = open_device(str(DEVICE))
    engine = Engine(
        # On a GPU, some steps exceed the captured number or length of sequences.
        Runner(model.decoder, device, slots, max_num_seqs=20, max_len=30),
        scheduler,
        Sampler(tuple(model.eos), device),
        decode=decode,
        eos_token_ids=tuple(model.eos),
    )
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    pending = rng.sample(requests, len(requests))
    while pending or engine.has_work:
        for request in [pending.pop() for _ in range(min(rng.randint(0, 2), len(pending)))]:
            engine.add(fresh_copy(request))
        if engine.has_work:
            for name, event in engine.step().events:
                events[name].append(event)
            engine.check_integrity()
    engine.check_idle()
    return Run(events, engine.stats())


def fresh_copy(request: Request) -> Request:
    """Returns a copy of the request that has not run yet."""
    return Request(request.id, request.prompt, request.image, request.digest, request.params)


def random_params(rng: Random, stops: list[int]) -> SamplingParams:
    params = SamplingParams(
        max_tokens=rng.randint(1, LONGEST),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
        ignore_eos=rng.random() < 0.15,
        stop=rng.choice([(), (), (), tuple(f"<{token}>" for token in stops)]),
        top_logprobs=rng.choice([None, None, 0, 3]),
        frequency_penalty=rng.choice([0.0, 0.0, 0.7, -0.4]),
        presence_penalty=rng.choice([0.0, 0.0, 1.1, -0.2]),
        logit_bias=rng.choice([(), (), ((stops[0] if stops else 5, 2.5), (7, -30.0), (9, 1.0))]),
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
class Workload:
    """All requests, and the run that had them in flight together."""

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
    """Returns requests whose prompts share prefixes, about a few images."""
    rng = Random(3)
    shared = [rng.randrange(3, 300) for _ in range(12)]

    def text() -> list[int]:
        return shared[: rng.randint(0, 12)] + [rng.randrange(3, 300) for _ in range(4)]

    return [
        model.request(str(i), text(), rng.randrange(4), random_params(rng, stops))
        for i in range(REQUESTS)
    ]


def frequent_tokens(model: Model, count: int) -> list[int]:
    """Returns tokens that many answers contain, but few start with; excludes end tokens."""
    params = SamplingParams(max_tokens=LONGEST, num_beams=3, n=3)
    rng = Random(4)
    probes = [
        model.request(str(i), [rng.randrange(3, 300) for _ in range(6)], i % 4, params)
        for i in range(16)
    ]
    result = run(model, probes)
    answers = [answer for probe in probes for answer in result.tokens(probe)]
    inside = Counter(t for answer in answers for t in {*answer[1:]} - {*model.eos})
    first = Counter(answer[0] for answer in answers)
    return [token for token, _ in (inside - first - first).most_common(count)]


@pytest.fixture(scope="module", params=RECIPES)
def workload(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workload:
    recipe, ends = request.param
    folder = write_checkpoint(tmp_path_factory.mktemp(recipe.name), recipe)
    checkpoint = open_checkpoint(str(folder))
    whole = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    model = Model(
        OptDecoder.load(checkpoint, DEVICE, torch.float32),
        whole.language_model,
        checkpoint.config.image_token_index,
    )
    model.eos = frequent_tokens(model, ends)
    requests = make_requests(model, frequent_tokens(model, 4))
    return Workload(model, requests, run(model, requests))


def test_answers_equal_those_of_transformers_in_order(workload: Workload) -> None:
    selected = workload.deterministic()
    actual = {r.id: workload.run.tokens(r) for r in selected}
    assert actual == {
        r.id: [cut_at_stop(r, a) for a in workload.model.generate(r)] for r in selected
    }


def cut_at_stop(request: Request, answer: list[int]) -> list[int]:
    """Cuts an answer after its first stop string, here a single token, from min_tokens on."""
    stops = [int(stop[1:-1]) for stop in request.params.stop]
    early = max(0, request.params.min_tokens - 1)
    return answer[:early] + cut(answer[early:], stops)


def test_answers_end_in_every_way(workload: Workload) -> None:
    """Guards against a trivial comparison."""
    answers = [(r, answer) for r in workload.beams() for answer in workload.run.answers(r)]
    ends = Counter(how_it_ended(workload.model, r, answer) for r, answer in answers)
    assert ends["end token, early"] > len(answers) / 4
    assert ends["limit"] > len(answers) / 8
    assert ends["stop string"] > len(answers) / 50
    by_token = Counter(a.token_ids[-1] for _, a in answers if a.finish_reason == "stop")
    assert all(by_token[end] > len(answers) / 50 for end in workload.model.eos)


def how_it_ended(model: Model, request: Request, answer: TokenEvent) -> str:
    if answer.finish_reason == "length":
        assert len(answer.token_ids) == request.params.max_tokens
        return "limit"
    if answer.token_ids[-1] not in model.eos or request.params.ignore_eos:
        return "stop string"
    early = len(answer.token_ids) < (request.params.max_tokens or 0) - 2
    return "end token, early" if early else "end token"


def test_texts_match_the_tokens(workload: Workload) -> None:
    for request in workload.requests:
        for answer in workload.run.answers(request):
            ended = answer.finish_reason == "stop"
            assert answer.text == decode([*answer.token_ids[: -1 if ended else None]])


def test_the_best_beam_is_streamed_before_the_end(workload: Workload) -> None:
    """As another test compares all tokens, those streamed early are never withdrawn."""
    events = [workload.run.events[r.id] for r in workload.beams() if r.params.n == 1]
    assert sum(len(of_one) > 2 for of_one in events) > len(events) / 12
    assert all(event.token_ids for of_one in events for event in of_one)


def test_only_the_last_event_of_a_request_is_marked_last(workload: Workload) -> None:
    for events in workload.run.events.values():
        assert [event.last for event in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize(
    ("prefix_caching", "slots"),
    [
        pytest.param(False, KV_SLOTS, id="no prefix caching"),
        pytest.param(True, FEW_SLOTS, id="prefix caching with evictions"),
    ],
)
def test_answers_do_not_depend_on_the_batch_or_the_cache(
    workload: Workload, prefix_caching: bool, slots: int
) -> None:
    """Other arrival times and other cache hits give the same tokens, also when sampling."""
    other = run(workload.model, workload.requests, prefix_caching, seed=1, slots=slots)
    assert {r.id: other.tokens(r) for r in workload.requests} == {
        r.id: workload.run.tokens(r) for r in workload.requests
    }
    prompts = sum(len(r.prompt) for r in workload.requests)
    assert workload.run.stats.cached_tokens > prompts / 4
    assert (other.stats.cached_tokens > 0) is prefix_caching


def test_a_request_gets_the_same_answers_alone(workload: Workload) -> None:
    for request in [*workload.sampled()[:15], *workload.beams()[:15]]:
        assert run(workload.model, [request]).tokens(request) == workload.run.tokens(request)


def test_samples_differ_between_indices_and_seeds(workload: Workload) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, n=6, seed=5, ignore_eos=True)
    requests = [
        workload.model.request(f"{seed}", [5, 6, 7], 0, replace(params, seed=seed))
        for seed in (5, 6)
    ]
    together = run(workload.model, requests)
    samples = [tuple(tokens) for r in requests for tokens in together.tokens(r)]
    assert len({*samples}) == len(samples) == 12
    # The first n samples do not depend on n.
    fewer = workload.model.request("5", [5, 6, 7], 0, replace(params, n=2))
    assert run(workload.model, [fewer]).tokens(fewer) == together.tokens(requests[0])[:2]


@pytest.mark.parametrize("kind", ["greedy", "sampled", "beams"])
def test_log_probabilities_equal_those_of_transformers(workload: Workload, kind: str) -> None:
    of_kind = {
        "greedy": [r for r in workload.deterministic() if r.params.num_beams == 1],
        "sampled": workload.sampled(),
        "beams": workload.beams(),
    }[kind]
    selected = [r for r in of_kind if r.params.top_logprobs is not None]
    assert len(selected) > 10
    for request in selected:
        for answer in workload.run.answers(request):
            tokens = [*answer.token_ids]
            assert [logprob.token_id for logprob in answer.logprobs] == tokens
            reference = workload.model.logprobs(request, tokens)
            of_tokens = reference[range(len(tokens)), tokens].tolist()
            assert [o.logprob for o in answer.logprobs] == pytest.approx(of_tokens, abs=1e-4)
            best = reference.topk(request.params.top_logprobs or 0)
            tops = [[top.logprob for top in logprob.top] for logprob in answer.logprobs]
            for actual, expected in zip(tops, best.values.tolist(), strict=True):
                assert actual == pytest.approx(expected, abs=1e-4)
            for row, logprob in zip(reference, answer.logprobs, strict=True):
                for top in logprob.top:
                    assert top.logprob == pytest.approx(row[top.token_id].item(), abs=1e-4)


def test_log_probabilities_only_come_on_request(workload: Workload) -> None:
    for request in workload.requests:
        if request.params.top_logprobs is None:
            assert not any(event.logprobs for event in workload.run.events[request.id])
