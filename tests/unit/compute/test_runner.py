from __future__ import annotations

import importlib.util
from array import array
from random import Random

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from blip2_serve.compute.base import Device
from blip2_serve.compute.devices import open_device
from blip2_serve.compute.runner import Runner, slot_bytes
from blip2_serve.engine.scheduler import Scheduler
from blip2_serve.engine.sequence import Chunk, Request, Sequence
from blip2_serve.engine.slots import KvSlots
from blip2_serve.model.decoder import OptDecoder
from support.capturing import Capturing, CapturingMixed
from support.device import DEVICE
from support.requests import make_request

TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: torch for GPUs brings it, and so do the tests on x86-64 Linux",
)

VOCABULARY = 60
HIDDEN = 32
SLOTS = 100
IMAGE_TOKEN = 59


class Model:
    """A small random decoder, and transformers' with the same weights."""

    device = Device(DEVICE)
    max_num_seqs, max_len, pad_to, max_num_batched_tokens = 8, 64, 1, 512  # see Runner

    def __init__(self, norm_first: bool = True, tied: bool = True) -> None:
        config = OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
            do_layer_norm_before=norm_first,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(0)
        self.reference = OPTForCausalLM(config).eval().requires_grad_(False)
        for parameter in self.reference.parameters():  # biases and norms too
            parameter.normal_(std=0.4)
        self.decoder = OptDecoder(config).eval().requires_grad_(False).to(DEVICE)
        weights = self.reference.state_dict()
        for name, tensor in self.decoder.checkpoint_tensors().items():
            tensor.copy_(weights[name.removeprefix("language_model.")])

    def runner(self) -> Runner:
        runner = Runner(
            self.decoder,
            self.device,
            SLOTS,
            max_num_seqs=self.max_num_seqs,
            max_len=self.max_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            pad_to=self.pad_to,
        )
        runner._kv.fill_(torch.nan)  # exposes reads of slots that were never written
        return runner

    def logits(self, sequence: Sequence) -> Tensor:
        """Returns transformers' logits after every token of the sequence."""
        embeddings = self.reference.get_input_embeddings()
        request = sequence.request
        embedded = embeddings(torch.tensor(request.prompt + sequence.output))
        embedded[: len(request.image)] = request.image
        result: Tensor = self.reference(inputs_embeds=embedded[None]).logits[0]
        return result

    def check(self, runner: Runner, chunks: list[Chunk]) -> None:
        """Runs the chunks and asserts that the logits match transformers'."""
        logits = runner.run(chunks).cpu()
        expected = [self.logits(c.sequence)[-1] for c in chunks if c.completes]
        assert logits.shape == (len(expected), VOCABULARY)
        assert logits.dtype == torch.float32
        if expected:
            torch.testing.assert_close(logits, torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


@pytest.fixture(
    autouse=True,
    params=[
        pytest.param((open_device(str(DEVICE)),), id="this device"),
        pytest.param((open_device(str(DEVICE)), 8, 64, 4), id="this device, padded to 4 tokens"),
        pytest.param((Device(DEVICE),), id="plain torch"),
        pytest.param((Capturing(DEVICE),), id="captured steps"),
        pytest.param((Capturing(DEVICE), 2, 13), id="captured steps for few short sequences"),
        # Few tokens: Triton's interpreter is slow. Longer steps run uncaptured.
        pytest.param(
            (CapturingMixed(DEVICE), 8, 64, 1, 12),
            id="captured prefill",
            marks=[TRITON, pytest.mark.long],
        ),
    ],
)
def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("device", "max_num_seqs", "max_len", "pad_to", "max_num_batched_tokens")
    for name, value in zip(names, request.param, strict=False):
        monkeypatch.setattr(Model, name, value)


def sequence(
    length: int, slots: list[int] | None = None, image: int = 0, seed: int = 0, max_tokens: int = 1
) -> Sequence:
    random = Random(seed)
    prompt = [IMAGE_TOKEN] * image + [random.randrange(VOCABULARY) for _ in range(length - image)]
    picture = torch.randn(image, HIDDEN, generator=torch.Generator().manual_seed(seed))
    request = make_request(
        f"{seed}", prompt, image=picture, digest=f"picture {seed}", max_tokens=max_tokens
    )
    return Sequence(request, slots=array("q", slots or range(1, length + 1)))


@pytest.mark.parametrize(
    ("norm_first", "tied"),
    [
        pytest.param(True, True, id="pre-norm, tied head"),
        pytest.param(False, True, id="post-norm, tied head"),
        pytest.param(True, False, id="pre-norm, untied head"),
        pytest.param(False, False, id="post-norm, untied head"),
    ],
)
def test_logits_match_transformers_in_prefill_and_decode(norm_first: bool, tied: bool) -> None:
    model = Model(norm_first, tied)
    runner = model.runner()
    s = sequence(9, slots=list(range(40, 60)), image=3)
    model.check(runner, [Chunk(s, 0, 9)])
    for token in (5, 17, 0):
        s.output.append(token)
        model.check(runner, [Chunk(s, s.length - 1, s.length)])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 10, 11])
