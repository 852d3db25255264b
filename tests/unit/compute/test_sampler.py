from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blip2_serve.compute.base import Device
from blip2_serve.compute.devices import open_device
from blip2_serve.compute.sampler import Choice, Sampler
from blip2_serve.engine.beam import Candidate
from blip2_serve.engine.sequence import Sequence
from blip2_serve.engine.step import NO_NUMBERS
from blip2_serve.types import SamplingParams, TokenLogprob
from support.device import DEVICE
from support.requests import make_request

OPENED = open_device(str(DEVICE))
VOCABULARY = 20
EOS = (2, 5)


def sequence(
    prompt: list[int] | None = None, output: int = 0, index: int = 0, **params: Any
) -> Sequence:
    return Sequence(make_request("a", prompt or [0], **params), index, output=[1] * output)


def choose(
    logits: Tensor,
    *sequences: Sequence,
    rows: list[int] | None = None,
    eos: tuple[int, ...] = EOS,
) -> list[Choice]:
    """Chooses a token per sequence; by default, each sequence has its own row."""
    logits = OPENED.upload(logits)
    before = logits.clone()
    rows = list(range(len(sequences))) if rows is None else rows
    choices = Sampler(eos, OPENED).choose(logits, rows, list(sequences))()
    same_bits = torch.equal(logits.view(torch.int32), before.view(torch.int32))
    assert same_bits, "the logits are others' too"
    return choices


def sample(logits: Tensor, *sequences: Sequence, rows: list[int] | None = None) -> list[int]:
    return [choice.token for choice in choose(logits, *sequences, rows=rows)]


def expand(
    logits: Tensor, *beams: Sequence, count: int, rows: list[int] | None = None
) -> list[Candidate]:
    logits = OPENED.upload(logits)
    before = logits.clone()
    rows = list(range(len(beams))) if rows is None else rows
    candidates = Sampler(EOS, OPENED).expand(logits, rows, list(beams), count)()
    assert torch.equal(logits, before), "the logits are others' too"
    return candidates


def random_logits(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def one_row(**logits: float) -> Tensor:
    """`_3=1.5` sets the logit of token 3 to 1.5; all others are -4."""
    row = torch.full((1, VOCABULARY), -4.0)
    for token, logit in logits.items():
        row[0, int(token[1:])] = logit
    return row


def test_zero_temperature_takes_the_largest_logit() -> None:
    logits = random_logits(6)
    assert sample(logits, *[sequence()] * 6) == logits.argmax(-1).tolist()


def test_no_sequences_give_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_end_tokens(temperature: float) -> None:
    logits = one_row(_2=30.0, _5=29.0, _7=3.0)
    params = {"min_tokens": 3, "temperature": temperature}
    tokens = [sample(logits, sequence(output=n, **params))[0] for n in range(5)]
    assert not {*tokens[:3]} & {*EOS}
    assert {*tokens[3:]} <= {*EOS}


def test_the_repetition_penalty_counts_prompt_and_answer() -> None:
    logits = one_row(_3=2.0, _1=1.9, _4=1.5)
    assert sample(logits, sequence([3])) == [3]
    assert sample(logits, sequence([3], repetition_penalty=2.0)) == [1]
    assert sample(logits, sequence([3], output=1, repetition_penalty=2.0)) == [4]


def test_repeated_occurrences_are_penalised_once() -> None:
    logits = one_row(_3=2.0, _4=1.5)
    assert sample(logits, sequence([3, 3, 3], repetition_penalty=1.2)) == [3]


def test_the_penalty_lowers_negative_logits() -> None:
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, 3], logits[0, 4] = -1.0, -1.5
    assert sample(logits, sequence([3], repetition_penalty=2.0)) == [4]


def test_frequency_and_presence_penalties_count_the_answer_only() -> None:
    logits = one_row(_3=2.0, _1=1.9, _4=1.5)
    prompted = {"prompt": [3, 3, 3], "frequency_penalty": 2.0, "presence_penalty": 2.0}
    assert sample(logits, sequence(**prompted)) == [3]
    assert sample(logits, sequence(output=1, presence_penalty=-0.2)) == [1]
    assert sample(logits, sequence(output=1, frequency_penalty=-0.2)) == [1]
    # Twice in the answer: twice the frequency penalty, but one presence penalty.
    assert sample(logits, sequence(output=2, presence_penalty=-0.09)) == [3]
    assert sample(logits, sequence(output=2, frequency_penalty=-0.09)) == [1]


