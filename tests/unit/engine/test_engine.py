from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from blip2_serve.compute.sampler import Choice
from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.engine import Engine
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from blip2_serve.types import TokenEvent, TokenLogprob
from support.requests import make_request

EOS, OTHER_EOS = 256, 257  # all other tokens are bytes

Script = str | list[int]


class NoRunner:
    def __init__(self) -> None:
        self.computed = 0  # tokens

    def run(self, chunks: list[Chunk]) -> str:
        assert chunks
        self.computed += sum(chunk.end - chunk.start for chunk in chunks)
        return "logits"


class Scripted:
    """Chooses what was written down for each request.

    Samples take the scripts in turn. For a beam search the scripts are all answers that there are,
    the likeliest first: a beam's score is the one of the likeliest that goes on from it.
    """

    def __init__(self, scripts: dict[str, list[list[int]]]) -> None:
        self.scripts = scripts

    def choose(self, logits: Any, rows: list[int], sequences: list[Sequence]) -> Iterator[Choice]:
        assert logits == "logits"
        assert len(rows) == len(sequences)
        for sequence in sequences:
            token = self.scripts[sequence.request.id][sequence.index][len(sequence.output)]
            yield Choice(token, self._logprob(sequence, token))

    def expand(
        self, logits: Any, rows: list[int], beams: list[Sequence], count: int
    ) -> list[Candidate]:
        assert logits == "logits"
        assert len(rows) == len(beams)
        found: dict[tuple[int, int], float] = {}
        for rank, script in enumerate(self.scripts[beams[0].request.id]):
            for i, beam in enumerate(beams):
                length = len(beam.output)
                if script[:length] == beam.output and length < len(script):
                    found.setdefault((i, script[length]), -1.0 - rank)
        for junk in range(count):
            found.setdefault((0, junk), -100.0 - junk)
        best = sorted(found.items(), key=lambda item: -item[1])[:count]
        return [
            Candidate(beams[i], token, score, self._logprob(beams[i], token))
            for (i, token), score in best
        ]

    def _logprob(self, sequence: Sequence, token: int) -> TokenLogprob | None:
        asked = sequence.request.params.top_logprobs is not None
        return TokenLogprob(token, -float(len(sequence.output))) if asked else None


def decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class Bench:
    def __init__(
        self,
        rows: int = 200,
        max_num_seqs: int = 4,
        max_waiting: int = 1000,
        step: int = 16,
        prefix_caching: bool = False,
    ) -> None:
        self.scripts: dict[str, list[list[int]]] = {}
        self.runner = NoRunner()
        scheduler = Scheduler(
            KvSlots(rows),
            max_num_seqs=max_num_seqs,
            max_waiting=max_waiting,
            max_num_batched_tokens=step,
            prefix_caching=prefix_caching,
        )
        self.engine = Engine(
            self.runner,
            scheduler,
            Scripted(self.scripts),
            decode=decode,
            eos_token_ids=(EOS, OTHER_EOS),
        )
        self.events: defaultdict[str, list[TokenEvent]] = defaultdict(list)

    def add(
        self, name: str, *scripts: Script, prompt: int | list[int] = 3, **params: Any
    ) -> Request:
        self.scripts[name] = [s if isinstance(s, list) else tokens(s) for s in scripts]
        longest = max(map(len, self.scripts[name]))
        request = make_request(name, prompt, **{"max_tokens": longest, **params})
        self.engine.add(request)
        return request

    def step(self) -> None:
        for name, event in self.engine.step().events:
            self.events[name].append(event)
        self.engine.check_integrity()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()
        self.engine.check_idle()

    def answer(self, name: str, index: int = 0) -> tuple[list[int], str, str | None]:
        """Token ids, text and the reason why it ended, of one of a request's answers."""
        events = [e for e in self.events[name] if e.index == index]
        assert all(e.finish_reason is None for e in events[:-1])
        ids = [token for e in events for token in e.token_ids]
        return ids, "".join(e.text for e in events), events[-1].finish_reason

    def texts(self, name: str) -> list[str]:
        """Of all the answers of a request that has ended."""
        assert [e.last for e in self.events[name]] == [False] * (len(self.events[name]) - 1) + [
            True
        ]
        indices = {e.index for e in self.events[name]}
        assert indices == {*range(len(indices))}
        return [self.answer(name, index)[1] for index in sorted(indices)]


