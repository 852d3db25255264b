"""Incremental detokenization with stop strings. Pure Python; knows no tokenizer, only `decode`.

Text that was returned is never taken back: it is held while it could still become a different
character or a stop string.
"""

from __future__ import annotations

from collections.abc import Callable

Decode = Callable[[list[int]], str]  # token ids -> text, without special tokens

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """The text of one sequence.

    Decoding starts at the last token that ended on a whole character, not at the first, so the cost
    of a token does not grow with the text before it. One decoded token is kept as context, because
    some tokenizers write a token differently at the start of a text.
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._ids: list[int] = []
        self._context = 0  # index of the token that decoding starts at
        self._read = 0  # tokens that have been turned into text
        self._held = ""  # decoded text that could be the start of a stop string
        self._early = 0  # characters of it that came before stop strings counted
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        """Adds a token and returns the text that is now certain.

        A stop string can only end here if `may_stop`; it then sets `stopped`, and the text ends
        before it.
        """
        self._ids.append(token)
        self._held += self._new_text()
        if not may_stop:
            self._early = len(self._held)
        elif self._cut_at_stop():
            return self._release(0)
        return self._release(self._begun_stop())

    def close(self) -> str:
        """Returns the rest of the text; an incomplete character becomes U+FFFD."""
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
        """Length of the longest suffix of the held text that begins a stop string."""
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