def test_a_bias_is_added_before_the_temperature() -> None:
    logits = one_row(_3=2.0, _4=1.0)
    assert sample(logits, sequence(logit_bias=((4, 1.5),))) == [4]
    assert sample(logits, sequence(logit_bias=((3, -100.0),))) == [4]
    cold = [sequence(seed=n, temperature=0.01, logit_bias=((4, 1.5),)) for n in range(20)]
    assert sample(logits, *cold, rows=[0] * 20) == [4] * 20


def test_penalties_are_one_update_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[int] = []
    upload = OPENED.upload

    def counted(tensor: Tensor) -> Tensor:
        uploads.append(tensor.numel())
        return upload(tensor)

    sequences = [
        sequence([3, 4], output=n, frequency_penalty=0.5, logit_bias=((n, 1.0),)) for n in range(9)
    ]
    monkeypatch.setattr(OPENED, "upload", counted)
    logits = random_logits(9)
    Sampler(EOS, OPENED).choose(logits, [*range(9)], sequences)()
    assert len(uploads) == 1
    Sampler(EOS, OPENED).choose(logits, [*range(9)], [sequence()] * 9)()
    assert len(uploads) == 1


def test_a_sampled_token_depends_only_on_its_own_row() -> None:
    logits = random_logits(8)
    alone = [sample(logits[i : i + 1], sequence(seed=i, temperature=1.5))[0] for i in range(8)]
    together = sample(logits, *[sequence(seed=i, temperature=1.5) for i in range(8)])
    backwards = sample(
        logits.flip(0), *[sequence(seed=i, temperature=1.5) for i in reversed(range(8))]
    )
    among_greedy = sample(
        logits.repeat_interleave(2, 0),
        *[sequence(seed=i, temperature=t) for i in range(8) for t in (1.5, 0.0)],
    )
    assert together == alone
    assert backwards == alone[::-1]
    assert among_greedy[::2] == alone
    assert among_greedy[1::2] == logits.argmax(-1).tolist()


def test_different_seeds_sample_different_tokens() -> None:
    flat = torch.zeros(40, VOCABULARY)
    tokens = sample(flat, *[sequence(seed=seed, temperature=1.0) for seed in range(40)])
    assert len(set(tokens)) > 10


def test_different_positions_sample_different_tokens() -> None:
    flat = torch.zeros(40, VOCABULARY)
    tokens = sample(flat, *[sequence(output=n, seed=1, temperature=1.0) for n in range(40)])
    assert len(set(tokens)) > 10


def test_different_samples_get_different_tokens() -> None:
    flat = torch.zeros(1, VOCABULARY)
    samples = [sequence(index=n, seed=1, temperature=1.0) for n in range(40)]
    assert len(set(sample(flat, *samples, rows=[0] * 40))) > 10


def test_sharing_a_row_does_not_change_the_samples() -> None:
    logits = random_logits(3)
    samples = [sequence(index=n, seed=1, temperature=1.5, n=4) for n in range(4)]
    other = sequence(seed=2, temperature=1.5)
    apart = sample(logits[[1, 1, 1, 1, 2]], *samples, other)
    assert sample(logits, *samples, other, rows=[1, 1, 1, 1, 2]) == apart


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_64_bit_seed_is_valid(seed: int) -> None:
    assert sample(random_logits(), sequence(seed=seed, temperature=1.0))[0] in range(VOCABULARY)