def run(script: Script, **params: Any) -> tuple[list[int], str, str | None]:
    bench = Bench()
    bench.add("a", script, **params)
    bench.finish()
    return bench.answer("a")


def tokens(text: str, *more: int) -> list[int]:
    return [*text.encode(), *more]


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_an_end_token_ends_the_answer_and_is_no_text(eos: int) -> None:
    script = tokens("cat", eos, *b" tail")
    assert run(script) == (tokens("cat", eos), "cat", "stop")


def test_an_end_token_may_come_first() -> None:
    assert run([EOS, 65]) == ([EOS], "", "stop")


def test_an_end_token_is_passed_over_where_it_is_ignored() -> None:
    script = tokens("ca", EOS, *b"t")
    assert run(script, ignore_eos=True) == (script, "cat", "length")


def test_an_end_token_as_the_last_allowed_one_is_a_stop() -> None:
    assert run(tokens("cat", EOS)) == (tokens("cat", EOS), "cat", "stop")


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens_is_the_number_of_tokens(max_tokens: int) -> None:
    text = "a cat sits"[:max_tokens]
    assert run("a cat sits", max_tokens=max_tokens) == (tokens(text), text, "length")


def test_half_a_character_at_the_end_is_a_replacement() -> None:
    assert run("a日", max_tokens=3) == (tokens("a日")[:3], "a\ufffd", "length")


def test_a_stop_string_ends_the_answer_and_is_no_text() -> None:
    assert run("one\ntwo\n", stop=("wo", "\nt")) == (tokens("one\nt"), "one", "stop")


def test_a_stop_string_that_ends_with_the_last_allowed_token_is_a_stop() -> None:
    assert run("one.", stop=(".",)) == (tokens("one."), "one", "stop")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(tokens("one##"), "length", id="at the limit"),
        pytest.param(tokens("one##", EOS), "stop", id="at an end token"),
    ],
)
def test_a_stop_string_that_was_only_begun_is_text(script: list[int], reason: str) -> None:
    assert run(script, stop=("###",)) == (script, "one##", reason)


def test_a_stop_string_before_min_tokens_is_text() -> None:
    assert run("a.bc.d", stop=(".",), min_tokens=3) == (tokens("a.bc."), "a.bc", "stop")


def test_events_carry_one_token_each_and_the_length_of_the_prompt() -> None:
    bench = Bench()
    bench.add("a", "cat", prompt=40)
    bench.finish()
    assert bench.events["a"] == [
        TokenEvent((ord("c"),), "c", None, 40),
        TokenEvent((ord("a"),), "a", None, 40),
        TokenEvent((ord("t"),), "t", "length", 40, last=True),
    ]


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="one answer"),
        pytest.param({"n": 3}, id="samples"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"num_beams": 3, "n": 3}, id="beams that are all asked for"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_leaves_nothing(steps: int, params: dict[str, int]) -> None:
    bench = Bench()
    # Two steps of prompt.
    bench.add("a", "a long answer", "a lone animal", "all alone", prompt=30, **params)
    for _ in range(steps):
        bench.step()
    bench.engine.abort("a")
    bench.engine.check_integrity()
    bench.engine.check_idle()
    assert not bench.engine.has_work


def test_an_aborted_request_leaves_the_others_alone() -> None:
    bench = Bench(max_num_seqs=2)
    for name in "abcd":
        bench.add(name, f"answer {name}")
    bench.step()
    bench.engine.abort("a")  # runs
    bench.engine.abort("c")  # waits
    bench.finish()
    assert len(bench.events["a"]) == 1
    assert not bench.events["c"]
    for name in "bd":
        assert bench.answer(name)[1] == f"answer {name}"


def test_aborting_what_has_ended_or_never_was_is_no_error() -> None:
    bench = Bench()
    bench.add("a", "cat")
    bench.finish()
    bench.engine.abort("a")
    bench.engine.abort("b")
    bench.engine.check_idle()


