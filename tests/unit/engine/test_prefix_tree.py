from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from blip2_serve.engine.prefix_tree import PrefixTree
from blip2_serve.engine.slots import KvSlots

Prefix = tuple[str, tuple[int, ...]]  # an image's digest and the first tokens after it


def prefixes(digest: str, tokens: list[int]) -> list[Prefix]:
    return [(digest, tuple(tokens[: i + 1])) for i in range(len(tokens))]


class Bench:
    """A tree and its slots; `memory` has the prefix that was computed into each slot."""

    def __init__(self, slots: int = 100) -> None:
        self.kv = KvSlots(slots)
        self.tree = PrefixTree(self.kv)
        self.memory: dict[int, Prefix] = {}

    def compute(self, digest: str, tokens: list[int], known: array[int]) -> array[int]:
        """Returns slots for all tokens, starting with `known`; allocates and fills the others."""
        own = self.kv.allocate(len(tokens) - len(known))
        assert own is not None
        slots = known + own
        self.memory |= zip(own, prefixes(digest, tokens)[len(known) :], strict=True)
        return slots

    def cache(self, tokens: list[int], digest: str = "x") -> array[int]:
        """Computes and inserts tokens as a request does that has ended."""
        slots = self.compute(digest, tokens, array("q"))
        self.tree.insert(digest, tokens, slots)
        self.kv.release(slots)
        return slots

    def known(self, tokens: list[int], digest: str = "x") -> list[int]:
        """Returns the tokens that the tree has cached."""
        slots = self.tree.match(digest, tokens)
        self.kv.release(slots)
        assert [self.memory[slot] for slot in slots] == prefixes(digest, tokens)[: len(slots)]
        return tokens[: len(slots)]

    def cached(self) -> dict[Prefix, int]:
        return {self.memory[slot]: slot for slots in self.tree.holdings() for slot in slots}


@dataclass
class Model:
    """Models the tree as a plain dictionary while requests start and end."""

    bench: Bench = field(default_factory=lambda: Bench(30))
    cached: dict[Prefix, int] = field(default_factory=dict)
    running: list[array[int]] = field(default_factory=list)

    def begin(self, digest: str, tokens: list[int]) -> None:
        bench = self.bench
        slots = bench.tree.match(digest, tokens)
        known = list(takewhile(self.cached.__contains__, prefixes(digest, tokens)))
        assert [*slots] == [self.cached[prefix] for prefix in known]
        assert [bench.memory[slot] for slot in slots] == known

        needed = len(tokens) - len(slots)
        self.room(needed, slots)
        if bench.kv.free < needed:
            bench.kv.release(slots)
            return
        self._insert(digest, tokens, bench.compute(digest, tokens, slots))

    def _insert(self, digest: str, tokens: list[int], slots: array[int]) -> None:
        self.running.append(slots)
        self.bench.tree.insert(digest, tokens, slots)
        for prefix, slot in zip(prefixes(digest, tokens), slots, strict=True):
            self.cached.setdefault(prefix, slot)

    def end(self, choice: int) -> None:
        if self.running:
            self.bench.kv.release(self.running.pop(choice % len(self.running)))

    def begin_apart(self, digest: str, tokens: list[int]) -> None:
        """Starts a request without shared slots, as if admitted before they were cached."""
        if self.room(len(tokens), array("q")):
            slots = self.bench.compute(digest, tokens, array("q"))
            self._insert(digest, tokens, slots)

    def room(self, count: int, matched: array[int] | None = None) -> bool:
        """Makes room; asserts that it succeeds if it can, and evicts nothing otherwise."""
        bench = self.bench
        possible = bench.kv.total - len(self._stuck(matched or array("q"))) >= count
        assert bench.tree.make_room(count) == (bench.kv.free >= count) == possible
        left = bench.cached()
        assert left.items() <= self.cached.items()
        assert possible or left == self.cached
        self.cached = left
        return possible

    def _stuck(self, matched: array[int]) -> set[int]:
        """Returns the slots that requests hold, and the cached slots of their prefixes."""
        held = {slot for slots in [*self.running, matched] for slot in slots}
        above = {
            (digest, sequence[:end])
            for (digest, sequence), slot in self.cached.items()
            if slot in held
            for end in range(1, len(sequence))
        }
        return held | {slot for prefix, slot in self.cached.items() if prefix in above}

    def check(self) -> None:
        tree = self.bench.tree
        tree.check_integrity()
        self.bench.kv.check_integrity(self.running, tree.holdings())
        assert self.bench.cached() == self.cached
        assert tree.slots == len(self.cached)


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=10)
actions = st.one_of(
    st.tuples(st.sampled_from(["begin", "begin_apart"]), st.sampled_from("xy"), tokens),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("room"), st.integers(0, 30)),
)


@given(st.lists(actions, max_size=40))
def test_match_finds_the_longest_cached_prefix(
    plan: list[tuple[str, ...]],
) -> None:
    model = Model()
    for name, *arguments in plan:
        getattr(model, name)(*arguments)
        model.check()


