from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from blip2_serve.engine.detokenizer import Detokenizer


class Tokens:
    """A byte-level vocabulary of given pieces: token i is piece i."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = list(pieces)

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def deltas(self, stop: tuple[str, ...] = (), min_tokens: int = 0) -> list[str]:
        """Returns the text of each `push`, as the engine calls it, and that of `close`."""
        detokenizer = Detokenizer(self.decode, stop)
        deltas = []
        for i in range(len(self.pieces)):
            deltas.append(detokenizer.push(i, may_stop=i + 1 >= min_tokens))
            if detokenizer.stopped:
                break
        return [*deltas, detokenizer.close()]


def letters(text: str) -> Tokens:
    return Tokens(c.encode() for c in text)


@st.composite
def pieces(draw: st.DrawFn, contents: st.SearchStrategy[bytes]) -> tuple[bytes, Tokens]:
    """Draws bytes and cuts them into tokens anywhere, even inside characters."""
    content = draw(contents)
    cuts = draw(st.sets(st.integers(0, len(content))))
    borders = sorted({0, len(content), *cuts})
    return content, Tokens(content[a:b] for a, b in pairwise(borders))


def utf8(alphabet: str | None = None) -> st.SearchStrategy[bytes]:
    return st.text(alphabet or st.characters(exclude_categories=["Cs"]), max_size=30).map(
        lambda text: text.encode()
    )


@given(pieces(utf8()))
def test_deltas_add_up_to_the_text(case: tuple[bytes, Tokens]) -> None:
    content, tokens = case
    deltas = tokens.deltas()
    text = content.decode()
    assert "".join(deltas) == text
    assert sum(d.count("\ufffd") for d in deltas) == text.count("\ufffd")


@given(pieces(st.binary(max_size=30)))
def test_invalid_utf8_gives_the_same_text_as_decoding_at_once(case: tuple[bytes, Tokens]) -> None:
    content, tokens = case
    assert "".join(tokens.deltas()) == content.decode("utf-8", errors="replace")


@given(pieces(utf8("abé")), st.text("abé", min_size=1, max_size=4))
def test_text_ends_before_the_stop_string(case: tuple[bytes, Tokens], stop: str) -> None:
    content, tokens = case
    assert "".join(tokens.deltas((stop,))) == content.decode().split(stop)[0]


@given(
    pieces(utf8("abé")),
    st.sets(st.text("abé", min_size=1, max_size=4), min_size=2, max_size=4),
)
def test_the_earliest_stop_string_wins(case: tuple[bytes, Tokens], stops: set[str]) -> None:
    assume(not any(a != b and a in b for a in stops for b in stops))
    content, tokens = case
    text = content.decode()
    end = min((at for at in map(text.find, stops) if at >= 0), default=len(text))
    assert "".join(tokens.deltas(tuple(stops))) == text[:end]


@given(pieces(utf8("ab日")), st.text("ab日", min_size=1, max_size=3))
def test_the_token_that_completes_a_stop_string_stops(
    case: tuple[bytes, Tokens], stop: str
) -> None:
    content, tokens = case
    detokenizer = Detokenizer(tokens.decode, (stop,))
    received = b""
    for i, piece in enumerate(tokens.pieces):
        detokenizer.push(i)
        received += piece
        text = received.decode("utf-8", errors="replace")
        if not text.endswith("\ufffd"):
            assert detokenizer.stopped == (stop in text)
        if detokenizer.stopped:
            return
    assert stop not in content.decode()


def test_plain_text_is_not_delayed() -> None:
    assert letters("hello").deltas(stop=("xyz",)) == ["h", "e", "l", "l", "o", ""]


def test_characters_are_not_split() -> None:
    tokens = Tokens([b"a", b"\xe6", b"\x97", b"\xa5", b"b"])
    assert tokens.deltas() == ["a", "", "", "日", "b", ""]


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    assert Tokens([b"a", b"\xe6\x97"]).deltas() == ["a", "", "\ufffd"]


def test_a_possible_stop_string_is_held_back() -> None:
    assert letters("a##b").deltas(stop=("###",)) == ["a", "", "", "##b", ""]


def test_an_incomplete_stop_string_at_the_end_is_text() -> None:
    assert letters("a##").deltas(stop=("###",)) == ["a", "", "", "##"]


def test_text_before_a_stop_string_in_the_same_token_is_kept() -> None:
    assert Tokens([b"one", b" two\n\nthree"]).deltas(stop=("\n\n",)) == ["one", " two", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        pytest.param("aaab", ("aab",), "a", id="restarts inside a partial match"),
        pytest.param("abcd", ("abcd", "bc"), "a", id="the inner one ends first"),
        pytest.param("xab", ("ab", "b"), "x", id="two end together, the longer wins"),
        pytest.param("ab", ("ab",), "", id="only a stop string"),
        pytest.param("naïve!", ("ï",), "na", id="a character of two bytes"),
    ],
)
def test_text_is_cut_at_the_stop_string(text: str, stop: tuple[str, ...], expected: str) -> None:
    assert "".join(letters(text).deltas(stop)) == expected


def test_nothing_follows_a_stop_string() -> None:
    tokens = letters("a.b")
    detokenizer = Detokenizer(tokens.decode, (".",))
    assert [detokenizer.push(0), detokenizer.push(1), detokenizer.close()] == ["a", "", ""]
    assert detokenizer.stopped


def test_a_stop_string_before_an_incomplete_character_is_cut_off() -> None:
    # Real vocabularies have such tokens: GPT-2's 564 is a space and two of a quote's three bytes.
    assert "".join(Tokens([b"one", b"\n\xe2\x80"]).deltas(stop=("\n",))) == "one"


@pytest.mark.parametrize(
    ("text", "stop", "min_tokens", "expected"),
    [
        pytest.param("a.b.c", (".",), 0, "a", id="no minimum"),
        pytest.param("a.b.c", (".",), 2, "a", id="first ends at the minimum"),
        pytest.param("a.b.c", (".",), 3, "a.b", id="first too early"),
        pytest.param("a.b.c", (".",), 9, "a.b.c", id="all too early"),
        pytest.param("a##b", ("##",), 3, "a", id="starts too early, ends in time"),
        pytest.param("abx", ("a", "abc"), 2, "abx", id="too early, prefix of a longer one"),
    ],
)
def test_a_stop_string_only_counts_from_min_tokens_on(
    text: str, stop: tuple[str, ...], min_tokens: int, expected: str
) -> None:
    assert "".join(letters(text).deltas(stop, min_tokens)) == expected


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE like OPT's, so small that rare characters are split into bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a photo of two cats — on a sofa — in a café"] * 3, trainer)
    return tokenizer


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(" a photo of two cats on a sofa", id="words"),
        pytest.param("naïve — “quoted”\n\n  two  spaces", id="punctuation and spaces"),
        pytest.param("日本語とрусский и עברית", id="other scripts"),
        pytest.param("👩‍👩‍👧‍👦 and 🇩🇪 and e\u0301", id="combined characters"),
    ],
)
def test_byte_level_tokens_give_the_same_text_one_by_one(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    detokenizer = Detokenizer(tokenizer.decode)
    deltas = [*map(detokenizer.push, ids), detokenizer.close()]
    assert "".join(deltas) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in delta for delta in deltas)


def test_special_tokens_add_no_text(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("</s>")
    detokenizer = Detokenizer(tokenizer.decode)
    ids = [*tokenizer.encode("two").ids, end, end, *tokenizer.encode(" cats").ids]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.close() == "two cats"
