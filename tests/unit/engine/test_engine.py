from __future__ import annotations

from random import Random
from typing import Any

import pytest

from blip2_serve.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from blip2_serve.types import TokenEvent
from support.byte_tokens import EOS, OTHER_EOS, tokens
from support.engine_bench import Bench, Script

pytestmark = pytest.mark.usefixtures("devices")


def run(script: Script, **params: Any) -> tuple[list[int], str, str | None]:
    bench = Bench()
    bench.add("a", script, **params)
    bench.finish()
    return bench.answer("a")


@pytest.mark.parametrize("eos", [EOS, OTHER_EOS])
def test_an_end_token_ends_the_answer_and_adds_no_text(eos: int) -> None:
    script = tokens("cat", eos, *b" tail")
    assert run(script) == (tokens("cat", eos), "cat", "stop")


def test_the_first_token_may_be_an_end_token() -> None:
    assert run([EOS, 65]) == ([EOS], "", "stop")


def test_ignored_end_tokens_do_not_end_the_answer() -> None:
    script = tokens("ca", EOS, *b"t")
    assert run(script, ignore_eos=True) == (script, "cat", "length")


def test_an_end_token_at_max_tokens_is_a_stop() -> None:
    assert run(tokens("cat", EOS)) == (tokens("cat", EOS), "cat", "stop")


@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens_limits_the_answer(max_tokens: int) -> None:
    text = "a cat sits"[:max_tokens]
    assert run("a cat sits", max_tokens=max_tokens) == (tokens(text), text, "length")


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    assert run("a日", max_tokens=3) == (tokens("a日")[:3], "a\ufffd", "length")


def test_a_stop_string_ends_the_answer_and_is_cut_off() -> None:
    assert run("one\ntwo\n", stop=("wo", "\nt")) == (tokens("one\nt"), "one", "stop")


def test_a_stop_string_at_max_tokens_is_a_stop() -> None:
    assert run("one.", stop=(".",)) == (tokens("one."), "one", "stop")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        pytest.param(tokens("one##"), "length", id="at the limit"),
        pytest.param(tokens("one##", EOS), "stop", id="at an end token"),
    ],
)
def test_an_incomplete_stop_string_is_text(script: list[int], reason: str) -> None:
    assert run(script, stop=("###",)) == (script, "one##", reason)


def test_a_stop_string_before_min_tokens_is_text() -> None:
    assert run("a.bc.d", stop=(".",), min_tokens=3) == (tokens("a.bc."), "a.bc", "stop")


def test_events_have_one_token_and_the_length_of_the_prompt() -> None:
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
        pytest.param({"num_beams": 3, "n": 3}, id="as many answers as beams"),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_an_aborted_request_frees_everything(steps: int, params: dict[str, int]) -> None:
    bench = Bench()
    # The prompt takes two steps.
    bench.add("a", "a long answer", "a lone animal", "all alone", prompt=30, **params)
    for _ in range(steps):
        bench.step()
    bench.engine.abort("a")
    bench.engine.check_integrity()
    bench.finish()
    assert not any(event.last for event in bench.events["a"])


def test_an_abort_does_not_affect_other_requests() -> None:
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


def test_aborting_an_unknown_request_does_nothing() -> None:
    bench = Bench()
    bench.add("a", "cat")
    bench.finish()
    bench.engine.abort("a")
    bench.engine.abort("b")
    bench.engine.check_idle()


def test_a_rejected_request_leaves_no_state() -> None:
    bench = Bench(slots=10, max_num_seqs=1, max_waiting=0)
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


def test_stats_count_sequences_requests_and_slots() -> None:
    bench = Bench(max_num_seqs=4)
    for name in "abc":
        bench.add(name, "cat", "cow", n=2)
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting, stats.kv_slots_used, stats.steps) == (0, 3, 0, 0)
    bench.step()
    stats = bench.engine.stats()
    assert (stats.running, stats.waiting) == (4, 1)
    assert stats.steps == (2 if bench.asynchronous else 1)
    assert (stats.kv_slots_used, stats.kv_slots_total) == (2 * (3 + 2 * (3 - 1)), 200)
    assert stats.kv_slots_cached == 0
    bench.finish()
    assert bench.engine.stats().kv_slots_used == 0


