from __future__ import annotations

from collections import defaultdict
from random import Random
from typing import Any

import pytest

from blip2_serve.engine.engine import Engine
from blip2_serve.engine.kv import KvRows
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Sequence
from blip2_serve.errors import ContextLengthExceeded, Overloaded
from blip2_serve.types import SamplingParams, TokenEvent

EOS, OTHER_EOS = 256, 257  # all other tokens are bytes


class NoRunner:
    def run(self, chunks: list[Chunk]) -> str:
        assert chunks
        return "logits"


class Scripted:
    """'Samples' what was written down for each sequence."""

    def __init__(self, scripts: dict[str, list[int]]) -> None:
        self.scripts = scripts

    def sample(self, logits: Any, sequences: list[Sequence]) -> list[int]:
        assert logits == "logits"
        return [self.scripts[s.id][len(s.output)] for s in sequences]


def decode(ids: list[int]) -> str:
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class Bench:
    def __init__(
        self, rows: int = 200, max_running: int = 4, max_waiting: int = 1000, step: int = 16
    ) -> None:
        self.scripts: dict[str, list[int]] = {}
        scheduler = Scheduler(
            KvRows(rows), max_running=max_running, max_waiting=max_waiting, max_step_tokens=step
        )
        self.engine = Engine(
            NoRunner(),
            scheduler,
            Scripted(self.scripts),
            decode=decode,
            eos_token_ids=(EOS, OTHER_EOS),
        )
        self.events: defaultdict[str, list[TokenEvent]] = defaultdict(list)

    def add(
        self, name: str, script: str | list[int], prompt: int = 3, **params: Any
    ) -> SamplingParams:
        tokens = [*script.encode()] if isinstance(script, str) else script
        self.scripts[name] = tokens
        sampling = SamplingParams(**{"max_tokens": len(tokens), **params})
        self.engine.add(Sequence(name, [7] * prompt, None, sampling))
        return sampling

    def step(self) -> None:
        for name, event in self.engine.step():
            self.events[name].append(event)
        self.engine.check_integrity()

    def finish(self) -> None:
        while self.engine.has_work:
            self.step()
        self.engine.check_idle()

    def answer(self, name: str) -> tuple[list[int], str, str | None]:
        """Token ids, text and the reason why it ended."""
        events = self.events[name]
        assert all(e.finish_reason is None for e in events[:-1])
        ids = [token for e in events for token in e.token_ids]
        return ids, "".join(e.text for e in events), events[-1].finish_reason


def run(script: str | list[int], **params: Any) -> tuple[list[int], str, str | None]:
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
    ids, text, reason = run("one\ntwo\n", stop=("wo", "\nt"))
    assert (ids, text, reason) == (tokens("one\nt"), "one", "stop")


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
    ids, text, reason = run("a.bc.d", stop=(".",), min_tokens=3)
    assert (ids, text, reason) == (tokens("a.bc."), "a.bc", "stop")


def test_events_carry_one_token_each_and_the_length_of_the_prompt() -> None:
    bench = Bench()
    bench.add("a", "cat", prompt=40)
    bench.finish()
    assert bench.events["a"] == [
        TokenEvent((ord("c"),), "c", None, 40),
        TokenEvent((ord("a"),), "a", None, 40),
        TokenEvent((ord("t"),), "t", "length", 40),
    ]


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_sequence_leaves_nothing(steps: int) -> None:
    bench = Bench()
    bench.add("a", "a long answer", prompt=30)  # two steps of prompt
    for _ in range(steps):
        bench.step()
    bench.engine.abort("a")
    bench.engine.check_integrity()
    bench.engine.check_idle()
    assert not bench.engine.has_work


def test_an_aborted_sequence_leaves_the_others_alone() -> None:
    bench = Bench(max_running=2)
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


def test_a_refused_sequence_leaves_nothing() -> None:
    bench = Bench(rows=10, max_running=1, max_waiting=0)
    with pytest.raises(ContextLengthExceeded):
        bench.add("large", "cat", prompt=11)
    bench.add("a", "cat")
    with pytest.raises(Overloaded):
        bench.add("b", "cat")
    bench.engine.check_integrity()
    bench.finish()
    assert [*bench.events] == ["a"]


def test_the_counts_tell_what_is_held() -> None:
    bench = Bench(max_running=2)
    for name in "abc":
        bench.add(name, "cat")
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_rows_used, stats.steps) == (0, 3, 0, 0)
    bench.step()
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting, stats.steps) == (2, 1, 1)
    assert (stats.kv_rows_used, stats.kv_rows_total) == (2 * (3 + 3 - 1), 200)
    bench.finish()
    assert bench.engine.stats().kv_rows_used == 0


def test_requests_join_and_leave_at_every_step() -> None:
    random = Random(0)
    bench = Bench(rows=120, max_running=6, step=10)
    texts: dict[str, str] = {}
    aborted: set[str] = set()
    for step in range(300):
        for _ in range(random.randint(0, 1)):
            name = f"r{len(texts)}"
            texts[name] = "".join(random.choices("ab é日🐈", k=random.randint(1, 12)))
            ends = [EOS] if random.random() < 0.5 else []
            bench.add(name, tokens(texts[name], *ends), prompt=random.randint(1, 30))
        if step % 7 == 0 and texts:
            name = random.choice(list(texts))
            if not bench.events[name] or bench.events[name][-1].finish_reason is None:
                aborted.add(name)
                bench.engine.abort(name)
        if bench.engine.has_work:
            bench.step()
    bench.finish()

    assert len(aborted) > 5
    for name, text in texts.items():
        if name not in aborted:
            ids, answer, reason = bench.answer(name)
            assert (ids, answer) == (bench.scripts[name], text)
            assert reason == ("stop" if ids[-1] == EOS else "length")