@pytest.mark.parametrize(
    "vary",
    [
        pytest.param(lambda n: {"seed": n}, id="seeds"),
        pytest.param(lambda n: {"seed": 3, "output": n}, id="positions of one seed"),
        pytest.param(lambda n: {"seed": 3, "index": n}, id="samples of one seed"),
    ],
)
def test_token_frequencies_match_their_probabilities(vary: Any) -> None:
    draws = 4000
    row = torch.tensor([[0.0, 1.0, -1.0, 0.5, -0.5]])
    sequences = [sequence(temperature=0.8, **vary(n)) for n in range(draws)]
    tokens = [choice.token for choice in choose(row.repeat(draws, 1), *sequences, eos=())]
    expected = (row[0].double() / 0.8).softmax(-1) * draws
    counts = torch.bincount(torch.tensor(tokens), minlength=5).double()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: exceeded once in a thousand


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 1.5, "top_k": 1}, id="top_k 1"),
        pytest.param({"temperature": 1.5, "top_p": 1e-9}, id="tiny top_p"),
        pytest.param({"temperature": 1.5, "top_p": 0.0}, id="top_p 0"),
        pytest.param({"temperature": 1e-3}, id="low temperature"),
        pytest.param({"temperature": 1e-308}, id="temperature that makes logits infinite"),
        pytest.param({"temperature": 5e-324}, id="smallest temperature"),
        pytest.param({"temperature": 1e-308, "top_k": 5}, id="infinite logits and top_k"),
    ],
)
def test_extreme_parameters_are_greedy(params: dict[str, Any]) -> None:
    logits = random_logits(10)
    tokens = sample(logits, *[sequence(seed=n, **params) for n in range(10)])
    assert tokens == logits.argmax(-1).tolist()


def test_top_k_may_exceed_the_vocabulary() -> None:
    logits = random_logits(10)
    everything = [sequence(seed=n, temperature=1.0) for n in range(10)]
    more = [sequence(seed=n, temperature=1.0, top_k=1000) for n in range(10)]
    assert sample(logits, *more) == sample(logits, *everything)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_impossible_tokens_are_never_sampled(number: float, monkeypatch: Any) -> None:
    monkeypatch.setattr("blip2_serve.compute.sampler.uniform", lambda *_: number)
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 4], logits[0, 9] = 0.1, 0.7
    assert sample(logits, sequence(temperature=1.0)) == [4 if number == 0 else 9]
    many = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    many[:, :70] = many[:, 4900:] = -torch.inf
    tokens = sample(many, *[sequence(temperature=1.0)] * 40)
    assert tokens == [70 if number == 0 else 4899] * 40


def test_the_vocabulary_of_opt_may_be_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2_serve.compute.sampler.uniform", lambda n, *_: (n + 0.5) / 50304)
    seeds = [0, 127, 128, 30_000, 50_303]
    sequences = [sequence(seed=seed, temperature=1.0) for seed in seeds]
    assert sample(torch.zeros(1, 50304), *sequences, rows=[0] * len(seeds)) == seeds


# -- batches ---------------------------------------------------------------------------------------

# More columns than the sums' parts have, and not a multiple of them.
MANY = 300

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.5, "top_k": 60},
    {"temperature": 1.5, "top_k": 1000},
    {"temperature": 1.5, "top_k": 60, "min_p": 0.2},
    {"temperature": 0.7, "top_p": 0.6},
    {"temperature": 1.5, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.5, "top_k": 60, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.99, "min_p": 0.1},
    {"temperature": 1.2, "repetition_penalty": 1.4},
    {"temperature": 1.2, "repetition_penalty": 0.8, "min_tokens": 9, "top_p": 0.9},
    {"repetition_penalty": 1.4, "min_tokens": 9},
    {"temperature": 1.2, "min_tokens": 9, "top_k": 30, "top_logprobs": 3},
    {"frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"temperature": 0.9, "frequency_penalty": 0.3, "logit_bias": ((4, 3.0), (7, -100.0))},
    {"logit_bias": ((2, 50.0),), "repetition_penalty": 1.4, "min_tokens": 2, "top_logprobs": 1},
    {"top_logprobs": 5},
    {"temperature": 1.0, "top_logprobs": 0},
]


def rounded_logits(rows: int, seed: int = 0) -> Tensor:
    """Many of them are equal, as they are when computed in bfloat16."""
    logits = torch.randn(rows, MANY, generator=torch.Generator().manual_seed(seed)) * 2
    return (logits * 4).round() / 4


def all_kinds(count: int) -> list[Sequence]:
    return [
        sequence([n % 7, 3, 11], output=n % 5, seed=n, **KINDS[n % len(KINDS)])
        for n in range(count)
    ]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("count", [17, 170])  # less than can be drawn at once, and more