def test_a_refused_request_leaves_nothing() -> None:
    bench = Bench(rows=10, max_num_seqs=1, max_waiting=0)
    with pytest.raises(ContextLengthExceeded):
        bench.add("large", "cat", prompt=11)
    bench.add("a", "cat")
    with pytest.raises(Overloaded):
        bench.add("b", "cat")
    with pytest.raises(InvalidRequest):
        bench.add("wide", "cat", n=2)
    bench.engine.check_integrity()
    bench.finish()
    assert [*bench.events] == ["a"]


def test_the_counts_tell_what_is_held() -> None:
    bench = Bench(max_num_seqs=4)
    for name in "abc":
        bench.add(name, "cat", "cow", n=2)
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_slots_used, stats.steps) == (0, 3, 0, 0)
    bench.step()
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (4, 1, 1)
    assert (stats.kv_slots_used, stats.kv_slots_total) == (2 * (3 + 2 * (3 - 1)), 200)
    assert stats.kv_slots_cached == 0
    bench.finish()
    assert bench.engine.stats().kv_slots_used == 0


# -- samples ---------------------------------------------------------------------------------------


def test_the_samples_of_a_request_end_at_different_times() -> None:
    bench = Bench()
    bench.add("a", tokens("cat", EOS), "a cow.", "horses", n=3, stop=(".",), max_tokens=6)
    bench.finish()
    assert bench.texts("a") == ["cat", "a cow", "horses"]
    assert [bench.answer("a", i)[2] for i in range(3)] == ["stop", "stop", "length"]


def test_the_prompt_of_samples_is_computed_once() -> None:
    bench = Bench()
    bench.add("a", "cat", "cow", "dog", n=3, prompt=30)
    bench.finish()
    assert bench.runner.computed == 30 + 3 * 2


# -- beams -----------------------------------------------------------------------------------------


def test_the_best_answer_of_a_beam_search_is_streamed_as_far_as_it_is_certain() -> None:
    bench = Bench()
    bench.add("a", "the cat sits", "the cow runs", num_beams=2, early_stopping=True)
    bench.finish()
    assert bench.texts("a") == ["the cat sits"]
    pieces = [e.text for e in bench.events["a"]]
    # After three tokens of the first word its rivals have fallen away.
    assert len(pieces) > 2
    assert len(pieces[-1]) == len("at sits")


def test_several_answers_of_a_beam_search_come_at_its_end_the_best_first() -> None:
    bench = Bench()
    scripts = [tokens("cat", EOS), tokens("cow", EOS), tokens("dog", EOS)]
    bench.add("a", *scripts, num_beams=3, n=2, early_stopping=True)
    bench.finish()
    assert bench.texts("a") == ["cat", "cow"]
    assert len(bench.events["a"]) == 2


def test_the_end_of_a_beam_search_gives_back_all_rows() -> None:
    bench = Bench()
    bench.add("a", "the cat", "the cow", num_beams=3)
    bench.step()
    bench.step()
    assert bench.engine.stats().running == 3
    assert bench.engine.stats().kv_slots_used == 3 + 3 * 6
    bench.finish()
    assert bench.engine.stats().kv_slots_used == 0


def test_a_stop_string_that_all_beams_share_ends_the_search() -> None:
    bench = Bench()
    bench.add("a", "a. cat sat", "a. cow ate", "a. dog ran", num_beams=3, stop=(".",))
    bench.finish()
    assert bench.answer("a") == (tokens("a."), "a", "stop")
    assert bench.engine.stats().steps < len("a. cat sat")


def test_a_stop_string_is_cut_off_each_of_several_answers() -> None:
    bench = Bench()
    bench.add("a", "one.two", "one two", "o.n.e.s", num_beams=3, n=3, stop=(".",))
    bench.finish()
    assert bench.texts("a") == ["one", "one two", "o"]
    assert [bench.answer("a", i)[2] for i in range(3)] == ["stop", "length", "stop"]
    assert bench.answer("a", 2)[0] == tokens("o.")


def test_beams_of_several_requests_do_not_mix_with_each_other_and_with_samples() -> None:
    bench = Bench(max_num_seqs=10)
    bench.add("a", "abcdef", "abcxyz", num_beams=2, n=2)
    bench.add("b", "123456", "123789", n=2)
    bench.step()
    bench.add("c", "uvwxyz", "uvwabc", "123456", num_beams=3, n=3)
    bench.add("d", "greedy")
    bench.finish()
    assert bench.texts("a") == ["abcdef", "abcxyz"]
    assert bench.texts("b") == ["123456", "123789"]
    assert bench.texts("c") == ["uvwxyz", "uvwabc", "123456"]
    assert bench.texts("d") == ["greedy"]