use = st.tuples(st.just("use"), st.integers(0, 9))
cache = st.tuples(st.just("cache"), st.integers(0, 9))
room = st.tuples(st.just("room"), st.integers(0, 20))


@given(st.lists(st.one_of(use, cache, room), max_size=40))
def test_the_least_recently_used_is_evicted_first_and_no_more_than_needed(
    plan: list[tuple[str, int]],
) -> None:
    bench = Bench(20)
    order: OrderedDict[int, int] = OrderedDict()  # length by first token, oldest first

    def make_room(count: int) -> None:
        assert bench.tree.make_room(count)
        while 20 - sum(order.values()) < count:
            order.popitem(last=False)

    for name, value in plan:
        sequence = [value] * (1 + value % 4)
        if name == "room":
            make_room(value)
        elif name == "use":
            assert bench.known(sequence) == (sequence if value in order else [])
            if value in order:
                order.move_to_end(value)
        else:
            make_room(len(sequence))
            bench.cache(sequence)
            order[value] = len(sequence)
            order.move_to_end(value)
        bench.tree.check_integrity()
        assert {key[1][0] for key in bench.cached()} == order.keys()


def test_tokens_of_another_image_do_not_match() -> None:
    bench = Bench()
    bench.cache([1, 2, 3], "x")
    assert bench.known([1, 2, 3], "y") == []
    assert bench.known([1, 2, 3], "x") == [1, 2, 3]


def test_a_prefix_can_match_in_part() -> None:
    bench = Bench()
    bench.cache([1, 2, 3, 4])
    assert bench.known([1, 2, 9]) == [1, 2]
    assert bench.known([1, 2]) == [1, 2]
    assert bench.known([9, 2, 3]) == []
    assert bench.known([]) == []


def test_branches_share_the_slots_of_their_common_prefix() -> None:
    bench = Bench()
    for sequence in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [1]):
        bench.cache(sequence)
        bench.tree.check_integrity()
    assert bench.tree.slots == len([1, 2, 3, 4, 5, 6])
    assert bench.kv.used == bench.tree.slots
    for sequence in ([1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6]):
        assert bench.known([*sequence, 8]) == sequence


def test_slots_of_cached_tokens_are_not_cached_twice() -> None:
    bench = Bench()
    first = bench.cache([1, 2, 3])
    bench.cache([1, 2, 3, 4])
    slots = bench.tree.match("x", [1, 2, 3, 4])
    assert slots[:3] == first
    assert bench.tree.slots == 4


def test_leaves_are_evicted_before_their_prefixes() -> None:
    bench = Bench(10)
    bench.cache([1, 2, 3])
    bench.cache([1, 2, 4])
    bench.cache([1, 2, 5])
    assert bench.known([1, 2, 3]) == [1, 2, 3]  # makes it the most recently used
    sequences = ([1, 2, 3], [1, 2, 4], [1, 2, 5])
    left = []
    for count in (6, 7, 8, 10):
        bench.tree.make_room(count)
        bench.tree.check_integrity()
        cached = bench.cached()
        left.append({ids[-1] for ids in sequences if ("x", (*ids,)) in cached})
    assert left == [{3, 5}, {3}, set(), set()]
    assert bench.tree.slots == 0


def test_make_room_evicts_nothing_if_enough_slots_are_free() -> None:
    bench = Bench(10)
    bench.cache([1, 2, 3])
    bench.tree.make_room(7)
    assert bench.known([1, 2, 3]) == [1, 2, 3]


def test_held_slots_are_not_evicted() -> None:
    bench = Bench(20)
    bench.cache([1, 2, 3])
    bench.cache([1, 2, 3, 4, 5])
    bench.cache([6, 7, 8])
    held = bench.tree.match("x", [1, 2, 3, 4])
    bench.known([6, 7, 8])  # the most recently used, but the only one that frees slots
    assert bench.tree.make_room(16)
    bench.tree.check_integrity()
    assert bench.cached().keys() == {*prefixes("x", [1, 2, 3])}
    bench.kv.release(held)
    assert bench.tree.make_room(20)
    assert (bench.tree.slots, bench.kv.free) == (0, 20)


def test_slots_of_a_running_request_are_not_given_to_others() -> None:
    bench = Bench(10)
    bench.cache([1, 2, 3])
    held = bench.tree.match("x", [1, 2, 3])
    assert not bench.tree.make_room(10)
    others = bench.kv.allocate(7)
    assert others is not None
    assert bench.kv.allocate(1) is None
    assert not {*others} & {*held}


def test_nothing_is_evicted_if_it_would_not_be_enough() -> None:
    bench = Bench(10)
    bench.cache([1, 2, 3])
    bench.cache([6, 7])
    running = bench.kv.allocate(4)
    assert running is not None
    assert not bench.tree.make_room(7)
    assert bench.tree.slots == 5
    assert bench.tree.make_room(6)
    assert bench.tree.slots == 0