def test_a_choice_does_not_depend_on_its_company(count: int, greedy: bool) -> None:
    sequences = [s for s in all_kinds(count) if greedy or s.request.params.temperature > 0]
    count = len(sequences)
    logits = rounded_logits(count)
    together = choose(logits, *sequences)
    alone = [choose(logits[i : i + 1], s)[0] for i, s in enumerate(sequences)]
    assert together == alone
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = choose(logits, *[sequences[i] for i in order], rows=order)
    assert shuffled == [alone[i] for i in order]


def kept(row: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities of the tokens that may be drawn, in float64, one step after the other."""
    scores = row.double() / params.temperature
    if 0 < params.top_k < len(scores):
        scores[scores < scores.sort(descending=True).values[params.top_k - 1]] = -torch.inf
    if params.top_p < 1:
        ordered, order = scores.sort(descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        dropped = probabilities.cumsum(-1) - probabilities >= params.top_p
        dropped[0] = False
        scores[order[dropped]] = -torch.inf
    probabilities = scores.softmax(-1)
    scores[probabilities < params.min_p * probabilities.max()] = -torch.inf
    return scores.softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("largest_top_k", [4096, 5])  # 5: larger ones are found by sorting
@pytest.mark.parametrize(
    "params",
    [
        pytest.param({"temperature": 1.0}, id="all"),
        pytest.param({"temperature": 1.0, "top_k": 20}, id="top_k"),
        pytest.param({"temperature": 1.0, "top_p": 0.7}, id="top_p"),
        pytest.param({"temperature": 1.0, "top_p": 0.003}, id="tiny top_p"),
        pytest.param({"temperature": 0.6, "top_k": 20, "top_p": 0.8}, id="top_k and top_p"),
        pytest.param({"temperature": 0.6, "top_k": 20, "top_p": 0.9999}, id="top_k, nearly 1"),
        pytest.param({"temperature": 2.0, "top_k": 299, "top_p": 0.97}, id="large top_k"),
        pytest.param({"temperature": 0.6, "min_p": 0.1}, id="min_p"),
        pytest.param({"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.1}, id="three"),
    ],
)
def test_tokens_share_the_random_numbers_by_their_probabilities_in_the_order_of_ids(
    params: dict[str, Any], largest_top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where equal tokens are cut off, too: those with the lowest ids stay."""
    monkeypatch.setattr("blip2_serve.compute.drawing.LARGEST_TOP_K", largest_top_k)
    monkeypatch.setattr("blip2_serve.compute.sampler.uniform", lambda n, *_: (n + 0.5) / 400)
    for seed in range(4):
        row = rounded_logits(1, seed)[0]
        expected = kept(row, SamplingParams(**params))
        numbers = (torch.arange(400).double() + 0.5) / 400
        tokens = torch.searchsorted(expected.cumsum(-1), numbers, right=True).tolist()
        sequences = [sequence(seed=n, **params) for n in range(400)]
        assert sample(row[None], *sequences, rows=[0] * 400) == tokens


@pytest.mark.parametrize(
    ("params", "tokens"),
    [
        pytest.param({"top_k": 2}, {0, 1, 2, 3, 4}, id="all that tie with the last of top_k"),
        pytest.param({"top_p": 0.5}, {0, 1, 2}, id="the first of those that tie"),
        pytest.param({"top_k": 1, "top_p": 0.3}, {0, 1}, id="top_p after top_k"),
        pytest.param({"top_p": 1e-9}, {0}, id="the likeliest"),
    ],
)
def test_equal_tokens_are_cut_off_in_the_order_of_their_ids(
    params: dict[str, Any], tokens: set[int]
) -> None:
    logits = torch.full((1, VOCABULARY), -9.0)
    logits[0, :5] = 1.0
    sequences = [sequence(seed=n, temperature=1.0, **params) for n in range(100)]
    assert {*sample(logits, *sequences, rows=[0] * 100)} == tokens


def test_penalties_of_many_sequences_apply_to_each_its_own() -> None:
    logits = one_row(_3=2.0, _1=1.9, _4=1.5, _5=1.4).repeat(5, 1)
    sequences = [
        sequence([3]),
        sequence([3], repetition_penalty=2.0),
        sequence([4], repetition_penalty=2.0),
        sequence([3, 3, 1], repetition_penalty=2.0),
        sequence([3, 1, 4], repetition_penalty=2.0, min_tokens=1),
    ]
    assert sample(logits, *sequences) == [3, 1, 3, 4, 3]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_broken_logits_give_no_tokens(value: float) -> None:
    """On a GPU, an index outside of a tensor would end the process."""
    tokens = sample(torch.full((34, MANY), value), *all_kinds(34))
    assert tokens == [NO_NUMBERS] * 34


def test_nothing_waits_before_the_result_is_asked_for() -> None:
    """Meta tensors have no values: reading one raises, and so does mixing them with others."""
    sampler = Sampler(EOS, Device(torch.device("meta")))
    logits = torch.empty(17, MANY, device="meta")
    results: list[Callable[[], Any]] = [sampler.choose(logits, [*range(17)], all_kinds(17))]
    results += [sampler.choose(logits, [n], [s]) for n, s in enumerate(all_kinds(17))]
    results += [sampler.choose(logits, [4, 2], [sequence(), sequence(temperature=1.0)])]
    beams = [beam(top_logprobs=2, repetition_penalty=2.0, min_tokens=3) for _ in range(3)]
    results += [sampler.expand(logits, [3, 0, 1], beams, 6)]
    for result in results:
        with pytest.raises(NotImplementedError, match="meta"):
            result()


# -- log-probabilities -----------------------------------------------------------------------------


def test_log_probabilities_are_only_returned_on_request() -> None:
    logits = random_logits(2)
    with_logprobs, without = choose(logits, sequence(top_logprobs=0), sequence())
    assert with_logprobs.logprob is not None
    assert without.logprob is None


@pytest.mark.parametrize(
    "params",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"temperature": 1.5, "top_k": 4, "seed": 3}, id="sampled"),
        pytest.param({"repetition_penalty": 3.0}, id="repetition penalty"),
        pytest.param({"min_tokens": 9}, id="end tokens forbidden"),
        pytest.param({"presence_penalty": 2.0, "frequency_penalty": 1.0}, id="OpenAI's penalties"),
        pytest.param({"logit_bias": ((4, 9.0),)}, id="a bias"),
    ],
)
def test_log_probabilities_are_those_of_the_raw_logits(params: dict[str, Any]) -> None:
    raw = one_row(_2=4.0, _3=3.0, _4=2.5, _5=2.0).log_softmax(-1)[0]
    logits = one_row(_2=4.0, _3=3.0, _4=2.5, _5=2.0)
    (choice,) = choose(logits, sequence([3], top_logprobs=3, **params))
    assert choice.logprob is not None
    assert choice.logprob.token_id == choice.token
    assert choice.logprob.logprob == pytest.approx(raw[choice.token].item())
    assert [top.token_id for top in choice.logprob.top] == [2, 3, 4]
    assert [top.logprob for top in choice.logprob.top] == pytest.approx(raw[[2, 3, 4]].tolist())


