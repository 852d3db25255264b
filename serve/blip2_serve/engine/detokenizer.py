"""Tokens to text as they come, with stop strings. Pure Python; knows no tokenizer, only `decode`.

What was handed out is never taken back: text is held while it could still turn into a different
character or into a stop string.
"""

from __future__ import annotations

from collections.abc import Callable

Decode = Callable[[list[int]], str]  # token ids -> text, without special tokens

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one sequence.

    Decoding starts at the last token that ended on a whole character rather than at the first, so
    a token costs the same whatever came before; one decoded token of context is kept before it,
    for tokenizers that write a token differently at the start.
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._context = 0  # decoding starts here
        self._read = 0  # tokens before this one have been turned into text
        self._held = ""  # decoded, but could be the beginning of a stop string
        self._early = 0  # so much of it came when no stop string could end yet
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        """The text that is certain after this token. `may_stop`: may a stop string end here?

        After a stop string, `stopped` is set and the text ends before it.
        """
        self._ids.append(token)
        self._held += self._new_text()
        if not may_stop:
            self._early = len(self._held)
        elif self._cut_at_stop():
            return self._release(0)
        return self._release(self._begun_stop())

    def close(self) -> str:
        """The rest, once no token follows; half a character comes out as U+FFFD."""
        if not self.stopped:
            self._held += self._new_text(final=True)
            self._cut_at_stop()
        return self._release(0)

    def _new_text(self, final: bool = False) -> str:
        known = self._decode(self._ids[self._context : self._read])
        text = self._decode(self._ids[self._context :])
        if text.endswith(_REPLACEMENT) and not final:
            return ""
        if self._read < len(self._ids):
            self._context, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _cut_at_stop(self) -> bool:
        starts = (self._held.find(s, max(0, self._early - len(s) + 1)) for s in self._stop)
        found = [at for at in starts if at >= 0]
        if found:
            self._held = self._held[: min(found)]
            self.stopped = True
        return self.stopped

    def _begun_stop(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(s) - 1 for s in self._stop), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-length:]) for s in self._stop if len(s) > length):
                return length
        return 0

    def _release(self, keep: int) -> str:
        split = len(self._held) - keep
        text, self._held = self._held[:split], self._held[split:]
        self._early = max(0, self._early - split)
        return text