@pytest.mark.parametrize(
    ("scripts", "params"),
    [
        pytest.param(["cat", "cow"], {"n": 2}, id="of samples"),
        pytest.param(["cat", "cow"], {"num_beams": 2}, id="of the best answer"),
        pytest.param(["cat", "cow"], {"num_beams": 2, "n": 2}, id="of all answers"),
    ],
)
def test_every_token_comes_with_its_log_probability_where_they_are_asked_for(
    scripts: list[Script], params: dict[str, int]
) -> None:
    bench = Bench()
    bench.add("asked", *scripts, top_logprobs=0, **params)
    bench.add("not", *scripts, **params)
    bench.finish()
    for event in bench.events["asked"]:
        assert [logprob.token_id for logprob in event.logprobs] == [*event.token_ids]
    for index in range(params.get("n", 1)):
        events = [e for e in bench.events["asked"] if e.index == index]
        assert [o.logprob for e in events for o in e.logprobs] == [-0.0, -1.0, -2.0]
    assert not any(event.logprobs for event in bench.events["not"])


# -- KV that is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="one answer"),
        pytest.param({"n": 2}, id="samples"),
        pytest.param({"num_beams": 2}, id="beams"),
    ],
)
def test_prompt_and_answer_are_kept_for_a_request_that_goes_on_from_them(
    params: dict[str, int],
) -> None:
    bench = Bench(prefix_caching=True, step=100)
    bench.add("first", "cat", "cow", prompt=30, **params)
    bench.finish()
    assert bench.engine.stats().kv_slots_cached == bench.engine.stats().kv_slots_used > 30
    before = bench.runner.computed
    bench.add("second", "ok", prompt=[7] * 30 + tokens("cat") + [8])
    bench.finish()
    # "t", the prompt's last token and "o" had to be computed.
    assert bench.runner.computed - before == 3
    assert bench.engine.stats().cached_tokens == 30 + len("ca")
    assert bench.texts("second") == ["ok"]


def test_after_an_abort_the_prompt_is_known_still() -> None:
    bench = Bench(prefix_caching=True, step=100)
    bench.add("a", "a long answer", "another one", prompt=30, num_beams=2)
    bench.step()
    bench.step()
    bench.engine.abort("a")
    bench.engine.check_integrity()
    bench.engine.check_idle()
    assert bench.engine.stats().kv_slots_used == bench.engine.stats().kv_slots_cached == 30
    bench.add("b", "x", prompt=30)
    bench.finish()
    assert bench.engine.stats().cached_tokens == 29


@pytest.mark.parametrize(
    "prefix_caching", [True, False], ids=["with prefix_caching", "without prefix_caching"]
)
def test_requests_join_and_leave_at_every_step(prefix_caching: bool) -> None:
    random = Random(0)
    bench = Bench(rows=120, max_num_seqs=6, step=10, prefix_caching=prefix_caching)
    texts: dict[str, list[str]] = {}
    aborted: set[str] = set()

    def write() -> str:
        return "".join(random.choices("ab é日🐈", k=random.randint(1, 5)))

    for step in range(400):
        if random.random() < 0.4:
            name = f"r{len(texts)}"
            texts[name] = list(dict.fromkeys(write() for _ in range(random.randint(1, 3))))
            width = {random.choice(["n", "num_beams"]): len(texts[name]), "length_penalty": 0.0}
            bench.add(
                name,
                *(tokens(text, EOS) for text in texts[name]),
                prompt=random.randint(1, 15),
                **{**width, "n": len(texts[name])},
            )
        if step % 7 == 0 and texts:
            name = random.choice(list(texts))
            if not bench.events[name] or not bench.events[name][-1].last:
                aborted.add(name)
                bench.engine.abort(name)
        if bench.engine.has_work:
            bench.step()
    bench.finish()

    assert len(aborted) > 5
    assert len(texts) > 100
    for name, wanted in texts.items():
        if name not in aborted:
            assert bench.texts(name) == wanted
            for index, text in enumerate(wanted):
                assert bench.answer(name, index) == (tokens(text, EOS), text, "stop")