def test_logits_match_transformers_for_any_chunk_size(model: Model, size: int) -> None:
    runner = model.runner()
    s = sequence(11, image=4)
    for start in range(0, 11, size):
        model.check(runner, [Chunk(s, start, min(start + size, 11))])


def test_image_features_replace_the_embeddings_of_image_tokens(model: Model) -> None:
    with_features = sequence(8, image=4)
    without = sequence(8, image=4)
    without.request.image = torch.empty(0, HIDDEN)
    logits = []
    for s in (with_features, without):
        logits.append(model.runner().run([Chunk(s, 0, 8)]).cpu()[0])
        torch.testing.assert_close(logits[-1], model.logits(s)[-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*logits, atol=0.1)


def test_sequences_in_one_step_do_not_affect_each_other(model: Model) -> None:
    runner = model.runner()
    short = sequence(2, slots=[1, 2, 3], image=1, seed=1)
    long = sequence(20, slots=list(range(30, 60)), image=4, seed=2)
    for s in (short, long):
        model.check(runner, [Chunk(s, 0, s.length)])
        s.output.append(11)
    chunked = sequence(9, slots=list(range(10, 20)), image=4, seed=3)
    tiny = sequence(1, slots=[5], seed=4)
    whole = sequence(6, slots=[99, 4, 98, 6, 97, 7], image=2, seed=5)
    model.check(
        runner,
        [
            Chunk(short, 2, 3),
            Chunk(long, 20, 21),
            Chunk(chunked, 0, 5),
            Chunk(tiny, 0, 1),
            Chunk(whole, 0, 6),
        ],
    )
    long.output.append(12)
    model.check(runner, [Chunk(long, 21, 22), Chunk(chunked, 5, 9)])


def test_a_last_chunk_of_one_token_may_follow_decodes(model: Model) -> None:
    runner = model.runner()
    decoding = sequence(12, slots=list(range(20, 40)), seed=1)
    prompt = sequence(4, seed=2)
    model.check(runner, [Chunk(decoding, 0, 12), Chunk(prompt, 0, 3)])
    decoding.output.append(3)
    model.check(runner, [Chunk(decoding, 12, 13), Chunk(prompt, 3, 4)])


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_tokens_of_an_answer_can_be_computed_in_chunks(model: Model, size: int) -> None:
    runner = model.runner()
    decoding = sequence(5, slots=list(range(20, 40)), seed=1)
    resumed = sequence(7, slots=list(range(1, 14)), image=3, seed=2)
    model.check(runner, [Chunk(decoding, 0, 5), Chunk(resumed, 0, 7)])
    resumed.output += [5, 17, 0, 30, 5, 2]
    for start in range(7, 13, size):
        decoding.output.append(start)
        own = Chunk(decoding, decoding.length - 1, decoding.length)
        model.check(runner, [own, Chunk(resumed, start, min(start + size, 13))])
    again = sequence(7, slots=list(range(60, 73)), image=3, seed=2)
    again.output += resumed.output
    model.check(runner, [Chunk(again, 0, 4)])
    model.check(runner, [Chunk(again, 4, 13)])  # the rest of its prompt, and all of its answer


def test_a_step_without_completed_chunks_gives_no_logits(model: Model) -> None:
    assert model.runner().run([Chunk(sequence(8), 0, 5)]).shape == (0, VOCABULARY)


def test_reused_slots_do_not_leak_earlier_keys_and_values(model: Model) -> None:
    runner = model.runner()
    earlier = sequence(20, image=4, seed=1)
    model.check(runner, [Chunk(earlier, 0, 20)])
    later = sequence(7, slots=[20, 3, 11, 1, 2, 19, 7, 8], image=2, seed=2)
    model.check(runner, [Chunk(later, 0, 4)])
    model.check(runner, [Chunk(later, 4, 7)])
    later.output.append(9)
    model.check(runner, [Chunk(later, 7, 8)])


def test_forked_sequences_share_slots_and_continue_independently(model: Model) -> None:
    runner = model.runner()
    parent = sequence(9, slots=list(range(40, 49)), image=3)
    model.check(runner, [Chunk(parent, 0, 9)])
    forks = [parent.fork(i) for i in range(3)]
    for step in range(3):
        for i, fork in enumerate(forks):
            fork.output.append(10 * i + step)
            fork.slots.append(1 + 10 * i + step)
        model.check(runner, [Chunk(fork, fork.length - 1, fork.length) for fork in forks])
    # Fork once more, from a sequence that is longer by then.
    child = forks[1].fork(3)
    for fork, token, slot in ((forks[1], 50, 80), (child, 51, 81)):
        fork.output.append(token)
        fork.slots.append(slot)
    model.check(runner, [Chunk(fork, fork.length - 1, fork.length) for fork in (child, forks[1])])


def test_a_prompt_can_start_with_slots_computed_by_another(model: Model) -> None:
    runner = model.runner()
    earlier = sequence(12, slots=list(range(20, 32)), image=4)
    model.check(runner, [Chunk(earlier, 0, 12)])
    same = sequence(12, slots=[*range(20, 31), 5], image=4)
    model.check(runner, [Chunk(same, 11, 12)])
    # One prompt differs from within the image tokens on, another after them.
    for known in (2, 9):
        other = sequence(12, slots=[*range(20, 20 + known), *range(50, 62 - known)], image=4)
        other.request.prompt[known:] = [(token + 1) % VOCABULARY for token in other.request.prompt][
            known:
        ]
        model.check(runner, [Chunk(other, known, 12)])


@pytest.mark.parametrize(
    "prefix_caching", [True, False], ids=["prefix caching", "no prefix caching"]
)
def test_many_requests_through_few_slots_match_transformers(
    model: Model, prefix_caching: bool
) -> None:
    """Requests with one answer, samples or beams, whose prompts share prefixes."""
    random = Random(0)
    runner = model.runner()
    scheduler = Scheduler(
        KvSlots(SLOTS),
        max_num_seqs=6,
        max_waiting=100,
        max_num_batched_tokens=12,
        prefix_caching=prefix_caching,
    )
    picture = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    prefix = [IMAGE_TOKEN] * 2 + [random.randrange(VOCABULARY) for _ in range(12)]
    slow = isinstance(model.device, CapturingMixed)
    for name in range(8 if slow else 24):
        prompt = prefix[: random.randint(2, 14)]
        prompt += [random.randrange(VOCABULARY) for _ in range(random.randint(1, 10))]
        width = random.choice([{}, {"n": 3}, {"num_beams": 4}])
        request = make_request(
            f"{name}", prompt, image=picture, max_tokens=random.randint(1, 8), **width
        )
        scheduler.add(request)
    while scheduler.has_work:
        chunks = scheduler.schedule().chunks
        model.check(runner, chunks)
        scheduler.advance(chunks)
        for request in {c.sequence.request: None for c in chunks if c.completes}:
            advance(scheduler, request, random)
        scheduler.check_integrity()
    assert (scheduler.cached_tokens > 30) is prefix_caching


def advance(scheduler: Scheduler, request: Request, random: Random) -> None:
    """Appends a random token to every sequence; beams continue random beams."""
    sequences = request.sequences
    if len(sequences[0].output) + 1 == request.params.max_tokens:
        for s in [*sequences]:
            scheduler.end(s)
        return
    if request.width > len(sequences) or request.params.num_beams > 1:
        parents = random.choices(sequences, k=request.width)
        request.sequences = [parent.fork(i) for i, parent in enumerate(parents)]
    for s in request.sequences:
        s.append(random.randrange(VOCABULARY))


def test_slot_bytes_counts_keys_and_values_of_all_layers(model: Model) -> None:
    assert slot_bytes(model.decoder) == 2 * 2 * HIDDEN * 4