# -- samples ---------------------------------------------------------------------------------------


def test_samples_can_end_at_different_times() -> None:
    bench = Bench()
    bench.add("a", tokens("cat", EOS), "a cow.", "horses", n=3, stop=(".",), max_tokens=6)
    bench.finish()
    assert bench.texts("a") == ["cat", "a cow", "horses"]
    assert [bench.answer("a", i)[2] for i in range(3)] == ["stop", "stop", "length"]


def test_samples_share_one_prefill() -> None:
    bench = Bench()
    bench.add("a", "cat", "cow", "dog", n=3, prompt=30)
    bench.finish()
    assert bench.runner.computed == 30 + 3 * 2


# -- log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scripts", "params"),
    [
        pytest.param(["cat", "cow"], {"n": 2}, id="samples"),
        pytest.param(["cat", "cow"], {"num_beams": 2}, id="best beam"),
        pytest.param(["cat", "cow"], {"num_beams": 2, "n": 2}, id="all beams"),
    ],
)
def test_tokens_have_log_probabilities_if_requested(
    scripts: list[Script], params: dict[str, int]
) -> None:
    bench = Bench()
    bench.add("with", *scripts, top_logprobs=0, **params)
    bench.add("without", *scripts, **params)
    bench.finish()
    for event in bench.events["with"]:
        assert [logprob.token_id for logprob in event.logprobs] == [*event.token_ids]
    for index in range(params.get("n", 1)):
        events = [e for e in bench.events["with"] if e.index == index]
        assert [o.logprob for e in events for o in e.logprobs] == [-0.0, -1.0, -2.0]
    assert not any(event.logprobs for event in bench.events["without"])


# -- prefix caching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="one answer"),
        pytest.param({"n": 2}, id="samples"),
        pytest.param({"num_beams": 2}, id="beams"),
    ],
)
def test_a_follow_up_request_reuses_the_cached_prompt_and_answer(
    params: dict[str, int],
) -> None:
    bench = Bench(prefix_caching=True, step=100)
    bench.add("first", "cat", "cow", prompt=30, **params)
    bench.finish()
    assert bench.engine.stats().kv_slots_cached == bench.engine.stats().kv_slots_used > 30
    before = bench.runner.computed
    bench.add("second", "ok", prompt=[7] * 30 + tokens("cat") + [8])
    bench.finish()
    # Computed were "t", whose keys and values the first request never needed, 8 and "o".
    assert bench.runner.computed - before == 3
    assert bench.engine.stats().cached_tokens == 30 + len("ca")
    assert bench.texts("second") == ["ok"]


def test_an_aborted_request_leaves_its_prompt_cached() -> None:
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
    "prefix_caching", [True, False], ids=["prefix caching", "no prefix caching"]
)
def test_requests_join_and_leave_at_every_step(prefix_caching: bool) -> None:
    random = Random(0)
    bench = Bench(slots=120, max_num_seqs=6, step=10, prefix_caching=prefix_caching)
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
    for name, expected in texts.items():
        if name not in aborted:
            assert bench.texts(name) == expected
            for index, text in enumerate(expected):
                assert bench.answer(name, index) == (tokens(text, EOS), text, "stop")


def test_an_abort_while_the_prompt_is_computed_leaves_the_cache_intact() -> None:
    bench = Bench(prefix_caching=True, step=100)
    bench.add("a", "cat", prompt=30)
    bench.engine.step()
    bench.engine.abort("a")
    bench.finish()
    bench.engine.check_integrity()
    bench.add("b", "cow", prompt=30)
    bench.finish()
    assert bench.texts("b") == ["cow"]