def test_zero_top_logprobs_lists_no_alternatives() -> None:
    (choice,) = choose(random_logits(), sequence(top_logprobs=0))
    assert choice.logprob is not None
    assert choice.logprob.top == ()


def test_each_row_lists_as_many_alternatives_as_it_wants() -> None:
    logits = random_logits(5)
    wanted = [3, None, 0, 7, 1]
    choices = choose(logits, *[sequence(top_logprobs=top) for top in wanted])
    tops = [None if c.logprob is None else len(c.logprob.top) for c in choices]
    assert tops == wanted
    for row, choice in zip(logits.log_softmax(-1), choices, strict=True):
        if choice.logprob is not None:
            assert choice.logprob.logprob == pytest.approx(row[choice.token].item())
            best = row.sort(descending=True).indices
            assert [t.token_id for t in choice.logprob.top] == best[
                : len(choice.logprob.top)
            ].tolist()


def test_equal_alternatives_come_in_the_order_of_their_ids() -> None:
    logits = torch.zeros(1, MANY)
    logits[0, [7, 90, 200]] = 1.0
    (choice,) = choose(logits, sequence(top_logprobs=6))
    assert choice.logprob is not None
    assert [top.token_id for top in choice.logprob.top] == [7, 90, 200, 0, 1, 2]


