"""Prefix caching: the KV of earlier requests, kept for later ones that begin the same.

One radix tree per image: a node is a run of tokens with their KV slots, and its children continue
from there. The key is the image together with the tokens, never the tokens alone: all images share
the same image tokens. When slots are needed, the least recently used prefixes are evicted first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from blip2_serve.engine.slots import KvSlots


@dataclass(eq=False)
class _Node:
    parent: _Node | None
    tokens: list[int]
    slots: array[int]
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token

    def common(self, tokens: Sequence[int], start: int) -> int:
        """How many of this node's tokens `tokens` repeats from `start` on."""
        length = min(len(self.tokens), len(tokens) - start)
        if self.tokens[:length] == tokens[start : start + length]:
            return length
        return next(i for i in range(length) if self.tokens[i] != tokens[start + i])


class PrefixTree:
    """Caches slots of `kv`; requests may hold the same slots."""

    def __init__(self, kv: KvSlots) -> None:
        self.slots = 0  # how many are cached
        self._kv = kv
        self._roots: dict[str, _Node] = {}
        # Oldest first. A walk touches a node before its parent, so a parent is always younger than
        # its children and the oldest node is always a leaf.
        self._by_age: OrderedDict[_Node, str] = OrderedDict()

    def match(self, digest: str, tokens: list[int]) -> array[int]:
        """Returns the slots of the longest cached prefix; the caller becomes a holder of them."""
        slots = array("q")
        root = self._roots.get(digest)
        if root is None:
            return slots
        node = root
        while child := node.children.get(tokens[len(slots)]) if len(slots) < len(tokens) else None:
            common = child.common(tokens, len(slots))
            slots.extend(child.slots[:common])
            node = child
            if common < len(child.tokens):
                break
        self._touch(node, digest)
        self._kv.share(slots)
        return slots

    def insert(self, digest: str, tokens: list[int], slots: array[int]) -> None:
        """Caches the slots of these tokens, except where the tree has slots for them already."""
        node = self._roots.setdefault(digest, _Node(None, [], array("q")))
        at = 0
        while at < len(tokens):
            child = node.children.get(tokens[at])
            if child is None:
                child = _Node(node, tokens[at:], slots[at : len(tokens)])
                self._kv.cache(child.slots)
                self.slots += len(child.slots)
                node.children[tokens[at]] = child
            else:
                common = child.common(tokens, at)
                if common < len(child.tokens):
                    child = self._split(child, common)
            at += len(child.tokens)
            node = child
        self._touch(node, digest)

    def make_room(self, count: int) -> bool:
        """Evicts the oldest prefixes until `count` slots are free; evicts none if that is too few.

        Slots that a request holds stay: evicting them would free nothing.
        """
        missing = count - self._kv.free
        if missing <= 0:
            return True
        # Every step asks again for the request at the head of the queue, so fail fast.
        evicted = self._oldest(missing) if missing <= self._kv.evictable else {}
        for node, digest in evicted.items():
            self._evict(node, digest)
        return bool(evicted)

    def holdings(self) -> Iterator[array[int]]:
        """Yields the slots of each node."""
        return (node.slots for node in self._by_age)

    def check_integrity(self) -> None:
        """Asserts that this is a tree whose parents are younger than their children."""
        ages = {node: age for age, node in enumerate(self._by_age)}
        stack = list(self._roots.values())
        seen = 0
        while stack:
            node = stack.pop()
            assert len(node.tokens) == len(node.slots)
            assert node.parent is None or node in ages
            for first, child in node.children.items():
                assert child.tokens[0] == first
                assert child.parent is node
                assert node.parent is None or ages[node] > ages[child]
                stack.append(child)
                seen += 1
        assert seen == len(ages)
        assert self.slots == sum(len(slots) for slots in self.holdings())
        assert all(root.children for root in self._roots.values())

    def _oldest(self, missing: int) -> dict[_Node, str]:
        """The oldest nodes that together free `missing` slots, children first; else empty."""
        chosen: dict[_Node, str] = {}
        for node, digest in self._by_age.items():  # children come before their parents
            # A request that holds a slot also holds those before it in the node.
            if self._kv.is_held(node.slots[-1]) or not chosen.keys() >= {*node.children.values()}:
                continue
            chosen[node] = digest
            if self._kv.is_held(node.slots[0]):
                missing -= sum(not self._kv.is_held(slot) for slot in node.slots)
            else:
                missing -= len(node.slots)
            if missing <= 0:
                return chosen
        return {}

    def _evict(self, leaf: _Node, digest: str) -> None:
        parent = leaf.parent
        assert parent is not None
        del parent.children[leaf.tokens[0]]
        if parent.parent is None and not parent.children:
            del self._roots[digest]
        del self._by_age[leaf]
        self._kv.uncache(leaf.slots)
        self.slots -= len(leaf.slots)

    def _split(self, node: _Node, at: int) -> _Node:
        """Splits a node after `at` of its tokens and returns the upper half, now its parent."""
        assert node.parent is not None
        upper = _Node(node.parent, node.tokens[:at], node.slots[:at], {node.tokens[at]: node})
        node.parent.children[node.tokens[0]] = upper
        node.parent, node.tokens, node.slots = upper, node.tokens[at:], node.slots[at:]
        return upper

    def _touch(self, node: _Node, digest: str) -> None:
        while node.parent is not None:
            self._by_age[node] = digest
            self._by_age.move_to_end(node)
            node = node.parent
