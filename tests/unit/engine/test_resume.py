"""A resumed request goes on as if it had never been interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from blip2_serve.errors import InvalidRequest, Unavailable
from blip2_serve.types import TokenEvent
from support.byte_tokens import EOS, tokens
from support.engine_bench import Bench, Script
from support.resuming import Sent, check_last, cuts, rest

pytestmark = pytest.mark.usefixtures("devices")

PROMPT = 20  # more than a step


def run(*scripts: Script, sent: Sent = (), **params: Any) -> list[TokenEvent]:
    bench = Bench(prefix_caching=True)
    bench.add("a", *scripts, prompt=PROMPT, sent=sent, **params)
    bench.finish()
    assert not bench.failures
    check_last(bench.events["a"])
    return bench.events["a"]


def ids(text: str) -> tuple[int, ...]:
    return tuple(tokens(text))


def not_last(answers: dict[int, TokenEvent]) -> dict[int, TokenEvent]:
    """Which answer ends last depends on where each is cut."""
    return {index: replace(event, last=False) for index, event in answers.items()}


SAMPLES = ("a bird sings", tokens("one", EOS), "日本語 é")

CASES = [
    pytest.param(["a cat sits"], {}, id="to max_tokens"),
    pytest.param([tokens("a cat", EOS)], {"max_tokens": 9}, id="to an end token"),
    pytest.param([tokens("a", EOS, *b"c", EOS)], {"ignore_eos": True}, id="ignored end tokens"),
    pytest.param(["é日🐈b日"], {}, id="characters of several tokens"),
    pytest.param(["one##two###4"], {"stop": ("###",)}, id="a stop string"),
    pytest.param(["one##two##"], {"stop": ("###",)}, id="half a stop string at the end"),
    pytest.param(["a.b.c.d.e"], {"stop": (".c", "."), "min_tokens": 6}, id="min_tokens"),
    pytest.param(["a cat sits"], {"top_logprobs": 0}, id="log-probabilities"),
    pytest.param(["x" * 50], {}, id="more than a step"),
    pytest.param([*SAMPLES], {"n": 3, "max_tokens": 11, "top_logprobs": 0}, id="samples"),
    pytest.param(["ab.cd", "abc.d", "abcd."], {"n": 3, "stop": (".",)}, id="samples that stop"),
    pytest.param(
        ["the cat sits", "the cow runs"],
        {"num_beams": 2, "early_stopping": True, "top_logprobs": 0},
        id="the best beam",
    ),
    pytest.param(["a. cat sat", "a. cow ate"], {"num_beams": 2, "stop": (" c",)}, id="beams stop"),
    pytest.param(
        ["cat.sat", "cow ate", "dog"], {"num_beams": 3, "n": 2, "stop": (".",)}, id="best two beams"
    ),
]


@pytest.mark.parametrize(("scripts", "params"), CASES)
def test_an_answer_cut_anywhere_goes_on_where_it_was(
    scripts: list[Script], params: dict[str, Any]
) -> None:
    n = params.get("n", 1)
    whole = run(*scripts, **params)
    for sent, counts in cuts(whole, n, most=200):
        resumed = run(*scripts, sent=sent, **params)
        assert not_last(rest(resumed, [0] * n)) == not_last(rest(whole, counts))


def test_what_was_sent_is_computed_like_a_prompt() -> None:
    bench = Bench(step=16)
    script = "x" * 101
    bench.add("a", script, prompt=16, sent=(ids(script[:96]),))
    bench.finish()
    assert bench.answer("a") == (tokens("x" * 5), "x" * 5, "length")
    # One for the prompt, six for 96 tokens, of which the last gives a token, and four tokens more.
    assert bench.engine.stats().steps == 1 + 6 + 4
    assert bench.runner.computed == 16 + 100


def test_others_go_on_while_an_answer_is_restored() -> None:
    bench = Bench(step=8)
    bench.add("a", "a cat sits here and purrs")
    bench.step()
    bench.add("b", "y" * 40, sent=(ids("y" * 39),))
    for _ in range(5):
        before = len(bench.events["a"])
        bench.step()
        assert len(bench.events["a"]) == before + 1
        assert not bench.events["b"]
    bench.finish()
    assert bench.texts("b") == ["y"]


def test_a_restored_answer_whose_last_token_is_alone_in_its_step() -> None:
    bench = Bench(step=8)
    bench.add("a", "y" * 12, prompt=8, sent=(ids("y" * 9),))
    bench.finish()
    assert bench.texts("a") == ["yyy"]


@pytest.mark.parametrize("steps", range(1, 6))
def test_aborting_a_resumed_request_frees_everything(steps: int) -> None:
    bench = Bench()
    sent = (ids("x" * 30), (), None)
    bench.add("a", *["x" * 40] * 3, n=3, prompt=30, sent=sent)
    for _ in range(steps):
        bench.step()
    bench.engine.abort("a")
    bench.engine.check_integrity()
    bench.finish()


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize(
    ("sent", "params", "end"),
    [
        pytest.param("cat.", {"stop": (".",)}, ("", "stop"), id="a stop string"),
        pytest.param("one#", {"max_tokens": 4, "stop": ("##",)}, ("#", "length"), id="max_tokens"),
    ],
)
def test_an_answer_that_was_sent_to_its_end_only_ends(
    sent: str, params: dict[str, Any], end: tuple[str, str], beams: int
) -> None:
    events = run("unused", "unused", sent=(ids(sent),), num_beams=beams, **params)
    assert [(e.token_ids, e.text, e.finish_reason) for e in events] == [((), *end)]


def test_an_end_token_that_was_sent_ends_its_answer_and_no_other() -> None:
    scripts = tokens("a#", EOS), tokens("bcd", EOS)
    events = run(*scripts, n=2, stop=("##",), sent=(tuple(scripts[0]), ids("b")))
    assert rest(events, [0, 0]) == {
        0: TokenEvent((), "#", "stop", PROMPT, 0),
        1: TokenEvent(tuple(scripts[1][1:]), "cd", "stop", PROMPT, 1, last=True),
    }


def test_a_beam_search_that_finds_another_answer_fails() -> None:
    for sent in ("the dog", "the cat it"):
        bench = Bench(max_num_seqs=5)
        beams = {"num_beams": 2, "early_stopping": True}
        bench.add("a", tokens("the cat", EOS), "the cow runs", sent=(ids(sent),), **beams)
        bench.add("b", "another")
        bench.finish()
        assert isinstance(bench.failures["a"], Unavailable)
        assert not bench.events["a"]
        assert bench.texts("b") == ["another"]


def test_what_was_sent_must_fit_the_answers() -> None:
    bench = Bench()
    for sent in ((None, None), ((), (), ())):
        with pytest.raises(InvalidRequest):
            bench.add("a", "cat", "cow", n=2, sent=sent)
    bench.finish()