# -- beams -----------------------------------------------------------------------------------------


def beam(score: float = 0.0, output: int = 0, **params: Any) -> Sequence:
    result = sequence(output=output, num_beams=2, **params)
    result.score = score
    return result


def test_expand_returns_the_best_continuations_first() -> None:
    logits = random_logits(3)
    beams = [beam(-1.0), beam(-0.5), beam(-2.0)]
    candidates = expand(logits, *beams, count=10)
    sums = logits.log_softmax(-1) + torch.tensor([[-1.0], [-0.5], [-2.0]])
    assert [c.score for c in candidates] == pytest.approx(
        sums.flatten().sort(descending=True).values[:10].tolist()
    )
    for candidate in candidates:
        row = beams.index(candidate.beam)
        assert candidate.score == pytest.approx(sums[row, candidate.token].item())
    assert len({(beams.index(c.beam), c.token) for c in candidates}) == 10


def test_expand_reads_the_rows_of_its_own_beams() -> None:
    logits = random_logits(6)
    beams = [beam(-1.0), beam(-0.5)]
    alone = expand(logits[[4, 1]], *beams, count=6)
    assert expand(logits, *beams, count=6, rows=[4, 1]) == alone


def test_a_much_better_beam_gets_all_continuations() -> None:
    best = beam(0.0)
    candidates = expand(random_logits(2), beam(-50.0), best, count=4)
    assert Counter(c.beam is best for c in candidates) == {True: 4}


def test_beam_penalties_apply_to_log_probabilities() -> None:
    # With penalised logits, token 3 would stay first: 2.0 / 1.5 is more than 1.0.
    logits = one_row(_3=2.0, _4=1.0)
    raw = logits.log_softmax(-1)[0]
    best, second = expand(logits, beam(prompt=[3], repetition_penalty=5.0), count=2)
    assert (best.token, second.token) == (4, 3)
    assert best.score == pytest.approx(raw[4].item())
    assert second.score == pytest.approx(raw[3].item() * 5)


def test_scores_of_beams_may_rise_above_zero() -> None:
    """A bias or a negative penalty raises log-probabilities, which are at most 0."""
    logits = one_row(_3=2.0, _4=1.0, _6=0.5)
    raw = logits.log_softmax(-1)[0]
    biases = ((3, -100.0), (4, 5.0), (6, 5.0), (9, 40.0))
    params = {"presence_penalty": -2.0, "logit_bias": biases}
    found = expand(logits, beam(output=3, **params), count=VOCABULARY)
    expected = raw + 0
    expected[1] += 2.0  # in the answer
    for token, bias in biases:
        expected[token] += bias
    order = expected.sort(descending=True, stable=True)
    assert [c.token for c in found] == order.indices.tolist()
    assert [c.score for c in found] == pytest.approx(order.values.tolist())
    assert found[0].score > found[1].score > 0 > found[3].score


def test_log_probabilities_of_raised_beams_are_those_of_the_raw_logits() -> None:
    logits = one_row(_3=2.0, _4=1.0)
    (best,) = expand(logits, beam(top_logprobs=1, logit_bias=((4, 9.0),)), count=1)
    raw = logits.log_softmax(-1)[0].tolist()
    assert best.token == 4
    assert best.logprob is not None
    assert best.logprob.logprob == pytest.approx(raw[4])
    assert [(top.token_id, top.logprob) for top in best.logprob.top] == [(3, pytest.approx(raw[3]))]


def test_min_tokens_forbids_end_tokens_in_beams() -> None:
    logits = one_row(_2=30.0, _5=29.0, _7=3.0)
    tokens = [
        {c.token for c in expand(logits, beam(output=n, min_tokens=3), count=2)} for n in range(5)
    ]
    assert not any(ends & {*EOS} for ends in tokens[:3])
    assert all(ends == {*EOS} for ends in tokens[3:])


def test_beam_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = one_row(_3=2.0, _4=1.0)
    raw = logits.log_softmax(-1)[0]
    penalised = beam(-7.0, prompt=[3], repetition_penalty=5.0, top_logprobs=2)
    for candidate in expand(logits, penalised, count=3):
        assert candidate.logprob is not None
        assert candidate.logprob.token_id == candidate.token
        assert candidate.logprob.logprob == pytest.approx(raw[candidate.token].item())
        assert [top.token_id for top in candidate.logprob.top] == [3, 4]
    assert all(c.logprob is None for c in expand(logits, beam(), count=3))


def test_equal_continuations_come_in_the_order_of_beams_and_ids() -> None:
    logits = torch.zeros(2, MANY)
    logits[:, [7, 200]] = 1.0
    candidates = expand(logits, first := beam(-1.0), second := beam(-1.0), count=6)
    assert [(c.beam, c.token) for c in candidates] == [
        (first, 7),
        (first, 200),
        (second, 7),
        (second, 200),
        (first, 0),
        (first, 1),
    ]


def test_log_probabilities_of_continuations_are_those_of_their_own_beams() -> None:
    logits = random_logits(3)
    beams = [beam(-1.0, top_logprobs=2), beam(-0.5, top_logprobs=2)]
    raw = logits[[2, 0]].log_softmax(-1)
    candidates = expand(logits, *beams, count=20, rows=[2, 0])
    assert {beams.index(c.beam) for c in candidates} == {0, 1}
    for candidate in candidates:
        row = raw[beams.index(candidate.beam)]
        assert candidate.logprob is not None
        assert candidate.logprob.token_id == candidate.token
        assert candidate.logprob.logprob == pytest.approx(row[candidate.token].item())
        assert [top.token_id for top in candidate.logprob.top] == row.topk(2).indices.tolist()


def test_certain_continuations_keep_the_score() -> None:
    """Their log-probability is 0."""
    logits = torch.full((1, VOCABULARY), -torch.inf)
    logits[0, 4] = 3.0
    (candidate,) = expand(logits, beam(0.0, top_logprobs=1), count=1)
    assert (candidate.token, candidate.score) == (4, 0.0)
    assert candidate.logprob == TokenLogprob(4, 0.0, top=(TokenLogprob(4, 0.0),))


# -- copies ----------------------------------------------------------------------------------------


def test_fetched_tensors_are_in_main_memory() -> None:
    tensor = torch.arange(6).view(2, 3)
    on_device = OPENED.upload(tensor)
    results = [OPENED.fetch(on_device * n) for n in range(3)]
    for n, result in enumerate(results):
        assert result().device.type == "cpu"
        assert torch.equal(result(), tensor * n)
    assert torch.equal(OPENED.download(on_device), tensor)


# -- logits that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"top_logprobs": 3, "logit_bias": ((7, 2.0),)},
    ],
)
def test_a_row_that_is_not_finite_gives_no_token(number: float, params: dict[str, Any]) -> None:
    logits = random_logits(3)
    others = choose(logits[[0, 2]], *[sequence(output=2, **params)] * 2)
    logits[1, 7] = number
    choices = choose(logits, *[sequence(output=2, **params)] * 3)
    assert choices[1].token == NO_NUMBERS
    assert [choices[0], choices[2]] == others
    logits[1] = number
    assert choose(logits, *[sequence(**params)] * 3)[1].token == NO_NUMBERS


def test_a_token_that_is_forbidden_or_out_of_reach_is_no_bad_number() -> None:
    logits = random_logits(1)
    biases = tuple((token, -torch.inf) for token in range(VOCABULARY - 1))
    assert sample(logits, sequence(logit_bias=biases, min_tokens=3)) == [VOCABULARY - 1]


@pytest.mark.parametrize("params", [{}, {"top_logprobs": 2}, {"logit_bias": ((3, 5.0),)}])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_beams_that_are_not_finite_have_no_candidates(
    number: float, params: dict[str, Any]
) -> None:
    logits = random_logits(2)
    beams = [sequence(num_beams=2, **params) for _ in range(2)]
    assert len(expand(logits, *beams, count=4)) == 4
    logits[1, 3] = number
    finder = Sampler(EOS, OPENED).expand(OPENED.upload(logits), [0, 1], beams, 4)
    assert finder() == []
